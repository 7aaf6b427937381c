"""The compiler as a whole: which ops it knows, what it refuses, what it leaves alone; and an error
planted in each pass, which comparing programs with eager mode must find."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits, draw

import needle as ndl
from needle import nn, ops, optim
from needle.array.spec import Spec
from needle.autograd import Op, Tensor, TensorOp, compute_gradient_of_variables
from needle.compiler import compile as passes
from needle.compiler import fuse, graph, interpret, lower, runtime, schedule, simplify
from needle.compiler.loops import Buffer, HostCall, show
from needle.ops.composite import CompositeMethods, placeholder, tracing

GOLDEN = Path(__file__).resolve().parent / "golden"
F32 = np.dtype(np.float32)


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """One and two threads, and then as many as before."""
    before = runtime.get_num_threads()
    runtime.set_num_threads(request.param)
    yield request.param
    runtime.set_num_threads(before)


def data(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(draw(*shape, seed=seed, dtype="float32"), requires_grad=False)


# The table of ops


def subclasses(cls: type) -> Iterator[type]:
    for each in cls.__subclasses__():
        yield each
        yield from subclasses(each)


def test_every_primitive_has_a_lowering() -> None:
    """Or is one of those that the graph is made without."""
    own = {
        cls
        for cls in subclasses(Op)
        if cls.__dict__.get("is_builtin") and cls.__module__.startswith("needle.")
    }
    primitives = {cls for cls in own if not issubclass(cls, CompositeMethods)}
    missing = primitives - lower.LOWERED - lower.HOST
    resolved = {
        "MakeTensorTuple",
        "TupleGetItem",
        "Split",
        "FusedAddScalars",
        "Scan",
    }  # graph.apply
    assert {cls.__name__ for cls in missing} == resolved | {"Transpose"}
    assert ops.Transpose in simplify.LOWERED
    assert not lower.LOWERED & lower.HOST
    assert lower.LOWERED | lower.HOST <= primitives
    assert len(primitives) > 60


# Indices out of range


def gathered(x: Tensor, index: Tensor) -> Tensor:
    return ops.gather(x, 1, index.reshape((-1, 1)))


INDEXED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"take": ops.take, "gather": gathered}


@pytest.mark.parametrize("bad", [4, -5, 1 << 40])
@pytest.mark.parametrize("name", INDEXED)
def test_an_index_out_of_range_is_refused_and_nothing_changes(
    name: str, bad: int, threads: int
) -> None:
    weight = nn.Parameter(draw(4, 4, dtype="float32"))
    scale = nn.Parameter(draw(4, dtype="float32", seed=1))
    opt = optim.Adam([weight, scale], lr=0.1)

    def step(index: Tensor) -> Tensor:
        loss = (INDEXED[name](weight * scale, index) ** 2).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    good, wrong = (Tensor(np.array(x), dtype="int64") for x in ([0, 3, -4, 1], [0, 3, bad, 1]))
    jitted = ndl.jit(step)
    jitted(good)
    held = [weight, scale, *opt._tensors().values()]
    before = [x.numpy().copy() for x in held]
    with pytest.raises(IndexError, match=r"\w+: expected indices") as found:
        jitted(wrong)
    for x, old in zip(held, before, strict=True):
        assert_same_bits(x, old)
    with pytest.raises(IndexError) as expected:
        step(wrong)
    assert words(found.value) == words(expected.value)
    jitted(good)


def words(error: BaseException) -> str:
    """A message's op name, and the index that was received."""
    text = str(error)
    return text.split(":")[0] + text[text.index("received") :]


def test_a_scatter_checks_its_indices() -> None:
    def step(dy: Tensor, index: Tensor) -> Tensor:
        return ops.scatter_add(ndl.zeros(2, 3), 1, index, dy)

    dy, index = data(2, 2), Tensor(np.array([[1, 2], [0, 3]]), dtype="int64")
    with pytest.raises(IndexError) as found:
        ndl.jit(step)(dy, index)
    with pytest.raises(IndexError) as expected:
        step(dy, index)
    assert words(found.value) == words(expected.value)


# Large programs


def test_a_long_loop_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """5,000 nodes one above the other: no pass recurses."""
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")

    def chain(x: Tensor) -> Tensor:
        y = x
        for _ in range(1250):
            x = ops.tanh(x * 1.0001 + 0.5) - y
        return x.sum()

    x = data(2, 3)
    assert_same_bits(ndl.jit(chain)(x), chain(x))


def crossed(x: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
    """Two sums become one group, while `after` reads one of them; then `last` may not join `first`,
    which the other reads."""
    first = ops.exp(x)
    one, other = (first @ w).sum(1), (y @ w @ w).sum(1)
    after = other.reshape((1, 8)) @ w
    last = first + after.broadcast_to((8, 8))
    return [one, after, one + other, last, first]


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "float32"])
def test_extremes_of_many_elements_in_chunks_that_are_not_whole(dtype: str) -> None:
    given = (np.abs(draw(70_001)) * 50 % 2).astype(dtype)
    for x in (given, np.ones_like(given), np.zeros_like(given)):
        assert ops.max(Tensor(x)).item() == x.max()
        assert ops.min(Tensor(x)).item() == x.min()


def test_merged_groups_come_after_what_either_reads() -> None:
    xs = [data(8, 8, seed=seed) for seed in range(3)]
    for found, expected in zip(ndl.jit(crossed)(*xs), crossed(*xs), strict=True):
        assert_same_bits(found, expected)


def test_a_plan_larger_than_memory_says_its_size() -> None:
    weight = nn.Parameter(draw(1 << 20, 1, dtype="float32"))
    before = weight.numpy().copy()

    @ndl.jit
    def step() -> Tensor:
        y = ops.exp(weight + weight.transpose())
        weight.data = weight.data * 2.0
        return y

    said = r"jit: expected a program that fits in .* of memory; received one that needs 4.0 TiB"
    with pytest.raises(MemoryError, match=said):
        step()
    assert_same_bits(weight, before)
    assert weight.cached_data is not None


def test_temporaries_count_too() -> None:
    x = data(1 << 20, 1)
    with pytest.raises(MemoryError, match="8.0 TiB for outputs and temporaries"):
        ndl.jit(lambda x: ops.cumsum(ops.cumsum(x + x.transpose(), 0), 1).max())(x)


# Calls of the host


class Doubled(TensorOp):
    """y = 2x, by a user; refuses numbers above a limit."""

    limit = np.inf

    def compute(self, x: np.ndarray) -> np.ndarray:
        if x.max() > self.limit:
            raise OverflowError("too large for me")
        return x * np.float32(2)

    def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
        return out_grad * 2.0


def sorts(x: Tensor) -> Tensor:
    order = ops.argsort(ops.exp(x) - 1.0, 1)
    return (order.astype("float32") * x).sum(0)


def calls_own(x: Tensor) -> Tensor:
    return ops.tanh(Doubled()(ops.exp(x) + 1.0)).sum(1) * 3.0


@pytest.mark.parametrize("function", [sorts, calls_own])
def test_a_host_call_in_the_middle(function: Callable[[Tensor], Tensor], threads: int) -> None:
    x = data(40, 50)
    jitted = ndl.jit(function)
    for _ in range(2):
        assert_same_bits(jitted(x), function(x))


def test_an_error_in_a_users_op_leaves_all_as_it_was(threads: int) -> None:
    weight = nn.Parameter(draw(5, dtype="float32"))
    opt = optim.SGD([weight], lr=0.1, momentum=0.9)
    own = Doubled()

    @ndl.jit
    def step(x: Tensor) -> Tensor:
        loss = (own(weight * x) ** 2).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss

    step(data(5))
    held = [weight, *opt._tensors().values()]
    before = [x.numpy().copy() for x in held]
    own.limit = -np.inf
    with pytest.raises(OverflowError, match="^too large for me$"):
        step(data(5))
    for x, old in zip(held, before, strict=True):
        assert_same_bits(x, old)
    own.limit = np.inf
    step(data(5))
    assert not np.array_equal(weight.numpy(), before[0])


# Golden text


def small_step() -> passes.Lowered:
    """relu(x @ w + b).sum(), and its gradients."""
    with tracing():
        x, w, b = (placeholder(Spec(s, F32), True) for s in ((4, 8), (8, 3), (3,)))
        y = ops.relu(x @ w + b).sum()
        dy = placeholder(y.spec)
        compute_gradient_of_variables(y, dy)
        return passes.lower(graph.trace([x, w, b, dy], [y, w.grad, b.grad]))


def test_golden_text_of_a_small_step(request: pytest.FixtureRequest) -> None:
    found = small_step()
    parts = [str(found.graph)]
    for number, kernel in enumerate(found.schedule.kernels):
        parts += [f"kernel {number}", *map(show, kernel)]
    text = "\n".join(parts) + "\n"
    path = GOLDEN / "small_step.txt"
    if request.config.getoption("--update-golden"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text(), "run pytest --update-golden if the change is meant"


# Memory of parameters


@pytest.mark.parametrize("make", [optim.SGD, optim.Adam])
def test_a_step_updates_in_place_what_nobody_else_holds(make: Any) -> None:
    weight = nn.Parameter(draw(16, 8, dtype="float32"))
    opt = make([weight], lr=0.1)

    @ndl.jit
    def step(x: Tensor) -> Tensor:
        loss = (ops.tanh(x @ weight) ** 2).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        return loss.detach()

    for seed in range(2):
        step(data(12, 16, seed=seed))
    pointer, before = weight.cached_data.ptr, weight.numpy().copy()
    step(data(12, 16, seed=3))
    assert weight.cached_data.ptr == pointer
    assert not np.array_equal(weight.numpy(), before)
    old, kept = weight.data, weight.numpy().copy()
    step(data(12, 16, seed=4))
    assert_same_bits(old, kept)
    assert not np.array_equal(weight.numpy(), kept)


# Planted errors


def several(x: Tensor, w: Tensor) -> list[Tensor]:
    """Chains, rows, a product, views and reductions: something for each pass."""
    h = ops.relu((x @ w @ w) @ (x @ w).transpose() @ x) + ops.flip(x, 1)
    p = ops.softmax(h)
    rolled = ops.exp(-p).transpose().reshape(p.shape) * p
    return [p, rolled.sum(0), (rolled - rolled.max()).sum(), ops.cumsum(rolled @ w.transpose(), 0)]


SHAPES = ((12, 8), (8, 8))


def trace_several() -> graph.Graph:
    with tracing():
        xs = [placeholder(Spec(shape, F32)) for shape in SHAPES]
        return graph.trace(xs, several(*xs))


def arrays() -> list[np.ndarray]:
    return [draw(*shape, seed=n, dtype="float32") for n, shape in enumerate(SHAPES)]


def assert_program_is_eager() -> None:
    """A new program, from no cache, has eager mode's bits."""
    inputs = [Tensor(x, requires_grad=False) for x in arrays()]
    expected = several(*inputs)
    program = passes.make_program(passes.lower(trace_several()))
    found = program([x.cached_data for x in inputs])
    for x, y in zip(found, expected, strict=True):
        assert_same_bits(x.view, y)


def assert_nests_are_the_graph(order: Callable[[Sequence[Any]], Iterable[Any]] = iter) -> None:
    """The interpreter runs the nests of each kernel, in some order, on one arena."""
    source = trace_several()
    lowered = passes.lower(source)
    memory = allocate(lowered, arrays())
    for kernel in lowered.schedule.kernels:
        for nest in order(kernel):
            interpret.run(nest, memory)
    expected = graph.interpret(source, arrays())
    for buffer, y in zip(lowered.outputs, expected, strict=True):
        np.testing.assert_allclose(memory[buffer].reshape(y.shape), y, rtol=1e-5, atol=1e-6)


def allocate(lowered: passes.Lowered, given: Sequence[np.ndarray]) -> dict[Buffer, np.ndarray]:
    """Memory for a program's buffers: temporaries where the plan puts them."""
    arena = np.full(lowered.plan.size, 0xFF, np.uint8)
    memory: dict[Buffer, np.ndarray] = {}
    for kernel in lowered.schedule.kernels:
        for nest in kernel:
            assert not isinstance(nest, HostCall)
            for each in nest.reads() | nest.writes():
                source = each.source
                if each in lowered.plan.offsets:
                    start = lowered.plan.offsets[each]
                    part = arena[start : start + each.size * each.dtype.itemsize]
                    memory[each] = part.view(each.dtype)
                elif isinstance(source, graph.Input):
                    memory[each] = given[source.number].reshape(-1).copy()
                elif isinstance(source, graph.Constant):
                    memory[each] = source.array.reshape(-1).copy()
                else:
                    memory[each] = np.empty(each.size, each.dtype)
    return memory


def finds(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def backwards(kernel: Sequence[Any]) -> Iterable[Any]:
    return reversed(kernel)


def test_the_checks_pass_where_nothing_is_planted() -> None:
    assert_program_is_eager()
    assert_nests_are_the_graph()
    assert_nests_are_the_graph(backwards)


def test_a_wrong_rule_of_simplify_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def negates(builder: Any, op: Any, x: graph.Node) -> graph.Node:
        return x  # -x -> x

    monkeypatch.setitem(simplify.ALGEBRA, ops.Negate, negates)
    assert finds(assert_program_is_eager)


def test_an_index_map_off_by_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    flip = lower.MOVEMENT[ops.Flip]

    def shifted(*args: Any) -> Any:
        [(number, index, mask)] = flip(*args)
        return [(number, (*index[:-1], index[-1] + -1), mask)]

    monkeypatch.setitem(lower.MOVEMENT, ops.Flip, shifted)
    assert finds(assert_program_is_eager)


def test_a_join_at_other_coordinates_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    enter = fuse.Walk.enter

    def careless(self: fuse.Walk, node: graph.Node, index: Any) -> bool:
        enter(self, node, index)
        return True

    monkeypatch.setattr(fuse.Walk, "enter", careless)
    assert finds(assert_program_is_eager)


def test_a_join_that_ignores_the_order_of_groups_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.Fuser, "comes_after", lambda self, group, reads: True)
    monkeypatch.setattr(fuse.Fuser, "candidates", every_group)
    with tracing():
        xs = [placeholder(Spec((8, 8), F32)) for _ in range(3)]
        source = graph.trace(xs, crossed(*xs))
    with pytest.raises(KeyError):
        passes.lower(source)


def every_group(self: fuse.Fuser, node: graph.Node) -> list[fuse.Group]:
    found = self.groups_below(node)
    self.merge_all(found)
    return [each for each in self.groups_below(node) if each.kind == "loop"]


def test_a_dropped_barrier_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule.Levels, "before", lambda self, nest: set())
    assert finds(lambda: assert_nests_are_the_graph(backwards))


def test_memory_given_back_too_early_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    take = schedule.Arena.take

    def at_once(self: schedule.Arena, size: int) -> int:
        found = take(self, size)
        self.free = [(0, self.size)]
        return found

    monkeypatch.setattr(schedule.Arena, "take", at_once)
    monkeypatch.setattr(schedule.Arena, "give", lambda self, offset, size: None)
    assert finds(assert_nests_are_the_graph)
    assert finds(assert_program_is_eager)
