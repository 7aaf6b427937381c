"""Sums that contractions add up by the way: the same bits, and no second pass over memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits

import needle as ndl
from needle import nn, ops, optim
from needle.array.spec import Spec
from needle.autograd import Tensor
from needle.compiler import compile as passes
from needle.compiler import graph, interpret, share
from needle.compiler.loops import Contraction, Nest
from needle.ops.composite import placeholder, tracing

rng = np.random.default_rng(0)
Function = Callable[..., Sequence[Tensor]]


@pytest.fixture(autouse=True)
def of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(share, "MUCH", 0)


def draw(*shape: int, dtype: str = "float32") -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def lowered(function: Function, arrays: Sequence[np.ndarray]) -> list[Any]:
    """The nests of a function's program."""
    with tracing():
        xs = [placeholder(Spec(x.shape, x.dtype), True) for x in arrays]
        found = passes.lower(graph.trace(xs, list(function(*xs))))
    return [nest for kernel in found.schedule.kernels for nest in kernel]


def sharing(function: Function, arrays: Sequence[np.ndarray]) -> int:
    """How many contractions add up terms."""
    found = lowered(function, arrays)
    return sum(isinstance(each, Contraction) and each.sums is not None for each in found)


def check(function: Function, arrays: Sequence[np.ndarray]) -> None:
    """jit's bits are eager's."""
    expected = [y.numpy() for y in function(*map(Tensor, arrays))]
    for x, y in zip(ndl.jit(function)(*map(Tensor, arrays)), expected, strict=True):
        assert_same_bits(x.numpy(), y)


def gradients(x: Tensor, dy: Tensor) -> list[Tensor]:
    """Of a linear layer's weight and bias."""
    return [ops.transpose(x) @ dy, ops.summation(dy, 0)]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 100, 256, 300, 512, 768, 800, 2048])
@pytest.mark.parametrize("width", [33, 1040])
def test_gradients_of_a_layer(rows: int, width: int, dtype: str) -> None:
    """Of one segment and of several, whole and not, in parts or not; float64 by NumPy too."""
    arrays = draw(rows, 20, dtype=dtype), draw(rows, width, dtype=dtype)
    check(gradients, arrays)
    found = ndl.jit(gradients)(*map(Tensor, arrays))[1].numpy()
    near = 1e-4 if dtype == "float32" else 1e-11
    np.testing.assert_allclose(found, arrays[1].sum(0, "float64"), near, near)
    split = rows % 256 and rows * width >= 1 << 16 and width < 1024  # in padded parts
    assert sharing(gradients, arrays) == (rows > 1 and not split)


def test_what_reads_a_sum_reads_the_segments() -> None:
    """An update beside the sum; and no nest goes through the terms again."""

    def function(x: Tensor, dy: Tensor, b: Tensor) -> list[Tensor]:
        dw, db = gradients(x, dy)
        return [dw, b - 0.1 * db, db * db]

    for rows in (200, 600):
        arrays = draw(rows, 20), draw(rows, 40), draw(40)
        check(function, arrays)
        nests = lowered(function, arrays)
        long = [each for each in nests if isinstance(each, Nest) and each.inner == rows]
        assert sharing(function, arrays) == 1
        assert not long


def test_a_sum_that_a_product_waits_for_stays() -> None:
    def function(x: Tensor, w: Tensor) -> list[Tensor]:
        return [x @ w + ops.summation(w, 0)]

    arrays = draw(20, 300), draw(300, 40)
    check(function, arrays)
    assert sharing(function, arrays) == 0


def test_other_sums_stay() -> None:
    """Of what is not the operand alone, over other axes, or beside something that is not added."""

    def function(x: Tensor, dy: Tensor) -> list[Tensor]:
        return [
            ops.transpose(x) @ dy,
            ops.summation(dy * dy, 0),
            ops.summation(dy, 1),
            ops.summation(dy[1:], 0),
            ops.max(dy, 0),
        ]

    def shifted(x: Tensor, dy: Tensor) -> list[Tensor]:
        return [ops.transpose(x[1:]) @ dy[1:], ops.summation(dy[:-1], 0)]

    def stored(x: Tensor, dy: Tensor) -> list[Tensor]:
        db = ops.summation(dy, 0)
        return [ops.transpose(x) @ dy, dy - db.broadcast_to(dy.shape)]

    arrays = draw(300, 20), draw(300, 40)
    for each in (function, shifted, stored):
        check(each, arrays)
        assert sharing(each, arrays) == 0


def test_the_interpreter_agrees() -> None:
    """A contraction with sums means what the two nests meant."""
    arrays = draw(300, 20), draw(300, 40)
    memory: dict[Any, np.ndarray] = {}
    nests = lowered(gradients, arrays)
    for nest in nests:
        for buffer in nest.reads() | nest.writes():
            number = getattr(buffer.source, "number", None)
            known = None if number is None or buffer in nest.writes() else arrays[number].ravel()
            if buffer not in memory:
                memory[buffer] = np.zeros(buffer.size, buffer.dtype) if known is None else known
        interpret.run(nest, memory)
    sums = [each.writes() for each in nests if isinstance(each, Nest)]
    (db,) = sums[-1]
    assert_same_bits(memory[db], gradients(*map(Tensor, arrays))[1].numpy())


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam], ids=["SGD", "Adam"])
def test_training(make: Any) -> None:
    """Steps in eager and in jit, with clipping, of layers wide and narrow."""

    def train(jitted: bool) -> list[np.ndarray]:
        ndl.seed(0)
        model = nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 20), nn.Linear(20, 12))
        optimizer = make(model.parameters(), lr=0.01)

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss = nn.SoftmaxLoss()(model(x), y)
            loss.backward()
            optimizer.clip_grad_norm(1.0)
            optimizer.step()
            optimizer.reset_grad()
            return loss.detach()

        run = ndl.jit(step) if jitted else step
        data = np.random.default_rng(1)
        for _ in range(3):
            x = data.standard_normal((600, 30)).astype("float32")
            run(Tensor(x), Tensor(data.integers(0, 12, 600)))
        return [p.numpy() for p in model.parameters()]

    for x, y in zip(train(True), train(False), strict=True):
        assert_same_bits(x, y)
