"""Convolutions and their transposes. Next: pool.py.

Weights are (*kernel, in / groups, out), those of a transpose (*kernel, out / groups, in): channels
are neighbours in memory. `nn.from_torch` brings weights of PyTorch's order into this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from needle.autograd import Tensor
from needle.errors import expect
from needle.init import kaiming_uniform, rand
from needle.nn import functional
from needle.nn.module import Module, Parameter
from needle.ops.conv import as_pairs, per_axis, settled, spans_of
from needle.ops.movement import pad


class Convolution(Module):
    """What all have in common. Images are (n, channels, *sizes), with channels_last (n, *sizes,
    channels).

    Numbers are one for all axes, or one for each. The weight is drawn by kaiming_uniform, then the
    bias uniformly within 1 / sqrt(fan in) (as in the course), where fan in is how many elements of
    x one of y adds.
    """

    outputs_first = ("weight",)
    padding_modes: tuple[str, ...] = ("zeros", "reflect", "replicate", "circular")
    function: Callable[..., Tensor]
    ndim: int

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = "float32",
        channels_last: bool = False,
    ) -> None:
        name = type(self).__name__
        channels = in_channels, out_channels
        fits = groups > 0 and all(each > 0 and each % groups == 0 for each in channels)
        received = f"{in_channels} and {out_channels} with groups={groups}"
        expect(fits, f"{name}: expected channels that groups divide; received {received}")
        modes, received = ", ".join(self.padding_modes), repr(padding_mode)
        fits = padding_mode in self.padding_modes
        expect(fits, f"{name}: expected padding_mode to be one of {modes}; received {received}")
        self.in_channels, self.out_channels = channels
        self.kernel_size = per_axis(name, "kernel_size", kernel_size, self.ndim, 1)
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.padding_mode, self.channels_last = groups, padding_mode, channels_last
        shape, place = self.weight_shape(), {"device": device, "dtype": dtype}
        size, fan_in = math.prod(self.kernel_size), math.prod(shape) // out_channels
        fan_out = out_channels // groups * size
        self.weight = Parameter(kaiming_uniform(fan_in, fan_out, shape, **place))
        bound = 1 / math.sqrt(fan_in)
        drawn = rand(out_channels, low=-bound, high=bound, **place) if bias else None
        self.bias = None if drawn is None else Parameter(drawn)

    def weight_shape(self) -> tuple[int, ...]:
        return (*self.kernel_size, self.in_channels // self.groups, self.out_channels)

    def settings(self, padding: Any) -> tuple[Any, ...]:
        return self.stride, padding, self.dilation, self.groups

    def forward(self, x: Tensor) -> Tensor:
        axis, padding = -1 if self.channels_last else 1, self.padding
        fits = x.ndim == self.ndim + 2
        if fits and x.shape[axis] != self.in_channels:
            name, received = type(self).__name__, f"{x.shape[axis]} of shape {x.shape}"
            raise ValueError(f"{name}: expected {self.in_channels} channels; received {received}")
        if fits and self.padding_mode != "zeros":
            x, padding = self.extended(x), 0
        settings = self.settings(padding)
        return self.function(x, self.weight, self.bias, *settings, channels_last=self.channels_last)

    def extended(self, x: Tensor) -> Tensor:
        """x padded with elements of its own."""
        name, first = type(self).__name__, 1 if self.channels_last else 2
        sizes = x.shape[first : first + self.ndim]
        stride = per_axis(name, "stride", self.stride, self.ndim, 1)
        dilation = per_axis(name, "dilation", self.dilation, self.ndim, 1)
        spans, padding = spans_of(self.kernel_size, dilation), settled(self.padding)
        pairs = as_pairs(name, padding, sizes, spans, stride)
        widths = [(0, 0)] * first + [*pairs] + [(0, 0)] * (2 - first)
        return pad(x, widths, mode=self.padding_mode)


class Conv1d(Convolution):
    """y = x convolved (cross-correlated) with weight + bias, x (n, in_channels, length)."""

    function, ndim = staticmethod(functional.conv1d), 1


class Conv2d(Convolution):
    """y = x convolved (cross-correlated) with weight + bias, x (n, in_channels, height, width).

    y[n, k, i, j] = bias[k] + sum over u, v, c of weight[u, v, c, k] *
    x[n, c, i * stride + u * dilation - padding, j * stride + v * dilation - padding]. padding:
    numbers, "same" (as many outputs as sizes / stride) or "valid" (none). padding_mode: what stands
    there: "zeros", or of x "reflect", "replicate" or "circular" (`ops.pad`).
    """

    function, ndim = staticmethod(functional.conv2d), 2


class Conv3d(Convolution):
    """y = x convolved (cross-correlated) with weight + bias, x (n, in_channels, depth, height,
    width)."""

    function, ndim = staticmethod(functional.conv3d), 3


class Conv(Conv2d):
    """The course's Conv2d: of odd kernel_size, padded so that stride 1 keeps height and width.

    weight is (kernel_size, kernel_size, in_channels, out_channels).
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        bias: bool = True,
        device: Any = None,
        dtype: Any = "float32",
    ) -> None:
        size = per_axis("Conv", "kernel_size", kernel_size, 2, 1)
        place = {"device": device, "dtype": dtype}
        padding = tuple((k - 1) // 2 for k in size)
        super().__init__(in_channels, out_channels, size, stride, padding, bias=bias, **place)


class ConvTranspose(Convolution):
    """What transposes have in common: what a convolution of their settings does backwards."""

    padding_modes = ("zeros",)

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        **settings: Any,
    ) -> None:
        self.output_padding = output_padding
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, **settings)

    def weight_shape(self) -> tuple[int, ...]:
        return (*self.kernel_size, self.out_channels // self.groups, self.in_channels)

    def settings(self, padding: Any) -> tuple[Any, ...]:
        return self.stride, padding, self.output_padding, self.groups, self.dilation


class ConvTranspose1d(ConvTranspose):
    """The transposed convolution of x (n, in_channels, length)."""

    function, ndim = staticmethod(functional.conv_transpose1d), 1


class ConvTranspose2d(ConvTranspose):
    """The transposed convolution of x (n, in_channels, height, width) (Zeiler et al., 2010).

    Its sizes are (size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1 + output_padding.
    Settings by keyword as Conv2d's.
    """

    function, ndim = staticmethod(functional.conv_transpose2d), 2


class ConvTranspose3d(ConvTranspose):
    """The transposed convolution of x (n, in_channels, depth, height, width)."""

    function, ndim = staticmethod(functional.conv_transpose3d), 3
