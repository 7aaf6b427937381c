"""Random numbers: Philox against its published vectors, streams, moments, NumPy's global state."""

from __future__ import annotations

import math
import sys
import threading
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits

import needle as ndl
from needle import Tensor, init
from needle.dtype import as_dtype
from needle.ops.random import RandomUniform, philox

FLOATS = ["float64", "float32", "float16", "bfloat16"]


def words(*counter: int, key: tuple[int, int]) -> list[str]:
    """The block of a 128-bit counter, whose lower 64 bits `philox` takes as an array."""
    low = np.array([counter[0] | counter[1] << 32], np.uint64)
    with np.errstate(over="ignore"):
        found = philox(key[0] | key[1] << 32, low, counter[2] | counter[3] << 32)
    return [f"{int(word):08x}" for word in found[0]]


def test_philox_gives_the_published_words() -> None:
    """The known answers of Random123 (Salmon et al., 2011): of zeros, of ones, of digits of pi."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    assert words(0, 0, 0, 0, key=(0, 0)) == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert words(ones, ones, ones, ones, key=(ones, ones)) == [
        "408f276d",
        "41c83b0e",
        "a20bc7c6",
        "6d5451fd",
    ]
    assert words(*pi, key=(0xA4093822, 0x299F31D0)) == [
        "d16cfe09",
        "94fdcceb",
        "5001e420",
        "24126ea1",
    ]


def drawn(seed: int, *shape: int, dtype: str = "float32") -> Tensor:
    ndl.seed(seed)
    return ndl.rand(*shape, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_equal_seeds_give_equal_numbers(dtype: str) -> None:
    for function in (ndl.rand, ndl.randn):
        ndl.seed(7)
        first = [function(3, 4, dtype=dtype), function(5, dtype=dtype)]
        ndl.seed(7)
        for y in first:
            assert_same_bits(function(*y.shape, dtype=dtype), y)
        ndl.seed(8)
        assert function(3, 4, dtype=dtype).tolist() != first[0].tolist()


def test_numbers_depend_on_their_place_in_the_stream_alone() -> None:
    """Two draws are one draw of both, where blocks of four words are whole."""
    together = drawn(3, 16)
    ndl.seed(3)
    first, second = ndl.rand(8), ndl.rand(2, 4)
    assert together.tolist() == first.tolist() + second.reshape(8).tolist()
    ndl.seed(3)
    ndl.rand(5)  # two blocks
    assert ndl.rand(8).tolist() == second.reshape(8).tolist()


def test_the_state_is_a_tensor_that_advances_by_what_the_shape_says() -> None:
    ndl.seed(11)
    generator = init.generator()
    assert generator is not None
    assert generator.state.tolist() == [11, 0]
    assert repr(generator) == "Generator(seed=11, counter=0)"
    for size, dtype, blocks in (
        (1, "float32", 1),
        (4, "float32", 1),
        (5, "float16", 2),
        (4, "float64", 2),
        (0, "float32", 0),
    ):
        before = generator.state.tolist()[1]
        ndl.rand(size, dtype=dtype)
        assert generator.state.tolist() == [11, before + blocks]
    saved = generator.state.detach()
    expected = ndl.randn(6)
    generator.state.data = saved
    assert_same_bits(ndl.randn(6), expected)


def test_lazy_draws_are_eager_draws() -> None:
    ndl.seed(5)
    expected = [ndl.rand(6), ndl.randn(3), ndl.rand(2)]
    ndl.seed(5)
    with ndl.lazy():
        found = [ndl.rand(6), ndl.randn(3), ndl.rand(2)]
    for y, wanted in zip(reversed(found), reversed(expected), strict=True):
        assert_same_bits(y, wanted)


def test_every_device_draws_the_same() -> None:
    expected = drawn(2, 9)
    ndl.seed(2)
    y = ndl.rand(9, device=ndl.cpu_numpy())
    assert y.device is ndl.cpu_numpy()
    assert_same_bits(y, expected)


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), np.int64(5)])
def test_any_integer_of_64_bits_is_a_seed(seed: Any) -> None:
    assert drawn(seed, 4).tolist() != drawn(int(seed) ^ 1, 4).tolist()


def test_what_is_no_seed() -> None:
    for seed in ("a", 1.0, None, True):
        with pytest.raises(TypeError, match="^seed: expected an integer; received "):
            ndl.seed(seed)  # type: ignore[arg-type]
    for seed in (2**63, -(2**63) - 1):
        with pytest.raises(ValueError, match="^seed: expected an integer of 64 bits; received "):
            ndl.seed(seed)
    assert init.generator() is None


def test_the_op_says_what_a_state_is() -> None:
    op = RandomUniform((2,), as_dtype("float32"))
    for state in (Tensor([1.0, 2.0]), Tensor([1, 2, 3], dtype="int64")):
        with pytest.raises(
            ValueError,
            match=r"^random_uniform: expected a state \(key, counter\) of int64; received ",
        ):
            op(state)


# Distributions

N = 200_000


def moments(x: Tensor) -> list[float]:
    values = x.numpy().astype(np.float64).ravel()
    centred = values - values.mean()
    return [values.mean(), values.var(), (centred**3).mean(), (centred**4).mean()]


@pytest.mark.parametrize("source", ["numpy", "philox"])
@pytest.mark.parametrize("dtype", FLOATS)
def test_uniform_numbers(dtype: str, source: str) -> None:
    """Moments within five standard errors; never 1, though low precisions round."""
    if source == "philox":
        ndl.seed(0)
    x = ndl.rand(N, dtype=dtype)
    assert x.dtype == dtype
    values = x.numpy().astype(np.float64)
    assert values.min() >= 0
    assert values.max() < 1 or source == "numpy"
    step = {"bfloat16": 2.0**-8, "float16": 2.0**-11}.get(dtype, 0.0)
    mean, variance, third, fourth = moments(x)
    assert abs(mean - 0.5) < step + 5 * math.sqrt(1 / 12 / N)
    assert abs(variance - 1 / 12) < step + 5 * math.sqrt(1 / 180 / N)
    assert abs(third) < step + 5 * math.sqrt(1 / 448 / N)
    assert abs(fourth - 1 / 80) < step + 5 * math.sqrt(1 / 144 / 25 / N)
    counts = np.bincount((values * 16).astype(int).clip(0, 15), minlength=16)
    if source == "philox":
        assert abs(counts - N / 16).max() < 5 * math.sqrt(N / 16)


@pytest.mark.parametrize("dtype", FLOATS)
def test_normal_numbers(dtype: str) -> None:
    ndl.seed(1)
    x = ndl.randn(N, dtype=dtype)
    step = 4 * float(2.0**-8 if dtype == "bfloat16" else 2.0**-11 if dtype == "float16" else 0.0)
    mean, variance, third, fourth = moments(x)
    assert np.isfinite(x.numpy().astype(np.float64)).all()
    assert abs(mean) < 5 / math.sqrt(N)
    assert abs(variance - 1) < step * 0.1 + 5 * math.sqrt(2 / N)
    assert abs(third) < 5 * math.sqrt(15 / N)
    assert abs(fourth - 3) < step + 5 * math.sqrt(96 / N)
    inside = np.abs(x.numpy().astype(np.float64)) < 1
    assert abs(inside.mean() - math.erf(1 / math.sqrt(2))) < step + 5 * math.sqrt(0.22 / N)


def test_scaled_and_shifted_draws() -> None:
    ndl.seed(4)
    x = ndl.rand(1000, low=-3, high=5).numpy()
    assert -3 <= x.min() < -2.9
    assert 4.9 < x.max() < 5
    y = ndl.randn(N, mean=2.0, std=0.5).numpy()
    assert abs(y.mean() - 2) < 0.01
    assert abs(y.std() - 0.5) < 0.01


def test_randb_randint_and_permutation() -> None:
    for seeded in (False, True):
        if seeded:
            ndl.seed(0)
        b = init.randb(N, p=0.3)
        assert b.dtype == "bool"
        assert abs(b.numpy().mean() - 0.3) < 0.01
        assert init.randb(3, dtype="float32").dtype == "float32"
        i = ndl.randint(-2, 3, (N,))
        assert i.dtype == "int64"
        counts = np.bincount(i.numpy() + 2)
        assert len(counts) == 5
        assert abs(counts / N - 0.2).max() < 0.01
        assert ndl.randint(0, 5).shape == ()
        assert sorted(ndl.permutation(100).tolist()) == list(range(100))
        assert ndl.permutation(100).tolist() != list(range(100))
        assert ndl.permutation(0).tolist() == []


def test_neighbouring_seeds_are_uncorrelated() -> None:
    streams = np.stack([drawn(seed, 20_000).numpy() for seed in range(4)]).astype(np.float64)
    correlation = np.corrcoef(streams) - np.eye(4)
    assert abs(correlation).max() < 5 / math.sqrt(20_000)


def test_shapes_and_options() -> None:
    for seeded in (False, True):
        if seeded:
            ndl.seed(0)
        for shape in ((), (0, 3), (2, 0), (2, 3)):
            assert ndl.rand(*shape).shape == shape
            assert ndl.randn(*shape).shape == shape
        assert ndl.rand((2, 3)).shape == (2, 3)
        assert ndl.rand(2, requires_grad=True).requires_grad
        assert not ndl.randn(2).requires_grad
    with pytest.raises(ValueError, match=r"^rand: expected sizes of at least 0; received \(-1,\)$"):
        ndl.rand(-1)
    with pytest.raises(TypeError, match=r"^randn: expected a float dtype; received int64$"):
        ndl.randn(2, dtype="int64")
    with pytest.raises(ValueError, match=r"^randint: expected low < high; received 3 and 3$"):
        ndl.randint(3, 3)


# Before seed(): NumPy's global generator, in the course's order and form


def test_draws_before_seed_are_numpys() -> None:
    calls: list[tuple[Any, Any]] = [
        (lambda: ndl.rand(2, 3), lambda: np.random.rand(2, 3)),
        (lambda: ndl.rand(4, low=-1, high=2), lambda: np.random.rand(4) * 3 - 1),
        (lambda: ndl.randn(5), lambda: np.random.randn(5)),
        (lambda: ndl.randn(2, mean=1, std=3), lambda: np.random.randn(2) * 3 + 1),
        (lambda: init.randb(6, p=0.5), lambda: np.random.rand(6) <= 0.5),
        (
            lambda: init.kaiming_uniform(3, 4),
            lambda: np.random.rand(3, 4) * 2 * math.sqrt(2) - math.sqrt(2),
        ),
        (lambda: init.xavier_normal(3, 3), lambda: np.random.randn(3, 3) * math.sqrt(2 / 6)),
        (lambda: ndl.permutation(7), lambda: np.random.permutation(7)),
        (lambda: ndl.randint(0, 9, (3,)), lambda: np.random.randint(0, 9, (3,))),
    ]
    np.random.seed(3)
    found = [ours().numpy() for ours, _ in calls]
    np.random.seed(3)
    for y, (_, theirs) in zip(found, calls, strict=True):
        expected = theirs()
        np.testing.assert_allclose(y, expected.astype(y.dtype), rtol=1e-6, atol=1e-7)


def test_seeding_leaves_numpys_state_alone() -> None:
    np.random.seed(0)
    expected = np.random.rand(3)
    np.random.seed(0)
    ndl.seed(1)
    ndl.rand(5)
    ndl.randn(5)
    ndl.permutation(5)
    assert np.random.rand(3).tolist() == expected.tolist()


def test_threads_share_one_stream_without_losing_numbers() -> None:
    """No draw is handed out twice: the state moves once for each."""
    ndl.seed(0)
    found: list[list[float]] = [[] for _ in range(4)]

    def draw(place: int) -> None:
        for _ in range(50):
            found[place] += ndl.rand(4, dtype="float64").tolist()

    threads = [threading.Thread(target=draw, args=(place,)) for place in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    numbers = sum(found, [])
    assert len(set(numbers)) == len(numbers) == 800


# Initialisers made of them


def test_truncated_normal_stays_within_its_bounds() -> None:
    ndl.seed(0)
    x = init.truncated_normal(20_000, mean=1.0, std=0.5).numpy()
    assert 0 <= x.min()
    assert x.max() <= 2
    assert abs(x.mean() - 1) < 0.02
    with pytest.raises(ValueError, match="^truncated_normal: expected low < high"):
        init.truncated_normal(3, low=1.0, high=1.0)


@pytest.mark.parametrize("shape", [(4, 4), (6, 3), (3, 6), (2, 3, 4), (1, 5)])
def test_orthogonal_matrices_are_orthogonal(shape: tuple[int, ...]) -> None:
    ndl.seed(0)
    q = init.orthogonal(*shape, gain=2.0, dtype="float64").numpy().reshape(-1, shape[-1])
    product = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    np.testing.assert_allclose(product, 4 * np.eye(len(product)), atol=1e-12)
