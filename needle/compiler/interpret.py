"""What nests mean: run(nest, memory) does in NumPy what kernels do in machine code, to the same
bits.

An expression's value is an array over the whole domain: one axis per loop, of size 1 along the
loops that the value does not depend on. The values of a nest are all computed before the first
store. Where a kernel flags an error, the interpreter raises: an IndexError for a failed `check`.
An access outside its buffer is a fault of the program: AssertionError.

All NaNs count as one value. A `scan` begins with its first element and a contraction's total with
its first segment; a scatter's sums begin with +0.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from math import prod
from typing import Any

import numpy as np

import needle.dtype as dtypes
from needle.compiler import loops
from needle.compiler.loops import ROWS, Access, Buffer, Contraction, Expr, Nest, Scatter, offsets
from needle.dtype import DType, bfloat16, float32, float64
from needle.ops.elementwise import larger, smaller
from needle.ops.order import SEGMENT, chain, fold, sum_columns, sum_rows

Memory = MutableMapping[Buffer, np.ndarray]


def run(nest: loops.AnyNest, memory: Memory) -> None:
    """Execute a nest on the buffers' memory, flat arrays."""
    loops.verify(nest)
    with np.errstate(all="ignore"):
        if isinstance(nest, Contraction):
            if nest.sums:
                memory[nest.sums][:] = segment_sums(nest, memory).ravel()
            run_loops(nest.epilogue, memory, accumulate(nest, memory))
        elif isinstance(nest, Scatter):
            scatter(nest, memory)
        elif isinstance(nest, loops.HostCall):
            call(nest, memory)
        elif isinstance(nest, loops.Repeat):
            repeat(nest, memory)
        else:
            run_loops(nest, memory)


def run_loops(nest: Nest, memory: Memory, acc: np.ndarray | None = None) -> None:
    domain = Domain((*nest.outer, nest.inner), nest.order, memory, acc)
    values = domain.evaluate([*nest.values, *(e for s in nest.stores for e, _ in s.access.dynamic)])
    if 0 in nest.outer:
        return
    places = [domain.place(store.access, values) for store in nest.stores]
    for store, place in zip(nest.stores, places, strict=True):
        place, value = np.broadcast_arrays(place, values[store.value])
        memory[store.access.buffer][place] = value


class Domain:
    """The points of a nest's loops, and the values of expressions there."""

    def __init__(
        self, shape: Sequence[int], order: str, memory: Memory, acc: np.ndarray | None = None
    ) -> None:
        self.shape, self.order, self.memory, self.acc = tuple(shape), order, memory, acc

    def evaluate(self, roots: Sequence[Expr]) -> dict[Expr, np.ndarray]:
        """The values of the roots and of all that they depend on."""
        values: dict[Expr, np.ndarray] = {}
        for each in loops.ordered(roots):
            args = [values[x] for x in each.args]
            found = values[each] = np.asarray(self.value(each, args, values))
            assert (found.dtype, found.ndim) == (each.dtype, len(self.shape)), each
        return values

    def value(self, x: Expr, args: list[np.ndarray], values: Mapping[Expr, np.ndarray]) -> Any:
        if x.op in ("const", "param"):
            return x.attr.reshape([1] * len(self.shape))
        if x.op == "axis":
            return self.coordinates(x.attr)
        if x.op == "acc":
            return self.acc
        if x.op == "load":
            return self.load(x.attr, args, values)
        if x.op in ("reduce", "scan"):
            rows = np.broadcast_to(args[0], (*args[0].shape[:-1], self.shape[-1]))
            if x.op == "scan":
                return np.add.accumulate(rows, -1, dtype=x.dtype)
            return reduce(x.attr, rows, self.order)[..., None]
        if x.op == "check":
            return wrap(args[0], *x.attr)
        return convert(x, args[0]) if x.op in ("cast", "bitcast") else OPS[x.op](*args)

    def coordinates(self, axis: int) -> np.ndarray:
        shape = [n if a == axis else 1 for a, n in enumerate(self.shape)]
        return np.arange(self.shape[axis], dtype=np.int64).reshape(shape)

    def place(self, access: Access, values: Mapping[Expr, np.ndarray]) -> np.ndarray:
        """Where in its buffer an access lies, over the domain."""
        found = np.full([1] * len(self.shape), access.offset)
        for axis, stride in access.strides:
            found = found + self.coordinates(axis) * stride
        for each, stride in access.dynamic:
            found = found + values[each] * stride
        return found

    def load(
        self, access: Access, mask: list[np.ndarray], values: Mapping[Expr, np.ndarray]
    ) -> np.ndarray:
        """The elements at an access; where the mask is false 0, and nothing is read."""
        place = self.place(access, values)
        place, inside = np.broadcast_arrays(place, mask[0] if mask else True)
        found = np.zeros(place.shape, access.buffer.dtype)
        chosen = place[inside]
        outside = (chosen < 0) | (chosen >= access.buffer.size)
        assert not outside.any(), f"{access.buffer} read at {chosen[outside][:4]}"
        found[inside] = self.memory[access.buffer][chosen]
        return found


# Scalar operations


def on_bits(function: Callable[..., Any], kind: str = "u") -> Callable[..., Any]:
    """An operation on the bits of integers, unsigned ones or, of the kind "i", signed ones."""

    def run(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        dtype = np.dtype(f"{kind}{a.itemsize}")
        return np.asarray(function(a.view(dtype), b.view(dtype))).view(a.dtype)

    return run


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b of integers, truncated."""
    return (a - np.fmod(a, b)) // b


def wrap(index: np.ndarray, size: int, identifier: int) -> np.ndarray:
    outside = (index < -size) | (index >= size)
    if outside.any():
        bounds = f"expected an index within [{-size}, {size})"
        raise IndexError(f"check {identifier}: {bounds}; received {index[outside][0]}")
    return np.where(index < 0, index + size, index)


def convert(x: Expr, found: np.ndarray) -> np.ndarray:
    """A value in another dtype, or its bits as another."""
    if x.op == "bitcast":
        return found.view(x.dtype)
    if x.dtype.kind == "u" and found.dtype.kind not in "biu":
        return dtypes.saturate(found, x.dtype)
    return dtypes.cast(found, x.dtype)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c, rounded once."""
    if a.dtype == float32:
        # The product is exact in float64; a sum rounded to odd there rounds right to float32.
        return odd_sum(np.multiply(a, b, dtype=float64), c.astype(float64)).astype(float32)
    return fma64(*np.broadcast_arrays(a, b, c)) if a.dtype == float64 else a * b + c


def two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(a + b rounded, what the rounding took away); Knuth."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a + b; where that is inexact, the neighbour whose last bit is 1."""
    total, error = two_sum(a, b)
    bits = np.asarray(total).view(np.int64)
    step = np.where((error > 0) == (total > 0), 1, -1)
    inexact = (error != 0) & np.isfinite(error) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).view(float64)


def fma64(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Of float64: Boldo and Melquiond's algorithm (IEEE Trans. Computers 57(4), 2008) where nothing
    can overflow or underflow on the way, else the C library's."""
    product = a * b
    size = np.abs(product)
    safe = (size > 2.0**-900) & (size < 2.0**990) & (np.abs(c) < 2.0**990)
    safe &= (np.abs(a) < 2.0**990) & (np.abs(b) < 2.0**990)
    high, low = two_sum(c, product_error(a, b, product))
    top, rest = two_sum(product, high)
    found = top + odd_sum(rest, low)
    found[~safe] = C_FMA(a[~safe], b[~safe], c[~safe])
    return found


def product_error(a: np.ndarray, b: np.ndarray, product: np.ndarray) -> np.ndarray:
    """a * b - product, exactly; Veltkamp and Dekker."""
    (a1, a2), (b1, b2) = map(halves, (a, b))
    return a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x as a sum of two numbers of at most 26 bits."""
    scaled = x * (2.0**27 + 1)
    high = scaled - (scaled - x)
    return high, x - high


LIBRARY: Any = ctypes.CDLL(None)
LIBRARY.fma.restype, LIBRARY.fma.argtypes = ctypes.c_double, [ctypes.c_double] * 3
C_FMA = np.frompyfunc(LIBRARY.fma, 3, 1)


OPS: dict[str, Callable[..., Any]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide, "fma": fma,
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "floor": np.floor, "ceil": np.ceil,
    "rint": np.rint, "trunc": np.trunc, "max": larger, "min": smaller, "frem": np.fmod,
    "sdiv": quotient, "srem": np.fmod, "udiv": on_bits(np.floor_divide),
    "urem": on_bits(np.remainder), "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "shl": np.left_shift,
    "lshr": on_bits(np.right_shift), "ashr": on_bits(np.right_shift, "i"), "lt": np.less,
    "le": np.less_equal, "eq": np.equal, "ne": np.not_equal, "select": np.where, "rare": np.where,
}  # fmt: skip


# Reductions


def reduce(kind: str, rows: np.ndarray, order: str) -> np.ndarray:
    """Rows reduced over the last axis."""
    if kind in ("argmax", "argmin"):
        return np.asarray(getattr(np, kind)(rows, -1))
    if kind == "sum" and order == ROWS:
        return sum_rows(rows)
    columns = np.moveaxis(rows, -1, 0)
    if kind in ("sum", "fold"):
        return sum_columns(columns) if kind == "sum" else fold(columns)
    found = columns[0]
    for each in columns[1:]:  # in any order: the result is the same
        found = larger(found, each) if kind == "max" else smaller(found, each)
    return found


def accumulate(nest: Contraction, memory: Memory) -> np.ndarray:
    """A contraction's elements: segments of k in order, each a chain of fma from +0."""
    a = operand(nest.a, (*nest.batch, nest.m, nest.k), memory, nest.dtype)
    b = operand(nest.b, (*nest.batch, nest.n, nest.k), memory, nest.dtype)
    if nest.dot:
        a, b = (x.astype(bfloat16).astype(nest.dtype) for x in (a, b))
    total = None
    for start in range(0, max(nest.k, 1), SEGMENT):
        part = np.zeros((*nest.batch, nest.m, nest.n), nest.dtype)
        for k in range(start, min(start + SEGMENT, nest.k)):
            part = fma(a[..., :, None, k], b[..., None, :, k], part)
        total = part if total is None else total + part
    return np.asarray(total)


def segment_sums(nest: Contraction, memory: Memory) -> np.ndarray:
    """What b's terms add up to, for each segment and column."""
    terms = operand(nest.b, (nest.n, nest.k), memory, nest.dtype).T
    return np.stack([chain(terms[start:][:SEGMENT]) for start in range(0, nest.k, SEGMENT)])


def operand(x: loops.Operand, shape: Sequence[int], memory: Memory, dtype: DType) -> np.ndarray:
    strides = (*x.batch, x.outer, x.inner)
    axes = Domain(shape, ROWS, memory)
    place = axes.place(Access(x.buffer, x.offset, tuple(enumerate(strides))), {})
    if x.digits is not None:
        place = place + np.add.outer(*map(offsets, x.digits))
    assert 0 <= place.min(initial=0) <= place.max(initial=0) < max(x.buffer.size, 1), f"{x}"
    return memory[x.buffer][place].astype(dtype)


def scatter(nest: Scatter, memory: Memory) -> None:
    domain = Domain((nest.lead, nest.places, nest.trail), ROWS, memory)
    values = domain.evaluate([nest.row, nest.value])
    rows = np.broadcast_to(values[nest.row], (1, nest.places, 1))[0, :, 0]
    value = np.broadcast_to(values[nest.value], domain.shape)
    found = np.zeros((nest.lead, nest.rows, nest.trail), nest.out.dtype)
    if nest.base is not None:
        found[:] = memory[nest.base].reshape(found.shape)
    for place, row in enumerate(rows):
        found[:, row] = value[:, place] + (found[:, row] if nest.base is None else 0)
    memory[nest.out][:] = found.ravel()


def repeat(nest: loops.Repeat, memory: Memory) -> None:
    """Every turn sees its own part of the buffers outside."""
    inside = dict(memory)
    for turn in range(nest.turns):
        for buffer, move in nest.moves.items():
            inside[buffer] = memory[move.buffer][move.at(turn) :][: buffer.size]
        for each in nest.nests:
            for buffer in each.reads() | each.writes():
                if buffer not in inside:
                    source = getattr(buffer.source, "array", np.zeros(buffer.size, buffer.dtype))
                    inside[buffer] = np.ravel(source)
            run(each, inside)


def call(nest: loops.HostCall, memory: Memory) -> None:
    found = nest.op.compute(*(memory[x][: prod(s)].reshape(s) for x, s in nest.inputs))
    results = found if isinstance(found, tuple) else (found,)
    for (buffer, _), result in zip(nest.outputs, results, strict=True):
        memory[buffer][:] = np.ravel(result)
