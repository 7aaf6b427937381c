"""Tensors on other libraries' memory: NumPy's by from_numpy, anybody's by DLPack."""

from __future__ import annotations

from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.autograd import Tensor
from needle.backend.device import default_device
from needle.dtype import DTYPES, NAMES
from needle.errors import expect


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor on a NumPy array's own memory: writing to one shows in the other. Requires no
    gradient."""
    if not isinstance(array, np.ndarray) or array.dtype not in DTYPES:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise TypeError(f"from_numpy: expected a NumPy array of {NAMES}; received {kind}")
    aligned = "from_numpy: expected aligned elements; received others; copy the array first"
    expect(array.flags.aligned, aligned)
    return Tensor.make_const(NDArray.wrap(array, default_device()))


def from_dlpack(x: Any) -> Tensor:
    """A tensor on the memory of another library's array in host memory (PyTorch, JAX, ...), by the
    DLPack protocol."""
    kind = type(x).__name__
    has = hasattr(x, "__dlpack__")
    expect(has, f"from_dlpack: expected an object with __dlpack__; received {kind}", TypeError)
    try:
        return from_numpy(np.from_dlpack(x))
    except (BufferError, RuntimeError) as error:
        received = f"received one that says: {error}"
        raise ValueError(f"from_dlpack: expected a CPU array of numbers; {received}") from None
