"""Devices: where arrays live and ops compute. The interface, and the table of what there is. Next:
numpy.py.

A device runs one op at a time: `run(op, arrays, spec) -> array`, where arrays are NDArrays on it
and spec is what `op.infer` said of the result.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


class Device:
    """A device; there is one object for each, so that devices compare by identity."""

    def __init__(self, name: str) -> None:
        self.name = name

    def enabled(self) -> bool:
        """Whether arrays can live here on this machine."""
        return True

    def run(self, op: Any, arrays: Sequence[Any], spec: Any) -> Any:
        """The value of an op, as an NDArray, or a tuple of them where spec is a tuple."""
        raise NotImplementedError(f"{self.name}: expected another device here; use ndl.cpu()")

    def plan(self, op: Any, arrays: Sequence[Any], spec: Any) -> Callable[..., Any]:
        """A function of arrays of the same forms as these that gives the value of an op."""
        return lambda *arrays: self.run(op, arrays, spec)

    # Host arrays with which initialisers begin, drawn from NumPy's global generator

    def rand(self, *shape: int, dtype: Any = "float32") -> np.ndarray:
        """Uniform numbers in [0, 1)."""
        return np.asarray(np.random.rand(*shape)).astype(dtype)

    def randn(self, *shape: int, dtype: Any = "float32") -> np.ndarray:
        """Numbers from the standard normal distribution."""
        return np.asarray(np.random.randn(*shape)).astype(dtype)

    def randb(self, *shape: int, p: float = 0.5, dtype: Any = "bool") -> np.ndarray:
        """True with probability p."""
        return np.asarray(np.random.rand(*shape) <= p).astype(dtype)

    def one_hot(self, n: int, i: Any, dtype: Any = "float32") -> np.ndarray:
        """Rows of the n x n identity matrix."""
        return np.eye(n, dtype=dtype)[np.asarray(i).astype(np.int64)]

    def empty(self, shape: Any, dtype: Any = "float32") -> np.ndarray:
        return np.empty(shape, dtype)

    def full(self, shape: Any, fill_value: float, dtype: Any = "float32") -> np.ndarray:
        return np.full(shape, fill_value, dtype)

    def zeros(self, *shape: int, dtype: Any = "float32") -> np.ndarray:
        return np.zeros(shape, dtype)

    def ones(self, *shape: int, dtype: Any = "float32") -> np.ndarray:
        return np.ones(shape, dtype)

    def __repr__(self) -> str:
        return f"{self.name}()"

    def __reduce__(self) -> tuple[Any, ...]:
        return find_device, (self.name,)

    def __deepcopy__(self, memo: Any) -> Device:
        return self


class Cuda(Device):
    """NVIDIA GPUs: named, so that code may ask for it, but without kernels so far."""

    def enabled(self) -> bool:
        return False


DEVICES: dict[str, Device] = {"cuda": Cuda("cuda")}


def find_device(name: str) -> Device:
    """The device of a name: "cpu", "cpu_numpy" or "cuda", with or without "()"."""
    found = DEVICES.get(name.removesuffix("()"))
    if found is None:
        raise ValueError(f"device: expected one of {', '.join(sorted(DEVICES))}; received {name!r}")
    return found


def cpu() -> Device:
    """The default device; with NEEDLE_BACKEND=np the reference device stands in for it."""
    return default_device()


def cpu_numpy() -> Device:
    """The reference device: every op as its definition in NumPy."""
    return DEVICES["cpu_numpy"]


def cuda() -> Device:
    """An NVIDIA GPU; `.enabled()` tells whether there is one that needle can use."""
    return DEVICES["cuda"]


def all_devices() -> list[Device]:
    """Every device that needle knows, usable on this machine or not."""
    return [find_device(name) for name in ("cpu", "cuda", "cpu_numpy")]


def default_device() -> Device:
    """Where arrays live unless told otherwise: NEEDLE_BACKEND chooses the compiled device (nd, the
    default) or the reference device (np)."""
    backend = os.environ.get("NEEDLE_BACKEND", "nd")
    if backend not in ("np", "nd"):
        raise ValueError(f"NEEDLE_BACKEND: expected np or nd; received {backend!r}")
    return DEVICES["cpu_numpy" if backend == "np" else "cpu"]
