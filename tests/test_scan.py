"""ndl.scan: a loop as one op, against the same loop in Python, with the same bits in every mode."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checks import assert_close, assert_gradient, assert_same_bits, draw

import needle as ndl
from needle import compiler, init, nn, ops
from needle.autograd import Tensor, TensorOp
from needle.capture.structure import walk
from needle.compiler import compile as passes
from needle.compiler import engine, graph, interpret, limits
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
    arrays = [
        data(*shape, seed=n, dtype=dtype) for n, shape in enumerate([(B, H), (T, B, H), *shapes])
    ]
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
@pytest.mark.parametrize(
    ("options", "device"),
    [({}, ndl.cpu()), ({}, ndl.cpu_numpy()), ({"reverse": True}, ndl.cpu()),
     ({"checkpoint_every": 4, "reverse": True}, ndl.cpu())],
    ids=str,
)  # fmt: skip
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

    def reference(*given: Any) -> list[np.ndarray]:
        return [y.numpy() for y in run(unrolled, *map(Tensor, given))]

    wanted = range(len(arrays))
    assert_gradient(
        lambda *xs: tuple(run(ndl.scan, *xs)), reference, arrays, wanted, np.random.default_rng(0)
    )


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


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in BODIES), ("lstm", "bfloat16"), ("counting", "float16")],
)
def test_modes_agree(name: str, dtype: str) -> None:
    run, tensors = case(name, dtype)

    eager, *others = in_every_mode(
        lambda *given: [*run(ndl.scan, *given), *grads_of(run, given)], tensors
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


@pytest.mark.parametrize(
    ("name", "off"),
    [*((name, "") for name in BODIES), *(("nested", x) for x in ("simplify", "fuse", "reuse"))],
)
def test_the_interpreters_agree(name: str, off: str) -> None:
    compiler.OFF.update({off} - {""})
    try:
        check_interpreters(name)
    finally:
        compiler.OFF.clear()


def check_interpreters(name: str) -> None:
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
        assert_same_bits(memory[buffer].reshape(wanted.shape), wanted)
    values = graph.interpret(found.graph, arrays)
    for y, wanted in zip(values, eager, strict=True):
        assert_close(y, wanted.astype("float64"), length=64)


# What draws, and what writes


def noisy(scan: Function) -> Function:
    drop = nn.Dropout(0.4)

    def step(x: Tensor) -> list[Tensor]:
        h, ys = scan(lambda h, x: (h * 0.5 + drop(x), drop(h)), x[0], x)
        ((h * h).sum() + (ys * ys * ys).sum()).backward()
        return [h, ys, x.grad]  # type: ignore[list-item]

    return step


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}], ids=str)
def test_draws_differ_from_turn_to_turn_and_are_those_of_the_loop(options: dict[str, Any]) -> None:
    """Also where a checkpoint draws them again."""
    results = []
    for scan in (unrolled, lambda *given: ndl.scan(*given, **options)):
        ndl.seed(3)
        found = noisy(scan)(data(T, B, H))
        results.append([y.numpy() for y in found])
        results[-1].append(init.generator().state.numpy())  # type: ignore[union-attr]
    for y, wanted in zip(*results, strict=True):
        assert_close(y, wanted)
    zeros = results[1][1] == 0
    assert len({row.tobytes() for row in zeros[1:]}) > 1


def test_a_compiled_scan_draws_what_an_eager_one_does() -> None:
    step = noisy(ndl.scan)
    found = []
    for run in (step, ndl.jit(step)):
        ndl.seed(3)
        found.append([y.numpy() for _ in range(2) for y in run(data(T, B, H))])
    for y, wanted in zip(*found, strict=True):
        assert_same_bits(y, wanted)
    assert (found[0][1] != found[0][4]).any(), "the second call draws anew"


def test_draws_without_a_seed_follow_numpy() -> None:
    results = []
    for number in (0, 0, 1):
        np.random.seed(number)
        results.append(noisy(ndl.scan)(data(T, B, H))[1].numpy())
    assert_same_bits(results[0], results[1])
    assert (results[0] != results[2]).any()


def test_a_tensor_that_the_body_sets_is_carried() -> None:
    count = Tensor(np.zeros(2), requires_grad=False)

    def body(h: Tensor, x: Tensor) -> Any:
        count.data = count.detach() * 0.5 + x
        return h + count, count * 2.0

    for run in (ndl.scan, ndl.jit(lambda h, x: ndl.scan(body, h, x))):
        count.data = Tensor(np.zeros(2))
        arguments = (data(2), data(T, 2, seed=1))
        _, ys = run(*((body, *arguments) if run is ndl.scan else arguments))
        expected = np.zeros(2)
        for x in arguments[1].numpy():
            expected = expected * 0.5 + x
        assert_close(count, expected)
        assert_close(ys[-1], expected * 2)


# Odd cases


def test_no_turns_and_no_rows() -> None:
    w = data(H, H, seed=2)
    for mode in (lambda f: f, ndl.jit):
        run = mode(lambda h, x: ndl.scan(lambda h, x: (ops.tanh(x + h @ w), h), h, x))
        h, ys = run(data(B, H), data(0, B, H))
        assert_same_bits(h, data(B, H))
        assert ys.shape == (0, B, H)
        h, ys = run(data(0, H), data(T, 0, H))
        assert (h.shape, ys.shape) == ((0, H), (T, 0, H))
        h, ys = run(data(B, H), data(1, B, H))
        assert_close(ys[0], data(B, H).numpy())


def test_length_without_xs() -> None:
    h, ys = ndl.scan(lambda h, _: (h * 2.0, h + 1.0), data(2), length=3)
    assert_close(h, data(2).numpy() * 8)
    assert_close(ys[2], data(2).numpy() * 4 + 1)
    (h, none), ys = ndl.scan(lambda c, x: ((c[0] * x, None), None), (data(2), None), data(T, 2))
    assert none is None
    assert ys is None


def test_views_are_read_where_they_lie() -> None:
    w, x = data(H, H, seed=1), data(B, H, T)
    xs = ops.flip(ops.permute(x, (2, 0, 1)), (0,))[1:]
    wide = ops.broadcast_to(data(1, H, seed=3), (B, H))
    for scan in (ndl.scan, ndl.jit(lambda *given: ndl.scan(body, *given))):

        def body(h: Tensor, x: Tensor) -> Any:
            return (ops.tanh(x + h @ w.transpose()) * wide,) * 2

        found = scan(*((body, data(B, H), xs) if scan is ndl.scan else (data(B, H), xs)))
        expected = unrolled(body, data(B, H), xs)
        for y, wanted in zip(found, expected, strict=True):
            assert_close(y, wanted.numpy(), length=H)


class Doubled(TensorOp):
    """A user's own op, which the host computes."""

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x * 2

    def gradient(self, out_grad: Tensor, node: Any) -> Tensor:
        return out_grad * 2.0


def test_a_users_own_op_in_a_body() -> None:
    def step(h: Tensor, x: Tensor) -> list[Tensor]:
        h, ys = ndl.scan(lambda h, x: (Doubled()(h * 0.4) + x, h), h, x)
        return [h, ys]

    given = [data(B, H, dtype="float32"), data(T, B, H, seed=1, dtype="float32")]
    eager, *others = in_every_mode(step, given)
    expected = unrolled(lambda h, x: (h * 0.8 + x, h), *given)
    for each in others:
        for y, wanted, right in zip(each, eager, expected, strict=True):
            assert_same_bits(y, wanted)
            assert_close(y, right.numpy().astype("float64"), length=T)


@pytest.mark.parametrize("device", [ndl.cpu(), ndl.cpu_numpy()], ids=str)
def test_an_index_out_of_range_in_a_body(device: Any) -> None:
    table = Tensor(draw(5, 2), device=device)
    rows = like(table, np.array([0, 4, 7, 1]))

    def look(rows: Tensor) -> Any:
        return ndl.scan(lambda h, i: (h + ops.take(table, i), h), table[0] * 0.0, rows)

    for run in (look, ndl.jit(look)):
        with pytest.raises(IndexError, match="7"):
            run(rows)
        h, _ = run(like(table, np.array([0, 4, -1, 1])))
        assert_close(h, table.numpy()[[0, 4, -1, 1]].sum(0), length=4)


def test_a_checkpointed_function_and_jit_in_a_body() -> None:
    w = data(H, H, seed=2)
    plain = lambda h, x: (ops.tanh(x + h @ w), h)  # noqa: E731
    results = []
    for body in (plain, ndl.checkpoint(plain), ndl.jit(plain)):
        x = data(T, B, H)
        h, ys = ndl.checkpoint(lambda x, body=body: ndl.scan(body, data(B, H), x))(x)
        ((h * h).sum() + (ys * ys).sum()).backward()
        results.append([y.numpy() for y in (h, ys, x.grad, w.grad)])
    for each in results[1:]:
        for y, wanted in zip(each, results[0], strict=True):
            assert_same_bits(y, wanted)


def test_autocast_reaches_the_body() -> None:
    w = data(H, H, seed=2, dtype="float32")

    def run(x: Tensor) -> Any:
        with ndl.autocast():
            return ndl.scan(lambda h, x: ((x + h @ w).astype("float32"), h @ w), x[0], x)

    x = data(T, B, H, dtype="float32")
    h, ys = run(x)
    assert (h.dtype, ys.dtype) == (ndl.float32, ndl.bfloat16)
    for y, wanted in zip(ndl.jit(run)(x), (h, ys), strict=True):
        assert_same_bits(y, wanted)


# How it is compiled


def program_of(function: Any) -> Any:
    (_, (program, *_)), *_ = function.programs()
    return program


def nests_of(function: Any) -> list[AnyNest]:
    found = program_of(function)
    found = found.lowered or passes.lower(found.source, found.donated)
    return [nest for kernel in found.schedule.kernels for nest in kernel]


def recurrent(steps: int, **options: Any) -> tuple[Any, tuple[Tensor, Tensor]]:
    """A compiled step of a network, forward and backward."""
    w, b = data(16, 64, seed=1, dtype="float32"), data(64, seed=2, dtype="float32")

    def body(state: Any, x: Tensor) -> Any:
        h, c = state
        i, f, g, o = ops.split(x + h @ w + b, 1, 16)
        c = ops.sigmoid(f) * c + ops.sigmoid(i) * ops.tanh(g)
        h = ops.sigmoid(o) * ops.tanh(c)
        return (h, c), h

    @ndl.jit
    def step(x: Tensor) -> Tensor:
        zero = ndl.zeros(8, 16)
        _, y = ndl.scan(body, (zero, zero), x, **options)
        loss = (y * y).sum()
        loss.backward()
        return loss

    step(data(steps, 8, 64, dtype="float32"))
    return step, (w, b)


def test_a_step_is_a_product_and_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    step, _ = recurrent(12)
    loops = [nest for nest in nests_of(step) if isinstance(nest, Repeat)]
    assert [len(each.kernels) for each in loops] == [2, 2]
    assert [len(each.nests) for each in loops] == [2, 2]
    products = [nest for nest in nests_of(step) if isinstance(nest, Contraction)]
    assert [(each.m, each.n, each.k) for each in products] == [(16, 64, 12 * 8)], "dw is one"
    text = step.explain()
    assert "loop of 12 turns" in text
    assert "kernel 1 of a turn" in text
    assert step.explain("loops").count("repeat 12") == 2
    assert "define" in step.explain("llvm")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_matrix_is_laid_out_before_the_loop(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 256 bytes of columns, forward and, of its transpose, backward; the same bits as
    without them and as in a loop in Python."""
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    given = [
        data(*shape, seed=n, dtype=dtype)
        for n, shape in enumerate([(12, 64), (5, 12, 128), (64, 128)])
    ]

    def run(scan: Function, h: Tensor, xs: Tensor, w: Tensor) -> list[Tensor]:
        def body(h: Tensor, x: Tensor) -> Any:
            a, b = ops.split(ops.tanh(x + h @ w), 1, 64)
            h = a + (b @ w)[:, :64] * 0.5
            return h, h

        return leaves(scan(body, h, xs))

    blocked = ndl.jit(lambda *x: [*run(ndl.scan, *x), *grads_of(run, x)])
    found = [y.numpy().copy() for y in blocked(*given)]
    inner = [nest for each in nests_of(blocked) if isinstance(each, Repeat) for nest in each.nests]
    batches = {nest.batch for nest in inner if isinstance(nest, Contraction)}
    # A matrix of one block's width stays as it is
    assert batches == ({(2,), ()} if dtype == "float32" else {(4,), (2,)})
    assert_same_bits(found[1], run(unrolled, *given)[1].numpy())
    compiler.OFF.add("simplify")
    try:
        plain = ndl.jit(lambda *x: [*run(ndl.scan, *x), *grads_of(run, x)])(*given)
    finally:
        compiler.OFF.clear()
    for y, wanted in zip(found, plain, strict=True):
        assert_same_bits(y, wanted.numpy())


def test_another_length_compiles_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    step, _ = recurrent(96)
    compiled: list[str] = []
    build = engine.compile_ir
    monkeypatch.setattr(engine, "compile_ir", lambda text: compiled.append(text) or build(text))
    for steps in (100, 160):
        step(data(steps, 8, 64, dtype="float32"))
    launches = [len(program.recipe.launches) for _, [program, *_] in step.programs()]
    assert len(launches) == 3
    assert len(set(launches)) == 1
    assert not compiled


def test_checkpoints_save_memory() -> None:
    arenas, grads = [], []
    for k in (None, 8):
        step, (w, b) = recurrent(64, checkpoint_every=k)
        arenas.append(program_of(step).arena)
        grads.append([y.grad.numpy() for y in (w, b)])
    assert arenas[1] < 0.7 * arenas[0]
    for y, wanted in zip(*grads, strict=True):
        assert_same_bits(y, wanted)


def test_a_y_that_nobody_reads_is_not_stacked() -> None:
    step = ndl.jit(lambda x: ndl.scan(lambda h, x: (h + x, ops.exp(h)), x[0], x)[0])
    step(data(T, 1000, dtype="float32"))
    (loop,) = [nest for nest in nests_of(step) if isinstance(nest, Repeat)]
    stores = [nest for nest in innermost(loop.nests) if not isinstance(nest, HostCall)]
    assert len(stores) == 1
    assert max(x.size for x in loop.writes()) == 2 * 1000, "a carry has two places"


def test_the_disk_cache_knows_a_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("peak", "bandwidth"):  # measuring them takes long
        monkeypatch.setattr(limits, name, lambda *given: 1e11)
    results = []
    for _ in range(2):
        step, (w, b) = recurrent(10)
        results.append([y.grad.numpy() for y in (w, b)])
    assert program_of(step).lowered is None, "it came from the cache"
    text = step.explain(time=True)
    assert "loop of 10 turns" in text
    assert re.search(r"kernel 0 of a turn\n +contraction .* us\n", text), "nests have times"
    for y, wanted in zip(*results, strict=True):
        assert_same_bits(y, wanted)


def test_a_nan_in_a_body_is_found() -> None:
    def step(x: Tensor) -> Tensor:
        return ndl.scan(lambda h, x: (h * x, ops.log(x)), x[0] * 0.0 + 1.0, x)[0]

    good, bad = np.full((T, 4), 2.0, np.float32), np.full((T, 4), 2.0, np.float32)
    bad[3] = np.inf
    bad[4] = 0.0
    for run in (step, ndl.jit(step)):
        with ndl.debug.detect_anomaly():
            run(Tensor(good))
            with pytest.raises(ArithmeticError, match="scan"):
                run(Tensor(bad))


# Errors


def wrong(message: str, kind: type[Exception] = ValueError) -> Any:
    return pytest.raises(kind, match=message)


def test_errors_say_what_was_expected() -> None:
    h, x = data(2), data(T, 2)
    same = lambda h, x: (h, x)  # noqa: E731
    with wrong("scan: expected a function; received a int", TypeError):
        ndl.scan(3, h, x)  # type: ignore[arg-type]
    with wrong(
        r"expected xs along a first axis of one length; received xs\[0\] of 6, xs\[1\] of 2"
    ):
        ndl.scan(same, h, (x, h))
    with wrong("received none and length=None"):
        ndl.scan(same, h)
    with wrong("received xs of 6 and length=5"):
        ndl.scan(same, h, x, length=5)
    with wrong("expected Tensors; received a float at init", TypeError):
        ndl.scan(same, 1.0, x)
    with wrong(r"returns the carry as it came: carry float64\[2\]; received float32\[2\]"):
        ndl.scan(lambda h, x: (h.astype("float32"), x), h, x)
    with wrong("the carry as it came: carry; received carry.0., carry.1.", TypeError):
        ndl.scan(lambda h, x: ((h, h), x), h, x)
    with wrong(r"expected a body that returns \(carry, y\); received Tensor", TypeError):
        ndl.scan(lambda h, x: h, h, x)
    with wrong("expected Tensors; received a int at y", TypeError):
        ndl.scan(lambda h, x: (h, 3), h, x)
    with wrong("checkpoint_every of at least 1; received 0"):
        ndl.scan(same, h, x, checkpoint_every=0)
    with wrong("a gradient", ValueError):
        ndl.scan(lambda h, x: (h, setattr(h, "data", x) or setattr(w, "data", x)), h, x)


w = data(2, seed=5)


def test_a_body_that_needs_a_value() -> None:
    for run in (lambda f: f, ndl.jit):
        with pytest.raises(ndl.TraceError, match="ndl.where"):
            run(lambda x: ndl.scan(lambda h, x: (h if x.sum() > 0 else -h, x), x[0], x))(data(T, 2))
    h, _ = ndl.scan(lambda h, x: (h + x, None), data(2), data(T, 2))
    assert_close(h, data(2).numpy() + data(T, 2).numpy().sum(0), length=T)
