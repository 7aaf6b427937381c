"""Pictures in files, decoded by Pillow: nobody vouches for them.

In: a path. Out: what a function makes of the decoded picture; `read_colour` makes float32
(height, width, 3) in [0, 1]. Next: folder.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from needle.errors import expect
from needle.files import AnyPath, import_extra, reading

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
MOST_PIXELS = 64_000_000


def decode_picture(path: AnyPath, convert: Callable[[Any, Any], Any]) -> Any:
    """convert(PIL.Image, picture) of the picture in a file.

    FileError where the file cannot be decoded or has more than 64 million pixels,
    FileNotFoundError where there is none, ImportError without Pillow.
    """
    pillow = import_extra("PIL.Image", "data")
    message = f"{path}: expected a picture; received a path without a file"
    expect(Path(path).is_file(), message, FileNotFoundError)
    expected = f"a picture ({', '.join(FORMATS)}) of at most {MOST_PIXELS:,} pixels"
    # Pillow warns of many pixels, too, where the limit is lower here.
    with reading(path, expected), warnings.catch_warnings(action="ignore"):
        with pillow.open(path, formats=FORMATS) as image:
            expect(image.width * image.height <= MOST_PIXELS, f"a size of {image.size}")
            return convert(pillow, image)


def read_colour(path: AnyPath) -> np.ndarray:
    """The picture in a file as RGB, float32 (height, width, 3) in [0, 1], of whatever mode it is.

    Grey gives three equal channels; opacity is dropped. The errors of `decode_picture`.
    """
    pixels = decode_picture(path, lambda pillow, image: np.asarray(as_rgb(pillow, image)))
    return pixels / np.float32(255)


def as_rgb(pillow: Any, image: Any) -> Any:
    """A picture in 8 bits of red, green and blue."""
    return in_bytes(pillow, image).convert("RGB")


def in_bytes(pillow: Any, image: Any) -> Any:
    """A picture in 8 bits: one of 16, also where Pillow holds them in 32, as grey."""
    if not image.mode.startswith("I"):
        return image
    return pillow.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype(np.uint8))
