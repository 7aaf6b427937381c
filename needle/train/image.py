"""Any picture as a model's input: of the model's size; for a model of grey images, light strokes on
a dark ground.

In: a file. Out: float32 (height, width, channels) in [0, 1]. Next: task.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from needle.data.picture import as_rgb, decode_picture, in_bytes
from needle.files import AnyPath

NEAR = 512  # pixels along a side; a picture of at least twice as many first shrinks by a factor


def read_image(path: AnyPath, shape: tuple[int, int, int], span: float = 1.0) -> np.ndarray:
    """The picture in a file, of a shape (height, width, channels).

    With three channels it is resized in its own proportions and cut to the middle. With one: a
    transparent one is put on the ground that its strokes contrast with, one with a light ground is
    inverted. One of another size is resized in its own proportions; if its strokes span much less
    of it than `span`, the share that they span in the model's data, it is cropped to them.
    The errors of `decode_picture`.
    """
    height, width, channels = shape
    if channels == 3:
        return read_colour(path, (width, height)) / np.float32(255)
    pillow, grey = decode_picture(path, lambda *given: (given[0], make_grey(*given)))
    pixels = np.asarray(grey)
    ground = np.median([*pixels[0], *pixels[-1], *pixels[:, 0], *pixels[:, -1]])
    if grey.size != (width, height):
        pixels = np.asarray(fit(pillow, grey, int(ground), height, width, span))
    dark = 255 - pixels if ground > 127.5 else pixels
    return dark[..., None] / np.float32(255)


def read_colour(path: AnyPath, size: tuple[int, int]) -> np.ndarray:
    """The picture in a file in red, green and blue, bytes, resized and cut to a size (width,
    height)."""
    return decode_picture(path, partial(cut_colour, size))


def cut_colour(size: tuple[int, int], pillow: Any, image: Any) -> np.ndarray:
    """The middle of a picture in red, green and blue, as large as has the size's proportions."""
    rgb = as_rgb(pillow, image)
    scale = min(side / new for side, new in zip(rgb.size, size, strict=True))
    margins = [(side - new * scale) / 2 for side, new in zip(rgb.size, size, strict=True)]
    box = (*margins, *(side - margin for side, margin in zip(rgb.size, margins, strict=True)))
    return np.asarray(rgb.resize(size, pillow.Resampling.BILINEAR, box))


def make_grey(pillow: Any, image: Any) -> Any:
    """A picture's luminance (ITU-R BT.601) in 8 bits.

    What is transparent becomes black where what can be seen is light on the whole, else white.
    """
    if image.mode.startswith("I"):
        return in_bytes(pillow, image)
    rgba = image.convert("RGBA").reduce(max(1, min(image.size) // NEAR))
    opacity = np.asarray(rgba.getchannel("A")) + 1e-9
    light = np.average(np.asarray(rgba.convert("L")), weights=opacity)
    ground = pillow.new("RGBA", rgba.size, "black" if light > 127.5 else "white")
    return pillow.alpha_composite(ground, rgba).convert("L")


def fit(pillow: Any, grey: Any, ground: int, height: int, width: int, span: float) -> Any:
    """The picture, or its strokes over a share of the height or width, amid its ground.

    A new pixel is the mean of the area that it covers; a small picture is interpolated linearly.
    """
    strokes = grey.point(lambda value: 255 * (abs(value - ground) > 25)).getbbox()
    left, top, right, bottom = strokes or (0, 0, *grey.size)
    if max((right - left) / grey.width, (bottom - top) / grey.height) < 0.8 * span:
        grey = grey.crop((left, top, right, bottom))
    else:
        span = 1.0
    scale = span * min(height / grey.height, width / grey.width)
    columns, rows = max(1, round(grey.width * scale)), max(1, round(grey.height * scale))
    method = pillow.Resampling.BOX if scale < 1 else pillow.Resampling.BILINEAR
    fitted = pillow.new("L", (width, height), ground)
    resized = grey.resize((columns, rows), method)
    fitted.paste(resized, ((width - columns) // 2, (height - rows) // 2))
    return fitted
