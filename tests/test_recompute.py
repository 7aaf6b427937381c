"""checkpoint: the same bits with less memory, in eager mode and in compiled programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from checks import assert_close, assert_same_bits, draw
from programs import Maker, Seeded, sum_of

import needle as ndl
from needle import autograd, compiler, init, nn
from needle.autograd import Tensor, TensorOp
from needle.compiler import fuse
from needle.compiler.loops import Contraction
from needle.recompute import Recomputed

Array = np.ndarray
Function = Callable[..., Any]
MODES = ("eager", "lazy", "jit")


def constant(x: Any) -> Tensor:
    return Tensor(x, requires_grad=False)


def plain(function: Function) -> Function:
    return function


def in_mode(mode: str, function: Function) -> Function:
    """The function, whose results are computed before it returns."""
    if mode == "jit":
        return ndl.jit(function)

    def run(*args: Any) -> Any:
        with autograd.mode(lazy=mode == "lazy"):
            found = function(*args)
            for y in found if isinstance(found, (list, tuple)) else [found]:
                y.numpy()
        return found

    return run


# The same bits


class Block(nn.Module):
    def __init__(self, n: int) -> None:
        self.first, self.second = nn.Linear(n, n), nn.Linear(n, n)
        self.norm, self.drop = nn.BatchNorm1d(n), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.drop(ndl.gelu(self.norm(self.first(x)))))


def trained(mode: str, wrap: Function, seeded: bool) -> dict[str, Array]:
    """All that a model holds after some steps, and where random numbers stand."""
    np.random.seed(0)
    net = nn.Sequential(*[Block(6) for _ in range(3)])
    blocks = [wrap(each) for each in net]
    optimizer = ndl.optim.Adam(net.parameters(), lr=0.01)
    np.random.seed(1)
    if seeded:
        ndl.seed(3)

    def step(x: Tensor) -> Tensor:
        for block in blocks:
            x = block(x)
        loss = (x * x).mean()
        loss.backward()
        optimizer.step()
        return loss

    run, x = in_mode(mode, step), constant(draw(8, 6, dtype="float32"))
    found = {f"loss {n}": run(x).numpy() for n in range(3)}
    found |= {name: y.numpy() for name, y in net.state_dict().items()}
    found |= {f"gradient of {name}": p.grad.numpy() for name, p in net.named_parameters()}
    source = init.generator()
    found["random"] = np.random.rand(2) if source is None else source.state.numpy()
    init.random.Source.generator = None
    return found


@pytest.mark.parametrize("seeded", [False, True], ids=["NumPy's draws", "seeded"])
@pytest.mark.parametrize("mode", MODES)
def test_training_with_dropout_and_batch_norm(mode: str, seeded: bool) -> None:
    expected, found = trained(mode, plain, seeded), trained(mode, ndl.checkpoint, seeded)
    for name, x in expected.items():
        assert_same_bits(found[name], x)


def recurrent(wrap: Function, w: Tensor, h: Tensor, xs: list[Tensor]) -> Tensor:
    """Weights that every segment reads, several times in each."""

    def cell(h: Tensor, xs: list[Tensor]) -> Tensor:
        for x in xs:
            h = ndl.tanh(h @ w + x)
        return h

    for n in range(0, len(xs), 3):
        h = wrap(cell)(h, xs[n : n + 3])
    return (h * h).sum()


@pytest.mark.parametrize("mode", MODES)
def test_shared_weights(mode: str) -> None:
    arrays = draw(5, 5, dtype="float32"), draw(2, 5, seed=1, dtype="float32")
    xs = [constant(draw(2, 5, seed=n, dtype="float32")) for n in range(9)]

    def slopes(wrap: Function) -> Function:
        slope = ndl.grad(lambda w, h: recurrent(wrap, w, h, xs), argnums=(0, 1))
        return lambda w, h: list(slope(w, h))

    expected = slopes(plain)(*map(Tensor, arrays))
    found = in_mode(mode, slopes(ndl.checkpoint))(*map(Tensor, arrays))
    for y, z in zip(found, expected, strict=True):
        assert_same_bits(y, z)


def program(seed: int) -> tuple[list[Array], Callable[[Function], Function]]:
    """A random program that is cut into segments: its arrays, and the function for a wrapper."""
    maker = Maker(Seeded(seed))
    arrays = [maker.array() for _ in range(1 + maker.choice.below(3))]
    steps: list[Any] = []
    with ndl.no_grad():
        values = [Tensor(x, device=ndl.cpu_numpy()) for x in arrays]
        while len(steps) < 8:
            step = maker.step(values)
            if step is not None:
                values.append(step(values))
                steps.append(step)
    cuts = [0, *sorted(1 + maker.choice.below(7) for _ in range(3)), 8]

    def build(wrap: Function) -> Function:
        def run(*inputs: Tensor) -> list[Tensor]:
            found = list(inputs)
            for start, stop in zip(cuts, cuts[1:], strict=False):

                def segment(known: list[Tensor], some: Any = steps[start:stop]) -> list[Tensor]:
                    every = list(known)
                    for step in some:
                        every.append(step(every))
                    return every[len(known) :]

                found += wrap(segment)(found)
            results = found[-3:]
            total = sum_of([y for y in results if y.requires_grad])
            if total is None:
                return [y.detach() for y in results]
            total.backward()
            grads = [x.grad for x in inputs if x.grad is not None]
            for x in inputs:
                x.grad = None
            return [y.detach() for y in [*results, *grads]]

        return run

    return arrays, build


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("first", range(0, 24, 6))
def test_random_programs(first: int) -> None:
    for seed in range(first, first + 6):
        arrays, build = program(seed)
        results = build(plain)(*map(Tensor, arrays))[:3]
        expected = in_mode("eager", build(ndl.checkpoint))(*map(Tensor, arrays))
        for y, z in zip(expected, results, strict=False):
            assert_same_bits(y, z)
        modes = [(mode, "") for mode in ("lazy", "jit")] + [("jit", "simplify"), ("jit", "fuse")]
        for mode, without in modes:
            compiler.OFF.add(without)
            try:
                found = in_mode(mode, build(ndl.checkpoint))(*map(Tensor, arrays))
            finally:
                compiler.OFF.clear()
            assert len(found) == len(expected)
            for y, z in zip(found, expected, strict=True):
                assert_same_bits(y, z)


# Memory

LAYERS, WIDTH, ROWS = 24, 32, 64
BLOCK = ROWS * WIDTH * 4  # bytes of one layer's values


def deep(wrap: Function, each: int = 5) -> tuple[list[nn.Parameter], Function]:
    """relu(x @ w), LAYERS times, in segments of `each`; a step with backward()."""
    weights = [nn.Parameter(draw(WIDTH, WIDTH, seed=n, dtype="float32") * 0.25)
               for n in range(LAYERS)]  # fmt: skip

    def segment(x: Tensor, some: list[nn.Parameter]) -> Tensor:
        for w in some:
            x = ndl.relu(x @ w)
        return x

    def step(x: Tensor) -> Tensor:
        for n in range(0, LAYERS, each):
            x = wrap(segment)(x, weights[n : n + each])
        loss = (x * x).sum()
        loss.backward()
        return loss

    return weights, step


def peak(function: Function, x: Tensor) -> int:
    before = ndl.memory.live()
    ndl.memory.reset_peak()
    function(x)
    return ndl.memory.peak() - before


def test_the_peak_of_eager_mode_falls() -> None:
    x = constant(draw(ROWS, WIDTH, dtype="float32"))
    (first, step), (second, short) = deep(plain), deep(ndl.checkpoint)
    gradients = sum(w.size * 4 for w in first)
    high, low = peak(step, x) - gradients, peak(short, x) - gradients
    assert high > 2.5 * LAYERS * BLOCK
    assert low < high / 2
    for a, b in zip(first, second, strict=True):
        assert_same_bits(b.grad, a.grad)


@pytest.fixture
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that this test lowers itself."""
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")


def compiled(wrap: Function) -> tuple[list[nn.Parameter], Any]:
    weights, step = deep(wrap)
    run = ndl.jit(step)
    run(constant(draw(ROWS, WIDTH, dtype="float32")))
    ((_, [program]),) = run.programs()
    return weights, program


@pytest.mark.usefixtures("no_cache")
def test_the_arena_of_a_program_falls() -> None:
    (first, kept), (second, dropped) = compiled(plain), compiled(ndl.checkpoint)
    assert kept.arena >= LAYERS * BLOCK
    assert dropped.arena <= 13 * BLOCK  # 5 segments' inputs, one segment, and what a level holds
    for a, b in zip(first, second, strict=True):
        assert_same_bits(b.grad, a.grad)


@pytest.mark.usefixtures("no_cache")
def test_the_arena_falls_because_recomputation_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fuse.Fuser, "waited_for", lambda self, node: set())
    assert compiled(ndl.checkpoint)[1].arena > 20 * BLOCK


@pytest.mark.usefixtures("no_cache")
def test_a_program_computes_every_layer_twice() -> None:
    def count(wrap: Function) -> int:
        kernels = compiled(wrap)[1].lowered.schedule.kernels
        return sum(isinstance(nest, Contraction) for kernel in kernels for nest in kernel)

    assert count(plain) == 3 * LAYERS - 1  # forward, dw, and dx but for the first layer's
    assert count(ndl.checkpoint) == 4 * LAYERS - 1


@pytest.mark.usefixtures("no_cache")
def test_a_jitted_call_keeps_less_for_backward() -> None:
    weights = [constant(draw(8, 8, seed=n)) for n in range(6)]

    def chain(x: Tensor) -> Tensor:
        for w in weights:
            x = ndl.tanh(x @ w)
        return x

    def saved(wrap: Function) -> tuple[int, Tensor]:
        run, x = ndl.jit(lambda x: wrap(chain)(wrap(chain)(x))), Tensor(draw(4, 8))
        run(x).sum().backward()
        ((_, [forward, _]),) = run.programs()
        assert x.grad is not None
        return len(forward.specs), x.grad

    (many, expected), (few, found) = saved(plain), saved(ndl.checkpoint)
    assert many == 2 * len(weights)
    assert few == 2  # the result, and the value between the segments
    assert_same_bits(found, expected)


def test_a_graph_holds_what_a_segment_read() -> None:
    x, w = Tensor(draw(3, 3)), Tensor(draw(3, 3, seed=1))
    y = ndl.checkpoint(lambda x: ndl.tanh(ndl.tanh(x @ w) @ w))(x)
    nodes = autograd.find_topo_sort([y])
    assert len(nodes) == 4
    assert set(nodes[:2]) == {x, w}
    assert isinstance(nodes[2].op, Recomputed)


# What happens once


@pytest.mark.parametrize("mode", MODES)
def test_the_function_runs_once(mode: str) -> None:
    calls = []

    @ndl.checkpoint
    def f(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return ndl.tanh(x) * x

    def step(x: Tensor) -> Tensor:
        f(x).sum().backward()
        return x.grad * 1.0

    in_mode(mode, step)(Tensor(draw(3)))
    assert calls == [(3,)]
    assert f.__name__ == "f"


@pytest.mark.parametrize("mode", MODES)
def test_what_the_function_sets_is_set(mode: str) -> None:
    """Tensors that are changed inside: recomputation reads what the function read."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            self.count = constant(np.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            y = ndl.tanh(x * self.count)
            self.count.data = self.count + 1.0
            return y * self.count

    def slopes(wrap: Function) -> tuple[list[Array], Array]:
        net = Counting()
        f = wrap(net)
        run = in_mode(mode, ndl.grad(lambda x: f(f(x)).sum()))
        return [run(constant(draw(3))).numpy() for _ in range(2)], net.count.numpy()

    (expected, last), (found, count) = slopes(plain), slopes(ndl.checkpoint)
    assert last.item() == count.item() == 5.0
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


# Gradients

W = draw(4, 4) * 0.5


def layer(x: Tensor) -> Tensor:
    w = Tensor(W)
    return ndl.tanh(x @ w) * ndl.sigmoid(x @ w)


FORMS: dict[str, Callable[[], Function]] = {
    "once": lambda: ndl.checkpoint(layer),
    "nested": lambda: ndl.checkpoint(lambda x: ndl.checkpoint(layer)(ndl.checkpoint(ndl.tanh)(x))),
    "of jit": lambda: ndl.checkpoint(ndl.jit(layer)),
    "jitted": lambda: ndl.jit(ndl.checkpoint(layer)),
    "of a gradient": lambda: ndl.checkpoint(ndl.grad(lambda x: layer(x).sum())),
}
PLAIN: dict[str, Function] = {
    "nested": lambda x: layer(ndl.tanh(x)), "of a gradient": ndl.grad(lambda x: layer(x).sum()),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_every_order(form: str) -> None:
    def slopes(f: Function) -> list[Function]:
        value = lambda x: (f(x) * f(x * 2.0)).sum()  # noqa: E731
        first = ndl.grad(value)
        second = ndl.grad(lambda x: (first(x) * first(x)).sum())
        third = ndl.grad(lambda x: (second(x) * x).sum())
        return [value, first, second, third]

    x = constant(draw(2, 4, seed=5))
    expected = slopes(PLAIN.get(form, layer))
    for order, (run, f) in enumerate(zip(slopes(FORMS[form]()), expected, strict=True)):
        y = f(x)
        eager = run(x)
        if order < (1 if form == "jitted" else 2):  # a jitted call adds up its own parts
            assert_same_bits(eager, y)
        else:
            assert_close(eager, y.numpy(), length=64, factor=8.0)
        if form != "jitted":
            for mode in ("lazy", "jit"):
                assert_same_bits(in_mode(mode, run)(x), eager)


@pytest.mark.parametrize("mode", MODES)
def test_values_from_around_the_function(mode: str) -> None:
    """A value with history that the function knows is read, not computed again."""
    counted = []

    def slope(wrap: Function) -> Function:
        def f(x: Tensor) -> Tensor:
            h = ndl.exp(x) * 0.1
            y = wrap(lambda x: ndl.tanh(x * h) + h)(x)
            if wrap is not plain:
                node = y.inputs[0]
                counted.append((len(node.inputs), h in node.inputs))
            return (y * h).sum()

        return ndl.grad(f)

    x = constant(draw(3))
    expected = slope(plain)(x)
    assert_same_bits(in_mode(mode, slope(ndl.checkpoint))(x), expected)
    assert counted[-1] == (2, True)


@pytest.mark.parametrize("mode", MODES)
def test_results_that_nobody_reads(mode: str) -> None:
    """Their gradient is none at all, not zeros, which an infinite slope would make NaN."""

    def f(x: Tensor) -> dict[str, Any]:
        return {"y": [x * 3.0], "z": ndl.sqrt(x), "n": 7, "index": ndl.argmax(x)}

    def slope(x: Tensor) -> Tensor:
        found = ndl.checkpoint(f)(x)
        assert found["n"] == 7
        assert found["index"].dtype == np.int64
        return ndl.grad(lambda x: ndl.checkpoint(f)(x)["y"][0].sum())(x)

    assert in_mode(mode, slope)(constant([0.0, 4.0])).tolist() == [3.0, 3.0]


@pytest.mark.parametrize("mode", MODES)
def test_tuples_constants_and_ops_of_a_user(mode: str) -> None:
    class Cube(TensorOp):
        def compute(self, x: Array) -> Array:
            return x**3

        def gradient(self, out_grad: Tensor, node: Tensor) -> Tensor:
            return out_grad * 3.0 * node.inputs[0] ** 2

    def f(wrap: Function, x: Tensor, index: Tensor) -> Tensor:
        outside = ndl.split(x, 0)

        def inner(x: Tensor) -> Tensor:
            with ndl.no_grad():
                scale = x.sum()
            a, b = ndl.split(ndl.tanh(x), 0)
            found = ndl.take(a, index) * outside[1].sum() + Cube()(b)[:2] * scale
            return found + x.detach()[0, :2]

        y = wrap(inner)(x)
        return (y * y).sum()

    index = constant(np.array([2, 0]))
    expected = ndl.grad(lambda x: f(plain, x, index))(Tensor(draw(2, 3)))
    run = in_mode(mode, ndl.grad(lambda x, index: f(ndl.checkpoint, x, index)))
    assert_same_bits(run(Tensor(draw(2, 3)), index), expected)


def test_without_history_nothing_is_noted() -> None:
    f = ndl.checkpoint(ndl.tanh)
    with ndl.no_grad():
        assert f(Tensor([1.0])).op is None
    assert f(constant([1.0])).op is None
    x = Tensor([1.0])
    assert ndl.checkpoint(lambda x: x)(x) is x
    with pytest.raises(KeyError):
        ndl.checkpoint(lambda x: {}[x])(x)
    assert autograd.MODE.record is None
    assert not autograd.is_lazy()


def test_nothing_keeps_growing() -> None:
    _, step = deep(ndl.checkpoint)
    x = constant(draw(4, WIDTH, dtype="float32"))
    live = []
    for _ in range(3):
        step(x)
        live.append((autograd.TENSOR_COUNTER, ndl.memory.live()))
    assert live[1] == live[2]


def test_only_functions_are_accepted() -> None:
    with pytest.raises(TypeError) as caught:
        ndl.checkpoint(Tensor([1.0]))
    expected = "checkpoint: expected a function or a Module; received a Tensor"
    assert str(caught.value) == expected


@pytest.mark.parametrize("mode", MODES)
def test_under_autocast(mode: str) -> None:
    """Recomputation runs in the dtypes that the function ran in."""
    w = constant(draw(8, 8, dtype="float32"))

    def slope(wrap: Function) -> Function:
        def f(x: Tensor) -> Tensor:
            with ndl.autocast():
                y = wrap(lambda x: ndl.tanh(x @ w) @ w)(x)
            return (y.astype("float32") ** 2).sum()

        return ndl.grad(f)

    x = Tensor(draw(4, 8, dtype="float32"))
    expected = Tensor(x)
    with ndl.autocast():
        y = ndl.tanh(expected @ w) @ w
    (y.astype("float32") ** 2).sum().backward()
    assert_same_bits(in_mode(mode, slope(plain))(x), expected.grad)
    assert_same_bits(in_mode(mode, slope(ndl.checkpoint))(x), expected.grad)
