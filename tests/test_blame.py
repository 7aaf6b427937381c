"""detect_anomaly on jitted functions: what makes a NaN or an infinity is named as in eager mode, at
the speed of the program, and all is as before the call."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import nn, ops, optim
from needle.autograd import Hooks, Tensor
from needle.compiler import runtime
from needle.debug import AnomalyError, detect_anomaly

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def line_of(text: str, file: str = __file__) -> int:
    lines = Path(file).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


@cache
def needle_steps() -> Any:
    """The benchmarks' models."""
    spec = importlib.util.spec_from_file_location("needle_steps", BENCHMARKS / "needle_steps.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Every layer of two models, forward and backward


def layers_of(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold no others, with their paths."""
    found = [(path, x) for path, x in nn.module.walk(model) if isinstance(x, nn.Module)]
    inner = [path.rpartition(".")[0] for path, _ in found]
    return [
        (path, x) for path, x in found if not any(f"{p}.".startswith(f"{path}.") for p in inner)
    ]


class Planted:
    """A model in which every layer can be made to give a NaN: forward at `heat` 2, backward at
    `cold` 0. The training step is compiled once."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.batch = model, (x, y)
        self.layers = layers_of(model)
        self.heat = [Tensor(0.0, requires_grad=False) for _ in self.layers]
        self.cold = [Tensor(1.0) for _ in self.layers]
        for number, (_, layer) in enumerate(self.layers):
            layer.register_forward_hook(self.hook(number))
        self.optimizer = optim.Adam(model.parameters(), 1e-3)
        self.jitted = ndl.jit(self.step)

    def hook(self, number: int) -> Callable[..., Tensor]:
        def plant(module: nn.Module, args: Any, y: Tensor) -> Tensor:
            y = y + ndl.log(1.0 - self.heat[number])  # the planted forward
            return y + ndl.sqrt(y * 0.0 + self.cold[number])  # the planted backward

        return plant

    def step(self, x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(x), y)  # the step
        loss.backward()
        self.optimizer.step()
        self.optimizer.reset_grad()
        return loss.detach()

    def run(self, mode: str) -> Tensor:
        return (self.jitted if mode == "jit" else self.step)(*self.batch)


@cache
def planted(name: str) -> Planted:
    np.random.seed(0)
    models = needle_steps()
    if name == "gpt":
        model = models.GPT(11, 5, 8, 2, 2)
        return Planted(model, models.labels(11, 3, 5), models.labels(11, 15))
    blocks = [models.residual_block(8) for _ in range(2)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), *blocks, nn.Linear(8, 4))
    return Planted(model, models.floats(6, 12), models.labels(4, 6))


LAYERS = {"mlp_resnet": 18, "gpt": 14}


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize(("name", "layer"), [(n, i) for n, k in LAYERS.items() for i in range(k)])
def test_every_layer_is_named(name: str, layer: int, direction: str, mode: str) -> None:
    model = planted(name)
    assert len(model.layers) == LAYERS[name]
    switch, value = (model.heat, 2.0) if direction == "forward" else (model.cold, 0.0)
    before = switch[layer].item()
    switch[layer].data = Tensor(value)
    try:
        with (
            pytest.raises(AnomalyError) as caught,
            detect_anomaly(infinities=direction == "backward"),
        ):
            model.run(mode)
    finally:
        switch[layer].data = Tensor(before)
    message = str(caught.value)
    place = f"{__file__}:{line_of(f'# the planted {direction}')} `"
    assert place in message
    assert f"(in {model.layers[layer][0]})" in message
    assert ("log made NaN" if direction == "forward" else "in the gradient of sqrt") in message


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_parameter_that_holds_a_nan_is_named(name: str, mode: str) -> None:
    model = planted(name)
    for path, parameter in model.model.named_parameters():
        before = parameter.data
        parameter.data = before * np.nan
        with pytest.raises(AnomalyError, match="read NaN from its input") as caught:
            with detect_anomaly():
                model.run(mode)
        parameter.data = before
        module = path.rpartition(".")[0]
        assert not module or f"(in {module})" in str(caught.value)
        assert "needle_steps.py:" in str(caught.value) or "# the step" in str(caught.value)


@pytest.mark.parametrize("name", LAYERS)
def test_a_huge_weight_gives_eagers_message(name: str) -> None:
    model = planted(name)
    for path, parameter in model.model.named_parameters():
        if parameter.ndim < 2:
            continue
        before, messages = parameter.data, []
        parameter.data = before * 1e38 + 3e38
        for mode in ("eager", "jit"):
            with pytest.raises(AnomalyError, match=" made ") as caught, detect_anomaly():
                model.run(mode)
            messages.append(str(caught.value).split(";")[0])  # random numbers differ
        parameter.data = before
        assert messages[0] == messages[1], path


# Inside of a scan


def scanned(x: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """Sums of roots and logarithms: NaN where x is below 0, in the gradient where x is 0."""

    def body(carry: Any, element: Tensor) -> Any:
        total, count = carry
        root = ndl.sqrt(element)  # guilty in its turn
        total = total * scale + ndl.log(element + 1.0)
        return (total, count + 1.0), root * 0.0 + ndl.exp(total * 0.0)

    begin = ndl.zeros(*x.shape[1:]), ndl.zeros(1)
    (total, _), y = ndl.scan(body, begin, x, **options)
    return (total + y.sum((0,))).sum()


SCANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "reverse": {"reverse": True},
    "checkpoints": {"checkpoint_every": 2},
}


@pytest.mark.parametrize("mode", ["eager", "lazy", "jit"])
@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_ops_of_a_scans_body_are_named(direction: str, name: str, mode: str) -> None:
    values = np.ones((7, 3), np.float32)
    values[4, 1] = 0.0 if direction == "backward" else -0.5
    x, scale = Tensor(values), Tensor(np.full(3, 0.5, np.float32))

    def step(one: Tensor) -> Tensor:
        loss = scanned(x * one, scale, **SCANS[name])
        loss.backward()
        return loss.detach()

    def run() -> None:
        (ndl.jit(step) if mode == "jit" else step)(Tensor(1.0))
        x.grad.numpy()

    lazily = ndl.lazy() if mode == "lazy" else nullcontext()
    with pytest.raises(AnomalyError) as caught, detect_anomaly(direction == "forward"), lazily:
        run()
    message = str(caught.value)
    place = f"{__file__}:{line_of('# guilty in its turn')} `"
    turns = "in turn 2 of 3, in turn 0 of 2;" if name == "checkpoints" else "in turn 4 of 7;"
    assert f", {turns} its inputs: float32[3] from" in message
    if direction == "forward":
        assert message.startswith(f"sqrt made NaN at {place}")
        assert message.endswith("from -0.5 to 1")
    else:
        assert message.startswith(f"divide made NaN in the gradient of sqrt computed at {place}")


def test_what_a_scans_body_makes_and_throws_away_counts() -> None:
    """As outside of a scan: the results hold no NaN."""

    def last(x: Tensor) -> Tensor:
        def body(carry: Tensor, element: Tensor) -> Any:
            inverse = ndl.log(element)  # thrown away
            return carry + ndl.where(element > 0.0, inverse, 0.0), None

        return ndl.scan(body, ndl.zeros(2), x)[0]

    x = Tensor([[1.0, 2.0], [1.0, -1.0]], requires_grad=False)
    for run in (last, ndl.jit(last)):
        assert np.isfinite(run(x).numpy()).all()
        with pytest.raises(AnomalyError, match="log made NaN.*# thrown away.*turn 1 of 2"):
            with detect_anomaly():
                run(x)


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_data_with_nan_is_named_where_a_body_reads_it(mode: str) -> None:
    x = Tensor([[1.0], [np.nan], [1.0]], requires_grad=False)
    run = (lambda x: scanned(x, ndl.ones(1))) if mode == "eager" else scanned_by_one
    with detect_anomaly():
        for _ in range(2):  # the first error leaves nothing behind
            with pytest.raises(AnomalyError, match=r"_scalar read NaN.*, in turn 1 of 3$"):
                run(x)


@ndl.jit
def scanned_by_one(x: Tensor) -> Tensor:
    return scanned(x, ndl.ones(1))


def test_a_body_that_begins_with_infinity_and_finds_none() -> None:
    def largest(x: Tensor) -> Tensor:
        begin = Tensor(np.full(2, -np.inf, np.float32), requires_grad=False)
        return ndl.scan(lambda m, e: (ndl.maximum(m, e), m), begin, x)[0]

    x = Tensor([[1.0, 2.0], [3.0, -1.0]], requires_grad=False)
    with detect_anomaly():
        np.testing.assert_array_equal(largest(x).numpy(), [3, 2])
        np.testing.assert_array_equal(ndl.jit(largest)(x).numpy(), [3, 2])


def test_what_leaves_a_scans_body_is_named_by_its_line() -> None:
    """A step that is the same in all turns runs before them."""
    w = Tensor([2.0, -2.0])

    def grown(x: Tensor) -> Tensor:
        def body(carry: Tensor, element: Tensor) -> Any:
            return carry * ndl.sqrt(w) + element, None  # the same in all turns

        return ndl.scan(body, ndl.zeros(2), x)[0]

    for run in (grown, ndl.jit(grown)):
        with pytest.raises(AnomalyError) as caught, detect_anomaly():
            run(ndl.ones(3, 2))
        place = f"sqrt made NaN at {__file__}:{line_of('# the same in all turns')} "
        assert str(caught.value).startswith(place)


def test_second_derivatives_of_a_scan_are_named() -> None:
    x = Tensor([[1.0], [1e-20], [1.0]])  # x ** -2 is beyond float32

    def logarithms(x: Tensor) -> Tensor:
        def body(carry: Tensor, element: Tensor) -> Any:
            return carry + ndl.log(element), None  # differentiated twice

        return ndl.scan(body, ndl.zeros(1), x)[0].sum()

    slope = ndl.grad(logarithms)
    with detect_anomaly():
        slope(x)
        with pytest.raises(AnomalyError, match="made infinity in the gradient of ") as caught:
            ndl.grad(lambda x: slope(x).sum())(x)
    line = line_of("# differentiated twice")
    place = f"computed in the gradient of log computed at {__file__}:{line} "
    assert place in str(caught.value)
    assert ", in turn 1 of 3; its inputs" in str(caught.value)


class FirstOf(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]  # the recurrent layer


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_named_with_turn_and_path(kind: Any, mode: str) -> None:
    """NaN in a weight is read in the first turn; a huge one makes an infinity in a later one."""
    np.random.seed(0)
    model = nn.Sequential(FirstOf(kind(3, 4)))
    weight = next(p for path, p in model.named_parameters() if path.endswith("W_hh"))

    def step(x: Tensor) -> Tensor:
        loss = (model(x) ** 2).mean()
        loss.backward()
        return loss.detach()

    run = ndl.jit(step) if mode == "jit" else step
    x = Tensor(np.full((5, 2, 3), 2.0, np.float32), requires_grad=False)
    cases = {"read NaN from its input 1": (np.nan, "0"), "made infinity": (3.3e38, "[12]")}
    for words, (value, turn) in list(cases.items())[: 1 if kind is nn.GRU else 2]:
        weight.data = Tensor(np.full(weight.shape, value, np.float32))
        with pytest.raises(AnomalyError, match=f"matmul {words}") as caught, detect_anomaly():
            run(x)
        assert re.search(rf"\(in 0\.layer\), in turn {turn} of 5", str(caught.value))
        assert f"{__file__}:{line_of('# the recurrent layer')}" in str(caught.value)


# What an error leaves behind


class Noisy(nn.Module):
    """A layer with a buffer, a count and random numbers."""

    def __init__(self, size: int) -> None:
        self.linear, self.norm = nn.Linear(size, size), nn.BatchNorm1d(size)
        self.total = ndl.zeros(size)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.dropout(self.norm(self.linear(x)), 0.5)
        self.total = self.total + y.sum((0,)).detach()
        return ndl.sqrt(y * y + ndl.rand(*y.shape)) + ndl.log(x[:, :1])  # the noisy line


def restart(seed: int | None) -> None:
    np.random.seed(3)
    if seed is not None:
        ndl.seed(seed)


def noisy_step(seed: int | None) -> tuple[nn.Module, Any, Callable[[Tensor], Tensor]]:
    restart(seed)
    model = Noisy(5)
    optimizer = optim.Adam(model.parameters(), 0.01)

    def step(x: Tensor) -> Tensor:
        loss = (model(x) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return model, optimizer, step


def held(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """All that a step may change, as objects and as values."""
    found = dict(nn.module.walk(model))
    del found[""]
    found = {path: x for path, x in found.items() if isinstance(x, Tensor)} | {
        f"grad {n}": p.grad for n, p in model.named_parameters()
    }
    found |= {f"optimizer {n}": x for n, x in enumerate(tensors_in(vars(optimizer)))}
    if ndl.init.generator() is not None:
        found["generator"] = ndl.init.generator().state
    arrays = {name: None if x is None else x.numpy().tobytes() for name, x in found.items()}
    return {"objects": list(map(id, found.values())), **arrays, "numpy": str(np.random.get_state())}


def tensors_in(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, (dict, list, tuple)):
        for each in x.values() if isinstance(x, dict) else x:
            yield from tensors_in(each)


@pytest.fixture
def numpys_generator() -> Iterator[None]:
    yield
    ndl.init.random.Source.generator = None


@pytest.mark.usefixtures("numpys_generator")
@pytest.mark.parametrize("seed", [None, 7])
def test_after_an_error_all_is_as_before(seed: int | None) -> None:
    good = Tensor(np.random.default_rng(0).random((6, 5)), dtype="float32", requires_grad=False)
    bad = good - Tensor([0.9, 0, 0, 0, 0], requires_grad=False)
    model, optimizer, step = noisy_step(seed)
    plain_model, _, plain = noisy_step(seed)
    restart(seed)
    jitted = ndl.jit(step)
    with detect_anomaly() as watch:
        losses = [jitted(good).item() for _ in range(2)]
        before = held(model, optimizer)
        for _ in range(2):
            with pytest.raises(AnomalyError, match=f"log made NaN.*{line_of('# the noisy line')}"):
                jitted(bad)
            assert held(model, optimizer) == before
        assert watch.replays == 2
        losses += [jitted(good).item() for _ in range(2)]
        assert watch.replays == 2
    restart(seed)
    again = ndl.jit(plain)
    assert losses == [again(good).item() for _ in range(4)]
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), plain_model.state_dict()[name].numpy())


@pytest.mark.usefixtures("numpys_generator")
@pytest.mark.parametrize("seed", [None, 7])
def test_the_replay_draws_the_numbers_of_the_program(seed: int | None) -> None:
    """An infinity at the smallest of some random numbers: the message tells which it is."""
    if seed is not None:
        ndl.seed(seed)
    limit = Tensor(0.0, requires_grad=False)

    @ndl.jit
    def draw() -> tuple[Tensor, Tensor]:
        x = ndl.rand(50)
        return x, 1e30 / (ndl.relu(x - limit) + 1e-30)  # 1e60 where x is below the limit

    draw()
    limit.data = Tensor(0.5)
    with pytest.raises(AnomalyError) as caught, detect_anomaly():
        draw()
    low, high = map(float, re.findall(r"from (\S+) to (\S+)$", str(caught.value))[0])
    x = np.maximum(draw()[0].numpy() - np.float32(0.5), 0) + np.float32(1e-30)
    np.testing.assert_allclose([low, high], [x.min(), x.max()], rtol=1e-5)


# Calls under autograd, host calls, and functions in functions


def energy_of(scale: Tensor) -> Callable[[Tensor], Tensor]:
    def energy(x: Tensor) -> Tensor:
        y = ndl.sqrt(x * scale)  # the root
        return (y * y).sum()

    return energy


def test_the_gradient_of_a_call_is_watched() -> None:
    jitted = ndl.jit(energy_of(Tensor([2.0, 3.0], requires_grad=False)))
    x = Tensor([1.0, 0.0])
    with detect_anomaly(infinities=False) as watch:
        y = jitted(x)
        with pytest.raises(AnomalyError) as caught:
            y.backward()
    assert watch.replays == 1
    message = str(caught.value)
    assert "in the gradient of sqrt computed at" in message
    assert f"test_blame.py:{line_of('# the root')}" in message
    assert x.grad is None
    eager = pytest.raises(AnomalyError)
    with eager as caught, detect_anomaly(infinities=False):
        energy_of(Tensor([2.0, 3.0], requires_grad=False))(x).backward()
    assert str(caught.value) == message


def test_the_gradient_is_replayed_from_what_the_call_read() -> None:
    scale = Tensor([2.0, 0.0], requires_grad=False)
    jitted = ndl.jit(energy_of(scale))
    with detect_anomaly(infinities=False):
        y = jitted(Tensor([1.0, 1.0]))
        scale.data = Tensor([5.0, 5.0])
        with pytest.raises(AnomalyError, match=r"made NaN in the gradient of sqrt") as caught:
            y.backward()
    np.testing.assert_array_equal(scale.numpy(), [5, 5])
    assert "from 0 to" in str(caught.value)
    y = jitted(Tensor([1.0, 0.0]))  # the call was not watched, its gradient is
    with pytest.raises(AnomalyError, match="made NaN in the gradient of jit"):
        with detect_anomaly(infinities=False):
            y.backward()


def test_the_gradient_is_replayed_in_the_precision_of_the_call() -> None:
    found = []

    @ndl.jit
    def product(x: Tensor) -> Tensor:
        found.append(ndl.get_matmul_precision())
        return ndl.sqrt(x @ x).sum()  # the product

    x = Tensor(np.zeros((2, 2), np.float32))
    try:
        ndl.set_matmul_precision("medium")
        with detect_anomaly() as watch:
            y = product(x)
            ndl.set_matmul_precision("highest")
            with pytest.raises(AnomalyError, match="in the gradient of sqrt.*# the product"):
                y.backward()
        assert watch.replays == 1
        assert found == ["medium", "medium"]  # traced and replayed
        assert ndl.get_matmul_precision() == "highest"
    finally:
        ndl.set_matmul_precision("highest")


class Broken(ndl.TensorOp):
    """y = x;  dx = NaN in one place, by an op of the host's"""

    def compute(self, x: np.ndarray) -> np.ndarray:
        return x

    def gradient(self, out_grad: Tensor, node: Any) -> Tensor:
        return Spoiled()(out_grad)


class Spoiled(ndl.TensorOp):
    def compute(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):
            return x / np.where(np.arange(x.size).reshape(x.shape) == 3, x * 0, 1)


@pytest.mark.parametrize("mode", ["eager", "jit"])
def test_a_users_op_is_named(mode: str) -> None:
    w = Tensor(np.ones((2, 3), np.float32))

    def step(x: Tensor) -> Tensor:
        loss = (Broken()(w * x) * 0.0 + w).sum()  # the broken op
        loss.backward()
        return loss.detach()

    run = ndl.jit(step) if mode == "jit" else step
    with pytest.raises(AnomalyError) as caught, detect_anomaly():
        run(Tensor(np.ones((2, 3), np.float32)))
    place = f"in the gradient of broken computed at {__file__}:{line_of('# the broken op')}"
    assert f"spoiled made NaN {place}" in str(caught.value)


def test_what_kernels_raised_before_python_ran_counts() -> None:
    """NumPy clears the processor's exceptions."""

    @ndl.jit
    def f(x: Tensor) -> Tensor:
        return Broken()(ndl.relu(ndl.sqrt(x).sum() * 0.0).reshape((1,)) + x.abs())

    with pytest.raises(AnomalyError, match="sqrt made NaN"), detect_anomaly():
        f(Tensor([1.0, -1.0], requires_grad=False))


def test_methods_variants_and_functions_in_functions() -> None:
    class Model(nn.Module):
        @ndl.jit
        def roots(self, x: Tensor) -> Tensor:
            return ndl.sqrt(x)  # a method

    model, inner = Model(), ndl.jit(lambda x: ndl.log(x))
    outer = ndl.jit(lambda x: inner(x + 1.0).sum())
    for function, name in ((model.roots, "sqrt"), (outer, "log")):
        for size in (3, 40):
            x = np.ones(size, np.float32)
            with detect_anomaly() as watch:
                function(Tensor(x, requires_grad=False))
                assert watch.replays == 0
                x[size // 2] = -2
                with pytest.raises(AnomalyError, match=f"{name} made NaN"):
                    function(Tensor(x, requires_grad=False))
                assert watch.replays == 1
    assert len(model.roots.variants()) == 2


def test_what_comes_in_and_what_may_pass() -> None:
    @ndl.jit
    def f(x: Tensor) -> Tensor:
        return ndl.exp(x) + 1.0  # the exponential

    nan, huge, inf = (Tensor([1.0, each], requires_grad=False) for each in (np.nan, 1e3, np.inf))
    with detect_anomaly() as watch:
        with pytest.raises(AnomalyError, match="exp read NaN from its input 0"):
            f(nan)
        with pytest.raises(AnomalyError, match="exp made infinity.*# the exponential"):
            f(huge)
        assert f(inf).numpy()[1] == np.inf  # came in with the data
    with detect_anomaly(infinities=False) as watch:
        assert f(huge).numpy()[1] == np.inf
        assert watch.replays == 0
    assert Hooks.judge is None
    assert np.isnan(f(nan).numpy()).any()


def test_numbers_of_the_code_count() -> None:
    for function in (lambda x: x * np.nan, lambda x: x + np.inf, lambda x: x * Tensor([np.nan])):
        with pytest.raises(AnomalyError), detect_anomaly():
            ndl.jit(function)(Tensor([1.0, 2.0], requires_grad=False))


def test_the_reference_device_is_watched_too() -> None:
    x = Tensor([1.0, -1.0], device=ndl.cpu_numpy(), requires_grad=False)
    f = ndl.jit(lambda x: ndl.sqrt(x))
    with pytest.raises(AnomalyError, match="sqrt made NaN"), detect_anomaly():
        f(x)


# At full speed


@pytest.mark.parametrize("name", ["mlp_tiny", "mlp_resnet", "gpt"])
def test_training_is_not_run_again_and_has_the_same_bits(name: str) -> None:
    models, losses = needle_steps(), []
    for watches in (False, True):
        np.random.seed(1)
        if name == "gpt":
            model = models.GPT(13, 7, 12, 1, 2)
            batch = models.labels(13, 3, 7), models.labels(13, 21)
            step = models.trainer(model, optim.AdamW(model.parameters(), 3e-4))
        else:
            step, batch = models.WORKLOADS[name]()
        jitted = ndl.jit(step)
        with detect_anomaly() as watch:
            Hooks.judge = watch if watches else None
            losses.append([jitted(*batch).item() for _ in range(4)])
        assert watch.replays == 0
    assert losses[0] == losses[1]


def test_memory_of_replaced_tensors_is_used_in_turn() -> None:
    w = ndl.ones(100)
    old = w.data

    @ndl.jit
    def step() -> None:
        w.data = w.data * 2.0

    with detect_anomaly():
        places = []
        for _ in range(6):
            step()
            places.append(w.cached_data.ptr)
        kept = w.data
        step()
        step()
    assert places[1:] == [places[1], places[2]] * 2 + [places[1]]
    np.testing.assert_array_equal(old.numpy(), np.ones(100))
    np.testing.assert_array_equal(kept.numpy(), np.full(100, 2.0**6))
    np.testing.assert_array_equal(w.numpy(), np.full(100, 2.0**8))


FLAGS = {
    "sqrt": (lambda x: ndl.sqrt(x), -1.0, "NaN"),
    "log": (lambda x: ndl.log(x), -1.0, "NaN"),
    "log at 0": (lambda x: ndl.log(x), 0.0, "infinity"),
    "log1p": (lambda x: ops.log1p(x), -2.0, "NaN"),
    "log1p at -1": (lambda x: ops.log1p(x), -1.0, "infinity"),
    "reciprocal": (lambda x: 1.0 / x, 0.0, "infinity"),
    "quotient": (lambda x: x / x, 0.0, "NaN"),
    "rsqrt": (lambda x: ops.rsqrt(x), 0.0, "infinity"),
    "pow": (lambda x: x**2.5, -1.0, "NaN"),
    "mod": (lambda x: x % x, 0.0, "NaN"),
    "product": (lambda x: (x * 3e4) * (x * 3e4), 3e30, "infinity"),
    "exp": (lambda x: ndl.exp(x), 800.0, "infinity"),
    "sum": (lambda x: (x / x).sum(), 0.0, "NaN"),
    "mean of rows": (lambda x: (1.0 / x.reshape((1, -1))).mean((0,)), 0.0, "infinity"),
    "matmul": (lambda x: (x * 1e8).reshape((1, -1)) @ (x * 1e8).reshape((-1, 1)), 3e25, "infinity"),
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("name", FLAGS)
def test_flags_are_raised_where_they_should_be_and_nowhere_else(name: str, dtype: str) -> None:
    """Any size: lanes beyond the end raise nothing."""
    function, value, what = FLAGS[name]
    if dtype == "float16" and value > 1e4 or dtype == "float64" and 1e20 < value:
        return
    jitted = ndl.jit(function)
    for size in (1, 3, 16, 37, 513):
        x = np.linspace(0.5, 2, size).astype(dtype) * (1e-4 if name in ("product", "matmul") else 1)
        with detect_anomaly() as watch:
            jitted(Tensor(x, requires_grad=False))
            assert watch.replays == 0
        x[-1] = value
        with pytest.raises(AnomalyError, match=f"made {what}"), detect_anomaly():
            jitted(Tensor(x, requires_grad=False))


@pytest.mark.parametrize("target", ["int8", "uint8", "int32", "int64", "bool"])
def test_conversions_out_of_range_are_no_anomaly(target: str) -> None:
    jitted = ndl.jit(lambda x: x.astype(target))
    x = Tensor(np.array([1e30, -1e30, 3.7, -0.2, 1e5] * 5, np.float32), requires_grad=False)
    with detect_anomaly() as watch:
        found = jitted(x)
    assert watch.replays == 0
    np.testing.assert_array_equal(found.numpy(), x.astype(target).numpy())


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_threads_exceptions_are_told(threads: int) -> None:
    before = runtime.get_num_threads()
    ndl.set_num_threads(threads)
    try:
        jitted = ndl.jit(lambda x: ndl.sqrt(x) * 2.0)
        x = np.ones(1 << 17, np.float32)
        with ndl.no_grad():
            jitted(Tensor(x, requires_grad=False))
        ((_, (program,)),) = jitted.programs()
        for place in (0, x.size // 2, x.size - 1):
            for value, found in ((-1.0, runtime.NAN), (1.0, 0)):  # and nothing stays
                x[place] = value
                arrays = [Tensor(x, requires_grad=False).cached_data]
                assert program.watch(arrays, [], [])[1] == found
    finally:
        ndl.set_num_threads(before)


def test_the_runner_reads_exceptions_on_arm_too() -> None:
    text = runtime.MODE.format(*runtime.MODES["arm"])
    assert "get.fpsr" in text.split("@raised")[1]
    assert "set.fpsr(i64 0)" in text.split("@raised")[0]
