"""ndl.scan: a loop as one op, against the same loop in Python, with the same bits in every mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checks import assert_close, assert_gradient, assert_same_bits, draw

import needle as ndl
from needle import autograd, compiler, init, nn, ops
from needle.autograd import Tensor, TensorOp
from needle.capture.structure import walk
from needle.compiler import compile as passes
from needle.compiler import engine, graph, interpret
from needle.compiler.explain import innermost
from needle.compiler.loops import AnyNest, Contraction, HostCall, Repeat

Function = Callable[..., Any]
T, B, H = 6, 3, 4


def like(x: Tensor, array: Any) -> Tensor:
    return Tensor(array, device=x.device, requires_grad=False)


def data(*shape: int, seed: int = 0, dtype: str = "float64") -> Tensor:
    return Tensor(draw(*shape, seed=seed, dtype=dtype) * 0.5)


def leaves(found: Any) -> list[Tensor]:
    return [x for _, x in walk(found, "") if isinstance(x, Tensor)]


def unrolled(
    body: Function, carry: Any, xs: Any = None, length: int | None = None, reverse: bool = False,
    checkpoint_every: int | None = None,
) -> Any:  # fmt: skip
    """What scan means."""
    count = leaves(xs)[0].shape[0] if length is None else length
    ys: list[Any] = [None] * count
    for place in range(count)[:: -1 if reverse else 1]:
        element = ndl.scan.__globals__["mapped"](xs, lambda x, place=place: x[place])
        carry, ys[place] = body(carry, element)
    columns = zip(*map(leaves, ys), strict=True)
    stacks = iter([ops.stack(list(column)) for column in columns])
    return carry, ndl.scan.__globals__["mapped"](ys[0], lambda _: next(stacks))


# Bodies: each with its initial carry, its xs, and what it captures


def tanh_cell(h: Tensor, x: Tensor, w: Tensor, b: Tensor) -> Any:
    h = ops.tanh(x + h @ w + b)
    return h, (h, h * x)


def lstm_cell(carry: dict[str, Tensor], x: Tensor, w: Tensor, b: Tensor) -> Any:
    i, f, g, o = ops.split(ops.concatenate([x] * 4, 1) + carry["h"] @ w + b, 1, H)
    c = ops.sigmoid(f) * carry["c"] + ops.sigmoid(i) * ops.tanh(g)
    return {"c": c, "h": ops.sigmoid(o) * ops.tanh(c)}, [c]


def counting(carry: Any, x: Tensor, scale: Tensor) -> Any:
    """An integer among the carries, one that no gradient goes through, one that swaps."""
    n, total, (a, b) = carry
    total = total + x * scale * (n + 1).astype(x.dtype)
    return (n + 1, total, (b, a * 0.5)), (n, total)


def products(h: Tensor, x: Tensor, w: Tensor, left: Tensor) -> Any:
    """Batched, broadcast, and a weight on the left."""
    y = ops.relu(x.reshape((B, 2, 2)) @ w) @ w  # (B, 2, 2)
    h = 0.5 * h + (left @ ops.sin(h)) + y.reshape((B, H))
    return h, ops.stack([h, x]).sum((0, 2))


def nothing_stays(h: Tensor, x: Tensor, w: Tensor) -> Any:
    """What does not change from turn to turn; a captured tensor as a result, None."""
    gain = ops.exp(w).sum() * 0.01
    return h * 0.9 + x * gain, (w * gain, None)


def inner_loop(h: Tensor, x: Tensor, w: Tensor) -> Any:
    h, ys = ndl.scan(lambda a, y: (ops.tanh(a * y + w), a), h, ops.stack([x, x * x]))
    return h, ys.sum(0)


def without_history(h: Tensor, x: Tensor, w: Tensor) -> Any:
    with ndl.no_grad():
        size = (h * h).sum() + 1.0
    return (h + x) * w / size.detach(), h.max(1)


BODIES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "tanh": (tanh_cell, lambda h: h, [(H, H), (H,)]),
    "lstm": (lstm_cell, lambda h: {"c": h, "h": h * 0.5}, [(H, 4 * H), (4 * H,)]),
    "counting": (
        counting,
        lambda h: (like(h, np.array(2)), h, (like(h, np.ones(2)), like(h, np.zeros(2)))),
        [(B, H)],
    ),
    "products": (products, lambda h: h, [(2, 2), (B, B)]),
    "constants": (nothing_stays, lambda h: h, [(H,)]),
    "nested": (inner_loop, lambda h: h, [(H,)]),
    "no_grad": (without_history, lambda h: h, [(H,)]),
}
each_body = pytest.mark.parametrize("name", BODIES)


def case(name: str, dtype: str = "float64", device: Any = None) -> tuple[Function, list[Tensor]]:
    """A function of (scan, options) that gives losses' parts, and the tensors it depends on."""
    body, begin, shapes = BODIES[name]
    arrays = [data(*shape, seed=n, dtype=dtype) for n, shape in enumerate([(B, H), (T, B, H), *shapes])]
    tensors = [Tensor(x, device=device) for x in arrays]

    def run(scan: Function, h: Tensor, xs: Tensor, *more: Tensor, **options: Any) -> list[Tensor]:
        found = scan(lambda carry, x: body(carry, x, *more), begin(h), xs, **options)
        return leaves(found)

    return run, tensors


def weigh(found: list[Tensor]) -> Tensor:
    total = ops.summation(found[0] * 0.0)
    for n, y in enumerate(found):
        if y.dtype.kind != "i":
            weights = like(y, draw(*y.shape, seed=100 + n).astype(y.dtype))
            total = total + (y * y * weights).sum()
    return total


def gradients(run: Function, tensors: list[Tensor], scan: Function, **options: Any) -> list[Any]:
    found = run(scan, *tensors, **options)
    weigh(found).backward()
    return [*found, *(x.grad for x in tensors)]


@each_body
@pytest.mark.parametrize("device", [ndl.cpu(), ndl.cpu_numpy()], ids=str)
@pytest.mark.parametrize("options", [{}, {"reverse": True}, {"checkpoint_every": 4}], ids=str)
def test_a_scan_is_its_loop(name: str, options: dict[str, Any], device: Any) -> None:
    run, tensors = case(name, device=device)
    expected = [x.numpy().copy() for x in gradients(run, tensors, unrolled, **options)]
    found = gradients(run, tensors, ndl.scan, **options)
    for y, wanted in zip(found, expected, strict=True):
        assert_close(y, wanted, length=T * B * H)


@each_body
def test_second_derivatives(name: str) -> None:
    run, tensors = case(name)

    def penalty(scan: Function) -> list[np.ndarray]:
        def loss(*given: Tensor) -> Tensor:
            grads = ndl.grad(lambda *xs: weigh(run(scan, *xs)), tuple(range(len(given))))(*given)
            return sum((g * g).sum() for g in grads)  # type: ignore[return-value]

        grads = ndl.grad(loss, tuple(range(len(tensors))))(*tensors)
        return [g.numpy() for g in grads]

    for y, wanted in zip(penalty(ndl.scan), penalty(unrolled), strict=True):
        assert_close(y, wanted, length=T * B * H)


def test_gradients_are_derivatives() -> None:
    run, tensors = case("lstm")
    arrays = [x.numpy() for x in tensors]
    assert_gradient(lambda *xs: run(ndl.scan, *xs), arrays, tuple(range(len(arrays))))


# The same bits


def in_every_mode(function: Function, tensors: list[Tensor]) -> list[list[np.ndarray]]:
    """The function's results in eager and lazy mode, and compiled for one thread and for two."""
    found = [function(*tensors)]
    with ndl.lazy():
        found.append(function(*tensors))
        [y.numpy() for y in found[-1]]
    threads = ndl.get_num_threads()
    for count in (1, 2):
        ndl.set_num_threads(count)
        found.append(ndl.jit(function)(*tensors))
    ndl.set_num_threads(threads)
    return [[y.numpy() for y in each] for each in found]


@each_body
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modes_agree(name: str, dtype: str) -> None:
    run, tensors = case(name, dtype)

    def step(*given: Tensor) -> list[Tensor]:
        return gradients(run, list(given), ndl.scan)

    eager, *others = in_every_mode(
        lambda *given: [*ndl.vjp(lambda *x: run(ndl.scan, *x), *given)[0], *grads_of(run, given)],
        tensors,
    )
    for each in others:
        for y, wanted in zip(each, eager, strict=True):
            assert_same_bits(y, wanted)


def grads_of(run: Function, given: Any) -> Any:
    return ndl.grad(lambda *x: weigh(run(ndl.scan, *x)), tuple(range(len(given))))(*given)


def lowered(name: str) -> tuple[passes.Lowered, list[np.ndarray], list[np.ndarray]]:
    """A scan with its gradients after all passes, its inputs, and what eager mode makes of them."""
    run, tensors = case(name, "float32")
    eager = [y.numpy() for y in (*run(ndl.scan, *tensors), *grads_of(run, tensors))]
    with ndl.lazy():
        outputs = [*run(ndl.scan, *tensors), *grads_of(run, tensors)]
        source = graph.trace(tensors, outputs)
    return passes.lower(source), [x.numpy() for x in tensors], eager


@each_body
@pytest.mark.parametrize("off", ["", "simplify", "fuse", "reuse"])
def test_the_interpreters_agree(name: str, off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "OFF", {off} - {""})
    for module in (passes, graph, *map(__import__, ())):
        monkeypatch.setattr(module, "OFF", {off} - {""}, raising=False)
    found, arrays, eager = lowered(name)
    memory: dict[Any, np.ndarray] = {}
    for node in found.graph.nodes:
        if node.is_leaf:
            known = getattr(node.op, "array", None)
            array = arrays[node.op.number] if known is None else known
            memory[found.layout.buffer(node)] = np.ravel(array)
    nests = [nest for kernel in found.schedule.kernels for nest in kernel]
    for nest in nests:
        for buffer in nest.reads() | nest.writes():
            memory.setdefault(buffer, np.zeros(buffer.size, buffer.dtype))
        interpret.run(nest, memory)
    for buffer, wanted in zip(found.outputs, eager, strict=True):
        if name != "products":  # its sums cancel NaN-free, yet exp and the like are the kernels'
            assert_close(memory[buffer].reshape(wanted.shape), wanted.astype("float64"), length=64)
    values = graph.interpret(found.graph, arrays)
    for y, wanted in zip(values, eager, strict=True):
        assert_close(y, wanted.astype("float64"), length=64)
