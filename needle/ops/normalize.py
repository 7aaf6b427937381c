"""Statistics and what is made of them: mean, var, logsumexp, softmax, normalisations, dropout.
Next: loss.py.

Composites in their stable forms: the maximum is subtracted before exp, and variance takes two
passes.
"""

from __future__ import annotations

import math
from typing import Any

from ml_dtypes import finfo

from needle.array.spec import Spec, as_axes
from needle.autograd import Tensor, op_name, primitive
from needle.errors import expect
from needle.ops.composite import Composite, CompositeTuple
from needle.ops.elementwise import Operand, as_float, as_tensor, rsqrt, stop_gradient, where
from needle.ops.movement import reshape, without
from needle.ops.reduce import reduced, restore_axes, summation, with_ones


def count(x: Tensor, axes: tuple[int, ...]) -> int:
    return math.prod(x.shape[axis] for axis in axes)


def average(x: Tensor, axes: tuple[int, ...], keepdims: bool = True) -> Tensor:
    """The mean as primitives, for use inside expansions."""
    return summation(x, axes, keepdims=keepdims) / count(x, axes)


@primitive
class Mean(Composite):
    """y = sum of x over axes / n;  dx = dy / n"""

    axes: tuple[int, ...]

    def expand(self, x: Tensor) -> Tensor:
        return average(x, self.axes, keepdims=False)


@primitive
class Variance(Composite):
    """y = sum of (x - mean)^2 over axes / (n - correction), in two passes;
    dx = dy * 2 (x - mean) / (n - correction)"""

    name = "var"
    axes: tuple[int, ...]
    correction: float

    def expand(self, x: Tensor) -> Tensor:
        centred = x - average(x, self.axes)
        return summation(centred * centred, self.axes) / self.degrees(x)

    def expand_gradient(self, out_grad: Tensor, x: Tensor) -> Tensor:
        scale = restore_axes(out_grad * 2.0 / self.degrees(x), self.axes, x.shape)
        return scale * (x - average(x, self.axes))

    def degrees(self, x: Tensor) -> float:
        """The degrees of freedom, which the sum is divided by."""
        return max(float(count(x, self.axes) - self.correction), 0.0)


@primitive
class StandardDeviation(Composite):
    """y = sqrt of the variance;  dx = dy * (x - mean) / (y * (n - correction)), 0 where y is 0"""

    name = "std"
    reads_output = True
    axes: tuple[int, ...]
    correction: float

    def expand(self, x: Tensor) -> Tensor:
        return Variance(self.axes, self.correction).expand(x).sqrt()

    def expand_gradient(self, out_grad: Tensor, y: Tensor, x: Tensor) -> Tensor:
        slope = where(y > 0.0, out_grad * 0.5 / where(y > 0.0, y, 1.0), y * 0.0)
        return Variance(self.axes, self.correction).expand_gradient(slope, x)


def mean(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """Mean over axes; integers give float64; NaN over no elements"""
    return reduced(Mean, as_float(x), axes, axis, keepdims)


def var(
    x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False, correction: float = 0
) -> Tensor:
    """Variance over axes: squared distances from the mean, added and divided by n - correction (1:
    unbiased)"""
    return reduced(Variance, as_float(x), axes, axis, keepdims, float(correction))


def std(
    x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False, correction: float = 0
) -> Tensor:
    """Standard deviation over axes, var.sqrt(); its gradient is 0 where the deviation is 0"""
    return reduced(StandardDeviation, as_float(x), axes, axis, keepdims, float(correction))


# Exponentials over axes


def finite_max(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    """The maximum to subtract before exp, as a constant, made finite so that inf - inf cannot
    occur."""
    bounds, largest = finfo(x.dtype), stop_gradient(x.max(axes, keepdims=True))
    return largest.clip(float(bounds.min), float(bounds.max))


def above_zero(total: Tensor) -> Tensor:
    """A sum of e^(x - max x), which is at least 1, or 0 where all of x is -inf: then a divisor that
    keeps 0."""
    return total.clip(float(finfo(total.dtype).tiny))


class OverAxes(Composite):
    """A composite over axes of x; None stands for all."""

    axes: Any

    def check(self, x: Spec) -> None:
        axes, name = self.found(x), op_name(self)
        fits = all(x.shape[axis] for axis in axes)
        expect(fits, f"{name}: expected at least one element along axes {axes}; received {x.shape}")

    def found(self, x: Spec | Tensor) -> tuple[int, ...]:
        return as_axes(op_name(self), self.axes, x.ndim)


@primitive
class LogSumExp(OverAxes):
    """y = ln(sum of e^x over axes), m + ln(sum of e^(x - m)) with m = max x;
    dx = dy * e^(x - y) / sum of e^(x - y)"""

    name = "logsumexp"
    reads_output = True
    axes: tuple[int, ...] | int | None = None

    def expand(self, x: Tensor) -> Tensor:
        axes = self.found(x)
        largest = finite_max(x, axes)
        y = (summation((x - largest).exp(), axes, keepdims=True)).log() + largest
        return reshape(y, without(x.shape, axes))

    def expand_gradient(self, out_grad: Tensor, y: Tensor, x: Tensor) -> Tensor:
        axes = self.found(x)
        above = y.clip(float(finfo(y.dtype).min))
        share = (x - restore_axes(above, axes, x.shape)).exp()
        total = summation(share, axes, keepdims=True)  # 1, but for y's rounding
        return restore_axes(out_grad, axes, x.shape) * (share / above_zero(total))


@primitive
class Softmax(OverAxes):
    """y = e^x / sum of e^x over axes;
    dx = y * (dy - sum of dy * y). Where all of x is -inf, y is 0."""

    reads_output = True
    axes: tuple[int, ...] | int | None = -1

    def expand(self, x: Tensor) -> Tensor:
        axes = self.found(x)
        e = (x - finite_max(x, axes)).exp()
        total = summation(e, axes, keepdims=True)
        return e / above_zero(total)

    def expand_gradient(self, out_grad: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return y * (out_grad - summation(out_grad * y, self.found(x), keepdims=True))


@primitive
class LogSoftmax(OverAxes):
    """y = x - logsumexp(x) over axes;
    dx = dy - e^y * sum of dy. Where all of x is -inf, y is -inf."""

    name = "logsoftmax"
    reads_output = True
    axes: tuple[int, ...] | int | None = -1

    def expand(self, x: Tensor) -> Tensor:
        axes = self.found(x)
        shifted = x - finite_max(x, axes)
        total = summation(shifted.exp(), axes, keepdims=True)
        return shifted - above_zero(total).log()

    def expand_gradient(self, out_grad: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return out_grad - y.exp() * summation(out_grad, self.found(x), keepdims=True)


def logsumexp(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """ln(sum of e^x) over axes, without overflow; -inf where all of x is -inf"""
    return reduced(LogSumExp, as_float(x), axes, axis, keepdims)


def softmax(x: Operand, axes: Any = -1) -> Tensor:
    """e^x / sum of e^x over axes, without overflow; 0 where all of x is -inf (a row that is masked
    whole)"""
    return Softmax(axes)(as_float(x))


def logsoftmax(x: Operand, axes: Any = -1) -> Tensor:
    """x - logsumexp(x) over axes, without overflow; -inf where all of x is -inf"""
    return LogSoftmax(axes)(as_float(x))


# Normalisations


class Normalization(Composite):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, of mean and biased variance over `axes`;
    dx = (g - mean of g - xhat * mean of g xhat) / sqrt(var + eps), g = dy * weight, where
    xhat = (x - mean) / sqrt(var + eps)

    Inputs x, [weight, [bias]]. Where not `centred`, nothing is subtracted.
    """

    centred = True
    ndim: int
    eps: float

    def axes(self, x: Tensor) -> tuple[int, ...]:
        """The axes that mean and variance are taken over: the last ones."""
        return tuple(range(x.ndim - self.ndim, x.ndim))

    def shared(self, x: Tensor) -> tuple[int, ...]:
        """The axes along which weight and bias are the same."""
        return tuple(range(x.ndim - self.ndim))

    def spread(self, x: Tensor, affine: tuple[Tensor, ...]) -> list[Tensor]:
        """Weight and bias in the shape in which they meet x."""
        return [reshape(each, with_ones(x.shape, self.shared(x))) for each in affine]

    def normalized(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """xhat, and 1 / sqrt(var + eps)."""
        centred = x - average(x, self.axes(x)) if self.centred else x
        scale = rsqrt(average(centred * centred, self.axes(x)) + self.eps)
        return centred * scale, scale

    def expand(self, x: Tensor, *affine: Tensor) -> Tensor:
        return apply_affine(self.normalized(x)[0], *self.spread(x, affine))

    def expand_gradient(self, out_grad: Tensor, x: Tensor, *affine: Tensor) -> tuple[Tensor, ...]:
        axes, (xhat, scale) = self.axes(x), self.normalized(x)
        parts = (out_grad * xhat, out_grad)[: len(affine)]
        if affine and axes == self.shared(x):  # both sums are the weight's and the bias's gradient
            over = [summation(part, axes) for part in (out_grad * xhat, out_grad)]
            means = [reshape(each / count(x, axes), with_ones(x.shape, axes)) for each in over]
            centred = out_grad - means[1] if self.centred else out_grad
            slope = scale * self.spread(x, affine)[0]
            return slope * (centred - xhat * means[0]), *over[: len(affine)]
        g = out_grad * self.spread(x, affine)[0] if affine else out_grad
        centred = g - average(g, axes) if self.centred else g
        dx = scale * (centred - xhat * average(g * xhat, axes))
        return dx, *[summation(part, self.shared(x)) for part in parts]


def apply_affine(y: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@primitive
class LayerNorm(Normalization):
    """The normalisation of each sample: over the last axes (Ba et al., 2016)"""

    ndim: int
    eps: float


@primitive
class RMSNorm(Normalization):
    """y = x / sqrt(mean of x^2 + eps) * weight over the last axes (Zhang and Sennrich, 2019).
    Inputs x, [weight]"""

    centred = False
    ndim: int
    eps: float


@primitive
class BatchNorm(Normalization):
    """The normalisation of each channel: over all axes but 1 (Ioffe and Szegedy, 2015)

    Inputs x, [weight, bias], the latter of x's size along axis 1.
    """

    eps: float

    def axes(self, x: Tensor) -> tuple[int, ...]:
        return batch_axes(x)

    shared = axes


@primitive
class InstanceNorm(Normalization):
    """The normalisation of each sample's channels, x (n, places, channels) over its places (Ulyanov
    et al., 2016)"""

    eps: float

    def axes(self, x: Tensor) -> tuple[int, ...]:
        return (1,)

    def shared(self, x: Tensor) -> tuple[int, ...]:
        return (0, 1)


def batch_axes(x: Tensor) -> tuple[int, ...]:
    return tuple(axis for axis in range(x.ndim) if axis != 1)


def channel_shape(x: Tensor) -> tuple[int, ...]:
    """The shape in which a vector over axis 1 meets x."""
    return with_ones(x.shape, batch_axes(x))


@primitive
class RunningStatistics(CompositeTuple):
    """(mean, var) moved by `momentum` towards the batch's mean and biased variance over all axes
    but 1

    Inputs x, running mean, running var; no gradient is meant to pass.
    """

    momentum: float

    def expand(self, x: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        axes = batch_axes(x)
        centre = average(x, axes)
        centred = x - centre
        batch = (reshape(centre, mean.shape), average(centred * centred, axes, keepdims=False))
        return tuple(  # type: ignore[return-value]
            old * (1 - self.momentum) + new.astype(old.dtype) * self.momentum
            for old, new in zip((mean, var), batch, strict=True)
        )


@primitive
class NormalizeWith(Composite):
    """y = (x - mean) / sqrt(var + eps) * weight + bias with given statistics of axis 1. Inputs x,
    mean, var, [weight, bias]"""

    eps: float

    def expand(self, x: Tensor, mean: Tensor, var: Tensor, *affine: Tensor) -> Tensor:
        shape = channel_shape(x)
        y = (x - reshape(mean, shape)) * reshape(rsqrt(var + self.eps), shape)
        return apply_affine(y, *(reshape(each, shape) for each in affine))


@primitive
class Masked(Composite):
    """y = x * mask / (1 - p), dropout with a mask that keeps (Srivastava et al., 2014);
    dx = dy * mask / (1 - p)"""

    p: float

    def expand(self, x: Tensor, mask: Tensor) -> Tensor:
        kept = 1 - self.p or 1.0  # where none is kept, zeros stay zeros
        return x * mask.astype(x.dtype) / kept


def masked(x: Operand, mask: Operand, p: float) -> Tensor:
    """x where mask holds, scaled by 1 / (1 - p), else 0"""
    x = as_float(x)
    return Masked(float(p))(x, as_tensor(mask, x))
