"""Rewrites of single nodes that keep every bit, applied as nodes are made. Next: lower.py.

    add(a, negate(b))            -> subtract(a, b)
    stop_gradient(x), cast to x's own dtype, reshape or broadcast to x's own shape, permute to
    x's own order, pad by nothing, x * 1, x / 1, x + -0.0  -> x
    reshape(reshape(x))          -> reshape(x)
    permute(permute(x))          -> permute(x); transpose is a permute
    f(permute(x), ...)           -> permute(f(x, ...)) of an elementwise f, where the last axis
                                    becomes the second one: images are computed channels last
    sum over axes of size 1      -> reshape(x)
    sum over trailing and other axes                -> the sum of sums (needle/ops/order.py)
    a long reduction to few elements                -> its chunks side by side, then fold
Equal ops on equal inputs are one node (Builder.make). Relies on: ops are pure.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from needle.array.spec import as_axes
from needle.autograd import primitive
from needle.compiler import OFF
from needle.compiler.vectors import least, most
from needle.dtype import FLOATS, LOW_PRECISION, float32, int64
from needle.ops.elementwise import (
    SUBTRACT,
    AddScalar,
    BroadcastTo,
    Cast,
    DivScalar,
    EWiseAdd,
    MulScalar,
    Negate,
    StopGradient,
)  # fmt: skip
from needle.ops.index import Checked, IndexCopy, ScatterAdd
from needle.ops.movement import Pad, Permute, Reshape, Transpose, without
from needle.ops.order import CHUNK, ROWS, fold, split_axes
from needle.ops.reduce import Max, Min, Reduction, Summation

if TYPE_CHECKING:
    from needle.compiler.graph import Builder, Node

MANY = 1 << 16  # elements whose reduction is worth more than one thread
FEW = 16  # units that all threads could share evenly
COLUMN_BLOCK = 64  # outputs that one unit of a nest of columns adds


def rewrite(builder: Builder, op: Any, inputs: tuple[Node, ...]) -> Node | None:
    """A simpler node of the same value, or None."""
    rule = LOWERED.get(type(op)) or ("simplify" not in OFF and ALGEBRA.get(type(op)))
    found = rule(builder, op, *inputs) if rule else None
    if found is None and getattr(op, "is_elementwise", False) and "simplify" not in OFF:
        return hoist(builder, op, inputs)
    return found


def hoist(builder: Builder, op: Any, inputs: tuple[Node, ...]) -> Node | None:
    """The permutes of an elementwise op's inputs, after it."""
    ndim = len(inputs[0].shape)
    order = (0, ndim - 1, *range(1, ndim - 1))
    found = [type(x.op) is Permute and x.op.order == order for x in inputs]
    if ndim < 3 or not any(found) or (ndim == 3 and not all(found)):
        return None
    back = Permute(tuple(order.index(axis) for axis in range(ndim)))
    moved = [builder.make(back, x) for x in inputs]
    return builder.make(Permute(order), builder.make(op, *moved))


def same(builder: Builder, op: Any, x: Node) -> Node | None:
    return x


def add(builder: Builder, op: Any, a: Node, b: Node) -> Node | None:
    if type(b.op) is Negate:
        return builder.make(SUBTRACT, a, b.inputs[0])
    return None


def pad(builder: Builder, op: Pad, x: Node) -> Node | None:
    return None if any(map(any, op.widths)) else x


def cast(builder: Builder, op: Cast, x: Node) -> Node | None:
    return x if x.spec.dtype == op.dtype else None


def broadcast(builder: Builder, op: BroadcastTo, x: Node) -> Node | None:
    return x if x.shape == op.shape else None


def reshape(builder: Builder, op: Reshape, x: Node) -> Node | None:
    if x.shape == op.shape:
        return x
    return builder.make(op, x.inputs[0]) if type(x.op) is Reshape else None


def permute(builder: Builder, op: Permute, x: Node) -> Node | None:
    if op.order == tuple(range(len(op.order))):
        return x
    if type(x.op) is Permute:
        return builder.make(Permute(tuple(x.op.order[axis] for axis in op.order)), x.inputs[0])
    return None


def transpose(builder: Builder, op: Transpose, x: Node) -> Node | None:
    order = list(range(len(x.shape)))
    first, second = op.axes or (-2, -1)
    order[first], order[second] = order[second], order[first]
    return builder.make(Permute(tuple(order)), x)


def scale(builder: Builder, op: Any, x: Node) -> Node | None:
    plain = x.spec.dtype in FLOATS or type(op.scalar) is int
    return x if plain and op.scalar == 1 and type(op.scalar) is not bool else None


def shift(builder: Builder, op: AddScalar, x: Node) -> Node | None:
    is_negative_zero = type(op.scalar) is float and str(op.scalar) == "-0.0"
    return x if is_negative_zero and x.spec.dtype in FLOATS else None


def reduction(builder: Builder, op: Any, x: Node) -> Node | None:
    """Axes of size 1 need no adding; sums over trailing and other axes are added in this order."""
    axes = as_axes("reduce", op.axes, len(x.shape))
    trailing, others = split_axes(x.shape, axes)
    kept = without(x.shape, axes)
    if type(op) is Summation and x.spec.dtype not in FLOATS and x.spec.dtype != int64:
        return builder.make(op, builder.make(Cast(int64), x))
    if trailing and others and x.spec.dtype in LOW_PRECISION and type(op) is Summation:
        wide = builder.make(op, builder.make(Cast(float32), x))
        return builder.make(Cast(x.spec.dtype), wide)
    if not trailing and not others:
        return builder.make(Reshape(kept), x)
    if trailing and others:
        part = builder.make(type(op)(trailing), x)
        moved = tuple(axis - sum(each < axis for each in trailing) for axis in others)
        return builder.make(Reshape(kept), builder.make(type(op)(moved), part))
    found = trailing or others
    if found != op.axes:
        return builder.make(Reshape(kept), builder.make(type(op)(found), x))
    return spread(builder, op, x, found, CHUNK if trailing else ROWS)


def spread(builder: Builder, op: Any, x: Node, axes: tuple[int, ...], chunk: int) -> Node | None:
    """A reduction of many elements to too few outputs for all threads: each chunk's own first."""
    size, count = prod(x.shape), prod(x.shape[axis] for axis in axes)
    outputs = size // max(count, 1)
    units = outputs if chunk == CHUNK else -(-outputs // COLUMN_BLOCK)
    if size < MANY or units >= FEW or count <= chunk or x.spec.dtype in LOW_PRECISION:
        return None
    first = axes[0]
    if axes != tuple(range(first, first + len(axes))):
        return None
    before, after = x.shape[:first], x.shape[first + len(axes) :]
    flat = builder.make(Reshape((*before, count, *after)), x)
    missing = -count % chunk
    if missing:
        widths = [(0, 0)] * len(flat.shape)
        widths[first] = (0, missing)
        neutral = 0 if type(op) is Summation else (least if type(op) is Max else most)(x.spec.dtype)
        flat = builder.make(Pad(tuple(widths), neutral), flat)
    shape = (*before, (count + missing) // chunk, chunk, *after)
    parts = builder.make(type(op)((first + 1,)), builder.make(Reshape(shape), flat))
    last = Fold if type(op) is Summation else type(op)
    return builder.make(last((first,)), parts)


def scatter(builder: Builder, op: ScatterAdd, x: Node, *indices: Node) -> Node | None:
    """Low precision is added in float32 and rounded once."""
    if x.spec.dtype not in LOW_PRECISION:
        return None
    wide = builder.make(op, builder.make(Cast(float32), x), *indices)
    return builder.make(Cast(x.spec.dtype), wide)


def index_copy(builder: Builder, op: IndexCopy, x: Node, source: Node, index: Node) -> Node | None:
    """Indices are checked by a nest of its own, so that the copy may be made in place."""
    if type(index.op) is Checked and index.op.size == x.shape[op.axis]:
        return None
    checked = Checked("index_copy", x.shape[op.axis], True)
    return builder.make(op, x, source, builder.make(checked, index))


@primitive
class Fold(Reduction):
    """y = x folded by halving over one axis (needle/ops/order.py): the sum of chunks' sums"""

    def compute(self, x: np.ndarray) -> np.ndarray:
        return fold(np.moveaxis(x, self.axes[0], 0))


ALGEBRA: dict[type, Any] = {
    EWiseAdd: add, StopGradient: same, Cast: cast, BroadcastTo: broadcast, Reshape: reshape,
    Permute: permute, Pad: pad, MulScalar: scale, DivScalar: scale, AddScalar: shift,
}  # fmt: skip
LOWERED: dict[type, Any] = {  # what later passes know in one form only
    Transpose: transpose, Summation: reduction, Max: reduction, Min: reduction,
    ScatterAdd: scatter, IndexCopy: index_copy,
}  # fmt: skip
