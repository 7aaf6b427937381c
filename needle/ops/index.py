"""Indexing, choosing, ordering: getitem, take, gather, scatter-add, one-hot, tril and triu, sort.
Next: composite.py.

All reading by index is one op, Gather: integer arrays that index a run of axes. Its gradient is
ScatterAdd, and the other way round; both add in source order. IndexCopy writes along an axis.
Indices out of range raise IndexError; negative ones count from the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.array.spec import Spec, as_axis, broadcast_shapes
from needle.autograd import MODE, Tensor, TensorOp, mode, primitive
from needle.dtype import FLOATS, INTEGERS, as_dtype, bool_, float32, int64
from needle.errors import expect
from needle.ops.elementwise import Operand, as_tensor, astype, equal, rule, where
from needle.ops.movement import Slice, flip, on_axis, reshape, split, widen, without


def check_range(name: str, indices: Sequence[np.ndarray], sizes: Sequence[int]) -> None:
    """IndexError where an index lies outside [-size, size)."""
    for index, size in zip(indices, sizes, strict=False):
        check_between(words(name, size), index, -size, size)


def check_between(
    text: str, index: np.ndarray, low: int, high: int, error: type[Exception] = IndexError
) -> None:
    """The error, which begins with a text, where an index lies outside [low, high)."""
    if index.size and (int(index.min()) < low or int(index.max()) >= high):
        raise error(f"{text}; received {index[(index < low) | (index >= high)].flat[0]}")


def words(name: str, size: int) -> str:
    """What an index should have been."""
    return f"{name}: expected indices below {size}"


def gathered(x: Spec, indices: Sequence[Spec], axis: int) -> tuple[int, ...]:
    """The shape of x's elements at indices of neighbouring axes."""
    stop = axis + len(indices)
    fits = stop <= x.ndim and all(index.dtype in INTEGERS for index in indices)
    axes = f"axes of {x.shape} from {axis}; received {indices}"
    expect(fits, f"gather: expected integer indices for {axes}", IndexError)
    return (*x.shape[:axis], *indices[0].shape, *x.shape[stop:])


@primitive
class Gather(TensorOp):
    """y = x[:, ..., i, j, ...]: integer arrays of one shape index neighbouring axes from `axis` on;
    dx = dy added into zeros at the same places"""

    axis: int

    def infer(self, x: Spec, *indices: Spec) -> Spec:
        return x.with_shape(gathered(x, indices, self.axis))

    def compute(self, x: np.ndarray, *indices: np.ndarray) -> np.ndarray:
        check_range("gather", indices, x.shape[self.axis :])
        if len(indices) == 1:
            return x.take(indices[0], self.axis, mode="wrap")
        return x[(slice(None),) * self.axis + indices]

    def gradient(self, out_grad: Tensor, node: Tensor) -> tuple[Tensor | None, ...]:
        x, *indices = node.inputs
        with mode(lazy=MODE.lazy or x.by_rows):  # by rows: what is added may never be asked for
            grad = ScatterAdd(self.axis, x.shape)(out_grad, *indices)
        return grad, *(None for _ in indices)


@primitive
class ScatterAdd(TensorOp):
    """y = zeros of a shape; then y[:, ..., i, j, ...] += x, in the order of x's elements;
    dx = dy gathered"""

    axis: int
    shape: tuple[int, ...]

    def infer(self, x: Spec, *indices: Spec) -> Spec:
        shape = gathered(x.with_shape(self.shape), indices, self.axis)
        expect(x.shape == shape, f"scatter_add: expected x of shape {shape}; received {x.shape}")
        return x.with_shape(self.shape)

    def compute(self, x: np.ndarray, *indices: Any) -> np.ndarray:
        check_range("scatter_add", indices, self.shape[self.axis :])
        found = np.zeros(self.shape, x.dtype)
        np.add.at(found, (slice(None),) * self.axis + indices, x)
        return found

    def gradient(self, out_grad: Tensor, node: Tensor) -> tuple[Tensor | None, ...]:
        _, *indices = node.inputs
        return Gather(self.axis)(out_grad, *indices), *(None for _ in indices)


@primitive
class Checked(TensorOp):
    """y = indices of `size` rows, int64; IndexError, that begins with `who`, for others. wraps:
    negative ones count from the end, else they are refused. ignored: passes as it is. is_value:
    ValueError instead."""

    who: str
    size: int
    wraps: bool = False
    ignored: int | None = None
    is_value: bool = False

    def infer(self, index: Spec) -> Spec:
        return index.with_dtype(int64)

    @property
    def words(self) -> str:
        return words(self.who, self.size) if self.wraps else f"{self.who} from 0 to {self.size - 1}"

    def compute(self, index: np.ndarray) -> np.ndarray:
        passes = index == self.ignored  # nothing equals None
        low, counted = -self.size if self.wraps else 0, np.where(passes, 0, index)
        check_between(
            self.words, counted, low, self.size, ValueError if self.is_value else IndexError
        )
        wrapped = np.where(counted < 0, counted + self.size, counted)
        return np.where(passes, index, wrapped).astype(int64)

    gradient = rule(None)


@primitive
class IndexCopy(TensorOp):
    """y = x; then y[:, ..., i] = z along an axis, in the order of indices, the last of equal ones
    counting; dx = dy, 0 at these places; dz = dy gathered, 0 where it was written over"""

    axis: int

    def infer(self, x: Spec, source: Spec, index: Spec) -> Spec:
        wanted = x.with_shape(gathered(x, [index], self.axis))
        fits = index.ndim == 1 and source == wanted
        words = f"a list of indices and a source {wanted}; received {index} and {source}"
        expect(fits, f"index_copy: expected {words}")
        return x

    def compute(self, x: np.ndarray, source: np.ndarray, index: np.ndarray) -> np.ndarray:
        check_range("index_copy", [index], x.shape[self.axis :])
        found = x.copy()
        rows, sources = (np.moveaxis(each, self.axis, 0) for each in (found, source))
        for place, row in enumerate(index):
            rows[row] = sources[place]
        return found

    def gradient(self, out_grad: Tensor, node: Tensor) -> tuple[Tensor | None, ...]:
        x, source, index = node.inputs
        last = last_places(index, x.shape[self.axis])
        kept = reshape(equal(last, places_of(index)), (-1, *[1] * (x.ndim - self.axis - 1)))
        below = where(kept, Gather(self.axis)(out_grad, index), 0.0)
        zero = widen(as_tensor(np.zeros((), source.dtype), source), source.shape)
        return self(out_grad, zero, index), below, None


def places_of(index: Tensor) -> Tensor:
    return as_tensor(np.arange(len(index)), index)


def last_places(index: Tensor, rows: int) -> Tensor:
    """For each of a list of indices of rows, the place of the last one equal to it."""
    none = widen(as_tensor(np.zeros((), np.int64), index), (rows,))
    return Gather(0)(IndexCopy(0)(none, places_of(index), index), index)


def index_copy(x: Operand, axis: int, index: Operand, source: Operand) -> Tensor:
    """x with x[..., index[i], ...] = source[..., i, ...] along an axis: as torch.index_copy, but of
    equal indices the last one counts, and x stays as it is."""
    x, axis = on_axis("index_copy", x, axis)
    return IndexCopy(axis)(
        x, astype(as_tensor(source, x), x.dtype), as_indices("index_copy", index, x)
    )


def as_indices(name: str, index: Operand, like: Tensor | None = None) -> Tensor:
    """Indices as an integer tensor; floats without a fraction are accepted, as in the course."""
    found = as_tensor(index if hasattr(index, "shape") else np.asarray(index), like)
    if found.dtype in INTEGERS:
        return found
    fits = found.dtype in FLOATS and is_whole(found)
    expect(fits, f"{name}: expected integer indices; received {found.dtype}", TypeError)
    return astype(found, int64)


def is_whole(x: Tensor) -> bool:
    """Whether floats have no fractions, as far as is known before they are computed."""
    return x.cached_data is None or bool((np.trunc(x.numpy()) == x.numpy()).all())


def take(x: Operand, indices: Operand, axis: int = 0) -> Tensor:
    """The slices of x at indices along an axis: y has the indices' shape in place of the axis (an
    embedding's rows)."""
    x, axis = on_axis("take", x, axis)
    return Gather(axis)(x, as_indices("take", indices, x))


def along_axis(name: str, x: Operand, axis: int, index: Operand) -> tuple[Tensor, list[Tensor]]:
    """x as a Tensor, and index arrays that pair each element of `index` with its own place on all
    other axes."""
    x, axis = on_axis(name, x, axis)
    index = as_indices(name, index, x)
    inside, limit = without(index.shape, [axis]), without(x.shape, [axis])
    fits = index.ndim == x.ndim and all(map(int.__le__, inside, limit))
    bounds = f"within {x.shape} but for axis {axis}; received {index.shape}"
    expect(fits, f"{name}: expected an index of {x.ndim} axes {bounds}")
    grids = enumerate(np.indices(index.shape))
    return x, [index if place == axis else as_tensor(grid, x) for place, grid in grids]


def gather(x: Operand, axis: int, index: Operand) -> Tensor:
    """y[i, j, ...] = x[i, index[i, j, ...], ...]: as torch.gather; index has x's number of axes."""
    x, indices = along_axis("gather", x, axis, index)
    return Gather(0)(x, *indices)


def scatter_add(x: Operand, axis: int, index: Operand, source: Operand) -> Tensor:
    """x with x[i, index[i, j, ...], ...] += source[i, j, ...]: as torch.scatter_add, but x stays as
    it is."""
    x, indices = along_axis("scatter_add", x, axis, index)
    source, shape = astype(as_tensor(source, x), x.dtype), indices[0].shape
    part = source[tuple(map(slice, shape))] if source.ndim == x.ndim else source
    shapes = f"{shape}; received {source.shape}"
    expect(part.shape == shape, f"scatter_add: expected a source of shape {shapes}")
    return x + ScatterAdd(0, x.shape)(part, *indices)


# x[...]


def getitem(x: Tensor, index: Any) -> Tensor:
    """x[index], as in NumPy: integers, slices, None, ..., integer arrays, boolean masks."""
    items = list(index) if isinstance(index, tuple) else [index]
    ndim = x.ndim
    if len(items) <= ndim and all([type(item) in (int, slice) for item in items]):
        return basic_index(x, items)
    if isinstance(index, Tensor) and index.dtype in INTEGERS and ndim:
        return Gather(0)(x, index)
    items = [as_item(item, x) for item in items]
    items = expand_masks(expand_ellipsis(items, x), x)
    if not any(isinstance(item, Tensor) for item in items):
        return basic_index(x, items)
    items = [as_tensor(np.asarray(item), x) if isinstance(item, int) else item for item in items]
    plain = [slice(None) if isinstance(item, Tensor) else item for item in items]
    return advanced_index(basic_index(x, plain), items)


def as_item(item: Any, x: Tensor) -> Any:
    """One index as an int, a slice, None, ... or a Tensor of integers or bools."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return item
    if isinstance(item, (int, np.integer)) and not isinstance(item, bool):
        return int(item)
    if isinstance(item, (list, tuple, range)):
        item = np.asarray(item)
    fits = isinstance(item, (np.ndarray, NDArray, Tensor))
    kinds = f"an integer, a slice, None, ... or an array; received {type(item).__name__}"
    expect(fits, f"getitem: expected {kinds}", IndexError)
    found = as_tensor(item, x)
    return found if found.dtype == bool_ else as_indices("getitem", found, x)


def is_mask(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype == bool_


def expand_ellipsis(items: list[Any], x: Tensor) -> list[Any]:
    """The same index with a whole slice for each axis that '...' stands for, or that no item
    reaches."""
    dots = items.count(Ellipsis)
    place = items.index(Ellipsis) if dots else len(items)
    used = sum(item.ndim if is_mask(item) else item not in (None, Ellipsis) for item in items)
    if dots > 1 or used > x.ndim:
        most = f"{x.ndim} indices for shape {x.shape} and one '...'"
        raise IndexError(f"getitem: expected at most {most}; received {used} and {dots}")
    return [*items[:place], *[slice(None)] * (x.ndim - used), *items[place + 1 :]]


def expand_masks(items: list[Any], x: Tensor) -> list[Any]:
    """Boolean masks as the integer arrays of their true places."""
    found: list[Any] = []
    for item in items:
        if not is_mask(item):
            found.append(item)
            continue
        axis = sum(each is not None for each in found)
        shape = x.shape[axis : axis + item.ndim]
        fits, kinds = item.ndim and item.shape == shape, f"{shape}; received {item.shape}"
        expect(fits, f"getitem: expected a mask of shape {kinds}", IndexError)
        found += [as_tensor(each, x) for each in np.nonzero(item.numpy())]
    return found


def basic_index(x: Tensor, items: list[Any]) -> Tensor:
    """x indexed by integers, slices and Nones; whole along the axes that none is left for."""
    sizes = x.shape
    ranges: list[tuple[int, int, int]] = []
    shape: list[int] = []
    for item in items:
        if item is None:
            shape.append(1)
            continue
        size = sizes[len(ranges)]
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            shape.append(len(range(start, stop, step)))
            ranges.append((start, shape[-1], step))
        elif -size <= item < size:
            ranges.append((item % size, 1, 1))
        else:
            below = f"below {size} for axis {len(ranges)}; received {item}"
            raise IndexError(f"getitem: expected an index {below}")
    rest = sizes[len(ranges) :]
    shape += rest
    if any([each != (0, size, 1) for each, size in zip(ranges, sizes, strict=False)]):
        ranges += [(0, size, 1) for size in rest]
        x = Slice(tuple(ranges))(x)
    return x if x.shape == tuple(shape) else reshape(x, shape)


def advanced_index(x: Tensor, items: list[Any]) -> Tensor:
    """x indexed by integer arrays on some axes: they broadcast, and stand first where they are not
    neighbours."""
    axes = [axis for axis, item in enumerate(items) if isinstance(item, Tensor)]
    shape = broadcast_shapes("getitem", *(items[axis].shape for axis in axes))
    first = axes[0]
    if axes[-1] - first >= len(axes):
        x, first = x.permute([*axes, *without(range(x.ndim), axes)]), 0
    return Gather(first)(x, *(widen(items[axis], shape) for axis in axes))


# Constants by index


def one_hot(indices: Operand, num_classes: int, dtype: Any = float32) -> Tensor:
    """Rows of the identity matrix: y[..., j] = 1 where j = indices[...], else 0."""
    index = as_indices("one_hot", indices)
    index = Checked("one_hot: expected labels", num_classes)(index)
    classes = as_tensor(np.arange(num_classes, dtype=index.dtype), index)
    return astype(equal(index.reshape((*index.shape, 1)), classes), as_dtype(dtype))


def arange(start: float, stop: float | None = None, step: float = 1, **placement: Any) -> Tensor:
    """start, start + step, ... below stop; integers give int64, floats float32; device and dtype by
    name."""
    start, stop = (0, start) if stop is None else (start, stop)
    expect(step != 0, "arange: expected a step other than 0; received 0")
    return constant(np.arange(start, stop, step), **placement)


def linspace(start: float, stop: float, num: int = 50, **placement: Any) -> Tensor:
    """num numbers from start to stop, both included, at equal distances; device and dtype by
    name."""
    expect(num >= 0, f"linspace: expected at least 0 numbers; received {num}")
    return constant(np.linspace(start, stop, num), **placement)


def eye(rows: int, columns: int | None = None, **placement: Any) -> Tensor:
    """The identity matrix; device and dtype by name."""
    return constant(np.eye(rows, columns), **placement)


def constant(values: np.ndarray, device: Any = None, dtype: Any = None) -> Tensor:
    """Values as a Tensor: integers as int64, others as float32, unless a dtype is given."""
    kind = int64 if values.dtype in INTEGERS else float32
    return Tensor(values, device=device, dtype=dtype or kind, requires_grad=False)


def lower_mask(name: str, x: Operand, diagonal: int) -> Tensor:
    """Where the lower triangles of the last two axes are."""
    x = as_tensor(x)
    expect(x.ndim > 1, f"{name}: expected at least 2 axes; received shape {x.shape}")
    return as_tensor(np.tri(x.shape[-2], x.shape[-1], diagonal, dtype=bool), x)


def tril(x: Operand, diagonal: int = 0) -> Tensor:
    """The lower triangles of the last two axes, zeros above the diagonal."""
    return where(lower_mask("tril", x, diagonal), x, False)


def triu(x: Operand, diagonal: int = 0) -> Tensor:
    """The upper triangles of the last two axes, zeros below the diagonal."""
    return where(lower_mask("triu", x, diagonal - 1), False, x)


# Order


@primitive
class ArgSort(TensorOp):
    """y = the int64 indices that sort x along an axis, upwards, equal ones in their order, NaN
    last; no gradient"""

    name = "argsort"
    axis: int

    def infer(self, x: Spec) -> Spec:
        as_axis("argsort", self.axis, x.ndim)
        return x.with_dtype(int64)

    def compute(self, x: np.ndarray) -> np.ndarray:
        return np.argsort(x, self.axis, kind="stable")


def argsort(x: Operand, axis: int = -1, descending: bool = False) -> Tensor:
    """The indices that sort x along an axis; equal elements keep their order; NaN counts as
    largest."""
    x, axis = on_axis("argsort", x, axis)
    if not descending:
        return ArgSort(axis)(x)
    return (x.shape[axis] - 1) - flip(ArgSort(axis)(flip(x, axis)), axis)


def sort(x: Operand, axis: int = -1, descending: bool = False) -> tuple[Tensor, Tensor]:
    """x's elements in order along an axis, and the indices they come from."""
    index = argsort(x, axis, descending)
    return gather(x, axis, index), index


def topk(x: Operand, k: int, axis: int = -1, largest: bool = True) -> tuple[Tensor, Tensor]:
    """The k largest (smallest) elements along an axis, in order, and their indices."""
    x, axis = on_axis("topk", x, axis)
    expect(0 <= k <= x.shape[axis], f"topk: expected k between 0 and {x.shape[axis]}; received {k}")
    index = split(argsort(x, axis, largest), axis, (k, x.shape[axis] - k))[0]
    return gather(x, axis, index), index


def unbind(x: Operand, axis: int = 0) -> tuple[Tensor, ...]:
    """x's slices along an axis, the axis gone."""
    return tuple(split(x, axis))
