"""The promise: on cpu() a value's bits depend on the program and its inputs alone.

Random programs give equal bits in eager, lazy and jit, with any number of threads, with each pass
of the compiler switched off, and with vectors of any width.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from programs import Maker, Seeded

import needle as ndl
from needle import compiler
from needle.autograd import Tensor
from needle.compiler import runtime
from needle.dtype import FLOATS

PROGRAMS = int(os.environ.get("FUZZ", "40"))
PASSES = ("simplify", "fuse", "reuse")


class Drawn:
    """Decisions of hypothesis, which it shrinks."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def below(self, n: int) -> int:
        return int(self.data.draw(st.integers(0, n - 1)))


@pytest.fixture
def threads() -> Iterator[None]:
    """The number of threads as it was, after the test."""
    before = runtime.get_num_threads()
    yield
    runtime.set_num_threads(before)


def tensors(arrays: list[np.ndarray]) -> list[Tensor]:
    return [Tensor(x) for x in arrays]


def run_eager(function: Callable[..., Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [y.numpy() for y in function(*tensors(arrays))]


def run_lazy(function: Callable[..., Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    with ndl.lazy():
        found = function(*tensors(arrays))
    return [y.numpy() for y in found]


def run_jit(function: Callable[..., Any], arrays: list[np.ndarray]) -> list[np.ndarray]:
    return [y.numpy() for y in ndl.jit(function)(*tensors(arrays))]


def assert_equal(found: list[np.ndarray], expected: list[np.ndarray], mode: str) -> None:
    assert len(found) == len(expected), mode
    for place, (x, y) in enumerate(zip(found, expected, strict=True)):
        try:
            assert_same_bits(x, y)
        except AssertionError as error:
            raise AssertionError(f"{mode}, result {place}: {error}") from None


@pytest.mark.usefixtures("threads")
@settings(
    max_examples=PROGRAMS,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
@given(st.data())
def test_random_programs(data: Any) -> None:
    arrays, function = Maker(Drawn(data)).program()
    runtime.set_num_threads(2)
    expected = run_eager(function, arrays)
    assert_equal(run_lazy(function, arrays), expected, "lazy")
    jitted = ndl.jit(function)
    for count in (1, 2, 3, 8):
        runtime.set_num_threads(count)
        found = [y.numpy() for y in jitted(*tensors(arrays))]
        assert_equal(found, expected, f"jit, {count} threads")
    for name in PASSES:
        compiler.OFF.add(name)
        try:
            assert_equal(run_jit(function, arrays), expected, f"jit without {name}")
        finally:
            compiler.OFF.clear()


def test_a_padded_gather_reads_no_index_beyond_the_last() -> None:
    x, index = np.arange(6.0).reshape(3, 2), np.array([2, 0])

    def function(x: Tensor, index: Tensor) -> list[Tensor]:
        return [ndl.pad(ndl.take(x, index), ((3, 5), (0, 40)))]

    expected = np.pad(x[index], ((3, 5), (0, 40)))
    assert_equal(run_eager(function, [x, index]), [expected], "eager")
    assert_equal(run_jit(function, [x, index]), [expected], "jit")


def digest(array: np.ndarray) -> str:
    """The bits of an array, all NaNs alike."""
    x = np.ascontiguousarray(array)
    if x.dtype in FLOATS:
        x = np.where(np.isnan(x), x.dtype.type(np.nan), x)
    return hashlib.sha256(repr((x.shape, str(x.dtype))).encode() + x.tobytes()).hexdigest()


def digests(count: int) -> list[str]:
    """What random programs give, by seed."""
    found = []
    for seed in range(count):
        arrays, function = Maker(Seeded(seed)).program()
        results = run_jit(function, arrays)
        found.append(" ".join(map(digest, results)))
    return found


@pytest.mark.parametrize("bits", [128, 256])
def test_vector_width(bits: int) -> None:
    count = max(PROGRAMS // 2, 1)
    environment = {**os.environ, "NEEDLE_VECTOR_BITS": str(bits)}
    code = f"from test_same_bits import digests; print('\\n'.join(digests({count})))"
    folder = Path(__file__).resolve().parent
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    expected = digests(count)
    found = run.stdout.splitlines()
    assert len(found) == count
    differ = [seed for seed in range(count) if found[seed] != expected[seed]]
    assert not differ, f"programs of seeds {differ} differ at {bits} bits"
