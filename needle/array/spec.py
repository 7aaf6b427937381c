"""Spec: what is known of an array without its values. `Op.infer` maps Specs to Specs. Next:
memory.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

from needle.dtype import FLOATS, LOW_PRECISION, DType


class Spec:
    """The shape and the dtype of an array."""

    __slots__ = ("dtype", "is_float", "is_low_precision", "shape")

    def __init__(self, shape: tuple[int, ...], dtype: DType) -> None:
        self.shape = shape
        self.dtype = dtype
        self.is_float = dtype in FLOATS
        self.is_low_precision = dtype in LOW_PRECISION

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * self.dtype.itemsize

    def with_shape(self, shape: Sequence[int]) -> Spec:
        return Spec(tuple(shape), self.dtype)

    def with_dtype(self, dtype: DType) -> Spec:
        return Spec(self.shape, dtype)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and self.shape == other.shape and self.dtype == other.dtype

    def __hash__(self) -> int:
        return hash((self.shape, self.dtype))

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def as_shape(name: str, shape: Any, least: int = 0) -> tuple[int, ...]:
    """A tuple of sizes of at least `least`, from an int or a sequence of ints; `name` is the op
    that asks, for the error."""
    sizes = (shape,) if isinstance(shape, int) else shape
    try:
        found = tuple([size.__index__() for size in sizes])
    except (TypeError, AttributeError):
        raise TypeError(f"{name}: expected a shape of integers; received {shape!r}") from None
    if min(found, default=0) < least:
        raise ValueError(f"{name}: expected sizes of at least {least}; received {found}")
    return found


def reshaped(shape: tuple[int, ...], wanted: Any) -> tuple[int, ...]:
    """The shape that a reshape of `shape` asks for; one size may be -1, which the others decide."""
    sizes = as_shape("reshape", wanted, -1)
    size, known = prod(shape), prod(each for each in sizes if each != -1)
    if -1 in sizes and sizes.count(-1) == 1 and known and size % known == 0:
        return tuple([size // known if each == -1 else each for each in sizes])
    if -1 in sizes or size != known:
        received = f"received {sizes} for {shape}"
        raise ValueError(f"reshape: expected a shape of {size} elements; {received}")
    return sizes


def as_axis(name: str, axis: Any, ndim: int) -> int:
    """The axis counted from 0; negative ones count from the end."""
    try:
        found: int = axis.__index__()
    except (TypeError, AttributeError):
        raise TypeError(f"{name}: expected an integer axis; received {axis!r}") from None
    if 0 <= found < ndim:
        return found
    if not -ndim <= found < ndim:
        bounds = f"between {-ndim} and {ndim - 1}" if ndim else "None (the input is a scalar)"
        raise ValueError(f"{name}: expected an axis {bounds}; received {axis}")
    return found % ndim


def as_axes(name: str, axes: Any, ndim: int) -> tuple[int, ...]:
    """Sorted axes counted from 0, from None (all), an int, or a sequence of ints without
    repeats."""
    if axes is None:
        return tuple(range(ndim))
    if type(axes) is int:
        return (as_axis(name, axes, ndim),)
    if isinstance(axes, Iterable):
        found = sorted(as_axis(name, axis, ndim) for axis in axes)
        if len(set(found)) != len(found):
            raise ValueError(f"{name}: expected axes without repeats; received {tuple(axes)}")
        return tuple(found)
    return (as_axis(name, axes, ndim),)


@lru_cache(4096)
def broadcast_shapes(name: str, *shapes: tuple[int, ...]) -> tuple[int, ...]:
    """The shape to which all of shapes broadcast, by NumPy's rule: aligned at the right, sizes
    equal or 1."""
    ndim = max(map(len, shapes))
    sizes = [1] * ndim
    for shape in shapes:
        for axis, size in enumerate(shape, ndim - len(shape)):
            if size != 1 and sizes[axis] not in (1, size):
                listed = " and ".join(str(each) for each in shapes)
                expected = "expected shapes that broadcast together"
                raise ValueError(f"{name}: {expected}; received {listed}")
            if size != 1:
                sizes[axis] = size
    return tuple(sizes)
