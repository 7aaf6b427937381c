"""Pooling and resizing of images as modules: functions whose settings are fields. Next: loss.py.

Images are (n, channels, *sizes), with channels_last (n, *sizes, channels). Numbers are one for all
axes, or one for each.
"""

from __future__ import annotations

from typing import Any

from needle.nn import functional
from needle.nn.module import Function


class MaxPool(Function):
    """The largest element of each window; padding is of -inf, stride the kernel's size by default.

    ceil_mode keeps a last window that is not whole. Of equal elements the first gets the gradient.
    """

    function = staticmethod(functional.max_pool2d)
    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    dilation: Any = 1
    ceil_mode: bool = False
    channels_last: bool = False


class MaxPool1d(MaxPool):
    """The largest element of each window of x (n, channels, length)."""

    function = staticmethod(functional.max_pool1d)


class MaxPool2d(MaxPool):
    """The largest element of each window of x (n, channels, height, width)."""


class MaxPool3d(MaxPool):
    """The largest element of each window of x (n, channels, depth, height, width)."""

    function = staticmethod(functional.max_pool3d)


class AvgPool(Function):
    """The mean of each window; padding is of zeros, stride the kernel's size by default.

    Sums are divided by the number of elements in the window, padding included where
    count_include_pad, or by divisor_override. ceil_mode keeps a last window that is not whole.
    """

    function = staticmethod(functional.avg_pool2d)
    kernel_size: Any
    stride: Any = None
    padding: Any = 0
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: float | None = None
    channels_last: bool = False


class AvgPool1d(AvgPool):
    """The mean of each window of x (n, channels, length)."""

    function = staticmethod(functional.avg_pool1d)


class AvgPool2d(AvgPool):
    """The mean of each window of x (n, channels, height, width)."""


class AvgPool3d(AvgPool):
    """The mean of each window of x (n, channels, depth, height, width)."""

    function = staticmethod(functional.avg_pool3d)


class AdaptivePool(Function):
    """Windows that share the image evenly, output_size of them along each axis; 1: global pooling.

    None stands for as many as there are elements.
    """

    function = staticmethod(functional.adaptive_avg_pool2d)
    output_size: Any
    channels_last: bool = False


class AdaptiveMaxPool1d(AdaptivePool):
    """The largest element of each of output_size windows of x (n, channels, length)."""

    function = staticmethod(functional.adaptive_max_pool1d)


class AdaptiveMaxPool2d(AdaptivePool):
    """The largest element of each of output_size windows of x (n, channels, height, width)."""

    function = staticmethod(functional.adaptive_max_pool2d)


class AdaptiveMaxPool3d(AdaptivePool):
    """The largest element of each of output_size windows of x (n, channels, depth, height,
    width)."""

    function = staticmethod(functional.adaptive_max_pool3d)


class AdaptiveAvgPool1d(AdaptivePool):
    """The mean of each of output_size windows of x (n, channels, length)."""

    function = staticmethod(functional.adaptive_avg_pool1d)


class AdaptiveAvgPool2d(AdaptivePool):
    """The mean of each of output_size windows of x (n, channels, height, width)."""


class AdaptiveAvgPool3d(AdaptivePool):
    """The mean of each of output_size windows of x (n, channels, depth, height, width)."""

    function = staticmethod(functional.adaptive_avg_pool3d)


class Upsample(Function):
    """x in another size, or in its sizes times scale_factor: mode "nearest", or "linear",
    "bilinear" or "trilinear" for 1, 2 or 3 axes (see functional.interpolate)."""

    function = staticmethod(functional.interpolate)
    size: Any = None
    scale_factor: Any = None
    mode: str = "nearest"
    align_corners: bool | None = None
    channels_last: bool = False


class PixelShuffle(Function):
    """(n, c r r, h, w) -> (n, c, h r, w r), r the factor (Shi et al., 2016)"""

    function = staticmethod(functional.pixel_shuffle)
    upscale_factor: int
    channels_last: bool = False


class PixelUnshuffle(Function):
    """(n, c, h r, w r) -> (n, c r r, h, w): PixelShuffle undone"""

    function = staticmethod(functional.pixel_unshuffle)
    downscale_factor: int
    channels_last: bool = False
