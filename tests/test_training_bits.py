"""Whole training runs of 50 steps give the same bits in eager and in jit: parameters, states of
optimizers, running statistics and losses."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits

import needle as ndl
from needle import nn, optim
from needle.autograd import Tensor
from needle.init.random import Source

STEPS = 50
Maker = Callable[[], tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]]


def workloads() -> Any:
    """The models that benchmarks/needle_steps.py times."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "needle_steps.py"
    spec = importlib.util.spec_from_file_location("needle_steps", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def batches(count: int, size: int, width: int, classes: int) -> list[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(0)
    return [
        (
            Tensor(rng.normal(size=(size, width)).astype(np.float32), requires_grad=False),
            Tensor(rng.integers(0, classes, size), requires_grad=False),
        )
        for _ in range(count)
    ]


def train(make: Maker, jit: bool, schedule: Any = None) -> dict[str, np.ndarray]:
    """All that a run leaves, by name."""
    np.random.seed(0)
    ndl.seed(3)
    model, optimizer, data = make()

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.reset_grad()
        return loss.detach()

    run = ndl.jit(step) if jit else step
    plan = None if schedule is None else schedule(optimizer)
    losses = []
    for number in range(STEPS):
        losses.append(run(*data[number % len(data)]).item())
        if plan is not None:
            plan.step()
    found = {name: x.numpy() for name, x in model.state_dict().items()}
    found |= {name: x.numpy() for name, x in optimizer.state_dict()["state"].items()}
    assert Source.generator is not None
    return {**found, "losses": np.array(losses), "random": Source.generator.state.numpy()}


def assert_same_run(make: Maker, schedule: Any = None) -> None:
    expected, found = train(make, False, schedule), train(make, True, schedule)
    assert np.isfinite(expected["losses"]).all()
    assert len(set(expected["losses"])) > STEPS // 2
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        try:
            assert_same_bits(found[name], x)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def perceptron(optimizer: Callable[..., Any]) -> Maker:
    def make() -> tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]:
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        return model, optimizer(model.parameters()), batches(2, 5, 6, 3)

    return make


def test_mlp_resnet_with_batch_norm_and_dropout() -> None:
    def make() -> tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]:
        block = workloads().residual_block(10)
        model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), block, nn.Linear(10, 4))
        # The last batch of an epoch is smaller: a second variant.
        data = [*batches(3, 9, 12, 4), *batches(1, 5, 12, 4)]
        return model, optim.Adam(model.parameters(), 0.01, weight_decay=1e-3), data

    assert_same_run(make)


def test_gpt() -> None:
    def make() -> tuple[nn.Module, Any, list[tuple[Tensor, Tensor]]]:
        model = workloads().GPT(11, 6, 16, 2, 2)
        rng = np.random.default_rng(1)
        tokens = [Tensor(rng.integers(0, 11, (3, 6)), requires_grad=False) for _ in range(2)]
        return (
            model,
            optim.AdamW(model.parameters(), 0.01),
            [
                (x, Tensor(np.roll(x.numpy(), -1, 1).reshape(-1), requires_grad=False))
                for x in tokens
            ],
        )

    assert_same_run(make)


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "sgd": lambda p: optim.SGD(p, 0.1),
    "momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: optim.Adam(p, 0.01),
    "adamw": lambda p: optim.AdamW(p, 0.01, weight_decay=0.1),
    "adagrad": lambda p: optim.Adagrad(p, 0.1),
    "rmsprop": lambda p: optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
    "adafactor": lambda p: optim.Adafactor(p),
    "lion": lambda p: optim.Lion(p, 0.001),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    assert_same_run(perceptron(OPTIMIZERS[name]))


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "constant": optim.ConstantLR,
    "cosine": lambda opt: optim.CosineLR(opt, STEPS),
    "one_cycle": lambda opt: optim.OneCycleLR(opt, 0.02, STEPS),
    "step": lambda opt: optim.StepLR(opt, 10),
    "exponential": lambda opt: optim.ExponentialLR(opt, 0.9),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules(name: str) -> None:
    assert_same_run(perceptron(OPTIMIZERS["adam"]), SCHEDULES[name])


def test_clipping_changes_no_bit_either() -> None:
    class Clipped(optim.SGD):
        def step(self) -> None:
            self.clip_grad_norm(0.1)
            super().step()

    assert_same_run(perceptron(lambda p: Clipped(p, 0.1)))
