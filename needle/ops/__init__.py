"""The ops: primitives, composites made of them, and the functions that users call.

Read elementwise.py, movement.py, reduce.py, contract.py, index.py (primitives), then composite.py,
activation.py, normalize.py, loss.py, update.py, conv.py, pool.py, resize.py (composites),
random.py, tuples.py, precision.py (autocast). This file names them all and registers them as the
operators of Tensor and NDArray.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from needle.array import ndarray
from needle.array.ndarray import NDArray
from needle.autograd import OPS, Op, Tensor, TensorOp, TensorTuple, TensorTupleOp, mode

# fmt: off
from needle.ops import precision
from needle.ops.activation import (
    ELU, GELU, LeakyReLU, Sigmoid, SiLU, Softplus, elu, gelu, leaky_relu, sigmoid, silu,
    softplus,
)
from needle.ops.composite import Composite, CompositeTuple
from needle.ops.contract import MatMul, einsum, matmul, outer, tensordot
from needle.ops.conv import Conv, ConvTranspose, Windows, conv, conv_transpose, windows
from needle.ops.device import ToDevice, to_device
from needle.ops.elementwise import (
    Abs, AddScalar, BroadcastTo, Cast, Ceil, Clip, Cos, DivScalar, Equal, Erf, EWiseAdd,
    EWiseDiv, EWiseMul, EWisePow, Exp, Expm1, Floor, FloorDivide, Less, LessEqual, Log, Log1p,
    LogicalAnd, LogicalNot, LogicalOr, Maximum, Minimum, MulScalar, Negate, NotEqual,
    PowerScalar, ReLU, Remainder, Round, Rsqrt, Sign, Sin, Sqrt, StopGradient, Tanh, Where, abs,
    add, add_scalar, astype, ceil, clip, cos, divide, divide_scalar, equal, erf, exp, expm1,
    floor, floor_divide, greater, greater_equal, isfinite, isinf, isnan, less, less_equal, log,
    log1p, logical_and, logical_not, logical_or, logical_xor, maximum, minimum, mul_scalar,
    multiply, negate, not_equal, power, power_scalar, relu, remainder, round, rsqrt, sign, sin,
    sqrt, square, stop_gradient, subtract, tanh, where,
)
from needle.ops.index import (
    ArgSort, Gather, IndexCopy, ScatterAdd, arange, argsort, eye, gather, getitem, index_copy,
    linspace, one_hot, scatter_add, sort, take, topk, tril, triu, unbind,
)
from needle.ops.loss import (
    bce_with_logits, cross_entropy, huber_loss, kl_div, l1_loss, mse_loss, nll_loss,
)
from needle.ops.movement import (
    Concatenate, Dilate, Flip, Pad, Permute, Reshape, Slice, Split, Stack, Transpose, UnDilate,
    broadcast_to, chunk, concatenate, dilate, flatten, flip, pad, permute, repeat, reshape,
    roll, split, squeeze, stack, tile, transpose, undilate, unsqueeze,
)
from needle.ops.normalize import (
    BatchNorm, InstanceNorm, LayerNorm, LogSoftmax, LogSumExp, Mean, RMSNorm, Softmax,
    StandardDeviation, Variance, logsoftmax, logsumexp, mean, softmax, std, var,
)
from needle.ops.pool import (
    AvgPool, FirstMax, MaxPool, adaptive_avg_pool, adaptive_max_pool, avg_pool, max_pool,
)
from needle.ops.random import RandomUniform
from needle.ops.reduce import (
    ArgMax, ArgMin, CumSum, Max, Min, Summation, all, any, argmax, argmin, cumsum, max, min,
    norm, prod, summation,
)
from needle.ops.resize import interpolate, pixel_shuffle, pixel_unshuffle
from needle.ops.tuples import (
    FusedAddScalars, MakeTensorTuple, TupleGetItem, fused_add_scalars, make_tuple,
    tuple_get_item,
)
# fmt: on

log_softmax = logsoftmax

FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: found
    for name, found in list(globals().items())
    if getattr(found, "__module__", "").startswith("needle.ops.") and not isinstance(found, type)
}
OP_CLASSES = [
    name
    for name, found in list(globals().items())
    if isinstance(found, type) and issubclass(found, (Op, Tensor, TensorTuple))
]
__all__ = [*FUNCTIONS, *OP_CLASSES, "NDArray"]


def reflected(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """b - a for a - b."""
    return lambda a, b: function(b, a)


def as_method(found: Callable[..., Any]) -> Callable[..., Any]:
    """A function that binds its first argument where it is found on an object, as ops do not."""
    return (lambda *args: found(*args)) if isinstance(found, Op) else found


ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": add, "sub": subtract, "mul": multiply, "truediv": divide, "pow": power,
    "floordiv": floor_divide, "mod": remainder, "matmul": matmul,
}  # fmt: skip
METHODS: dict[str, Callable[..., Any]] = {
    **{f"__{name}__": function for name, function in ARITHMETIC.items()},
    **{f"__r{name}__": reflected(function) for name, function in ARITHMETIC.items()},
    "__neg__": negate, "__abs__": abs, "__invert__": logical_not,
    "__and__": logical_and, "__or__": logical_or, "__xor__": logical_xor,
    "__lt__": less, "__le__": less_equal, "__gt__": greater, "__ge__": greater_equal,
    "__getitem__": getitem, "sum": summation,
    **{name: FUNCTIONS[name] for name in (
        "matmul", "mean", "var", "std", "max", "min", "prod", "any", "all", "argmax", "argmin",
        "cumsum", "flatten", "squeeze", "unsqueeze", "exp", "log", "sqrt", "tanh", "relu", "abs",
        "clip", "astype",
    )},
}  # fmt: skip
ARRAY_METHODS = METHODS | {
    "__eq__": equal, "__ne__": not_equal, "maximum": maximum, "permute": permute,
    "broadcast_to": broadcast_to, "flip": flip, "pad": pad,
}  # fmt: skip


def on_arrays(function: Callable[..., Tensor]) -> Callable[..., NDArray]:
    """A function of Tensors as one of NDArrays, without history."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> NDArray:
        for x in args:
            if isinstance(x, Tensor):
                return NotImplemented  # `array + tensor` is the Tensor's to answer
        with mode(grad=False, autocast=None):
            tensors = [Tensor.make_const(x) if isinstance(x, NDArray) else x for x in args]
            return function(*tensors, **kwargs).realize_cached_data()

    return run


for name, function in FUNCTIONS.items():
    setattr(OPS, name, function)
OPS.cast_operands, OPS.casts = precision.cast_operands, precision.CASTS
for name, function in METHODS.items():
    setattr(Tensor, name, as_method(function))
for name, function in ARRAY_METHODS.items():
    if getattr(NDArray, name, None) is ndarray.unregistered:
        setattr(NDArray, name, on_arrays(function))
