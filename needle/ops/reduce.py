"""Reductions over axes, and running sums. Next: contract.py.

Every function takes `axes` or `axis` (None: all; an int; a sequence) and `keepdims`. The ops
themselves drop the reduced axes; `keepdims` is a reshape.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from needle.array.spec import Spec, as_axes, as_axis
from needle.autograd import Tensor, TensorOp, no_grad, op_name, primitive, with_fields
from needle.dtype import FLOATS, bool_, int64
from needle.errors import expect
from needle.ops.elementwise import Operand, as_float, as_tensor, astype, equal, where, widened
from needle.ops.movement import flip, on_axis, pad, permute, reshape, split, widen, without


def restore_axes(x: Tensor, axes: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """A reduced tensor with its axes back as 1, then repeated to the shape before the reduction."""
    return widen(reshape(x, with_ones(shape, axes)), shape)


def with_ones(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with some of its sizes 1."""
    return tuple([1 if axis in axes else size for axis, size in enumerate(shape)])


def pick_axes(name: str, x: Tensor, axes: Any, axis: Any) -> tuple[int, ...]:
    """The axes to reduce, from either spelling."""
    if axes is not None and axis is not None:
        raise TypeError(f"{name}: expected axes or axis, not both")
    return as_axes(name, axis if axes is None else axes, x.ndim)


def keep(y: Tensor, x: Tensor, axes: tuple[int, ...], keepdims: bool) -> Tensor:
    """The reduced y, with the axes of x that it lost as 1 where they are to be kept."""
    return reshape(y, with_ones(x.shape, axes)) if keepdims else y


@with_fields
class Reduction(TensorOp):
    """y = x reduced over sorted axes, which are dropped."""

    axes: tuple[int, ...]

    def infer(self, x: Spec) -> Spec:
        return x.with_shape(without(x.shape, as_axes(op_name(self), self.axes, x.ndim)))


@primitive
class Summation(Reduction):
    """y = sum of x over axes;  dx = dy broadcast. Sums of integers and bools are int64."""

    axes: tuple[int, ...] | int | None = None  # type: ignore[assignment]

    def infer(self, x: Spec) -> Spec:
        found = super().infer(x)
        return found if x.is_float else found.with_dtype(int64)

    def compute(self, x: np.ndarray) -> np.ndarray:
        return np.add.reduce(x, axis=self.axes, dtype=x.dtype if x.dtype in FLOATS else int64)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        shape = node.inputs[0].shape
        return restore_axes(out_grad, as_axes("summation", self.axes, len(shape)), shape)


class Extreme(Reduction):
    """The largest or smallest element; NaN wins;
    dy is shared equally among the elements that attain it."""

    function: np.ufunc

    def infer(self, x: Spec) -> Spec:
        name, axes, found = op_name(self), self.axes, super().infer(x)
        some = 0 not in [x.shape[axis] for axis in axes]
        expect(some, f"{name}: expected at least one element along axes {axes}; received {x.shape}")
        return found

    def compute(self, x: np.ndarray) -> np.ndarray:
        found = np.asarray(self.function.reduce(x, axis=self.axes))
        if x.dtype not in FLOATS or np.all(found):
            return found
        # NumPy takes any of several zeros; -0 < +0 (IEEE 754-2019).
        signs = self.function.reduce(np.copysign(1, x), axis=self.axes)
        return np.where(found == 0, np.copysign(found, signs), found)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        x = node.inputs[0]
        attained = astype(equal(x, restore_axes(node.detach(), self.axes, x.shape)), x.dtype)
        share = out_grad / summation(attained, self.axes)
        return attained * restore_axes(share, self.axes, x.shape)


@primitive
class Max(Extreme):
    """y = the largest element over axes;  dx = dy / (number of largest) where x is largest"""

    function = np.maximum


@primitive
class Min(Extreme):
    """y = the smallest element over axes;  dx = dy / (number of smallest) where x is smallest"""

    function = np.minimum


def reduced(kind: Any, x: Operand, axes: Any, axis: Any, keepdims: bool, *fields: Any) -> Tensor:
    x = as_tensor(x)
    found = pick_axes(kind.name, x, axes, axis)
    return keep(kind(found, *fields)(x), x, found, keepdims)


def summation(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """Sum over axes"""
    return reduced(Summation, x, axes, axis, keepdims)


def max(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """The largest element over axes; equal ones share the gradient"""
    return reduced(Max, x, axes, axis, keepdims)


def min(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """The smallest element over axes; equal ones share the gradient"""
    return reduced(Min, x, axes, axis, keepdims)


def any(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """Whether any element over axes is true; false over none"""
    return summation(astype(x, bool_), axes, axis=axis, keepdims=keepdims) > 0


def all(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """Whether all elements over axes are true; true over none"""
    return ~any(~as_tensor(x), axes, axis=axis, keepdims=keepdims)


def prod(x: Operand, axes: Any = None, *, axis: Any = None, keepdims: bool = False) -> Tensor:
    """Product over axes, by halving; integers and bools give int64. The gradient is exact where
    elements are 0."""
    x = widened(as_tensor(x))
    x = x if x.dtype in FLOATS else astype(x, int64)
    found = pick_axes("prod", x, axes, axis)
    kept = without(x.shape, found)
    size = math.prod(x.shape[axis] for axis in found)
    y = reshape(permute(x, (*found, *without(range(x.ndim), found))), (size, *kept))
    ones = (1 << (size - 1).bit_length() if size else 1) - size
    y = pad(y, [(0, ones)] + [(0, 0)] * len(kept), 1)
    while y.shape[0] > 1:
        first, second = split(y, 0, y.shape[0] // 2)
        y = first * second
    return keep(reshape(y, kept), x, found, keepdims)


@with_fields
class ArgExtreme(TensorOp):
    """The int64 index of the first extreme element along an axis (the first NaN if there is one);
    no gradient."""

    function: ClassVar[Any]
    axis: int

    def infer(self, x: Spec) -> Spec:
        name, axis = op_name(self), as_axis(op_name(self), self.axis, x.ndim)
        along = f"along axis {axis}; received {x.shape}"
        expect(x.shape[axis], f"{name}: expected at least one element {along}")
        return Spec(without(x.shape, [axis]), int64)

    def compute(self, x: np.ndarray) -> np.ndarray:
        return self.function(x, self.axis)


@primitive
class ArgMax(ArgExtreme):
    """y = the index of the largest element along an axis"""

    name, function = "argmax", staticmethod(np.argmax)


@primitive
class ArgMin(ArgExtreme):
    """y = the index of the smallest element along an axis"""

    name, function = "argmin", staticmethod(np.argmin)


def arg_extreme(kind: Any, x: Operand, axis: int | None, keepdims: bool) -> Tensor:
    x = as_tensor(x)
    if axis is None:
        return keep(kind(0)(reshape(x, (-1,))), x, tuple(range(x.ndim)), keepdims)
    axis = as_axis(kind.name, axis, x.ndim)
    return keep(kind(axis)(x), x, (axis,), keepdims)


def argmax(x: Operand, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The index of the largest element along an axis (None: of x flattened)"""
    return arg_extreme(ArgMax, x, axis, keepdims)


def argmin(x: Operand, axis: int | None = None, keepdims: bool = False) -> Tensor:
    """The index of the smallest element along an axis (None: of x flattened)"""
    return arg_extreme(ArgMin, x, axis, keepdims)


@primitive
class CumSum(TensorOp):
    """y[i] = x[0] + ... + x[i] along an axis;  dx[i] = dy[i] + ... + dy[n - 1]"""

    name = "cumsum"
    axis: int

    def infer(self, x: Spec) -> Spec:
        as_axis("cumsum", self.axis, x.ndim)
        return x if x.is_float else x.with_dtype(int64)

    def compute(self, x: np.ndarray) -> np.ndarray:
        return np.cumsum(x, self.axis, dtype=x.dtype if x.dtype in FLOATS else int64)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        return flip(self(flip(out_grad, self.axis)), self.axis)


def cumsum(x: Operand, axis: int) -> Tensor:
    """Running sums along an axis; integers give int64"""
    x, axis = on_axis("cumsum", x, axis)
    return CumSum(axis)(x)


def norm(
    x: Operand, ord: float = 2, axes: Any = None, *, axis: Any = None, keepdims: bool = False
) -> Tensor:
    """The vector norm (sum |x|^ord)^(1/ord) over axes; ord may be inf, -inf or 0 (the count of
    non-zeros).

    |x| is scaled by its largest element first, so that squares neither overflow nor vanish. The
    gradient of the 2-norm at 0 is 0.
    """
    x = widened(as_float(x))
    found = pick_axes("norm", x, axes, axis)
    size = astype(~equal(x, 0), x.dtype) if ord == 0 else abs(x)
    if ord in (math.inf, -math.inf):
        return (max if ord > 0 else min)(size, found, keepdims=keepdims)
    if ord in (0, 1) or x.size == 0:
        return summation(size, found, keepdims=keepdims)
    with no_grad():
        largest = max(size, found, keepdims=True)
        scale = where((largest > 0) & (largest < math.inf), largest, 1.0)
    terms = (x / scale) ** 2 if ord == 2 else (size / scale) ** ord
    powers = summation(terms, found, keepdims=True)
    zero = equal(powers, 0)
    root = where(zero, powers, where(zero, 1.0, powers) ** (1 / ord)) * scale
    return root if keepdims else reshape(root, without(x.shape, found))
