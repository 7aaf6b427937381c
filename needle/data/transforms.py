"""Transforms: an image in, an image out, both arrays (height, width, channels).

A random transform draws from `sample_rng()` and nothing else; the order and form of its draws are
the course's. Next: dataset.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from needle.data.batch import collate
from needle.data.stream import sample_rng
from needle.errors import expect

GREY = np.array([0.299, 0.587, 0.114], np.float32)  # luminance of red, green, blue (BT.601)


class Transform:
    """A function of a sample. Subclasses write `__call__`, and draw from `ndl.data.sample_rng()`.

    What is drawn from `np.random` itself does not follow a DataLoader's seed.
    """

    def __call__(self, x: np.ndarray) -> np.ndarray:
        raise NotImplementedError(f"{type(self).__name__}: write __call__(x)")

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({fields})"


class RandomFlipHorizontal(Transform):
    """Mirror an image (H, W, C) left to right with probability p: when `rand() < p`."""

    def __init__(self, p: float = 0.5) -> None:
        expect(0 <= p <= 1, f"RandomFlipHorizontal: expected a p in [0, 1]; received {p!r}")
        self.p = p

    def __call__(self, x: np.ndarray) -> np.ndarray:
        flipped = sample_rng().rand() < self.p
        return as_image("RandomFlipHorizontal", x)[:, ::-1] if flipped else x


class RandomCrop(Transform):
    """Shift an image (H, W, C) by up to `padding` pixels each way; zeros come in at the border.

    y[i, j] = x[i + shift_x, j + shift_y], shifts = `randint(-padding, padding + 1, size=2)`.
    """

    def __init__(self, padding: int = 3) -> None:
        fits = isinstance(padding, int | np.integer) and padding >= 0
        expect(fits, f"RandomCrop: expected a padding of 0 or more pixels; received {padding!r}")
        self.padding = int(padding)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        p = self.padding
        shift_x, shift_y = sample_rng().randint(-p, p + 1, size=2)
        height, width, channels = as_image("RandomCrop", x).shape
        padded = np.zeros((height + 2 * p, width + 2 * p, channels), x.dtype)
        padded[p : p + height, p : p + width] = x
        top, left = p + shift_x, p + shift_y
        return padded[top : top + height, left : left + width]


class Normalize(Transform):
    """y = (x - mean) / std, per channel of an image (H, W, C); numbers, or one per channel."""

    def __init__(self, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        self.mean, self.std = mean, std
        given = np.asarray(mean, np.float32), np.asarray(std, np.float32)
        fits = all(np.isfinite(each).all() and each.ndim < 2 for each in given)
        expected = "finite numbers, std above 0, or a list of them"
        fits = fits and bool((given[1] > 0).all())
        expect(fits, f"Normalize: expected {expected}; received {mean!r} and {std!r}")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        channels = as_image("Normalize", x).shape[-1]
        given = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        fits = all(each.size in (1, channels) for each in given)
        received = f"{given[0].size} and {given[1].size}"
        expect(fits, f"Normalize: expected one mean and std, or {channels}; received {received}")
        return (x - given[0]) / given[1]


class Resize(Transform):
    """An image (H, W, C) of another size: by a triangle filter, widened where it shrinks.

    size: (height, width), or the length of the shorter side, the other in proportion. What Pillow
    calls BILINEAR and PyTorch interpolation with antialias, in the image's float dtype.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = as_sides("Resize", size)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        sides = as_image("Resize", x).shape[:2]
        shorter = min(sides)
        size = self.size if len(self.size) == 2 else [s * self.size[0] // shorter for s in sides]
        rows, columns = (triangles(n, m).astype(x.dtype) for n, m in zip(sides, size, strict=True))
        return np.einsum("ih,hwc,jw->ijc", rows, x, columns, optimize=True)


def triangles(size: int, new: int) -> np.ndarray:
    """Weights (new, size): each row a triangle about the new pixel's centre, with the sum 1."""
    scale = size / new
    centres = (np.arange(new)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(size) + 0.5 - centres) / max(scale, 1.0)
    weights = np.maximum(1 - distance, 0)
    return weights / weights.sum(1, keepdims=True)


class CenterCrop(Transform):
    """The middle of an image (H, W, C). size: (height, width), or the side of a square.

    ValueError where the image is smaller.
    """

    def __init__(self, size: int | tuple[int, int]) -> None:
        self.size = as_sides("CenterCrop", size)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        height, width = (*self.size, *self.size)[:2]
        rows, columns, _ = as_image("CenterCrop", x).shape
        expected, received = f"an image of at least {height} x {width}", f"{rows} x {columns}"
        fits = rows >= height and columns >= width
        expect(fits, f"CenterCrop: expected {expected}; received {received}")
        top, left = (rows - height) // 2, (columns - width) // 2
        return x[top : top + height, left : left + width]


class ColorJitter(Transform):
    """Brightness, contrast, saturation and hue of an image (H, W, 3) in [0, 1], changed at random.

    In this order, for each that is not 0: d = `(2 rand() - 1) * strength`, f = 1 + d, then x = f x,
    then x = f x + (1 - f) mean(grey), then x = f x + (1 - f) grey, each limited to [0, 1]; then the
    hue is turned by d circles (`turn_hue`). grey is the luminance (ITU-R BT.601). PyTorch's
    strengths, that of hue at most 0.5; there the order is random.
    """

    def __init__(
        self, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0,
        hue: float = 0.0,
    ) -> None:  # fmt: skip
        self.brightness, self.contrast, self.saturation = brightness, contrast, saturation
        self.hue = hue
        fits = all(0 <= each <= 1 for each in vars(self).values()) and hue <= 0.5
        expected = "strengths in [0, 1], and hue in [0, 0.5]"
        expect(fits, f"ColorJitter: expected {expected}; received {vars(self)}")

    def __call__(self, x: np.ndarray) -> np.ndarray:
        channels = as_image("ColorJitter", x).shape[-1]
        expect(channels == 3, f"ColorJitter: expected 3 channels; received {channels}")
        for name, strength in vars(self).items():
            if not strength:
                continue
            change = (2 * sample_rng().rand() - 1) * strength
            if name == "hue":
                return turn_hue(x, change)
            factor = x.dtype.type(1 + change)
            grey = (x @ GREY.astype(x.dtype))[..., None]
            other = {"brightness": 0, "contrast": grey.mean(), "saturation": grey}[name]
            x = np.clip(factor * x + (1 - factor) * other, 0, 1)
        return x


def turn_hue(x: np.ndarray, change: float) -> np.ndarray:
    """x (..., 3) of red, green and blue with another hue: h + change modulo 1 in HSV (Smith,
    1978)."""
    most = x.argmax(-1)[..., None]
    ahead, behind = (np.take_along_axis(x, (most + step) % 3, -1) for step in (1, 2))
    top, chroma = x.max(-1, keepdims=True), np.ptp(x, -1, keepdims=True)
    hue = 2 * most.astype(x.dtype) + (ahead - behind) / np.where(chroma > 0, chroma, 1)
    place = (hue + np.array([5, 3, 1], x.dtype) + x.dtype.type(6 * change)) % 6
    return top - chroma * np.clip(np.minimum(place, 4 - place), 0, 1)


class Cutout(Transform):
    """Zeros in a square of an image (H, W, C) about a pixel drawn at random: `randint(H)`,
    `randint(W)`; what lies beyond the border is lost (DeVries and Taylor, 2017)."""

    def __init__(self, size: int = 8) -> None:
        (self.size,) = as_sides("Cutout", size)[:1]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        height, width, _ = as_image("Cutout", x).shape
        row, column = sample_rng().randint(height), sample_rng().randint(width)
        top, left, found = row - self.size // 2, column - self.size // 2, x.copy()
        found[max(top, 0) : top + self.size, max(left, 0) : left + self.size] = 0
        return found


class Mixup(Transform):
    """Convex combinations of the samples of a batch (Zhang et al., 2018), as a `collate_fn`:

        DataLoader(dataset, 128, collate_fn=Mixup(10))

    x = s x + (1 - s) x[order], and so the one-hot labels y, float32 (n, num_classes), with
    s = `beta(alpha, alpha)`, order = `permutation(n)`, drawn once per batch. A loss for them:
    `kl_div(log_softmax(logits, 1), y, reduction="batchmean")`.
    """

    def __init__(self, num_classes: int, alpha: float = 0.2) -> None:
        fits = num_classes >= 1 and 0 < alpha < np.inf
        expected = "at least one class and an alpha above 0"
        expect(fits, f"Mixup: expected {expected}; received {num_classes} and {alpha}")
        self.num_classes, self.alpha = num_classes, alpha

    def __call__(self, samples: Any) -> Any:
        images, labels = collate(samples)
        share = np.float32(sample_rng().beta(self.alpha, self.alpha))
        order = sample_rng().permutation(len(images))
        fits = labels.max() < self.num_classes
        expected = f"labels below {self.num_classes}"
        expect(fits, f"Mixup: expected {expected}; received {labels.max()}")
        targets = np.eye(self.num_classes, dtype=np.float32)[labels]
        return tuple(share * x + (1 - share) * x[order] for x in (images, targets))


def as_sides(op: str, size: Any) -> tuple[int, ...]:
    """A size as one or two whole numbers of at least 1."""
    sides = tuple(size) if isinstance(size, (tuple, list)) else (size,)
    fits = len(sides) in (1, 2) and all(isinstance(n, (int, np.integer)) and n > 0 for n in sides)
    expect(fits, f"{op}: expected a size of one or two numbers of pixels; received {size}")
    return tuple(map(int, sides))


def as_image(op: str, x: np.ndarray) -> np.ndarray:
    shape = np.shape(x)
    expect(len(shape) == 3, f"{op}: expected an image (height, width, channels); received {shape}")
    return x
