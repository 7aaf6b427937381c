"""Movement ops: every element of y is an element of x (or a fill value); shapes change, values
don't. Next: reduce.py."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from itertools import accumulate, starmap
from typing import Any

import numpy as np

from needle.array.spec import Spec, as_axes, as_axis, as_shape, reshaped
from needle.autograd import (
    Tensor,
    TensorOp,
    TensorTuple,
    TensorTupleOp,
    primitive,
    replay,
    with_fields,
)
from needle.dtype import promote
from needle.errors import expect
from needle.ops.composite import Composite
from needle.ops.elementwise import (
    BroadcastTo,
    Operand,
    Scalar,
    as_tensor,
    astype,
    check_fits,
    first_tensor,
    rule,
)


def without(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, ...]:
    """A shape with axes taken out."""
    return tuple([size for axis, size in enumerate(shape) if axis not in axes])


def on_axis(name: str, x: Operand, axis: Any) -> tuple[Tensor, int]:
    """x as a Tensor, and one of its axes counted from 0; `name` is the op that asks."""
    x = as_tensor(x)
    return x, as_axis(name, axis, x.ndim)


class Movement(TensorOp):
    """y's elements are x's."""

    moves = True


@primitive
class Reshape(Movement):
    """y = x's elements, in row-major order, in another shape;  dx = dy in x's shape"""

    shape: tuple[int, ...]

    def infer(self, x: Spec) -> Spec:
        return x.with_shape(reshaped(x.shape, self.shape))

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x.reshape(self.shape)

    gradient = rule(lambda dy, y, x: reshape(dy, x.shape))


def reshape(x: Operand, shape: Any) -> Tensor:
    """x's elements in another shape; one size may be -1."""
    x = as_tensor(x)
    sizes = as_shape("reshape", shape, -1)
    return Reshape(reshaped(x.shape, sizes) if -1 in sizes else sizes)(x)


def broadcast_to(x: Operand, shape: Any) -> Tensor:
    """x repeated along new axes and axes of size 1."""
    return BroadcastTo(as_shape("broadcast_to", shape))(as_tensor(x))


def widen(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x broadcast to a shape, x itself where it has it already."""
    return x if x.shape == shape else BroadcastTo(shape)(x)


@primitive
class Permute(Movement):
    """y = x with its axes in another order;  dx = dy in the order undone"""

    order: tuple[int, ...]

    def infer(self, x: Spec) -> Spec:
        fits = sorted(self.order) == list(range(x.ndim))
        expect(fits, f"permute: expected an order of {x.ndim} axes; received {self.order}")
        return x.with_shape([x.shape[axis] for axis in self.order])

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x.transpose(self.order)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        return permute(out_grad, tuple(self.order.index(axis) for axis in range(len(self.order))))


def permute(x: Operand, order: Sequence[int]) -> Tensor:
    """x with its axes in another order."""
    x = as_tensor(x)
    ndim = x.ndim
    return Permute(tuple([as_axis("permute", axis, ndim) for axis in order]))(x)


@primitive
class Transpose(Movement):
    """y = x with two axes swapped, the last two by default;  dx = dy with them swapped back"""

    axes: Any = None

    def infer(self, x: Spec) -> Spec:
        axes = (-2, -1) if self.axes is None else self.axes
        pair = isinstance(axes, tuple) and len(axes) == 2
        expect(pair, f"transpose: expected two axes; received {axes}; use permute for an order")
        expect(x.ndim > 1, f"transpose: expected at least 2 axes; received shape {x.shape}")
        order = list(range(x.ndim))
        first, second = (as_axis("transpose", axis, x.ndim) for axis in axes)
        order[first], order[second] = second, first
        return x.with_shape([x.shape[axis] for axis in order])

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x.swapaxes(*(self.axes or (-2, -1)))

    gradient = rule(lambda dy, y, x: y.op(dy))


def transpose(x: Operand, axes: Sequence[int] | None = None) -> Tensor:
    """x with two axes swapped, the last two by default (`permute` takes a whole order)."""
    return Transpose(axes)(as_tensor(x))


def squeeze(x: Operand, axes: Any = None) -> Tensor:
    """x without its axes of size 1, or without the given ones."""
    x = as_tensor(x)
    ones = [axis for axis, size in enumerate(x.shape) if size == 1]
    found = ones if axes is None else as_axes("squeeze", axes, x.ndim)
    fits = set(found) <= set(ones)
    expect(fits, f"squeeze: expected axes of size 1; received axes {found} of shape {x.shape}")
    return reshape(x, without(x.shape, found))


def unsqueeze(x: Operand, axis: int) -> Tensor:
    """x with a new axis of size 1."""
    x = as_tensor(x)
    axis = as_axis("unsqueeze", axis, x.ndim + 1)
    return reshape(x, (*x.shape[:axis], 1, *x.shape[axis:]))


def flatten(x: Operand, start: int = 0, end: int = -1) -> Tensor:
    """x with the axes from start to end made one."""
    x = as_tensor(x)
    shape = x.shape or (1,)
    start, end = (as_axis("flatten", axis, len(shape)) for axis in (start, end))
    expect(start <= end, f"flatten: expected start <= end; received axes {start} and {end}")
    return reshape(x, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


def as_slice(start: int, size: int, step: int) -> slice:
    """The slice of `size` elements: start, start + step, ..."""
    stop = start + size * step
    return slice(start, stop if stop >= 0 else None, step) if size else slice(0)


@primitive
class Slice(Movement):
    """y = x[start:stop:step] along every axis;
    dx = dy written into zeros. Steps may be negative."""

    ranges: tuple[tuple[int, int, int], ...]  # per axis: start, size, step

    def infer(self, x: Spec) -> Spec:
        return x.with_shape([size for _, size, _ in self.ranges])

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x[tuple(starmap(as_slice, self.ranges))]

    gradient = rule(lambda dy, y, x: Unslice(y.op.ranges, x.shape)(dy))


@primitive
class After(Movement):
    """y = x, computed no sooner than the other inputs;  dx = dy

    Programs keep what is computed from y apart from what is computed from x.
    """

    def infer(self, x: Spec, *others: Spec) -> Spec:
        return x

    def compute(self, x: np.ndarray, *others: np.ndarray) -> np.ndarray:
        return x

    def gradient(self, out_grad: Tensor, node: Tensor) -> tuple[Tensor | None, ...]:
        return (out_grad, *[None for _ in node.inputs[1:]])


@primitive
class Unslice(Movement):
    """y = zeros of a shape, with x written at y[start:stop:step];  dx = dy[start:stop:step]"""

    ranges: tuple[tuple[int, int, int], ...]
    shape: tuple[int, ...]

    def infer(self, x: Spec) -> Spec:
        return x.with_shape(self.shape)

    def compute(self, x: np.ndarray) -> np.ndarray:
        found = np.zeros(self.shape, x.dtype)
        found[tuple(starmap(as_slice, self.ranges))] = x
        return found

    gradient = rule(lambda dy, y, x: Slice(y.op.ranges)(dy))


@primitive
class Flip(Movement):
    """y = x with the order along some axes reversed;  dx = dy flipped back"""

    axes: tuple[int, ...] | None = None

    def infer(self, x: Spec) -> Spec:
        as_axes("flip", self.axes, x.ndim)
        return x

    def compute(self, x: np.ndarray) -> np.ndarray:
        return np.flip(x, self.axes)

    gradient = rule(lambda dy, y, x: y.op(dy))


def flip(x: Operand, axes: Any = None) -> Tensor:
    """x with the order along axes (all by default) reversed."""
    return Flip(axes)(as_tensor(x))


@primitive
class Pad(Movement):
    """y = x with a value before and after each axis;  dx = the middle of dy"""

    widths: tuple[tuple[int, ...], ...]  # per axis: before, after
    value: Scalar

    def infer(self, x: Spec) -> Spec:
        fits = [len(pair) for pair in self.widths] == [2] * x.ndim
        expect(fits, f"pad: expected {x.ndim} pairs of widths; received {self.widths}")
        sizes = zip(x.shape, self.widths, strict=True)
        return x.with_shape([size + sum(pair) for size, pair in sizes])

    def compute(self, x: np.ndarray) -> np.ndarray:
        # NumPy takes no empty list, of a scalar's axes.
        return np.pad(x, self.widths or 0, constant_values=x.dtype.type(self.value))

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        sizes = zip(self.widths, node.inputs[0].shape, strict=True)
        return Slice(tuple((before, size, 1) for (before, _), size in sizes))(out_grad)


def pad(x: Operand, widths: Any, value: Scalar = 0, mode: str = "constant") -> Tensor:
    """x with more elements before and after each axis; widths: an int for all, or a pair (before,
    after) for each axis.

    mode: which ones: "constant": `value`; "reflect": x mirrored at its first and its last element;
    "replicate": these two; "circular": x from its other end. ValueError where x has too few.
    """
    x = as_tensor(x)
    widths = [(widths, widths)] * x.ndim if isinstance(widths, int) else widths
    check_fits("pad", value, x.dtype)
    padding = Pad(tuple(as_shape("pad", pair) for pair in widths), value)
    return padding(x) if mode == "constant" else extended(x, padding, mode)


def extended(x: Tensor, padding: Pad, mode: str) -> Tensor:
    """x padded with elements of its own, axis after axis."""
    modes = "constant", "reflect", "replicate", "circular"
    expect(mode in modes, f"pad: expected a mode of {', '.join(modes)}; received {mode!r}")
    expect(not padding.value, f"pad: expected no value with {mode!r}; received {padding.value!r}")
    padding.infer(Spec(x.shape, x.dtype))
    for axis, (before, after) in enumerate(padding.widths):
        n, width = x.shape[axis], max(before, after)
        most, first, last = {
            "reflect": (n - 1, (before, before, -1), (n - 2, after, -1)),
            "replicate": (width if n else 0, (0, 1, 1), (n - 1, 1, 1)),
            "circular": (n, (n - before, before, 1), (0, after, 1)),
        }[mode]
        expected = f"{mode!r} widths of at most {most} for size {n}"
        expect(width <= max(most, 0), f"pad: expected {expected}; received {(before, after)}")
        if width:
            ends = slice_axis(x, axis, first), slice_axis(x, axis, last)
            if mode == "replicate":
                ends = repeat(ends[0], before, axis), repeat(ends[1], after, axis)
            x = concatenate([ends[0], x, ends[1]], axis)
    return x


def slice_axis(x: Tensor, axis: int, place: tuple[int, int, int]) -> Tensor:
    """A range (start, size, step) of one axis, all of the others."""
    whole = [(0, size, 1) for size in x.shape]
    return Slice((*whole[:axis], place, *whole[axis + 1 :]))(x)


@with_fields
class Dilation(Composite):
    """Every (dilation + 1)-th place along axes; axes beyond x's are ignored, as in the course."""

    moves = True
    axes: tuple[int, ...]
    dilation: int

    def steps(self, x: Tensor) -> list[int]:
        """The distance of the places along each axis."""
        name, step = type(self).__name__.lower(), self.dilation + 1
        expect(step > 0, f"{name}: expected a dilation of at least 0; received {self.dilation}")
        return [step if {axis, axis - x.ndim} & {*self.axes} else 1 for axis in range(x.ndim)]


@primitive
class Dilate(Dilation):
    """y = x with `dilation` zeros after each element along axes;  dx = dy without them"""

    def expand(self, x: Tensor) -> Tensor:
        pairs = list(zip(x.shape, self.steps(x), strict=True))
        ranges = tuple((0, size, step) for size, step in pairs)
        return Unslice(ranges, tuple(size * step for size, step in pairs))(x)


@primitive
class UnDilate(Dilation):
    """y = every (dilation + 1)-th element of x along axes;  dx = dy dilated"""

    def expand(self, x: Tensor) -> Tensor:
        pairs = zip(x.shape, self.steps(x), strict=True)
        return Slice(tuple((0, -(-size // step), step) for size, step in pairs))(x)


def dilate(x: Operand, axes: Any, dilation: int) -> Tensor:
    """x with `dilation` zeros after each element along axes."""
    return Dilate((axes,) if isinstance(axes, int) else tuple(axes), dilation)(as_tensor(x))


def undilate(x: Operand, axes: Any, dilation: int) -> Tensor:
    """dilate undone."""
    return UnDilate((axes,) if isinstance(axes, int) else tuple(axes), dilation)(as_tensor(x))


# Joining and splitting


def same_dtypes(name: str, tensors: Sequence[Operand]) -> list[Tensor]:
    """The inputs of a joining op as Tensors of one dtype."""
    expect(len(tensors), f"{name}: expected at least one tensor; received none")
    first = first_tensor(tensors)
    found = [as_tensor(x, first) for x in tensors]
    dtype = promote(name, *[x.dtype for x in found])
    return [astype(x, dtype) for x in found]


def join(kind: Any, tensors: Sequence[Operand], axis: Any, new: int = 0) -> Tensor:
    """The node of a joining op, which makes `new` axes; at once where Tensors like these were
    joined before."""
    is_list = isinstance(tensors, (list, tuple)) and type(axis) is int
    known = replay(kind(axis), tensors) if is_list else None
    if known is not None:
        return known
    found = same_dtypes(kind.name, tensors)
    return kind(as_axis(kind.name, axis, found[0].ndim + new))(*found)


@primitive
class Concatenate(Movement):
    """y = the inputs one after the other along an axis;  each dx = its part of dy"""

    axis: int

    def infer(self, *specs: Spec) -> Spec:
        shapes = [x.shape for x in specs]
        axis = as_axis("concatenate", self.axis, specs[0].ndim)
        fits = len({(len(shape), without(shape, [axis])) for shape in shapes}) == 1
        expect(fits, f"concatenate: expected shapes equal but for axis {axis}; received {shapes}")
        size = sum(shape[axis] for shape in shapes)
        return specs[0].with_shape((*shapes[0][:axis], size, *shapes[0][axis + 1 :]))

    def compute(self, *arrays: np.ndarray) -> np.ndarray:
        return np.concatenate(arrays, self.axis)

    def gradient(self, out_grad: Tensor, node: Tensor) -> tuple[Tensor, ...]:
        return tuple(split(out_grad, self.axis, [x.shape[self.axis] for x in node.inputs]))


def concatenate(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """The tensors one after the other along an axis."""
    return join(Concatenate, tensors, axis)


@primitive
class Stack(Movement):
    """y = the inputs, of one shape, side by side along a new axis;  each dx = its part of dy"""

    axis: int

    def __call__(self, *inputs: Any) -> Tensor:
        # The course hands over a TensorTuple.
        one = len(inputs) == 1 and not isinstance(inputs[0], Tensor)
        return super().__call__(*(inputs[0] if one else inputs))

    def infer(self, *specs: Spec) -> Spec:
        shape, shapes = specs[0].shape, [x.shape for x in specs]
        axis = as_axis("stack", self.axis, len(shape) + 1)
        expect(len(set(shapes)) == 1, f"stack: expected equal shapes; received {shapes}")
        return specs[0].with_shape((*shape[:axis], len(specs), *shape[axis:]))

    def compute(self, *arrays: np.ndarray) -> np.ndarray:
        return np.stack(arrays, self.axis)

    def gradient(self, out_grad: Tensor, node: Tensor) -> tuple[Tensor, ...]:
        return tuple(split(out_grad, self.axis))


def stack(tensors: Sequence[Operand], axis: int = 0) -> Tensor:
    """Tensors of one shape side by side along a new axis."""
    return join(Stack, tensors, axis, 1)


@primitive
class Split(TensorTupleOp):
    """y = x's slices of given sizes along an axis; without sizes, its elements along it, the axis
    gone;
    dx = the parts of dy joined"""

    moves = True
    axis: int
    sizes: Sequence[int] | None = None

    def infer(self, x: Spec) -> tuple[Spec, ...]:
        axis = as_axis("split", self.axis, x.ndim)
        before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        if self.sizes is None:
            return (x.with_shape(before + after),) * size
        fits = sum(self.sizes) == size and min(self.sizes, default=0) >= 0
        expect(fits, f"split: expected sizes that add to {size}; received {self.sizes}")
        return tuple(x.with_shape((*before, each, *after)) for each in self.sizes)

    def compute(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        if self.sizes is None:
            return tuple(map(np.asarray, np.moveaxis(x, self.axis, 0)))
        moved = x.swapaxes(self.axis, 0)
        ranges = zip(self.sizes, accumulate(self.sizes), strict=True)
        return tuple(moved[end - size : end].swapaxes(self.axis, 0) for size, end in ranges)

    def gradient(self, out_grad: TensorTuple, node: Any) -> Tensor:
        parts = tuple(out_grad)
        return stack(parts, self.axis) if self.sizes is None else concatenate(parts, self.axis)


def split(x: Operand, axis: int = 0, sizes: int | Sequence[int] | None = None) -> TensorTuple:
    """x's slices along an axis: of the given sizes (one size: equal parts, a smaller last one);
    None unbinds the axis."""
    x, axis = on_axis("split", x, axis)
    if isinstance(sizes, int):
        expect(sizes > 0, f"split: expected a size of at least 1; received {sizes}")
        size = x.shape[axis]
        sizes = [min(sizes, size - start) for start in range(0, size, sizes)] or [0]
    return Split(axis, None if sizes is None else tuple(sizes))(x)


def chunk(x: Operand, chunks: int, axis: int = 0) -> TensorTuple:
    """x in at most `chunks` parts of one size along an axis; the last may be smaller."""
    x, axis = on_axis("chunk", x, axis)
    expect(chunks > 0, f"chunk: expected at least 1 chunk; received {chunks}")
    return split(x, axis, max(-(-x.shape[axis] // chunks), 1))


def roll(x: Operand, shifts: int | Sequence[int], axes: Any = None) -> Tensor:
    """x shifted along axes, what falls off one end entering at the other; axes=None rolls x
    flattened."""
    x = as_tensor(x)
    if axes is None:
        return reshape(roll(reshape(x, (-1,)), shifts, 0), x.shape)
    listed, places = ((each,) if isinstance(each, int) else tuple(each) for each in (shifts, axes))
    fits = len(listed) == len(places)
    expect(fits, f"roll: expected a shift for each axis; received {shifts} for axes {axes}")
    for shift, axis in zip(listed, places, strict=True):
        size = x.shape[as_axis("roll", axis, x.ndim)]
        cut = -operator.index(shift) % max(size, 1)
        first, second = split(x, axis, (cut, size - cut))
        x = concatenate([second, first], axis)
    return x


def repeat(x: Operand, repeats: int, axis: int | None = None) -> Tensor:
    """x with each element along an axis repeated; axis=None repeats the elements of x flattened."""
    if axis is None:
        return repeat(reshape(x, (-1,)), repeats, 0)
    x, axis = on_axis("repeat", x, axis)
    expect(repeats >= 0, f"repeat: expected repeats of at least 0; received {repeats}")
    shape = (*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :])
    return flatten(broadcast_to(unsqueeze(x, axis + 1), shape), axis, axis + 1)


def tile(x: Operand, repeats: int | Sequence[int]) -> Tensor:
    """x laid side by side `repeats` times along each axis, as numpy.tile."""
    x = as_tensor(x)
    counts = as_shape("tile", repeats)
    ndim = max(len(counts), x.ndim)
    counts, shape = ((1,) * (ndim - len(each)) + each for each in (counts, x.shape))
    pairs = list(zip(counts, shape, strict=True))
    wide = reshape(x, [each for _, size in pairs for each in (1, size)])
    wide = broadcast_to(wide, [each for pair in pairs for each in pair])
    return reshape(wide, [count * size for count, size in pairs])
