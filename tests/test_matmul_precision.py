"""set_matmul_precision: bfloat16 dot products, on request."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle.compiler import contract
from needle.compiler.target import host, vector_bits

HAS_DOT = vector_bits() == 512 and "+avx512bf16" in host().features.split(",")
rng = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def medium() -> Iterator[None]:
    ndl.set_matmul_precision("medium")
    yield
    ndl.set_matmul_precision("highest")


def draw(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(ndl.bfloat16).astype(np.float64)


def bound(a: np.ndarray, b: np.ndarray) -> Any:
    """Of float32 sums of products, in whatever order: k ULP of the sum of magnitudes."""
    return a.shape[-1] * 2.0**-23 * (np.abs(a) @ np.abs(b)).max()


SIZES = [(9, 1, 9), (14, 2, 32), (15, 257, 33), (100, 784, 100), (300, 255, 520), (3, 40, 5)]


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ["nn", "tn", "nt", "tt"])
def test_products_of_rounded_operands(sizes: tuple[int, int, int], order: str) -> None:
    m, k, n = sizes
    a, b = draw(m, k), draw(k, n)
    x = ndl.Tensor(a.T.copy()).transpose() if order[0] == "t" else ndl.Tensor(a)
    y = ndl.Tensor(b.T.copy()).transpose() if order[1] == "t" else ndl.Tensor(b)
    found = (x @ y).numpy()
    few = min(m, n) <= 8
    left, right = (a, b) if few else (rounded(a), rounded(b))
    if few or HAS_DOT:
        assert np.abs(found - left.astype(np.float64) @ right).max() <= bound(left, right)
    jitted = ndl.jit(lambda x, y: x @ y)(x, y).numpy()
    assert (jitted == found).all()
    low = (x.astype("bfloat16") @ y.astype("bfloat16")).numpy().astype(np.float32)
    assert np.abs(low - rounded(a) @ rounded(b)).max() <= 2.0**-8 * np.abs(found).max() + 1e-6


@pytest.mark.skipif(not HAS_DOT, reason="the processor has no bfloat16 dot product")
def test_the_dot_product_is_used_and_rounds() -> None:
    a, b = draw(64, 64), draw(64, 64)
    low = (ndl.Tensor(a) @ ndl.Tensor(b)).numpy()
    ndl.set_matmul_precision("highest")
    high = (ndl.Tensor(a) @ ndl.Tensor(b)).numpy()
    assert 1e-4 < np.abs(low - high).max() < 0.2


def test_other_dtypes_are_untouched() -> None:
    a, b = draw(20, 30).astype(np.float64), draw(30, 20).astype(np.float64)
    low = (ndl.Tensor(a) @ ndl.Tensor(b)).numpy()
    ndl.set_matmul_precision("highest")
    assert (low == (ndl.Tensor(a) @ ndl.Tensor(b)).numpy()).all()


def test_gradients_have_forwards_precision() -> None:
    a, b, dy = draw(40, 50), draw(50, 60), draw(40, 60)
    x, y = ndl.Tensor(a), ndl.Tensor(b)
    z = x @ y
    ndl.set_matmul_precision("highest")
    z.backward(ndl.Tensor(dy))
    ndl.set_matmul_precision("medium")
    assert (x.grad.numpy() == (ndl.Tensor(dy) @ ndl.Tensor(b).transpose()).numpy()).all()
    assert (y.grad.numpy() == (ndl.Tensor(a).transpose() @ ndl.Tensor(dy)).numpy()).all()


def test_batches_and_vectors_follow() -> None:
    a, b = draw(2, 3, 20, 30), draw(30, 24)
    found = (ndl.Tensor(a) @ ndl.Tensor(b)).numpy()
    flat = (ndl.Tensor(a.reshape(-1, 30)) @ ndl.Tensor(b)).numpy()
    assert (found == flat.reshape(found.shape)).all()


def test_jit_compiles_a_variant_for_it() -> None:
    f = ndl.jit(lambda x: x @ x)
    x = ndl.Tensor(draw(32, 32), requires_grad=False)
    f(x)
    ndl.set_matmul_precision("highest")
    f(x)
    assert f.variants()[1] == "matmul precision: medium -> highest"


def test_reference_rounds_too() -> None:
    a, b = draw(16, 20), draw(20, 16)
    x, y = (ndl.Tensor(each, device=ndl.cpu_numpy()) for each in (a, b))
    assert np.abs((x @ y).numpy() - rounded(a) @ rounded(b)).max() <= bound(a, b)


def test_nan_and_infinity_pass_through() -> None:
    a, b = draw(16, 33), draw(33, 16)
    a[3, 32], a[5, 0] = np.nan, np.inf
    found = (ndl.Tensor(a) @ ndl.Tensor(b)).numpy()
    assert np.isnan(found[3]).all()
    assert not np.isfinite(found[5]).any()
    assert np.isfinite(np.delete(found, [3, 5], 0)).all()


def test_errors() -> None:
    assert ndl.get_matmul_precision() == "medium"
    with pytest.raises(ValueError, match="expected 'highest' or 'medium'; received 'high'"):
        ndl.set_matmul_precision("high")
    assert ndl.get_matmul_precision() == "medium"


def test_cores_are_told_apart() -> None:
    plain, dot = (contract.Core(np.dtype(np.float32), 512, dot) for dot in (False, True))
    assert plain.key != dot.key


def test_convolutions_of_rounded_operands() -> None:
    """Windows are rounded while they are packed: what bfloat16 has no bits for is lost."""
    x, w = rng.integers(-9, 9, (3, 7, 6, 10)) + 2.0**-9, rng.integers(-9, 9, (3, 3, 10, 20))

    def run(x: np.ndarray, w: np.ndarray) -> list[np.ndarray]:
        """y, dx and dw, for a gradient of ones."""
        inputs = [ndl.Tensor(x), ndl.Tensor(w)]
        y = ndl.ops.conv(*inputs)
        y.backward(ndl.init.ones_like(y))
        return [y.numpy(), *(each.grad.numpy() for each in inputs)]

    found = run(x.astype(np.float32), w.astype(np.float32))
    ndl.set_matmul_precision("highest")
    exact, full = run(rounded(x), w.astype(np.float64)), run(x, w.astype(np.float64))
    assert np.abs(exact[0] - full[0]).max() > 0.1
    for a, b in zip(found, exact if HAS_DOT else full, strict=True):
        assert np.abs(a - b).max() <= 1e-3
