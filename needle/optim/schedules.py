"""Learning rate schedules: numbers of the host, written to an optimizer's `lr` between its steps.

A schedule takes the learning rates that its optimizer's groups have when it is made as their bases.
`step()`, once per epoch or per batch, moves it on. One schedule per optimizer: it overwrites what
others wrote. `state_dict()` is fit for JSON.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

from needle.autograd import MODE
from needle.optim.optimizer import Optimizer, check_form
from needle.optim.options import as_option


def refuse_traces() -> None:
    """A schedule counts in Python: a traced step would always write the same number."""
    if MODE.trace is not None:
        MODE.trace.refuse("schedule.step counts", "call it outside of the jitted function")


class Schedule:
    """The base: each group's learning rate follows from its base and the count of steps.

    A subclass passes its options on, reads them from `self.options` and writes `lr_at`, or `step`.
    kept: the attributes that the next step depends on. ValueError, TypeError: options out of range.
    """

    kept: tuple[str, ...] = ("count", "bases")

    def __init__(self, optimizer: Optimizer, **options: Any) -> None:
        self.name = type(self).__name__
        if not hasattr(optimizer, "param_groups"):
            kind = type(optimizer).__name__
            raise TypeError(f"{self.name}: expected an Optimizer; received a {kind}")
        self.options = {key: as_option(self.name, key, value) for key, value in options.items()}
        self.groups = optimizer.param_groups
        self.bases = [group.lr for group in self.groups]
        self.count = 0
        self.write([self.lr_at(base, 0) for base in self.bases])

    def lr_at(self, base: float, count: int) -> float:
        """The learning rate of a group after `count` calls of step()."""
        return base

    def step(self, metric: Any = None) -> None:
        """Move on by one epoch or batch, and set the learning rates. Most need no metric."""
        refuse_traces()
        self.count += 1
        self.write([self.lr_at(base, self.count) for base in self.bases])

    def write(self, lrs: list[float]) -> None:
        """Set the groups' learning rates."""
        for group, lr in zip(self.groups, lrs, strict=True):
            group.lr = lr

    def state_dict(self) -> dict[str, Any]:
        """The schedule's name, the groups' learning rates, and what is `kept`."""
        kept = {key: deepcopy(getattr(self, key)) for key in self.kept}
        return {"schedule": self.name, "lrs": [group.lr for group in self.groups], **kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`, the learning rates included.

        ValueError on another schedule's state or one of another form; then nothing is loaded.
        """
        name = f"{self.name}.load_state_dict"
        check_form(name, self.state_dict(), state_dict)
        self.write([as_option(name, "lr", lr) for lr in state_dict["lrs"]])
        vars(self).update({key: deepcopy(state_dict[key]) for key in self.kept})

    def __repr__(self) -> str:
        options = "".join(f", {key}={value}" for key, value in self.options.items())
        return f"{self.name}(count={self.count}{options})"


class ConstantLR(Schedule):
    """lr = base."""


class StepLR(Schedule):
    """lr = base * gamma^floor(n / step_size) after n steps."""

    def __init__(self, optimizer: Optimizer, step_size: int, gamma: float = 0.1) -> None:
        super().__init__(optimizer, step_size=step_size, gamma=gamma)

    def lr_at(self, base: float, count: int) -> float:
        return float(base * self.options["gamma"] ** (count // self.options["step_size"]))


class ExponentialLR(Schedule):
    """lr = base * gamma^n after n steps."""

    def __init__(self, optimizer: Optimizer, gamma: float) -> None:
        super().__init__(optimizer, gamma=gamma)

    def lr_at(self, base: float, count: int) -> float:
        return float(base * self.options["gamma"] ** count)


def cosine(start: float, end: float, share: float) -> float:
    """From start (share 0) to end (share 1) along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


def linear(start: float, end: float, share: float) -> float:
    """From start (share 0) to end (share 1) along a line."""
    return start + (end - start) * share


class CosineLR(Schedule):
    """A linear warm-up to the base, half a cosine down to min_lr, then min_lr.

    lr = base * (n + 1) / (warmup_steps + 1) after n < warmup_steps steps, then
    lr = min_lr + (base - min_lr) * (1 + cos(pi * share)) / 2
    with share = (n - warmup_steps) / (total_steps - warmup_steps), at most 1

    total_steps counts the warm-up. (Loshchilov and Hutter, 2017.)
    """

    def __init__(
        self, optimizer: Optimizer, total_steps: int, warmup_steps: int = 0, min_lr: float = 0.0
    ) -> None:
        options = {"total_steps": total_steps, "warmup_steps": warmup_steps, "min_lr": min_lr}
        super().__init__(optimizer, **options)

    def lr_at(self, base: float, count: int) -> float:
        total, warmup, lowest = self.options.values()
        if warmup >= total:
            raise ValueError(f"CosineLR: expected warmup_steps < {total:g}; received {warmup:g}")
        if count < warmup:
            return float(base * (count + 1) / (warmup + 1))
        return cosine(base, lowest, min((count - warmup) / (total - warmup), 1.0))


class OneCycleLR(Schedule):
    """From max_lr / div_factor up to max_lr, then down to max_lr / (div_factor * final_div_factor).

    The first pct_start of total_steps go up. anneal_strategy: "cos" or "linear". Momentum, and
    the learning rate after total_steps - 1 steps, stay. (Smith and Topin, 2018.)
    """

    def __init__(
        self, optimizer: Optimizer, max_lr: float, total_steps: int, pct_start: float = 0.3,
        anneal_strategy: str = "cos", div_factor: float = 25.0, final_div_factor: float = 1e4,
    ) -> None:  # fmt: skip
        super().__init__(
            optimizer, max_lr=max_lr, total_steps=total_steps, pct_start=pct_start,
            anneal_strategy=anneal_strategy, div_factor=div_factor,
            final_div_factor=final_div_factor,
        )  # fmt: skip

    def lr_at(self, base: float, count: int) -> float:
        highest, total, pct_start, strategy, div_factor, final_div_factor = self.options.values()
        anneal = cosine if strategy == "cos" else linear
        first, peak, last = highest / div_factor, pct_start * total - 1, total - 1
        if count < peak:
            return anneal(first, highest, count / peak)
        peak = max(peak, 0.0)
        share = (count - peak) / (last - peak) if last > peak else float(count > last)
        return anneal(highest, first / final_div_factor, min(share, 1.0))


class ReduceLROnPlateau(Schedule):
    """lr = max(lr * factor, min_lr) where a metric has not improved for more than patience steps.

    mode: "min" or "max". An improvement passes the best by threshold * |best|; NaN is none. After a
    reduction, bad steps are not counted for cooldown steps.
    """

    kept = ("count", "best", "bad_steps", "cooldown_left")

    def __init__(
        self, optimizer: Optimizer, mode: str = "min", factor: float = 0.1, patience: int = 10,
        threshold: float = 1e-4, cooldown: int = 0, min_lr: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(
            optimizer, mode=mode, factor=factor, patience=patience,
            threshold=threshold, cooldown=cooldown, min_lr=min_lr,
        )  # fmt: skip
        self.best: float | None = None
        self.bad_steps = self.cooldown_left = 0

    def step(self, metric: Any = None) -> None:
        """Look at the metric of an epoch: a number, or a Tensor of one element."""
        if metric is None:
            raise TypeError("ReduceLROnPlateau: expected step(metric); received no metric")
        refuse_traces()
        value = float(metric)
        self.count += 1
        self.bad_steps += 1
        if self.improves(value):
            self.best, self.bad_steps = value, 0
        if self.cooldown_left:
            self.cooldown_left -= 1
            self.bad_steps = 0
        factor, lowest = self.options["factor"], self.options["min_lr"]
        if self.bad_steps > self.options["patience"]:
            self.bad_steps, self.cooldown_left = 0, int(self.options["cooldown"])
            for group in self.groups:
                group.lr = min(group.lr, max(group.lr * factor, lowest))

    def improves(self, value: float) -> bool:
        """Whether a metric is better than the best so far, by more than the threshold."""
        if self.best is None or not math.isfinite(value):
            return math.isfinite(value)
        gain = self.best - value if self.options["mode"] == "min" else value - self.best
        return bool(gain > abs(self.best) * self.options["threshold"])
