"""Images in other sizes, channels last (n, *sizes, c): interpolation, and pixels from channels.
Next: index.py."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Any

import numpy as np

from needle.array.spec import as_shape
from needle.autograd import Tensor
from needle.errors import expect
from needle.ops.conv import per_axis
from needle.ops.elementwise import Operand, as_float, as_tensor
from needle.ops.index import take
from needle.ops.movement import permute, repeat, reshape

LINEAR = {"linear": 1, "bilinear": 2, "trilinear": 3}  # by the number of axes


def interpolate(
    x: Operand,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
) -> Tensor:
    """x (n, *sizes, c) in another size, or in floor(sizes * scale_factor); one number for all axes,
    or one for each.

    "nearest" takes x[floor(i / scale)]. "linear", "bilinear" and "trilinear", of 1, 2 and 3 axes,
    weigh the two elements beside (i + 0.5) / scale - 0.5, or i (n - 1) / (out - 1) if
    align_corners.
    """
    x = as_float(x)
    count = x.ndim - 2
    expect(count > 0, f"interpolate: expected x of shape (n, *sizes, c); received {x.shape}")
    fits = mode == "nearest" or LINEAR.get(mode) == count
    modes = f"mode 'nearest' or the linear one of {count} axes"
    expect(fits, f"interpolate: expected {modes}; received {mode!r}")
    plain = mode != "nearest" or align_corners is None
    expect(plain, "interpolate: expected align_corners with a linear mode; received 'nearest'")
    outs, steps = resized(x.shape[1:-1], size, scale_factor)
    for axis, (out, step) in enumerate(zip(outs, steps, strict=True), 1):
        if mode == "nearest":
            x = nearest(x, axis, out, step)
        else:
            x = linear(x, axis, out, step, bool(align_corners))
    return x


def resized(sizes: Sequence[int], size: Any, scale: Any) -> tuple[Sequence[int], list[float]]:
    """New sizes, and how far apart their elements lie in x."""
    received = f"size={size!r} and scale_factor={scale!r}"
    one = (size is None) != (scale is None)
    expect(one, f"interpolate: expected either size or scale_factor; received {received}")
    given = scale if size is None else size
    found = [given] * len(sizes) if np.ndim(given) == 0 else list(given)
    fits = len(found) == len(sizes) and all(each > 0 for each in found)
    wanted = f"a positive number for each of {len(sizes)} axes"
    expect(fits, f"interpolate: expected {wanted}; received {received}")
    if size is not None:
        outs = as_shape("interpolate", found, 1)
        return outs, [n / out for n, out in zip(sizes, outs, strict=True)]
    outs = as_shape("interpolate", [floor(n * s) for n, s in zip(sizes, found, strict=True)], 1)
    return outs, [1 / each for each in found]


def nearest(x: Tensor, axis: int, out: int, step: float) -> Tensor:
    n = x.shape[axis]
    if out % n == 0 and step == n / out:
        return x if out == n else repeat(x, out // n, axis)
    return take(x, np.minimum(np.floor(np.arange(out) * step).astype(np.int64), n - 1), axis)


def linear(x: Tensor, axis: int, out: int, step: float, align_corners: bool) -> Tensor:
    n = x.shape[axis]
    if align_corners:
        place = np.arange(out) * ((n - 1) / (out - 1) if out > 1 else 0.0)
    else:
        place = np.maximum((np.arange(out) + 0.5) * step - 0.5, 0.0)
    low = np.minimum(place.astype(np.int64), n - 1)
    share = np.clip(place - low, 0, 1).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
    lower, upper = (as_tensor(each.astype(x.dtype), x) for each in (1 - share, share))
    return take(x, low, axis) * lower + take(x, np.minimum(low + 1, n - 1), axis) * upper


def pixel_shuffle(x: Operand, upscale_factor: int) -> Tensor:
    """(n, h, w, c r r) -> (n, h r, w r, c), r the factor: y[h r + i, w r + j, c] is
    x[h, w, c r r + i r + j] (Shi et al., 2016)"""
    x, r = checked("pixel_shuffle", x, upscale_factor)
    n, h, w, c = x.shape
    message = f"pixel_shuffle: expected channels divisible by {r * r}; received {x.shape}"
    expect(c % (r * r) == 0, message)
    parts = permute(reshape(x, (n, h, w, c // (r * r), r, r)), (0, 1, 4, 2, 5, 3))
    return reshape(parts, (n, h * r, w * r, c // (r * r)))


def pixel_unshuffle(x: Operand, downscale_factor: int) -> Tensor:
    """(n, h r, w r, c) -> (n, h, w, c r r): `pixel_shuffle` undone"""
    x, r = checked("pixel_unshuffle", x, downscale_factor)
    n, h, w, c = x.shape
    fits = h % r == 0 and w % r == 0
    expect(fits, f"pixel_unshuffle: expected sizes divisible by {r}; received {x.shape}")
    parts = permute(reshape(x, (n, h // r, r, w // r, r, c)), (0, 1, 3, 5, 2, 4))
    return reshape(parts, (n, h // r, w // r, c * r * r))


def checked(name: str, x: Operand, factor: Any) -> tuple[Tensor, int]:
    x = as_tensor(x)
    expect(x.ndim == 4, f"{name}: expected x of shape (n, h, w, c); received {x.shape}")
    return x, per_axis(name, "the factor", factor, 1, 1)[0]
