"""Every op by the op table: forward on each device and dtype, gradients, second order, PyTorch,
lazy evaluation, what infer says, odd shapes, strides."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from checks import (
    LAZY_MODES,
    as_tuple,
    assert_close,
    assert_gradient,
    assert_infers,
    assert_lazy_is_eager,
    assert_second_order,
    directions,
    gradients,
)
from optable import BEHIND_OTHERS, ROWS, Row

import needle as ndl
from needle import ops
from needle.autograd import Op, Tensor, Value, find_topo_sort
from needle.dtype import FLOATS, as_dtype
from needle.ops import precision

DTYPES = ["float64", "float32", "float16", "bfloat16"]
DEVICES = {"cpu": ndl.cpu, "cpu_numpy": ndl.cpu_numpy}
each_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_device = pytest.mark.parametrize("device", DEVICES)


def has_gradient(row: Row) -> bool:
    arrays = row.arrays()
    floats = any(np.asarray(y).dtype in FLOATS for y in as_tuple(row.expected(arrays)))
    return floats and bool(row.places(arrays))


DIFFERENTIABLE = [row for row in ROWS if has_gradient(row)]
ELEMENTWISE = [row for row in ROWS if row.elementwise]
each_differentiable = pytest.mark.parametrize("row", DIFFERENTIABLE, ids=lambda row: row.id)
each_elementwise = pytest.mark.parametrize("row", ELEMENTWISE, ids=lambda row: row.id)


# The table itself


def builtin_ops() -> set[str]:
    """The names of all primitives and composites in needle.ops."""
    return {
        found.__name__
        for name, module in list(sys.modules.items())
        if name.startswith("needle.ops.")
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, Op) and found.is_builtin
    }


def nodes_of(row: Row) -> set[str]:
    """The ops that a row's results are nodes of: its own, and what `keepdims` and the like add."""
    arrays = row.arrays()
    with ndl.lazy():
        tensors = [Tensor(x) for x in arrays]
        found = row.function(*tensors)
    outputs = [found] if isinstance(found, Value) else list(found)
    return {type(node.op).__name__ for node in find_topo_sort(outputs) if node.op is not None}


def test_every_op_has_a_row() -> None:
    named = {row.name for row in ROWS}
    covered = set().union(*map(nodes_of, ROWS)) | named
    missing = builtin_ops() - covered
    assert missing == set(BEHIND_OTHERS), "an op without a row in optable.py"
    assert set(BEHIND_OTHERS.values()) <= named


def test_every_op_is_in_one_list_of_autocast() -> None:
    lists = [*precision.LOW, *precision.FLOAT32, *precision.AS_GIVEN]
    assert len(set(lists)) == len(lists), "an op in two lists of needle/ops/precision.py"
    listed = {kind.__name__ for kind in lists}
    assert listed == builtin_ops(), "an op in no list of needle/ops/precision.py"


def test_every_function_has_a_row() -> None:
    missing = set(ops.FUNCTIONS) - {row.name for row in ROWS}
    assert not missing, "a function without a row in optable.py"


def test_rows_have_names_of_their_own() -> None:
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids)
    known = set(ops.FUNCTIONS) | builtin_ops()
    assert {row.name for row in ROWS} <= known


def test_a_wider_tolerance_has_a_reason() -> None:
    assert [row.id for row in ROWS if (row.factor != 1) != bool(row.reason)] == []


# Forward


def assert_matches(row: Row, arrays: list[Any], device: Any, dtype: Any = None) -> None:
    """The function's results are the reference's."""
    tensors = [Tensor(x, device=device) for x in arrays]
    outputs = as_tuple(row.function(*tensors))
    expected = as_tuple(row.expected(arrays))
    assert len(outputs) == len(expected)
    for y, wanted in zip(outputs, expected, strict=True):
        kind = y.dtype if dtype is None or y.dtype not in FLOATS else as_dtype(dtype)
        roundings = row.roundings if kind.itemsize == 2 else 1
        assert_close(y, wanted, kind, row.length, row.factor * roundings)


@each_device
@each_dtype
@each_row
def test_forward(row: Row, dtype: str, device: str) -> None:
    assert_matches(row, row.arrays(dtype), DEVICES[device](), dtype)


@each_row
def test_infer_says_what_compute_gives(row: Row) -> None:
    for dtype in DTYPES:
        arrays = row.arrays(dtype)
        assert_infers(row.function, arrays, row.places(arrays))


def variants(x: np.ndarray) -> list[np.ndarray]:
    """The same numbers in other layouts: column-major, with gaps, reversed in memory."""
    axes = tuple(range(x.ndim))
    every_second = (*(slice(None, None, 2) for _ in axes), ...)
    gaps = np.zeros([2 * size for size in x.shape], x.dtype)[every_second]
    gaps[...] = x
    return [np.array(x, order="F"), gaps, np.flip(np.flip(x, axes).copy(), axes)]


@each_row
def test_strided_inputs(row: Row) -> None:
    arrays = row.arrays()
    for layout in zip(*map(variants, arrays), strict=True):
        views = [Tensor.make_const(ndl.NDArray.wrap(x, ndl.cpu())) for x in layout]
        outputs = as_tuple(row.function(*views))
        for y, wanted in zip(outputs, as_tuple(row.expected(arrays)), strict=True):
            assert_close(y, wanted, None, row.length, row.factor)


SHAPES = [(), (1,), (0,), (5,), (3, 0, 2), (2, 1, 3), (1, 1)]
PAIRS = [
    ((), ()),
    ((), (3,)),
    ((0,), (1,)),
    ((3, 1), (4,)),
    ((2, 3, 4), (3, 1)),
    ((1, 1, 4), (2, 3, 1)),
    ((2, 0, 3), (1, 3)),
    ((5,), (2, 1, 1)),
]


def shaped(row: Row, shapes: Any) -> list[np.ndarray]:
    """Inputs of the row's domains in other shapes."""
    rng = row.rng()
    return [
        type(each)(shape, each.low, each.high).draw(rng, "float64")
        for each, shape in zip(row.inputs, shapes, strict=True)
    ]


@each_elementwise
def test_odd_shapes(row: Row) -> None:
    """Zero-size, 0-d and size-1 axes; pairs that broadcast; gradients keep the inputs' shapes."""
    choices = [(shape,) for shape in SHAPES] if len(row.inputs) == 1 else PAIRS
    for shapes in choices:
        arrays = shaped(row, shapes)
        assert_matches(row, arrays, ndl.cpu())
        places = row.places(arrays)
        outputs = as_tuple(row.expected(arrays))
        if places and np.asarray(outputs[0]).dtype in FLOATS:
            weights = [np.ones(np.shape(y)) for y in outputs]
            for place, grad in zip(
                places, gradients(row.function, arrays, weights, places), strict=True
            ):
                assert grad.shape == arrays[place].shape


@pytest.mark.parametrize("shapes", PAIRS, ids=str)
def test_gradients_of_broadcast_operands(shapes: Any) -> None:
    for row in ELEMENTWISE:
        if len(row.inputs) == 2 and row in DIFFERENTIABLE:
            arrays = shaped(row, shapes)
            assert_gradient(row.function, row.reference, arrays, (0, 1), row.rng())


# Gradients


@each_device
@each_differentiable
def test_gradient(row: Row, device: str) -> None:
    arrays, places = row.arrays(), row.places(row.arrays())
    assert_gradient(row.function, row.reference, arrays, places, row.rng(), DEVICES[device]())


@each_differentiable
def test_second_order(row: Row) -> None:
    arrays = row.arrays()
    assert_second_order(row.function, arrays, row.places(arrays), row.rng())


@each_differentiable
def test_gradients_in_other_dtypes(row: Row) -> None:
    """A gradient has its input's dtype; in float32 it is float64's but for rounding."""
    for dtype in DTYPES[1:]:
        arrays = row.arrays(dtype)
        places = row.places(arrays)
        wide = [x.astype(np.float64) if x.dtype in FLOATS else x for x in arrays]
        outputs = [y for y in as_tuple(row.expected(arrays)) if np.asarray(y).dtype in FLOATS]
        weights = [np.round(4 * w) / 4 for w in directions(row.rng(), outputs)]
        found = gradients(row.function, arrays, weights, places)
        expected = gradients(row.function, wide, weights, places)
        for place, grad, wanted in zip(places, found, expected, strict=True):
            assert grad.dtype == arrays[place].dtype
            if dtype == "float32":
                assert_close(grad, wanted.numpy(), dtype, 2 * row.length, 2 * row.factor)


# PyTorch


def to_torch(torch: Any, x: np.ndarray, requires_grad: bool) -> Any:
    found = torch.from_numpy(np.array(x))
    return found.requires_grad_() if requires_grad else found


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("row", [row for row in ROWS if row.torch], ids=lambda row: row.id)
def test_agrees_with_pytorch(row: Row, dtype: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = row.arrays(dtype)
    places = row.places(arrays) if row in DIFFERENTIABLE else ()
    theirs = [to_torch(torch, x, place in places) for place, x in enumerate(arrays)]
    expected = as_tuple(row.in_torch(torch, *theirs))
    outputs = as_tuple(row.function(*[Tensor(x) for x in arrays]))
    assert len(outputs) == len(expected)
    for y, wanted in zip(outputs, expected, strict=True):
        assert_close(y, wanted.detach().numpy(), None, row.length, 2 * row.factor)
    if not places:
        return
    floats = [y for y in expected if y.is_floating_point()]
    weights = directions(row.rng(), [y.detach() for y in floats])
    total = sum(
        (y * torch.from_numpy(w).to(y.dtype)).sum() for y, w in zip(floats, weights, strict=True)
    )
    total.backward()
    for place, grad in zip(places, gradients(row.function, arrays, weights, places), strict=True):
        wanted = theirs[place].grad
        wanted = np.zeros(grad.shape) if wanted is None else wanted.numpy()
        assert_close(grad, wanted, dtype, 2 * row.length, 2 * row.factor)


# Lazy evaluation


@pytest.mark.parametrize("mode", LAZY_MODES)
@each_row
def test_lazy_gives_eagers_bits(row: Row, mode: str) -> None:
    for dtype in ("float64", "float32", "bfloat16"):
        arrays = row.arrays(dtype)
        places = row.places(arrays) if row in DIFFERENTIABLE else ()
        assert_lazy_is_eager(row.function, arrays, places, LAZY_MODES[mode])


# What the table's inputs don't show


@pytest.mark.parametrize("name", ["maximum", "minimum"])
def test_extremes_of_nan_give_both_operands_the_gradient(name: str) -> None:
    a, b = Tensor([np.nan, 1.0, 2.0, 5.0]), Tensor([1.0, np.nan, 2.0, 1.0])
    ops.FUNCTIONS[name](a, b).sum().backward()
    rest = [1.0, 0.0] if name == "maximum" else [0.0, 1.0]
    np.testing.assert_array_equal(a.grad.numpy(), [1.0, 1.0, 0.5, rest[0]])
    np.testing.assert_array_equal(b.grad.numpy(), [1.0, 1.0, 0.5, rest[1]])


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int64", "bool", "float32"])
@pytest.mark.parametrize("scalar", [0, 1, 0.5, -0.0, np.int8(3), np.float64(2.5)])
def test_subtraction_of_numbers(dtype: str, scalar: Any) -> None:
    x = np.array([-128, -1, -0.0, 0, 3]).astype("float64").clip(0 if dtype == "uint8" else None)
    x = x.astype(dtype)
    wide = np.int64 if dtype == "bool" else x.dtype
    weak = scalar.item() if isinstance(scalar, np.generic) else scalar
    for found, wanted in (
        (Tensor(x) - scalar, x.astype(wide) - weak),
        (scalar - Tensor(x), weak - x.astype(wide)),
    ):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found.numpy(), wanted)
        np.testing.assert_array_equal(np.signbit(found.numpy()), np.signbit(wanted))


def test_numbers_of_operands_are_checked() -> None:
    x = ndl.ones(2)
    y = x.numpy().copy()
    with pytest.raises(TypeError, match="exp: expected 1 operands; received 2"):
        ops.exp(x, Tensor(y))
    with pytest.raises(TypeError, match="clip: expected numbers or None; received Tensor"):
        ops.clip(x, x)
