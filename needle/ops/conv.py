"""Convolutions: contractions over windows of an image, which are a strided view. Next: pool.py.

Images are channels last, (n, *sizes, channels), with any number of sizes; weights are (*kernel,
channels / groups, outputs). Nothing is unfolded: the compiler packs windows from where they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import product
from math import ceil, gcd, prod
from typing import Any, NamedTuple

import numpy as np

from needle.array.spec import Spec
from needle.autograd import MODE, Tensor, op_name, primitive, with_fields
from needle.dtype import FLOATS, promote
from needle.errors import expect
from needle.ops.composite import Composite
from needle.ops.contract import MatMul, Precision
from needle.ops.elementwise import Operand, as_tensor, astype
from needle.ops.movement import (
    Flip,
    Movement,
    Slice,
    Unslice,
    pad,
    permute,
    reshape,
    stack,
    transpose,
    widen,
)
from needle.ops.reduce import summation

Sizes = tuple[int, ...]
Pairs = tuple[tuple[int, int], ...]
Ranges = tuple[tuple[int, int, int], ...]  # per axis: start, size, step


def per_axis(name: str, what: str, given: Any, count: int, least: int) -> Sizes:
    """A number for each of `count` axes, from one for all or a sequence."""
    found = (given,) * count if isinstance(given, int) else tuple(given)
    fits = len(found) == count and all(isinstance(n, int) and n >= least for n in found)
    wanted = f"one integer or {count} of at least {least}"
    expect(fits, f"{name}: expected {what} to be {wanted}; received {given!r}")
    return found


# Windows


@primitive
class Windows(Movement):
    """y[n, o..., t..., c] = x[n, o * stride + t * dilation..., c], o the window's place, t the
    place in it;  dx = dy added up where windows overlap"""

    size: Sizes
    stride: Sizes
    dilation: Sizes

    def infer(self, x: Spec) -> Spec:
        spans = spans_of(self.size, self.dilation)
        axes = zip(x.shape[1:-1], spans, self.stride, strict=True)
        out = tuple((n - span) // s + 1 for n, span, s in axes)
        fits = all(n > 0 for n in out)
        expect(fits, f"windows: expected sizes of at least {spans}; received shape {x.shape}")
        return x.with_shape((x.shape[0], *out, *self.size, x.shape[-1]))

    def compute(self, x: np.ndarray) -> np.ndarray:
        shape = self.infer(Spec(x.shape, x.dtype)).shape
        first, *middle, last = x.strides
        steps = [n * s for n, s in zip(middle, self.stride, strict=True)]
        taps = [n * d for n, d in zip(middle, self.dilation, strict=True)]
        strides = (first, *steps, *taps, last)
        return np.lib.stride_tricks.as_strided(x, shape, strides, writeable=False)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        shape, count = node.inputs[0].shape, len(self.size)
        whole, parts = [(0, n, 1) for n in out_grad.shape], []
        for tap in product(*map(range, self.size)):
            whole[count + 1 : -1] = [(t, 1, 1) for t in tap]
            part = Slice(tuple(whole))(out_grad)
            parts.append(reshape(part, (*out_grad.shape[: count + 1], shape[-1])))
        return put_back(parts, tap_ranges(shape, self.size, self.stride, self.dilation), shape)


def spans_of(kernel: Sizes, dilation: Sizes) -> Sizes:
    """How far the kernel reaches along each axis."""
    return tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))


def tap_ranges(shape: Sizes, kernel: Sizes, stride: Sizes, dilation: Sizes) -> list[Ranges]:
    """Where each tap, one place in all windows, lies in an image of a shape, in row-major order."""
    n, *sizes, c = shape
    axes = zip(sizes, spans_of(kernel, dilation), kernel, stride, dilation, strict=True)
    places = [
        [(t * d, (size - span) // s + 1, s) for t in range(k)] for size, span, k, s, d in axes
    ]
    return [((0, n, 1), *tap, (0, c, 1)) for tap in product(*places)]


def put_back(parts: Sequence[Tensor], ranges: Sequence[Ranges], shape: Sizes) -> Tensor:
    """The gradient of an image from those of its taps, added in order where windows overlap."""
    pairs = zip(parts, ranges, strict=True)
    return reduce(Tensor.__add__, [Unslice(each, shape)(part) for part, each in pairs])


def windows(x: Operand, size: Any, stride: Any = 1, dilation: Any = 1) -> Tensor:
    """The windows of x (n, *sizes, c), as (n, *places, *size, c): a view.

    Every `stride`-th place where all of the window lies in x; a window's elements are `dilation`
    apart.
    """
    x = as_tensor(x)
    count = x.ndim - 2
    expect(count > 0, f"windows: expected x of shape (n, *sizes, c); received {x.shape}")
    numbers = (("size", size), ("stride", stride), ("dilation", dilation))
    return Windows(*[per_axis("windows", *each, count, 1) for each in numbers])(x)


# Geometry


class Geometry(NamedTuple):
    """A convolution's numbers, a number for each axis.

    Taps that meet nothing but padding are left out: what they add is 0.
    """

    size: Sizes  # of the image
    out: Sizes
    taps: Pairs  # the first one, and how many
    stride: Sizes
    pads: Pairs  # before and after, so that the last window ends with the last element
    dilation: Sizes
    groups: int

    @property
    def kernel(self) -> Sizes:
        return tuple(count for _, count in self.taps)

    def framed(self, x: Tensor) -> Tensor:
        """An image with its padding; cut where that is negative."""
        for function, sign in ((pad, 1), (crop, -1)):
            widths = [(max(sign * a, 0), max(sign * b, 0)) for a, b in self.pads]
            x = function(x, [(0, 0), *widths, (0, 0)]) if any(map(any, widths)) else x
        return x

    def weights(self, w: Tensor) -> Tensor:
        """Those of the taps that count."""
        return w if w.shape[:-2] == self.kernel else Slice(self.ranges(w.shape))(w)

    def spread(self, dw: Tensor, shape: Sizes) -> Tensor:
        """The gradient of all weights from that of those that count."""
        return dw if dw.shape == shape else Unslice(self.ranges(shape), shape)(dw)

    def ranges(self, shape: Sizes) -> Ranges:
        """The place in the weights of the taps that count."""
        return (*((a, n, 1) for a, n in self.taps), *((0, n, 1) for n in shape[-2:]))


def crop(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """x without so many elements before and after each axis."""
    pairs = zip(x.shape, widths, strict=True)
    return Slice(tuple((a, n - a - b, 1) for n, (a, b) in pairs))(x)


def meet(
    size: Sizes, out: Sizes, kernel: Sizes, stride: Sizes, pads: Pairs, dilation: Sizes, groups: int
) -> Geometry:
    """The geometry of windows that lie `pads` before an image."""
    taps, found = [], []
    for n, o, k, s, (before, _), d in zip(size, out, kernel, stride, pads, dilation, strict=True):
        used = [t for t in range(k) if reaches(t * d - before, n, o, s)] or [0]
        first, count = used[0], used[-1] - used[0] + 1
        start = before - first * d
        taps.append((first, count))
        found.append((start, (o - 1) * s + d * (count - 1) + 1 - start - n))
    return Geometry(size, out, tuple(taps), stride, tuple(found), dilation, groups)


def reaches(start: int, size: int, count: int, step: int) -> bool:
    """Whether one of `count` places from `start` on, `step` apart, lies in [0, size)."""
    first = max(-(start // step), 0)
    return first < count and start + first * step < size


def as_pairs(name: str, padding: Any, size: Sizes, spans: Sizes, stride: Sizes) -> Pairs:
    """Zeros before and after each axis. "same": so many that there is an output for every
    stride-th element, the odd one at the end; "valid": none."""
    if padding == "same":
        outs = [ceil(n / s) for n, s in zip(size, stride, strict=True)]
        totals = [
            max((o - 1) * s + span - n, 0)
            for o, s, span, n in zip(outs, stride, spans, size, strict=True)
        ]
        return tuple((n // 2, n - n // 2) for n in totals)
    wanted = "a number, one per axis, pairs, 'same' or 'valid'"
    known = padding == "valid" or not isinstance(padding, str)
    expect(known, f"{name}: expected padding to be {wanted}; received {padding!r}")
    padding = 0 if padding == "valid" else padding
    if isinstance(padding, tuple) and padding and all(isinstance(n, tuple) for n in padding):
        fits = len(padding) == len(size)
        expect(fits, f"{name}: expected a pair for each of {len(size)} axes; received {padding}")
        return tuple(per_axis(name, "padding", pair, 2, 0) for pair in padding)  # type: ignore
    return tuple((n, n) for n in per_axis(name, "padding", padding, len(size), 0))


@with_fields
class Convolution(Composite):
    """What convolutions and their transposes have in common: their settings."""

    stride: Any = 1
    padding: Any = 0
    dilation: Any = 1
    groups: int = 1
    dot: bool = False

    def settings(self, name: str, count: int) -> tuple[Sizes, Sizes]:
        """Stride and dilation, one per axis."""
        stride = per_axis(name, "stride", self.stride, count, 1)
        dilation = per_axis(name, "dilation", self.dilation, count, 1)
        whole = isinstance(self.groups, int) and self.groups > 0
        expect(whole, f"{name}: expected groups of at least 1; received {self.groups!r}")
        return stride, dilation

    def geometry(self, x: Sizes, w: Sizes) -> Geometry:
        """The numbers for these shapes, or the error of those that do not fit."""
        raise NotImplementedError(f"{type(self).__name__}: geometry is not written")

    @property
    def products(self) -> Products:
        return Products(MatMul(self.dot), self.groups)

    def check(self, x: Spec, w: Spec) -> None:
        name = op_name(self)
        expect(
            x.ndim > 2 and x.ndim == w.ndim,
            f"{name}: expected x of shape (n, *sizes, c) and w of shape (*kernel, c / groups, "
            f"out); received {x.shape} and {w.shape}",
        )
        same = x.dtype == w.dtype and x.is_float
        dtypes = f"{x.dtype} and {w.dtype}"
        expect(same, f"{name}: expected x and w of one float dtype; received {dtypes}", TypeError)
        expect(0 not in w.shape, f"{name}: expected weights; received shape {w.shape}")
        self.geometry(x.shape, w.shape)


# The contractions


class Products(NamedTuple):
    """Contractions over windows by a MatMul."""

    multiply: MatMul
    groups: int

    def is_depthwise(self, w: Sizes) -> bool:
        """Whether every channel is a group: sums over few terms, which are no contraction."""
        return self.groups > 1 and w[-2] == 1

    def rows(self, v: Tensor, count: int) -> Tensor:
        """Windows as a matrix, a row each; as one matrix for each group."""
        places, taps, c = v.shape[: count + 1], v.shape[count + 1 : -1], v.shape[-1]
        if self.groups == 1:
            return reshape(v, (prod(places), prod(taps) * c))
        v = reshape(v, (prod(places), prod(taps), self.groups, c // self.groups))
        v = permute(v, (2, 0, 1, 3))
        return reshape(v, (self.groups, prod(places), prod(taps) * v.shape[-1]))

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b; of each group's a (groups, rows, k) and b (k, groups * c): (rows, groups * c)"""
        if self.groups == 1:
            return self.multiply(a, b)
        b = permute(reshape(b, (b.shape[0], self.groups, -1)), (1, 0, 2))
        return reshape(permute(self.multiply(a, b), (1, 0, 2)), (a.shape[1], -1))

    def forward(self, x: Tensor, w: Tensor, stride: Sizes, dilation: Sizes) -> Tensor:
        """y[n, o..., :] = sum over taps and channels of windows(x) * w"""
        kernel, count = w.shape[:-2], x.ndim - 2
        v = windows(x, kernel, stride, dilation)
        shape = (*v.shape[: count + 1], w.shape[-1])
        if self.is_depthwise(w.shape):
            taps = tuple(range(count + 1, 2 * count + 1))
            v = reshape(v, (*v.shape, 1)) * reshape(w, (*kernel, x.shape[-1], -1))
            return reshape(summation(v, taps), shape)
        y = self.product(self.rows(v, count), reshape(w, (-1, w.shape[-1])))
        return reshape(y, shape)

    def weight_gradient(self, x: Tensor, dy: Tensor, g: Geometry, shape: Sizes) -> Tensor:
        """dw = sum over places of windows(x) * dy, for weights of a shape"""
        whole, shape, count = shape, (*g.kernel, *shape[-2:]), x.ndim - 2
        v = windows(x, g.kernel, g.stride, g.dilation)
        if self.is_depthwise(shape):
            ones = (1,) * count
            dy = reshape(dy, (*dy.shape[:-1], *ones, x.shape[-1], -1))
            places = tuple(range(count + 1))
            dw = summation(reshape(v, (*v.shape, 1)) * dy, places)
            return g.spread(reshape(dw, shape), whole)
        dw = self.product(transpose(self.rows(v, count)), reshape(dy, (-1, shape[-1])))
        return g.spread(reshape(dw, shape), whole)

    def turned(self, w: Tensor) -> Tensor:
        """The weights of the way back: taps in reverse, inputs and outputs of a group swapped."""
        kernel, (c, out) = w.shape[:-2], w.shape[-2:]
        count = len(kernel)
        w = reshape(Flip(tuple(range(count)))(w), (*kernel, c, self.groups, out // self.groups))
        w = permute(w, (*range(count), count + 2, count + 1, count))
        return reshape(w, (*kernel, out // self.groups, self.groups * c))

    def input_gradient(self, dy: Tensor, w: Tensor, g: Geometry) -> Tensor:
        """dx, where dy and w meet: one dense convolution of stride 1 for each remainder of x's
        places by the stride, instead of zeros between the elements of dy."""
        ways = [
            [Way.of(u, *each) for u in range(each[1])]
            for each in zip(g.kernel, g.stride, g.dilation, [b for b, _ in g.pads], strict=True)
        ]
        counts = [ceil(n / s) for n, s in zip(g.size, g.stride, strict=True)]
        pairs = [
            (max(-min(way.low for way in some), 0), max(max(way.high for way in some) + n - o, 0))
            for each, n, o in zip(ways, counts, g.out, strict=True)
            if (some := [way for way in each if way])
        ]
        dy = pad(dy, [(0, 0), *pairs, (0, 0)])
        starts = [before for before, _ in pairs]
        parts = {
            u: self.part(dy, w, [way for way in found if way], starts, counts)
            for u, found in zip(product(*(range(s) for s in g.stride)), product(*ways), strict=True)
            if all(found)
        }
        return interleaved(parts, counts, g)

    def part(
        self, dy: Tensor, w: Tensor, ways: Sequence[Way], starts: Sequence[int], n: Sequence[int]
    ) -> Tensor:
        """dx at every stride-th place from one on."""
        each = [(way.first, way.taps, way.step) for way in ways]
        whole = [(0, size, 1) for size in w.shape[-2:]]
        w = self.turned(Slice((*each, *whole))(w))
        each = [
            (start + way.low, size + way.gap * (way.taps - 1), 1)
            for way, start, size in zip(ways, starts, n, strict=True)
        ]
        dy = Slice(((0, dy.shape[0], 1), *each, (0, dy.shape[-1], 1)))(dy)
        return self.forward(dy, w, (1,) * len(n), tuple(way.gap for way in ways))


class Way(NamedTuple):
    """Along an axis: which taps reach x's places q * stride + u, and which of dy they come from:
    tap first + step * j, of `taps`, from y's place q + high - gap * j."""

    first: int
    taps: int
    step: int
    gap: int
    high: int

    @property
    def low(self) -> int:
        return self.high - self.gap * (self.taps - 1)

    @staticmethod
    def of(u: int, kernel: int, stride: int, dilation: int, before: int) -> Way | None:
        """None where no tap does."""
        common, place = gcd(stride, dilation), u + before
        firsts = [t for t in range(kernel) if (place - t * dilation) % stride == 0]
        if not firsts:
            return None
        step, high = stride // common, (place - firsts[0] * dilation) // stride
        return Way(firsts[0], ceil((kernel - firsts[0]) / step), step, dilation // common, high)


def interleaved(parts: dict[Sizes, Tensor], counts: Sequence[int], g: Geometry) -> Tensor:
    """x whose elements at u, u + stride, ... are parts[u], and 0 where there is none."""
    like = next(iter(parts.values()))
    n, c, count = like.shape[0], like.shape[-1], len(counts)
    ends = [(0, n, 1), (0, c, 1)]
    if prod(g.stride) == 1:
        return like
    if len(parts) == 1:
        (u,) = parts
        pairs = list(zip(u, g.size, g.stride, strict=True))
        some = [max(ceil((size - start) / step), 0) for start, size, step in pairs]
        part = Slice((ends[0], *[(0, each, 1) for each in some], ends[1]))(like)
        ranges = [(start, each, step) for (start, _, step), each in zip(pairs, some, strict=True)]
        return Unslice((ends[0], *ranges, ends[1]), (n, *g.size, c))(part)
    nothing = widen(as_tensor(0.0, like), like.shape)
    every = product(*(range(s) for s in g.stride))
    x = stack([parts.get(u, nothing) for u in every], 0)
    x = reshape(x, (*g.stride, n, *counts, c))
    order = [each for axis in range(count) for each in (count + 1 + axis, axis)]
    x = permute(x, (count, *order, 2 * count + 1))
    x = reshape(x, (n, *(size * s for size, s in zip(counts, g.stride, strict=True)), c))
    return Slice((ends[0], *[(0, size, 1) for size in g.size], ends[1]))(x)


# The ops


@primitive
class Conv(Convolution):
    """y[n, o..., :] = sum over t, c of x[n, o * stride + t * dilation - padding..., c] w[t..., c];
    dw = windows of x, transposed, @ dy; dx = the transposed convolution of dy with w"""

    def geometry(self, x: Sizes, w: Sizes) -> Geometry:
        size, kernel, groups = x[1:-1], w[:-2], self.groups
        stride, dilation = self.settings("conv", len(size))
        inputs = f"{x[-1]} channels, weights of shape {w} and {groups} groups"
        fits = x[-1] == w[-2] * groups and w[-1] % groups == 0
        expect(fits, f"conv: expected channels = w's inputs * groups; received {inputs}")
        spans = spans_of(kernel, dilation)
        pads = as_pairs("conv", self.padding, size, spans, stride)
        padded = tuple(n + sum(pair) for n, pair in zip(size, pads, strict=True))
        fits = all(n >= span for n, span in zip(padded, spans, strict=True))
        expect(
            fits, f"conv: expected padded sizes of at least the kernel's {spans}; received {padded}"
        )
        out = tuple((n - k) // s + 1 for n, k, s in zip(padded, spans, stride, strict=True))
        return meet(size, out, kernel, stride, pads, dilation, groups)

    def expand(self, x: Tensor, w: Tensor) -> Tensor:
        g = self.geometry(x.shape, w.shape)
        return self.products.forward(g.framed(x), g.weights(w), g.stride, g.dilation)

    def expand_gradient(self, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        g = self.geometry(x.shape, w.shape)
        dx = self.products.input_gradient(dy, g.weights(w), g)
        return dx, self.products.weight_gradient(g.framed(x), dy, g, w.shape)


@primitive
class ConvTranspose(Convolution):
    """y = the dx of the convolution with w whose dy is x;  dx = that convolution of dy,
    dw = windows of dy, transposed, @ x"""

    name = "conv_transpose"
    output_padding: Any = 0

    def geometry(self, x: Sizes, w: Sizes) -> Geometry:
        """Of the convolution from y to x."""
        name, out, kernel, groups = "conv_transpose", x[1:-1], w[:-2], self.groups
        stride, dilation = self.settings(name, len(out))
        inputs = f"{x[-1]} channels, weights of shape {w} and {groups} groups"
        fits = x[-1] == w[-1] and w[-1] % groups == 0
        expect(fits, f"{name}: expected channels = w's last size; received {inputs}")
        spans = spans_of(kernel, dilation)
        plain = not isinstance(self.padding, str)
        expect(plain, f"{name}: expected padding to be numbers; received {self.padding!r}")
        pads = as_pairs(name, self.padding, out, spans, stride)
        extra = per_axis(name, "output_padding", self.output_padding, len(out), 0)
        fits = all(n < s for n, s in zip(extra, stride, strict=True))
        expect(fits, f"{name}: expected output_padding below stride {stride}; received {extra}")
        size = tuple(
            (n - 1) * s + k - sum(pair) + more
            for n, s, k, pair, more in zip(out, stride, spans, pads, extra, strict=True)
        )
        expect(
            all(n > 0 for n in size), f"{name}: expected a result with elements; received {size}"
        )
        return meet(size, out, kernel, stride, pads, dilation, groups)

    def expand(self, x: Tensor, w: Tensor) -> Tensor:
        g = self.geometry(x.shape, w.shape)
        return self.products.input_gradient(x, g.weights(w), g)

    def expand_gradient(self, dy: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        g = self.geometry(x.shape, w.shape)
        dy = g.framed(dy)
        dx = self.products.forward(dy, g.weights(w), g.stride, g.dilation)
        return dx, self.products.weight_gradient(dy, x, g, w.shape)


def settled(given: Any) -> Any:
    """A setting whose lists are tuples."""
    return tuple(map(settled, given)) if isinstance(given, (list, tuple)) else given


def alike(name: str, x: Operand, w: Operand) -> tuple[Tensor, Tensor]:
    """Two operands, in their common dtype where theirs are floats; autocast has its own rule."""
    x = as_tensor(x)
    w = as_tensor(w, x)
    if MODE.autocast is not None or not (x.dtype in FLOATS and w.dtype in FLOATS):
        return x, w
    dtype = promote(name, x.dtype, w.dtype)
    return astype(x, dtype), astype(w, dtype)


def conv(
    x: Operand, w: Operand, stride: Any = 1, padding: Any = 1, dilation: Any = 1, groups: int = 1
) -> Tensor:
    """The convolution (cross-correlation) of images x (n, *sizes, c) with weights
    w (*kernel, c / groups, out): (n, *places, out).

    y[n, o..., k] = sum over t, c of x[n, o * stride + t * dilation - padding..., c] w[t..., c, k].
    stride, dilation: a number, or one per axis; padding: also pairs (before, after), "same" (as
    many outputs as sizes / stride) or "valid" (none). With groups, each of them takes and gives its
    share of the channels.
    """
    op = Conv(settled(stride), settled(padding), settled(dilation), groups, Precision.dot)
    return op(*alike("conv", x, w))


def conv_transpose(
    x: Operand,
    w: Operand,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """The transposed convolution of x (n, *sizes, c): what `conv` with these settings and weights
    w (*kernel, out / groups, c) does backwards, (n, *places, out).

    places = (sizes - 1) * stride + dilation * (kernel - 1) + 1 - padding before and after +
    output_padding, of which the last decides between the sizes that a stride rounds to one.
    """
    numbers = [settled(each) for each in (stride, padding, dilation)]
    kind: Any = ConvTranspose
    op = kind(*numbers, groups, Precision.dot, settled(output_padding))
    return op(*alike("conv_transpose", x, w))
