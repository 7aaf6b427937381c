"""grad, value_and_grad, vjp, jvp, hvp, hessian: against finite differences in float64, PyTorch's
torch.func, backward(), and themselves in every mode, to the bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checks import assert_close, assert_same_bits, derivative, draw

import needle as ndl
from needle import autograd, compiler, nn
from needle.autograd import MODE, Tensor
from needle.compiler.loops import Contraction

Array = np.ndarray
Function = Callable[..., Any]

A, B = draw(4, 5, seed=1) * 0.5, draw(5, 3, seed=2) * 0.5


def constant(x: Any) -> Tensor:
    return Tensor(x, requires_grad=False)


def network(x: Any) -> Any:
    """A smooth function with broadcasting, reductions and two contractions."""
    h = ndl.tanh(x @ constant(A))
    return ndl.softmax(h @ constant(B) + h.sum(1, keepdims=True)) * x.mean()


def number(x: Any) -> Any:
    y = network(x)
    return (y * y).sum() + ndl.logsumexp(x)


def torch_network(torch: ModuleType) -> Function:
    a, b = torch.tensor(A), torch.tensor(B)

    def run(x: Any) -> Any:
        h = torch.tanh(x @ a)
        return torch.softmax(h @ b + h.sum(1, keepdims=True), -1) * x.mean()

    return run


def torch_number(torch: ModuleType) -> Function:
    run = torch_network(torch)
    return lambda x: (run(x) ** 2).sum() + torch.logsumexp(x.flatten(), 0)


X, V, W = draw(2, 4, seed=3), draw(2, 4, seed=4), draw(2, 3, seed=5)


@dataclass
class Weights:
    inner: dict[str, Any]
    scale: Any
    name: None = None


def near(found: Any, expected: Any) -> None:
    assert_close(found, np.asarray(expected), "float64", length=64, factor=8.0)


# Values


def test_grad_is_the_slope() -> None:
    slope = ndl.grad(number)(Tensor(X)).numpy()
    for direction in (V, draw(2, 4, seed=9)):
        expected = derivative(lambda t, d=direction: number(constant(X + t * d)).item())
        np.testing.assert_allclose((slope * direction).sum(), expected, rtol=1e-8)


def test_grad_is_torch_funcs(torch: ModuleType) -> None:
    expected = torch.func.grad(torch_number(torch))(torch.tensor(X))
    near(ndl.grad(number)(Tensor(X)), expected)


def test_grad_of_grad_of_grad_is_torch_funcs(torch: ModuleType) -> None:
    def third(grad: Function, f: Function) -> Function:
        once = grad(f)
        twice = grad(lambda x: (once(x) * once(x)).sum())
        return grad(lambda x: (twice(x) * x).sum())

    expected = third(torch.func.grad, torch_number(torch))(torch.tensor(X))
    near(third(ndl.grad, number)(Tensor(X)), expected)


def test_derivatives_of_a_power() -> None:
    f: Function = lambda x: x**5  # noqa: E731
    expected = [80.0, 160.0, 240.0, 240.0, 120.0, 0.0]
    for value in expected:
        f = ndl.grad(f)
        near(f(Tensor(2.0, dtype="float64")), value)


def test_vjp_is_torch_funcs(torch: ModuleType) -> None:
    y, pullback = ndl.vjp(network, Tensor(X))
    expected, pull = torch.func.vjp(torch_network(torch), torch.tensor(X))
    near(y, expected)
    for weights in (W, W * 2.0):
        near(pullback(Tensor(weights))[0], pull(torch.tensor(weights))[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_jvp_is_torch_funcs(torch: ModuleType) -> None:
    y, dy = ndl.jvp(network, (Tensor(X),), (Tensor(V),))
    expected = torch.func.jvp(torch_network(torch), (torch.tensor(X),), (torch.tensor(V),))
    near(y, expected[0])
    near(dy, expected[1])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_hvp_and_hessian_are_torch_funcs(torch: ModuleType) -> None:
    matrix = torch.func.hessian(torch_number(torch))(torch.tensor(X))
    near(ndl.hessian(number)(Tensor(X)), matrix)
    (found,) = ndl.hvp(number, (Tensor(X),), (Tensor(V),))
    near(found, torch.einsum("abcd,cd->ab", matrix, torch.tensor(V)))


def test_jvp_is_a_difference() -> None:
    _, dy = ndl.jvp(network, (Tensor(X),), (Tensor(V),))
    for place in np.ndindex(2, 3):
        expected = derivative(lambda t, p=place: network(constant(X + t * V)).numpy()[p])
        np.testing.assert_allclose(dy.numpy()[place], expected, rtol=1e-7, atol=1e-10)


# Arguments and results


def test_structures_and_argnums() -> None:
    def f(a: Tensor, weights: Weights, rest: list[Any], flag: bool) -> Tensor:
        assert flag
        first, second = weights.inner["u"], weights.inner["v"][0]
        return (a * first * weights.scale).sum() + (second * second).sum() * rest[0].sum()

    a, u, v = (Tensor(draw(3, seed=n)) for n in (0, 1, 2))
    scale, other = Tensor(2.0, dtype="float64"), Tensor(draw(2, seed=5))
    weights, rest = Weights({"u": u, "v": (v,)}, scale), [other]
    value, (to_rest, to_weights) = ndl.value_and_grad(f, argnums=(-2, 1))(a, weights, rest, True)
    near(value, f(a, weights, rest, True).numpy())
    assert isinstance(to_weights, Weights)
    assert to_weights.name is None
    assert isinstance(to_rest, list)
    near(to_weights.inner["u"], 2.0 * a.numpy())
    near(to_weights.inner["v"][0], 2.0 * v.numpy() * other.numpy().sum())
    near(to_weights.scale, (a.numpy() * u.numpy()).sum())
    near(to_rest[0], np.full(2, (v.numpy() ** 2).sum()))


def test_keyword_arguments_pass() -> None:
    found = ndl.grad(lambda x, *, power: (x**power).sum())(Tensor([1.0, 3.0]), power=2)
    assert found.tolist() == [2.0, 6.0]


def test_aux() -> None:
    def f(x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        return (x * x).sum(), {"twice": x * 2.0, "name": "f"}

    x = constant([1.0, 2.0])
    (y, aux), slope = ndl.value_and_grad(f, has_aux=True)(x)
    assert (y.item(), slope.tolist(), aux["twice"].tolist(), aux["name"]) == (
        5.0, [2.0, 4.0], [2.0, 4.0], "f",
    )  # fmt: skip
    assert not aux["twice"].requires_grad
    slope, aux = ndl.grad(f, has_aux=True)(x)
    assert (slope.tolist(), aux["twice"].tolist()) == ([2.0, 4.0], [2.0, 4.0])
    y, pullback, aux = ndl.vjp(f, x, has_aux=True)
    assert (pullback(Tensor(3.0))[0].tolist(), aux["name"]) == ([6.0, 12.0], "f")


def test_what_does_not_count_has_zeros() -> None:
    x, y = Tensor([np.inf, 1.0]), Tensor([2.0, 3.0])
    to_x, to_y = ndl.grad(lambda a, b: (b * b).sum(), argnums=(0, 1))(x, y)
    assert (to_x.tolist(), to_y.tolist()) == ([0.0, 0.0], [4.0, 6.0])
    assert ndl.grad(lambda a: ndl.floor(a).sum())(y).tolist() == [0.0, 0.0]
    assert ndl.grad(lambda a: Tensor(1.0))(y).tolist() == [0.0, 0.0]
    assert ndl.jvp(lambda a: Tensor([1.0]), (y,), (x,))[1].tolist() == [0.0]


def test_only_the_argument_counts() -> None:
    """Not the same tensor where the function knows it from elsewhere."""
    x = Tensor([2.0, 3.0])
    assert ndl.grad(lambda a: (a * x).sum())(x).tolist() == [2.0, 3.0]
    both = ndl.grad(lambda a, b: (a * b * b).sum(), argnums=(0, 1))(x, x)
    assert [each.tolist() for each in both] == [[4.0, 9.0], [8.0, 18.0]]
    inner = ndl.grad(lambda a: (ndl.grad(lambda b: (a * b).sum())(a) * a).sum())
    assert inner(x).tolist() == [4.0, 6.0]


def test_pullbacks_of_structures() -> None:
    def f(x: Tensor, y: Tensor) -> dict[str, Any]:
        return {"product": x * y, "rest": [x.sum(), ndl.argmax(y)], "none": None}

    x, y = Tensor([1.0, 2.0]), Tensor([3.0, 5.0])
    value, pullback = ndl.vjp(f, x, y)
    assert (value["product"].tolist(), value["rest"][1].item()) == ([3.0, 10.0], 1)
    to_x, to_y = pullback({"product": Tensor([1.0, 10.0]), "rest": [None, None], "none": None})
    assert (to_x.tolist(), to_y.tolist()) == ([3.0, 50.0], [1.0, 20.0])
    to_x, to_y = pullback({"product": None, "rest": [Tensor(2.0), None], "none": None})
    assert (to_x.tolist(), to_y.tolist()) == ([2.0, 2.0], [0.0, 0.0])
    value, tangent = ndl.jvp(f, (x, y), (Tensor([1.0, 0.0]), None))
    assert (tangent["product"].tolist(), tangent["rest"][0].item()) == ([3.0, 0.0], 1.0)
    assert tangent["rest"][1] is None
    assert tangent["none"] is None


def model() -> nn.Sequential:
    np.random.seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return ndl.cross_entropy(net(x), y)


INPUT, LABELS = constant(draw(6, 4, dtype="float32")), constant(np.arange(6) % 3)


def test_a_module_is_its_parameters() -> None:
    net, other = model(), model()
    net[0].bias.requires_grad = other[0].bias.requires_grad = False
    value, grads = ndl.value_and_grad(loss)(net, INPUT, LABELS)
    expected = loss(other, INPUT, LABELS)
    expected.backward()
    assert_same_bits(value, expected)
    trained = {name: p for name, p in other.named_parameters() if p.requires_grad}
    assert list(grads) == list(trained)
    for name, parameter in trained.items():
        assert_same_bits(grads[name], parameter.grad)
    assert all(p.grad is None for p in net.parameters())
    assert_same_bits(net[1].running_mean, other[1].running_mean)


def test_hvp_of_a_module() -> None:
    net = model()
    tangents = {name: constant(draw(*p.shape)) for name, p in net.named_parameters()}
    (found,) = ndl.hvp(lambda m: loss(m, INPUT, LABELS), (net,), (tangents,))

    def along(t: float) -> dict[str, Array]:
        moved = model().to("float64")
        for name, p in moved.named_parameters():
            p.data = constant(p.numpy() + t * tangents[name].numpy())
        grads = ndl.grad(loss)(moved, INPUT.to("float64"), LABELS)
        return {name: each.numpy() for name, each in grads.items()}

    for name in ("0.weight", "1.weight", "3.bias"):
        expected = (8 * (along(1e-3)[name] - along(-1e-3)[name])
                    - (along(2e-3)[name] - along(-2e-3)[name])) / 12e-3  # fmt: skip
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-4, atol=1e-5)


# What it leaves alone, and history


def test_gradients_and_modes_stay() -> None:
    x, w = Tensor(X), Tensor(A)
    (x * x).sum().backward()
    before = x.grad
    ndl.grad(lambda a: ((a @ w) * x.sum()).sum())(x)
    assert x.grad is before
    assert w.grad is None

    def fail(a: Tensor) -> Tensor:
        raise KeyError("here")

    with ndl.no_grad(), pytest.raises(KeyError):
        ndl.grad(fail)(x)
    assert MODE.grad
    with ndl.no_grad():
        found = ndl.grad(number)(x)
        assert not MODE.grad
    assert_same_bits(found, ndl.grad(number)(x))
    assert not found.requires_grad


def test_history_is_kept_where_something_outside_needs_it() -> None:
    x, w = constant([1.0, 2.0]), Tensor([3.0, 4.0])
    for y, slope in (
        ndl.value_and_grad(lambda a: (a * a).sum())(x),
        ndl.jvp(lambda a: a * a, (x,), (x,)),
    ):
        assert not y.requires_grad
        assert not slope.requires_grad
    y, slope = ndl.value_and_grad(lambda a: (a * a * w).sum())(x)
    assert y.requires_grad
    (slope * slope).sum().backward()  # 4 x^2 w^2
    assert w.grad is not None
    assert w.grad.tolist() == [24.0, 128.0]


def test_backward_goes_through_grad(torch: ModuleType) -> None:
    """A gradient penalty."""
    w, x = Tensor(A), constant(X)
    slope = ndl.grad(lambda a: ndl.tanh(a @ w).sum())(x)
    (slope * slope).sum().backward()
    v = torch.tensor(A, requires_grad=True)
    inner = torch.func.grad(lambda a: torch.tanh(a @ v).sum())(torch.tensor(X))
    (inner**2).sum().backward()
    near(w.grad, v.grad)


def test_a_loop_without_history_does_not_grow() -> None:
    params = {"w": constant(A), "b": constant(np.zeros(5))}
    x = constant(X)
    live = []
    for _ in range(4):
        value, grads = ndl.value_and_grad(lambda p: ((x @ p["w"] + p["b"]) ** 2).mean())(params)
        params = {name: p - 0.1 * grads[name] for name, p in params.items()}
        live.append(autograd.TENSOR_COUNTER)
    assert not value.requires_grad
    assert live[1] == live[3]


# Modes

CASES: dict[str, Function] = {
    "grad": ndl.grad(number),
    "value_and_grad": ndl.value_and_grad(number),
    "second": ndl.grad(lambda x: (ndl.grad(number)(x) ** 2).sum()),
    "vjp": lambda x: ndl.vjp(network, x)[1](constant(W)),
    "jvp": lambda x: ndl.jvp(network, (x,), (constant(V),)),
    "hvp": lambda x: ndl.hvp(number, (x,), (constant(V),)),
    "hessian": ndl.hessian(lambda x: (ndl.tanh(x @ constant(A)) ** 2).sum()),
}


def bits_of(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


@pytest.mark.parametrize("name", CASES)
def test_same_bits_in_every_mode(name: str) -> None:
    case, x = CASES[name], constant(X)
    expected = [y.numpy() for y in bits_of(case(x))]
    with ndl.lazy():
        lazy = bits_of(case(x))
    with ndl.no_grad():
        quiet = bits_of(case(x))
    jitted = bits_of(ndl.jit(case)(x))
    needing = bits_of(ndl.jit(case)(Tensor(x, requires_grad=True)))
    inside = bits_of(ndl.jit(lambda x: [y * 1.0 for y in bits_of(case(x))])(x))
    for found in (lazy, quiet, jitted, needing, inside):
        for y, z in zip(found, expected, strict=True):
            assert_same_bits(y, z)


@pytest.mark.parametrize(
    "transform", [ndl.grad, lambda f: ndl.grad(lambda x: ndl.grad(f)(x).sum())]
)
def test_grad_of_a_jitted_function(transform: Function) -> None:
    expected = transform(number)(Tensor(X))
    assert_same_bits(transform(ndl.jit(number))(Tensor(X)), expected)
    assert_same_bits(ndl.jit(transform(ndl.jit(number)))(constant(X)), expected)


def test_a_gradient_with_history_of_a_jitted_call_is_differentiated() -> None:
    cube = ndl.jit(lambda x: (x * x * x).sum())
    x = Tensor([1.0, 2.0])
    cube(x).backward()
    slope = x.grad
    assert slope is not None
    (slope * slope).sum().backward()  # of 9 x^4
    assert x.grad is not None
    assert x.grad.tolist() == [36.0, 288.0]


def test_a_jitted_call_reads_no_gradients_from_before() -> None:
    x, unused = Tensor([1.0, 2.0]), Tensor([5.0, 6.0])
    (unused * 3.0).sum().backward()
    found = ndl.jit(lambda a: ((a * a).sum(), ndl.floor(unused)))(x)
    found[0].backward()
    assert x.grad is not None
    assert x.grad.tolist() == [2.0, 4.0]
    assert unused.grad is not None
    assert unused.grad.tolist() == [0.0, 0.0]


def test_a_jitted_training_step_on_a_tree() -> None:
    def step(params: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        value, grads = ndl.value_and_grad(lambda p: ((x @ p["w"] + p["b"]) ** 2).mean())(params)
        return {name: p - 0.1 * grads[name] for name, p in params.items()}, value

    def train(run: Function) -> tuple[dict[str, Tensor], list[float]]:
        params, values = {"w": constant(A), "b": constant(np.ones(5))}, []
        for _ in range(3):
            params, value = run(params, constant(X))
            values.append(value.item())
        return params, values

    eager, jitted = train(step), train(ndl.jit(step))
    assert eager[1] == jitted[1]
    assert eager[1][2] < eager[1][0]
    for name in eager[0]:
        assert_same_bits(eager[0][name], jitted[0][name])


NET: nn.Module


def test_a_module_that_the_inner_function_names_is_watched() -> None:
    global NET
    NET = model()
    run = ndl.jit(ndl.grad(lambda x: NET(x).sum()))
    first = run(INPUT)
    NET = model()
    NET[0].weight.data = NET[0].weight * 2.0
    second = run(INPUT)
    assert_same_bits(second, ndl.grad(lambda x: NET(x).sum())(INPUT))
    assert not np.array_equal(first.numpy(), second.numpy())


def contractions(function: Function, x: Tensor) -> int:
    compiler_before = set(compiler.OFF)
    run = ndl.jit(function)
    run(x)
    assert compiler_before == compiler.OFF
    ((_, [program]),) = run.programs()
    nests = [nest for kernel in program.lowered.schedule.kernels for nest in kernel]
    return sum(isinstance(nest, Contraction) for nest in nests)


def test_jit_computes_only_what_jvp_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    weights = [constant(draw(6, 6, seed=n)) for n in range(4)]

    def chain(x: Tensor) -> Tensor:
        for w in weights:
            x = ndl.tanh(x @ w)
        return x

    x, v = constant(draw(3, 6, seed=7)), constant(draw(3, 6, seed=8))
    assert contractions(chain, x) == 4
    assert contractions(lambda x: ndl.jvp(chain, (x,), (v,)), x) == 8  # x and dx through each


# Errors

X3 = Tensor([1.0, 2.0, 3.0])


def square(x: Tensor) -> Tensor:
    return (x * x).sum()


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: ndl.grad(3), TypeError, "grad: expected a function; received a int"),
    (lambda: ndl.grad(lambda x: x * 2)(X3), ValueError,
     "grad: expected a function that returns one number; received shape (3,); add it up with "
     ".sum(), or use ndl.vjp"),
    (lambda: ndl.value_and_grad(lambda x: 3.0)(X3), TypeError,
     "grad: expected a function that returns one number, a Tensor of floats; received a float"),
    (lambda: ndl.grad(lambda x: ndl.argmax(x))(X3), TypeError,
     "grad: expected a function that returns one number, a Tensor of floats; received int64"),
    (lambda: ndl.grad(square, has_aux=True)(X3), TypeError,
     "grad: expected a function that returns (value, aux); received a Tensor"),
    (lambda: ndl.grad(square)({"n": [Tensor([1, 2], dtype="int64")]}), TypeError,
     "grad: expected argument 0['n'][0] to be Tensors of floats, or Modules; received int64; "
     "convert it with ndl.Tensor or .astype, or leave it out of argnums"),
    (lambda: ndl.grad(square)(2.0), TypeError,
     "grad: expected argument 0 to be Tensors of floats, or Modules; received a float; convert "
     "it with ndl.Tensor or .astype, or leave it out of argnums"),
    (lambda: ndl.grad(square, argnums=1)(X3), ValueError,
     "grad: expected argnums that name arguments, each once; received 1 for 1 arguments by place"),
    (lambda: ndl.grad(square, argnums=(0, -1))(X3), ValueError,
     "grad: expected argnums that name arguments, each once; received (0, -1) for 1 arguments by "
     "place"),
    (lambda: ndl.vjp(lambda x: (x, 2), X3), TypeError,
     "vjp: expected a function that returns Tensors; received a int at y[1]"),
    (lambda: ndl.vjp(lambda x: {"a": x}, X3)[1]([X3]), ValueError,
     "vjp: expected cotangents at cotangent['a']; received cotangent[0]"),
    (lambda: ndl.vjp(lambda x: x, X3)[1](Tensor([1.0])), ValueError,
     "vjp: expected cotangent to be None or a Tensor of shape (3,); received float32 of shape "
     "(1,)"),
    (lambda: ndl.vjp(lambda x: x, X3)[1](1.0), ValueError,
     "vjp: expected cotangent to be None or a Tensor of shape (3,); received a float"),
    (lambda: ndl.vjp(lambda x: ndl.argmax(x), X3)[1](Tensor(1.0)), ValueError,
     "vjp: expected cotangent to be None, as of int64; received float32 of shape ()"),
    (lambda: ndl.jvp(square, X3, X3), TypeError,
     "jvp: expected tuples of primals and of tangents; received a Tensor and a Tensor; write "
     "(x,), (v,)"),
    (lambda: ndl.hvp(square, (X3,), (X3, X3)), ValueError,
     "hvp: expected tangents at tangent[0]; received tangent[0], tangent[1]"),
    (lambda: ndl.vjp(X3, X3), TypeError,
     "vjp: expected a function of Tensors; received a Tensor"),
    (lambda: ndl.hessian(square)([X3]), TypeError,
     "hessian: expected a Tensor; received a list"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "kind", "message"), ERRORS, ids=[e[2][:60] for e in ERRORS])
def test_errors(run: Callable[[], Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        run()
    assert str(caught.value) == message
