"""Broadcasting, indexing, movement, reductions, einsum against NumPy, on shapes from hypothesis.

Movement and indexing are linear: with y = f(x), the gradient of (y * w).sum() is what NumPy's own
adjoint of f gives for w. Inputs are small integers, so that sums are exact and results are equal.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import needle as ndl
from needle.autograd import Tensor
from needle.ops.normalize import BatchNorm, LayerNorm, RMSNorm

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def filled(shape: Any, seed: int = 0) -> np.ndarray:
    """Small integers as float64."""
    return np.random.default_rng(seed).integers(-5, 6, shape).astype(np.float64)


def assert_equal(actual: Any, expected: np.ndarray) -> None:
    found = actual.numpy()
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def assert_linear(function: Any, reference: Any, shape: Any) -> None:
    """y = f(x) is the reference's, and its gradient is the adjoint: x's places, where w went."""
    x = filled(shape)
    places = np.arange(x.size).reshape(shape)
    expected = reference(x)
    leaf = Tensor(x)
    y = function(leaf)
    assert_equal(y, expected)
    w = filled(expected.shape, 1)
    y.backward(w)
    taken = reference(places)
    grad = np.zeros(x.size)
    np.add.at(grad, taken.ravel(), w.ravel())
    assert leaf.grad is not None
    assert_equal(leaf.grad, grad.reshape(shape))


def unbroadcast(grad: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    grad = grad.sum(tuple(range(grad.ndim - len(shape))))
    for axis, size in enumerate(shape):
        if size == 1:
            grad = grad.sum(axis, keepdims=True)
    return grad


# Broadcasting


@given(hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=4, min_side=0, max_side=3))
def test_broadcasting_and_its_gradients(found: Any) -> None:
    a, b = (filled(shape, seed) for seed, shape in enumerate(found.input_shapes))
    w = filled(found.result_shape, 2)
    for function, expected, grads in (
        (ndl.add, a + b, (w, w)),
        (ndl.subtract, a - b, (w, -w)),
        (ndl.multiply, a * b, (w * b, w * a)),
        (lambda x, y: ndl.where(y > 0, x, y), np.where(b > 0, a, b), (w * (b > 0), w * (b <= 0))),
    ):
        x, y = Tensor(a), Tensor(b)
        z = function(x, y)
        assert_equal(z, np.asarray(expected))
        z.backward(w)
        for leaf, grad in ((x, grads[0]), (y, grads[1])):
            assert leaf.grad is not None
            assert_equal(leaf.grad, unbroadcast(np.broadcast_to(grad, w.shape), leaf.shape) + 0.0)


@given(hnp.mutually_broadcastable_shapes(num_shapes=1, base_shape=(2, 3, 0, 1)), shapes)
def test_broadcast_to(found: Any, other: Any) -> None:
    (shape,) = found.input_shapes
    assert_linear(
        lambda x: ndl.broadcast_to(x, found.result_shape),
        lambda x: np.broadcast_to(x, found.result_shape),
        shape,
    )
    try:
        np.broadcast_to(np.zeros(shape), other)
    except ValueError:
        with pytest.raises(ValueError, match="^broadcast_to: expected a shape to which "):
            ndl.broadcast_to(Tensor(np.zeros(shape)), other)


@given(shapes, shapes)
def test_shapes_that_do_not_broadcast_raise(a: Any, b: Any) -> None:
    x, y = Tensor(np.zeros(a)), Tensor(np.zeros(b))
    try:
        expected = np.broadcast_shapes(a, b)
    except ValueError:
        for name, function in (("add", ndl.add), ("subtract", ndl.subtract), ("less", ndl.less)):
            with pytest.raises(
                ValueError, match=f"^{name}: expected shapes that broadcast together; received "
            ):
                function(x, y)
    else:
        assert (x + y).shape == (x - y).shape == (x < y).shape == expected


# Movement


def any_axis(draw: Any, ndim: int) -> int:
    return draw(st.integers(-ndim, ndim - 1))


def reshaping(draw: Any, shape: Any) -> Any:
    target = draw(st.permutations([*shape, 1]))
    if math.prod(shape) and draw(st.booleans()):
        target[draw(st.integers(0, len(shape)))] = -1
    return lambda x: ndl.reshape(x, target), lambda x: x.reshape(target)


def unsqueezing(draw: Any, shape: Any) -> Any:
    axis = any_axis(draw, len(shape) + 1)
    return lambda x: ndl.unsqueeze(x, axis), lambda x: np.expand_dims(x, axis)


def stacking(draw: Any, shape: Any) -> Any:
    axis = any_axis(draw, len(shape) + 1)
    return lambda x: ndl.stack([x, x], axis), lambda x: np.stack([x, x], axis)


def tiling(draw: Any, shape: Any) -> Any:
    counts = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    return lambda x: ndl.tile(x, counts), lambda x: np.tile(x, counts)


def repeating_all(draw: Any, shape: Any) -> Any:
    n = draw(st.integers(0, 3))
    return lambda x: ndl.repeat(x, n), lambda x: np.repeat(x, n)


def rolling_all(draw: Any, shape: Any) -> Any:
    n = draw(st.integers(-30, 30))
    return lambda x: ndl.roll(x, n), lambda x: np.roll(x, n)


def permuting(draw: Any, shape: Any) -> Any:
    order = draw(st.permutations(range(len(shape))))
    return lambda x: ndl.permute(x, order), lambda x: np.transpose(x, order)


def flipping(draw: Any, shape: Any) -> Any:
    axes = tuple(draw(st.sets(st.integers(0, len(shape) - 1))))
    return lambda x: ndl.flip(x, axes), lambda x: np.flip(x, axes)


def rolling(draw: Any, shape: Any) -> Any:
    n, axis = draw(st.integers(-9, 9)), any_axis(draw, len(shape))
    return lambda x: ndl.roll(x, n, axis), lambda x: np.roll(x, n, axis)


def repeating(draw: Any, shape: Any) -> Any:
    n, axis = draw(st.integers(0, 3)), any_axis(draw, len(shape))
    return lambda x: ndl.repeat(x, n, axis), lambda x: np.repeat(x, n, axis)


def splitting(draw: Any, shape: Any) -> Any:
    axis = any_axis(draw, len(shape))
    cut = draw(st.integers(0, shape[axis]))
    sizes = (cut, shape[axis] - cut)
    return lambda x: ndl.split(x, axis, sizes)[1], lambda x: np.split(x, [cut], axis)[1]


def joining(draw: Any, shape: Any) -> Any:
    axis = any_axis(draw, len(shape))
    return lambda x: ndl.concatenate([x, x, x], axis), lambda x: np.concatenate([x, x, x], axis)


def transposing(draw: Any, shape: Any) -> Any:
    pair = any_axis(draw, len(shape)), any_axis(draw, len(shape))
    return lambda x: ndl.transpose(x, pair), lambda x: np.swapaxes(x, *pair)


def flattening(draw: Any, shape: Any) -> Any:
    start = draw(st.integers(0, len(shape) - 1))
    end = draw(st.integers(start, len(shape) - 1))
    middle = math.prod(shape[start : end + 1])
    target = (*shape[:start], middle, *shape[end + 1 :])
    return lambda x: ndl.flatten(x, start, end), lambda x: x.reshape(target)


# Of scalars too, of arrays with an axis, and with two
MOVEMENTS = (
    [reshaping, unsqueezing, stacking, tiling, repeating_all, rolling_all],
    [permuting, flipping, rolling, repeating, splitting, joining, flattening],
    [transposing],
)


@st.composite
def movements(draw: Any) -> tuple[Any, Any, Any]:
    """A shape, and a movement of needle's with NumPy's for it."""
    shape = draw(shapes)
    possible = [kind for kinds in MOVEMENTS[: len(shape) + 1] for kind in kinds]
    function, reference = draw(st.sampled_from(possible))(draw, shape)
    return shape, function, reference


@given(movements())
def test_movement_and_its_adjoint(movement: Any) -> None:
    shape, function, reference = movement
    assert_linear(function, reference, shape)


@given(shapes, st.data())
def test_pad_with_a_value(shape: Any, data: Any) -> None:
    widths = [tuple(data.draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))) for _ in shape]
    x = filled(shape)
    leaf = Tensor(x)
    y = ndl.pad(leaf, widths, -2)
    expected = np.pad(x, widths, constant_values=-2) if shape else x
    assert_equal(y, expected)
    w = filled(expected.shape, 1)
    y.backward(w)
    middle = tuple(
        slice(before, before + size) for (before, _), size in zip(widths, shape, strict=True)
    )
    assert leaf.grad is not None
    assert_equal(leaf.grad, w[middle])


@given(shapes)
def test_squeeze_drops_axes_of_size_1(shape: Any) -> None:
    assert_linear(ndl.squeeze, np.squeeze, shape)


@given(shapes, shapes)
def test_reshape_refuses_other_sizes(shape: Any, target: Any) -> None:
    if math.prod(shape) != math.prod(target):
        with pytest.raises(ValueError, match="^reshape: expected a shape of "):
            ndl.reshape(Tensor(np.zeros(shape)), target)


@given(shapes, st.integers(1, 4), st.data())
def test_dilate_and_undilate(shape: Any, dilation: int, data: Any) -> None:
    axes = tuple(data.draw(st.sets(st.integers(0, 5))))
    inside = [axis for axis in axes if axis < len(shape)]
    x = filled(shape)
    y = ndl.dilate(Tensor(x), axes, dilation)
    steps = tuple(
        slice(None, None, dilation + 1 if axis in inside else 1) for axis in range(len(shape))
    )
    expected = np.zeros(
        [n * (dilation + 1) if axis in inside else n for axis, n in enumerate(shape)]
    )
    expected[steps] = x
    assert_equal(y, expected)
    assert_equal(ndl.undilate(y, axes, dilation), x)


# Indexing


@st.composite
def indices(draw: Any, shape: tuple[int, ...]) -> Any:
    """Integers, slices, None, ..., integer arrays that broadcast, and boolean masks, mixed."""
    ndim = len(shape)
    found: list[Any] = []
    arrays = draw(
        hnp.mutually_broadcastable_shapes(num_shapes=4, max_dims=2, max_side=3)
    ).input_shapes
    axis = used = 0
    while axis < ndim and draw(st.integers(0, 7)):
        kind = draw(
            st.sampled_from(["int", "slice", "slice", "none", "array", "array", "mask", "..."])
        )
        size = shape[axis]
        if kind == "none":
            found.append(None)
        elif kind == "..." and not any(each is Ellipsis for each in found):
            found.append(...)
            axis = draw(st.integers(axis, ndim))
        elif kind == "int" and size:
            found.append(draw(st.integers(-size, size - 1)))
            axis += 1
        elif kind == "array" and used < 4 and size:
            found.append(
                draw(hnp.arrays(np.int64, arrays[used], elements=st.integers(-size, size - 1)))
            )
            used, axis = used + 1, axis + 1
        elif kind == "mask" and used == 0:
            wide = draw(st.integers(1, ndim - axis))
            found.append(draw(hnp.arrays(bool, shape[axis : axis + wide])))
            used, axis = 4, axis + wide
        else:
            found.append(draw(st.slices(size)))
            axis += 1
    if any(each is Ellipsis for each in found):  # what follows it must reach the last axis
        found += [slice(None)] * (ndim - axis)
    return tuple(found)


@given(st.data())
def test_indexing_is_numpys(data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
    index = data.draw(indices(shape))
    assert_linear(lambda x: x[index], lambda x: np.asarray(x[index]), shape)


@given(st.data())
def test_basic_indexing_is_numpys(data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    index = data.draw(hnp.basic_indices(shape, allow_newaxis=True))
    assert_linear(lambda x: x[index], lambda x: np.asarray(x[index]), shape)


@pytest.mark.parametrize(
    "index",
    [
        ([0, 1], slice(None), [1, 0]),
        (slice(None), [0, 1], [1, 0]),
        (0, slice(None), [1, 0]),
        ([0, 1], None, [1, 0]),
        (None, [[0], [1]], slice(None), [1, 0]),
        (..., [0, 1], slice(1, 2)),
        (..., [2, 0], None, 1),
        (slice(None), np.array([True, False, True])),
        (..., np.array([True, False, True, True])),
        (np.array([[True, False, True], [False, True, False]]),),
        (0, np.array([True, False, True]), [0]),
        (np.array(1), slice(None), np.array(2)),
        ([],),
        (slice(None), np.zeros((0, 2), int)),
        (range(2), (0, 2)),
        (np.int32(1), np.uint8(2)),
        (np.array([False, False]),),
        (np.array([[1, -1]], np.int8), slice(None, None, -2)),
    ],
    ids=str,
)
def test_numpys_rule_for_the_place_of_indexed_axes(index: Any) -> None:
    """Neighbouring indices leave their axes where they were; separated ones put them first."""
    plain = tuple(list(each) if isinstance(each, (range, tuple)) else each for each in index)
    assert_linear(lambda x: x[index], lambda x: np.asarray(x[plain]), (2, 3, 4))
    wrapped = tuple(Tensor(each) if isinstance(each, np.ndarray) else each for each in index)
    assert_linear(lambda x: x[wrapped], lambda x: np.asarray(x[plain]), (2, 3, 4))


@pytest.mark.parametrize(
    "index",
    [
        (2,),
        (-3,),
        (0, 0, 0, 0),
        ([0, 2],),
        (slice(None), [-4]),
        (..., ...),
        (np.array([True, False, True]),),
        (..., np.array([True, False])),
        (np.zeros((2, 3, 4, 1), bool),),
        (slice(None), slice(None), slice(None), None, 0),
    ],
    ids=str,
)
def test_what_numpy_refuses_raises_an_index_error(index: Any) -> None:
    x = filled((2, 3, 4))
    with pytest.raises(IndexError):
        x[index]
    with pytest.raises(IndexError, match="^(getitem|gather): expected "):
        Tensor(x)[index]


@given(st.data())
def test_take_gather_and_scatter_add(data: Any) -> None:
    shape = data.draw(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    size = shape[axis]
    index = data.draw(
        hnp.arrays(
            np.int64,
            hnp.array_shapes(max_dims=2, max_side=3),
            elements=st.integers(-size, size - 1),
        )
    )
    assert_linear(
        lambda x: ndl.take(x, index, axis), lambda x: np.take(x, index % size, axis), shape
    )
    along = tuple(data.draw(st.integers(0, n)) for n in shape)
    chosen = data.draw(hnp.arrays(np.int64, along, elements=st.integers(-size, size - 1)))

    def gather(x: np.ndarray) -> np.ndarray:
        grids = list(np.indices(along))
        grids[axis] = chosen
        return x[tuple(grids)]

    assert_linear(lambda x: ndl.gather(x, axis, chosen), gather, shape)
    x, source = filled(shape), filled(along, 1)
    grids = list(np.indices(along))
    grids[axis] = chosen
    expected = x.copy()
    np.add.at(expected, tuple(grids), source)
    assert_equal(ndl.scatter_add(Tensor(x), axis, chosen, Tensor(source)), expected)


# Reductions


@given(shapes, st.data())
def test_reductions_over_any_axes(shape: Any, data: Any) -> None:
    ndim = len(shape)
    axes = data.draw(
        st.none() | st.sets(st.integers(0, max(ndim - 1, 0))).map(tuple) if ndim else st.none()
    )
    if axes and data.draw(st.booleans()):
        axes = tuple(axis - ndim for axis in axes)
    keepdims = data.draw(st.booleans())
    x = filled(shape)
    for name, reference in (
        ("summation", np.sum),
        ("prod", np.prod),
        ("any", np.any),
        ("all", np.all),
    ):
        function = getattr(ndl, name)
        assert_equal(
            function(Tensor(x), axes, keepdims=keepdims),
            np.asarray(reference(x, axes, keepdims=keepdims)),
        )
    found = range(ndim) if axes is None else axes
    if 0 in [shape[axis] for axis in found]:
        for name in ("max", "min"):
            with pytest.raises(
                ValueError, match=f"^{name}: expected at least one element along axes "
            ):
                getattr(ndl, name)(Tensor(x), axes)
    else:
        for name in ("max", "min"):
            expected = np.asarray(getattr(np, name)(x, axes, keepdims=keepdims))
            assert_equal(getattr(ndl, name)(Tensor(x), axes, keepdims=keepdims), expected)
    leaf = Tensor(x)
    y = leaf.sum(axes, keepdims=True)
    w = filled(y.shape, 1)
    y.backward(w)
    assert leaf.grad is not None
    assert_equal(leaf.grad, np.broadcast_to(w, shape))


@given(hnp.array_shapes(min_dims=1, max_dims=3, min_side=1, max_side=4), st.data())
def test_sort_argsort_topk_argmax(shape: Any, data: Any) -> None:
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x = filled(shape)
    order = np.argsort(x, axis, kind="stable")
    values, places = ndl.sort(Tensor(x), axis)
    assert_equal(values, np.sort(x, axis))
    assert_equal(places, order)
    down = np.argsort(-x, axis, kind="stable")
    assert_equal(ndl.argsort(Tensor(x), axis, descending=True), down)
    k = data.draw(st.integers(0, shape[axis]))
    assert_equal(ndl.topk(Tensor(x), k, axis)[1], np.take(down, range(k), axis))
    assert_equal(ndl.topk(Tensor(x), k, axis, largest=False)[1], np.take(order, range(k), axis))
    assert_equal(ndl.argmax(Tensor(x), axis, keepdims=True), np.argmax(x, axis, keepdims=True))
    assert_equal(ndl.argmin(Tensor(x), axis), np.asarray(np.argmin(x, axis)))
    assert_equal(ndl.cumsum(Tensor(x), axis), np.cumsum(x, axis))


# Contractions


@st.composite
def equations(draw: Any) -> tuple[str, list[tuple[int, ...]]]:
    """An einsum equation with its operands' shapes: repeated letters, ..., sizes of 0 and 1."""
    sizes = {letter: draw(st.integers(0, 3)) for letter in "abcdA"}
    batch = draw(st.lists(st.integers(1, 2), max_size=2))
    terms, shapes = [], []
    for _ in range(draw(st.integers(1, 3))):
        letters = draw(st.lists(st.sampled_from("abcdA"), max_size=3))
        term, shape = "".join(letters), [sizes[letter] for letter in letters]
        if batch and draw(st.booleans()):
            own = [
                draw(st.sampled_from([1, size]))
                for size in batch[draw(st.integers(0, len(batch))) :]
            ]
            place = draw(st.integers(0, len(letters)))
            term, shape = term[:place] + "..." + term[place:], shape[:place] + own + shape[place:]
        terms.append(term)
        shapes.append(tuple(shape))
    equation = ",".join(terms)
    if draw(st.booleans()):
        used = sorted(set(equation) - {",", "."})
        kept = draw(st.lists(st.sampled_from(used), unique=True)) if used else []
        dots = "..." if "..." in equation else ""
        equation += "->" + dots + "".join(kept)
    return equation, shapes


@given(equations())
def test_einsum_is_numpys(found: Any) -> None:
    equation, operand_shapes = found
    arrays = [filled(shape, seed) for seed, shape in enumerate(operand_shapes)]
    expected = np.asarray(np.einsum(equation, *arrays))
    leaves = [Tensor(x) for x in arrays]
    y = ndl.einsum(equation, *leaves)
    assert_equal(y, expected)
    w = filled(expected.shape, 9)
    y.backward(w)
    for place, (leaf, x) in enumerate(zip(leaves, arrays, strict=True)):
        step = filled(x.shape, 7)
        moved = [*arrays[:place], step, *arrays[place + 1 :]]
        along = float((np.einsum(equation, *moved) * w).sum())
        assert leaf.grad is not None
        assert leaf.grad.shape == x.shape
        assert float((leaf.grad.numpy() * step).sum()) == along


@given(st.data())
def test_matmul_is_numpys(data: Any) -> None:
    batches = data.draw(
        hnp.mutually_broadcastable_shapes(num_shapes=2, max_dims=2, min_side=0, max_side=3)
    )
    m, k, n = (data.draw(st.integers(0, 3)) for _ in range(3))
    left = data.draw(st.sampled_from([(k,), (*batches.input_shapes[0], m, k)]))
    right = data.draw(st.sampled_from([(k,), (*batches.input_shapes[1], k, n)]))
    a, b = filled(left), filled(right, 1)
    expected = np.asarray(a @ b)
    x, y = Tensor(a), Tensor(b)
    z = x @ y
    assert_equal(z, expected)
    w = filled(expected.shape, 2)
    z.backward(w)
    for leaf, step, moved in ((x, filled(left, 3), 0), (y, filled(right, 4), 1)):
        product = step @ b if moved == 0 else a @ step
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
        assert float((leaf.grad.numpy() * step).sum()) == float((product * w).sum())


# Nothing at all

EMPTY_BATCHES: dict[str, Any] = {
    "softmax": (ndl.softmax, (0, 3), (0, 3)),
    "log_softmax": (ndl.log_softmax, (0, 3), (0, 3)),
    "logsumexp": (lambda x: ndl.logsumexp(x, 1), (0, 3), (0,)),
    "var": (lambda x: ndl.var(x, 1), (0, 3), (0,)),
    "std over nothing": (lambda x: ndl.std(x, 0), (0, 3), (3,)),
    "norm over nothing": (lambda x: ndl.norm(x, axis=0), (0, 3), (3,)),
    "layer norm": (LayerNorm(1, 1e-5), (0, 3), (0, 3)),
    "rms norm": (RMSNorm(1, 1e-5), (0, 3), (0, 3)),
    "batch norm": (BatchNorm(1e-5), (0, 3), (0, 3)),
    "cross entropy": (
        lambda x: ndl.cross_entropy(x, np.zeros(0, int), reduction="sum"),
        (0, 3),
        (),
    ),
    "mean squared error": (lambda x: ndl.mse_loss(x, np.zeros((0, 3))), (0, 3), ()),
    "sort": (lambda x: ndl.sort(x)[0], (0, 3), (0, 3)),
    "sort nothing": (lambda x: ndl.sort(x, 0)[0], (0, 3), (0, 3)),
    "topk": (lambda x: ndl.topk(x, 0, 0)[0], (2, 3), (0, 3)),
    "take no rows": (lambda x: ndl.take(x, np.zeros((0, 2), int)), (3, 2), (0, 2, 2)),
    "gelu": (ndl.gelu, (0,), (0,)),
    "tril": (ndl.tril, (0, 3), (0, 3)),
}


@pytest.mark.parametrize("case", EMPTY_BATCHES)
def test_an_empty_batch_passes_through(case: str) -> None:
    function, shape, expected = EMPTY_BATCHES[case]
    x = Tensor(np.zeros(shape))
    y = function(x)
    assert y.shape == expected
    y.backward(np.ones(expected))
    assert x.grad is not None
    assert x.grad.shape == shape
