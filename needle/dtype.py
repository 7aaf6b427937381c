"""The dtypes of needle: NumPy dtype objects, plus ml_dtypes' bfloat16.

Every dtype in the package is one of DTYPES; `as_dtype` is where a user's spelling becomes one.
Promotion is NumPy's (NEP 50): Python scalars are weak, they never widen an array. Next:
array/spec.py.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

DType = np.dtype[Any]

float64: DType = np.dtype(np.float64)
float32: DType = np.dtype(np.float32)
float16: DType = np.dtype(np.float16)
bfloat16: DType = np.dtype(ml_dtypes.bfloat16)
int8: DType = np.dtype(np.int8)
int16: DType = np.dtype(np.int16)
int32: DType = np.dtype(np.int32)
int64: DType = np.dtype(np.int64)
uint8: DType = np.dtype(np.uint8)
bool_: DType = np.dtype(np.bool_)

FLOATS = frozenset({float64, float32, float16, bfloat16})
LOW_PRECISION = frozenset({float16, bfloat16})
INTEGERS = frozenset({int8, int16, int32, int64, uint8})
DTYPES = FLOATS | INTEGERS | {bool_}
NAMES = "float64, float32, float16, bfloat16, int8, int16, int32, int64, uint8, bool"


def as_dtype(dtype: Any) -> DType:
    """The dtype that a name ("float32"), a NumPy type or a dtype stands for; TypeError for any
    other."""
    if isinstance(dtype, np.dtype) and dtype in DTYPES:
        return dtype
    try:
        found = np.dtype(dtype).newbyteorder("=")
    except TypeError:
        raise TypeError(f"dtype: expected one of {NAMES}; received {dtype!r}") from None
    if found not in DTYPES:
        raise TypeError(f"dtype: expected one of {NAMES}; received {found}")
    return found


def cast(x: np.ndarray, dtype: DType) -> np.ndarray:
    """x in another dtype, x itself where it has it already.

    Floats to integers truncate and saturate, NaN gives 0. What becomes bfloat16 is float32 first.
    """
    if dtype in INTEGERS and x.dtype.kind not in "biu":
        return saturate(x, dtype)
    return x.astype(dtype, copy=False)


def saturate(x: np.ndarray, dtype: DType) -> np.ndarray:
    """Floats as integers: truncated, clipped to the dtype's range, NaN as 0."""
    bounds = np.iinfo(dtype)
    wide = np.trunc(x.astype(np.float64))
    inside = (wide >= bounds.min) & (wide < float(bounds.max) + 1)
    found = np.where(inside, wide, 0).astype(dtype)
    found = np.where(wide >= float(bounds.max) + 1, dtype.type(bounds.max), found)
    return np.where(wide < bounds.min, dtype.type(bounds.min), found)


def promote(name: str, *dtypes: DType) -> DType:
    """The dtype that holds all of dtypes, by NumPy's rules; `name` is the op that asks, for the
    error."""
    first = dtypes[0]
    if dtypes.count(first) == len(dtypes):
        return first
    try:
        found = np.result_type(*dtypes)
    except TypeError:
        found = None
    if found not in DTYPES:
        kinds = " and ".join(str(dtype) for dtype in dtypes)
        received = f"received {kinds}; convert one with .astype(...)"
        raise TypeError(f"{name}: expected dtypes that can mix; {received}")
    return found


def scalar_dtype(array: DType, scalar: bool | int | float) -> DType:
    """The dtype of an op between an array and a Python scalar: the array's, unless the scalar's
    kind is wider.

    bool < int < float, as in NumPy: float32 with 2.5 stays float32; int8 with 2.5 becomes float64;
    bool with 2, int64.
    """
    if array in FLOATS or isinstance(scalar, bool):
        return array
    if isinstance(scalar, float):
        return float64
    return int64 if array == bool_ else array
