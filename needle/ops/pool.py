"""Pooling: maxima and means over windows of images, channels last (n, *sizes, c). Next: resize.py.

A tap is one place in all windows: a slice of the image. No windows are stored, and a gradient is
the taps' gradients put back where they came from and added; a reshape where windows lie side by
side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from math import inf, prod
from typing import Any

import numpy as np

from needle.array.spec import as_shape
from needle.autograd import Tensor, primitive, with_fields
from needle.errors import expect
from needle.ops.composite import Composite
from needle.ops.conv import Pairs, Ranges, Sizes, per_axis, put_back, spans_of, tap_ranges
from needle.ops.elementwise import Operand, as_float, as_tensor, equal, maximum, not_equal, where
from needle.ops.movement import Slice, pad, permute, reshape, stack, widen
from needle.ops.normalize import mean
from needle.ops.reduce import argmax, restore_axes

MOST_TAPS = 16  # that one kernel reads; larger windows are taken axis by axis


@with_fields
class Pool(Composite):
    """What both kinds share: their numbers, one for each axis of an image."""

    filler = 0.0
    kernel: Sizes
    stride: Sizes
    pads: Pairs
    dilation: Sizes

    def padded(self, x: Tensor) -> Sizes:
        sizes = zip(x.shape[1:-1], self.pads, strict=True)
        return (x.shape[0], *(size + sum(pair) for size, pair in sizes), x.shape[-1])

    def ranges(self, x: Tensor) -> list[Ranges]:
        """Where each tap lies in padded x."""
        return tap_ranges(self.padded(x), self.kernel, self.stride, self.dilation)

    def taps(self, x: Tensor) -> list[Tensor]:
        """x at each tap, (n, *out, c)."""
        ranges = self.ranges(x)
        x = pad(x, [(0, 0), *self.pads, (0, 0)], self.filler)
        return [Slice(each)(x) for each in ranges]

    def put_back(self, parts: Sequence[Tensor], x: Tensor) -> Tensor:
        """dx, from the taps' gradients."""
        return self.cut(put_back(parts, self.ranges(x), self.padded(x)), x)

    def cut(self, y: Tensor, x: Tensor) -> Tensor:
        """The part of y, which begins as padded x does and may end before it, that is x's."""
        sizes = zip(self.padded(x), y.shape, strict=True)
        y = pad(y, [(0, size - n) for size, n in sizes])
        starts = (0, *(before for before, _ in self.pads), 0)
        return Slice(tuple((i, n, 1) for i, n in zip(starts, x.shape, strict=True)))(y)

    @property
    def tiles(self) -> bool:
        """Whether the windows lie side by side."""
        return self.kernel == self.stride and set(self.dilation) == {1}

    def tiled(self, y: Tensor) -> Tensor:
        """(n, *out, c) as (n, out, 1, out, 1, ..., c)"""
        n, *outs, c = y.shape
        return reshape(y, (n, *(size for out in outs for size in (out, 1)), c))

    def fill_tiles(self, y: Tensor, x: Tensor) -> Tensor:
        """dx, from gradients that `tiled` has given their shape and the kernel's ones."""
        n, *sizes, c = y.shape
        pairs = list(zip(sizes[::2], self.kernel, strict=True))
        y = widen(y, (n, *(size for pair in pairs for size in pair), c))
        return self.cut(reshape(y, (n, *(out * k for out, k in pairs), c)), x)


@primitive
class MaxPool(Pool):
    """y[n, o..., c] = max over t of x[n, o * stride + t * dilation - padding..., c];
    dx = dy at each window's first maximum, in row-major order"""

    filler = -inf
    reads_output = True

    def expand(self, x: Tensor) -> Tensor:
        return reduce(maximum, self.taps(x))

    def expand_gradient(self, dy: Tensor, y: Tensor, x: Tensor) -> Tensor:
        numbers = [as_tensor(np.int32(t), x) for t in range(prod(self.kernel))]
        first = widen(numbers[-1], y.shape)
        for number, tap in list(zip(numbers, self.taps(x), strict=True))[-2::-1]:
            first = where(equal(tap, y) | not_equal(tap, tap), number, first)
        if self.tiles:
            shape = (1, *(size for k in self.kernel for size in (1, k)), 1)
            tap = as_tensor(np.arange(len(numbers), dtype=np.int32).reshape(shape), x)
            return self.fill_tiles(where(equal(self.tiled(first), tap), self.tiled(dy), 0.0), x)
        return self.put_back([where(equal(first, each), dy, 0.0) for each in numbers], x)


@primitive
class AvgPool(Pool):
    """y[n, o..., c] = sum over t of x[n, o * stride + t * dilation - padding..., c] / divisor;
    dx = dy / divisor, added where windows overlap"""

    divisor: float

    def expand(self, x: Tensor) -> Tensor:
        return reduce(Tensor.__add__, self.taps(x)) / self.divisor

    def expand_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        dy = dy / self.divisor
        if self.tiles:
            return self.fill_tiles(self.tiled(dy), x)
        return self.put_back([dy] * prod(self.kernel), x)


@primitive
class FirstMax(Composite):
    """y[i, j] = max over k of x[i, k, j];  dx = dy at the first maximum"""

    def expand(self, x: Tensor) -> Tensor:
        return x.max(1)

    def expand_gradient(self, dy: Tensor, x: Tensor) -> Tensor:
        places = as_tensor(np.arange(x.shape[1])[:, None], x)
        first = restore_axes(argmax(x, 1), (1,), x.shape)
        return where(equal(first, places), restore_axes(dy, (1,), x.shape), 0.0)


# Windows


def as_image(name: str, x: Operand) -> Tensor:
    x = as_float(x)
    expect(x.ndim > 2, f"{name}: expected x of shape (n, *sizes, c); received {x.shape}")
    return x


class Pooling:
    """What a pooling's arguments say of the windows of x."""

    def __init__(
        self,
        name: str,
        x: Tensor,
        kernel: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        ceil: bool,
    ) -> None:
        count, sizes = x.ndim - 2, x.shape[1:-1]
        self.kernel = per_axis(name, "kernel_size", kernel, count, 1)
        self.stride = per_axis(name, "stride", kernel if stride is None else stride, count, 1)
        self.padding = per_axis(name, "padding", padding, count, 0)
        self.dilation = per_axis(name, "dilation", dilation, count, 1)
        spans = spans_of(self.kernel, self.dilation)
        fits = all(p <= span // 2 for p, span in zip(self.padding, spans, strict=True))
        half = f"padding of at most half the window's {spans}"
        expect(fits, f"{name}: expected {half}; received {self.padding}")
        padded = tuple(n + 2 * p for n, p in zip(sizes, self.padding, strict=True))
        fits = all(n >= span for n, span in zip(padded, spans, strict=True))
        wanted = f"padded sizes of at least the window's {spans}"
        expect(fits, f"{name}: expected {wanted}; received {padded} of shape {x.shape}")
        axes = list(zip(sizes, spans, self.stride, self.padding, strict=True))
        self.outs = [outputs(*each, ceil) for each in axes]
        self.pads = tuple(
            (p, max((out - 1) * s + span - n - p, 0))
            for out, (n, span, s, p) in zip(self.outs, axes, strict=True)
        )

    def apply(self, x: Tensor, kind: Any, *last: Any) -> Tensor:
        """Pool x, along all axes at once or, where windows are large, one after the other."""
        count, numbers = len(self.kernel), (self.kernel, self.stride, self.pads, self.dilation)
        if prod(self.kernel) <= MOST_TAPS:
            return kind(*numbers, *last)(x)
        nothing = (1, 1, (0, 0), 1)
        for axis in reversed(range(count)):  # so that the first maximum is the row-major one
            picked = [
                tuple(given[i] if i == axis else none for i in range(count))
                for given, none in zip(numbers, nothing, strict=True)
            ]
            x = kind(*picked, *(last if axis == 0 else [1.0 for _ in last]))(x)
        return x

    def counts(self, sizes: Sizes, with_padding: bool) -> np.ndarray:
        """How many elements of x, or of it with its padding, each window has; (1, *out, 1)."""
        found = np.ones((1,) * (len(sizes) + 2))
        axes = zip(sizes, self.outs, self.kernel, self.stride, self.padding, strict=True)
        for axis, (n, out, k, s, p) in enumerate(axes, 1):
            starts = np.arange(out) * s - p
            low, high = (-p, n + p) if with_padding else (0, n)
            each = np.minimum(starts + k, high) - np.maximum(starts, low)
            found = found * each.reshape([-1 if i == axis else 1 for i in range(found.ndim)])
        return found


def outputs(size: int, span: int, stride: int, padding: int, ceil: bool) -> int:
    """How many windows there are; with `ceil` also one that begins in x or the padding before it
    and ends beyond the padding after it."""
    room = size + 2 * padding - span
    if not ceil:
        return room // stride + 1
    found = -(-room // stride) + 1
    return found - ((found - 1) * stride >= size + padding)


# Functions


def max_pool(
    x: Operand,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest element of each window of x (n, *sizes, c): (n, *places, c).

    Numbers are one for each axis, or one for all; stride: the kernel's size by default; padding: of
    -inf, before and after. ceil_mode keeps a last window that is not whole. Of equal elements the
    first in row-major order gets the gradient. NaN wins.
    """
    x = as_image("max_pool", x)
    given = kernel_size, stride, padding, dilation
    return Pooling("max_pool", x, *given, ceil_mode).apply(x, MaxPool)


def avg_pool(
    x: Operand,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: float | None = None,
) -> Tensor:
    """The mean of each window of x (n, *sizes, c): (n, *places, c).

    Arguments as `max_pool`'s, padding of zeros. Sums are divided by the number of elements in the
    window, padding included or not, or by divisor_override.
    """
    x = as_image("avg_pool", x)
    found = Pooling("avg_pool", x, kernel_size, stride, padding, 1, ceil_mode)
    if divisor_override is not None:
        expect(divisor_override, "avg_pool: expected divisor_override other than 0; received 0")
        return found.apply(x, AvgPool, float(divisor_override))
    counts = found.counts(x.shape[1:-1], count_include_pad)
    if counts.size and np.all(counts == counts.flat[0]):
        return found.apply(x, AvgPool, float(counts.flat[0]))
    return found.apply(x, AvgPool, 1.0) / as_tensor(counts.astype(x.dtype), x)


def largest(x: Tensor, axes: Sequence[int]) -> Tensor:
    """The maximum over axes, whose gradient the first one gets."""
    kept = [axis for axis in range(x.ndim) if axis not in axes]
    first = [axis for axis in kept if axis < axes[0]]
    x, shape = permute(x, (*first, *axes, *kept[len(first) :])), [x.shape[axis] for axis in kept]
    lead, size = prod(shape[: len(first)]), prod(x.shape[len(first) : len(first) + len(axes)])
    y = FirstMax()(reshape(x, (lead, size, prod(shape[len(first) :]))))
    return reshape(y, shape)


def adaptive_pool(name: str, x: Operand, size: Any, over: Callable[..., Tensor]) -> Tensor:
    x = as_image(name, x)
    given = (size,) * (x.ndim - 2) if size is None or isinstance(size, int) else tuple(size)
    fits = len(given) == x.ndim - 2
    expect(fits, f"{name}: expected output_size for {x.ndim - 2} axes; received {size!r}")
    pairs = zip(given, x.shape[1:-1], strict=True)
    outs = as_shape(name, [n if out is None else out for out, n in pairs], 1)
    expect(0 not in x.shape[1:-1], f"{name}: expected images with elements; received {x.shape}")
    if all(n % out == 0 for n, out in zip(x.shape[1:-1], outs, strict=True)):
        pairs = zip(x.shape[1:-1], outs, strict=True)
        tiles = [each for n, out in pairs for each in (out, n // out)]
        tiled = reshape(x, (x.shape[0], *tiles, x.shape[-1]))
        return over(tiled, range(2, 2 * len(outs) + 1, 2))
    for axis in range(len(outs), 0, -1):
        x = along_axis(x, axis, outs[axis - 1], over)
    return x


def along_axis(x: Tensor, axis: int, out: int, over: Callable[..., Tensor]) -> Tensor:
    """Window i is x[floor(i n / out) : ceil((i + 1) n / out)]."""
    n, parts = x.shape[axis], []
    whole = [(0, size, 1) for size in x.shape]
    for i in range(out):
        start, stop = i * n // out, -(-(i + 1) * n // out)
        whole[axis] = (start, stop - start, 1)
        parts.append(over(Slice(tuple(whole))(x), [axis]))
    return stack(parts, axis)


def adaptive_max_pool(x: Operand, output_size: Any) -> Tensor:
    """The largest element in each of output_size windows, which share x (n, *sizes, c) evenly.

    output_size: one for each axis, or one for all; None: as many as there are. Window i of an axis
    is x[floor(i n / out) : ceil((i + 1) n / out)].
    """
    return adaptive_pool("adaptive_max_pool", x, output_size, largest)


def adaptive_avg_pool(x: Operand, output_size: Any) -> Tensor:
    """The mean of each of output_size windows; arguments as `adaptive_max_pool`'s."""
    return adaptive_pool("adaptive_avg_pool", x, output_size, lambda x, axes: mean(x, tuple(axes)))
