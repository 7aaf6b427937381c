"""needle.init: bounds, deviations, fans, orthogonality, and the draws of the course."""

from __future__ import annotations

import math

import numpy as np
import pytest

import needle as ndl
from needle import init

SIZE = (400, 300)


@pytest.mark.parametrize("seeded", [False, True], ids=["numpy", "philox"])
@pytest.mark.parametrize(
    ("draw", "bound"),
    [
        (init.kaiming_uniform, math.sqrt(2) * math.sqrt(3 / 400)),
        (init.xavier_uniform, math.sqrt(6 / 700)),
        (init.lecun_uniform, math.sqrt(3 / 400)),
    ],
    ids=["kaiming", "xavier", "lecun"],
)
def test_uniform_initialisers_fill_their_interval(draw, bound: float, seeded: bool) -> None:
    if seeded:
        ndl.seed(1)
    x = draw(*SIZE)
    assert x.shape == SIZE
    assert x.dtype == "float32"
    assert not x.requires_grad
    assert np.abs(x.numpy()).max() <= bound
    np.testing.assert_allclose(x.numpy().std(), bound / math.sqrt(3), rtol=0.01)
    assert abs(x.numpy().mean()) < 4 * bound / math.sqrt(3 * x.size)


@pytest.mark.parametrize("seeded", [False, True], ids=["numpy", "philox"])
@pytest.mark.parametrize(
    ("draw", "std"),
    [
        (init.kaiming_normal, math.sqrt(2 / 400)),
        (init.xavier_normal, math.sqrt(2 / 700)),
        (init.lecun_normal, math.sqrt(1 / 400)),
    ],
    ids=["kaiming", "xavier", "lecun"],
)
def test_normal_initialisers_have_their_deviation(draw, std: float, seeded: bool) -> None:
    if seeded:
        ndl.seed(1)
    x = draw(*SIZE).numpy()
    np.testing.assert_allclose(x.std(), std, rtol=0.01)
    assert abs(x.mean()) < 4 * std / math.sqrt(x.size)
    share = (np.abs(x) < std).mean()
    assert abs(share - math.erf(math.sqrt(0.5))) < 0.01


def test_shape_and_fans_are_separate() -> None:
    x = init.kaiming_uniform(27, 64, shape=(3, 3, 3, 64), dtype="float64", requires_grad=True)
    assert x.shape == (3, 3, 3, 64)
    assert x.dtype == "float64"
    assert x.requires_grad
    assert np.abs(x.numpy()).max() <= math.sqrt(2) * math.sqrt(3 / 27)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((20, 30), (20, 30)),
        ((3, 3, 16, 32), (144, 288)),
        ((5, 4, 2), (20, 10)),
        ((7,), (7, 1)),
        (7, (7, 1)),
    ],
)
def test_fans_of_any_shape(shape, expected: tuple[int, int]) -> None:
    assert init.fans(shape) == expected


def test_orthogonal_rows_or_columns() -> None:
    for shape in [(8, 5), (5, 8), (2, 3, 4)]:
        q = init.orthogonal(*shape, gain=2.0, dtype="float64").numpy().reshape(-1, shape[-1])
        product = q.T @ q if q.shape[0] >= q.shape[1] else q @ q.T
        np.testing.assert_allclose(product, 4 * np.eye(min(q.shape)), atol=1e-12)


def test_truncated_normal_stays_inside() -> None:
    x = init.truncated_normal(20000, mean=1.0, std=0.5, low=-1.0, high=2.0, dtype="float64").numpy()
    assert x.min() >= 0.5
    assert x.max() <= 2.0
    assert 0.5 < x.mean() < 1.3


def test_gains() -> None:
    gains = {"linear": 1, "sigmoid": 1, "relu": math.sqrt(2), "tanh": 5 / 3, "selu": 3 / 4}
    for name, gain in gains.items():
        assert init.calculate_gain(name) == pytest.approx(gain)
    assert init.calculate_gain("leaky_relu", 0.2) == pytest.approx(math.sqrt(2 / 1.04))
    with pytest.raises(ValueError, match="calculate_gain: expected one of .*; received 'swish'"):
        init.calculate_gain("swish")


def test_draws_are_numpys_until_seed_is_called() -> None:
    np.random.seed(3)
    found = [init.rand(2, 3, low=-1, high=2), init.randn(4, mean=1, std=2), init.randb(5, p=0.3)]
    np.random.seed(3)
    expected = [
        np.random.rand(2, 3).astype("float32") * np.float32(3) - 1,
        np.random.randn(4).astype("float32") * 2 + 1,
        np.random.rand(5) <= 0.3,
    ]
    for x, y in zip(found, expected, strict=True):
        np.testing.assert_allclose(x.numpy(), y, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init.kaiming_uniform(0, 3), "kaiming_uniform: expected fans above 0"),
        (lambda: init.rand(-1), "rand: expected sizes of at least 0"),
        (lambda: init.orthogonal(3), "orthogonal: expected at least 2 axes"),
        (lambda: init.truncated_normal(3, low=1, high=0), "truncated_normal: expected low < high"),
        (lambda: ndl.randint(3, 3), "randint: expected low < high"),
        (lambda: init.fans(()), "fans: expected a shape with axes"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_generator_is_advanced_by_shape_alone() -> None:
    ndl.seed(5)
    ndl.rand(10)
    first = init.generator().state.tolist()
    ndl.seed(5)
    ndl.rand(2, 5, low=3, high=4)
    assert init.generator().state.tolist() == first == [5, 3]
    assert repr(init.generator()) == "Generator(seed=5, counter=3)"
