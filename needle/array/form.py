"""Form: all of an array but its values: device, shape, strides, dtype. Next: ndarray.py.

Forms are interned: equal ones are one object, and whatever was decided for the forms of an op's
operands is found again by their identities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from needle.array.memory import Pool, pool_of
from needle.array.spec import Spec
from needle.backend.device import Device
from needle.dtype import DType


class Form:
    """How an array lies in its device's memory, seen from its first element."""

    __slots__ = (
        "__weakref__", "device", "dtype", "is_compact", "is_float", "nbytes", "pool", "shape",
        "size", "spec", "steps", "strides",
    )  # fmt: skip

    device: Device
    shape: tuple[int, ...]
    steps: tuple[int, ...]  # between neighbours along each axis, in bytes
    strides: tuple[int, ...]  # in elements
    dtype: DType
    spec: Spec
    size: int  # in elements
    nbytes: int  # of a compact copy
    is_compact: bool  # in row-major order without gaps
    is_float: bool
    pool: Pool  # of free blocks for a compact copy

    def __init__(self, device: Device, shape: tuple[int, ...], steps: Any, dtype: DType) -> None:
        self.device, self.shape, self.dtype = device, shape, dtype
        self.spec = Spec(shape, dtype)
        self.size, self.nbytes = self.spec.size, self.spec.nbytes
        self.is_float = self.spec.is_float
        self.is_compact = steps is None
        strides = compact_strides(shape)
        self.steps = tuple([n * dtype.itemsize for n in strides]) if steps is None else steps
        self.strides = tuple([step // dtype.itemsize for step in self.steps])
        self.pool = pool_of(self.nbytes)

    @property
    def compact(self) -> Form:
        """The form of a compact copy."""
        return self if self.is_compact else compact_form(self.device, self.shape, self.dtype)

    def spread(self, shape: tuple[int, ...]) -> Form:
        """The form broadcast to a shape."""
        if shape == self.shape:
            return self
        new = (0,) * (len(shape) - len(self.shape))
        pairs = zip(self.shape, self.steps, strict=True)
        steps = (*new, *(0 if size == 1 else step for size, step in pairs))
        return form(self.device, shape, steps, self.dtype)

    def interface(self, ptr: int) -> dict[str, Any]:
        """NumPy's description of an array of this form at an address.

        Where elements share memory it cannot be written. NumPy writes no bfloat16 in it.
        """
        dtype = self.dtype.str if self.dtype.kind != "V" else "<u2"
        axes = zip(self.shape, self.steps, strict=True)
        shared = not self.is_compact and any(step == 0 and n > 1 for n, step in axes)
        return {
            "version": 3, "shape": self.shape, "typestr": dtype, "data": (ptr, shared),
            "strides": None if self.is_compact else self.steps,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"Form({self.spec}, strides={self.strides}, device={self.device})"


FORMS: dict[tuple[Any, ...], Form] = {}


def compact_form(device: Device, shape: tuple[int, ...], dtype: DType) -> Form:
    """The form of new arrays."""
    found = FORMS.get((device, shape, dtype))
    return remember((device, shape, dtype), None) if found is None else found


def form(device: Device, shape: tuple[int, ...], steps: tuple[int, ...], dtype: DType) -> Form:
    """The form of arrays with given steps, in bytes; those along axes of one element count as
    compact."""
    found = FORMS.get((device, shape, dtype, steps))
    if found is None:
        found = compact_form(device, shape, dtype)
        axes = zip(shape, steps, found.steps, strict=True)
        if found.size and not all(n == 1 or step == least for n, step, least in axes):
            found = remember((device, shape, dtype, steps), steps)
        else:
            FORMS[device, shape, dtype, steps] = found
    return found


def remember(key: tuple[Any, ...], steps: tuple[int, ...] | None) -> Form:
    if len(FORMS) >= 1 << 16:
        FORMS.clear()  # forms then are new objects: plans are made anew
    return FORMS.setdefault(key, Form(key[0], key[1], steps, key[2]))


def form_of(view: np.ndarray, device: Device) -> Form:
    """The form of a NumPy array."""
    if view.flags.c_contiguous:
        return compact_form(device, view.shape, view.dtype)
    return form(device, view.shape, view.strides, view.dtype)


def compact_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return tuple(strides[::-1])
