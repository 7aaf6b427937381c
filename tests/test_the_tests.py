"""Planted errors: every check must find a small one, or its silence means nothing."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checks import (
    LAZY_MODES,
    as_tuple,
    assert_close,
    assert_gradient,
    assert_infers,
    assert_lazy_is_eager,
    assert_same_bits,
    assert_second_order,
    tolerance,
)
from optable import ROWS, Row

import needle as ndl
from needle.array.spec import Spec
from needle.autograd import Tensor, TensorOp, is_lazy, primitive
from needle.dtype import FLOATS
from needle.ops.composite import Composite

X = np.linspace(0.5, 2.0, 12).reshape(3, 4)


@contextmanager
def must_fail(words: str | None = None) -> Any:
    with pytest.raises(AssertionError, match=words):
        yield


@primitive
class Cube(TensorOp):
    """y = x^3, with errors planted in the value, in the gradients, and in what infer says."""

    offset: float = 0.0  # of the value, relative
    slope: float = 1.0  # a factor on the first derivative
    curve: float = 1.0  # a factor on the second
    said: Any = None  # infer's dtype
    given: Any = None  # compute's
    axes: int = 2  # infer's number of axes

    def infer(self, x: Spec) -> Spec:
        return Spec(x.shape[: self.axes], self.said or x.dtype)

    def compute(self, x: np.ndarray) -> np.ndarray:
        return (x**3 * (1 + self.offset)).astype(self.given or x.dtype)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        return out_grad * Square(self.curve)(node.inputs[0]) * (3 * self.slope)


@primitive
class Square(TensorOp):
    """y = x^2, with a factor planted in its gradient."""

    factor: float

    def infer(self, x: Spec) -> Spec:
        return x

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x * x

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        return out_grad * node.inputs[0] * (2 * self.factor)


def cube(x: np.ndarray) -> np.ndarray:
    return x**3


def test_a_forward_off_by_a_billionth_is_found() -> None:
    assert_close(Cube()(Tensor(X)), cube(X))
    with must_fail("12 of 12 elements differ"):
        assert_close(Cube(offset=1e-9)(Tensor(X)), cube(X))
    with must_fail():
        assert_close(Cube(offset=3e-12)(Tensor(X)), cube(X))


def test_float32_may_be_off_by_four_units_and_no_more() -> None:
    x = X.astype(np.float32)
    unit = float(np.finfo(np.float32).eps)
    assert_close(x * np.float32(1 + 3 * unit), x.astype(np.float64))
    with must_fail():
        assert_close(x * np.float32(1 + 6 * unit), x.astype(np.float64))


def test_low_precision_may_round_once_and_no_more() -> None:
    for dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
        unit = float(ml_dtypes.finfo(dtype).eps)
        assert_close(X.astype(dtype), X)
        with must_fail():
            assert_close((X * (1 + 2 * unit)).astype(dtype), X)


def test_tolerances_grow_with_the_length_in_float32_alone() -> None:
    assert tolerance("float64", 1000) == tolerance("float64", 1) == 1e-12
    assert tolerance("float32", 1000) == 1000 * tolerance("float32", 1)
    assert tolerance("float32", 1) < 5e-7 < tolerance("float16", 1) < 1.1e-3


def test_one_bad_element_in_a_long_sum_is_found() -> None:
    x = np.ones(100)
    assert_close(x + 1e-13, x, length=100)
    x[17] += 1e-9
    with must_fail("1 of 100 elements differ, at .17,"):
        assert_close(x, np.ones(100), length=100)


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.nan, 0.0),
        (0.0, np.nan),
        (np.inf, 1e308),
        (np.inf, -np.inf),
        (1.0, np.inf),
        (5e-300, 6e-300),
        (np.zeros(3), np.zeros((3, 1))),
        (np.zeros((0, 2)), np.zeros((2, 0))),
    ],
    ids=str,
)
def test_special_values_and_shapes_are_compared(actual: Any, expected: Any) -> None:
    with must_fail():
        assert_close(np.asarray(actual), np.asarray(expected))


@pytest.mark.parametrize(
    ("actual", "expected"),
    [
        (np.float64(0.0), np.float64(-0.0)),
        (np.float64(1.0), np.nextafter(1.0, 2)),
        (np.float32(1.0), np.float64(1.0)),
        (np.zeros(2, np.float32), np.zeros((2, 1), np.float32)),
        (np.int64(1), np.int32(1)),
        (np.array(1, ml_dtypes.bfloat16), np.array(1.0078125, ml_dtypes.bfloat16)),
        (np.float64(np.nan), np.float64(1.0)),
    ],
    ids=str,
)
def test_one_different_bit_is_found(actual: Any, expected: Any) -> None:
    with must_fail():
        assert_same_bits(actual, expected)


def test_all_nans_are_one_value() -> None:
    assert_same_bits(np.array([np.nan]), -np.array([np.nan]))


@pytest.mark.parametrize("factor", [1.001, 0.999, 1 + 1e-5, -1.0])
def test_a_scaled_gradient_is_found(factor: float, rng: np.random.Generator) -> None:
    assert_gradient(Cube(), cube, [X], (0,), rng)
    with must_fail("backward"):
        assert_gradient(Cube(slope=factor), cube, [X], (0,), rng)


def test_a_gradient_that_is_wrong_in_one_element_is_found(rng: np.random.Generator) -> None:
    class Sum(TensorOp):
        def compute(self, x: np.ndarray) -> np.ndarray:
            return x.sum(1)

        def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
            spread = ndl.broadcast_to(out_grad.reshape(3, 1), (3, 4)).numpy().copy()
            spread[1, 2] *= 1.001
            return Tensor(spread)

    with must_fail("backward"):
        assert_gradient(Sum(), lambda x: x.sum(1), [X], (0,), rng)


def test_a_forgotten_gradient_is_found(rng: np.random.Generator) -> None:
    with must_fail("backward"):
        assert_gradient(lambda a, b: a * b.detach(), lambda a, b: a * b, [X, X + 1], (0, 1), rng)


def test_a_gradient_of_another_dtype_or_shape_is_found(rng: np.random.Generator) -> None:
    class Widened(TensorOp):
        def compute(self, x: np.ndarray) -> np.ndarray:
            return x * 2

        def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
            return self.change(out_grad * 2)

        change: Callable[[Tensor], Tensor]

    for change, words in (
        (lambda x: x.astype("float32"), "dtype"),
        (lambda x: x.reshape(4, 3), "shape"),
    ):
        op = Widened()
        op.change = change
        with must_fail(words):
            assert_gradient(op, lambda x: x * 2, [X], (0,), rng)


@pytest.mark.parametrize("factor", [1.001, 1 + 1e-5])
def test_a_scaled_second_derivative_is_found(factor: float, rng: np.random.Generator) -> None:
    assert_second_order(Cube(), [X], (0,), rng)
    with must_fail("backward"):
        assert_second_order(Cube(curve=factor), [X], (0,), rng)


def test_a_gradient_without_history_is_found(rng: np.random.Generator) -> None:
    class Detached(TensorOp):
        def compute(self, x: np.ndarray) -> np.ndarray:
            return x * x

        def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
            return out_grad * node.inputs[0].detach() * 2

    assert_gradient(Detached(), lambda x: x * x, [X], (0,), rng)
    with must_fail("backward"):
        assert_second_order(Detached(), [X], (0,), rng)


def test_a_wrong_dtype_or_shape_from_infer_is_found() -> None:
    assert_infers(Cube(), [X], (0,))
    with must_fail("Cube: infer said float32"):
        assert_infers(Cube(said=np.dtype(np.float32)), [X], (0,))
    with must_fail("Cube: infer said"):
        assert_infers(Cube(given=np.dtype(np.float16)), [X], (0,))
    with must_fail("Cube: infer said"):
        assert_infers(Cube(axes=1), [X], (0,))


@pytest.mark.parametrize("mode", LAZY_MODES)
def test_a_bit_that_differs_in_lazy_mode_is_found(mode: str) -> None:
    def off_in_lazy(x: Tensor) -> Tensor:
        return (x * 3) / 3 if is_lazy() else x * 1

    assert_lazy_is_eager(Cube(), [X], (0,), LAZY_MODES[mode])
    with must_fail("differ in their bits"):
        assert_lazy_is_eager(off_in_lazy, [X], (0,), LAZY_MODES[mode])


@pytest.mark.parametrize("mode", LAZY_MODES)
def test_a_gradient_that_differs_in_lazy_mode_is_found(mode: str) -> None:
    class Late(TensorOp):
        def compute(self, x: np.ndarray) -> np.ndarray:
            return x * 1

        def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
            return (out_grad * node.inputs[0]) / (3 * node.inputs[0]) * (3 + 1e-15 * is_lazy())

    with must_fail("differ in their bits"):
        assert_lazy_is_eager(Late(), [X], (0,), LAZY_MODES[mode])


def test_a_composite_with_a_wrong_rule_is_found(rng: np.random.Generator) -> None:
    @primitive
    class Halved(Composite):
        """y = x^2, with a rule of its own that forgets the 2."""

        def expand(self, x: Tensor) -> Tensor:
            return x * x

        def expand_gradient(self, out_grad: Tensor, x: Tensor) -> Tensor:
            return out_grad * x

    with must_fail("backward"):
        assert_gradient(Halved(), lambda x: x * x, [X], (0,), rng)


# The op table: no row's check may be empty


class Planted(TensorOp):
    """y = x, its gradient off by a thousandth."""

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        return out_grad * 1.001 + 0.001


STEPS = {"sign", "floor", "ceil", "round"}  # they pass no gradient on, planted or not


def finds(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def float_outputs(row: Row) -> list[np.ndarray]:
    outputs = map(np.asarray, as_tuple(row.expected(row.arrays())))
    return [y for y in outputs if y.dtype in FLOATS]


def test_every_row_finds_a_wrong_value() -> None:
    """Each float output, off by a billionth."""
    blind = []
    for row in ROWS:
        for y in float_outputs(row):
            if y.any() and not finds(
                lambda y=y, n=row.length: assert_close(y * (1 + 1e-9), y, None, n)
            ):
                blind.append(row.id)
    assert blind == []


def test_every_row_finds_a_wrong_gradient() -> None:
    """The gradient of each input in turn, off by a thousandth."""
    blind = []
    for row in ROWS:
        arrays = row.arrays()
        if not float_outputs(row) or row.name in STEPS:
            continue
        for place in row.places(arrays):
            if not arrays[place].size:
                continue

            def planted(*tensors: Tensor, row: Row = row, place: int = place) -> Any:
                inputs = list(tensors)
                inputs[place] = Planted()(inputs[place])
                return row.function(*inputs)

            check = (planted, row.reference, arrays, row.places(arrays), row.rng())
            if not finds(lambda check=check: assert_gradient(*check)):
                blind.append(f"{row.id}, input {place}")
    assert blind == []
