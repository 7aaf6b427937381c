"""Layers and losses as functions, `nn.functional`: the modules add parameters and settings to them.

Most are ops under the names that the field gives them here. Next: activation.py.
"""

from __future__ import annotations

import math
from typing import Any

from needle.array.spec import as_shape
from needle.autograd import Tensor
from needle.errors import expect
from needle.init import ones_like, randb

# fmt: off
# isort: off
# ruff: noqa: F401
from needle.ops import (
    bce_with_logits, cross_entropy, elu, flatten, gelu, huber_loss, kl_div, l1_loss, leaky_relu,
    log_softmax, matmul, mse_loss, nll_loss, normalize, one_hot, relu, sigmoid, silu, softmax,
    softplus, tanh,
)
from needle.ops.elementwise import Operand, as_float, narrowed, not_equal, where
from needle.ops.index import Checked, Gather, as_indices
# fmt: on
# isort: on

Maybe = Tensor | None


def linear(x: Operand, weight: Tensor, bias: Maybe = None) -> Tensor:
    """y = x @ weight + bias, of x (..., in), weight (in, out) and bias (1, out) or (out,)."""
    y = matmul(x, weight)
    if bias is None:
        return y
    bias = narrowed(bias)
    return y + (bias.reshape(y.shape) if y.ndim == 1 else bias)


def embedding(ids: Operand, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """y = weight[ids], (..., dim) for ids (...) of integers, or floats without fractions.

    The row of padding_idx gets no gradient. IndexError: ids below 0 or from len(weight) on.
    """
    ids = as_indices("embedding", ids, weight)
    y = Gather(0)(weight, Checked("embedding", len(weight))(ids))
    if padding_idx is None:
        return y
    return where(not_equal(ids, padding_idx).unsqueeze(-1), y, y.detach())


def check_probability(p: float) -> float:
    expect(0 <= p <= 1, f"dropout: expected p between 0 and 1; received {p}")
    return float(p)


def dropout(x: Operand, p: float = 0.5, training: bool = True) -> Tensor:
    """y = x * mask / (1 - p), each element of the mask being 1 with probability 1 - p, else 0.

    In training the mask is drawn whatever p is; zeros where p = 1. Else x itself, and nothing is
    drawn. (Srivastava et al., 2014)
    """
    x, p = as_float(x), check_probability(p)
    if not training:
        return x
    mask = randb(*x.shape, p=1 - p, device=x.device)
    return normalize.masked(x, mask, p) if p < 1 else x * 0.0


# Normalisations


def check_shapes(name: str, wanted: tuple[int, ...], **tensors: Maybe) -> None:
    for role, tensor in tensors.items():
        if tensor is not None and tensor.shape != wanted:
            raise ValueError(f"{name}: expected {role} of shape {wanted}; received {tensor.shape}")


def affine_of(name: str, shape: Any, weight: Maybe, bias: Maybe) -> tuple[Tensor, ...]:
    """The affine part as a composite reads it: a bias has a weight before it."""
    check_shapes(name, shape, weight=weight, bias=bias)
    if weight is None:
        return () if bias is None else (ones_like(bias), bias)
    return (weight,) if bias is None else (weight, bias)


def batch_norm(
    x: Operand,
    running_mean: Maybe = None,
    running_var: Maybe = None,
    weight: Maybe = None,
    bias: Maybe = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel of x (n, channels, ...).

    In training with the batch's mean and biased variance, towards which the running ones move,
    r = (1 - momentum) * r + momentum * batch (as in the course; PyTorch's variance is unbiased);
    else with the running ones. A batch of one element has variance 0, so that y is the bias.
    (Ioffe and Szegedy, 2015)
    """
    x = as_float(x)
    expect(x.ndim > 1, f"batch_norm: expected x of shape (n, channels, ...); received {x.shape}")
    check_shapes("batch_norm", x.shape[1:2], running_mean=running_mean, running_var=running_var)
    affine = affine_of("batch_norm", x.shape[1:2], weight, bias)
    if training:
        expect(x.size, f"batch_norm: expected a batch with elements; received {x.shape}")
        if running_mean is not None and running_var is not None:
            move = normalize.RunningStatistics(float(momentum))
            moved = move(x.detach(), running_mean, running_var)
            running_mean.data, running_var.data = moved[0], moved[1]
        return normalize.BatchNorm(float(eps))(x, *affine)
    if running_mean is None or running_var is None:
        raise ValueError("batch_norm: expected running_mean and running_var in evaluation")
    return normalize.NormalizeWith(float(eps))(x, running_mean, running_var, *affine)


def trailing(name: str, x: Tensor, shape: Any, weight: Maybe, bias: Maybe) -> tuple[int, Any]:
    """The number of x's trailing axes, which must have the sizes of shape, and the affine part."""
    sizes = as_shape(name, shape)
    if not sizes or x.shape[-len(sizes) :] != sizes:
        raise ValueError(f"{name}: expected x of trailing sizes {sizes}; received shape {x.shape}")
    return len(sizes), affine_of(name, sizes, weight, bias)


def layer_norm(
    x: Operand, normalized_shape: Any, weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the trailing axes of normalized_shape.

    weight and bias have that shape, an int or several; var is biased. (Ba et al., 2016)
    """
    x = as_float(x)
    ndim, affine = trailing("layer_norm", x, normalized_shape, weight, bias)
    return normalize.LayerNorm(ndim, float(eps))(x, *affine)


def rms_norm(x: Operand, normalized_shape: Any, weight: Maybe = None, eps: float = 1e-5) -> Tensor:
    """y = x / sqrt(mean of x^2 + eps) * weight over the trailing axes of normalized_shape.

    weight has that shape, an int or several. (Zhang and Sennrich, 2019)
    """
    x = as_float(x)
    ndim, affine = trailing("rms_norm", x, normalized_shape, weight, None)
    return normalize.RMSNorm(ndim, float(eps))(x, *affine)


def group_norm(
    x: Operand, num_groups: int, weight: Maybe = None, bias: Maybe = None, eps: float = 1e-5
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias of x (n, channels, ...).

    Mean and biased variance are those of each sample's groups of channels / num_groups neighbouring
    channels; weight and bias are per channel. (Wu and He, 2018)
    """
    x = as_float(x)
    if x.ndim < 2 or num_groups < 1 or x.shape[1] % num_groups:
        wanted = f"(n, channels, ...) with channels divisible by {num_groups}"
        raise ValueError(f"group_norm: expected x of shape {wanted}; received {x.shape}")
    n, channels, *rest = x.shape
    affine = affine_of("group_norm", (channels,), weight, bias)
    groups = x.reshape((n, num_groups, channels // num_groups * math.prod(rest)))
    y = normalize.LayerNorm(1, float(eps))(groups).reshape(x.shape)
    spread = normalize.channel_shape(x)
    return normalize.apply_affine(y, *[each.reshape(spread) for each in affine])
