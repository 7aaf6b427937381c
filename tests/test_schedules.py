"""Learning rate schedules against their formulas and PyTorch's; their states and errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import optim

BASES = [0.1, 0.02]
Make = Callable[[Any], optim.Schedule]


def make_optimizer(bases: list[float] | None = None) -> optim.SGD:
    """An optimizer with a group for each learning rate."""
    bases = BASES if bases is None else bases
    return optim.SGD([{"params": [ndl.Tensor([1.0])], "lr": lr} for lr in bases])


def rates(opt: optim.Optimizer) -> list[float]:
    return [group.lr for group in opt.param_groups]


def walk(make: Make, steps: int, metrics: Any = None) -> list[list[float]]:
    """The learning rates when a schedule is made and after each of its steps."""
    opt = make_optimizer()
    schedule = make(opt)
    found = [rates(opt)]
    for n in range(steps):
        schedule.step(*([] if metrics is None else [metrics[n]]))
        found.append(rates(opt))
    return found


def cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(share, 1)))


FORMULAS: list[tuple[Make, Callable[[float, int], float]]] = [
    (optim.ConstantLR, lambda base, n: base),
    (lambda opt: optim.StepLR(opt, 3), lambda base, n: base * 0.1 ** (n // 3)),
    (lambda opt: optim.StepLR(opt, step_size=1, gamma=2), lambda base, n: base * 2**n),
    (lambda opt: optim.ExponentialLR(opt, 0.9), lambda base, n: base * 0.9**n),
    (lambda opt: optim.CosineLR(opt, 8), lambda base, n: cosine(base, 0, n / 8)),
    (
        lambda opt: optim.CosineLR(opt, total_steps=10, warmup_steps=4, min_lr=0.01),
        lambda base, n: base * (n + 1) / 5 if n < 4 else cosine(base, 0.01, (n - 4) / 6),
    ),
    (
        lambda opt: optim.OneCycleLR(opt, 0.5, 10, pct_start=0.5),
        lambda base, n: cosine(0.02, 0.5, n / 4) if n < 4 else cosine(0.5, 2e-6, (n - 4) / 5),
    ),
    (
        lambda opt: optim.OneCycleLR(opt, 0.5, 10, 0.3, "linear", div_factor=5, final_div_factor=2),
        lambda base, n: 0.1 + 0.2 * n if n < 2 else 0.5 - 0.45 * min((n - 2) / 7, 1),
    ),
    (lambda opt: optim.OneCycleLR(opt, 0.5, 1), lambda base, n: 0.5 if n == 0 else 2e-6),
    (
        lambda opt: optim.OneCycleLR(opt, 0.5, 4, pct_start=0),
        lambda base, n: cosine(0.5, 2e-6, n / 3),
    ),
]


@pytest.mark.parametrize(("make", "formula"), FORMULAS)
def test_learning_rates_follow_their_formulas(make, formula):
    found = walk(make, 14)
    expected = [[formula(base, n) for base in BASES] for n in range(15)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def walk_in_pytorch(
    torch: ModuleType, name: str, steps: int, metrics: Any = None, **options: Any
) -> Any:
    opt = torch.optim.SGD([{"params": [torch.ones(1)], "lr": lr} for lr in BASES])
    schedule = getattr(torch.optim.lr_scheduler, name)(opt, **options)
    found = [[group["lr"] for group in opt.param_groups]]
    for n in range(steps):
        opt.step()
        schedule.step(*([] if metrics is None else [metrics[n]]))
        found.append([group["lr"] for group in opt.param_groups])
    return found


@pytest.mark.parametrize(
    ("make", "name", "steps", "options"),
    [
        (lambda opt: optim.ConstantLR(opt), "ConstantLR", 9, {"factor": 1.0}),
        (lambda opt: optim.StepLR(opt, 4, 0.5), "StepLR", 13, {"step_size": 4, "gamma": 0.5}),
        (lambda opt: optim.ExponentialLR(opt, 0.75), "ExponentialLR", 13, {"gamma": 0.75}),
        (
            lambda opt: optim.CosineLR(opt, 12, min_lr=0.001),
            "CosineAnnealingLR",
            12,
            {"T_max": 12, "eta_min": 0.001},
        ),
        (
            lambda opt: optim.OneCycleLR(opt, 0.5, 20),
            "OneCycleLR",
            19,
            {"max_lr": 0.5, "total_steps": 20, "cycle_momentum": False},
        ),
        (
            lambda opt: optim.OneCycleLR(opt, 0.5, 20, 0.4, "linear", 10, 100),
            "OneCycleLR",
            19,
            {
                "max_lr": 0.5,
                "total_steps": 20,
                "pct_start": 0.4,
                "anneal_strategy": "linear",
                "div_factor": 10,
                "final_div_factor": 100,
                "cycle_momentum": False,
            },
        ),
    ],
)
def test_learning_rates_are_those_of_pytorch(torch, make, name, steps, options):
    expected = walk_in_pytorch(torch, name, steps, **options)
    np.testing.assert_allclose(walk(make, steps), expected, rtol=1e-12)


PLATEAUS: list[dict[str, Any]] = [
    {"patience": 2},
    {"patience": 0, "factor": 0.5, "threshold": 0.1},
    {"patience": 1, "cooldown": 3, "factor": 0.3},
    {"mode": "max", "patience": 1, "factor": 0.5, "min_lr": 0.015},
]


@pytest.mark.parametrize("options", PLATEAUS)
def test_plateaus_are_those_of_pytorch(torch, options):
    metrics = np.abs(np.cumsum(np.random.default_rng(3).normal(size=60))) + 1
    metrics[[7, 8, 30]] = math.nan
    found = walk(lambda opt: optim.ReduceLROnPlateau(opt, **options), 60, metrics)
    steps = {"steps": 60, "metrics": metrics, "eps": 0.0}
    expected = walk_in_pytorch(torch, "ReduceLROnPlateau", **steps, **options)
    assert len({tuple(each) for each in found}) > 2
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_a_plateau_is_reduced_after_patience_and_not_in_cooldown():
    opt = make_optimizer([1.0])
    schedule = optim.ReduceLROnPlateau(opt, factor=0.5, patience=1, cooldown=2, min_lr=0.2)
    found = []
    for metric in [3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]:
        schedule.step(ndl.Tensor([metric]))
        found.append(opt.lr)
    assert found == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.2]


def test_an_improvement_of_a_negative_metric_passes_the_threshold():
    """-1 after -1.05 is none, though it is below -1.05 * (1 - 0.1)."""
    opt = make_optimizer([1.0])
    schedule = optim.ReduceLROnPlateau(opt, patience=0, threshold=0.1)
    for metric, lr in [(-1.05, 1.0), (-1.0, 0.1), (-1.2, 0.1), (-1.25, 0.01)]:
        schedule.step(metric)
        assert opt.lr == pytest.approx(lr)
    assert schedule.best == -1.2


def test_min_lr_never_raises_a_learning_rate():
    opt = make_optimizer([0.1])
    schedule = optim.ReduceLROnPlateau(opt, patience=0, min_lr=0.5)
    schedule.step(1.0)
    schedule.step(1.0)
    assert opt.lr == 0.1


def test_an_optimizer_steps_with_the_scheduled_rate():
    w = ndl.Tensor(np.array([0.0]))
    opt = optim.SGD([w], lr=1.0)
    schedule = optim.ExponentialLR(opt, 0.5)
    for _ in range(3):
        w.grad = ndl.Tensor(np.array([-1.0]))
        opt.step()
        schedule.step()
    assert w.tolist() == [1.75]


# States

KINDS: list[tuple[Make, bool]] = [
    *((make, False) for make, _ in FORMULAS),
    *((lambda opt, o=o: optim.ReduceLROnPlateau(opt, **o), True) for o in PLATEAUS),
]


@pytest.mark.parametrize(("make", "metric"), KINDS)
@pytest.mark.parametrize("cut", [0, 5])
def test_a_schedule_resumes(make, metric, cut):
    """Through JSON, on an optimizer whose learning rates were others."""
    values = [[float(n % 4)] if metric else [] for n in range(12)]
    opt = make_optimizer()
    schedule = make(opt)
    for value in values[:cut]:
        schedule.step(*value)
    saved, at_cut = json.dumps(schedule.state_dict(), allow_nan=False), rates(opt)
    expected = []
    for value in values[cut:]:
        schedule.step(*value)
        expected.append(rates(opt))

    other = make_optimizer([7.0, 8.0])
    again = make(other)
    again.step(*values[0])
    again.load_state_dict(json.loads(saved))
    assert rates(other) == at_cut
    found = []
    for value in values[cut:]:
        again.step(*value)
        found.append(rates(other))
    assert found == expected


def test_a_saved_state_keeps_its_values():
    schedule = optim.StepLR(make_optimizer(), 1)
    saved = schedule.state_dict()
    schedule.bases[0] = 5.0
    schedule.step()
    assert saved == {"schedule": "StepLR", "lrs": BASES, "count": 0, "bases": BASES}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "CosineLR"}, "schedule: 'CosineLR' for 'StepLR'"),
        ({"count": "3"}, "count: '3' for a number or None"),
        ({"lrs": [0.1]}, "lrs.1: nothing for a number or None"),
        ({"bases": [0.1, math.nan]}, "bases.1: nan for a number or None"),
        ({"lrs": [0.1, -1.0]}, "expected lr to be a number of at least 0; received -1.0"),
        ({"best": 1.0}, "best: a number or None for nothing"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_whole(change, message):
    opt = make_optimizer()
    schedule = optim.StepLR(opt, 2)
    kept = schedule.state_dict()
    with pytest.raises(ValueError, match=f"^StepLR.load_state_dict: .*{message}"):
        schedule.load_state_dict({**kept, "count": 9, "lrs": [9.0, 9.0], **change})
    assert schedule.state_dict() == kept
    assert rates(opt) == BASES


# Errors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda opt: optim.StepLR(opt, 0),
            "StepLR: expected step_size .* of at least 1; received 0",
        ),
        (lambda opt: optim.StepLR(opt, 2.5), "StepLR: expected step_size to be an integer .* 2.5"),
        (lambda opt: optim.StepLR(opt, 2, -1), "StepLR: expected gamma .* at least 0; received -1"),
        (
            lambda opt: optim.ExponentialLR(opt, math.nan),
            "ExponentialLR: expected gamma to be a number of at least 0; received nan",
        ),
        (
            lambda opt: optim.CosineLR(opt, math.inf),
            "CosineLR: expected total_steps to be an integer of at least 1; received inf",
        ),
        (
            lambda opt: optim.CosineLR(opt, 10, -1),
            "CosineLR: expected warmup_steps to be an integer of at least 0; received -1",
        ),
        (lambda opt: optim.CosineLR(opt, 5, 5), "CosineLR: expected warmup_steps < 5; received 5"),
        (
            lambda opt: optim.OneCycleLR(opt, -1.0, 5),
            "OneCycleLR: expected max_lr to be a number of at least 0; received -1.0",
        ),
        (
            lambda opt: optim.OneCycleLR(opt, 1.0, 5, pct_start=1.5),
            "OneCycleLR: expected pct_start to be a number from 0 to 1; received 1.5",
        ),
        (
            lambda opt: optim.OneCycleLR(opt, 1.0, 5, anneal_strategy="sine"),
            "OneCycleLR: expected anneal_strategy to be cos or linear; received 'sine'",
        ),
        (
            lambda opt: optim.OneCycleLR(opt, 1.0, 5, div_factor=0),
            "OneCycleLR: expected div_factor to be a number of at least 1; received 0",
        ),
        (
            lambda opt: optim.ReduceLROnPlateau(opt, "lowest"),
            "ReduceLROnPlateau: expected mode to be min or max; received 'lowest'",
        ),
        (
            lambda opt: optim.ReduceLROnPlateau(opt, factor=1.0),
            "ReduceLROnPlateau: expected factor to be at least 0 and below 1; received 1.0",
        ),
        (
            lambda opt: optim.ReduceLROnPlateau(opt, patience=-1),
            "ReduceLROnPlateau: expected patience to be an integer of at least 0; received -1",
        ),
    ],
)
def test_options_out_of_range_are_refused(make, message):
    opt = make_optimizer()
    with pytest.raises(ValueError, match=f"^{message}$"):
        make(opt)
    assert rates(opt) == BASES


def test_what_is_no_optimizer_and_no_metric_is_refused():
    with pytest.raises(TypeError, match="^StepLR: expected an Optimizer; received a float$"):
        optim.StepLR(0.1, 2)
    schedule = optim.ReduceLROnPlateau(make_optimizer())
    with pytest.raises(TypeError, match=r"^ReduceLROnPlateau: expected step\(metric\); received"):
        schedule.step()
    with pytest.raises(TypeError, match="^StepLR: expected gamma .* at least 0; received '0.1'$"):
        optim.StepLR(make_optimizer(), 2, "0.1")


def test_a_schedule_prints_its_options_and_count():
    schedule = optim.StepLR(make_optimizer(), 2, 0.5)
    schedule.step()
    assert repr(schedule) == "StepLR(count=1, step_size=2.0, gamma=0.5)"
