"""debug.compare: planted differences are found where they are, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import nn, ops, optim
from needle.autograd import Hooks, Tensor
from needle.compare import difference_of
from needle.compiler import lower
from needle.debug import compare

SETTINGS = ["eager", "lazy", "jit", ndl.cpu(), ndl.cpu_numpy()]


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Tensor(numbers, requires_grad=False)


class Squash(nn.Module):
    def __init__(self) -> None:
        self.scale = nn.Parameter(ndl.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return ndl.tanh(x * self.scale)  # squashed


def training() -> tuple[nn.Module, Any, Any]:
    np.random.seed(0)
    model = nn.Sequential(
        nn.Linear(7, 5), nn.BatchNorm1d(5), Squash(), nn.Dropout(0.3), nn.Linear(5, 3)
    )
    optimizer = optim.Adam(model.parameters())

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = ndl.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.reset_grad()
        return loss

    return model, optimizer, step


def batch() -> tuple[Tensor, Tensor]:
    return tensor(6, 7), Tensor(np.arange(6) % 3, dtype="int64")


@pytest.mark.parametrize("b", SETTINGS, ids=str)
@pytest.mark.parametrize("a", ["eager", "jit"])
def test_a_step_is_the_same_in_all_settings(a: Any, b: Any) -> None:
    model, optimizer, step = training()
    before = {name: x.numpy().copy() for name, x in model.state_dict().items()}
    state = str(np.random.get_state())
    found = compare(step, *batch(), a=a, b=b)
    assert found, str(found)
    assert found.same
    assert found.ops > 15
    assert str(found).startswith(f"compare(step, {a}, {b}): {found.ops} ops, all the same")
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), before[name])
    assert str(np.random.get_state()) == state
    assert optimizer.t.item() == 0
    assert all(p.grad is None for p in model.parameters())
    assert Hooks.create is None or Hooks.create.__module__ == "needle.debug"


def test_a_planted_fault_of_the_compiler_is_found(monkeypatch) -> None:
    """tanh off by 2^-20 in programs only: the first op, its module, line, and the size."""
    _, _, step = training()
    x, y = batch()
    compare(step, x, y)  # eager's kernels are there
    right = lower.ELEMENTWISE[ops.Tanh]
    monkeypatch.setitem(lower.ELEMENTWISE, ops.Tanh, lambda op, x: right(op, x) * (1.0 + 2.0**-20))
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    found = compare(step, x, y)
    assert not found
    assert found.first is not None
    assert found.first.op == "tanh"
    assert found.first.site is not None
    assert (found.first.site.line, found.first.site.path) == (line_of("# squashed"), "2")
    assert found.first.shape == (6, 5)
    assert found.first.count > 20
    assert 6 <= found.first.ulp <= 18
    np.testing.assert_allclose(found.first.relative, 2.0**-20, rtol=0.1)
    assert found.first.absolute == abs(found.first.a - found.first.b)
    assert "first to differ: tanh float32[6, 5] at" in str(found)
    assert "(in 2)" in str(found)
    assert compare(step, x, y, rtol=1e-2, atol=1e-2)


class Counting(ndl.TensorOp):
    """y = x plus how often it was computed in one place"""

    calls = 0

    def infer(self, x: Any) -> Any:
        return x

    def compute(self, x: np.ndarray) -> np.ndarray:
        Counting.calls += 1
        y = x.copy()
        y[1] += Counting.calls
        return y


class Remembering(nn.Module):
    """A loop whose body has an op that is not the same twice."""

    def forward(self, x: Tensor) -> Tensor:
        def body(carry: Tensor, element: Tensor) -> Any:
            carry = carry * 0.5 + Counting()(element)  # remembers
            return carry, ndl.tanh(carry)

        return ndl.scan(body, ndl.zeros(4), x)[1]


@pytest.mark.parametrize("b", ["lazy", "jit", ndl.cpu_numpy()], ids=str)
def test_an_op_in_a_scans_body_is_found(b: Any) -> None:
    model, x = nn.Sequential(Remembering()), tensor(5, 4)
    found = compare(lambda x: model(x).sum(), x, b=b)
    assert found.first is not None
    assert (found.first.op, found.first.place) == ("counting in turn 0 of 5", (1,))
    assert (found.first.site.line, found.first.site.path) == (line_of("# remembers"), "0")


@pytest.mark.parametrize("b", ["lazy", "jit", ndl.cpu_numpy()], ids=str)
def test_steps_of_recurrent_layers_are_the_same(b: Any) -> None:
    np.random.seed(0)
    model = nn.LSTM(3, 4)
    optimizer = optim.Adam(model.parameters())

    def step(x: Tensor) -> Tensor:
        loss = (model(x)[0] ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    counts = [compare(step, tensor(length, 2, 3), b=b) for length in (3, 4, 16, 40)]
    assert all(counts), counts
    turn = counts[1].ops - counts[0].ops
    assert turn > 20  # ops of a turn, forward and backward
    assert counts[2].ops == counts[3].ops == counts[0].ops + 13 * turn


def test_a_planted_fault_in_the_gradient_of_a_body_is_found(monkeypatch) -> None:
    """cos, of sin's gradient, is off in programs only."""
    right = lower.ELEMENTWISE[ops.Cos]
    weight, x = Tensor(np.ones(4, np.float32)), tensor(3, 4)

    def slope(x: Tensor) -> Any:
        def body(carry: Tensor, element: Tensor) -> Any:
            return ndl.sin(carry * weight + element), None  # a sine

        loss = ndl.scan(body, ndl.zeros(4), x)[0].sum()
        loss.backward()
        return weight.grad

    compare(slope, x)  # eager's kernels are there
    monkeypatch.setitem(lower.ELEMENTWISE, ops.Cos, lambda op, x: right(op, x) * (1.0 + 2.0**-20))
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    found = compare(slope, x)
    assert found.first is not None
    assert found.first.op == "cos in turn 2 of 3"
    assert f"in the gradient of sin computed at {__file__}:{line_of('# a sine')}" in str(found)


@pytest.mark.parametrize("b", ["lazy", "jit", ndl.cpu_numpy()], ids=str)
def test_an_op_that_remembers_is_found(b: Any) -> None:
    x = tensor(4)
    found = compare(lambda x: ndl.exp(Counting()(x * 2.0)) + 1.0, x, b=b)
    assert found.first is not None
    assert (found.first.op, found.first.place) == ("counting", (1,))
    assert found.first.count == 1
    assert found.drift is None or found.drift.op == "counting"


def test_devices_are_compared_on_equal_inputs() -> None:
    def f(x: Tensor) -> Tensor:
        return ndl.sin(ops.exp(x) * 1e4)  # wild

    x = tensor(40)
    found = compare(f, x, a=ndl.cpu(), b=ndl.cpu_numpy())
    assert found.same, str(found)
    assert found.drift is not None
    assert found.drift.op == "sin"
    assert "with the rounding of all ops before it" in str(found)
    strict = compare(f, x, a=ndl.cpu(), b=ndl.cpu_numpy(), rtol=0.0)
    assert not strict
    assert strict.first is not None
    assert strict.first.op == "exp"


@pytest.mark.parametrize("optimizer", [optim.SGD, optim.AdamW], ids=lambda x: x.__name__)
def test_every_op_of_a_step_is_paired(optimizer: Any) -> None:
    model = nn.Linear(7, 3)
    opt = optimizer(model.parameters(), lr=0.1)

    def step(x: Tensor, y: Tensor) -> None:
        ndl.cross_entropy(model(x), y).backward()
        opt.step()

    counts = {compare(step, *batch(), a=a, b=b).ops for a in SETTINGS[:3] for b in SETTINGS}
    assert len(counts) == 1


def test_random_numbers_writes_and_closures() -> None:
    total, weights = Tensor(0.0, requires_grad=False), [tensor(3)]

    def f(x: Tensor) -> Tensor:
        noise = ndl.rand(3)
        total.data = total.data + (x * noise).sum()
        weights[0].data = weights[0].data * 2.0
        return total.data + weights[0].sum()

    kept = weights[0].numpy().copy()
    for b in SETTINGS:
        assert compare(f, tensor(3, seed=1), b=b)
    assert total.item() == 0
    np.testing.assert_array_equal(weights[0].numpy(), kept)


def test_an_unknown_setting_is_refused() -> None:
    with pytest.raises(
        ValueError, match="compare: expected a setting of 'eager', 'lazy', 'jit' or"
    ):
        compare(lambda x: x, tensor(2), b="fast")


def test_an_error_in_the_function_leaves_nothing_behind() -> None:
    w = tensor(2)

    def f(x: Tensor) -> Tensor:
        w.data = x * 2.0
        return x @ w.reshape((1, 2))

    before, hooks = w.numpy().copy(), (Hooks.create, Hooks.node)
    with pytest.raises(ValueError, match="matmul"):
        compare(f, tensor(2))
    np.testing.assert_array_equal(w.numpy(), before)
    assert (Hooks.create, Hooks.node) == hooks


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_distances(dtype: str) -> None:
    as_array = lambda *x: Tensor(np.array(x), dtype=dtype).numpy()  # noqa: E731
    x = as_array(1.0, -1.0, np.nan, np.inf, 0.0)
    assert difference_of(x, x.copy(), 0, 0, 0) is None
    bits = x.copy().view(f"i{x.dtype.itemsize}")
    bits[0] += 3
    found = difference_of(x, bits.view(x.dtype), 0, 0, 0)
    assert found is not None
    assert (found[0], found[4], found[5]) == ((0,), 3, 1)
    found = difference_of(x, as_array(1.0, -1.0, np.nan, np.inf, -0.0), 0, 0, 0)
    assert found is not None
    assert (found[0], found[4]) == ((4,), 0)
    for other in (np.nan, -np.inf, 5.0):
        found = difference_of(x, as_array(1.0, -1.0, np.nan, other, 0.0), 64, 0.1, 0.1)
        assert found is not None
        assert found[0] == (3,)
    assert difference_of(x, as_array(1.05, -1.0, np.nan, np.inf, -0.0), 0, 0.1, 0) is None
    found = difference_of(np.array([1, 5]), np.array([1, 7]), 0, 0, 0)
    assert found is not None
    assert found[:4] == ((1,), 5, 7, 2)
