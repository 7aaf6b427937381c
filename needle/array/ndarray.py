"""NDArray: shape, strides, dtype, device and memory. Storage and views; no arithmetic of its own.

An NDArray is a strided view on a Storage of one device. Views (reshape of a compact array, permute,
broadcast, basic slices, flip) share the Storage; `np.asarray`, `.numpy()`, the buffer protocol and
DLPack share it too. Arithmetic between NDArrays is that of needle.ops, which sets the operators.
What devices compute with stands in needle/backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from needle.array.memory import Storage
from needle.array.spec import Spec, as_shape, reshaped
from needle.backend.device import Device, default_device
from needle.dtype import DTYPES, INTEGERS, NAMES, DType, as_dtype, bfloat16, cast
from needle.errors import expect


def unregistered(*args: Any, **kwargs: Any) -> NDArray:
    """Stands for a method that needle.ops has not set yet."""
    raise NotImplementedError("needle: import needle.ops first")


class Handle:
    """The memory behind an NDArray, as kernels that take addresses want it."""

    def __init__(self, view: np.ndarray) -> None:
        self.view = view

    def ptr(self) -> int:
        """The address of the memory's first element, the same for all views on it."""
        return self.memory().ctypes.data

    def memory(self) -> np.ndarray:
        """The array that owns the memory."""
        return self.view if self.view.base is None else self.view.base


class NDArray:
    """A strided view on the memory of one device."""

    __array_priority__ = 1000
    __slots__ = ("__weakref__", "device", "storage", "view")

    view: np.ndarray
    device: Device
    storage: Storage

    def __init__(self, array: Any, device: Device | None = None, dtype: Any = None) -> None:
        """Copy an array, a nested list or a number to device memory."""
        view = as_host(array, dtype)
        self.device = default_device() if device is None else device
        self.view = view.copy() if shares(view, array) else view
        self.storage = Storage(self.view)

    @staticmethod
    def wrap(view: np.ndarray, device: Device, sources: Sequence[NDArray] = ()) -> NDArray:
        """The NDArray of a view, which shares the Storage of the source that it looks into, if
        there is one."""
        array = NDArray.__new__(NDArray)
        array.view = view
        array.device = device
        base = view.base
        for source in sources:
            if source.view is view or (base is not None and source.storage.owner is base):
                array.storage = source.storage
                return array
        array.storage = Storage(base if isinstance(base, np.ndarray) else view)
        return array

    @staticmethod
    def make(
        shape: Sequence[int],
        strides: Sequence[int] | None = None,
        device: Device | None = None,
        handle: Handle | None = None,
        offset: int = 0,
    ) -> NDArray:
        """A float32 array of new memory, or a view on a handle's memory; strides and offset count
        elements."""
        shape = as_shape("NDArray.make", shape)
        if handle is None:
            return NDArray.wrap(np.empty(shape, np.float32), device or default_device())
        flat = handle.memory()
        steps = compact_strides(shape) if strides is None else tuple(strides)
        reach = [(n - 1) * step for n, step in zip(shape, steps, strict=True) if 0 not in shape]
        first = offset + sum(each for each in reach if each < 0)
        last = offset + sum(each for each in reach if each > 0)
        received = f"expected a view inside {flat.size} elements; received {first} to {last}"
        expect(0 <= first <= last < max(flat.size, 1), f"NDArray.make: {received}")
        size = flat.itemsize
        view = np.ndarray(shape, flat.dtype, flat, offset * size, [step * size for step in steps])
        return NDArray.wrap(view, device or default_device())

    # What it is

    @property
    def shape(self) -> tuple[int, ...]:
        return self.view.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """The distance between neighbours along each axis, in elements."""
        size = self.view.itemsize
        return tuple(step // size for step in self.view.strides)

    @property
    def dtype(self) -> DType:
        return self.view.dtype

    @property
    def spec(self) -> Spec:
        return Spec(self.view.shape, self.view.dtype)

    @property
    def _handle(self) -> Handle:
        return Handle(self.view)

    # Protocols

    def numpy(self) -> np.ndarray:
        """The same memory as a NumPy array."""
        return self.view

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.view, dtype=dtype, copy=copy)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        """NumPy's functions (np.sum, np.concatenate, ...) work on the views."""
        return function(*map(as_views, args), **{k: as_views(v) for k, v in kwargs.items()})

    def __getattr__(self, name: str) -> Any:
        """What NumPy's arrays have and this class does not write: size, flat, item, T, mean, ..."""
        if name.startswith("_") or name == "view":
            raise AttributeError(f"NDArray has no attribute {name!r}")
        return getattr(self.view, name)

    def __buffer__(self, flags: int) -> memoryview:
        return memoryview(self.view)  # type: ignore[arg-type]

    def __dlpack__(self, **options: Any) -> Any:
        if self.dtype == bfloat16:
            raise BufferError("DLPack: NumPy exports no bfloat16; use .astype('float32') first")
        return self.view.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.view.__dlpack_device__()

    def __reduce__(self) -> tuple[Any, ...]:
        return NDArray, (np.array(self.view, order="C"), self.device)

    def __len__(self) -> int:
        return len(self.view)

    def __iter__(self) -> Iterator[NDArray]:
        return (self[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        return bool(self.view)

    def __float__(self) -> float:
        return float(self.view.item())

    def __int__(self) -> int:
        return int(self.view.item())

    def __repr__(self) -> str:
        values = np.array2string(self.view, separator=", ", prefix="NDArray(", threshold=100)
        return f"NDArray({values}, device={self.device})"

    def __str__(self) -> str:
        return str(self.view)

    # Views and copies

    def _view(self, view: np.ndarray) -> NDArray:
        return NDArray.wrap(view, self.device, (self,))

    def is_compact(self) -> bool:
        """Whether the elements lie in row-major order without gaps."""
        return self.view.flags.c_contiguous

    def compact(self) -> NDArray:
        """The array itself where it is compact, else a compact copy."""
        return self if self.is_compact() else self._view(np.ascontiguousarray(self.view))

    def copy(self) -> NDArray:
        return self._view(self.view.copy())

    def astype(self, dtype: Any) -> NDArray:
        """A copy in another dtype; floats to integers saturate, NaN gives 0."""
        with np.errstate(all="ignore"):
            found = cast(self.view, as_dtype(dtype))
        return self._view(found.copy() if found is self.view else found)

    def to(self, device: Device) -> NDArray:
        """The array on a device: itself where it is there already, else a copy."""
        return self if device is self.device else NDArray(self.view, device)

    def reshape(self, *shape: Any) -> NDArray:
        sizes = reshaped(self.shape, shape if len(shape) > 1 else shape[0])
        return self._view(self.view.reshape(sizes))

    def process_slice(self, index: slice, dim: int) -> slice:
        """The slice with explicit start, stop and step; negative numbers count from the end."""
        start, stop, step = index.indices(self.shape[dim])
        return slice(start, stop, step)

    def __getitem__(self, index: Any) -> NDArray:
        items = as_views(index if isinstance(index, tuple) else (index,))
        if not any(item is Ellipsis for item in items):
            items = (*items, ...)  # so that integers alone give a view too
        return self._view(self.view[items])

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write into the array's memory, which its views share."""
        self.view[as_views(index)] = value.view if isinstance(value, NDArray) else value

    # Arithmetic that is functions of needle.ops, which sets it (METHODS there)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __pow__ = __rpow__ = unregistered
    __truediv__ = __rtruediv__ = __matmul__ = __neg__ = unregistered
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = unregistered  # type: ignore[assignment]
    maximum = log = exp = tanh = sum = max = permute = broadcast_to = flip = pad = unregistered
    __hash__ = object.__hash__


def as_views(x: Any) -> Any:
    """An argument in which NDArrays have become the NumPy arrays that share their memory."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(as_views, x))
    return x.view if isinstance(x, NDArray) else x


def compact_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def as_host(array: Any, dtype: Any = None) -> np.ndarray:
    """A NumPy array of a dtype of needle's, from whatever a user calls an array; numbers in lists
    become float32."""
    if isinstance(array, NDArray):
        array = array.view
    elif hasattr(array, "realize_cached_data"):
        array = array.realize_cached_data().view
    if isinstance(array, (np.ndarray, np.generic)) or hasattr(array, "__array__"):
        found = np.asarray(array)
    else:
        found = from_lists(array)
        if dtype is None and found.dtype != np.bool_ and not holds_arrays(array):
            dtype = np.float32
        elif dtype is not None:
            check_bounds(found, as_dtype(dtype))
    if dtype is not None:
        received = f"received an array of {found.dtype}"
        expect(is_numeric(found), f"Tensor: expected real numbers; {received}", TypeError)
        with np.errstate(all="ignore"):
            return cast(found, as_dtype(dtype))
    native = found.dtype.newbyteorder("=")
    if native not in DTYPES:
        received = f"received {found.dtype}; pass dtype=..."
        raise TypeError(f"Tensor: expected an array of {NAMES}; {received}")
    return found.astype(native, copy=False)


def from_lists(array: Any) -> np.ndarray:
    """A NumPy array from a number or nested lists of numbers, arrays or Tensors."""
    if isinstance(array, (list, tuple)):
        array = [each.numpy() if hasattr(each, "realize_cached_data") else each for each in array]
    try:
        found = np.asarray(array)
    except ValueError:
        raise ValueError("Tensor: expected lists of equal lengths; received ragged ones") from None
    received = f"{type(array).__name__} of {found.dtype}"
    expect(is_numeric(found), f"Tensor: expected real numbers; received {received}", TypeError)
    return found


def is_numeric(array: np.ndarray) -> bool:
    """Whether an array holds bools or real numbers, of a dtype of needle's or not."""
    return array.dtype.kind in "biuf" or array.dtype == bfloat16


def check_bounds(array: np.ndarray, dtype: DType) -> None:
    """Refuse integers that a user wrote down for a dtype that cannot hold them."""
    if dtype in INTEGERS and array.dtype.kind in "iu" and array.size:
        low, high = int(array.min()), int(array.max())
        if low < np.iinfo(dtype).min or high > np.iinfo(dtype).max:
            found = low if low < np.iinfo(dtype).min else high
            raise ValueError(f"Tensor: expected integers that fit {dtype}; received {found}")


def holds_arrays(array: Any) -> bool:
    """Whether a nested list ends in arrays or NumPy scalars, which have a dtype of their own to
    keep."""
    while isinstance(array, (list, tuple)):
        if not array:
            return False
        array = array[0]
    return hasattr(array, "dtype")


def shares(view: np.ndarray, array: Any) -> bool:
    """Whether a converted array still looks into memory that is the caller's."""
    fresh = isinstance(array, (list, tuple, int, float))
    return not fresh and np.may_share_memory(view, np.asarray(array))
