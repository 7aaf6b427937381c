"""The course's array module, `from needle import backend_ndarray as nd`: NDArray and its functions.

In: arrays, lists and numbers. Out: NDArrays, float32 unless told otherwise. Functions share memory
where the array's own methods do (reshape, broadcast_to, flip). Next: backend_selection.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.array.spec import as_shape
from needle.backend.device import Device, all_devices, cpu, cpu_numpy, cuda, default_device
from needle.dtype import as_dtype, float32

BackendDevice = Device


def array(a: Any, dtype: Any = "float32", device: Device | None = None) -> NDArray:
    """A copy of an array, a nested list or a number."""
    return NDArray(a, device, float32 if dtype is None else dtype)


def empty(shape: Any, dtype: Any = "float32", device: Device | None = None) -> NDArray:
    """An array whose elements are whatever its memory holds."""
    kind = float32 if dtype is None else as_dtype(dtype)
    return NDArray.wrap(np.empty(as_shape("empty", shape), kind), device or default_device())


def full(
    shape: Any, fill_value: float, dtype: Any = "float32", device: Device | None = None
) -> NDArray:
    """An array filled with a number."""
    kind = float32 if dtype is None else as_dtype(dtype)
    view = np.full(as_shape("full", shape), fill_value, kind)
    return NDArray.wrap(view, device or default_device())


def function_of(name: str) -> Callable[..., NDArray]:
    """A method of NDArray as a function, which takes lists and numbers too."""

    def run(a: Any, *args: Any, **kwargs: Any) -> NDArray:
        return getattr(a if isinstance(a, NDArray) else NDArray(a), name)(*args, **kwargs)

    run.__doc__ = f"a.{name}(...) of an NDArray, or of what becomes one."
    return run


broadcast_to, reshape, flip = map(function_of, ("broadcast_to", "reshape", "flip"))
maximum, log, exp, tanh = map(function_of, ("maximum", "log", "exp", "tanh"))
sum, max = map(function_of, ("sum", "max"))  # noqa: A001 - NumPy's names
