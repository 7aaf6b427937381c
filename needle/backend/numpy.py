"""The reference device: an op is computed by its own `compute`, on NumPy arrays. Next: compiled.py.

IEEE 754 is the rule: overflow, division by zero and invalid operations give infinities and NaNs,
without warnings. float16 and bfloat16 are computed in float32 and rounded once per op.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.backend.device import DEVICES, Device
from needle.dtype import LOW_PRECISION
from needle.errors import expect


class Quiet(threading.local):
    """A context, one per thread, in which NumPy does not warn. Entering it costs 0.3 us,
    np.errstate 1.7 us."""

    def __init__(self) -> None:
        self.context = contextvars.Context()
        self.context.run(np.seterr, all="ignore")


QUIET = Quiet()


class NumpyDevice(Device):
    """A device that computes on NumPy arrays in host memory."""

    __tile_size__ = 8  # rows and columns of a tile of `matmul_tiled`

    def run(self, op: Any, arrays: Sequence[NDArray], spec: Any) -> Any:
        found = compute(op, [array.view for array in arrays], spec)
        if type(found) is tuple:
            return tuple([NDArray.wrap(each, self, arrays) for each in found])
        return NDArray.wrap(found, self, arrays)

    def matmul_tiled(self, a: Any, b: Any, out: Any, m: int, n: int, p: int) -> None:
        """out = a @ b, of sizes (m, n) and (n, p), written in place (the course's name).

        a, b, out: handles of compact arrays that hold a matrix tile by tile, (rows / t, columns /
        t, t, t) with t = `__tile_size__`, which must divide m, n and p.
        """
        t = self.__tile_size__
        received = f"expected sizes that {t} divides; received {m}, {n}, {p}"
        expect(not (m % t or n % t or p % t), f"matmul_tiled: {received}")
        left = a.view.reshape(m // t, n // t, t, t)
        right = b.view.reshape(n // t, p // t, t, t)
        np.einsum("mnij,npjk->mpik", left, right, out=out.view.reshape(m // t, p // t, t, t))


def compute(op: Any, views: Sequence[np.ndarray], spec: Any) -> Any:
    """An op's value by its own definition: a NumPy array, or a tuple of them. spec is what `infer`
    said, None for a user's own op."""
    if not op.is_builtin or op.rounds_itself:
        found = op.compute(*views)
    elif op.moves or not rounds(views, spec):
        found = QUIET.context.run(op.compute, *views)
    else:
        return QUIET.context.run(compute_widened, op, views, spec)
    return found if type(found) is np.ndarray else as_views(found)


def as_views(found: Any) -> Any:
    """NumPy arrays from what else a `compute` may return: a NumPy scalar, an NDArray, a number, a
    tuple of those."""
    if isinstance(found, (tuple, list)):
        return tuple(map(as_views, found))
    return np.asarray(found)


def rounds(views: Sequence[np.ndarray], spec: Any) -> bool:
    """Whether an op reads or writes a dtype that is computed in float32."""
    if type(spec) is not tuple and spec.is_low_precision:
        return True
    return any(view.dtype in LOW_PRECISION for view in views)


def compute_widened(op: Any, views: Sequence[np.ndarray], spec: Any) -> Any:
    """Compute in float32 and round once."""
    wide = [view.astype(np.float32) if view.dtype in LOW_PRECISION else view for view in views]
    found, many = op.compute(*wide), type(spec) is tuple
    pairs = zip(found if many else (found,), spec if many else (spec,), strict=True)
    rounded = tuple(np.asarray(each).astype(part.dtype, copy=False) for each, part in pairs)
    return rounded if many else rounded[0]


DEVICES["cpu_numpy"] = NumpyDevice("cpu_numpy")
