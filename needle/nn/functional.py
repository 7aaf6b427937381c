"""Layers and losses as functions, `nn.functional`: the modules add parameters and settings to them.

Most are ops under the names that the field gives them here. Functions of images take them as
(n, channels, *sizes) or, where channels_last=True, (n, *sizes, channels). Next: activation.py.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import numpy as np

from needle.array.spec import as_shape
from needle.autograd import Tensor
from needle.dtype import bool_
from needle.errors import expect
from needle.init import ones_like, randb
from needle.nn.layout import in_all_ranks, on_images, to_first, to_last

# fmt: off
# isort: off
# ruff: noqa: F401
from needle.ops import (
    bce_with_logits, concatenate, cos, cross_entropy, elu, flatten, gelu, huber_loss, kl_div,
    l1_loss, leaky_relu, log_softmax, matmul, mse_loss, nll_loss, normalize, one_hot, relu, sigmoid,
    silu, sin, softmax, softplus, split, stack, tanh,
)
from needle.ops import conv, conv_transpose, pool, resize
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


# Images


def convolve(
    x: Operand, weight: Tensor, bias: Maybe = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """`ops.conv`, plus bias (out,); weight is (*kernel, in / groups, out)."""
    return shifted("conv", conv(x, weight, stride, padding, dilation, groups), bias)


def convolve_transposed(
    x: Operand, weight: Tensor, bias: Maybe = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    """`ops.conv_transpose`, plus bias (out,); weight is (*kernel, out / groups, in)."""
    settings = stride, padding, output_padding, dilation, groups
    return shifted("conv_transpose", conv_transpose(x, weight, *settings), bias)


def shifted(name: str, y: Tensor, bias: Maybe) -> Tensor:
    check_shapes(name, y.shape[-1:], bias=bias)
    return y if bias is None else y + narrowed(bias)


conv1d, conv2d, conv3d = in_all_ranks("conv", convolve)
conv_transpose1d, conv_transpose2d, conv_transpose3d = in_all_ranks(
    "conv_transpose", convolve_transposed
)
max_pool1d, max_pool2d, max_pool3d = in_all_ranks("max_pool", pool.max_pool)
avg_pool1d, avg_pool2d, avg_pool3d = in_all_ranks("avg_pool", pool.avg_pool)
adaptive_max_pool1d, adaptive_max_pool2d, adaptive_max_pool3d = in_all_ranks(
    "adaptive_max_pool", pool.adaptive_max_pool
)
adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d = in_all_ranks(
    "adaptive_avg_pool", pool.adaptive_avg_pool
)
interpolate = on_images("interpolate", resize.interpolate)
pixel_shuffle = on_images("pixel_shuffle", resize.pixel_shuffle, 2)
pixel_unshuffle = on_images("pixel_unshuffle", resize.pixel_unshuffle, 2)


def embedding(ids: Operand, weight: Tensor, padding_idx: int | None = None) -> Tensor:
    """y = weight[ids], (..., dim) for ids (...) of integers, or floats without fractions.

    The row of padding_idx gets no gradient. IndexError: ids below 0 or from len(weight) on.
    """
    ids = as_indices("embedding", ids, weight)
    y = Gather(0)(weight, Checked("embedding: expected ids", len(weight))(ids))
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
    return masked(x, x.shape, p) if training else x


def drop_channels(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """Dropout of whole channels of x (n, *sizes, channels) (Tompson et al., 2015)"""
    channels = (x.shape[0], *(1 for _ in x.shape[1:-1]), x.shape[-1])
    return masked(x, channels, check_probability(p)) if training else x


def masked(x: Tensor, shape: tuple[int, ...], p: float) -> Tensor:
    """x times a mask of a shape that is drawn, over 1 - p."""
    mask = randb(*shape, p=1 - p, device=x.device)
    return normalize.masked(x, mask, p) if p < 1 else x * 0.0


dropout1d, dropout2d, dropout3d = in_all_ranks("dropout", drop_channels)


# Attention and positions


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Maybe = None, dropout_p: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, probabilities before dropout) of `scaled_dot_product_attention`."""
    heads, groups = query.shape[-3], key.shape[-3]
    fits = key.shape[:-1] == value.shape[:-1] and query.shape[-1] == key.shape[-1]
    shapes = f"{query.shape}, {key.shape} and {value.shape}"
    fits = fits and query.shape[:-3] == key.shape[:-3] and groups > 0 and heads % groups == 0
    expect(fits, f"attention: expected query, key and value (..., heads, n, d); received {shapes}")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    wide = (*query.shape[:-1], key.shape[-2])  # of the scores
    together = (*key.shape[:-2], -1)  # the rows of queries that share keys
    if heads != groups:
        query = query.reshape((*together, query.shape[-1]))
    scores = (query @ key.transpose() * scale).reshape(wide)
    if mask is not None:
        minus = Tensor(-math.inf, device=scores.device, dtype=scores.dtype)
        scores = where(mask, scores, minus) if mask.dtype == bool_ else scores + mask
    probs = softmax(scores)
    kept = dropout(probs, dropout_p) if dropout_p else probs
    y = kept.reshape((*together, wide[-1])) @ value if heads != groups else kept @ value
    return y.reshape((*wide[:-1], value.shape[-1])), probs


def causal_mask(queries: int, keys: int, like: Tensor, past: int = 0) -> Tensor:
    """Which keys a query sees: those up to its own place, which comes `past` places later."""
    return Tensor(np.tri(queries, keys, past, dtype=bool), device=like.device)


def scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Maybe = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None,
) -> Tensor:  # fmt: skip
    """y = softmax(query @ key^T * scale + mask) @ value, of (..., heads, n, d), n by sequence.

    key and value may have fewer heads, each for as many neighbouring ones of query (Ainslie et al.,
    2023). attn_mask broadcasts to (..., heads, queries, keys): bool, True where a key is seen, or
    numbers to add. is_causal: a query sees keys up to its own place. dropout_p: of the
    probabilities. scale: by default d^-1/2. A query that sees nothing gives 0. (Vaswani et al.,
    2017)
    """
    if is_causal:
        expect(attn_mask is None, "attention: expected attn_mask or is_causal; received both")
        attn_mask = causal_mask(query.shape[-2], key.shape[-2], query)
    return attend(query, key, value, attn_mask, dropout_p, scale)[0]


@dataclass(frozen=True)
class RotaryScaling:
    """How `rotary` turns in a context longer than the one that a model was first trained with.

    Each frequency f becomes f / factor ("linear": Chen et al., 2023). Given the rest, too, f stays
    where it makes more than high_freq_factor turns in original_max_position_embeddings places, is
    divided where it makes fewer than low_freq_factor, and goes over evenly between ("llama3":
    Grattafiori et al., 2024). ValueError for numbers that are not above 0, or low not below high.
    """

    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        factor, *band = astuple(self)
        fits = factor > 0 and (band == [None] * 3 or None not in band)
        fits = fits and (None in band or (0 < band[0] < band[1] and band[2] > 0))
        expected = "factor above 0, alone or with low_freq_factor < high_freq_factor and a length"
        expect(fits, f"rotary: expected {expected}, above 0; received {self}")

    def __call__(self, frequencies: np.ndarray) -> np.ndarray:
        """The frequencies as they become."""
        factor, low, high, length = astuple(self)
        if length is None:
            return frequencies / factor
        turns = frequencies * length / (2 * math.pi)
        share = np.clip((turns - low) / (high - low), 0, 1)
        return frequencies * (share + (1 - share) / factor)


@cache
def frequencies(dim: int, base: float, scaling: RotaryScaling | None = None) -> np.ndarray:
    expect(dim % 2 == 0, f"positions: expected an even dimension; received {dim}")
    found = base ** (-np.arange(0, dim, 2) / dim)
    return found if scaling is None else scaling(found)


def waves(positions: Tensor, dtype: Any, *settings: Any) -> tuple[Tensor, Tensor]:
    """sin and cos of positions (T,) times the frequencies: (T, dim / 2) each, by float64."""
    own = Tensor(frequencies(*settings), device=positions.device, requires_grad=False)
    angles = positions.to("float64").unsqueeze(-1) * own
    return sin(angles).to(dtype), cos(angles).to(dtype)


def sinusoidal(
    positions: Tensor, dim: int, base: float = 10000.0, dtype: Any = "float32"
) -> Tensor:
    """y[t, 2i] = sin(t base^(-2i / dim)), y[t, 2i + 1] = cos of it: (T, dim).

    (Vaswani et al., 2017)
    """
    return stack(waves(positions, dtype, dim, base), -1).reshape((*positions.shape, dim))


def rotary(
    x: Tensor, positions: Tensor, base: float = 10000.0, scaling: RotaryScaling | None = None
) -> Tensor:
    """x (..., T, d) with its pairs (x[i], x[i + d/2]) turned by t base^(-2i / d), positions (T,);
    scaling: what becomes of these frequencies, base^(-2i / d).

    Products of queries and keys so turned depend on their distance alone. (Su et al., 2021)
    """
    sines, cosines = waves(positions, x.dtype, x.shape[-1], base, scaling)
    a, b = split(x, -1, (x.shape[-1] // 2,) * 2)
    return concatenate([a * cosines - b * sines, b * cosines + a * sines], -1)


def alibi(num_heads: int, queries: int, keys: int, **placement: Any) -> Tensor:
    """What is added to scores (heads, queries, keys): -slope * distance, slopes 2^(-8 h / heads).

    h = 1 ... heads, a power of two, or else the slopes of the next smaller power of two, and then
    every second one of twice as many. The last query and the last key are at one place. (Press et
    al., 2022)
    """
    whole = 2 ** int(math.log2(num_heads))
    slopes = [2 ** (-8 * h / whole) for h in range(1, whole + 1)]
    slopes += [2 ** (-4 * h / whole) for h in range(1, 2 * (num_heads - whole), 2)]
    distance = np.abs(np.arange(queries)[:, None] + keys - queries - np.arange(keys))
    bias = -np.array(slopes)[:, None, None] * distance
    return Tensor(bias, **{"dtype": "float32", "requires_grad": False, **placement})


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
    channels_last: bool = False,
) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel of x (n, channels, ...).

    In training with the batch's mean and biased variance, towards which the running ones move,
    r = (1 - momentum) * r + momentum * batch (as in the course; PyTorch's variance is unbiased);
    else with the running ones. A batch of one element has variance 0, so that y is the bias.
    Statistics are added place by place, in the order of n and sizes. (Ioffe and Szegedy, 2015)
    """
    x = as_float(x)
    expect(x.ndim > 1, f"batch_norm: expected x of shape (n, channels, ...); received {x.shape}")
    images = x if channels_last else to_last(x)
    *places, channels = images.shape
    rows = images if x.ndim == 2 else images.reshape((math.prod(places), channels))
    check_shapes("batch_norm", (channels,), running_mean=running_mean, running_var=running_var)
    affine = affine_of("batch_norm", (channels,), weight, bias)
    if training:
        expect(x.size, f"batch_norm: expected a batch with elements; received {x.shape}")
        if running_mean is not None and running_var is not None:
            move = normalize.RunningStatistics(float(momentum))
            moved = move(rows.detach(), running_mean, running_var)
            running_mean.data, running_var.data = moved[0], moved[1]
        y = normalize.BatchNorm(float(eps))(rows, *affine)
    elif running_mean is None or running_var is None:
        raise ValueError("batch_norm: expected running_mean and running_var in evaluation")
    else:
        y = normalize.NormalizeWith(float(eps))(rows, running_mean, running_var, *affine)
    y = y if x.ndim == 2 else y.reshape(images.shape)
    return y if channels_last else to_first(y)


def instance_norm(
    x: Operand, running_mean: Maybe = None, running_var: Maybe = None, weight: Maybe = None,
    bias: Maybe = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
    channels_last: bool = False,
) -> Tensor:  # fmt: skip
    """y = (x - mean) / sqrt(var + eps) * weight + bias per sample and channel of x (n, channels,
    *sizes); var is biased.

    With use_input_stats the running ones, where given, move as batch_norm's do, towards the means
    over the samples; without, they stand for mean and var. (Ulyanov et al., 2016)
    """
    x = as_float(x)
    expect(x.ndim > 2, f"instance_norm: expected x of shape (n, channels, *sizes); got {x.shape}")
    images = x if channels_last else to_last(x)
    n, *sizes, channels = images.shape
    running = {"running_mean": running_mean, "running_var": running_var}
    check_shapes("instance_norm", (channels,), **running)
    affine = affine_of("instance_norm", (channels,), weight, bias)
    if not use_input_stats:
        given = None not in running.values()
        expect(given, "instance_norm: expected running_mean and running_var in evaluation")
        return batch_norm(x, running_mean, running_var, weight, bias, False, 0, eps, channels_last)
    places = images.reshape((n, math.prod(sizes), channels))
    for old, statistic in ((running_mean, normalize.mean), (running_var, normalize.var)):
        if old is not None:
            new = statistic(places.detach(), 1).mean(0).to(old.dtype)
            old.data = old * (1 - momentum) + new * momentum
    y = normalize.InstanceNorm(float(eps))(places, *affine).reshape(images.shape)
    return y if channels_last else to_first(y)


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
