"""Dtypes: what mixes to what, integers and bools in every op, Python scalars, casts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checks import assert_close

import needle as ndl
from needle.autograd import Tensor
from needle.dtype import DTYPES

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
INTEGERS = ["int8", "int16", "int32", "int64", "uint8"]
FLOATS = ["float16", "float32", "float64"]
NUMPYS = ["bool", *INTEGERS, *FLOATS]

# NumPy's function for needle's, in three kinds. Arithmetic counts bools as int64, and functions of
# floats take integers as float64, where NumPy has float16, int8 or an error: there needle differs.
LIKE_NUMPY: dict[str, Any] = {
    "add": np.add,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
}
ARITHMETIC: dict[str, Any] = {
    "subtract": np.subtract,
    "power": np.power,
    "remainder": np.remainder,
    "floor_divide": np.floor_divide,
}
OF_FLOATS: dict[str, Any] = {"divide": np.true_divide}
BINARY = {**LIKE_NUMPY, **ARITHMETIC, **OF_FLOATS}

UNARY_ARITHMETIC: dict[str, Any] = {
    "negate": np.negative,
    "abs": np.abs,
    "sign": np.sign,
    "square": np.square,
    "floor": lambda x: x if x.dtype.kind in "iu" else np.floor(x),
    "ceil": lambda x: x if x.dtype.kind in "iu" else np.ceil(x),
    "round": lambda x: x if x.dtype.kind in "iu" else np.rint(x),
    "relu": lambda x: np.maximum(x, x.dtype.type(0)),
}
UNARY_OF_FLOATS: dict[str, Any] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "erf": lambda x: np.vectorize(math.erf)(x).astype(x.dtype),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))).astype(x.dtype),
    "softplus": lambda x: np.log1p(np.exp(x)),
    "elu": lambda x: np.where(x > 0, x, np.expm1(x)),
    "leaky_relu": lambda x: np.where(x > 0, x, x * x.dtype.type(0.01)),
}
UNARY = {**UNARY_ARITHMETIC, **UNARY_OF_FLOATS}


def numbers(dtype: str) -> np.ndarray:
    return np.array([1, 2, 3, 1, 0, 5]).astype(dtype)


def others(dtype: str) -> np.ndarray:
    return np.array([2, 2, 1, 3, 1, 2]).astype(dtype)


def converted(name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arrays as needle documents that NumPy would have to see them."""
    whole = [x.dtype.kind in "iub" for x in arrays]
    if (name in OF_FLOATS or name in UNARY_OF_FLOATS) and all(whole):
        return [x.astype(np.float64) for x in arrays]
    if (name in ARITHMETIC or name in UNARY_ARITHMETIC) and all(x.dtype == bool for x in arrays):
        return [x.astype(np.int64) for x in arrays]
    return arrays


def assert_like_numpy(name: str, function: Callable[..., Any], arrays: list[np.ndarray]) -> None:
    with np.errstate(all="ignore"):
        expected = function(*converted(name, arrays))
    y = getattr(ndl, name)(*map(Tensor, arrays))
    assert y.dtype == expected.dtype
    if expected.dtype == np.float16:
        with np.errstate(all="ignore"):
            wide = [x.astype(np.float32) for x in converted(name, arrays)]
            expected = function(*wide).astype(np.float16)
    assert_close(y, expected.astype(np.float64) if y.dtype.kind == "f" else expected, length=2)


@pytest.mark.parametrize("name", BINARY)
def test_two_dtypes_mix_as_in_numpy(name: str) -> None:
    for left, right in itertools.product(NUMPYS, NUMPYS):
        assert_like_numpy(name, BINARY[name], [numbers(left), others(right)])


@pytest.mark.parametrize("dtype", NUMPYS)
@pytest.mark.parametrize("name", UNARY)
def test_one_dtype_as_in_numpy(name: str, dtype: str) -> None:
    assert_like_numpy(name, UNARY[name], [numbers(dtype)])


SCALARS = [True, 2, 2.5]


@pytest.mark.parametrize("scalar", SCALARS, ids=str)
@pytest.mark.parametrize("name", BINARY)
def test_python_scalars_are_weak_as_in_numpy(name: str, scalar: Any) -> None:
    """float32 with 2.5 stays float32, int8 with 2 stays int8, int8 with 2.5 becomes float64."""
    for dtype in NUMPYS:
        x = numbers(dtype)
        kind = np.result_type(x, scalar)
        if kind.kind == "f" and x.dtype.kind != "f":
            kind = np.dtype(np.float64)
        for pair in ((x, scalar), (scalar, x)):
            tensors = [Tensor(each) if each is x else each for each in pair]
            widened = [each.astype(kind) if each is x else np.asarray(each, kind) for each in pair]
            with np.errstate(all="ignore"):
                expected = BINARY[name](*converted(name, widened))
            assert getattr(ndl, name)(*tensors).dtype == expected.dtype, f"{dtype}, {pair}"


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scalars_never_widen_floats(name: str, dtype: str) -> None:
    x = Tensor([1.0, 2.0, 3.0], dtype=dtype)
    function = getattr(ndl, name)
    kind = function(x, x).dtype
    for scalar in (True, 2, 2.5, np.float64(2.5), np.float32(2), np.int64(3)):
        assert function(x, scalar).dtype == kind
        assert function(scalar, x).dtype == kind
    assert (x * np.random.randn(1)).dtype == dtype
    assert (2.5 - x).dtype == dtype
    assert ndl.where(x > 1, x, 0.1).dtype == dtype
    assert ndl.clip(x, 0, 1.5).dtype == dtype


def test_bfloat16_mixes_with_what_ml_dtypes_lets_it() -> None:
    x = Tensor([1.0, 2.0], dtype="bfloat16")
    for dtype, expected in (
        ("bool", BFLOAT16),
        ("int8", BFLOAT16),
        ("uint8", BFLOAT16),
        ("float32", np.float32),
        ("float64", np.float64),
    ):
        assert (x + Tensor([1, 1], dtype=dtype)).dtype == expected
        assert (Tensor([1, 1], dtype=dtype) * x).dtype == expected
    for dtype in ("float16", "int16", "int32", "int64"):
        with pytest.raises(
            TypeError, match=f"^add: expected dtypes that can mix; received bfloat16 and {dtype}; "
        ):
            x + Tensor([1, 1], dtype=dtype)


REDUCED = {
    "summation": {"bool": "int64", **dict.fromkeys(INTEGERS, "int64")},
    "prod": {"bool": "int64", **dict.fromkeys(INTEGERS, "int64")},
    "max": {each: each for each in ("bool", *INTEGERS)},
    "min": {each: each for each in ("bool", *INTEGERS)},
    "mean": dict.fromkeys(("bool", *INTEGERS), "float64"),
    "var": dict.fromkeys(("bool", *INTEGERS), "float64"),
    "std": dict.fromkeys(("bool", *INTEGERS), "float64"),
    "norm": dict.fromkeys(("bool", *INTEGERS), "float64"),
    "logsumexp": dict.fromkeys(("bool", *INTEGERS), "float64"),
    "any": dict.fromkeys(("bool", *INTEGERS), "bool"),
    "all": dict.fromkeys(("bool", *INTEGERS), "bool"),
    "argmax": dict.fromkeys(("bool", *INTEGERS), "int64"),
    "argmin": dict.fromkeys(("bool", *INTEGERS), "int64"),
}
NUMPY_REDUCTIONS = {
    "summation": np.sum,
    "prod": np.prod,
    "norm": np.linalg.norm,
    "logsumexp": lambda x: np.log(np.exp(x.astype(float)).sum()),
}


@pytest.mark.parametrize("name", REDUCED)
def test_reductions_of_integers(name: str) -> None:
    reference = NUMPY_REDUCTIONS.get(name) or getattr(np, name)
    for dtype, expected in REDUCED[name].items():
        x = np.array([1, 2, 3, 1, 0, 5]).astype(dtype)
        y = getattr(ndl, name)(Tensor(x))
        assert y.dtype == expected
        assert_close(y, np.asarray(reference(x)).astype(expected), length=6)


@pytest.mark.parametrize("dtype", ["bool", *INTEGERS])
def test_integer_arrays_move_multiply_and_sort(dtype: str) -> None:
    a, b = (
        np.array([[1, 2, 0], [3, 1, 1]]).astype(dtype),
        np.array([[1, 0], [2, 1], [1, 1]]).astype(dtype),
    )
    x, y = Tensor(a), Tensor(b)
    for found, expected in (
        (x @ y, a @ b),
        (ndl.einsum("ij,jk->k", x, y), np.einsum("ij,jk->k", a, b)),
        (ndl.einsum("ij->i", x), np.einsum("ij->i", a)),
        (ndl.outer(x, y), np.outer(a, b)),
        (ndl.tensordot(x, y, 1), np.tensordot(a, b, 1)),
        (ndl.sort(x)[0], np.sort(a)),
        (ndl.argsort(x), np.argsort(a, kind="stable")),
        (ndl.cumsum(x, 1), np.cumsum(a, 1).astype(np.int64)),
        (ndl.pad(x, 1), np.pad(a, 1)),
        (ndl.tril(x), np.tril(a)),
        (ndl.concatenate([x, y.T]), np.concatenate([a, b.T])),
        (ndl.stack([x, x]), np.stack([a, a])),
        (ndl.where(x > 1, x, 0), np.where(a > 1, a, 0)),
        (ndl.take(x, [1, 0]), a[[1, 0]]),
        (x[:, ::-1], a[:, ::-1]),
        (
            ndl.scatter_add(y, 0, np.zeros((1, 2), int), y[:1]),
            b + np.array([[1, 0], [0, 0], [0, 0]], dtype) * b[:1],
        ),
    ):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found.numpy(), expected)
        assert not found.requires_grad


def test_lists_that_mix_dtypes_join_in_the_wider() -> None:
    pair = [Tensor([1.0], dtype="float32"), Tensor([2.0], dtype="float64")]
    assert ndl.concatenate(pair).dtype == ndl.stack(pair).dtype == "float64"
    assert ndl.concatenate([Tensor([1], dtype="int8"), Tensor([2], dtype="uint8")]).dtype == "int16"


# Casts


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("source", ["float16", "bfloat16", "float32", "float64"])
def test_floats_saturate_as_integers_and_nan_gives_zero(source: str, dtype: str) -> None:
    x = np.array([-np.inf, -1e30, -2.9, -0.9, -0.0, 0.9, 2.9, 126.5, 1e30, np.inf, np.nan])
    x = Tensor(x, dtype=source)
    bounds = np.iinfo(dtype)
    expected = []
    for each in x.numpy().astype(np.float64):
        whole = 0 if math.isnan(each) else each if math.isinf(each) else math.trunc(each)
        expected.append(int(min(max(whole, bounds.min), bounds.max)))
    assert x.astype(dtype).tolist() == expected
    assert x.cached_data.astype(dtype).tolist() == expected
    assert Tensor(x.numpy(), dtype=dtype).tolist() == expected


def test_the_largest_floats_below_two_to_the_63() -> None:
    edge = np.array([2.0**63, np.nextafter(2.0**63, 0), -(2.0**63), -(2.0**63) - 2048])
    expected = [2**63 - 1, 2**63 - 1024, -(2**63), -(2**63)]
    assert Tensor(edge).astype("int64").tolist() == expected


def test_floats_round_to_nearest_even_and_overflow_to_infinity() -> None:
    half = Tensor([65504.0, 65519.99, 65520.0, -1e6, 2.0**-25, 2.0**-24 * 1.5], dtype="float64")
    assert half.astype("float16").tolist() == [65504, 65504, math.inf, -math.inf, 0, 2.0**-23]
    brain = Tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, 3.395e38, 1e-45], dtype="float32")
    found = brain.astype("bfloat16").astype("float64").tolist()
    assert found == [1, 1 + 2.0**-6, math.inf, 2.0**127 * (2 - 2.0**-7), 0]


def test_what_becomes_bfloat16_is_float32_first() -> None:
    """Two roundings, as the docstring says: 2^24 + 2^16 + 1 ties to 2^24 in float32's neighbour."""
    for x in (
        Tensor([2.0**24 + 2**16 + 1], dtype="float64"),
        Tensor(np.array([2**24 + 2**16 + 1])),
    ):
        assert x.astype("bfloat16").astype("float32").astype("bfloat16").item() == 2.0**24
        assert x.astype("bfloat16").item() == 2.0**24


def test_numbers_to_bool() -> None:
    assert Tensor([0.0, -0.0, math.nan, 1e-45]).astype("bool").tolist() == [
        False,
        False,
        True,
        True,
    ]


def test_the_gradient_of_a_cast_comes_back_in_the_source_dtype() -> None:
    x = Tensor([1.5, 2.5], dtype="float64")
    (x.astype("float32") * Tensor([2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == "float64"
    assert x.grad.tolist() == [2, 3]


# What a Tensor takes its dtype from


@pytest.mark.parametrize("dtype", sorted(map(str, DTYPES)))
def test_every_dtype_by_its_names(dtype: str) -> None:
    kind = getattr(ndl, dtype)
    x = Tensor(np.zeros(2), dtype=dtype)
    assert x.dtype == dtype == kind == x.numpy().dtype
    assert Tensor(x.numpy()).dtype == kind
    assert Tensor(np.zeros(2), dtype=kind).dtype == kind
    assert x.requires_grad == ("float" in dtype)


def test_python_numbers_become_float32_and_bools_stay() -> None:
    assert Tensor(1).dtype == Tensor([1, 2]).dtype == Tensor([[1.5]]).dtype == "float32"
    assert Tensor([]).dtype == "float32"
    assert Tensor(True).dtype == Tensor([True, False]).dtype == "bool"
    assert Tensor([1, 2], dtype="int8").dtype == "int8"


def test_arrays_keep_their_dtype_in_lists_too() -> None:
    assert Tensor(np.float64(1)).dtype == "float64"
    assert Tensor(np.arange(3)).dtype == "int64"
    assert Tensor([np.float64(1), np.float64(2)]).dtype == "float64"
    assert Tensor([np.ones(2, np.float16)]).dtype == "float16"
    assert Tensor([Tensor([1.0], dtype="float64")]).dtype == "float64"
    assert Tensor(np.ones(2, ">f8")).dtype == "float64"
    assert Tensor(np.ones(2, ">f8")).numpy().dtype.isnative
