"""autocast and GradScaler: dtypes op by op beside PyTorch's, gradients, the same bits in every
mode, whole models; and what a step that found an infinity leaves behind."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import LAZY_MODES, assert_close, assert_same_bits, draw

import needle as ndl
from needle import nn, ops, optim
from needle.autograd import MODE, Tensor, TensorOp
from needle.nn import functional as F

Array = np.ndarray
each_dtype = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


def tensor(*shape: int, seed: int = 0, dtype: str = "float32") -> Tensor:
    return Tensor(draw(*shape, seed=seed), dtype=dtype)


def data(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(draw(*shape, seed=seed, dtype="float32"), requires_grad=False)


def labels(n: int, classes: int) -> Tensor:
    return Tensor(np.arange(n) % classes, dtype="int64", requires_grad=False)


def network(seed: int = 0) -> nn.Sequential:
    np.random.seed(seed)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm1d(8), nn.Linear(8, 3)
    )


# The lists. (needle's function, PyTorch's) of x, of a square matrix w, and of classes y

OPS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "linear": (
        lambda x, w, y: F.linear(x, w, w[0].detach()),
        lambda t, x, w, y: t.nn.functional.linear(x, w, w.select(0, 0)),
    ),
    "matmul": (lambda x, w, y: x @ w, lambda t, x, w, y: x @ w),
    "matmul of a vector": (lambda x, w, y: x[0] @ w, lambda t, x, w, y: x.select(0, 0) @ w),
    "batched matmul": (
        lambda x, w, y: x.reshape((2, 2, 4)) @ w,
        lambda t, x, w, y: x.reshape(2, 2, 4) @ w,
    ),
    "einsum": (
        lambda x, w, y: ops.einsum("ij,jk->ik", x, w),
        lambda t, x, w, y: t.einsum("ij,jk->ik", x, w),
    ),
    "exp": (lambda x, w, y: x.exp(), lambda t, x, w, y: x.exp()),
    "expm1": (lambda x, w, y: ops.expm1(x), lambda t, x, w, y: x.expm1()),
    "log": (lambda x, w, y: x.log(), lambda t, x, w, y: x.log()),
    "log1p": (lambda x, w, y: ops.log1p(x), lambda t, x, w, y: x.log1p()),
    "rsqrt": (lambda x, w, y: ops.rsqrt(x), lambda t, x, w, y: x.rsqrt()),
    "power": (lambda x, w, y: x**w, lambda t, x, w, y: x**w),
    "power of a vector": (lambda x, w, y: x ** w[0], lambda t, x, w, y: x ** w.select(0, 0)),
    "power scalar": (lambda x, w, y: x**3, lambda t, x, w, y: x**3),
    "square": (lambda x, w, y: ops.square(x), lambda t, x, w, y: x.square()),
    "softplus": (lambda x, w, y: ops.softplus(x), lambda t, x, w, y: t.nn.functional.softplus(x)),
    "sum": (lambda x, w, y: x.sum(), lambda t, x, w, y: x.sum()),
    "prod": (lambda x, w, y: x.prod(), lambda t, x, w, y: x.prod()),
    "cumsum": (lambda x, w, y: x.cumsum(0), lambda t, x, w, y: x.cumsum(0)),
    "norm": (lambda x, w, y: ops.norm(x), lambda t, x, w, y: t.linalg.vector_norm(x)),
    "logsumexp": (lambda x, w, y: ops.logsumexp(x), lambda t, x, w, y: x.logsumexp((0, 1))),
    "softmax": (lambda x, w, y: ops.softmax(x), lambda t, x, w, y: x.softmax(-1)),
    "log_softmax": (lambda x, w, y: ops.log_softmax(x), lambda t, x, w, y: x.log_softmax(-1)),
    "layer_norm": (
        lambda x, w, y: F.layer_norm(x, 4),
        lambda t, x, w, y: t.nn.functional.layer_norm(x, (4,)),
    ),
    "rms_norm": (
        lambda x, w, y: F.rms_norm(x, 4),
        lambda t, x, w, y: t.nn.functional.rms_norm(x, (4,)),
    ),
    "group_norm": (
        lambda x, w, y: F.group_norm(x, 2),
        lambda t, x, w, y: t.nn.functional.group_norm(x, 2),
    ),
    "cross_entropy": (
        lambda x, w, y: F.cross_entropy(x, y),
        lambda t, x, w, y: t.nn.functional.cross_entropy(x, y),
    ),
    "nll_loss": (
        lambda x, w, y: F.nll_loss(x, y),
        lambda t, x, w, y: t.nn.functional.nll_loss(x, y),
    ),
    **{
        name: (
            lambda x, w, y, name=name: getattr(F, name)(x, w),
            lambda t, x, w, y, name=name: getattr(t.nn.functional, name)(x, w),
        )
        for name in ("mse_loss", "l1_loss", "huber_loss")
    },
    "bce_with_logits": (
        lambda x, w, y: F.bce_with_logits(x, w),
        lambda t, x, w, y: t.nn.functional.binary_cross_entropy_with_logits(x, w),
    ),
    "kl_div": (
        lambda x, w, y: F.kl_div(x, w, "sum"),
        lambda t, x, w, y: t.nn.functional.kl_div(x, w, reduction="sum"),
    ),
    "add": (lambda x, w, y: x + w, lambda t, x, w, y: x + w),
    "subtract": (lambda x, w, y: x - w, lambda t, x, w, y: x - w),
    "multiply": (lambda x, w, y: x * w, lambda t, x, w, y: x * w),
    "multiply scalar": (lambda x, w, y: x * 2.5, lambda t, x, w, y: x * 2.5),
    "divide": (lambda x, w, y: x / w, lambda t, x, w, y: x / w),
    "maximum": (lambda x, w, y: ops.maximum(x, w), lambda t, x, w, y: t.maximum(x, w)),
    "where": (lambda x, w, y: ops.where(x > 0, x, w), lambda t, x, w, y: t.where(x > 0, x, w)),
    "less": (lambda x, w, y: x < w, lambda t, x, w, y: x < w),
    "concatenate": (lambda x, w, y: ops.concatenate([x, w]), lambda t, x, w, y: t.cat([x, w])),
    "stack": (lambda x, w, y: ops.stack([x, w]), lambda t, x, w, y: t.stack([x, w])),
    "max": (lambda x, w, y: x.max(0), lambda t, x, w, y: x.amax(0)),
    "sqrt": (lambda x, w, y: x.sqrt(), lambda t, x, w, y: x.sqrt()),
    "sin": (lambda x, w, y: ops.sin(x), lambda t, x, w, y: x.sin()),
    "tanh": (lambda x, w, y: x.tanh(), lambda t, x, w, y: x.tanh()),
    "erf": (lambda x, w, y: ops.erf(x), lambda t, x, w, y: x.erf()),
    "relu": (lambda x, w, y: x.relu(), lambda t, x, w, y: x.relu()),
    "gelu": (lambda x, w, y: ops.gelu(x), lambda t, x, w, y: t.nn.functional.gelu(x)),
    "sigmoid": (lambda x, w, y: ops.sigmoid(x), lambda t, x, w, y: x.sigmoid()),
    "silu": (lambda x, w, y: ops.silu(x), lambda t, x, w, y: t.nn.functional.silu(x)),
    "elu": (lambda x, w, y: ops.elu(x), lambda t, x, w, y: t.nn.functional.elu(x)),
    "transpose": (lambda x, w, y: x.transpose(), lambda t, x, w, y: x.transpose(0, 1)),
    "gather": (lambda x, w, y: ops.take(x, y), lambda t, x, w, y: x.index_select(0, y)),
}
# PyTorch's kernels add in float32 here, and round the result. Its tensordot, alone among the
# contractions, runs in the widest dtype; ours is a matmul like the others.
TENSORDOT = lambda x, w, y: ops.tensordot(x, w, 1), lambda t, x, w, y: t.tensordot(x, w, 1)
WIDER: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "mean": (lambda x, w, y: x.mean(), lambda t, x, w, y: x.mean()),
    "var": (lambda x, w, y: x.var(), lambda t, x, w, y: x.var()),
    "std": (lambda x, w, y: x.std(), lambda t, x, w, y: x.std()),
    "batch_norm": (
        lambda x, w, y: F.batch_norm(x),
        lambda t, x, w, y: t.nn.functional.batch_norm(x, None, None, training=True),
    ),
}


def dtypes_of_torch(torch: Any, function: Callable[..., Any], low: str, kinds: list[str]) -> str:
    """The result's dtype on PyTorch's GPUs, of which there need be none."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    try:
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", getattr(torch, low))
        with FakeTensorMode():
            x, w = (torch.empty(4, 4, device="cuda", dtype=getattr(torch, kind)) for kind in kinds)
            y = torch.empty(4, device="cuda", dtype=torch.int64)
            return str(function(torch, x, w, y).dtype).removeprefix("torch.")
    finally:
        torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("kinds", [("low", "low"), ("low", "float32"), ("float32", "float32")])
@pytest.mark.parametrize("name", [*OPS, *WIDER, "tensordot"])
@each_dtype
def test_results_have_the_dtypes_of_torch(
    torch: Any, name: str, kinds: tuple[str, str], dtype: str
) -> None:
    ours, theirs = {**OPS, **WIDER, "tensordot": TENSORDOT}[name]
    given = [dtype if kind == "low" else kind for kind in kinds]
    expected = dtypes_of_torch(torch, theirs, dtype, given)
    if name in WIDER and kinds[0] == "low":
        assert expected == dtype
        expected = "float32"
    if name == "tensordot" and "float32" in kinds:
        assert expected == "float32"
        expected = dtype
    x, w = (Tensor(np.full((4, 4), 0.5), dtype=kind) for kind in given)
    with ndl.autocast(dtype):
        assert str(ours(x, w, labels(4, 4)).dtype) == expected


def test_a_small_network_against_torch(torch: Any) -> None:
    x, w1, b1, w2, b2 = (draw(*s, seed=i, dtype="float32") for i, s in enumerate(
        [(32, 24), (24, 48), (48,), (48, 10), (10,)]))  # fmt: skip
    y = np.arange(32) % 10
    own = [Tensor(each) for each in (w1, b1, w2, b2)]
    with ndl.autocast():
        logits = F.linear(F.relu(F.linear(Tensor(x), *own[:2])), *own[2:])
        loss = F.cross_entropy(logits, Tensor(y))
    loss.backward()
    theirs = [torch.tensor(each, requires_grad=True) for each in (w1, b1, w2, b2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = torch.relu(torch.tensor(x) @ theirs[0] + theirs[1].bfloat16())
        expected = hidden @ theirs[2] + theirs[3].bfloat16()
        expected_loss = torch.nn.functional.cross_entropy(expected, torch.tensor(y))
    expected_loss.backward()
    assert (logits.dtype, str(expected.dtype)) == (ndl.bfloat16, "torch.bfloat16")
    # A few roundings to bfloat16 are between them.
    assert_close(logits, expected.float().detach().numpy(), length=2, factor=4)
    assert_close(loss, expected_loss.detach().numpy(), ndl.bfloat16)
    for p, q in zip(own, theirs, strict=True):
        assert p.grad is not None
        assert (p.grad.dtype, str(q.grad.dtype)) == (ndl.float32, "torch.float32")
        assert_close(p.grad, q.grad.numpy(), ndl.bfloat16, length=2, factor=4)


# What an op is given


@each_dtype
def test_a_contraction_is_that_of_rounded_operands(dtype: str) -> None:
    x, w = tensor(5, 300), tensor(300, 7, seed=1)
    with ndl.autocast(dtype):
        y = x @ w
    assert_same_bits(y, x.astype(dtype) @ w.astype(dtype))
    y.backward()
    low = [Tensor(each.numpy(), dtype=dtype) for each in (x, w)]
    (low[0] @ low[1]).backward()
    for master, rounded in zip((x, w), low, strict=True):
        assert master.grad is not None
        assert rounded.grad is not None
        assert_same_bits(master.grad, rounded.grad.astype("float32"))


def test_float32_is_where_sums_and_exponentials_are_taken() -> None:
    x = tensor(3, 40, dtype="bfloat16")
    wide = x.astype("float32")
    with ndl.autocast():
        found = [ops.softmax(x), x.sum(1), ops.norm(x), x.prod(0), x**2, F.layer_norm(x, 40)]
    expected = [
        ops.softmax(wide), wide.sum(1), ops.norm(wide), wide.prod(0), wide**2,
        F.layer_norm(wide, 40),
    ]  # fmt: skip
    for y, z in zip(found, expected, strict=True):
        assert_same_bits(y, z)


def test_what_ran_before_the_block_runs_otherwise_in_it() -> None:
    x = tensor(3, 3, dtype="bfloat16")
    functions = Tensor.exp, Tensor.sum, ops.softmax, lambda x: x**2, lambda x: x**x
    assert [function(x).dtype for function in functions] == [ndl.bfloat16] * 5
    with ndl.autocast():
        assert [function(x).dtype for function in functions] == [ndl.float32] * 5
    assert [function(x).dtype for function in functions] == [ndl.bfloat16] * 5


def test_targets_keep_their_precision() -> None:
    x, target = tensor(4, 5, dtype="bfloat16"), data(4, 5, seed=1)
    weight = Tensor(draw(5, seed=2, dtype="float32") ** 2)
    with ndl.autocast():
        losses = F.mse_loss(x, target), F.cross_entropy(x, labels(4, 5), weight)
    wide = x.astype("float32")
    assert_same_bits(losses[0], F.mse_loss(wide, target))
    assert_same_bits(losses[1], F.cross_entropy(wide, labels(4, 5), weight))
    assert F.mse_loss(x, target).dtype == ndl.bfloat16


def test_float64_and_integers_are_left_alone() -> None:
    x, n = tensor(3, 3, dtype="float64"), Tensor(np.arange(9).reshape(3, 3))
    single = tensor(3, 3)
    with ndl.autocast():
        assert (x @ x).dtype == F.linear(x, x, x[0]).dtype == x.exp().dtype == ndl.float64
        assert_same_bits(x @ single, x @ single.astype("float64"))
        assert_same_bits(ops.einsum("ij,jk", x, single), x @ single.astype("float64"))
        assert_same_bits(n @ n, n.numpy() @ n.numpy())
        assert (n @ n).dtype == n.sum().dtype == ndl.int64
        assert (n @ single).dtype == ndl.float64


def test_a_users_own_op_and_arrays_are_left_alone() -> None:
    class Double(TensorOp):
        def compute(self, x: Array) -> Array:
            return x * 2

        def gradient(self, out_grad: Tensor, node: Any) -> Tensor:
            return out_grad * 2

    x = tensor(2, 2)
    with ndl.autocast():
        assert Double()(x).dtype == ndl.float32
        assert (x.cached_data @ x.cached_data).dtype == ndl.float32


def test_running_statistics_keep_their_dtype() -> None:
    norm = nn.BatchNorm1d(4, dtype="bfloat16")
    with ndl.autocast():
        assert norm(tensor(8, 4, dtype="bfloat16")).dtype == ndl.float32
    assert norm.running_var.dtype == ndl.bfloat16


def test_a_weight_that_is_used_twice_adds_its_gradients_in_float32() -> None:
    x, w = data(6, 6), tensor(6, 6, seed=1)
    with ndl.autocast():
        first = x @ w
        second = first @ w
    second.backward()
    both = w.grad
    parts = []
    for place in (0, 1):
        uses = [w.detach(), w.detach()]
        uses[place] = Tensor(w)
        with ndl.autocast():
            (x @ uses[0] @ uses[1]).backward()
        parts.append(uses[place].grad)
    assert both is not None
    assert parts[0] is not None
    assert_same_bits(both, parts[0] + parts[1])


# Where it holds


def kind_of_product() -> str:
    x = tensor(2, 2)
    return str((x @ x).dtype)


def test_blocks_nest_and_end() -> None:
    assert kind_of_product() == "float32"
    with ndl.autocast():
        assert kind_of_product() == "bfloat16"
        with ndl.autocast(enabled=False):
            assert kind_of_product() == "float32"
            with ndl.autocast(ndl.float16):
                assert kind_of_product() == "float16"
        assert kind_of_product() == "bfloat16"
        with pytest.raises(KeyError), ndl.autocast("float16"):
            raise KeyError
        assert kind_of_product() == "bfloat16"
    assert kind_of_product() == "float32"


def test_a_decorator_holds_for_every_call() -> None:
    @ndl.autocast(ndl.float16)
    def product() -> str:
        return kind_of_product()

    assert [product(), kind_of_product(), product()] == ["float16", "float32", "float16"]


def test_other_threads_are_not_concerned() -> None:
    found: list[str] = []
    with ndl.autocast():
        thread = threading.Thread(target=lambda: found.append(kind_of_product()))
        thread.start()
        thread.join()
    assert found == ["float32"]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int8"])
def test_other_dtypes_are_refused(dtype: str) -> None:
    message = f"autocast: expected bfloat16 or float16; received {dtype}"
    with pytest.raises(TypeError, match=message):
        ndl.autocast(dtype)


def test_backward_is_the_same_inside_and_outside_of_the_block() -> None:
    grads = []
    for inside in (True, False):
        model = network()
        with ndl.autocast():
            loss = F.cross_entropy(model(data(9, 6)), labels(9, 3))
            if inside:
                loss.backward()
                assert kind_of_product() == "bfloat16"
        if not inside:
            loss.backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        assert a is not None
        assert a.dtype == ndl.float32
        assert_same_bits(a, b)


def test_the_optimizer_is_never_autocast() -> None:
    class Rotated(optim.Optimizer):
        def update(self, group: Any) -> Any:
            return lambda p, grad, lr: (p - grad @ grad,), (group.rate,), ()

    results = []
    for enabled in (True, False):
        w = tensor(4, 4)
        (w * w).sum().backward()
        with ndl.autocast(enabled=enabled):
            Rotated([w]).step()
        results.append(w)
    assert_same_bits(*results)


# Modes


def outcome(model: nn.Module, loss: Tensor) -> list[Array]:
    loss.backward()
    grads: list[Any] = [p.grad for p in model.parameters()]
    return [each.numpy() for each in (loss, *grads, *model.buffers())]


@pytest.mark.parametrize("mode", LAZY_MODES)
@each_dtype
def test_lazy_has_the_bits_of_eager(mode: str, dtype: str) -> None:
    found = []
    for switch in (LAZY_MODES[mode], ndl.enable_grad):
        model = network()
        with switch(), ndl.autocast(dtype):
            y = model(data(9, 6)) ** Tensor(np.array([1.0, 2.0, 3.0]), dtype=dtype)
            found.append(outcome(model, F.cross_entropy(y, labels(9, 3))))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("place", ["inside", "outside", "decorator"])
@each_dtype
def test_a_jitted_call_under_autograd_has_the_bits_of_eager(place: str, dtype: str) -> None:
    found = []
    for jit in (True, False):
        model = network()

        def forward(x: Tensor, model: nn.Module = model) -> Tensor:
            with ndl.autocast(dtype, enabled=place == "inside" or MODE.autocast is not None):
                return model(x)

        wrapped = ndl.autocast(dtype)(forward) if place == "decorator" else forward
        call = ndl.jit(wrapped) if jit else wrapped
        with ndl.autocast(dtype, enabled=place == "outside"):
            y = call(data(9, 6))
        assert y.dtype == dtype
        found.append(outcome(model, F.cross_entropy(y, labels(9, 3))))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)


def test_variants_say_that_autocast_changed() -> None:
    product = ndl.jit(lambda x: x @ x)
    kinds = []
    for dtype in (None, "bfloat16", "float16", "bfloat16", None):
        with ndl.autocast(dtype or "float16", enabled=dtype is not None):
            kinds.append(str(product(data(2, 2)).dtype))
    assert kinds == ["float32", "bfloat16", "float16", "bfloat16", "float32"]
    changes = ["autocast: off -> bfloat16", "autocast: bfloat16 -> float16"]
    assert product.variants() == ["first call", *changes]


def test_a_decorated_function_is_watched_through_its_wrapper() -> None:
    model = nn.Linear(2, 2)
    call = ndl.jit(ndl.autocast()(lambda x: model(x)))
    call(data(3, 2))
    model = nn.Linear(2, 2)
    found = call(data(3, 2))
    with ndl.autocast():
        assert_same_bits(found, model(data(3, 2)))


# Whole models


def workloads() -> Any:
    """The models that benchmarks/needle_steps.py times."""
    path = Path(__file__).resolve().parent.parent / "benchmarks" / "needle_steps.py"
    spec = importlib.util.spec_from_file_location("needle_steps", path)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def make_resnet(found: Any) -> tuple[nn.Module, optim.Optimizer, tuple[Tensor, Tensor]]:
    blocks = [found.residual_block(16) for _ in range(2)]
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), *blocks, nn.Linear(16, 4))
    optimizer = optim.Adam(model.parameters(), 1e-2, weight_decay=1e-3)
    return model, optimizer, (found.floats(24, 12), found.labels(4, 24))


def make_gpt(found: Any) -> tuple[nn.Module, optim.Optimizer, tuple[Tensor, Tensor]]:
    model = found.GPT(11, 6, 16, 2, 2)
    optimizer = optim.AdamW(model.parameters(), 1e-2)
    return model, optimizer, (found.labels(11, 4, 6), found.labels(11, 24))


def train(make: Any, dtype: str | None, jit: bool, steps: int) -> tuple[list[float], list[Array]]:
    """The losses, and all that is left: parameters, buffers, the optimizer's and scaler's state."""
    np.random.seed(0)
    ndl.seed(3)
    model, optimizer, (x, y) = make(workloads())
    # So large that the first steps are left out.
    scaler = optim.GradScaler(2.0**18, growth_interval=5) if dtype == "float16" else None

    def step(x: Tensor, y: Tensor) -> Tensor:
        with ndl.autocast(dtype or "bfloat16", enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            optimizer.clip_grad_norm(1.0)
            scaler.step(optimizer)
            scaler.update()
        optimizer.reset_grad()
        return loss.detach()

    run = ndl.jit(step) if jit else step
    losses = [run(x, y).item() for _ in range(steps)]
    assert not jit or run.variants() == ["first call"]
    tensors = [*model.state_dict().values(), *optimizer.state_dict()["state"].values()]
    assert {p.dtype for p in model.parameters()} == {ndl.float32}
    left = [] if scaler is None else [np.array([*scaler.state_dict().values()])]
    return losses, [each.numpy() for each in tensors] + left


@pytest.mark.parametrize("make", [make_resnet, make_gpt])
@each_dtype
def test_a_model_learns_as_in_float32_with_the_same_bits_in_jit(make: Any, dtype: str) -> None:
    steps = 25
    losses, left = train(make, dtype, False, steps)
    compiled, other = train(make, dtype, True, steps)
    assert losses == compiled
    for a, b in zip(left, other, strict=True):
        assert_same_bits(a, b)
    single, _ = train(make, None, True, steps)
    assert losses[-1] < losses[0] / 2
    assert abs(losses[-1] - single[-1]) < 0.1 * single[0]


# Loss scaling


def overflowing(scaler: optim.GradScaler, parameter: Tensor, grad: float) -> None:
    parameter.grad = Tensor(np.full(parameter.shape, grad), dtype="float32", requires_grad=False)


def test_a_scaled_step_is_an_unscaled_one() -> None:
    found = []
    for scaled in (True, False):
        model = network()
        optimizer = optim.Adam(model.parameters(), 0.1)
        scaler = optim.GradScaler()
        loss = F.cross_entropy(model(data(9, 6)), labels(9, 3))
        if scaled:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        else:
            loss.backward()
            optimizer.step()
        found.append(model)
    for a, b in zip(*(each.parameters() for each in found), strict=True):
        assert_same_bits(a, b)  # scaling by powers of 2 is exact


def test_scaling_saves_small_gradients() -> None:
    grads = []
    for scaler in (optim.GradScaler(), optim.GradScaler(1.0)):
        w = Tensor(np.full((2, 2), 0.5), dtype="float32")
        with ndl.autocast("float16"):
            loss = ((data(3, 2) @ w) * 1e-9).mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optim.SGD([w]))
        assert w.grad is not None
        grads.append(w.grad.numpy())
    assert (grads[1] == 0).all()  # below 6e-8, float16's smallest
    expected = np.repeat(data(3, 2).numpy().sum(0)[:, None], 2, 1) * 1e-9 / 6
    np.testing.assert_allclose(grads[0], expected, rtol=1e-2)


BAD = [np.inf, -np.inf, np.nan]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("kind", ["SGD", "Adam", "Adafactor", "Lion"])
@pytest.mark.parametrize("jit", [False, True])
def test_a_step_with_an_infinity_changes_nothing(bad: float, kind: str, jit: bool) -> None:
    options = {"momentum": 0.9} if kind == "SGD" else {}
    first, second = tensor(3, 4), tensor(5, seed=1)
    optimizer = getattr(optim, kind)([first, second], lr=0.1, **options)
    scaler = optim.GradScaler(8.0)

    def step(g: Tensor) -> None:
        first.grad, second.grad = Tensor(np.ones((3, 4)), dtype="float32"), g
        scaler.step(optimizer)
        scaler.update()

    run = ndl.jit(step) if jit else step
    grad = np.ones(5, np.float32)
    run(Tensor(grad, requires_grad=False))
    state = {key: x.numpy() for key, x in optimizer.state_dict()["state"].items()}
    before = [x.numpy().copy() for x in (first, second)]
    grad[3] = bad
    run(Tensor(grad, requires_grad=False))
    for x, old in zip((first, second), before, strict=True):
        assert_same_bits(x, old)
    for key, x in optimizer.state_dict()["state"].items():
        assert_same_bits(x, state[key])
    assert (scaler.get_scale(), optimizer.t.item()) == (4.0, 1.0)
    run(Tensor(np.ones(5), dtype="float32", requires_grad=False))
    assert (scaler.get_scale(), optimizer.t.item()) == (4.0, 2.0)
    assert (first.numpy() != before[0]).all()


def test_the_scale_moves_as_torchs(torch: Any) -> None:
    options = {"init_scale": 2.0**120, "growth_interval": 2, "growth_factor": 4.0}
    ours, theirs = optim.GradScaler(**options), torch.amp.GradScaler("cpu", **options)
    w, v = Tensor(np.ones(2), dtype="float32"), torch.ones(2, requires_grad=True)
    mine, other = optim.SGD([w], 0.0), torch.optim.SGD([v], 0.0)
    theirs.scale(v.sum())  # where its scale begins
    scales = []
    for bad in "0000100101000000110100000000":
        grad = np.array([1.0, np.inf if bad == "1" else 2.0], np.float32)
        w.grad, v.grad = Tensor(grad, requires_grad=False), torch.tensor(grad)
        for scaler, optimizer in ((ours, mine), (theirs, other)):
            scaler.step(optimizer)
            scaler.update()
        scales.append(ours.get_scale())
        assert scales[-1] == theirs.get_scale()
        assert ours.state_dict()["_growth_tracker"] == theirs.state_dict()["_growth_tracker"]
    assert max(scales) == 2.0**127  # the next would be float32's infinity
    assert set(ours.state_dict()) == set(theirs.state_dict())


def test_a_state_comes_back() -> None:
    scaler = optim.GradScaler(3.0, growth_interval=2)
    w = tensor(2)
    optimizer = optim.SGD([w])

    def step(scaler: optim.GradScaler) -> float:
        w.grad = Tensor(np.ones(2), dtype="float32")
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale()

    assert step(scaler) == 3.0
    other = optim.GradScaler()
    other.load_state_dict(scaler.state_dict())
    assert [step(scaler), step(other)] == [6.0, 6.0]
    assert scaler.state_dict() == other.state_dict()
    before = other.state_dict()
    for state, message in (
        ({**before, "scale": 0.0}, "load_state_dict: expected scale to be a number above 0"),
        ({**before, "growth_interval": 1.5}, "expected growth_interval to be an integer of at"),
        ({"scale": 1.0}, "expected a state like its own; received growth_factor: nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert other.state_dict() == before


def test_two_optimizers_share_a_scale_and_not_a_fate() -> None:
    good, bad = tensor(2), tensor(2, seed=1)
    before = bad.numpy().copy(), good.numpy().copy()
    optimizers = optim.SGD([good], 0.1), optim.SGD([bad], 0.1)
    scaler = optim.GradScaler(4.0)
    good.grad = Tensor(np.ones(2), dtype="float32")
    bad.grad = Tensor(np.array([1.0, np.nan]), dtype="float32")
    for optimizer in optimizers:
        scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0
    assert_same_bits(bad, before[0])
    assert (good.numpy() != before[1]).all()


def test_a_state_that_a_bad_step_begins_is_zeros() -> None:
    class Momentum(optim.Optimizer):  # as the course writes it
        def __init__(self, params: Any, lr: float) -> None:
            super().__init__(params, lr)
            self.u: dict[Tensor, Tensor] = {}

        def step(self) -> None:
            for p in self.params:
                assert p.grad is not None
                self.u[p] = 0.9 * self.u.get(p, 0) + p.grad.detach()
                p.data = p.data - self.u[p] * self.lr

    w = tensor(2)
    before = w.numpy().copy()
    optimizer, scaler = Momentum([w], 0.1), optim.GradScaler(1.0)
    for grad in ([np.inf, 1.0], [1.0, 1.0]):
        w.grad = Tensor(np.array(grad), dtype="float32", requires_grad=False)
        scaler.step(optimizer)
        assert_same_bits(optimizer.u[w], np.zeros(2, np.float32) if grad[0] > 1 else w.grad)
        scaler.update()
    np.testing.assert_allclose(w.numpy(), before - 0.2, rtol=1e-6)  # unscaled by 1/2 then


def test_update_may_stand_outside_of_the_jitted_function() -> None:
    w = tensor(2)
    optimizer, scaler = optim.SGD([w], 0.1), optim.GradScaler(4.0, growth_interval=2)

    @ndl.jit
    def step(x: Tensor) -> None:
        scaler.scale((x * w).sum()).backward()
        scaler.step(optimizer)

    for expected in (4.0, 8.0, 8.0, 16.0):
        step(data(2))
        scaler.update()
        assert scaler.get_scale() == expected
    assert step.variants() == ["first call"]


scaler_of_module = optim.GradScaler(2.0)


def test_another_scaler_in_a_global_variable_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    scale = ndl.jit(lambda x: scaler_of_module.scale(x))
    assert scale(Tensor(3.0)).item() == 6.0
    monkeypatch.setitem(globals(), "scaler_of_module", optim.GradScaler(8.0))
    assert scale(Tensor(3.0)).item() == 24.0
    assert scale.variants()[1] == "scaler_of_module: replaced"


def test_another_scaler_in_an_enclosing_variable_is_noticed() -> None:
    scaler = optim.GradScaler(2.0)
    scale = ndl.jit(lambda x: scaler.scale(x))
    assert scale(Tensor(3.0)).item() == 6.0
    scaler = optim.GradScaler(8.0)
    assert scale(Tensor(3.0)).item() == 24.0


def test_a_scaler_may_be_an_argument() -> None:
    scale = ndl.jit(lambda scaler, x: scaler.scale(x))
    for value in (2.0, 8.0):
        assert scale(optim.GradScaler(value), Tensor(3.0)).item() == 3 * value


def test_calls_in_another_order_are_refused() -> None:
    w = tensor(2)
    optimizer, scaler = optim.SGD([w]), optim.GradScaler()
    with pytest.raises(RuntimeError, match="update: expected step.. before it .*; received none"):
        scaler.update()
    with pytest.raises(ValueError, match="unscale_: no parameter has a gradient"):
        scaler.unscale_(optimizer)
    w.grad = Tensor(np.ones(2), dtype="float32")
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="unscale_: expected one call per optimizer and step"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="step: expected one call .*; received another; call up"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="unscale_: expected one call"):
        scaler.unscale_(optimizer)
    scaler.update()
    scaler.step(optimizer)


def test_low_precision_losses_and_parameters() -> None:
    scaler = optim.GradScaler()
    assert scaler.scale(Tensor(1.0, dtype="float16")).item() == 2.0**16  # beyond float16
    assert scaler.scale(Tensor(1.0, dtype="float64")).dtype == ndl.float64
    w = tensor(2, dtype="float16")
    w.grad = Tensor(np.ones(2), dtype="float16")
    with pytest.raises(TypeError, match="unscale_: expected float32 gradients; received float16"):
        scaler.unscale_(optim.SGD([w]))
    v = tensor(2, dtype="bfloat16")
    v.grad = Tensor(np.array([np.inf, 1.0]), dtype="bfloat16")
    before = v.numpy().copy()
    scaler.step(optim.SGD([v]))
    assert_same_bits(v, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [("init_scale", 0.0), ("growth_factor", 1.0), ("backoff_factor", 1.0), ("growth_interval", 0)],
)
def test_numbers_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"GradScaler: expected {name} to be .*; received {value}"):
        optim.GradScaler(**{name: value})
