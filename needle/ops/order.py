"""The order in which sums are added: a function of dtype, logical shape and axes alone.

Strides, fusion, threads and vector width never enter, so that a sum's bits are the same wherever it
is computed. Kernels follow the same rules (needle/compiler/emit.py); here they stand in NumPy.

- *trailing axes* (after axes of size 1 are dropped: a run that ends with the last axis): element i
  of a row goes to lane i mod LANES, in chunks of CHUNK elements; a lane is a chain from +0; lanes
  and then chunks are folded by halving.
- *other axes*: per output a chain from +0 over ROWS rows; the chains are folded by halving.
- of both kinds: first the trailing ones, then the others.
- *contractions*: K in segments of SEGMENT from 0, each one chain of fused multiply-adds from +0;
  the segments' sums are added in ascending order.

Folding by halving: x[i] + x[i + h] for h = half the length, rounded up, until one is left.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LANES = 32
CHUNK = 4096
ROWS = 256
SEGMENT = 256


def split_axes(
    shape: Sequence[int], axes: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Reduced axes as (trailing ones, others); axes of size 1, which need no adding, in neither."""
    kept = [axis for axis, size in enumerate(shape) if size != 1]
    trailing: list[int] = []
    while kept and kept[-1] in axes:
        trailing.append(kept.pop())
    return tuple(trailing[::-1]), tuple(axis for axis in kept if axis in axes)


def fold(parts: np.ndarray) -> np.ndarray:
    """The parts along the first axis, added by halving."""
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        rest = len(parts) - half
        parts = np.concatenate([parts[:rest] + parts[half:], parts[rest:half]])
    return parts[0]


def chain(rows: np.ndarray) -> np.ndarray:
    """The rows along the first axis, added one after the other from +0."""
    total = np.zeros(rows.shape[1:], rows.dtype)
    for row in rows:
        total = total + row
    return total


def sum_rows(x: np.ndarray) -> np.ndarray:
    """x summed over its last axis, by the rule of trailing axes."""
    chunks = []
    for start in range(0, max(x.shape[-1], 1), CHUNK):
        part = x[..., start : start + CHUNK]
        width = -(-part.shape[-1] // LANES) * LANES
        lanes = np.zeros((*x.shape[:-1], width), x.dtype)
        lanes[..., : part.shape[-1]] = part
        lanes = np.moveaxis(lanes.reshape(*x.shape[:-1], -1, LANES), (-2, -1), (0, 1))
        chunks.append(fold(chain(lanes)))
    return fold(np.stack(chunks))


def sum_columns(x: np.ndarray) -> np.ndarray:
    """x summed over its first axis, by the rule of other axes."""
    starts = range(0, max(len(x), 1), ROWS)
    return fold(np.stack([chain(x[start : start + ROWS]) for start in starts]))
