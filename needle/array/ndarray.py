"""NDArray: shape, strides, dtype, device and memory. Storage and views; no arithmetic of its own.

An NDArray is a strided view on a Storage of one device: a form, and the address of its first
element. Views (reshape of a compact array, permute, broadcast, basic slices, flip) share the
Storage; `np.asarray`, `.numpy()`, the buffer protocol and DLPack share it too. Arithmetic between
NDArrays is that of needle.ops, which sets the operators. What devices compute with stands in
needle/backend.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from needle.array.form import Form, compact_form, compact_strides, form, form_of
from needle.array.memory import USAGE, Export, Storage, exporter, new_block
from needle.array.spec import Spec, as_shape, reshaped
from needle.backend.device import Device, default_device
from needle.dtype import DTYPES, INTEGERS, NAMES, DType, as_dtype, bfloat16, cast, float32
from needle.errors import expect


def unregistered(*args: Any, **kwargs: Any) -> NDArray:
    """Stands for a method that needle.ops has not set yet."""
    raise NotImplementedError("needle: import needle.ops first")


class Handle:
    """The memory behind an NDArray, as kernels that take addresses want it."""

    def __init__(self, array: NDArray) -> None:
        self.array = array

    @property
    def view(self) -> np.ndarray:
        return self.array.view

    def ptr(self) -> int:
        """The address of the memory's first element, the same for all views on it."""
        storage = self.array.storage
        return storage.block.ptr or address(storage.block.memory)

    def size(self) -> int:
        """How many elements the memory holds."""
        return self.array.storage.nbytes // self.array.dtype.itemsize


class NDArray:
    """A strided view on the memory of one device."""

    __array_priority__ = 1000
    __slots__ = ("__weakref__", "form", "ptr", "storage", "view")

    form: Form
    storage: Storage
    ptr: int  # of the first element; asked for at the first use where the memory is NumPy's
    view: np.ndarray  # made at the first use

    def __init__(self, array: Any, device: Device | None = None, dtype: Any = None) -> None:
        """Copy an array, a nested list or a number to device memory."""
        view = as_host(array, dtype)
        device = default_device() if device is None else device
        self.form = compact_form(device, view.shape, view.dtype)
        memory = empty(self.form)
        self.storage, self.ptr = memory.storage, memory.ptr
        self.view[...] = view

    @staticmethod
    def empty(spec: Spec, device: Device | None = None) -> NDArray:
        """An array of new memory, whose elements are whatever it holds."""
        return empty(compact_form(device or default_device(), spec.shape, spec.dtype))

    @staticmethod
    def at(source: NDArray, offset: int, form: Form) -> NDArray:
        """A view on another array's memory; offset: from its first element, in bytes."""
        array = NEW(NDArray)
        array.form = form
        array.storage = source.storage
        array.ptr = source.ptr + offset
        return array

    @staticmethod
    def wrap(view: np.ndarray, device: Device, sources: Sequence[NDArray] = ()) -> NDArray:
        """The NDArray of a NumPy array, which shares the Storage of the source that it looks into,
        if there is one. Elements that are not aligned are copied."""
        view = np.asarray(view) if view.flags.aligned else view.copy()
        array = NDArray.__new__(NDArray)
        array.form = form_of(view, device)
        array.view = view
        base = view.base
        storage = None if base is None else exporter(view)
        if storage is None:
            for source in sources:
                owner = source.storage.block.memory
                if owner is view or (base is not None and owner is base):
                    storage = source.storage
                    break
            else:
                storage = Storage.on(base if isinstance(base, np.ndarray) else view)
        array.storage = storage
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
        shape, device = as_shape("NDArray.make", shape), device or default_device()
        if handle is None:
            return NDArray.empty(Spec(shape, float32), device)
        size = handle.size()
        steps = compact_strides(shape) if strides is None else tuple(strides)
        reach = [(n - 1) * step for n, step in zip(shape, steps, strict=True) if 0 not in shape]
        first = offset + sum(each for each in reach if each < 0)
        last = offset + sum(each for each in reach if each > 0)
        received = f"expected a view inside {size} elements; received {first} to {last}"
        expect(0 <= first <= last < max(size, 1), f"NDArray.make: {received}")
        source, dtype = handle.array, handle.array.dtype
        seen = form(device, shape, tuple([step * dtype.itemsize for step in steps]), dtype)
        start = handle.ptr() + offset * dtype.itemsize
        return NDArray.at(source, start - source.ptr, seen)

    @staticmethod
    def compact_strides(shape: Sequence[int]) -> tuple[int, ...]:
        """The strides of a compact array of a shape, in elements."""
        return compact_strides(shape)

    # What it is

    @property
    def device(self) -> Device:
        return self.form.device

    @property
    def shape(self) -> tuple[int, ...]:
        return self.form.shape

    @property
    def strides(self) -> tuple[int, ...]:
        """The distance between neighbours along each axis, in elements; along axes of one element
        too, of which forms know nothing."""
        if not self.size:
            return self.form.strides
        return tuple([step // self.dtype.itemsize for step in self.view.strides])

    @property
    def dtype(self) -> DType:
        return self.form.dtype

    @property
    def spec(self) -> Spec:
        return self.form.spec

    @property
    def _handle(self) -> Handle:
        return Handle(self)

    def is_alone(self) -> bool:
        """Whether nobody else looks into the memory: no other array, and no NumPy array."""
        with suppress(AttributeError):  # where it was never exported
            if sys.getrefcount(object.__getattribute__(self, "view")) == 2:
                del self.view
        return not self.storage.is_foreign and sys.getrefcount(self.storage) == 2

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
        """What is found at its first use: view and ptr; and what NumPy's arrays have and this class
        does not write: size, flat, item, T, mean, ..."""
        if name == "view":
            self.view = export(self)
            return self.view
        if name == "ptr":
            self.ptr = address(self.view)
            return self.ptr
        if name.startswith("_") or name in NDArray.__slots__:
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
        return self.form.is_compact

    def compact(self) -> NDArray:
        """The array itself where it is compact, else a compact copy."""
        return self if self.is_compact() else self.copy()

    def copy(self) -> NDArray:
        """A compact copy."""
        return NDArray(self, self.device)

    def astype(self, dtype: Any) -> NDArray:
        """A copy in another dtype; floats to integers saturate, NaN gives 0."""
        return NDArray(self, self.device, dtype)

    def to(self, device: Device) -> NDArray:
        """The array on a device: itself where it is there already, else a copy."""
        return self if device is self.device else NDArray(self, device)

    def reshape(self, *shape: Any) -> NDArray:
        sizes = reshaped(self.shape, shape if len(shape) > 1 else shape[0])
        return self._view(self.view.reshape(sizes))

    def as_strided(self, shape: Sequence[int], strides: Sequence[int]) -> NDArray:
        """A view of any shape and strides, in elements, from this array's first element on."""
        start = self.ptr - self._handle.ptr()
        offset = start // self.dtype.itemsize
        return NDArray.make(shape, strides, self.device, self._handle, offset)

    def fill(self, value: Any) -> None:
        """Write one number into every element."""
        self[...] = value

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
        """Write into the array's memory, which its views share: what NumPy can broadcast, or (as in
        the course) an NDArray of as many elements, in row-major order."""
        index = as_views(index)
        if isinstance(value, NDArray):
            value, part = value.view, self.view[index]
            value = value.reshape(part.shape) if value.size == part.size else value
        self.view[index] = value

    # Arithmetic that is functions of needle.ops, which sets it (METHODS there)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __pow__ = __rpow__ = unregistered
    __truediv__ = __rtruediv__ = __matmul__ = __neg__ = unregistered
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = unregistered  # type: ignore[assignment]
    maximum = log = exp = tanh = sum = max = permute = broadcast_to = flip = pad = unregistered
    __hash__ = object.__hash__


def empty(form: Form) -> NDArray:
    """An array of a compact form on new memory. What every result of an op begins with: nothing is
    called here that can be written out."""
    try:
        block = form.pool.pop()
    except IndexError:
        block = new_block(form.pool, form.nbytes)
    storage = NEW(Storage)
    storage.block = block
    storage.nbytes = form.nbytes
    USAGE.live = live = USAGE.live + form.nbytes
    if live > USAGE.mark:
        USAGE.grow()
    array = NEW(NDArray)
    array.form = form
    array.storage = storage
    array.ptr = block.ptr
    return array


NEW: Any = object.__new__


def export(array: NDArray) -> np.ndarray:
    """A NumPy array on an NDArray's memory, which keeps it alive."""
    found = np.asarray(Export(array.storage, array.form.interface(array.ptr)))
    return found if found.dtype == array.form.dtype else found.view(array.form.dtype)


def address(view: np.ndarray) -> int:
    """Where a NumPy array's first element lies."""
    return view.ctypes.data


def as_views(x: Any) -> Any:
    """An argument in which NDArrays have become the NumPy arrays that share their memory."""
    if isinstance(x, (list, tuple)):
        return type(x)(map(as_views, x))
    return x.view if isinstance(x, NDArray) else x


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
            dtype = float32
        elif dtype is not None:
            check_bounds(found, as_dtype(dtype))
    if dtype is not None:
        if not is_numeric(found):
            raise TypeError(f"Tensor: expected real numbers; received an array of {found.dtype}")
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
    if not is_numeric(found):
        received = f"{type(array).__name__} of {found.dtype}"
        raise TypeError(f"Tensor: expected real numbers; received {received}")
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
