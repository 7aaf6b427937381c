"""Gradient clipping, between backward() and step(). Next: optimizer.py.

Gradients come in as `p.grad`; clipped ones replace them, detached. The old ones are not written to.
"""

from __future__ import annotations

from collections.abc import Iterable

from needle.autograd import Tensor, no_grad
from needle.ops import clip
from needle.ops.update import ClippedByNorm
from needle.optim.options import as_option


def clip_grad_norm(
    params: Tensor | Iterable[Tensor], max_norm: float, norm_type: float = 2.0
) -> Tensor:
    """Scale all gradients by one factor, so that their common norm is at most max_norm.

    n = (sum of |g|^norm_type over all gradients)^(1 / norm_type)
    g = g * min(1, max_norm / (n + 1e-6))

    norm_type: above 0; inf takes the largest |g|. Returns n from before, a 0-d Tensor: no value is
    read. A NaN among the gradients makes them all NaN, an infinity makes it NaN and the others 0.
    ValueError, TypeError for a bad number; ValueError where no parameter has a gradient.
    (Pascanu et al., 2013.)
    """
    max_norm = as_option("clip_grad_norm", "max_norm", max_norm)
    op = ClippedByNorm(max_norm, as_option("clip_grad_norm", "norm_type", norm_type))
    found = with_gradient("clip_grad_norm", params)
    with no_grad():
        total, *clipped = op(*(p.grad for p in found))
    for p, grad in zip(found, clipped, strict=True):
        p.grad = grad
    return total


def clip_grad_value(params: Tensor | Iterable[Tensor], value: float) -> None:
    """Limit each element of each gradient to [-value, value]; NaN stays NaN.

    ValueError, TypeError for a bad number; ValueError where no parameter has a gradient.
    """
    limit = as_option("clip_grad_value", "value", value)
    with no_grad():
        for p in with_gradient("clip_grad_value", params):
            p.grad = clip(p.grad, -limit, limit)


def with_gradient(name: str, params: Tensor | Iterable[Tensor]) -> list[Tensor]:
    """The parameters that have a gradient; `name` is who asks, for the error if none has."""
    found = [p for p in ([params] if isinstance(params, Tensor) else params) if p.grad is not None]
    if not found:
        raise ValueError(f"{name}: no parameter has a gradient; call backward() first")
    return found
