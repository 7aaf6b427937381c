"""Images as layers take them: channels first outside unless told otherwise, channels last inside.

A permutation between two layers meets its inverse; compiled programs drop the pair. Next:
functional.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from needle.autograd import Tensor
from needle.ops.elementwise import Operand, as_float
from needle.ops.movement import permute

SIZES = {0: "", 1: "length", 2: "height, width", 3: "depth, height, width"}


def shape_text(count: int, channels: Any = "channels", channels_last: bool = False) -> str:
    """The shape of images of `count` axes, in words."""
    parts = ["n", SIZES[count], channels] if channels_last else ["n", channels, SIZES[count]]
    return f"({', '.join(str(part) for part in parts if part != '')})"


def to_last(x: Tensor) -> Tensor:
    """(n, channels, *sizes) -> (n, *sizes, channels)"""
    return x if x.ndim < 3 else permute(x, (0, *range(2, x.ndim), 1))


def to_first(x: Tensor) -> Tensor:
    """(n, *sizes, channels) -> (n, channels, *sizes)"""
    return x if x.ndim < 3 else permute(x, (0, x.ndim - 1, *range(1, x.ndim - 1)))


def on_images(
    name: str, function: Callable[..., Tensor], count: int | None = None
) -> Callable[..., Tensor]:
    """A function of images (n, *sizes, channels) as one of images (n, channels, *sizes), unless
    channels_last; of `count` axes, or of any number."""

    @wraps(function)
    def run(x: Operand, *args: Any, channels_last: bool = False, **settings: Any) -> Tensor:
        x = as_float(x)
        if not 3 <= x.ndim <= 5 or count not in (None, x.ndim - 2):
            shape = shape_text(count or 2, channels_last=channels_last)
            raise ValueError(f"{name}: expected images of shape {shape}; received {x.shape}")
        if channels_last:
            return function(x, *args, **settings)
        return to_first(function(to_last(x), *args, **settings))

    run.__name__ = run.__qualname__ = name
    return run


def in_all_ranks(name: str, function: Callable[..., Tensor]) -> list[Callable[..., Tensor]]:
    """`on_images` for 1, 2 and 3 axes."""
    return [on_images(f"{name}{count}d", function, count) for count in (1, 2, 3)]
