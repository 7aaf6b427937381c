"""Huge, tiny, infinite and NaN input: every op gives what IEEE 754 and float64 say, and no warning.

References are scalar functions of math in float64, written so that they hold everywhere; float32
and the low precisions are compared with them, rounded. Gradients at special points are the
documented ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checks import assert_close, assert_same_bits, tolerance

import needle as ndl
from needle.autograd import Tensor
from needle.dtype import as_dtype

INF, NAN = math.inf, math.nan
DTYPES = ["float64", "float32", "float16", "bfloat16"]


def specials(dtype: str) -> np.ndarray:
    """Zeros, infinities, NaN, subnormals, the smallest and the largest, and the edges of e^x."""
    limits = ml_dtypes.finfo(as_dtype(dtype))
    smallest, normal, largest = (
        float(each) for each in (limits.smallest_subnormal, limits.smallest_normal, limits.max)
    )
    eps = float(limits.eps)
    positive = [
        0.0,
        smallest,
        3 * smallest,
        normal - smallest,
        normal,
        eps / 2,
        eps,
        1e-4,
        0.5,
        1.0,
        1 + eps,
    ]
    positive += [
        1.5,
        2.0,
        2.5,
        math.pi,
        7.0,
        20.0,
        88.0,
        90.0,
        103.0,
        709.0,
        745.0,
        1e4,
        largest / 2,
        largest,
        INF,
    ]
    found = np.array(positive, np.float64).astype(as_dtype(dtype))
    return np.concatenate([found, -found, np.array([NAN], found.dtype)])


def scalar(function: Callable[[float], float]) -> Callable[[float], float]:
    """A function of math that overflows to infinity and gives NaN outside its domain."""

    def call(x: float) -> float:
        if math.isnan(x):
            return NAN
        try:
            return function(x)
        except OverflowError:
            return INF
        except ValueError:
            return NAN

    return call


def log(x: float) -> float:
    return -INF if x == 0 else math.log(x)


def round_half_even(x: float) -> float:
    return x if math.isinf(x) else math.copysign(float(round(x)), x)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else math.exp(x) if x > -INF else 0.0


def gelu(x: float) -> float:
    return -0.0 if x == -INF else x * (math.erfc(-x / math.sqrt(2)) / 2)


def gelu_tanh(x: float) -> float:
    if abs(x) > 100:
        return max(x, -0.0) if x > 0 else -0.0
    return x / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softplus(x: float) -> float:
    return x if x > 800 else max(x, 0) + math.log1p(math.exp(-abs(x)))


UNARY: dict[str, Callable[[float], float]] = {
    "exp": math.exp,
    "expm1": math.expm1,
    "log": log,
    "log1p": lambda x: -INF if x == -1 else math.log1p(x),
    "sqrt": math.sqrt,
    "rsqrt": lambda x: math.copysign(INF, x) if x == 0 else 0.0 if x == INF else 1 / math.sqrt(x),
    "square": lambda x: x * x,
    "sin": math.sin,
    "cos": math.cos,
    "tanh": math.tanh,
    "erf": math.erf,
    "relu": lambda x: x if x > 0 else 0.0,
    "abs": math.fabs,
    "sign": lambda x: float((x > 0) - (x < 0)),
    "floor": lambda x: x if math.isinf(x) or x == 0 else float(math.floor(x)),
    "ceil": lambda x: x if math.isinf(x) or x == 0 else math.copysign(float(math.ceil(x)), x),
    "round": round_half_even,
    "negate": lambda x: -x,
    "sigmoid": sigmoid,
    "silu": lambda x: -0.0 if x == -INF else x * sigmoid(x),
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "softplus": softplus,
    "elu": lambda x: x if x > 0 else math.expm1(x),
    "leaky_relu": lambda x: x if x > 0 else x * 0.01,
}
# What a result may be off by beyond `tolerance`, as a function of x, the dtype's unit and its
# smallest normal number: each with its reason.
MARGINS: dict[str, Callable[[float, float, float], float]] = {
    # e^-x overflows where the result is subnormal, and gives 0
    "sigmoid": lambda x, eps, normal: normal,
    "silu": lambda x, eps, normal: normal * min(abs(x), 1e4),
    # e^-|x| is subnormal there
    "softplus": lambda x, eps, normal: normal,
    # 1 + erf(x) and 1 + tanh(x) are off by a unit of 1, where the factor x is not yet 0
    "gelu": lambda x, eps, normal: 2 * eps * min(abs(x), 40.0),
    "gelu_tanh": lambda x, eps, normal: 2 * eps * min(abs(x), 40.0),
}
FUNCTIONS: dict[str, Callable[..., Any]] = {"gelu_tanh": lambda x: ndl.gelu(x, "tanh")}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_number(name: str, dtype: str) -> None:
    x = specials(dtype)
    y = FUNCTIONS.get(name, getattr(ndl, name, None))(Tensor(x)).numpy()
    assert y.dtype == x.dtype
    working = np.float64 if dtype == "float64" else np.float32
    eps, normal = float(np.finfo(working).eps), float(np.finfo(working).smallest_normal)
    reference = scalar(UNARY[name])
    for each, found in zip(x.astype(np.float64).tolist(), y, strict=True):
        expected = np.float64(reference(each))
        margin = MARGINS.get(name, lambda *_: 0.0)(each, eps, normal)
        with np.errstate(all="ignore"):
            rounded = float(expected.astype(x.dtype))
        close = abs(float(found) - rounded) <= margin + tolerance(dtype) * min(abs(rounded), 1e300)
        if not (math.isfinite(rounded) and math.isfinite(float(found)) and close):
            assert_close(found, expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name", ["abs", "negate", "floor", "ceil", "round", "sqrt", "relu", "square"]
)
def test_exact_functions_are_right_to_the_bit(name: str, dtype: str) -> None:
    """Signs of zeros and subnormals included."""
    x = specials(dtype)
    reference = scalar(UNARY[name])
    with np.errstate(all="ignore"):
        expected = np.array([reference(each) for each in x.astype(np.float64).tolist()]).astype(
            x.dtype
        )
    assert_same_bits(getattr(ndl, name)(Tensor(x)), expected)


def grid(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    x = specials(dtype)
    return tuple(each.ravel() for each in np.meshgrid(x, x, indexing="ij"))  # type: ignore[return-value]


def rounded(values: Any, dtype: str) -> np.ndarray:
    with np.errstate(all="ignore"):
        return np.asarray(values, np.float64).astype(as_dtype(dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide"])
def test_arithmetic_rounds_once(name: str, dtype: str) -> None:
    """float32's results are those of float64, rounded: for + - * / that is exact."""
    a, b = grid(dtype)
    with np.errstate(all="ignore"):
        expected = getattr(np, name)(a.astype(np.float64), b.astype(np.float64))
    assert_same_bits(getattr(ndl, name)(Tensor(a), Tensor(b)), rounded(expected, dtype))
    for scalar_operand in (0.0, -0.0, 3, INF, NAN, 1e-40, 1e300):
        with np.errstate(all="ignore"):
            operand = np.float64(scalar_operand).astype(a.dtype).astype(np.float64)
            left = getattr(np, name)(a.astype(np.float64), operand)
            right = getattr(np, name)(operand, a.astype(np.float64))
        assert_same_bits(getattr(ndl, name)(Tensor(a), scalar_operand), rounded(left, dtype))
        assert_same_bits(getattr(ndl, name)(scalar_operand, Tensor(a)), rounded(right, dtype))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", ["add", "subtract", "multiply", "divide"])
def test_low_precision_is_float32_rounded_once(name: str, dtype: str) -> None:
    a, b = grid(dtype)
    with np.errstate(all="ignore"):
        expected = getattr(np, name)(a.astype(np.float32), b.astype(np.float32)).astype(a.dtype)
    assert_same_bits(getattr(ndl, name)(Tensor(a), Tensor(b)), expected)


def larger(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return NAN
    if a == b == 0:
        return 0.0 if math.copysign(1, a) > 0 or math.copysign(1, b) > 0 else -0.0
    return max(a, b)


def smaller(a: float, b: float) -> float:
    return -larger(-a, -b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_and_minimum_are_those_of_ieee_754_2019(dtype: str) -> None:
    a, b = grid(dtype)
    pairs = list(zip(a.astype(np.float64).tolist(), b.astype(np.float64).tolist(), strict=True))
    assert_same_bits(
        ndl.maximum(Tensor(a), Tensor(b)), rounded([larger(*each) for each in pairs], dtype)
    )
    assert_same_bits(
        ndl.minimum(Tensor(a), Tensor(b)), rounded([smaller(*each) for each in pairs], dtype)
    )
    both = Tensor(np.stack([a, b]))
    assert_same_bits(ndl.max(both, 0), rounded([larger(*each) for each in pairs], dtype))
    assert_same_bits(ndl.min(both, 0), rounded([smaller(*each) for each in pairs], dtype))
    assert_same_bits(ndl.max(both.T, 1), rounded([larger(*each) for each in pairs], dtype))


@pytest.mark.parametrize("low", [0.0, -0.0, -1.0, -INF, None])
@pytest.mark.parametrize("high", [0.0, 1.0, INF, None])
def test_clip_is_maximum_then_minimum(low: float | None, high: float | None) -> None:
    x = specials("float64")
    expected = x.tolist()
    if low is not None:
        expected = [larger(each, low) for each in expected]
    if high is not None:
        expected = [smaller(each, high) for each in expected]
    assert_same_bits(ndl.clip(Tensor(x), low, high), np.array(expected))


def test_the_largest_of_many_zeros() -> None:
    for zeros, largest, smallest in (
        ([-0.0, 0.0, -0.0], 0.0, -0.0),
        ([-0.0, -0.0], -0.0, -0.0),
        ([0.0, 0.0], 0.0, 0.0),
        ([-1.0, -0.0], -0.0, -1.0),
        ([1.0, 0.0, -0.0], 1.0, -0.0),
    ):
        for order in (zeros, zeros[::-1]):
            assert_same_bits(ndl.max(Tensor(np.array(order))), np.float64(largest))
            assert_same_bits(ndl.min(Tensor(np.array(order))), np.float64(smallest))


def power(a: float, b: float) -> float:
    try:
        return math.pow(a, b)
    except OverflowError:
        odd = b == math.trunc(b) and math.fmod(b, 2) != 0
        return -INF if a < 0 and odd else INF
    except ValueError:
        if a == 0 and b < 0:
            odd = b == math.trunc(b) and math.fmod(b, 2) != 0
            return math.copysign(INF, a) if odd else INF
        return NAN


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_power(dtype: str) -> None:
    a, b = grid(dtype)
    expected = [
        power(*each)
        for each in zip(a.astype(float).tolist(), b.astype(float).tolist(), strict=True)
    ]
    assert_close(Tensor(a) ** Tensor(b), np.array(expected))


def floored(a: float, b: float) -> tuple[float, float]:
    """(a // b, a % b) as Python has them, and what IEEE 754 says where it raises."""
    try:
        return a // b, a % b
    except ZeroDivisionError:
        return (
            NAN if a == 0 or math.isnan(a) else math.copysign(INF, a) * math.copysign(1, b)
        ), NAN


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_floor_divide_and_remainder(dtype: str) -> None:
    values = np.array([0.0, -0.0, 0.5, -0.5, 1, -1, 2.5, -7.25, 1e30, -1e30, INF, -INF, NAN], dtype)
    a, b = (each.ravel() for each in np.meshgrid(values, values))
    pairs = zip(a.astype(float).tolist(), b.astype(float).tolist(), strict=True)
    expected = np.array([floored(*each) for each in pairs])
    finite = ~np.isinf(a)  # inf // b: Python has NaN, IEEE 754 infinity
    assert_close(ndl.remainder(Tensor(a), Tensor(b)), expected[:, 1])
    found = ndl.floor_divide(Tensor(a), Tensor(b)).numpy()
    assert_close(found[finite], expected[finite, 0], length=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparisons_and_tests(dtype: str) -> None:
    a, b = grid(dtype)
    x, y = a.astype(np.float64), b.astype(np.float64)
    for name in ("equal", "not_equal", "less", "less_equal", "greater", "greater_equal"):
        np.testing.assert_array_equal(
            getattr(ndl, name)(Tensor(a), Tensor(b)).numpy(), getattr(np, name)(x, y)
        )
    for name in ("isnan", "isinf", "isfinite", "logical_not"):
        np.testing.assert_array_equal(getattr(ndl, name)(Tensor(a)).numpy(), getattr(np, name)(x))


# Reductions

HUGE = 1.5e308
REDUCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], list[Any], Any]] = {
    "sum overflows": (ndl.summation, [HUGE, HUGE], INF),
    "sum of inf and -inf": (ndl.summation, [INF, -INF, 1.0], NAN),
    "sum with NaN": (ndl.summation, [1.0, NAN, INF], NAN),
    "sum of subnormals": (ndl.summation, [5e-324, 5e-324], 1e-323),
    "sum of nothing": (ndl.summation, [], 0.0),
    "mean of nothing": (ndl.mean, [], NAN),
    "mean with inf": (ndl.mean, [INF, 1.0], INF),
    "var with inf": (ndl.var, [INF, 1.0], NAN),
    "var far from 0": (ndl.var, [1e8 + 1, 1e8 + 2, 1e8 + 3], 2 / 3),
    "var of equals": (ndl.var, [1e154, 1e154], 0.0),
    "var of one, unbiased": (lambda x: ndl.var(x, correction=1), [3.0], NAN),
    "std with NaN": (ndl.std, [NAN, 1.0], NAN),
    "prod overflows": (ndl.prod, [1e200, 1e200], INF),
    "prod of 0 and inf": (ndl.prod, [0.0, INF], NAN),
    "prod of nothing": (ndl.prod, [], 1.0),
    "max with NaN": (ndl.max, [1.0, NAN, INF], NAN),
    "min with NaN": (ndl.min, [-INF, NAN], NAN),
    "max of -inf": (ndl.max, [-INF, -INF], -INF),
    "norm of huge": (ndl.norm, [3e300, -4e300], 5e300),
    "norm of tiny": (ndl.norm, [3e-300, 4e-300], 5e-300),
    "norm of subnormals": (ndl.norm, [3e-323, 0.0], 3e-323),
    "norm of the largest": (ndl.norm, [HUGE, HUGE], INF),
    "norm of zeros": (ndl.norm, [0.0, -0.0], 0.0),
    "norm with inf": (ndl.norm, [-INF, 1.0], INF),
    "norm with NaN": (ndl.norm, [NAN, INF], NAN),
    "norm of nothing": (ndl.norm, [], 0.0),
    "3-norm of huge": (lambda x: ndl.norm(x, 3), [1e200, 0.0], 1e200),
    "1-norm": (lambda x: ndl.norm(x, 1), [-INF, 1.0], INF),
    "inf-norm with NaN": (lambda x: ndl.norm(x, INF), [NAN, 1.0], NAN),
    "0-norm": (lambda x: ndl.norm(x, 0), [0.0, -0.0, NAN, 5e-324], 2.0),
    "logsumexp of huge": (ndl.logsumexp, [HUGE, HUGE], HUGE),
    "logsumexp of large": (ndl.logsumexp, [1000.0, 1000.0], 1000 + math.log(2)),
    "logsumexp of -large": (ndl.logsumexp, [-1000.0, -1000.0], -1000 + math.log(2)),
    "logsumexp of -inf": (ndl.logsumexp, [-INF, -INF], -INF),
    "logsumexp with -inf": (ndl.logsumexp, [-INF, 2.0], 2.0),
    "logsumexp with inf": (ndl.logsumexp, [INF, 1.0, -INF], INF),
    "logsumexp with NaN": (ndl.logsumexp, [NAN, INF], NAN),
    "softmax of huge": (ndl.softmax, [HUGE, HUGE, -HUGE], [0.5, 0.5, 0.0]),
    "softmax of large": (ndl.softmax, [1000.0, 1001.0], [1 / (1 + math.e), math.e / (1 + math.e)]),
    "softmax with -inf": (ndl.softmax, [-INF, 0.0, 0.0], [0.0, 0.5, 0.5]),
    "softmax of -inf": (ndl.softmax, [-INF, -INF], [0.0, 0.0]),
    "softmax with inf": (ndl.softmax, [INF, 1.0, 1000.0], [NAN, 0.0, 0.0]),
    "softmax with NaN": (ndl.softmax, [NAN, 1.0], [NAN, NAN]),
    "log_softmax of huge": (ndl.log_softmax, [HUGE, 0.0], [0.0, -HUGE]),
    "log_softmax of opposite": (ndl.log_softmax, [HUGE, -HUGE], [0.0, -INF]),
    "log_softmax with -inf": (ndl.log_softmax, [-INF, 0.0], [-INF, 0.0]),
    "log_softmax of -inf": (ndl.log_softmax, [-INF, -INF], [-INF, -INF]),
    "log_softmax with NaN": (ndl.log_softmax, [NAN, 1.0], [NAN, NAN]),
    "cumsum": (lambda x: ndl.cumsum(x, 0), [HUGE, HUGE, -INF], [HUGE, INF, NAN]),
    "sort puts NaN last": (lambda x: ndl.sort(x)[0], [NAN, INF, -INF, 1.0], [-INF, 1.0, INF, NAN]),
    "sort downwards": (lambda x: ndl.sort(x, descending=True)[0], [1.0, NAN, INF], [NAN, INF, 1.0]),
    "argmax finds NaN": (ndl.argmax, [1.0, NAN, INF, NAN], 1),
    "argmin finds NaN": (ndl.argmin, [1.0, -INF, NAN], 2),
    "any of NaN": (ndl.any, [0.0, NAN], True),
    "all of NaN": (ndl.all, [NAN, 1.0], True),
    "any of nothing": (ndl.any, [], False),
    "all of nothing": (ndl.all, [], True),
    "mse overflows": (lambda x: ndl.mse_loss(x, x * 0.0), [1e200, 0.0], INF),
    "l1 of huge": (lambda x: ndl.l1_loss(x, [0.0, 0.0], "sum"), [1e300, -1e300], 2e300),
    "huber of huge": (
        lambda x: ndl.huber_loss(x, [0.0, 0.0], reduction="sum"),
        [1e300, 0.5],
        1e300,
    ),
    "bce, right": (
        lambda x: ndl.bce_with_logits(x, [1.0, 0.0], None, "none"),
        [1e300, -1e300],
        [0.0, 0.0],
    ),
    "bce, wrong": (
        lambda x: ndl.bce_with_logits(x, [0.0, 1.0], None, "none"),
        [1e300, -800.0],
        [1e300, 800.0],
    ),
    "kl with 0": (lambda x: ndl.kl_div(x, [0.0, 1.0], "sum"), [-INF, 0.0], 0.0),
    "cross entropy of huge": (lambda x: ndl.cross_entropy(x, np.array(1)), [1e300, -1e300], 2e300),
    "cross entropy with -inf": (lambda x: ndl.cross_entropy(x, np.array(1)), [-INF, 0.0], 0.0),
    "nll with -inf": (lambda x: ndl.nll_loss(x, np.array(0)), [-1.0, -INF], 1.0),
}


@pytest.mark.parametrize("case", REDUCTIONS)
def test_reductions(case: str) -> None:
    function, values, expected = REDUCTIONS[case]
    y = function(Tensor(np.array(values, np.float64)))
    expected = np.asarray(expected)
    if y.dtype == "float64":
        assert_close(y, expected.astype(np.float64))
    else:
        np.testing.assert_array_equal(y.numpy(), expected)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_softmax_and_its_kin_at_the_ends_of_other_dtypes(dtype: str) -> None:
    largest = float(ml_dtypes.finfo(as_dtype(dtype)).max)
    rows = np.array([[largest, largest, -largest], [-INF, -INF, -INF], [-largest, -INF, -largest]])
    x = Tensor(rows, dtype=dtype)
    assert_close(ndl.softmax(x), np.array([[0.5, 0.5, 0], [0, 0, 0], [0.5, 0, 0.5]]), length=3)
    half = math.log(0.5)
    expected = [[half, half, -INF], [-INF] * 3, [half, -INF, half]]
    assert_close(ndl.log_softmax(x).numpy()[:, [0, 1]], np.array(expected)[:, [0, 1]], length=3)
    assert_close(ndl.logsumexp(x, 1), np.array([largest, -INF, -largest]), length=3)


def test_a_mean_square_in_low_precision_does_not_overflow_on_its_way() -> None:
    x = Tensor(np.full(4, 300.0), dtype="float16")
    assert ndl.mse_loss(x, x * 0.0, "none").numpy().max() == INF  # 90000 is beyond float16
    assert ndl.std(Tensor([300.0, -300.0], dtype="float16")).item() == 300
    assert ndl.softmax(Tensor([6e4, -6e4], dtype="float16")).tolist() == [1, 0]


# Gradients at special points

GRADIENTS: dict[str, tuple[Callable[..., Tensor], list[Any], list[Any]]] = {
    "sqrt at 0": (ndl.sqrt, [[0.0, 4.0]], [[INF, 0.25]]),
    "x ** 0.5 at 0": (lambda x: x**0.5, [[0.0]], [[INF]]),
    "rsqrt at 0": (ndl.rsqrt, [[0.0]], [[-INF]]),
    "log at 0": (ndl.log, [[0.0, -0.0]], [[INF, -INF]]),
    "log1p at -1": (ndl.log1p, [[-1.0]], [[INF]]),
    "abs at 0": (ndl.abs, [[0.0, -0.0, NAN]], [[0.0, 0.0, NAN]]),
    "sign": (ndl.sign, [[0.0, 1.0]], [[0.0, 0.0]]),
    "floor": (ndl.floor, [[0.0, 1.5]], [[0.0, 0.0]]),
    "relu at 0": (ndl.relu, [[0.0, -0.0, INF, -INF]], [[0.0, 0.0, 1.0, 0.0]]),
    "leaky_relu at 0": (ndl.leaky_relu, [[0.0, -INF]], [[0.01, 0.01]]),
    "elu at 0": (ndl.elu, [[0.0, -INF, INF]], [[1.0, 0.0, 1.0]]),
    "clip at its bounds": (
        lambda x: ndl.clip(x, 0, 1),
        [[0.0, 1.0, -1.0, 2.0]],
        [[1.0, 1.0, 0.0, 0.0]],
    ),
    "norm at 0": (ndl.norm, [[0.0, 0.0]], [[0.0, 0.0]]),
    "1-norm at 0": (lambda x: ndl.norm(x, 1), [[0.0, -2.0]], [[0.0, -1.0]]),
    "3-norm at 0": (lambda x: ndl.norm(x, 3), [[0.0, 0.0]], [[0.0, 0.0]]),
    "inf-norm ties": (lambda x: ndl.norm(x, INF), [[1.0, -1.0, 0.5]], [[0.5, -0.5, 0.0]]),
    "norm of huge": (ndl.norm, [[3e300, -4e300]], [[0.6, -0.8]]),
    "norm of tiny": (ndl.norm, [[3e-300, -4e-300]], [[0.6, -0.8]]),
    "std of equals": (ndl.std, [[2.0, 2.0]], [[0.0, 0.0]]),
    "prod with one 0": (ndl.prod, [[2.0, 0.0, 3.0]], [[0.0, 6.0, 0.0]]),
    "prod with two 0": (ndl.prod, [[0.0, 5.0, 0.0]], [[0.0, 0.0, 0.0]]),
    "max of equals": (ndl.max, [[1.0, 3.0, 3.0]], [[0.0, 0.5, 0.5]]),
    "min of equals": (ndl.min, [[1.0, 1.0, 1.0, 3.0]], [[1 / 3, 1 / 3, 1 / 3, 0.0]]),
    "maximum of equals": (ndl.maximum, [[1.0, 0.0], [1.0, -0.0]], [[0.5, 0.5], [0.5, 0.5]]),
    "minimum of equals": (ndl.minimum, [[INF, 1.0], [INF, 2.0]], [[0.5, 1.0], [0.5, 0.0]]),
    "power at 0": (
        ndl.power,
        [[0.0, 0.0, 0.0, 3.0], [0.0, 2.0, 1.0, 0.0]],
        [[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, math.log(3)]],
    ),
    "x ** 0": (lambda x: x**0, [[0.0, NAN, INF]], [[0.0, 0.0, 0.0]]),
    "x ** 2 and x ** 3 at 0": (lambda x: x**2 + x**3, [[0.0, -0.0]], [[0.0, 0.0]]),
    "where drops the other branch": (
        lambda x: ndl.where(x > 0, x * 2, 1 / x),
        [[1.0, 2.0]],
        [[2.0, 2.0]],
    ),
    "where, guarded": (
        lambda x: ndl.where(x > 0, ndl.log(ndl.where(x > 0, x, 1.0)), 0.0),
        [[0.0, -1.0, 2.0]],
        [[0.0, 0.0, 0.5]],
    ),
    "sigmoid at the ends": (ndl.sigmoid, [[INF, -INF, 1e300, -1e300]], [[0.0] * 4]),
    "tanh at the ends": (ndl.tanh, [[INF, -INF, 1e300]], [[0.0] * 3]),
    "erf at the ends": (ndl.erf, [[INF, -INF, 1e300]], [[0.0] * 3]),
    "silu at the ends": (ndl.silu, [[INF, -INF, 1e300, -1e300]], [[1.0, 0.0, 1.0, 0.0]]),
    "gelu at the ends": (ndl.gelu, [[INF, -INF, 1e300, -1e300]], [[1.0, 0.0, 1.0, 0.0]]),
    "gelu by tanh": (
        lambda x: ndl.gelu(x, "tanh"),
        [[INF, -INF, 1e300, -1e300]],
        [[1.0, 0.0, 1.0, 0.0]],
    ),
    "softplus at the ends": (ndl.softplus, [[INF, -INF, 1e300, -1e300]], [[1.0, 0.0, 1.0, 0.0]]),
    "exp of -inf": (ndl.exp, [[-INF, 0.0]], [[0.0, 1.0]]),
    "logsumexp of -inf": (ndl.logsumexp, [[-INF, -INF]], [[0.0, 0.0]]),
    "logsumexp with -inf": (ndl.logsumexp, [[-INF, 0.0, 0.0]], [[0.0, 0.5, 0.5]]),
    "logsumexp with inf": (ndl.logsumexp, [[INF, 0.0]], [[NAN, NAN]]),
    "logsumexp of huge": (ndl.logsumexp, [[1e300, 1e300, 0.0]], [[0.5, 0.5, 0.0]]),
    "softmax, a row masked whole": (
        ndl.softmax,
        [[[-INF, -INF], [0.0, 0.0]]],
        [[[0.0, 0.0], [0.0, 0.0]]],
    ),
    "log_softmax with -inf": (ndl.log_softmax, [[-INF, 0.0]], [[1.0, -1.0]]),
    "cross entropy of huge": (
        lambda x: ndl.cross_entropy(x, np.array([1])),
        [[[1e300, -1e300]]],
        [[[1.0, -1.0]]],
    ),
    "cross entropy, masked class": (
        lambda x: ndl.cross_entropy(x, np.array([1])),
        [[[-INF, 0.0, 0.0]]],
        [[[0.0, -0.5, 0.5]]],
    ),
    "bce of huge": (
        lambda x: ndl.bce_with_logits(x, [1.0, 0.0, 0.0], None, "sum"),
        [[1e300, -1e300, 1e300]],
        [[0.0, 0.0, 1.0]],
    ),
    "l1 at 0": (lambda x: ndl.l1_loss(x, [0.0, 1.0], "sum"), [[0.0, 3.0]], [[0.0, 1.0]]),
    "kl with 0": (lambda x: ndl.kl_div(x, [0.0, 1.0], "sum"), [[-INF, 0.0]], [[0.0, -1.0]]),
    "mean of nothing": (ndl.mean, [[]], [[]]),
}


@pytest.mark.parametrize("case", GRADIENTS)
def test_gradients_at_special_points(case: str) -> None:
    function, inputs, expected = GRADIENTS[case]
    tensors = [Tensor(np.array(values, np.float64)) for values in inputs]
    y = function(*tensors)
    y.backward(np.ones(y.shape))
    for x, grad in zip(tensors, expected, strict=True):
        assert x.grad is not None
        assert_close(x.grad, np.array(grad, np.float64))


def test_second_order_at_zero_stays_finite() -> None:
    """Where a first gradient is 0 by definition, so is the next."""
    for function in (ndl.norm, ndl.std, ndl.relu, lambda x: x**2 * 0.0):
        x = Tensor(np.zeros(2))
        function(x).sum().backward()
        first = x.grad
        assert first is not None
        if first.requires_grad:
            first.sum().backward()
            assert x.grad is not None
            assert np.isfinite(x.grad.numpy()).all()


# Integers


def test_integers_by_zero_and_the_lowest_by_minus_one() -> None:
    for dtype in ("int8", "int16", "int32", "int64", "uint8"):
        x = Tensor(np.array([7, 0, 5]).astype(dtype))
        zero = Tensor(np.zeros(3, dtype))
        assert (x // zero).tolist() == [0, 0, 0]
        assert (x % zero).tolist() == [0, 0, 0]
        assert (x // 0).tolist() == (x % 0).tolist() == [0, 0, 0]
        assert (x / 0).tolist()[0] == INF
        if dtype != "uint8":
            lowest = np.iinfo(dtype).min
            edge = Tensor(np.array([lowest]).astype(dtype))
            minus_one = Tensor(np.array([-1]).astype(dtype))
            assert (edge // minus_one).tolist() == (edge // -1).tolist() == [lowest]
            assert (edge % minus_one).tolist() == [0]
            assert abs(edge).tolist() == (-edge).tolist() == [lowest]


def test_integers_wrap_around() -> None:
    assert (Tensor([250, 3], dtype="uint8") + 10).tolist() == [4, 13]
    assert (Tensor([0, 3], dtype="uint8") - 1).tolist() == [255, 2]
    assert (3 - Tensor([5], dtype="uint8")).tolist() == [254]
    assert (Tensor([-1], dtype="int8") - (-128)).tolist() == [127]
    assert (Tensor([127], dtype="int8") + 1).tolist() == [-128]
    assert (Tensor(np.array([2**62])) * 2).tolist() == [-(2**63)]
    assert (-Tensor([1], dtype="uint8")).tolist() == [255]


def test_integer_powers() -> None:
    """A negative exponent gives the truncated quotient: 0 but for 1 and -1; 0 gives 0."""
    base = Tensor([0, 1, -1, -1, 2, -3], dtype="int32")
    assert (base ** Tensor([-1, -5, -2, -3, -1, -1], dtype="int32")).tolist() == [0, 1, 1, -1, 0, 0]
    assert (base**-1).tolist() == [0, 1, -1, -1, 0, 0]
    assert (base**0).tolist() == [1] * 6
    assert (base**3).tolist() == [0, 1, -1, -1, 8, -27]
    assert (base**0.5).dtype == "float64"


def test_scalars_that_underflow_or_overflow_the_dtype() -> None:
    x = Tensor(np.array([1.0, 2.0], np.float32))
    assert (x * 1e300).tolist() == [INF, INF]
    assert (x + 1e300).tolist() == [INF, INF]
    assert (x * 1e-300).tolist() == [0, 0]
    assert (x + 2**70).tolist() == [float(2**70)] * 2
    assert (Tensor([1.0], dtype="float16") + 70000).tolist() == [INF]
