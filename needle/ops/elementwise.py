"""Elementwise ops: y[i] = f(a[i], b[i], ...), their broadcasting and their mixing of dtypes. Next:
movement.py.

Broadcasting happens here, in `Elementwise.__call__`, and nowhere else: operands of other shapes or
dtypes become BroadcastTo and Cast nodes, so that no gradient rule has to undo either. Python
scalars are fields of an op of their own (AddScalar, ...) and never widen a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

import needle.dtype as dtypes
from needle.array.ndarray import NDArray
from needle.array.spec import Spec, broadcast_shapes
from needle.autograd import (
    MODE,
    OPS,
    History,
    Tensor,
    TensorOp,
    Value,
    identity,
    is_lazy,
    no_grad,
    op_name,
    primitive,
    replay,
    with_fields,
)
from needle.backend.device import default_device
from needle.dtype import DTYPES, FLOATS, INTEGERS, DType, bool_, float64, int64

Scalar = bool | int | float
NUMBERS = frozenset({bool, int, float})
Operand = Any  # a Tensor, or what becomes one: an array, a list, a scalar


def as_tensor(x: Any, like: Tensor | None = None) -> Tensor:
    """x as a Tensor; arrays and numbers become constants on the device of `like`."""
    if isinstance(x, Tensor):
        return x
    if isinstance(x, Value):
        raise TypeError(f"expected a Tensor; received a {type(x).__name__}; take one of its items")
    if not isinstance(x, NDArray):
        x = NDArray(x, None if like is None else like.device)
    return Tensor.make_const(x)


def as_operand(x: Any, like: Tensor | None) -> Any:
    """x as a Python number where it is or holds one, else as a Tensor."""
    found = as_scalar(x)
    return as_tensor(x, like) if found is None else found


def as_scalar(x: Any) -> Scalar | None:
    """The Python number that x is or holds (a NumPy scalar, a one-element array), else None."""
    if type(x) in NUMBERS:
        return x
    if isinstance(x, np.generic) or (isinstance(x, np.ndarray) and x.shape in ((), (1,))):
        x = x.item()
    return x if isinstance(x, (int, float)) else None


def first_tensor(inputs: Sequence[Any]) -> Tensor | None:
    """The input on whose device constants among the inputs belong."""
    for x in inputs:
        if isinstance(x, Tensor):
            return x
    return None


def as_float(x: Operand) -> Tensor:
    """x as a Tensor of floats; integers become float64, as in NumPy."""
    x = as_tensor(x)
    return x if x.dtype in FLOATS else Cast(float64)(x)


def rule(*parts: Callable[..., Any] | None) -> Callable[..., Any]:
    """A gradient from a function of (dy, y, *x) for each input; those that nobody reads are not
    called, and None stands for no gradient."""

    def gradient(self: Any, out_grad: Any, node: Any) -> Any:
        found = tuple(
            None if part is None or not x.requires_grad else part(out_grad, node, *node.inputs)
            for part, x in zip(parts, node.inputs, strict=True)
        )
        return found[0] if len(found) == 1 and found[0] is not None else found

    return gradient


def by_numpy(function: Any) -> Any:
    """A `compute` that is a function of NumPy's."""
    return staticmethod(function)


class Elementwise(TensorOp):
    """y[i] = f(a[i], b[i], ...): operands broadcast together and share the dtype that NumPy
    promotes them to; where that is none of what the op takes, they become `instead`."""

    is_elementwise = True
    takes: frozenset[DType] = DTYPES
    instead: DType = float64

    def __call__(self, *inputs: Operand) -> Tensor:
        found = replay(self, inputs)
        if found is not None:
            return found
        mixed = self.mix(inputs)
        found = replay(self, mixed)
        return apply_aligned(self, mixed) if found is None else found

    def history(self, arrays: Sequence[NDArray], spec: Any) -> History | None:
        """Operands of other shapes are inputs by way of BroadcastTo nodes, which are left
        uncomputed: the op broadcasts as it reads."""
        shape = spec.shape
        if all(x.shape == shape for x in arrays):
            return None
        spread = spreading(arrays, shape)
        return lambda inputs: (self, spread(inputs))

    def mix(self, inputs: Sequence[Operand], like: Tensor | None = None) -> list[Tensor]:
        """The operands as Tensors of one dtype, on the device of `like` or of the first Tensor."""
        like = first_tensor(inputs) if like is None else like
        parts = [x if isinstance(x, Tensor) else as_operand(x, like) for x in inputs]
        if not any([isinstance(x, Tensor) for x in parts]):
            parts = [as_tensor(x, like) for x in inputs]
        kinds = tuple([x.dtype if isinstance(x, Tensor) else type(x) for x in parts])
        known = self.__dict__.setdefault("mixed", {})
        dtype = known.get(kinds)
        if dtype is None:
            dtype = known[kinds] = self.mixed_dtype(kinds)
        return [
            astype(x, dtype) if isinstance(x, Tensor) else constant(x, dtype, like, self)
            for x in parts
        ]

    def mixed_dtype(self, kinds: Sequence[Any]) -> DType:
        """The dtype for operands of given dtypes, and types of numbers."""
        dtype = dtypes.promote(op_name(self), *[kind for kind in kinds if kind not in NUMBERS])
        for kind in kinds:
            dtype = dtypes.scalar_dtype(dtype, kind()) if kind in NUMBERS else dtype
        return dtype if dtype in self.takes else self.instead

    def infer(self, *specs: Spec) -> Spec:
        name, count = op_name(self), getattr(self.compute, "nin", len(specs))
        if len(specs) != count:
            raise TypeError(f"{name}: expected {count} operands; received {len(specs)}")
        if any(spec != specs[0] for spec in specs):
            raise ValueError(f"{name}: expected equal shapes and dtypes; received {specs}")
        if specs[0].dtype not in self.takes:
            kinds = ", ".join(sorted(map(str, self.takes)))
            raise TypeError(f"{name}: expected one of {kinds}; received {specs[0].dtype}")
        return self.result(specs[0])

    def result(self, spec: Spec) -> Spec:
        """The result's Spec from the operands' common one."""
        return spec


def apply_aligned(op: TensorOp, inputs: Sequence[Tensor]) -> Tensor:
    """The node of an elementwise op on inputs broadcast together."""
    if MODE.autocast is not None:
        inputs = OPS.cast_operands(op, inputs)
    shape = broadcast_shapes(op_name(op), *[x.shape for x in inputs])
    spec = op.specs_of(tuple([part for x in inputs for part in (shape, x.dtype)]))
    if is_lazy():
        inputs = [repeated(x, shape) for x in inputs]
    return Tensor.make_from_op(op, inputs, spec)


def repeated(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x broadcast to a shape: a node without its value, which whoever reads it can do without."""
    if x.shape == shape:
        return x
    return Tensor.make_pending(BroadcastTo(shape), (x,), Spec(shape, x.dtype))


def spreading(arrays: Sequence[NDArray], shape: tuple[int, ...]) -> Callable[..., Any]:
    """`repeated` for the inputs of a node, whose specs are those of arrays."""
    if all(x.shape == shape for x in arrays):
        return tuple
    op = BroadcastTo(shape)
    specs = [None if x.shape == shape else Spec(shape, x.dtype) for x in arrays]

    def spread(inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pairs = zip(inputs, specs, strict=True)
        return tuple(
            [x if spec is None else Tensor.make_pending(op, (x,), spec) for x, spec in pairs]
        )

    return spread


@primitive
class BroadcastTo(TensorOp):
    """y = x repeated along new axes and axes of size 1, to a shape;
    dx = sum of dy over those axes"""

    moves = True
    shape: tuple[int, ...]

    def infer(self, x: Spec) -> Spec:
        new = len(self.shape) - x.ndim
        pairs = zip(x.shape, self.shape[max(new, 0) :], strict=False)
        if new < 0 or not all(size in (1, target) and target >= 0 for size, target in pairs):
            wanted = f"expected a shape to which {x.shape} broadcasts"
            raise ValueError(f"broadcast_to: {wanted}; received {self.shape}")
        return x.with_shape(self.shape)

    def compute(self, x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, self.shape)

    gradient = rule(lambda dy, y, x: sum_to(dy, x.shape))


def sum_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x summed over the axes along which a tensor of a shape was repeated to x's."""
    new = x.ndim - len(shape)
    axes = tuple(axis for axis, n in enumerate(x.shape) if axis < new or shape[axis - new] != n)
    return OPS.reshape(OPS.summation(x, axes), shape)


@primitive
class Cast(TensorOp):
    """y = x in another dtype;
    dx = dy in x's dtype. Floats to integers truncate and saturate; NaN gives 0. What becomes
    bfloat16 is float32 first."""

    is_elementwise = True
    moves = True
    dtype: DType

    def infer(self, x: Spec) -> Spec:
        return x.with_dtype(self.dtype)

    def compute(self, x: np.ndarray) -> np.ndarray:
        return dtypes.cast(x, self.dtype)

    gradient = rule(lambda dy, y, x: astype(dy, x.dtype))


def astype(x: Operand, dtype: Any) -> Tensor:
    """x in another dtype (x itself where it has it already)."""
    x = as_tensor(x)
    if x.dtype is dtype:
        return x
    dtype = dtypes.as_dtype(dtype)
    return x if x.dtype == dtype else Tensor.make_from_op(Cast(dtype), (x,))


NARROWABLE = FLOATS - {float64}


def narrowed(x: Tensor) -> Tensor:
    """x in autocast's dtype, where that is on; float64 and integers as they are."""
    return x if MODE.autocast is None or x.dtype not in NARROWABLE else astype(x, MODE.autocast)


def widened(x: Tensor) -> Tensor:
    """x in float32 where autocast is on and x is of low precision."""
    stays = MODE.autocast is None or x.dtype not in dtypes.LOW_PRECISION
    return x if stays else astype(x, dtypes.float32)


@primitive
class StopGradient(TensorOp):
    """y = x, without history"""

    moves = True

    def infer(self, x: Spec) -> Spec:
        return x

    compute = by_numpy(lambda x: x)

    gradient = rule(None)


def stop_gradient(x: Tensor) -> Tensor:
    """x as a constant of the graph (what `detach` does to a value that is not computed yet)."""
    with no_grad():
        return Tensor.make_pending(StopGradient(), (x,), Spec(x.shape, x.dtype))


# Arithmetic


class Arithmetic(Elementwise):
    """An elementwise op on numbers; bools count as integers 0 and 1."""

    takes, instead = FLOATS | INTEGERS, int64


@primitive
class EWiseAdd(Elementwise):
    """y = a + b;  da = dy, db = dy. On bools: logical or."""

    name = "add"

    compute = by_numpy(np.add)

    gradient = rule(lambda dy, y, a, b: dy, lambda dy, y, a, b: dy)


@primitive
class Subtract(Arithmetic):
    """y = a - b: the kernel behind EWiseAdd(a, Negate(b)), which spares -b. Not an op of the
    graph."""

    name = "subtract"

    compute = by_numpy(np.subtract)

    def __call__(self, *inputs: Operand) -> Tensor:
        if not is_lazy():
            return super().__call__(*inputs)
        a, b = self.mix(inputs)
        spec = Spec(broadcast_shapes(self.name, a.shape, b.shape), a.dtype)
        op, operands = as_addition([repeated(x, spec.shape) for x in (a, b)], spec)
        return Tensor.make_from_op(op, operands, spec)

    def history(self, arrays: Sequence[NDArray], spec: Any) -> History:
        spread = spreading(arrays, spec.shape)
        return lambda inputs: as_addition(spread(inputs), spec)


def as_addition(inputs: Sequence[Tensor], spec: Spec) -> tuple[TensorOp, tuple[Tensor, ...]]:
    """a - b in the graph: a + (-b), where the value of -b is not computed."""
    a, b = inputs
    return ADD, (a, Tensor.make_pending(negate, (b,), spec))


@with_fields
class WithScalar(Elementwise):
    """An elementwise op on x and a number, which must fit x's dtype."""

    scalar: Scalar
    binary: ClassVar[type[TensorOp] | None] = None  # the op with an operand in its place

    def infer(self, x: Spec) -> Spec:
        check_fits(op_name(self), self.scalar, x.dtype)
        return x

    def with_operand(self, spec: Spec) -> tuple[TensorOp, Scalar] | None:
        if self.binary is None or spec.is_low_precision:  # which computes with a float32 number
            return None
        return self.binary(), self.scalar


@primitive
class AddScalar(WithScalar):
    """y = x + scalar;  dx = dy"""

    name, binary = "add_scalar", EWiseAdd

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x + self.scalar

    gradient = rule(lambda dy, y, x: dy)


@primitive
class EWiseMul(Elementwise):
    """y = a * b;  da = dy * b, db = dy * a. On bools: logical and."""

    name = "multiply"

    compute = by_numpy(np.multiply)

    gradient = rule(lambda dy, y, a, b: dy * b, lambda dy, y, a, b: dy * a)


@primitive
class MulScalar(WithScalar):
    """y = x * scalar;  dx = dy * scalar"""

    name, binary = "mul_scalar", EWiseMul

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x * self.scalar

    gradient = rule(lambda dy, y, x: dy * y.op.scalar)


@primitive
class EWiseDiv(Elementwise):
    """y = a / b;  da = dy / b, db = -dy * a / b^2. Integers are divided as float64."""

    name = "divide"

    takes = FLOATS

    compute = by_numpy(np.true_divide)

    gradient = rule(lambda dy, y, a, b: dy / b, lambda dy, y, a, b: -(dy / b * (a / b)))


@primitive
class DivScalar(WithScalar):
    """y = x / scalar;  dx = dy / scalar"""

    name, binary = "divide_scalar", EWiseDiv

    def compute(self, x: np.ndarray) -> np.ndarray:
        return np.true_divide(x, self.scalar)

    gradient = rule(lambda dy, y, x: dy / y.op.scalar)


def base_gradient(dy: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return where(equal(b, 0), 0.0, dy * b * power(a, b - 1))


def exponent_gradient(dy: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    flat = logical_and(equal(a, 0), b >= 0)
    return where(flat, 0.0, dy * y * log(where(flat, 1.0, a)))


@primitive
class EWisePow(Arithmetic):
    """y = a ** b;
    da = dy * b * a^(b - 1), 0 where b = 0;  db = dy * a^b * log(a), 0 where a = 0 and b >= 0"""

    name = "power"

    def compute(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return integer_power(a, b) if a.dtype in INTEGERS else np.power(a, b)

    gradient = rule(base_gradient, exponent_gradient)


def integer_power(a: np.ndarray, b: Any) -> np.ndarray:
    """a ** b for integers; a negative exponent gives the truncated quotient 1 / a**-b (0 where a is
    0)."""
    b = np.asarray(b, a.dtype)
    fractions = np.where(np.abs(a) == 1, np.where(b % 2 == 1, a, 1), 0)
    return np.where(b < 0, fractions, np.power(a, np.maximum(b, 0))).astype(a.dtype)


@primitive
class PowerScalar(WithScalar):
    """y = x ** scalar;  dx = dy * scalar * x^(scalar - 1), 0 where scalar = 0"""

    name = "power_scalar"

    def compute(self, x: np.ndarray) -> np.ndarray:
        if self.scalar == 2:
            return np.multiply(x, x)
        return integer_power(x, self.scalar) if x.dtype in INTEGERS else np.power(x, self.scalar)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        x, scalar = node.inputs[0], self.scalar
        if scalar == 0:
            return out_grad * 0.0
        return out_grad * (x * 2 if scalar == 2 else power(x, scalar - 1) * scalar)


def check_fits(name: str, scalar: Scalar, dtype: DType) -> None:
    """Refuse a scalar that a dtype cannot hold; floats hold any, rounded or infinite."""
    if isinstance(scalar, int):
        bounds = np.iinfo(dtype) if dtype in INTEGERS else np.finfo(np.float64)
        fits = int(bounds.min) <= scalar <= int(bounds.max)
    else:
        fits = dtype in FLOATS
    if not fits:
        raise ValueError(f"{name}: expected a scalar that fits {dtype}; received {scalar}")


def with_scalar(kind: Any, x: Operand, scalar: Any) -> Tensor:
    """The node of an op with a scalar, on x in the dtype that the two have together."""
    found = scalar if type(scalar) is float else as_scalar(scalar)
    if found is None:
        raise TypeError(f"{kind.name}: expected a number; received {scalar!r}")
    op = kind(found)
    known = replay(op, (x,))
    if known is not None:
        return known
    x = as_tensor(x)
    if x.dtype not in FLOATS:
        x = astype(x, dtypes.scalar_dtype(x.dtype, found))
    return Tensor.make_from_op(op, (x,))


def add(a: Operand, b: Operand) -> Tensor:
    """a + b"""
    if type(b) in SCALARS:
        return with_scalar(AddScalar, a, b)
    if type(a) in SCALARS:
        return with_scalar(AddScalar, b, a)
    return ADD(a, b)


def add_scalar(x: Operand, scalar: Scalar) -> Tensor:
    """x + scalar"""
    return with_scalar(AddScalar, x, scalar)


def subtract(a: Operand, b: Operand) -> Tensor:
    """a - b, as EWiseAdd(a, Negate(b)); the value of -b is not computed."""
    if type(b) in SCALARS and isinstance(a, Tensor) and a.dtype in FLOATS:
        b = as_scalar(b)
        return with_scalar(AddScalar, a, -b if b or type(b) is float else -0.0)  # x - 0 keeps -0
    if type(a) in SCALARS and isinstance(b, Tensor) and b.dtype in FLOATS:
        return with_scalar(AddScalar, negate(b), a)
    return SUBTRACT(a, b)


def multiply(a: Operand, b: Operand) -> Tensor:
    """a * b, elementwise"""
    if type(b) in SCALARS:
        return with_scalar(MulScalar, a, b)
    if type(a) in SCALARS:
        return with_scalar(MulScalar, b, a)
    return MULTIPLY(a, b)


def mul_scalar(x: Operand, scalar: Scalar) -> Tensor:
    """x * scalar"""
    return with_scalar(MulScalar, x, scalar)


def divide(a: Operand, b: Operand) -> Tensor:
    """a / b, elementwise; integers give float64, as in NumPy"""
    if type(b) in SCALARS:
        return divide_scalar(a, b)
    return DIVIDE(a, b)


def divide_scalar(x: Operand, scalar: Scalar) -> Tensor:
    """x / scalar"""
    return with_scalar(DivScalar, as_float(x), scalar)


def power(a: Operand, b: Operand) -> Tensor:
    """a ** b, elementwise"""
    if type(b) in SCALARS:
        return power_scalar(a, b)
    return POWER(a, b)


def power_scalar(x: Operand, scalar: Scalar) -> Tensor:
    """x ** scalar"""
    x = as_tensor(x)
    return with_scalar(PowerScalar, astype(x, int64) if x.dtype == bool_ else x, scalar)


def constant(scalar: Scalar, dtype: DType, like: Tensor | None, op: TensorOp) -> Tensor:
    """A scalar as a 0-d tensor on the device of `like`; `op` is what asks."""
    device = default_device() if like is None else like.device
    key = (identity(scalar), dtype, device)
    found = CONSTANTS.get(key)
    if found is None:
        check_fits(op_name(op), scalar, dtype)
        if len(CONSTANTS) >= 4096:
            CONSTANTS.clear()
        found = CONSTANTS[key] = NDArray(scalar, device, dtype)
    return Tensor.make_const(found)


CONSTANTS: dict[tuple[Any, ...], NDArray] = {}  # that nobody writes into


@primitive
class Negate(Arithmetic):
    """y = -x;  dx = -dy"""

    compute = by_numpy(np.negative)

    gradient = rule(lambda dy, y, x: -dy)


@primitive
class Abs(Arithmetic):
    """y = |x|;  dx = dy * sign(x), 0 at 0"""

    compute = by_numpy(np.abs)

    gradient = rule(lambda dy, y, x: dy * OPS.sign(x))


@primitive
class Sign(Arithmetic):
    """y = -1, 0 or 1; NaN stays NaN;  dx = 0"""

    compute = by_numpy(np.sign)

    gradient = rule(None)


# Functions of floats


class FloatUnary(Elementwise):
    """An elementwise function of floats; integers become float64."""

    takes = FLOATS


@primitive
class Exp(FloatUnary):
    """y = e^x;  dx = dy * y"""

    compute = by_numpy(np.exp)

    gradient = rule(lambda dy, y, x: dy * y)


@primitive
class Expm1(FloatUnary):
    """y = e^x - 1, exact for small x;  dx = dy * (y + 1)"""

    compute = by_numpy(np.expm1)

    gradient = rule(lambda dy, y, x: dy * x.exp())


@primitive
class Log(FloatUnary):
    """y = ln(x), NaN below 0, -inf at 0;  dx = dy / x"""

    compute = by_numpy(np.log)

    gradient = rule(lambda dy, y, x: dy / x)


@primitive
class Log1p(FloatUnary):
    """y = ln(1 + x), exact for small x;  dx = dy / (1 + x)"""

    compute = by_numpy(np.log1p)

    gradient = rule(lambda dy, y, x: dy / (x + 1))


@primitive
class Sqrt(FloatUnary):
    """y = x^(1/2), NaN below 0;  dx = dy / (2 y), infinite at 0"""

    compute = by_numpy(np.sqrt)

    gradient = rule(lambda dy, y, x: dy / (y * 2))


@primitive
class Rsqrt(FloatUnary):
    """y = x^(-1/2), NaN below 0, inf at 0;  dx = -dy * y / (2 x)"""

    compute = by_numpy(lambda x: np.divide(1, np.sqrt(x), dtype=x.dtype))

    gradient = rule(lambda dy, y, x: dy * (y / x) * -0.5)


@primitive
class Sin(FloatUnary):
    """y = sin(x), x in radians;  dx = dy * cos(x)"""

    compute = by_numpy(np.sin)

    gradient = rule(lambda dy, y, x: dy * OPS.cos(x))


@primitive
class Cos(FloatUnary):
    """y = cos(x), x in radians;  dx = -dy * sin(x)"""

    compute = by_numpy(np.cos)

    gradient = rule(lambda dy, y, x: -(dy * OPS.sin(x)))


@primitive
class Tanh(FloatUnary):
    """y = tanh(x);  dx = dy * (1 - y^2)"""

    compute = by_numpy(np.tanh)

    gradient = rule(lambda dy, y, x: dy * (1 - y * y))


@primitive
class Erf(FloatUnary):
    """y = 2 / sqrt(pi) * integral of e^(-t^2) from 0 to x;  dx = dy * 2 / sqrt(pi) * e^(-x^2)"""

    def compute(self, x: np.ndarray) -> np.ndarray:
        values = map(math.erf, x.ravel().tolist())
        return np.fromiter(values, np.float64, x.size).reshape(x.shape).astype(x.dtype)

    gradient = rule(lambda dy, y, x: dy * ((-x * x).exp() * (2 / math.sqrt(math.pi))))


@primitive
class ReLU(Arithmetic):
    """y = max(x, 0), NaN stays NaN;  dx = dy where y > 0, else 0"""

    name = "relu"

    # -0 + 0 is +0
    compute = by_numpy(lambda x: np.maximum(x, x.dtype.type(0)) + x.dtype.type(0))

    gradient = rule(lambda dy, y, x: dy * astype(y > 0, dy.dtype))


class Rounding(Arithmetic):
    """A step function: integers stay as they are, and the gradient is 0."""

    gradient = rule(None)


@primitive
class Floor(Rounding):
    """y = the largest integer that is at most x"""

    compute = by_numpy(lambda x: np.floor(x) if x.dtype in FLOATS else x)


@primitive
class Ceil(Rounding):
    """y = the smallest integer that is at least x"""

    compute = by_numpy(lambda x: np.ceil(x) if x.dtype in FLOATS else x)


@primitive
class Round(Rounding):
    """y = the nearest integer, halves to the even one (IEEE 754)"""

    compute = by_numpy(lambda x: np.rint(x) if x.dtype in FLOATS else x)


def square(x: Operand) -> Tensor:
    """x^2"""
    return power(x, 2)


# Two operands: remainder, extrema, comparison, logic, choice


@primitive
class Remainder(Arithmetic):
    """y = a - floor(a / b) * b, with b's sign; integers by 0 give 0;
    da = dy, db = -dy * floor(a / b)"""

    compute = by_numpy(np.remainder)

    gradient = rule(lambda dy, y, a, b: dy, lambda dy, y, a, b: -(dy * (a // b)))


@primitive
class FloorDivide(Arithmetic):
    """y = floor(a / b); integers by 0 give 0, the lowest integer by -1 stays as it is;
    da = db = 0"""

    compute = by_numpy(np.floor_divide)

    gradient = rule(None, None)


def larger(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """max(a, b) as in IEEE 754-2019: NaN wins, -0 < +0. NumPy takes either of two zeros."""
    found = np.maximum(a, b)
    return np.where((a == 0) & (b == 0), a + b, found) if a.dtype in FLOATS else found


def smaller(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """min(a, b) as in IEEE 754-2019: NaN wins, -0 < +0."""
    found = np.minimum(a, b)
    return np.where((a == 0) & (b == 0), -(-a - b), found) if a.dtype in FLOATS else found


@primitive
class Maximum(Elementwise):
    """y = max(a, b), NaN where either is, -0 < +0;
    dy goes to the larger one, half to each if equal, whole to both where y is NaN (as in
    PyTorch)"""

    compute = by_numpy(larger)

    gradient = rule(lambda dy, y, a, b: dy * won(a, b), lambda dy, y, a, b: dy * won(b, a))


@primitive
class Minimum(Elementwise):
    """y = min(a, b), NaN where either is, -0 < +0;
    dy goes to the smaller one, half to each if equal, whole to both where y is NaN (as in
    PyTorch)"""

    compute = by_numpy(smaller)

    gradient = rule(lambda dy, y, a, b: dy * won(b, a), lambda dy, y, a, b: dy * won(a, b))


def won(a: Tensor, b: Tensor) -> Tensor:
    """1 where a > b or either is NaN, 0.5 where a = b, else 0."""
    return astype(logical_not(a < b), a.dtype) - astype(equal(a, b), a.dtype) * 0.5


class Comparison(Elementwise):
    """An elementwise test: y is bool, and has no gradient. NaN is unordered and unequal to all."""

    def result(self, spec: Spec) -> Spec:
        return spec.with_dtype(bool_)


@primitive
class Equal(Comparison):
    """y = a == b"""

    compute = by_numpy(np.equal)


@primitive
class NotEqual(Comparison):
    """y = a != b"""

    compute = by_numpy(np.not_equal)


@primitive
class Less(Comparison):
    """y = a < b"""

    compute = by_numpy(np.less)


@primitive
class LessEqual(Comparison):
    """y = a <= b"""

    compute = by_numpy(np.less_equal)


class Logical(Comparison):
    """An elementwise op on truth values; numbers are true unless 0."""

    takes = frozenset({bool_})

    def mix(self, inputs: Sequence[Operand], like: Tensor | None = None) -> list[Tensor]:
        return [astype(as_tensor(x, first_tensor(inputs)), bool_) for x in inputs]


@primitive
class LogicalAnd(Logical):
    """y = a and b"""

    compute = by_numpy(np.logical_and)


@primitive
class LogicalOr(Logical):
    """y = a or b"""

    compute = by_numpy(np.logical_or)


@primitive
class LogicalNot(Logical):
    """y = not x"""

    compute = by_numpy(np.logical_not)


@primitive
class Where(Elementwise):
    """y = a where condition, else b;  da = dy where condition, db = dy where not"""

    def mix(self, inputs: Sequence[Operand], like: Tensor | None = None) -> list[Tensor]:
        like = first_tensor(inputs)
        return [astype(as_tensor(inputs[0], like), bool_), *super().mix(inputs[1:], like)]

    def infer(self, condition: Spec, a: Spec, b: Spec) -> Spec:
        return super().infer(a, b)

    compute = by_numpy(np.where)

    gradient = rule(
        None,
        lambda dy, y, condition, a, b: OPS.where(condition, dy, 0.0),
        lambda dy, y, condition, a, b: OPS.where(condition, 0.0, dy),
    )


@primitive
class Clip(Arithmetic):
    """y = x brought into [low, high], NaN stays NaN;
    dx = dy where x lies inside, bounds included"""

    low: Scalar | None
    high: Scalar | None

    def compute(self, x: np.ndarray) -> np.ndarray:
        if self.low is not None:
            x = (np.maximum if self.low else larger)(x, x.dtype.type(self.low))
        if self.high is not None:
            x = (np.minimum if self.high else smaller)(x, x.dtype.type(self.high))
        return x

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        x = node.inputs[0]
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return where(logical_and(x >= low, x <= high), out_grad, 0.0)


def clip(x: Operand, low: Scalar | None = None, high: Scalar | None = None) -> Tensor:
    """x brought into [low, high]; None leaves a side open"""
    x, bounds = as_tensor(x), [as_scalar(low), as_scalar(high)]
    for given, bound in zip((low, high), bounds, strict=True):
        if bound is not None:
            x = astype(x, dtypes.scalar_dtype(x.dtype, bound))
            check_fits("clip", bound, x.dtype)
        elif given is not None:
            raise TypeError(f"clip: expected numbers or None; received {given!r}")
    if bounds[0] is not None and bounds[1] is not None and not bounds[0] <= bounds[1]:
        raise ValueError(f"clip: expected low <= high; received low={low}, high={high}")
    return Clip(*bounds)(x)


def greater(a: Operand, b: Operand) -> Tensor:
    """a > b, elementwise"""
    return less(b, a)


def greater_equal(a: Operand, b: Operand) -> Tensor:
    """a >= b, elementwise"""
    return less_equal(b, a)


def logical_xor(a: Operand, b: Operand) -> Tensor:
    """Exactly one of a and b, elementwise"""
    return not_equal(*LogicalOr().mix((a, b)))


def isnan(x: Operand) -> Tensor:
    """Whether x is NaN"""
    x = as_tensor(x)
    return not_equal(x, x)


def isinf(x: Operand) -> Tensor:
    """Whether x is infinite"""
    return equal(abs(x), math.inf)


def isfinite(x: Operand) -> Tensor:
    """Whether x is neither infinite nor NaN"""
    return less(abs(x), math.inf)


# The ops that are functions by themselves

negate, abs, sign, relu = Negate(), Abs(), Sign(), ReLU()
exp, expm1, log, log1p, sqrt, rsqrt = Exp(), Expm1(), Log(), Log1p(), Sqrt(), Rsqrt()
sin, cos, tanh, erf = Sin(), Cos(), Tanh(), Erf()
floor, ceil, round = Floor(), Ceil(), Round()
remainder, floor_divide, maximum, minimum = Remainder(), FloorDivide(), Maximum(), Minimum()
equal, not_equal, less, less_equal = Equal(), NotEqual(), Less(), LessEqual()
logical_and, logical_or, logical_not, where = LogicalAnd(), LogicalOr(), LogicalNot(), Where()
ADD, SUBTRACT, MULTIPLY, DIVIDE, POWER = EWiseAdd(), Subtract(), EWiseMul(), EWiseDiv(), EWisePow()
SCALARS = frozenset({bool, int, float} | {dtype.type for dtype in DTYPES})
