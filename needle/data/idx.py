"""IDX files (LeCun, Cortes and Burges, "The MNIST database", 1998), gzipped or plain.

    offset 0        00 00 08 n     unsigned bytes along n axes
    offset 4        n sizes        32 bits each, big-endian
    offset 4 + 4n   the bytes      in row-major order, then the file ends

In: a path. Out: a uint8 array. Nothing is allocated because a header says so: what it claims is
first compared with what a file of this length can hold, then memory grows with the bytes that are
really there. Next: images.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

from needle.errors import expect

AnyPath = str | os.PathLike[str]
Pair = tuple[np.ndarray, np.ndarray]
Failure = Callable[[int, str, str], ValueError]

DEFLATE = 1032  # no deflate stream grows by more (RFC 1951)
CHUNK = 1 << 20
LIMIT = 1 << 31


def read_idx(path: AnyPath, ndim: int, *, op: str = "read_idx") -> np.ndarray:
    """The uint8 array of an IDX file with `ndim` axes, gzipped or plain; at most 2 GiB.

    ValueError (file, offset, expectation) where the file is of another kind, truncated, damaged, or
    its header claims what it does not hold; OSError where it cannot be read.
    """
    import gzip  # costs a millisecond, which importing needle need not pay
    import zlib

    data = bytearray()  # all that was read so far

    def failure(at: int, expected: str, received: str) -> ValueError:
        where = f"at offset {at} of {path}"
        return ValueError(f"{op}: expected {expected} {where}; received {received}")

    try:
        with open(path, "rb") as file:
            room = os.fstat(file.fileno()).st_size
            gzipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if not gzipped:
                return parse(file, room, ndim, data, failure)
            with gzip.GzipFile(fileobj=file) as stream:
                return parse(stream, DEFLATE * room, ndim, data, failure)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise failure(len(data), "whole gzip data", f"truncated or damaged: {error}") from None
    except OSError as error:
        message = f"{op}: expected an IDX file at {path}; received: {error.strerror}"
        raise type(error)(message) from None


def parse(stream: Any, room: int, ndim: int, data: bytearray, failure: Failure) -> np.ndarray:
    """The array in a stream of at most `room` bytes, which are collected in `data`."""

    def read_until(end: int, what: str) -> None:
        while missing := end - len(data):
            chunk = stream.read(min(CHUNK, missing))
            if not chunk:
                received = "the end of the data: the file is truncated"
                raise failure(len(data), f"{missing} more bytes of {what}", received)
            data.extend(chunk)

    read_until(4, "the IDX header")
    if data != bytes((0, 0, 8, ndim)):
        expected = f"the IDX magic 000008{ndim:02x} (unsigned bytes, {ndim} axes)"
        raise failure(0, expected, data.hex())
    header = 4 + 4 * ndim
    read_until(header, "the IDX header")
    shape = tuple(np.frombuffer(data, ">u4", offset=4).tolist())
    size, most = math.prod(shape), min(room, LIMIT)
    if size > most:
        received = f"{shape}, which needs {size}: the file is truncated or its header forged"
        raise failure(4, f"sizes for at most {most} bytes of data", received)
    read_until(header + size, "data")
    if stream.read(1):  # here gzip compares its checksum, too
        raise failure(len(data), "the end of the data", "trailing bytes")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_images_and_labels(images: AnyPath, labels: AnyPath, *, op: str) -> Pair:
    """uint8 (n, rows, columns) and (n,) of two IDX files; ValueError where counts differ."""
    x, y = read_idx(images, 3, op=op), read_idx(labels, 1, op=op)
    received = f"{len(x)} images in {images} and {len(y)} labels in {labels}"
    expect(len(x) == len(y), f"{op}: expected one label per image; received {received}")
    return x, y


def parse_mnist(image_filename: AnyPath, label_filename: AnyPath) -> Pair:
    """The course's reader: X, float32 (n, rows * columns) in [0, 1], and y, uint8 (n,).

    Errors: those of `read_idx`, and ValueError where the files count differently.
    """
    x, y = read_images_and_labels(image_filename, label_filename, op="parse_mnist")
    flat = x.reshape(len(x), math.prod(x.shape[1:]))
    return np.divide(flat, 255, dtype=np.float32), y
