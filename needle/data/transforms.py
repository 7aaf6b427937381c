"""Transforms: an image in, an image out, both arrays (height, width, channels).

A random transform draws from `sample_rng()` and nothing else; the order and form of its draws are
the course's. Next: dataset.py.
"""

from __future__ import annotations

import numpy as np

from needle.data.stream import sample_rng
from needle.errors import expect


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


def as_image(op: str, x: np.ndarray) -> np.ndarray:
    shape = np.shape(x)
    expect(len(shape) == 3, f"{op}: expected an image (height, width, channels); received {shape}")
    return x
