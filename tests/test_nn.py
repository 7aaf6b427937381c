"""needle.nn: what a Module holds, and layers against PyTorch, NumPy and finite differences."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checks import agree, assert_gradient, assert_second_order, draw

import needle as ndl
from needle import nn
from needle.nn import functional, nn_basic
from needle.nn.module import running_path

DTYPES = ["float64", "float32"]


def count_from(start: int, *shape: int) -> ndl.Tensor:
    return ndl.Tensor(np.arange(start, start + math.prod(shape), dtype=np.float32).reshape(shape))


class Block(nn.Module):
    """Parameters and modules in every kind of place."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(count_from(0, 2))
        self.layers = [nn.Linear(2, 3), {"inner": (nn.Linear(3, 2), nn.ReLU())}]
        self.table = {"a": nn.Parameter(count_from(5, 1)), 7: nn.Tanh()}
        self.offset = ndl.Tensor([1.0, 2.0])
        self.note = "not a tensor"

    def forward(self, x: ndl.Tensor) -> ndl.Tensor:
        first, rest = self.layers
        return rest["inner"][0](first(x * self.scale)) + self.offset


# What a module holds


def test_parameter_shares_memory_and_keeps_dtype_and_device() -> None:
    x = ndl.Tensor(np.ones(3), device=ndl.cpu_numpy(), requires_grad=False)
    p = nn.Parameter(x)
    assert p.numpy() is x.numpy()
    assert p.requires_grad
    assert p.dtype == "float64"
    assert p.device == ndl.cpu_numpy()
    assert nn.Parameter((p * 2).sum()).is_leaf()
    assert not nn.Parameter(ndl.Tensor(np.arange(3))).requires_grad


def test_walk_finds_all_in_the_order_of_attributes() -> None:
    block = Block()
    assert [name for name, _ in block.named_parameters()] == [
        "scale",
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.inner.0.weight",
        "layers.1.inner.0.bias",
        "table.a",
    ]
    assert [name for name, _ in block.named_buffers()] == ["offset"]
    assert block.buffers() == [block.offset]
    assert isinstance(block.parameters(), list)
    assert all(isinstance(p, nn.Parameter) for p in block.parameters())
    modules = ["", "layers.0", "layers.1.inner.0", "layers.1.inner.1", "table.7"]
    assert [name for name, _ in block.named_modules()] == modules
    assert [name for name, _ in block.named_children()] == modules[1:]
    assert block.modules() == [block, *block.children()]


def test_children_are_direct_and_modules_are_all() -> None:
    model = nn.Sequential(nn.Residual(nn.Linear(2, 2)), nn.ReLU())
    assert [name for name, _ in model.named_children()] == ["0", "1"]
    assert [name for name, _ in model.named_modules()] == ["", "0", "0.fn", "1"]


def test_shared_parameters_and_modules_count_once() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    tied = nn.Linear(3, 3, bias=False)
    tied.weight = layer.weight
    model.tied = tied
    assert model.parameters() == [layer.weight, layer.bias]
    assert list(model.state_dict()) == ["0.weight", "0.bias"]
    assert model.modules().count(layer) == 1
    twin = copy.deepcopy(model)
    assert twin.tied.weight is twin.layers[0].weight
    assert twin.tied.weight is not layer.weight


def test_cycles_end() -> None:
    parent, child = nn.Residual(nn.Identity()), nn.Linear(2, 2)
    parent.fn, child.parent = child, parent
    ring: list[Any] = [child]
    ring.append(ring)
    parent.ring = ring
    assert parent.modules() == [parent, child]
    assert parent.parameters() == [child.weight, child.bias]
    assert "Linear" in repr(parent)
    parent.eval()
    assert not child.training


def test_a_subclass_may_forget_to_call_init() -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            self.layer = nn.Linear(2, 2)

        def forward(self, x: ndl.Tensor) -> ndl.Tensor:
            return self.layer(x)

    module = Forgetful()
    assert module.training
    assert len(module.parameters()) == 2
    assert module(ndl.ones(1, 2)).shape == (1, 2)
    module.register_forward_hook(lambda *_: None)
    assert not module.eval().training


def test_attributes_may_have_the_names_of_methods() -> None:
    class Shadowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modules = (nn.Linear(2, 2),)
            self.children = [nn.Dropout()]
            self.buffers = {"a": ndl.zeros(1)}

    module = Shadowing()
    assert list(module.state_dict()) == ["modules.0.weight", "modules.0.bias", "buffers.a"]
    module.eval()
    assert not module.children[0].training
    assert "children.0: Dropout" in repr(module)


def test_sequential_has_modules_as_attribute_and_as_method() -> None:
    a, b = nn.Linear(2, 3), nn.ReLU()
    model = nn.Sequential(a, b)
    assert isinstance(model.modules, tuple)
    assert model.modules == (a, b)
    assert model.modules[0] is a
    assert model.modules() == [model, a, b]
    assert (len(model), model[-1], list(model)) == (2, b, [a, b])
    assert model[:1].modules == (a,)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    model.modules = (b, nn.Identity())
    assert model(ndl.Tensor([-1.0])).tolist() == [0.0]
    with pytest.raises(TypeError, match="sequential: expected modules; received a list"):
        nn.Sequential([a, b])  # type: ignore[arg-type]
    x = ndl.Tensor([2.0])
    assert nn.Sequential()(x) is x


# Modes, gradients, devices


def test_train_and_eval_reach_every_module() -> None:
    block = Block()
    block.layers.append({"deep": [nn.Dropout(0.5)]})
    assert block.eval() is block
    assert not any(module.training for module in block.modules())
    assert block.train() is block
    assert all(module.training for module in block.modules())
    assert not block.train(False).layers[2]["deep"][0].training


def test_zero_grad_and_requires_grad() -> None:
    block = Block()
    block(ndl.ones(4, 2)).sum().backward()
    assert block.scale.grad is not None
    block.zero_grad()
    assert all(p.grad is None for p in block.parameters())
    block.requires_grad_(False)
    block.offset = block.offset.detach()
    assert not block(ndl.ones(4, 2)).requires_grad
    block.ids = nn.Parameter(ndl.Tensor(np.arange(3)))
    block.requires_grad_()
    assert all(p.requires_grad != (p is block.ids) for p in block.parameters())


def test_to_a_dtype_is_in_place_and_leaves_integers_alone() -> None:
    block = Block()
    block.steps = ndl.Tensor(np.array([3]))
    before = block.parameters()
    block(ndl.ones(4, 2)).sum().backward()
    assert block.to("float64") is block
    assert block.parameters() == before
    assert {str(p.dtype) for p in before} == {"float64"}
    assert block.offset.dtype == "float64"
    assert block.steps.dtype == "int64"
    assert block.scale.grad is not None
    assert block.scale.grad.dtype == "float64"
    assert all(p.requires_grad for p in block.parameters())
    block.scale.data = block.scale.data - 0.5 * block.scale.grad.data
    assert block(ndl.Tensor(np.ones((4, 2)))).dtype == "float64"


def test_to_a_device_and_errors_of_to() -> None:
    block = Block().to(ndl.cpu_numpy())
    assert {str(x.device) for x in [*block.parameters(), *block.buffers()]} == {"cpu_numpy()"}
    for target in ("int64", "no dtype"):
        with pytest.raises(TypeError, match="expected"):
            block.to(target)
    assert block.scale.dtype == "float32"
    tiny = nn.Linear(1, 1, bias=False).to("float64")
    tiny.weight.data = ndl.Tensor(np.array([[1e30]]))
    assert tiny.to("float16").weight.item() == math.inf  # as IEEE 754 rounds, without a warning


def test_apply_visits_every_module() -> None:
    seen: list[nn.Module] = []
    block = Block()
    assert block.apply(seen.append) is block
    assert seen == block.modules()


def test_modules_pickle_and_copy() -> None:
    block = Block()
    for twin in (pickle.loads(pickle.dumps(block)), copy.deepcopy(block)):
        twin.scale.data = twin.scale.data + 1
        assert block.scale.tolist() == [0.0, 1.0]
        assert repr(twin) == repr(block)
        assert isinstance(twin.scale, nn.Parameter)


def test_forward_must_be_written() -> None:
    with pytest.raises(NotImplementedError, match="Module: forward is not written"):
        nn.Module()(1)


# Saving and loading


def test_state_dict_round_trip() -> None:
    block, other = Block(), Block()
    other.offset.data = ndl.Tensor([9.0, 9.0])
    state = block.state_dict()
    assert list(state) == [
        "scale",
        "layers.0.weight",
        "layers.0.bias",
        "layers.1.inner.0.weight",
        "layers.1.inner.0.bias",
        "table.a",
        "offset",
    ]
    assert not any(isinstance(x, nn.Parameter) or x.requires_grad for x in state.values())
    held = other.parameters()
    assert other.load_state_dict(state) == ([], [])
    assert other.parameters() == held
    for name, x in other.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), state[name].numpy())
        assert not np.shares_memory(x.numpy(), state[name].numpy())


def test_state_dict_is_not_changed_by_later_updates() -> None:
    block = Block()
    state = block.state_dict()
    block.scale.data = block.scale.data * 10
    assert state["scale"].tolist() == [0.0, 1.0]


def test_load_accepts_arrays_and_casts() -> None:
    layer = nn.Linear(2, 1)
    layer.steps = ndl.Tensor(np.array(1.0))
    values = {"weight": np.ones((2, 1)), "bias": ndl.NDArray(np.ones((1, 1))), "steps": np.array(5)}
    layer.load_state_dict(values)
    assert layer.weight.dtype == "float32"
    assert layer.steps.numpy().dtype == np.float64
    assert layer.steps.item() == 5.0
    values["weight"][:] = 7
    assert layer.weight.tolist() == [[1.0], [1.0]]


def test_load_tells_everything_wrong_at_once_and_loads_nothing() -> None:
    block = Block()
    block.steps = ndl.Tensor(np.array(0))
    before = {name: x.numpy().copy() for name, x in block.state_dict().items()}
    state: dict[str, Any] = {name: x.numpy() + 1 for name, x in block.state_dict().items()}
    del state["scale"], state["table.a"]
    state["layers.0.weight"] = np.ones((3, 2))
    state["steps"] = np.array(2.5)
    state["extra"] = np.ones(1)
    with pytest.raises(ValueError, match="^load_state_dict: ") as caught:
        block.load_state_dict(state)
    message = str(caught.value)
    assert "missing scale, table.a" in message
    assert "unexpected extra" in message
    assert "layers.0.weight: expected shape (2, 3), received (3, 2)" in message
    assert "steps: expected int64, received float64" in message
    with pytest.raises(ValueError, match="expected shape") as caught:
        block.load_state_dict(state, strict=False)
    assert "missing" not in str(caught.value)
    for name, x in block.state_dict().items():
        np.testing.assert_array_equal(x.numpy(), before[name])


def test_load_that_is_not_strict_reports_what_it_passed_over() -> None:
    layer = nn.Linear(2, 2)
    found = layer.load_state_dict({"weight": np.zeros((2, 2)), "other": np.ones(1)}, strict=False)
    assert found.missing == ["bias"]
    assert found.unexpected == ["other"]
    assert not layer.weight.numpy().any()


def test_state_errors() -> None:
    layer = nn.Linear(2, 2)
    with pytest.raises(TypeError, match="load_state_dict: expected a dict; received list"):
        layer.load_state_dict([])  # type: ignore[arg-type]
    layer.table = {1: ndl.zeros(1), "1": ndl.ones(1)}
    with pytest.raises(
        ValueError, match="expected distinct paths; received two tensors of one path"
    ):
        layer.state_dict()


# Hooks, errors, paths


def test_hooks_see_and_replace_and_are_removed() -> None:
    layer = nn.Linear(2, 1, bias=False)
    layer.weight.data = ndl.Tensor([[1.0], [1.0]])
    x = ndl.Tensor([[1.0, 2.0]])
    seen: list[Any] = []
    watch = layer.register_forward_hook(lambda module, inputs, y: seen.append((module, inputs, y)))
    double = layer.register_forward_pre_hook(lambda module, inputs: inputs[0] * 2)
    negate = layer.register_forward_hook(lambda module, inputs, y: -y)
    assert layer(x).item() == -6.0
    assert seen[0][0] is layer
    assert seen[0][1][0].tolist() == [[2.0, 4.0]]
    assert seen[0][2].item() == 6.0
    double.remove()
    double.remove()
    assert layer(x).item() == -3.0
    negate.remove()
    watch.remove()
    assert layer(x).item() == 3.0
    assert len(seen) == 2


def test_a_hook_may_remove_itself_and_modules_as_hooks_are_no_children() -> None:
    layer = nn.Identity()
    handle = layer.register_forward_hook(lambda *_: handle.remove())
    calls: list[int] = []
    layer.register_forward_hook(lambda *_: calls.append(1))

    class Watcher(nn.Module):
        def forward(self, module: nn.Module, inputs: Any, y: Any) -> None:
            calls.append(2)

    layer.register_forward_hook(Watcher())
    layer(1)
    layer(1)
    assert calls == [1, 2, 1, 2]
    assert layer.modules() == [layer]


class Deep(nn.Module):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__()
        self.layers = [nn.Sequential(nn.ReLU(), nn.Residual(nn.Linear(4, 5)))]
        self.error = error

    def forward(self, x: ndl.Tensor) -> ndl.Tensor:
        if self.error is not None:
            raise self.error
        return self.layers[0](x)


def test_an_error_names_the_module_once_from_the_outermost() -> None:
    expected = r"^matmul: inner dimensions differ: \(2, 3\) @ \(4, 5\)"
    with pytest.raises(ValueError, match=expected + r" \(in layers.0.1.fn\)$"):
        Deep()(ndl.ones(2, 3))
    with pytest.raises(ValueError, match=expected + r" \(in 1.layers.0.1.fn\)$"):
        nn.Sequential(nn.Identity(), Deep())(ndl.ones(2, 3))
    with pytest.raises(ValueError, match=expected + "$"):
        nn.Linear(4, 5)(ndl.ones(2, 3))
    model = nn.Sequential(nn.Identity(), nn.Residual(nn.Linear(4, 5)))
    model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"\(in 1.fn\)$"):  # also where hooks run
        model(ndl.ones(2, 3))


@pytest.mark.parametrize("kind", [TypeError, IndexError, ValueError])
def test_errors_of_all_three_kinds_are_located(kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"^wrong \(in fn\)$"):
        nn.Residual(Deep(kind("wrong")))(1)


def test_errors_without_a_message_pass_unchanged() -> None:
    for error in (ValueError(), ValueError(1), ValueError("two", "parts"), KeyError("key")):
        before = error.args
        with pytest.raises(type(error)) as caught:
            nn.Residual(Deep(error))(1)
        assert caught.value is error
        assert error.args == before
    with pytest.raises(UnicodeDecodeError):
        nn.Residual(Deep(UnicodeDecodeError("utf-8", b"", 0, 1, "why")))(1)


def test_an_error_in_a_module_that_no_attribute_holds_names_its_class() -> None:
    inner = nn.Linear(4, 5)
    with pytest.raises(ValueError, match=r"\(in 0.Linear\)$"):
        nn.Sequential(nn.Residual(lambda x: inner(x)))(ndl.ones(2, 3))


def test_running_path_is_that_of_the_innermost_call() -> None:
    paths: list[str] = []

    class Probe(nn.Module):
        def forward(self, x: Any) -> Any:
            paths.append(running_path())
            thread = threading.Thread(target=lambda: paths.append(running_path()))
            thread.start()
            thread.join()
            return x

    model = nn.Sequential(nn.Identity(), nn.Residual(nn.Sequential(Probe())))
    x = ndl.ones(1)
    model(x)
    Probe()(x)
    probe = Probe()
    probe.register_forward_hook(lambda *_: paths.append(running_path()))
    nn.Sequential(nn.Residual(lambda x: probe(x)))(x)  # which no attribute leads to
    assert paths == ["1.fn.0", "", "", "", "0.Probe", "", "0.Probe"]
    assert running_path() == ""


# What is printed


def test_repr_is_a_tree_with_counts() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Residual(nn.Linear(8, 8)), nn.LayerNorm((8,)), nn.GELU())
    assert repr(model) == "\n".join(
        [
            "Sequential(), 88 parameters",
            "  0: Flatten()",
            "  1: Residual(), 72 parameters",
            "    fn: Linear(in_features=8, out_features=8), 72 parameters",
            "  2: LayerNorm(normalized_shape=(8,), eps=1e-05), 16 parameters",
            "  3: GELU(approximate='none')",
        ]
    )
    assert "1,001,000 parameters" in repr(nn.Linear(1000, 1000))


def test_summary_shows_shapes_and_sizes_and_leaves_the_model_alone() -> None:
    norm = nn.BatchNorm1d(3)
    unused = nn.Linear(1, 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), norm, nn.Dropout(0.5))
    model.unused = unused
    norm.weight.requires_grad = False
    unused.eval()
    np.random.seed(0)
    state = np.random.get_state()[1].copy()
    table = nn.summary(model, ndl.ones(5, 2, 2))
    assert (table.parameters, table.trainable, table.nbytes) == (23, 20, 4 * (23 + 6))
    assert [(row.name, row.output) for row in table.rows] == [
        ("Sequential", "(5, 3)"),
        ("0: Flatten", "(5, 4)"),
        ("1: Linear", "(5, 3)"),
        ("2: BatchNorm1d", "(5, 3)"),
        ("3: Dropout", "(5, 3)"),
        ("unused: Linear", "-"),
    ]
    assert str(table).splitlines()[4].split() == ["1:", "Linear", "(5,", "3)", "15", "60"]
    assert str(table).endswith("23 parameters, 20 trainable, 116 bytes")
    assert norm.training
    assert not unused.training
    assert norm.running_mean.tolist() == [0.0, 0.0, 0.0]
    assert (np.random.get_state()[1] == state).all()
    with pytest.raises(ValueError, match="matmul"):
        nn.summary(model, np.ones((5, 3), np.float32))
    assert model.training
    calls: list[int] = []
    norm.register_forward_hook(lambda *_: calls.append(1))
    nn.summary(model, np.ones((5, 4)))
    assert calls == [1]
    assert len(norm._hooks) == 1


def test_summary_of_several_inputs_and_outputs() -> None:
    class Swap(nn.Module):
        def forward(self, a: ndl.Tensor, b: ndl.Tensor) -> Any:
            assert not (a * ndl.Tensor([1.0])).requires_grad
            return b, [a]

    table = nn.summary(Swap(), np.ones((2, 1)), ndl.ones(3))
    assert table.rows[0].output == "(3,), (2, 1)"


# The course's values


def test_linear_draws_weight_then_bias_from_numpy() -> None:
    np.random.seed(1337)
    layer = nn.Linear(7, 4)
    after = np.random.rand()
    np.random.seed(1337)
    bound = math.sqrt(2) * math.sqrt(3 / 7)
    weight = np.random.rand(7, 4) * 2 * bound - bound
    bound = math.sqrt(2) * math.sqrt(3 / 4)
    bias = np.random.rand(4, 1).reshape(1, 4) * 2 * bound - bound
    agree(layer.weight, weight.astype("float32"), 28)  # a difference, which may cancel
    agree(layer.bias, bias.astype("float32"), 4)
    assert np.random.rand() == after
    x = draw(3, 7, dtype="float32")
    agree(layer(ndl.Tensor(x)), (x @ weight + bias).astype("float32"), 7)


def test_dropout_keeps_where_the_draw_is_at_most_one_minus_p() -> None:
    x = draw(50, 20)
    np.random.seed(1337)
    layer = nn.Dropout(0.15)
    y = layer(ndl.Tensor(x))
    np.random.seed(1337)
    agree(y, x * (np.random.rand(50, 20) <= 0.85) / 0.85)


def test_course_code_trains() -> None:
    """A block as the course's assignment builds it, with its loss."""
    np.random.seed(0)

    def block(dim: int, hidden: int) -> nn.Module:
        body = nn.Sequential(
            nn.Linear(in_features=dim, out_features=hidden),
            nn.BatchNorm1d(dim=hidden),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(hidden, dim),
            nn.BatchNorm1d(dim),
        )
        return nn.Sequential(nn.Residual(body), nn.ReLU())

    x, y = ndl.Tensor(draw(32, 8, dtype="float32")), ndl.Tensor(np.arange(32) % 4)
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), block(16, 8), nn.Linear(16, 4))
    loss_fn = nn.SoftmaxLoss()
    losses = []
    for _ in range(40):
        loss = loss_fn(model(x), y)
        loss.backward()
        for p in model.parameters():
            p.data = p.data - 0.1 * p.grad.data  # type: ignore[union-attr]
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    assert loss.dtype == "float32"


def test_the_courses_import_path() -> None:
    for name in """BatchNorm1d Dropout Flatten Identity LayerNorm1d Linear Module Parameter ReLU
        Residual Sequential SoftmaxLoss""".split():
        assert getattr(nn, name) is getattr(nn_basic, name)


def test_layers_and_losses_are_functions_too() -> None:
    for name in """batch_norm bce_with_logits cross_entropy dropout elu flatten gelu group_norm
        huber_loss kl_div l1_loss layer_norm leaky_relu linear log_softmax mse_loss nll_loss one_hot
        relu rms_norm sigmoid silu softmax softplus tanh""".split():
        assert callable(getattr(functional, name))


@pytest.mark.parametrize(
    "make",
    [
        lambda device: ndl.zeros(3, device=device),
        lambda device: ndl.ones_like(ndl.zeros(3), device=device),
        lambda device: ndl.rand(3, device=device),
        lambda device: ndl.randint(0, 3, (3,), device=device),
        lambda device: ndl.permutation(3, device=device),
        lambda device: ndl.init.one_hot(3, 1, device=device),
        lambda device: ndl.init.orthogonal(3, 3, device=device),
        lambda device: ndl.init.truncated_normal(3, device=device),
        lambda device: nn.Linear(3, 3, device=device),
    ],
)
def test_a_device_that_this_machine_lacks_is_refused_before_a_draw(make: Any) -> None:
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    with pytest.raises(ValueError, match=r"device that .* received cuda\(\); use ndl.cpu\(\)$"):
        make(ndl.cuda())
    assert np.random.rand() == expected


# Layers against PyTorch

Case = tuple[Callable[[str], nn.Module], Callable[[Any], Any], tuple[int, ...]]

LAYERS: dict[str, Case] = {
    "linear": (lambda d: nn.Linear(7, 5, dtype=d), lambda t: t.nn.Linear(7, 5), (3, 7)),
    "linear of rows": (lambda d: nn.Linear(7, 5, dtype=d), lambda t: t.nn.Linear(7, 5), (2, 3, 7)),
    "linear of a vector": (lambda d: nn.Linear(7, 5, dtype=d), lambda t: t.nn.Linear(7, 5), (7,)),
    "linear without bias": (
        lambda d: nn.Linear(7, 5, bias=False, dtype=d),
        lambda t: t.nn.Linear(7, 5, bias=False),
        (3, 7),
    ),
    "flatten": (lambda d: nn.Flatten(), lambda t: t.nn.Flatten(), (3, 2, 4)),
    "identity": (lambda d: nn.Identity(), lambda t: t.nn.Identity(), (3, 2)),
    "relu": (lambda d: nn.ReLU(), lambda t: t.nn.ReLU(), (40,)),
    "leaky relu": (lambda d: nn.LeakyReLU(0.2), lambda t: t.nn.LeakyReLU(0.2), (40,)),
    "elu": (lambda d: nn.ELU(1.5), lambda t: t.nn.ELU(1.5), (40,)),
    "gelu": (lambda d: nn.GELU(), lambda t: t.nn.GELU(), (40,)),
    "gelu tanh": (lambda d: nn.GELU("tanh"), lambda t: t.nn.GELU(approximate="tanh"), (40,)),
    "silu": (lambda d: nn.SiLU(), lambda t: t.nn.SiLU(), (40,)),
    "softplus": (lambda d: nn.Softplus(2.0), lambda t: t.nn.Softplus(2.0, 1e9), (40,)),
    "sigmoid": (lambda d: nn.Sigmoid(), lambda t: t.nn.Sigmoid(), (40,)),
    "tanh": (lambda d: nn.Tanh(), lambda t: t.nn.Tanh(), (40,)),
    "softmax": (lambda d: nn.Softmax(), lambda t: t.nn.Softmax(-1), (3, 9)),
    "softmax of axis 0": (lambda d: nn.Softmax(0), lambda t: t.nn.Softmax(0), (9, 3)),
    "log softmax": (lambda d: nn.LogSoftmax(), lambda t: t.nn.LogSoftmax(-1), (3, 9)),
    "layer norm": (lambda d: nn.LayerNorm(6, dtype=d), lambda t: t.nn.LayerNorm(6), (4, 3, 6)),
    "layer norm of two axes": (
        lambda d: nn.LayerNorm((3, 6), 1e-3, dtype=d),
        lambda t: t.nn.LayerNorm((3, 6), 1e-3),
        (4, 3, 6),
    ),
    "layer norm without affine": (
        lambda d: nn.LayerNorm([6], affine=False),
        lambda t: t.nn.LayerNorm(6, elementwise_affine=False),
        (4, 6),
    ),
    "layer norm of the course": (
        lambda d: nn.LayerNorm1d(6, dtype=d),
        lambda t: t.nn.LayerNorm(6),
        (4, 6),
    ),
    "rms norm": (
        lambda d: nn.RMSNorm((3, 6), 1e-4, dtype=d),
        lambda t: t.nn.RMSNorm((3, 6), 1e-4),
        (4, 3, 6),
    ),
    "rms norm without affine": (
        lambda d: nn.RMSNorm(6, affine=False),
        lambda t: t.nn.RMSNorm(6, 1e-5, elementwise_affine=False),
        (4, 6),
    ),
    "group norm": (
        lambda d: nn.GroupNorm(3, 6, dtype=d),
        lambda t: t.nn.GroupNorm(3, 6),
        (2, 6, 4, 3),
    ),
    "group norm of vectors": (
        lambda d: nn.GroupNorm(2, 6, affine=False),
        lambda t: t.nn.GroupNorm(2, 6, affine=False),
        (5, 6),
    ),
    "batch norm": (lambda d: nn.BatchNorm1d(5, dtype=d), lambda t: t.nn.BatchNorm1d(5), (8, 5)),
    "batch norm of sequences": (
        lambda d: nn.BatchNorm1d(5, 1e-3, 0.3, dtype=d),
        lambda t: t.nn.BatchNorm1d(5, 1e-3, 0.3),
        (8, 5, 4),
    ),
}


def randomize(module: nn.Module) -> None:
    """Give every parameter other values than those it begins with."""
    for index, p in enumerate(module.parameters()):
        p.data = ndl.Tensor(draw(*p.shape, seed=index + 7, dtype=str(p.dtype)) + 0.5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_pytorch(name: str, dtype: str, torch: ModuleType) -> None:
    make, make_other, shape = LAYERS[name]
    layer, other = make(dtype), make_other(torch).to(getattr(torch, dtype))
    randomize(layer)
    theirs = [p for _, p in other.named_parameters()]
    turn = isinstance(layer, nn.Linear)  # PyTorch's weight is (out, in), its bias (out,)
    for p, q in zip(layer.parameters(), theirs, strict=True):
        value = p.numpy().T if turn else p.numpy()
        q.data = torch.tensor(value.reshape(tuple(q.shape)).copy())
    data, out_grad = draw(*shape, dtype=dtype), draw(*make(dtype)(ndl.ones(*shape)).shape, seed=1)
    x, z = ndl.Tensor(data), torch.tensor(data, requires_grad=True)
    y, w = layer(x), other(z)
    length = x.size
    agree(y, w.detach().numpy(), length)
    y.backward(ndl.Tensor(out_grad.astype(dtype)))
    w.backward(torch.tensor(out_grad.astype(dtype)))
    agree(x.grad, z.grad.numpy(), length)
    for p, q in zip(layer.parameters(), theirs, strict=True):
        expected = q.grad.numpy().T if turn else q.grad.numpy()
        agree(p.grad, expected.reshape(p.shape), length)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(8, 5), (4, 5, 3)])
def test_batch_norm_agrees_with_pytorch_over_steps(
    shape: tuple[int, ...], dtype: str, torch: ModuleType
) -> None:
    layer, other = (
        nn.BatchNorm1d(5, dtype=dtype),
        torch.nn.BatchNorm1d(5, dtype=getattr(torch, dtype)),
    )
    n = math.prod(shape) // 5
    for step in range(3):
        data = draw(*shape, seed=step, dtype=dtype) * 3 + 2
        layer(ndl.Tensor(data))
        other(torch.tensor(data))
        agree(layer.running_mean, other.running_mean.numpy(), n)
    # PyTorch keeps the unbiased variance: ours moved by n / (n - 1) times as much would be theirs.
    theirs = other.running_var.numpy()
    rest = 0.9**3
    agree((layer.running_var - rest) * (n / (n - 1)) + rest, theirs, n)
    other.running_var = torch.tensor(layer.running_var.numpy().copy())
    x = draw(*shape, seed=9, dtype=dtype)
    a, b = ndl.Tensor(x), torch.tensor(x, requires_grad=True)
    y, w = layer.eval()(a), other.eval()(b)
    agree(y, w.detach().numpy(), n)
    y.sum().backward()
    w.sum().backward()
    agree(a.grad, b.grad.numpy(), n)
    agree(layer.weight.grad, other.weight.grad.numpy(), n * 5)
    agree(layer.bias.grad, other.bias.grad.numpy(), n * 5)


# Layers against NumPy and finite differences


def test_batch_norm_keeps_the_biased_variance() -> None:
    layer = nn.BatchNorm1d(3, momentum=0.2, dtype="float64")
    mean, var = np.zeros(3), np.ones(3)
    held = layer.running_mean
    for step in range(4):
        x = draw(6, 3, seed=step) * 2 + step
        y = layer(ndl.Tensor(x))
        mean, var = 0.8 * mean + 0.2 * x.mean(0), 0.8 * var + 0.2 * x.var(0)
        agree(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5))
    agree(layer.running_mean, mean)
    agree(layer.running_var, var)
    assert layer.running_mean is held
    assert layer.running_mean.is_leaf()
    assert not layer.running_mean.requires_grad
    assert [name for name, _ in layer.named_buffers()] == ["running_mean", "running_var"]
    agree(layer.eval()(ndl.Tensor(x)), (x - mean) / np.sqrt(var + 1e-5))
    agree(layer.running_mean, mean)


def test_batch_norm_of_one_element_gives_the_bias() -> None:
    layer = nn.BatchNorm1d(2)
    layer.bias.data = ndl.Tensor([3.0, 4.0])
    assert layer(ndl.Tensor([[100.0, -7.0]])).tolist() == [[3.0, 4.0]]
    agree(layer.running_var, np.array([0.9, 0.9], "float32"))


def test_batch_norm_keeps_no_graph_alive() -> None:
    layer = nn.BatchNorm1d(4)
    counts = []
    for _ in range(4):
        layer(ndl.Tensor(draw(5, 4, dtype="float32"))).sum().backward()
        gc.collect()
        counts.append(ndl.autograd.TENSOR_COUNTER)
    assert counts[1:] == counts[:-1]


def test_running_statistics_are_kept_in_lazy_mode() -> None:
    eager, lazy = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    x = draw(5, 3, dtype="float32")
    eager(ndl.Tensor(x))
    with ndl.lazy():
        lazy(ndl.Tensor(x))
    np.testing.assert_array_equal(eager.running_var.numpy(), lazy.running_var.numpy())


def test_normalizations_are_stable_for_large_means() -> None:
    x = np.random.default_rng(0).integers(-9, 9, (4, 64)) + 2.0**30  # so that the means are exact
    centred = x - x.mean(1, keepdims=True)
    expected = centred / np.sqrt((centred * centred).mean(1, keepdims=True) + 1e-5)
    agree(nn.LayerNorm(64, affine=False)(ndl.Tensor(x)), expected, 64)
    agree(nn.GroupNorm(1, 64, affine=False)(ndl.Tensor(x)), expected, 64)
    agree(nn.BatchNorm1d(4, dtype="float64")(ndl.Tensor(x.T)), expected.T, 64)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_agree_with_finite_differences(name: str, rng: np.random.Generator) -> None:
    make, _, shape = LAYERS[name]
    layer = make("float64")
    names = [path for path, _ in layer.named_parameters()]
    arrays = [rng.normal(size=shape), *(rng.normal(size=p.shape) for p in layer.parameters())]

    def call(x: ndl.Tensor, *parameters: ndl.Tensor) -> ndl.Tensor:
        for path, value in zip(names, parameters, strict=True):
            setattr(layer, path, value)
        return layer(x)

    def reference(*values: np.ndarray) -> np.ndarray:
        return call(*map(ndl.Tensor, values)).numpy()

    wanted = range(len(arrays))
    assert_gradient(call, reference, arrays, wanted, rng)
    assert_second_order(call, arrays, wanted, rng)


# Dropout


def test_dropout_scales_in_training_and_is_the_identity_in_evaluation() -> None:
    layer = nn.Dropout(0.25)
    x = ndl.ones(100, 100)
    np.random.seed(0)
    y = layer(x).numpy()
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(y.mean() - 1) < 0.03
    assert layer.eval()(x) is x


def test_dropout_passes_gradients_where_it_keeps() -> None:
    x = ndl.Tensor(draw(30))
    y = nn.Dropout(0.4)(x)
    y.sum().backward()
    agree(x.grad, (y.numpy() != 0) / 0.6)


def test_dropout_at_its_ends() -> None:
    x = ndl.Tensor(draw(5))
    np.testing.assert_array_equal(nn.Dropout(0.0)(x).numpy(), x.numpy())
    y = nn.Dropout(1)(x)
    y.sum().backward()
    assert not y.numpy().any()
    assert x.grad is not None
    assert not x.grad.numpy().any()


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_draws_its_mask_in_training_alone(p: float) -> None:
    """As the course does, whatever p is: what is drawn next is the same for every p."""
    x, layer = ndl.Tensor(draw(3, 4)), nn.Dropout(p)
    np.random.seed(0)
    expected = np.random.rand(13)
    np.random.seed(0)
    layer(x)
    assert np.random.rand() == expected[12]
    np.random.seed(0)
    layer.eval()(x)
    assert np.random.rand() == expected[0]
    followers = []
    for layer in (nn.Dropout(p), nn.Dropout(0.5)):
        ndl.seed(3)
        layer(x)
        followers.append(ndl.rand(4).tolist())
    assert followers[0] == followers[1]


def test_dropout_follows_the_seed() -> None:
    found = []
    for _ in range(2):
        ndl.seed(3)
        found.append(nn.Dropout(0.5)(ndl.ones(50)).tolist())
    assert found[0] == found[1]


# Errors


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_dropout_wants_a_probability(p: float) -> None:
    with pytest.raises(ValueError, match="dropout: expected p between 0 and 1; received"):
        nn.Dropout(p)


ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: nn.Linear(0, 3), ValueError, "expected fans above 0"),
    (lambda: nn.Linear(3, 2, dtype="int32"), TypeError, "expected a float dtype"),
    (lambda: nn.Flatten()(ndl.Tensor(1.0)), ValueError, "flatten: expected a tensor with axes"),
    (
        lambda: nn.BatchNorm1d(4)(ndl.ones(3, 5)),
        ValueError,
        r"batch_norm: expected x of shape \(n, 4\) or \(n, 4, length\); received \(3, 5\)",
    ),
    (lambda: nn.BatchNorm1d(4)(ndl.ones(4)), ValueError, r"received \(4,\)"),
    (lambda: nn.BatchNorm1d(4)(ndl.ones(2, 4, 3, 3)), ValueError, r"received \(2, 4, 3, 3\)"),
    (lambda: nn.BatchNorm1d(4)(ndl.ones(0, 4)), ValueError, "expected a batch with elements"),
    (
        lambda: nn.BatchNorm1d(4, momentum=1.5),
        ValueError,
        "expected 0 <= momentum <= 1; received 1.5",
    ),
    (
        lambda: nn.LayerNorm((3, 4))(ndl.ones(2, 4, 3)),
        ValueError,
        r"layer_norm: expected x of trailing sizes \(3, 4\); received shape \(2, 4, 3\)",
    ),
    (lambda: nn.LayerNorm(4)(ndl.Tensor(1.0)), ValueError, r"received shape \(\)"),
    (lambda: nn.LayerNorm(())(ndl.ones(3)), ValueError, "layer_norm: expected x of trailing sizes"),
    (lambda: nn.LayerNorm("4"), TypeError, "LayerNorm: expected a shape of integers"),
    (
        lambda: nn.RMSNorm(4)(ndl.ones(2, 5)),
        ValueError,
        r"rms_norm: .* \(4,\); received shape \(2, 5\)",
    ),
    (
        lambda: nn.GroupNorm(4, 6),
        ValueError,
        "group_norm: expected groups of equal size; received 6 channels and 4 groups",
    ),
    (lambda: nn.GroupNorm(0, 6), ValueError, "received 6 channels and 0 groups"),
    (
        lambda: nn.GroupNorm(2, 6)(ndl.ones(2, 4)),
        ValueError,
        r"group_norm: expected x of shape \(n, 6, ...\); received \(2, 4\)",
    ),
    (
        lambda: functional.group_norm(ndl.ones(2, 5), 2),
        ValueError,
        r"with channels divisible by 2; received \(2, 5\)",
    ),
    (
        lambda: functional.layer_norm(ndl.ones(2, 5), 5, ndl.ones(4)),
        ValueError,
        r"layer_norm: expected weight of shape \(5,\); received \(4,\)",
    ),
    (
        lambda: functional.batch_norm(ndl.ones(2, 5), ndl.ones(5), ndl.ones(1), training=False),
        ValueError,
        r"batch_norm: expected running_var of shape \(5,\); received \(1,\)",
    ),
    (
        lambda: functional.batch_norm(ndl.ones(2, 5), training=False),
        ValueError,
        "expected running_mean and running_var in evaluation",
    ),
    (
        lambda: functional.batch_norm(ndl.ones(5)),
        ValueError,
        r"\(n, channels, ...\); received \(5,\)",
    ),
    (lambda: nn.GELU("fast")(ndl.ones(1)), ValueError, "gelu: expected approximate"),
    (lambda: nn.Softplus(0)(ndl.ones(1)), ValueError, "softplus: expected beta > 0"),
]


@pytest.mark.parametrize("index", range(len(ERRORS)))
def test_errors_say_what_was_expected(index: int) -> None:
    call, kind, message = ERRORS[index]
    with pytest.raises(kind, match=message):
        call()


def test_a_refused_batch_leaves_running_statistics_alone() -> None:
    layer = nn.BatchNorm1d(4)
    with pytest.raises(ValueError, match="batch_norm"):
        layer(ndl.ones(0, 4))
    assert layer.running_mean.tolist() == [0.0] * 4
    assert layer.running_var.tolist() == [1.0] * 4


# Functions that no module covers


def test_functional_with_half_of_the_affine_part() -> None:
    x, w, b = (ndl.Tensor(draw(*shape, seed=i)) for i, shape in enumerate([(5, 4), (4,), (4,)]))
    plain = functional.layer_norm(x, 4)
    agree(functional.layer_norm(x, 4, w), (plain * w).numpy())
    agree(functional.layer_norm(x, 4, bias=b), (plain + b).numpy())
    plain = functional.batch_norm(x)
    agree(functional.batch_norm(x, weight=w), (plain * w).numpy())
    agree(functional.batch_norm(x, bias=b), (plain + b).numpy())
    plain = functional.group_norm(x, 2)
    agree(functional.group_norm(x, 2, bias=b), (plain + b).numpy())


def test_functional_accepts_arrays() -> None:
    x = draw(3, 4)
    agree(functional.relu(x), np.maximum(x, 0))
    agree(functional.dropout(x, training=False), x)
    agree(functional.linear(x, ndl.Tensor(np.eye(4))), x)
    assert functional.layer_norm(x, 4).shape == (3, 4)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d])
def test_gradients_have_the_dtype_of_what_they_belong_to(make: Any, dtype: str) -> None:
    layer, x = make(4), nn.Parameter(ndl.Tensor(draw(5, 4)).to(dtype))
    layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert layer.weight.grad.dtype == "float32"


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.Flatten()]
)
def test_empty_batches(layer: nn.Module) -> None:
    assert layer(ndl.zeros(0, 4)).shape[0] == 0
