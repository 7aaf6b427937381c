"""Normalisations: over a batch, over a sample's axes, over groups of channels. Next: container.py.

Weights begin as ones and biases as zeros, of the dtype and on the device given by keyword.
"""

from __future__ import annotations

from typing import Any

from needle.array.spec import as_shape
from needle.autograd import Tensor
from needle.errors import expect
from needle.init import ones, zeros
from needle.nn import functional
from needle.nn.layout import shape_text
from needle.nn.module import Module, Parameter


class Normalization(Module):
    """What they share: eps, and unless affine=False a weight and, where it has one, a bias."""

    has_bias = True

    def __init__(self, shape: Any, eps: float, affine: bool = True, **placement: Any) -> None:
        self.eps = eps
        self.weight = Parameter(ones(shape, **placement)) if affine else None
        self.bias = Parameter(zeros(shape, **placement)) if affine and self.has_bias else None


class Tracking(Normalization):
    """What those share that may keep running statistics of channels, moved by `momentum`."""

    def __init__(
        self, dim: int, eps: float, momentum: float, affine: bool, track_running_stats: bool,
        channels_last: bool, **placement: Any,
    ) -> None:  # fmt: skip
        name = "batch_norm" if isinstance(self, BatchNorm) else "instance_norm"
        expect(0 <= momentum <= 1, f"{name}: expected 0 <= momentum <= 1; received {momentum}")
        super().__init__(dim, eps, affine, **placement)
        self.momentum, self.channels_last = momentum, channels_last
        self.running_mean = zeros(dim, **placement) if track_running_stats else None
        self.running_var = ones(dim, **placement) if track_running_stats else None


class BatchNorm(Tracking):
    """y = (x - mean) / sqrt(var + eps) * weight + bias per channel of x.

    In training with the batch's mean and variance, towards which running_mean and running_var move
    by `momentum`; in evaluation with the running ones. Variances are biased, running_var too (as in
    the course; PyTorch's is not). A batch of one element is allowed: its variance is 0, y the bias.
    With channels_last the channels are x's last axis. (Ioffe and Szegedy, 2015)
    """

    sizes: tuple[int, ...]  # how many axes x may have besides n and the channels

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        device: Any = None,
        dtype: Any = "float32",
        channels_last: bool = False,
    ) -> None:
        self.dim = dim
        super().__init__(dim, eps, momentum, True, True, channels_last, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        check_channels("batch_norm", x, self.dim, self.sizes, self.channels_last)
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        settings = self.training, self.momentum, self.eps, self.channels_last
        return functional.batch_norm(x, *tensors, *settings)


def check_channels(
    name: str, x: Tensor, dim: int, counts: tuple[int, ...], channels_last: bool
) -> None:
    axis = -1 if channels_last else 1
    if x.ndim - 2 not in counts or x.shape[axis] != dim:
        shapes = " or ".join(shape_text(count, dim, channels_last) for count in counts)
        raise ValueError(f"{name}: expected x of shape {shapes}; received {x.shape}")


class BatchNorm1d(BatchNorm):
    """BatchNorm of x (n, dim) or (n, dim, length)."""

    sizes = (0, 1)


class BatchNorm2d(BatchNorm):
    """BatchNorm of x (n, dim, height, width)."""

    sizes = (2,)


class BatchNorm3d(BatchNorm):
    """BatchNorm of x (n, dim, depth, height, width)."""

    sizes = (3,)


class InstanceNorm(Tracking):
    """y = (x - mean) / sqrt(var + eps) * weight + bias per sample and channel of x.

    weight and bias are per channel, None unless affine; var is biased. With track_running_stats,
    running_mean and running_var move by `momentum` towards the means over the samples of mean and
    (biased) var in training, and stand for them in evaluation. With channels_last the channels are
    x's last axis. The rest: device, dtype. (Ulyanov et al., 2016)
    """

    sizes: tuple[int, ...]

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        affine: bool = False,
        track_running_stats: bool = False,
        channels_last: bool = False,
        **rest: Any,
    ) -> None:
        self.num_features = num_features
        settings = momentum, affine, track_running_stats, channels_last
        super().__init__(num_features, eps, *settings, **rest)

    def forward(self, x: Tensor) -> Tensor:
        check_channels("instance_norm", x, self.num_features, self.sizes, self.channels_last)
        tensors = self.running_mean, self.running_var, self.weight, self.bias
        own = self.training or self.running_mean is None
        settings = own, self.momentum, self.eps, self.channels_last
        return functional.instance_norm(x, *tensors, *settings)


class InstanceNorm1d(InstanceNorm):
    """InstanceNorm of x (n, channels, length)."""

    sizes = (1,)


class InstanceNorm2d(InstanceNorm):
    """InstanceNorm of x (n, channels, height, width)."""

    sizes = (2,)


class InstanceNorm3d(InstanceNorm):
    """InstanceNorm of x (n, channels, depth, height, width)."""

    sizes = (3,)


class LayerNorm(Normalization):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the trailing axes of normalized_shape.

    weight and bias have that shape, and are None where affine=False; var is biased. The
    rest: affine, device, dtype. (Ba et al., 2016)
    """

    def __init__(self, normalized_shape: Any, eps: float = 1e-5, **rest: Any) -> None:
        self.normalized_shape = as_shape(type(self).__name__, normalized_shape)
        super().__init__(self.normalized_shape, eps, **rest)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


class LayerNorm1d(LayerNorm):
    """LayerNorm over the last axis, of size dim: the course's name and arguments."""

    def __init__(
        self, dim: int, eps: float = 1e-5, device: Any = None, dtype: Any = "float32"
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)
        self.dim = dim


class RMSNorm(LayerNorm):
    """y = x / sqrt(mean of x^2 + eps) * weight, LayerNorm's arguments without a mean and a bias.

    (Zhang and Sennrich, 2019)
    """

    has_bias = False

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class GroupNorm(Normalization):
    """y = (x - mean) / sqrt(var + eps) * weight + bias per group of channels, x (n, channels, ...).

    weight and bias are per channel, and None where affine=False. The rest: affine, device, dtype.
    (Wu and He, 2018)
    """

    def __init__(self, num_groups: int, num_channels: int, eps: float = 1e-5, **rest: Any) -> None:
        if num_groups < 1 or num_channels % num_groups:
            received = f"{num_channels} channels and {num_groups} groups"
            raise ValueError(f"group_norm: expected groups of equal size; received {received}")
        self.num_groups, self.num_channels = num_groups, num_channels
        super().__init__(num_channels, eps, **rest)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 2 or x.shape[1] != self.num_channels:
            shape = f"(n, {self.num_channels}, ...)"
            raise ValueError(f"group_norm: expected x of shape {shape}; received {x.shape}")
        return functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
