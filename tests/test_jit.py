"""jit against eager mode, to the bit; variants and their reasons; what is refused, and how."""

from __future__ import annotations

import copy
import gc
import sys
import threading
import warnings
import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits, draw

import needle as ndl
from needle import autograd, init, nn, optim
from needle.autograd import Tensor
from needle.capture.part import exclusive
from needle.compiler import reference
from needle.jit import RetraceWarning, jit

Array = np.ndarray


def data(*shape: int, seed: int = 0, dtype: str = "float32") -> Tensor:
    return Tensor(draw(*shape, seed=seed, dtype=dtype), requires_grad=False)


def labels(n: int, classes: int) -> Tensor:
    return Tensor(np.arange(n) % classes, dtype="int64", requires_grad=False)


def network(seed: int = 0) -> nn.Sequential:
    np.random.seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm1d(8), nn.Linear(8, 3)
    )


def train_step(model: nn.Module, opt: optim.Optimizer) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = ndl.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        return loss

    return step


def assert_equal_states(a: nn.Module, b: nn.Module) -> None:
    for key, x in a.state_dict().items():
        assert_same_bits(x, b.state_dict()[key])


# The same bits as eager mode


OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "adamw": lambda p: optim.AdamW(p, lr=0.01),
    "lion": lambda p: optim.Lion(p),
    "rmsprop": lambda p: optim.RMSprop(p, centered=True, momentum=0.5),
    "adagrad": lambda p: optim.Adagrad(p),
    "adafactor": lambda p: optim.Adafactor(p),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_steps_have_the_bits_of_eager_ones(name: str) -> None:
    results = []
    for wrap in (lambda step: step, jit):
        model = network()
        opt = OPTIMIZERS[name](model.parameters())
        step = wrap(train_step(model, opt))
        losses = [step(data(12, 6, seed=i), labels(12, 3)).numpy().copy() for i in range(4)]
        results.append((model, losses, opt))
    (eager, losses, opt), (jitted, others, other_opt) = results
    for a, b in zip(losses, others, strict=True):
        assert_same_bits(a, b)
    assert_equal_states(eager, jitted)
    for key, x in opt.state_dict()["state"].items():
        assert_same_bits(x, other_opt.state_dict()["state"][key])
    for p, q in zip(eager.parameters(), jitted.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert_same_bits(p.grad, q.grad)


def test_a_step_is_traced_once_and_replayed() -> None:
    model = network()
    calls = []
    base = train_step(model, optim.Adam(model.parameters()))

    @jit
    def step(x: Tensor, y: Tensor) -> Tensor:
        calls.append(1)
        return base(x, y)

    for i in range(5):
        step(data(12, 6, seed=i), labels(12, 3))
    assert calls == [1]
    assert step.variants() == ["first call"]


def test_on_the_reference_device() -> None:
    device = ndl.cpu_numpy()
    w = Tensor(draw(3, 4), device=device)
    f = jit(lambda x: ndl.tanh(x @ w).sum())
    x = Tensor(draw(2, 3), device=device, requires_grad=False)
    found = f(x)
    assert found.device is device
    assert_same_bits(found, ndl.tanh(x @ w).sum())


# Structures


Pair = namedtuple("Pair", "a b")


@dataclass
class Batch:
    x: Tensor
    extra: dict[str, Tensor]
    scale: float = 2.0


def test_nested_arguments_and_results() -> None:
    @jit
    def f(pair: Pair, batch: Batch, parts: list[Any], *, name: str = "a") -> Any:
        total = pair.a + pair.b * batch.scale + batch.extra["k"] + parts[0][1]
        return {"total": total, "pair": Pair(pair.b, [total * 2, None, name, 3])}

    a, b, c, d, e = (data(3, seed=i) for i in range(5))
    found = f(Pair(a, b), Batch(c, {"k": e}), [(None, d)])
    assert_same_bits(found["total"], a + b * 2.0 + e + d)
    assert type(found["pair"]) is Pair
    assert found["pair"].a is b
    assert_same_bits(found["pair"].b[0], (a + b * 2.0 + e + d) * 2)
    assert found["pair"].b[1:] == [None, "a", 3]
    again = f(Pair(a, b), Batch(d, {"k": c}), [(None, e)])
    assert_same_bits(again["total"], a + b * 2.0 + c + e)
    assert len(f.variants()) == 1


def test_a_dataclass_may_be_returned() -> None:
    f = jit(lambda x: Batch(x * 2, {"k": x + 1}, 5.0))
    x = data(3)
    for _ in range(2):
        found = f(x)
        assert_same_bits(found.x, x * 2)
        assert_same_bits(found.extra["k"], x + 1)
        assert found.scale == 5.0


def test_arguments_by_name_make_no_new_variant() -> None:
    f = jit(lambda x, y: x - y)
    x, y = data(3), data(3, seed=1)
    for found in (f(x, y), f(x, y=y), f(y=y, x=x)):
        assert_same_bits(found, x - y)
    assert len(f.variants()) == 1


def test_modules_as_arguments() -> None:
    f = jit(lambda model, x: model(x))
    one, two, x = network(0), network(1), data(4, 6)
    for model in (one, two, one):
        model.eval()
        assert_same_bits(f(model, x), model(x))
    assert len(f.variants()) == 2


def test_views_are_arguments_like_others() -> None:
    f = jit(lambda x: (x * 2).sum(axes=(0,)))
    x = data(3, 4)
    for each in (
        x,
        x.transpose().reshape(4, 3).T,
        data(6, 4)[::2],
        data(1, 4).broadcast_to((3, 4)),
    ):
        assert_same_bits(f(each), (each * 2).sum(axes=(0,)))
    assert len(f.variants()) == 1


def test_results_that_are_no_tensors() -> None:
    f = jit(lambda x: (1, "a", None, (2.5, np.float32(3))))
    assert f(data(3)) == (1, "a", None, (2.5, np.float32(3)))
    model = network()
    for wrong, kind in ((np.zeros(3), "ndarray"), (model, "Sequential"), ({1}, "set")):
        with pytest.raises(
            TypeError, match=f"to return Tensors, numbers.*; received a {kind}; retu"
        ):
            jit(lambda x, wrong=wrong: wrong)(data(3))


def test_a_constant_result_is_a_new_tensor_each_time() -> None:
    f = jit(lambda: init.ones(3))
    one = f()
    one.data = one * 5
    assert_same_bits(f(), init.ones(3))


def test_objects_that_were_there_are_returned_themselves() -> None:
    w = Tensor(draw(3))
    f = jit(lambda x: (x, w, x + 1))
    x = data(3)
    for _ in range(2):
        found = f(x)
        assert found[0] is x
        assert found[1] is w


def test_wrong_arguments() -> None:
    f = jit(lambda x, scale=1: x)
    message = "jit: expected x of <lambda> to be a Tensor; received a ndarray; write ndl.Tensor"
    with pytest.raises(TypeError, match=message):
        f(np.zeros(3))
    with pytest.raises(TypeError, match=r"expected x\[0\].*hashable values; received a set"):
        f([{1, 2}])
    with pytest.raises(TypeError, match="expected a function; received a int"):
        jit(3)
    with pytest.raises(TypeError, match=r"static_argnames among .* x, scale; received y"):
        jit(lambda x, scale: x, static_argnames="y")
    with pytest.raises(TypeError, match="<lambda> of scale|scale of <lambda>"):
        jit(lambda x, scale: x, static_argnames="scale")(data(3), [1])


# Captured tensors and writes


def test_captured_tensors_are_read_at_each_call() -> None:
    w = Tensor(draw(3))
    f = jit(lambda x: x * w)
    x = data(3, dtype="float64")
    assert_same_bits(f(x), x * w)
    w.data = w.data * 3
    assert_same_bits(f(x), x * w)
    assert len(f.variants()) == 1


def test_old_data_keeps_its_values() -> None:
    w = Tensor(draw(3))

    @jit
    def step() -> None:
        w.data = w.data * 2

    old, view, array = w.data, w.data.reshape(3, 1), w.numpy()
    before = array.copy()
    step()
    step()
    for each in (old.numpy(), view.numpy().reshape(3), array):
        assert_same_bits(each, before)
    assert_same_bits(w, before * 4)


def test_swapped_and_shared_data() -> None:
    def swap(a: Tensor, b: Tensor) -> Callable[[], Tensor]:
        def step() -> Tensor:
            old = a.data
            a.data, b.data = b.data, a.data
            b.data = b + a
            return old

        return step

    results = []
    for wrap in (lambda step: step, jit):
        a, b = Tensor(draw(3)), Tensor(draw(3, seed=1))
        step = wrap(swap(a, b))
        returned = [step().numpy().copy() for _ in range(4)]
        results.append([a, b, *returned])
    for x, y in zip(*results, strict=True):
        assert_same_bits(x, y)


def test_data_passed_on_is_not_overwritten() -> None:
    a, b = Tensor(draw(3)), Tensor(draw(3, seed=1))

    @jit
    def step() -> None:
        a.data = b
        b.data = b + 1

    start = b.numpy().copy()
    for i in range(3):
        step()
        assert_same_bits(a, start + i)
        assert_same_bits(b, start + i + 1)


def test_two_tensors_written_with_one_value() -> None:
    a, b = Tensor(draw(3)), Tensor(draw(3, seed=1))

    @jit
    def step() -> None:
        a.data = b.data = a + b

    expected = a.numpy() + b.numpy()
    step()
    assert_same_bits(a, expected)
    assert_same_bits(b, expected)
    step()
    assert_same_bits(a, expected * 2)
    assert_same_bits(b, expected * 2)


def test_writes_are_read_later_in_the_same_call() -> None:
    w = Tensor(draw(3))

    def f(x: Tensor) -> Tensor:
        w.data = w * 2
        y = x + w
        w.data = w + 1
        return y * w

    x, start = data(3, dtype="float64"), w.numpy().copy()
    eager = f(x).numpy()
    after = w.numpy().copy()
    w.data = Tensor(start)
    assert_same_bits(jit(f)(x), eager)
    assert_same_bits(w, after)


def test_constants_may_be_written() -> None:
    model = nn.Linear(2, 2)
    opt = optim.SGD(model.parameters(), lr=0.5)

    @jit
    def step(x: Tensor) -> Tensor:
        opt.lr = 0.25
        return model(x)

    step(data(1, 2))
    assert opt.lr == 0.25
    opt.lr = 0.75
    step(data(1, 2))
    assert opt.lr == 0.25


def test_the_learning_rate_is_read_at_each_call() -> None:
    states = []
    for wrap in (lambda step: step, jit):
        model = network()
        opt = optim.Adam(model.parameters())
        schedule = optim.CosineLR(opt, total_steps=10, warmup_steps=2)
        step = wrap(train_step(model, opt))
        for i in range(4):
            step(data(12, 6, seed=i), labels(12, 3))
            schedule.step()
        states.append(model)
    assert_equal_states(*states)


def test_arguments_may_be_written() -> None:
    @jit
    def f(x: Tensor) -> None:
        x.data = x * 2

    x, y = Tensor(draw(3)), Tensor(draw(3, seed=1))
    before = y.numpy().copy()
    f(x)
    f(y)
    f(y)
    assert_same_bits(y, before * 4)


def test_state_in_attributes_lists_and_dicts() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            self.total = init.zeros(3)
            self.parts = [init.zeros(3), init.ones(3)]
            self.named = {"a": init.zeros(3)}

        def forward(self, x: Tensor) -> Tensor:
            self.total = self.total + x
            self.parts[1] = self.parts[1] * x
            self.named["a"] = self.named["a"] - x + self.total
            return self.total * 2

    eager, jitted = State(), State()
    run = jit(jitted)
    for i in range(4):
        x = data(3, seed=i)
        assert_same_bits(eager(x), run(x))
        assert_equal_states(eager, jitted)
    assert len(run.variants()) == 1
    old = jitted.total
    values = old.numpy().copy()
    run(data(3))
    assert_same_bits(old, values)


def test_state_that_begins_in_the_function() -> None:
    class Momentum(optim.Optimizer):
        """As course code writes it."""

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.u: dict[Tensor, Tensor] = {}

        def step(self) -> None:
            for p in self.params:
                if p not in self.u:
                    self.u[p] = init.zeros(*p.shape)
                assert p.grad is not None
                self.u[p] = 0.9 * self.u[p] + 0.1 * p.grad.data
                p.data = p.data - self.u[p] * 0.1

    models = []
    for wrap in (lambda step: step, jit):
        model = network()
        opt = Momentum(model.parameters())
        step = wrap(train_step(model, opt))
        for i in range(4):
            step(data(12, 6, seed=i), labels(12, 3))
        models.append(model)
    assert_equal_states(*models)
    assert len(step.variants()) == 2  # type: ignore[attr-defined]


def test_state_that_begins_as_none() -> None:
    class Average(nn.Module):
        def __init__(self) -> None:
            self.value: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            self.value = x if self.value is None else self.value * 0.5 + x * 0.5
            return self.value + 0

    eager, jitted = Average(), Average()
    run = jit(jitted)
    for i in range(5):
        assert_same_bits(eager(data(3, seed=i)), run(data(3, seed=i)))


def test_running_statistics_move() -> None:
    eager, jitted = network(), network()
    run = jit(jitted)
    for i in range(3):
        assert_same_bits(eager(data(5, 6, seed=i)), run(data(5, 6, seed=i)))
    assert_equal_states(eager, jitted)


# Gradients


def test_gradients_of_captured_leaves_are_outputs() -> None:
    w, unused = Tensor(draw(3)), Tensor(draw(3))
    x = Tensor(draw(3, seed=1))

    @jit
    def f(x: Tensor) -> None:
        (x * w * w).sum().backward()

    f(x)
    assert w.grad is not None
    assert_same_bits(w.grad, x.numpy() * w.numpy() + x.numpy() * w.numpy())
    assert unused.grad is None
    assert x.grad is None
    first = w.grad
    w.data = w.data + 1
    values = first.numpy().copy()
    f(x)
    assert_same_bits(first, values)
    assert not np.array_equal(w.grad.numpy(), values)


def test_reset_grad_at_the_end_drops_them() -> None:
    model = network()
    opt = optim.SGD(model.parameters())

    @jit
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = ndl.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.reset_grad()
        return loss

    for i in range(2):
        step(data(12, 6, seed=i), labels(12, 3))
        assert all(p.grad is None for p in model.parameters())


def test_gradients_may_be_added_up() -> None:
    def accumulate(w: Tensor) -> Callable[[Tensor], None]:
        def step(x: Tensor) -> None:
            before = w.grad
            (x * w).sum().backward()
            if before is not None:
                assert w.grad is not None
                w.grad = (before + w.grad).detach()

        return step

    results = []
    for wrap in (lambda step: step, jit):
        w = Tensor(draw(3))
        step = wrap(accumulate(w))
        for i in range(4):
            step(data(3, seed=i, dtype="float64"))
        results.append(w.grad)
    assert_same_bits(*results)


def test_an_update_alone_reads_eager_gradients() -> None:
    models = []
    for wrap in (lambda step: step, jit):
        model = network()
        opt = optim.Adam(model.parameters())
        update = wrap(opt.step)
        for i in range(3):
            ndl.cross_entropy(model(data(12, 6, seed=i)), labels(12, 3)).backward()
            update()
        models.append(model)
    assert_equal_states(*models)


def test_clipping_inside() -> None:
    models = []
    for wrap in (lambda step: step, jit):
        model = network()
        opt = optim.Adam(model.parameters())

        def step(
            x: Tensor, y: Tensor, model: nn.Module = model, opt: optim.Optimizer = opt
        ) -> Tensor:
            ndl.cross_entropy(model(x), y).backward()
            norm = opt.clip_grad_norm(0.1)
            opt.step()
            return norm

        run = wrap(step)
        norms = [run(data(12, 6, seed=i), labels(12, 3)).numpy().copy() for i in range(3)]
        models.append((model, norms))
    assert_equal_states(models[0][0], models[1][0])
    for a, b in zip(models[0][1], models[1][1], strict=True):
        assert_same_bits(a, b)


def test_captured_results_of_eager_ops() -> None:
    w, x = Tensor(draw(3)), Tensor(draw(3, seed=1))
    y = w * w
    f = jit(lambda x: (x * y).sum())
    f(x).backward()
    assert_same_bits(w.grad, x.numpy() * w.numpy() + x.numpy() * w.numpy())
    assert_same_bits(x.grad, y)
    w.grad = None
    inside = jit(lambda x: (x * y).sum().backward())
    for _ in range(2):
        inside(x)
        assert_same_bits(w.grad, x.numpy() * w.numpy() + x.numpy() * w.numpy())


def test_parameters_that_are_views() -> None:
    w = Tensor(draw(2, 3))
    w.data = w.data.transpose()
    before = w.numpy().copy()

    @jit
    def step() -> Tensor:
        w.data = w * 2
        return w * 3

    for factor in (2, 4):
        assert_same_bits(step(), before * factor * 3)
        assert_same_bits(w, before * factor)
    assert len(step.variants()) == 1


def test_labels_from_outside_are_read_at_each_call() -> None:
    y = ndl.Tensor(np.array([0, 1, 2, 1]), dtype="int64")
    x = data(4, 3)
    loss = ndl.jit(lambda x: ndl.cross_entropy(x, y))
    for values in ([0, 1, 2, 1], [2, 2, 0, 0]):
        y.data = ndl.Tensor(np.array(values), dtype="int64")
        assert loss(x).item() == ndl.cross_entropy(x, y).item()


# Under autograd


def test_a_call_is_one_node_with_eagers_gradients() -> None:
    model = network()

    def loss_of(x: Tensor) -> Tensor:
        return ndl.cross_entropy(model(x), labels(12, 3))

    x = Tensor(draw(12, 6, dtype="float32"))
    run = jit(loss_of)
    loss_of(x)  # so that the running statistics of both calls begin alike
    state = model.state_dict()
    expected = loss_of(x * 1.0)
    expected.backward()
    gradients = [x.grad.numpy().copy(), *(p.grad.numpy().copy() for p in model.parameters())]
    model.load_state_dict(state)
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        model.load_state_dict(state)
        found = run(x * 1.0)
        assert_same_bits(found, expected)
        names = [autograd.op_name(node.op) for node in autograd.find_topo_sort([found]) if node.op]
        assert names == ["mul_scalar", "jit", "tuple_get_item"]
        found.backward()
        for a, b in zip(gradients, [x, *model.parameters()], strict=True):
            assert_same_bits(a, b.grad)


def test_several_results_some_unused() -> None:
    w = Tensor(draw(3))
    f = jit(lambda x: (x * w, (x + w, w * w), x.astype("int64")))
    x = Tensor(draw(3, seed=1))
    _, (_, square), whole = f(x)
    assert not whole.requires_grad
    square.sum().backward()
    assert_same_bits(w.grad, w.numpy() + w.numpy())
    a, (b, _), _ = f(x)
    (a * b).sum().backward()
    w_, x_ = Tensor(w.numpy()), Tensor(x.numpy())
    ((x_ * w_) * (x_ + w_)).sum().backward()
    assert_same_bits(x.grad, x_.grad)
    assert_same_bits(w.grad, w_.grad)


def test_second_and_third_derivatives() -> None:
    f = jit(lambda x: (x * x * x * x).sum())
    x = Tensor(draw(3))
    f(x).backward()
    first = x.grad
    assert first is not None
    first.sum().backward()
    second = x.grad
    assert second is not None
    np.testing.assert_allclose(second.numpy(), 12 * x.numpy() ** 2, rtol=1e-12)
    second.sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad.numpy(), 24 * x.numpy(), rtol=1e-12)


def test_gradients_in_lazy_mode() -> None:
    w = Tensor(draw(3))
    f = jit(lambda x: (x * w * w).sum())
    x = Tensor(draw(3, seed=1))
    with ndl.lazy():
        f(x * 2).backward()
        assert x.grad is not None
        np.testing.assert_allclose(x.grad.numpy(), 2 * w.numpy() ** 2, rtol=1e-12)


def test_no_grad_is_a_variant_of_its_own() -> None:
    w = Tensor(draw(3))
    f = jit(lambda: w * 2)
    assert f().requires_grad
    with ndl.no_grad():
        assert not f().requires_grad
    assert f().requires_grad
    assert f.variants() == ["first call", "gradient mode: on -> off"]


def test_a_function_that_runs_backward_returns_values_alone() -> None:
    model = network()
    step = jit(train_step(model, optim.SGD(model.parameters())))
    assert not step(data(12, 6), labels(12, 3)).requires_grad


def test_jit_inside_jit_is_inlined() -> None:
    w = Tensor(draw(3))
    traced = []

    @jit
    def inner(x: Tensor) -> Tensor:
        traced.append(1)
        w.data = w * 2
        return x * w

    outer = jit(lambda x: inner(x) + inner(x))
    x, start = data(3, dtype="float64"), w.numpy().copy()
    assert_same_bits(outer(x), x.numpy() * (start * 2) + x.numpy() * (start * 4))
    assert_same_bits(w, start * 4)
    outer(x)
    assert traced == [1, 1]
    assert inner.variants() == []


def test_a_users_op() -> None:
    class Double(ndl.TensorOp):
        def compute(self, x: Any) -> Any:
            calls.append(x.shape)
            return x * 2

        def gradient(self, out_grad: Any, node: Any) -> Any:
            return out_grad * 2

    calls: list[Any] = []
    w = Tensor(draw(3))
    f = jit(lambda x: Double()(x * w).sum())
    x = Tensor(draw(3, seed=1))
    f(x).backward()
    assert_same_bits(w.grad, x.numpy() * 2)
    calls.clear()
    f(x)
    assert calls == [(3,)]


# Aliases


def test_arguments_that_are_one_tensor() -> None:
    @jit
    def f(x: Tensor, y: Tensor) -> Tensor:
        x.data = x * 2
        return x + y

    x, y = Tensor(draw(3)), Tensor(draw(3, seed=1))
    a, b = x.numpy().copy(), y.numpy().copy()
    assert_same_bits(f(x, y), a * 2 + b)
    assert_same_bits(f(y, y), b * 2 + b * 2)
    assert_same_bits(f(x, y), a * 4 + b * 2)
    assert len(f.variants()) == 2


def test_an_argument_that_is_captured_and_written() -> None:
    w = Tensor(draw(3))

    @jit
    def f(x: Tensor) -> Tensor:
        w.data = w * 2
        return x + w

    start = w.numpy().copy()
    x = Tensor(draw(3, seed=1))
    assert_same_bits(f(w), start * 2 + start * 2)
    assert_same_bits(f(x), x.numpy() + start * 4)
    assert_same_bits(f(w), start * 8 + start * 8)
    assert len(f.variants()) == 2


def test_an_argument_that_is_captured_and_differentiated() -> None:
    w = Tensor(draw(3))

    @jit
    def f(x: Tensor) -> None:
        (x * w).sum().backward()

    f(w)
    assert_same_bits(w.grad, w.numpy() + w.numpy())
    x = Tensor(draw(3, seed=1))
    f(x)
    assert_same_bits(w.grad, x)
    assert x.grad is None


# Variants


def test_the_last_smaller_batch_is_a_second_variant() -> None:
    model = network()
    step = jit(train_step(model, optim.SGD(model.parameters())))
    for size in (12, 12, 5, 12, 5):
        step(data(size, 6), labels(size, 3))
    (first, second) = step.variants()
    assert first == "first call"
    assert second == "x: float32[12, 6] on cpu() -> float32[5, 6] on cpu()"


def test_reasons() -> None:
    f = jit(lambda x, scale, flag=True: x * scale)
    x = data(3)
    f(x, 1)
    f(x, 1)
    f(x, 1.0)
    f(x, True)
    f(x, 0.0)
    f(x, -0.0)
    f(x, float("nan"))
    f(x, float("nan"))
    f(x, 1, flag=False)
    f(data(3, dtype="float64"), 1, flag=False)
    f(Tensor(draw(3)), 1, flag=False)
    assert f.variants()[1:4] == ["scale: 1 -> 1.0", "scale: 1.0 -> True", "scale: True -> 0.0"]
    assert f.variants()[4:6] == ["scale: 0.0 -> -0.0", "scale: -0.0 -> nan"]
    assert f.variants()[7].startswith("x: float32[3] on cpu() -> float64[3]")
    assert f.variants()[8].endswith("float64[3] on cpu(), requires_grad")
    assert len(f.variants()) == 9


def test_training_of_every_module() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.ReLU())
    model.train()
    run = jit(lambda x: model(x))
    x = data(5, 6)
    run(x)
    model.eval()
    assert_same_bits(run(x), model(x))
    model.train()
    run(x)
    model.eval()
    assert_same_bits(run(x), model(x))
    (_, second) = run.variants()
    assert second.startswith("training of ")
    assert second.endswith(": True -> False")


def test_training_of_a_module_that_only_holds() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            self.inner = nn.Identity()
            self.weight = nn.Parameter(init.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight * (2 if self.inner.training else 3)

    model = Scale()
    run = jit(model)
    x = data(3)
    assert_same_bits(run(x), x * 2.0)
    model.inner.eval()
    assert_same_bits(run(x), x * 3.0)


def test_a_replaced_parameter_and_a_new_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    run = jit(lambda x: model(x))
    x = data(2, 3)
    run(x)
    first: Any = model.modules()[1]
    first.weight = nn.Parameter(Tensor(draw(3, 3, seed=5, dtype="float32")))
    assert_same_bits(run(x), model(x))
    model.layers = (*model.layers, nn.Linear(3, 2))
    assert_same_bits(run(x), model(x))
    reasons = run.variants()
    assert reasons[1:] == ["Linear.weight: replaced", "Sequential.layers: replaced"]
    run(x)
    assert len(run.variants()) == 3


def test_python_attributes_are_baked_in() -> None:
    class Scale(nn.Module):
        factor = 2.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    model = Scale()
    run = jit(model)
    x = data(3)
    run(x)
    Scale.factor = 3.0
    assert_same_bits(run(x), x * 2.0)


def test_replaced_enclosing_and_global_variables() -> None:
    model = nn.Linear(3, 2)
    run = jit(lambda x: model(x))
    x = data(2, 3)
    run(x)
    model = nn.Linear(3, 2)
    assert_same_bits(run(x), model(x))
    scope = {"w": Tensor(draw(3))}
    exec("def f(x): return x * w", scope)
    f = jit(scope["f"])
    f(x)
    scope["w"] = Tensor(draw(3, seed=3))
    assert_same_bits(f(x), x * scope["w"])
    assert f.variants()[1] == "w: replaced"


def test_a_captured_tensor_of_another_dtype() -> None:
    model = nn.Linear(3, 2)
    run = jit(model)
    run(data(2, 3))
    model.to("float64")
    assert_same_bits(run(data(2, 3)), model(data(2, 3)))
    assert run.variants()[1].startswith("a captured tensor: float32[")


def test_frozen_parameters() -> None:
    w = Tensor(draw(3))

    @jit
    def f(x: Tensor) -> Tensor:
        y = (x * w).sum()
        if y.requires_grad:
            y.backward()
        return y

    x = data(3)
    f(x)
    w.grad, w.requires_grad = None, False
    f(x)
    assert w.grad is None
    assert f.variants()[1] == "requires_grad of a captured tensor: True -> False"


def test_static_arguments() -> None:
    traced = []

    @jit
    def plain(x: Tensor, options: Any) -> Tensor:
        return x * options[0]

    @ndl.jit(static_argnames="axes")
    def f(x: Tensor, axes: tuple[int, ...]) -> Tensor:
        traced.append(axes)
        return x.sum(axes=axes)

    x = data(2, 3)
    assert_same_bits(f(x, (0,)), x.sum(axes=(0,)))
    assert_same_bits(f(x, axes=(1,)), x.sum(axes=(1,)))
    assert_same_bits(f(x, (0,)), x.sum(axes=(0,)))
    assert traced == [(0,), (1,)]
    assert_same_bits(plain(x, [2.0]), x * 2.0)


def test_endless_variants_warn_once_and_are_bounded() -> None:
    f = jit(lambda x, step: x * 2)
    x = data(3)

    def count(steps: int) -> None:
        for step in range(steps):
            f(x, step)

    with pytest.warns(RetraceWarning, match=r"<lambda> was compiled 8 times because of step; pass"):
        count(20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count(100)
    assert sum(map(len, f.known.values())) == 64
    assert_same_bits(f(x, 99), x * 2)


def test_endless_shapes_warn() -> None:
    f = jit(lambda x: x.sum())

    def grow() -> None:
        for size in range(1, 12):
            f(data(size))

    with pytest.warns(RetraceWarning, match="because of x; .*few shapes"):
        grow()


# Refusals


def refused(function: Any, *args: Any) -> str:
    with pytest.raises(ndl.TraceError) as error:
        jit(function)(*args)
    return str(error.value)


def line_of(text: str) -> str:
    lines = Path(__file__).read_text().splitlines()
    return f"test_jit.py:{next(i for i, each in enumerate(lines, 1) if text in each)}"


def test_reading_a_traced_value_says_what_and_where() -> None:
    def step(x: Tensor) -> Any:
        loss = x.mean()
        return float(loss)  # a marked line

    message = refused(step, data(3))
    assert "the result of mean, float32[]" in message
    assert "__float__" not in message
    assert line_of("# a marked line") in message
    assert "`step` is traced" in message
    assert message.endswith("return the Tensor and read it after the call")


@pytest.mark.parametrize(
    ("read", "what", "cure"),
    [
        (lambda x: x.mean().item(), "item()", "return the Tensor"),
        (lambda x: (x * 2).numpy(), "numpy()", "return the Tensor"),
        (lambda x: np.asarray(x + 1), "array()", "return the Tensor"),
        (lambda x: 1 if x.sum() > 0 else 2, "`if` or bool()", "ndl.where(condition, a, b)"),
        (lambda x: x[x > 0], "indexing by a boolean mask", "ndl.where(mask, x, 0)"),
        (lambda x: x.tolist(), "an argument", "return the Tensor"),
        (lambda x: Tensor(x), "init()", ".detach()"),
        (lambda x: int(x.sum()), "int()", "return the Tensor"),
        (lambda x: Tensor([x.sum(), x.sum()]), "init()", "ndl.stack"),
    ],
)
def test_reads_and_their_cures(read: Any, what: str, cure: str) -> None:
    message = refused(read, data(3))
    assert what in message
    assert cure in message
    assert "test_jit.py:" in message


def test_captured_values_are_not_baked_in() -> None:
    w = Tensor(draw(3))
    assert "a tensor from outside, float64[3]" in refused(lambda: w * w.numpy())
    assert "the result of summation" in refused(lambda: float(w.sum()))
    model = nn.Linear(2, 2)
    opt = optim.SGD(model.parameters())
    assert "param_groups[0].rate" in refused(lambda x: x * opt.lr, data(3))
    assert "copy it outside" in refused(lambda: copy.deepcopy(w) * 2)


def test_constants_may_be_read() -> None:
    def f(x: Tensor) -> Tensor:
        mask = Tensor(np.tri(3))
        return x * float(mask.sum()) + (mask * 2).numpy()

    x = data(3, 3)
    assert_same_bits(jit(f)(x), f(x))


def test_the_module_is_named() -> None:
    class Bad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x.sum().item()

    model = nn.Sequential(nn.Identity(), Bad())
    assert "(in 1)" in refused(model, data(3))


def test_a_schedule_inside() -> None:
    model = nn.Linear(2, 2)
    opt = optim.SGD(model.parameters())
    schedule = optim.StepLR(opt, 2)
    message = refused(lambda: schedule.step())
    assert "schedule.step counts" in message
    assert "outside of the jitted function" in message
    assert schedule.count == 0


def test_shapes_of_what_is_written_stay() -> None:
    w = Tensor(draw(3))

    def f() -> None:
        w.data = w.data.reshape(3, 1)

    assert "(3,) became (3, 1)" in refused(f)


def test_arguments_containers_stay() -> None:
    def f(batch: dict[str, Tensor]) -> Tensor:
        batch["y"] = batch["x"] * 2
        return batch["y"]

    assert "changes a container" in refused(f, {"x": data(3)})


def test_one_device() -> None:
    other = Tensor(draw(3), device=ndl.cpu_numpy())
    with pytest.raises(ValueError, match=r"one device; received cpu\(\) and cpu_numpy\(\)"):
        jit(lambda x: x + other)(data(3, dtype="float64"))
    message = refused(lambda x: x.to(ndl.cpu_numpy()), data(3))
    assert message.endswith("move it before the call")


def test_tuples_of_tensors_are_unpacked() -> None:
    both = ndl.make_tuple(data(3), data(3))
    with pytest.raises(TypeError, match="received a TensorTuple; return tuple"):
        jit(lambda x: ndl.split(x, 0))(data(2, 3))
    with pytest.raises(TypeError, match="received a TensorTuple; pass a tuple"):
        jit(lambda t: t[0])(both)
    leaf = both.detach()
    assert "a TensorTuple from outside is read" in refused(lambda: leaf[0] * 2)


# Leaks


KEPT: list[Any] = []
LAST: Any = None


def keep_in_global_list(x: Tensor) -> Tensor:
    KEPT.append(x * 2)
    return x


def keep_in_global(x: Tensor) -> Tensor:
    global LAST
    LAST = x + 1
    return x


class Trainer:
    loss: Any = None

    def step(self, x: Tensor) -> Tensor:
        self.loss = x.mean()
        return x


def test_traced_tensors_that_outlive_the_call() -> None:
    message = refused(keep_in_global_list, data(3))
    assert "held by a list in global variable 'KEPT'" in message
    assert "the result of mul_scalar" in message
    assert "test_jit.py:" in message
    KEPT.clear()
    assert "held by global variable 'LAST'" in refused(keep_in_global, data(3))
    trainer = Trainer()
    assert "held by attribute 'loss' of Trainer" in refused(trainer.step, data(3))
    losses: list[Any] = []
    message = refused(lambda x: losses.append(x.sum()), data(3))
    assert "held by a list, variable 'losses' of test_traced_tensors" in message
    held = None

    def enclose(x: Tensor) -> None:
        nonlocal held
        held = x.sum()

    assert "held by variable 'held' around enclose" in refused(enclose, data(3))
    with pytest.raises(ndl.TraceError, match="one of a trace that ended"):
        print(held + 1)  # type: ignore[operator]
    assert "an argument held by" in refused(lambda x: losses.append(x), data(3))


def test_cycles_of_garbage_are_no_leaks() -> None:
    def f(x: Tensor) -> Tensor:
        cycle: list[Any] = [x * 2]
        cycle.append(cycle)
        return x * 3

    gc.disable()
    try:
        assert_same_bits(jit(f)(data(3)), data(3) * 3)
    finally:
        gc.enable()


def test_a_list_in_a_module_does_not_grow() -> None:
    class Log(nn.Module):
        def __init__(self) -> None:
            self.items: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            self.items.append(x * 2)
            return x

    model = Log()
    assert "a list in Log grows" in refused(model, data(3))
    assert model.items == []


def test_state_in_a_tuple() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            self.state = init.zeros(3), init.zeros(3)

        def forward(self, x: Tensor) -> Tensor:
            self.state = x * 2, x * 3
            return x

    cell = Cell()
    before = cell.state
    assert "held by a tuple in attribute 'state' of Cell" in refused(cell, data(3))
    assert cell.state is before


# A failed trace


def test_a_failed_trace_restores_all() -> None:
    ndl.seed(3)
    model = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
    opt = optim.Adam(model.parameters())
    ndl.cross_entropy(model(data(12, 6)), labels(12, 3)).backward()
    opt.step()
    generator: Any = init.generator()

    class Extra(nn.Module):
        def __init__(self) -> None:
            self.count, self.items, self.named = 0, [1, 2], {"a": init.ones(3)}

    extra: Any = Extra()
    grads = [p.grad for p in model.parameters()]
    arrays = [*model.state_dict().values(), *opt.state_dict()["state"].values(), generator.state]
    before = [x.numpy().copy() for x in arrays]
    named = extra.named["a"]

    def step(x: Tensor, y: Tensor) -> float:
        extra.count += 1
        extra.items.append(x)
        extra.named["a"] = x
        extra.named["b"] = x
        extra.new = x
        del extra.items[0]
        loss = ndl.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.reset_grad()
        return float(loss)

    refused(step, data(12, 6), labels(12, 3))
    after = [*model.state_dict().values(), *opt.state_dict()["state"].values(), generator.state]
    for x, y in zip(before, after, strict=True):
        assert_same_bits(x, y)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert (extra.count, extra.items, list(extra.named)) == (0, [1, 2], ["a"])
    assert extra.named["a"] is named
    assert not hasattr(extra, "new")
    assert autograd.MODE.trace is None
    assert not autograd.is_lazy()


def test_a_users_error_passes_and_restores() -> None:
    w = Tensor(draw(3))

    @jit
    def f(x: Tensor) -> Tensor:
        w.data = w * 2
        return x @ w.reshape(1, 3)

    before = w.numpy().copy()
    with pytest.raises(ValueError, match="matmul"):
        f(data(3, 3))
    assert_same_bits(w, before)


def test_an_index_out_of_range_writes_nothing() -> None:
    w = Tensor(draw(5))

    @jit
    def f(index: Tensor) -> Tensor:
        w.data = w * 2
        return ndl.take(w, index)

    good = Tensor(np.array([1, 2]), dtype="int64", requires_grad=False)
    bad = Tensor(np.array([1, 7]), dtype="int64", requires_grad=False)
    before = w.numpy().copy()
    for _ in range(2):
        with pytest.raises(IndexError, match="below 5; received 7"):
            f(bad)
        assert_same_bits(w, before)
    assert_same_bits(f(good), before[[1, 2]] * 2)
    with pytest.raises(IndexError, match="below 5; received 7"):
        f(bad)
    assert_same_bits(w, before * 2)


def test_a_failing_first_run_leaves_no_traced_tensor_in_attributes() -> None:
    class State(nn.Module):
        def __init__(self) -> None:
            self.last = init.zeros(2)

        def forward(self, index: Tensor) -> Tensor:
            self.last = ndl.take(data(5), index)
            return self.last

    model = State()
    last = model.last
    with pytest.raises(IndexError):
        jit(model)(Tensor(np.array([1, 7]), dtype="int64", requires_grad=False))
    assert model.last is last


# Random numbers


def test_seeded_draws_are_eagers() -> None:
    found = []
    model = nn.Sequential(nn.Dropout(0.5))
    for wrap in (lambda f: f, jit):
        ndl.seed(7)
        run = wrap(lambda x: model(x) + init.rand(4, 4) + init.randn(4, 4))
        found.append([run(data(4, 4)).numpy().copy() for _ in range(3)])
        state: Any = init.generator()
        found[-1].append(state.state.numpy().copy())
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    assert not np.array_equal(found[0][0], found[0][1])


def test_without_a_seed_a_function_has_its_own_generator() -> None:
    draws = []
    for _ in range(2):
        np.random.seed(4)
        f = jit(lambda: init.rand(5))
        draws.append((f().numpy().copy(), f().numpy().copy(), np.random.rand()))
    (a, b, next_one), (c, d, _) = draws
    assert_same_bits(a, c)
    assert_same_bits(b, d)
    assert not np.array_equal(a, b)
    np.random.seed(4)
    np.random.randint(np.iinfo(np.int64).max)
    assert np.random.rand() == next_one


def test_seed_after_a_call_makes_a_new_variant() -> None:
    f = jit(lambda: init.rand(5))
    f()
    ndl.seed(5)
    found = f()
    ndl.seed(5)
    assert_same_bits(found, init.rand(5))
    ndl.seed(5)
    assert_same_bits(found, f())
    assert f.variants()[1:] == ["ndl.seed: another generator"]


# Methods, threads, memory


def test_methods_have_variants_for_each_object() -> None:
    class Net(nn.Module):
        def __init__(self, seed: int) -> None:
            self.weight = nn.Parameter(Tensor(draw(3, seed=seed)))
            self.traced = 0

        @jit
        def forward(self, x: Tensor) -> Tensor:
            self.traced += 1
            return x * self.weight

        @ndl.jit(static_argnames=("n",))
        def power(self, x: Tensor, n: int) -> Tensor:
            return self.weight * x**n

    one, two = Net(1), Net(2)
    x = data(3)
    for net in (one, two, one):
        assert_same_bits(net(x), x * net.weight)
        assert_same_bits(net.power(x, n=2), net.weight * x**2)
    assert (one.traced, two.traced) == (1, 1)
    watcher = weakref.ref(one)
    del one, net
    gc.collect()
    assert watcher() is None


def test_a_copied_module_is_traced_anew() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            self.weight = nn.Parameter(Tensor(draw(3)))

        @jit
        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    one, x = Net(), data(3)
    one(x)
    two = copy.deepcopy(one)
    two.weight.data = two.weight * 3
    assert_same_bits(two(x), x * two.weight)
    assert_same_bits(one(x), x * one.weight)


def test_a_dropped_step_frees_its_model() -> None:
    model = network()
    step = jit(train_step(model, optim.Adam(model.parameters())))
    step(data(12, 6), labels(12, 3))
    watcher = weakref.ref(model)
    del model, step
    gc.collect()
    assert watcher() is None


def test_calls_from_several_threads() -> None:
    w = Tensor(draw(3))
    total = Tensor(np.zeros(()), requires_grad=False)
    f = jit(lambda x: (x * w).sum())

    @jit
    def count(x: Tensor) -> None:
        total.data = total + x.sum()

    wrong: list[Any] = []

    def work(number: int) -> None:
        for i in range(30):
            size = 1 + (number + i) % 3
            x = data(size, 3, seed=i, dtype="float64")
            with ndl.no_grad():
                if not np.array_equal(f(x).numpy(), (x * w).sum().numpy()):
                    wrong.append(i)
                count(Tensor(np.ones(1), requires_grad=False))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []
    assert total.item() == 120
    assert len(f.variants()) == 3


def test_live_values_do_not_grow() -> None:
    model = network()
    opt = optim.Adam(model.parameters())
    step = jit(train_step(model, opt))
    counts = []
    for i in range(6):
        step(data(12, 6, seed=i), labels(12, 3))
        opt.reset_grad()
        counts.append(ndl.memory.live_values())
    assert len(set(counts[1:])) == 1


def test_deep_graphs() -> None:
    def f(x: Tensor) -> Tensor:
        for _ in range(200_000):
            x = x + 1.0
        return x

    with ndl.no_grad():
        run = jit(f)
        assert run(Tensor(np.zeros(1))).item() == 200_000
        assert run(Tensor(np.ones(1))).item() == 200_001


def test_deep_graphs_backward() -> None:
    w = Tensor(np.ones(1))

    @jit
    def f() -> None:
        x = w
        for _ in range(20_000):
            x = x * 1.0
        x.backward()

    f()
    assert w.grad is not None
    assert w.grad.item() == 1.0


def test_exclusive() -> None:
    w = Tensor(draw(300))
    arrays = [w.cached_data]

    def alone() -> bool:
        return exclusive(arrays, [0])[0]

    assert alone()
    for share in (w.detach, lambda: w.reshape(300, 1), lambda: w.numpy()[3:], lambda: arrays[0]):
        other = share()
        assert not alone()
        del other
        assert alone()


def test_state_is_updated_in_place_where_nobody_looks() -> None:
    w = Tensor(draw(300))

    @jit
    def step() -> None:
        w.data = w * 2

    place = w.cached_data.ptr
    step()
    assert w.cached_data.ptr == place
    old = w.data
    step()
    assert w.cached_data.ptr != place
    assert old.cached_data.ptr == place


def test_anomalies_are_found_op_by_op() -> None:
    f = jit(lambda x: ndl.log(x) * 0.0)
    f(data(3).abs())
    with (
        ndl.debug.detect_anomaly(),
        pytest.raises(ndl.debug.AnomalyError, match="log made infinity"),
    ):
        f(init.zeros(3))


def test_the_reference_program_reuses_memory_only_at_the_end() -> None:
    w = autograd.Tensor(draw(3))
    with ndl.lazy():
        spec = w.cached_data.spec
        leaf = Tensor._new(None, (), w.cached_data, False)
        leaf.spec, leaf.operands = spec, None
        new, old = leaf * 2, leaf.reshape(3, 1)
        for node in (new, old):
            node.operands = (leaf,)
    program = reference.build([leaf], [new, old], {0: 0})
    before = w.numpy().copy()
    found = program([w.cached_data], [True])
    assert found[0] is w.cached_data
    assert_same_bits(found[0], before * 2)
    assert_same_bits(found[1], before.reshape(3, 1))
    assert sys.getrefcount(found[0]) >= 2


def test_a_function_that_sets_the_mode_of_a_module() -> None:
    model = nn.Linear(2, 2).eval()
    step = ndl.jit(lambda x: model.train()(x))
    x = Tensor(np.ones((1, 2), np.float32), requires_grad=False)
    expected = model(x).numpy()
    for _ in range(3):
        assert_same_bits(step(x).numpy(), expected)
        assert model.training
    assert len(step.variants()) == 2, "one for each mode in which it was called"
