"""What the options of optimizers, schedules and clipping may be. Next: clipping.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import inf
from numbers import Real
from typing import Any

Kind = tuple[str, Callable[[float], bool]]  # what a number must be: in words, as a test

# An option is of one kind wherever it occurs. dampening may also be None.
NUMBERS: dict[str, Kind] = {
    option: (words, holds)
    for words, holds, options in (
        ("a number of at least 0", lambda x: 0 <= x < inf, "lr max_lr min_lr gamma threshold"),
        ("a number of at least 0", lambda x: 0 <= x < inf, "weight_decay eps eps1 eps2"),
        ("at least 0 and below 1", lambda x: 0 <= x < 1, "momentum beta1 beta2 alpha factor"),
        ("above 0 and below 1", lambda x: 0 < x < 1, "backoff_factor"),
        ("a number from 0 to 1", lambda x: 0 <= x <= 1, "dampening pct_start"),
        ("a number of at least 1", lambda x: 1 <= x < inf, "div_factor final_div_factor"),
        ("a number above 0", lambda x: 0 < x < inf, "clip init_scale scale"),
        ("a number above 1", lambda x: 1 < x < inf, "growth_factor"),
        ("a number below 0", lambda x: -inf < x < 0, "decay_rate"),
        ("a number of at least 0, or inf", lambda x: x >= 0, "max_norm value"),
        ("a number above 0, or inf", lambda x: x > 0, "norm_type"),
        ("an integer of at least 0", lambda x: x >= 0 and x % 1 == 0, "patience cooldown"),
        ("an integer of at least 0", lambda x: x >= 0 and x % 1 == 0, "warmup_steps"),
        ("an integer of at least 0", lambda x: x >= 0 and x % 1 == 0, "_growth_tracker"),
        ("an integer of at least 1", lambda x: x >= 1 and x % 1 == 0, "total_steps step_size"),
        ("an integer of at least 1", lambda x: x >= 1 and x % 1 == 0, "growth_interval"),
    )
    for option in options.split()
}
CHOICES: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("nesterov", "centered", "scale_parameter"), (True, False)),
    **{"mode": ("min", "max"), "anneal_strategy": ("cos", "linear")},
}


def as_option(name: str, key: str, value: Any) -> Any:
    """An option, checked, a number as a float; `name` is who asks, for the error.

    One of a name that only a user's own class has is taken as it is.
    """
    if key in CHOICES and value not in CHOICES[key]:
        words = " or ".join(map(str, CHOICES[key]))
        raise ValueError(f"{name}: expected {key} to be {words}; received {value!r}")
    if key not in NUMBERS or (key == "dampening" and value is None):
        return value
    words, holds = NUMBERS[key]
    message = f"{name}: expected {key} to be {words}; received {value!r}"
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(message)
    if not holds(float(value)):
        raise ValueError(message)
    return float(value)


def listed(names: Iterable[Any]) -> str:
    """Names as they stand in errors."""
    return ", ".join(sorted(map(str, names)))
