"""What tests compare with: one tolerance from dtype and length, equal bits, projected gradients.

A check raises AssertionError and says how far off the worst element is. test_the_tests.py plants
errors that these checks must find.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import ml_dtypes
import numpy as np

import needle as ndl
from needle import autograd
from needle.autograd import Tensor
from needle.dtype import FLOATS, as_dtype

Array = np.ndarray
GRADIENT_TOLERANCE = 1e-7  # of five-point differences in float64, relative to the sum of |parts|


def tolerance(dtype: Any, length: int = 1) -> float:
    """The relative error that rounding explains: one function of dtype and length for all tests.

    length: how many numbers the longest sum adds. float64: 1e-12 whatever the length. float32: 4
    units in the last place for each of them. float16 and bfloat16 are computed in float32 and
    rounded once: one unit in the last place more.
    """
    dtype = as_dtype(dtype)
    if dtype == np.float64:
        return 1e-12
    single = 4 * float(np.finfo(np.float32).eps) * length
    return single if dtype == np.float32 else single + float(ml_dtypes.finfo(dtype).eps)


def assert_close(
    actual: Any, expected: Any, dtype: Any = None, length: int = 1, factor: float = 1.0
) -> None:
    """Each element is within tolerance of the expected one; NaN, infinities and shapes are equal.

    expected: float64. dtype: whose tolerance counts, the actual one by default. Sums may cancel:
    for length > 1 the error is relative to the largest expected element.
    """
    actual = as_array(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    if actual.dtype not in FLOATS:
        np.testing.assert_array_equal(actual, expected)
        return
    kind = as_dtype(actual.dtype if dtype is None else dtype)
    with np.errstate(all="ignore"):
        rounded = expected.astype(kind).astype(np.float64)
    found = actual.astype(np.float64)
    finite = np.isfinite(rounded) & np.isfinite(found)
    odd = ~finite & ~((rounded == found) | (np.isnan(rounded) & np.isnan(found)))
    assert not odd.any(), f"{describe(found, rounded, odd)}"
    size = np.abs(rounded[finite])
    if length > 1 and size.size:
        size = np.full(size.shape, size.max())
    smallest = float(ml_dtypes.finfo(kind).smallest_subnormal)
    bound = factor * (tolerance(kind, length) * size + 4 * smallest)
    off = np.zeros(found.shape, bool)
    off[finite] = np.abs(found[finite] - rounded[finite]) > bound
    assert not off.any(), f"{describe(found, rounded, off)}; tolerance {bound.max():.3g}"


def agree(found: Tensor | None, expected: Any, length: int = 1) -> None:
    """Values as close as `assert_close` wants them, in the same dtype."""
    assert found is not None
    assert found.dtype == np.asarray(expected).dtype
    assert_close(found, expected, length=length)


def draw(*shape: int, seed: int = 0, dtype: str = "float64") -> Array:
    """Standard normal numbers, the same for the same seed."""
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def describe(found: Array, expected: Array, bad: Array) -> str:
    """The worst element, in words."""
    with np.errstate(all="ignore"):
        error = np.where(bad, np.abs(found - expected), -1.0)
    place = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), bad.shape)
    where = tuple(int(each) for each in place)
    return (
        f"{int(bad.sum())} of {bad.size} elements differ, at {where}: "
        f"{found[place]!r} instead of {expected[place]!r}"
    )


def assert_same_bits(actual: Any, expected: Any) -> None:
    """Equal dtypes, shapes and bits; all NaNs count as one value."""
    actual, expected = as_array(actual), as_array(expected)
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"shape {actual.shape}, expected {expected.shape}"
    differ = bits(actual) != bits(expected)
    if actual.dtype in FLOATS:
        differ &= ~(np.isnan(actual) & np.isnan(expected)).reshape(-1)
    assert not differ.any(), f"{int(differ.sum())} of {differ.size} elements differ in their bits"


def bits(array: Array) -> Array:
    """The elements as unsigned integers, in row-major order."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(f"u{flat.dtype.itemsize}")


def as_array(x: Any) -> Array:
    return x.numpy() if isinstance(x, (Tensor, ndl.NDArray)) else np.asarray(x)


def as_tuple(found: Any) -> tuple[Any, ...]:
    """The results of a function that may have several."""
    return tuple(found) if isinstance(found, (tuple, list, ndl.TensorTuple)) else (found,)


def float_places(arrays: Sequence[Array]) -> list[int]:
    return [place for place, array in enumerate(arrays) if np.asarray(array).dtype in FLOATS]


# Gradients


def derivative(function: Callable[[float], float], step: float = 1e-3) -> float:
    """f'(0) by five points: (8 (f(h) - f(-h)) - (f(2h) - f(-2h))) / 12h, off by O(h^4)."""
    near = function(step) - function(-step)
    far = function(2 * step) - function(-2 * step)
    return (8 * near - far) / (12 * step)


def directions(rng: np.random.Generator, arrays: Sequence[Any]) -> list[Array]:
    """A random direction for each array, every element between 0.5 and 1 in size."""
    found = []
    for array in arrays:
        size = rng.uniform(0.5, 1.0, np.shape(array))
        found.append(np.where(rng.random(np.shape(array)) < 0.5, -size, size))
    return found


def project(outputs: Sequence[Any], weights: Sequence[Array]) -> float:
    """The sum of the products of float outputs with weights."""
    arrays = [as_array(each) for each in outputs]
    floats = [array for array in arrays if array.dtype in FLOATS]
    return float(sum(np.sum(x * w) for x, w in zip(floats, weights, strict=True)))


def moved(arrays: Sequence[Array], along: dict[int, Array], t: float) -> list[Array]:
    """The arrays, those at some places moved by t times a direction."""
    return [x + t * along[place] if place in along else x for place, x in enumerate(arrays)]


def gradients(
    function: Callable[..., Any],
    arrays: Sequence[Array],
    weights: Sequence[Array],
    wanted: Sequence[int],
    device: Any = None,
) -> list[Tensor]:
    """What backward finds for the wanted inputs, from the outputs' gradients `weights`."""
    tensors = [
        Tensor(x, device=device, requires_grad=place in wanted) for place, x in enumerate(arrays)
    ]
    outputs = [y for y in as_tuple(function(*tensors)) if y.dtype in FLOATS]
    backward(
        outputs,
        [Tensor(w, device=device, dtype=y.dtype) for w, y in zip(weights, outputs, strict=True)],
    )
    return [drop_gradient(tensors[place]) for place in wanted]


def drop_gradient(x: Tensor) -> Tensor:
    """A tensor's gradient without history (zeros where there is none), taken from it, so that no
    cycle is left behind."""
    found = x.detach() * 0.0 if x.grad is None else x.grad.detach()
    x.grad = None
    return found


def backward(outputs: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
    """Reverse mode from one output by its own backward, from several by that of their sum."""
    pairs = [(y, w) for y, w in zip(outputs, weights, strict=True) if y.requires_grad]
    if len(pairs) == 1:
        pairs[0][0].backward(pairs[0][1])
    elif pairs:
        total = (pairs[0][0] * pairs[0][1]).sum()
        for y, w in pairs[1:]:
            total = total + (y * w).sum()
        total.backward()


def assert_gradient(
    function: Callable[..., Any],
    reference: Callable[..., Any],
    arrays: Sequence[Array],
    wanted: Sequence[int],
    rng: np.random.Generator,
    device: Any = None,
) -> None:
    """One random projection of the Jacobian: backward's, and by differences of the reference."""
    outputs = [y for y in map(np.asarray, as_tuple(reference(*arrays))) if y.dtype in FLOATS]
    weights = directions(rng, outputs)
    along = dict(zip(wanted, directions(rng, [arrays[place] for place in wanted]), strict=True))
    grads = gradients(function, arrays, weights, wanted, device)
    for place, grad in zip(wanted, grads, strict=True):
        assert grad.shape == arrays[place].shape, (
            f"gradient of shape {grad.shape} for input {place}"
        )
        assert grad.dtype == arrays[place].dtype, (
            f"gradient of dtype {grad.dtype} for input {place}"
        )
    parts = [grad.numpy() * along[place] for place, grad in zip(wanted, grads, strict=True)]
    expected = derivative(lambda t: project(as_tuple(reference(*moved(arrays, along, t))), weights))
    compare_projections(parts, expected)


def compare_projections(parts: Sequence[Array], expected: float) -> None:
    found = float(sum(part.sum() for part in parts))
    scale = float(sum(np.abs(part).sum() for part in parts)) + abs(expected) + 1e-3
    error = abs(found - expected) / scale
    assert error <= GRADIENT_TOLERANCE, f"backward {found!r}, differences {expected!r}: {error:.3g}"


def assert_second_order(
    function: Callable[..., Any],
    arrays: Sequence[Array],
    wanted: Sequence[int],
    rng: np.random.Generator,
) -> None:
    """A projection of the second derivatives, by inputs and by the output's gradient.

    s = sum of the first gradients times random numbers; s.backward() against differences of s.
    """
    with ndl.no_grad():
        outputs = [y for y in as_tuple(function(*map(Tensor, arrays))) if y.dtype in FLOATS]
    starts = directions(rng, outputs)
    leaves = [arrays[place] for place in wanted] + starts
    along = directions(rng, leaves)
    chosen = directions(rng, leaves[: len(wanted)])

    def first_order(values: Sequence[Array]) -> tuple[list[Tensor], Tensor]:
        tensors = [Tensor(x, requires_grad=False) for x in arrays]
        for place, value in zip(wanted, values, strict=False):
            tensors[place] = Tensor(value)
        weights = [Tensor(value) for value in values[len(wanted) :]]
        backward([y for y in as_tuple(function(*tensors)) if y.dtype in FLOATS], weights)
        used = [tensors[place] for place in wanted]
        total = Tensor(np.zeros(()), requires_grad=False)
        for x, direction in zip(used, chosen, strict=True):
            if x.grad is not None:
                total = total + (x.grad * direction).sum()
        return [*used, *weights], total

    tensors, total = first_order(leaves)
    for x in tensors:
        x.grad = None
    if total.requires_grad:
        total.backward()
    parts = [drop_gradient(x).numpy() * v for x, v in zip(tensors, along, strict=True)]

    def shifted(t: float) -> float:
        values = [x + t * v for x, v in zip(leaves, along, strict=True)]
        used, found = first_order(values)
        for x in used:
            x.grad = None
        return found.item()

    compare_projections(parts, derivative(shifted))


# Modes


@contextmanager
def lazy_flag() -> Any:
    """LAZY_MODE, as the course sets it."""
    autograd.LAZY_MODE = True
    try:
        yield
    finally:
        autograd.LAZY_MODE = False


LAZY_MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "lazy()": ndl.lazy,
    "LAZY_MODE": lazy_flag,
}


def forward_and_gradients(
    function: Callable[..., Any], arrays: Sequence[Array], wanted: Sequence[int]
) -> list[Array]:
    """All outputs, and the gradients of the wanted inputs for output gradients of ones."""
    tensors = [Tensor(x, requires_grad=place in wanted) for place, x in enumerate(arrays)]
    outputs = as_tuple(function(*tensors))
    floats = [y for y in outputs if y.dtype in FLOATS]
    backward(floats, [Tensor(np.ones(y.shape), dtype=y.dtype, requires_grad=False) for y in floats])
    values = [y.numpy() for y in outputs]
    return values + [drop_gradient(tensors[place]).numpy() for place in wanted]


def assert_lazy_is_eager(
    function: Callable[..., Any],
    arrays: Sequence[Array],
    wanted: Sequence[int],
    mode: Callable[[], AbstractContextManager[Any]],
) -> None:
    """The same bits, forward and backward, whether ops run when called or when asked."""
    expected = forward_and_gradients(function, arrays, wanted)
    with mode():
        actual = forward_and_gradients(function, arrays, wanted)
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert_same_bits(x, y)


def assert_infers(
    function: Callable[..., Any], arrays: Sequence[Array], wanted: Sequence[int]
) -> None:
    """What infer said of every node of a function's graph is what the node's value has."""
    with ndl.lazy():
        tensors = [Tensor(x, requires_grad=place in wanted) for place, x in enumerate(arrays)]
        outputs = as_tuple(function(*tensors))
    pending = [node for node in autograd.find_topo_sort(outputs) if node.cached_data is None]
    said = [node.spec for node in pending]
    for node, spec in zip(pending, said, strict=True):
        op = type(node.op).__name__
        data = node.realize_cached_data()
        found = tuple(each.spec for each in data) if isinstance(data, tuple) else data.spec
        assert found == spec, f"{op}: infer said {spec}, compute gave {found}"
