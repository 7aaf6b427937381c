"""The losses of needle.nn against PyTorch, their equations in NumPy, and finite differences."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checks import agree, assert_gradient, assert_second_order, draw

import needle as ndl
from needle import nn
from needle.nn import functional

DTYPES = ["float64", "float32"]
REDUCTIONS = ["mean", "sum", "none"]


def labels_of(*shape: int, classes: int, ignore: int | None = None) -> np.ndarray:
    found = np.random.default_rng(5).integers(0, classes, shape)
    if ignore is not None:
        found.flat[::3] = ignore
    return found


def compare(
    torch: ModuleType,
    loss_fn: nn.Module,
    other: Any,
    x: np.ndarray,
    target: np.ndarray,
    target_gradient: bool = False,
) -> None:
    """Values and gradients of a loss and of PyTorch's, along a random direction of the output."""
    a, b = ndl.Tensor(x), torch.tensor(x, requires_grad=True)
    t = ndl.Tensor(target, requires_grad=target_gradient)
    u = torch.tensor(target, requires_grad=target_gradient)
    found, expected = loss_fn(a, t), other(b, u)
    agree(found, expected.detach().numpy(), x.size)
    out_grad = draw(*found.shape, seed=8, dtype=str(x.dtype)) + 2
    found.backward(ndl.Tensor(out_grad))
    expected.backward(torch.tensor(out_grad))
    agree(a.grad, b.grad.numpy(), x.size)
    if target_gradient:
        agree(t.grad, u.grad.numpy(), x.size)


# Losses of class labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3), (2, 5, 3, 2), (5,)])
def test_cross_entropy_agrees_with_pytorch(
    shape: tuple[int, ...], reduction: str, dtype: str, torch: ModuleType
) -> None:
    places = shape[:1] + shape[2:] if len(shape) > 1 else ()
    x = draw(*shape, dtype=dtype) * 3
    weight = np.linspace(0.5, 2, 5).astype(dtype)
    for weighted, smoothing, ignore in itertools.product(
        (False, True), (0.0, 0.2), (None, 2, -100)
    ):
        labels = labels_of(*places, classes=5, ignore=ignore) if places else np.array(3)
        settings = {
            "ignore_index": -100 if ignore is None else ignore,
            "label_smoothing": smoothing,
            "reduction": reduction,
        }
        ours = nn.CrossEntropyLoss(weight if weighted else None, **settings)
        tensor = torch.tensor(weight) if weighted else None
        compare(torch, ours, torch.nn.CrossEntropyLoss(tensor, **settings), x, labels)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(6, 5), (4, 5, 3)])
def test_nll_agrees_with_pytorch(
    shape: tuple[int, ...], reduction: str, dtype: str, torch: ModuleType
) -> None:
    x = draw(*shape, dtype=dtype)
    weight = np.linspace(0.5, 2, 5).astype(dtype)
    labels = labels_of(shape[0], *shape[2:], classes=5, ignore=1)
    for weighted in (False, True):
        ours = nn.NLLLoss(weight if weighted else None, 1, reduction)
        tensor = torch.tensor(weight) if weighted else None
        compare(
            torch, ours, torch.nn.NLLLoss(tensor, ignore_index=1, reduction=reduction), x, labels
        )


def test_softmax_loss_is_the_mean_of_logsumexp_minus_the_label() -> None:
    x, y = draw(7, 4) * 5, labels_of(7, classes=4)
    expected = np.mean(np.log(np.exp(x).sum(1)) - x[np.arange(7), y])
    logits = ndl.Tensor(x)
    loss = nn.SoftmaxLoss()(logits, ndl.Tensor(y))
    agree(loss, expected, 7)
    loss.backward()
    p = np.exp(x) / np.exp(x).sum(1, keepdims=True)
    agree(logits.grad, (p - np.eye(4)[y]) / 7, 7)


@pytest.mark.parametrize("kind", ["int64", "int32", "uint8", "float32"])
def test_labels_of_any_kind(kind: str) -> None:
    x, y = draw(6, 4, dtype="float32"), labels_of(6, classes=4)
    expected = nn.SoftmaxLoss()(ndl.Tensor(x), ndl.Tensor(y))
    for labels in (ndl.Tensor(y.astype(kind)), y.astype(kind)):
        found = nn.SoftmaxLoss()(ndl.Tensor(x), labels)
        assert found.dtype == "float32"
        assert found.item() == expected.item()


def test_cross_entropy_of_huge_and_infinite_logits() -> None:
    x = ndl.Tensor([[1e30, 0.0], [-1e30, 1e30], [0.0, -math.inf]])
    loss = nn.CrossEntropyLoss(reduction="none")(x, np.array([0, 1, 0]))
    assert loss.tolist() == [0.0, 0.0, 0.0]
    wrong = nn.CrossEntropyLoss(reduction="none")(x, np.array([1, 0, 1]))
    assert wrong.numpy()[0] == np.float32(1e30)
    assert wrong.numpy()[2] == math.inf
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[0.0, 0.0]] * 3


def test_mean_over_no_labels_is_nan_as_in_pytorch() -> None:
    loss = nn.CrossEntropyLoss(ignore_index=1)(ndl.ones(2, 3), np.array([1, 1]))
    assert math.isnan(loss.item())
    assert (
        nn.CrossEntropyLoss(ignore_index=1, reduction="sum")(
            ndl.ones(2, 3), np.array([1, 1])
        ).item()
        == 0
    )


def test_class_weights_are_buffers() -> None:
    loss_fn = nn.CrossEntropyLoss([1.0, 2.0, 3.0])
    assert loss_fn.parameters() == []
    assert [name for name, _ in loss_fn.named_buffers()] == ["weight"]
    loss_fn.to("float64")
    assert loss_fn(ndl.Tensor(draw(2, 3)), np.array([0, 1])).dtype == "float64"
    assert "ignore_index=-100" in repr(loss_fn)


# Losses of two tensors

PAIRS: dict[str, tuple[Callable[[str], nn.Module], Callable[[Any, str], Any]]] = {
    "mse": (lambda r: nn.MSELoss(r), lambda t, r: t.nn.MSELoss(reduction=r)),
    "l1": (lambda r: nn.L1Loss(r), lambda t, r: t.nn.L1Loss(reduction=r)),
    "huber": (lambda r: nn.HuberLoss(reduction=r), lambda t, r: t.nn.HuberLoss(reduction=r)),
    "huber 0.3": (lambda r: nn.HuberLoss(0.3, r), lambda t, r: t.nn.HuberLoss(r, 0.3)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", PAIRS)
def test_pair_losses_agree_with_pytorch(
    name: str, reduction: str, dtype: str, torch: ModuleType
) -> None:
    make, make_other = PAIRS[name]
    x, y = draw(4, 3, 2, dtype=dtype), draw(4, 3, 2, seed=1, dtype=dtype)
    compare(torch, make(reduction), make_other(torch, reduction), x, y, target_gradient=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weight", [None, [0.5, 1.0, 3.0]])
def test_bce_agrees_with_pytorch(
    weight: list[float] | None, reduction: str, dtype: str, torch: ModuleType
) -> None:
    x = draw(4, 3, dtype=dtype) * 4
    y = np.random.default_rng(1).random((4, 3)).astype(dtype)
    kept = None if weight is None else torch.tensor(weight, dtype=getattr(torch, dtype))
    other = torch.nn.BCEWithLogitsLoss(pos_weight=kept, reduction=reduction)
    ours = nn.BCEWithLogitsLoss(weight, reduction)
    compare(torch, ours, other, x, y, target_gradient=True)


@pytest.mark.filterwarnings("ignore:reduction:UserWarning")  # PyTorch recommends "batchmean"
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "batchmean"])
def test_kl_divergence_agrees_with_pytorch(
    reduction: str, log_target: bool, dtype: str, torch: ModuleType
) -> None:
    x = np.log(np.random.default_rng(0).dirichlet(np.ones(5), 4)).astype(dtype)
    y = np.random.default_rng(1).dirichlet(np.ones(5), 4).astype(dtype)
    if log_target:
        y = np.log(y)
    else:
        y[0, :2] = 0  # 0 * ln 0 = 0
    ours = nn.KLDivLoss(reduction, log_target)
    compare(torch, ours, torch.nn.KLDivLoss(reduction=reduction, log_target=log_target), x, y)


def test_bce_of_huge_logits() -> None:
    x = ndl.Tensor([1e30, -1e30, 1e30, -1e30])
    loss = nn.BCEWithLogitsLoss(reduction="none")(x, ndl.Tensor([1.0, 0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(loss.numpy(), np.float32([0, 0, 1e30, 1e30]))
    loss.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 0.0, 1.0, -1.0]


def test_huber_of_huge_differences_does_not_overflow() -> None:
    x = ndl.Tensor([1e30, -1e30])
    loss = nn.HuberLoss(2.0, "none")(x, ndl.Tensor([0.0, 0.0]))
    agree(loss, np.float32([2e30, 2e30]))


def test_l1_and_huber_have_no_slope_at_zero() -> None:
    for loss_fn in (nn.L1Loss(), nn.HuberLoss()):
        x = ndl.Tensor([1.0, 2.0])
        loss_fn(x, ndl.Tensor([1.0, 2.0])).backward()
        assert x.grad is not None
        assert x.grad.tolist() == [0.0, 0.0]


# Finite differences

TARGET = np.random.default_rng(2).random((5, 3)) + 0.1
LABELS = labels_of(5, classes=3)
WEIGHT = [0.5, 1.0, 2.0]
SMOOTH: dict[str, tuple[nn.Module, np.ndarray | None]] = {
    "softmax": (nn.SoftmaxLoss(), None),
    "cross entropy": (nn.CrossEntropyLoss(WEIGHT, 1, 0.1), None),
    "cross entropy, none": (nn.CrossEntropyLoss(reduction="none"), None),
    "nll": (nn.NLLLoss(WEIGHT), None),
    "mse": (nn.MSELoss("none"), TARGET),
    "l1": (nn.L1Loss(), TARGET),
    "huber": (nn.HuberLoss(0.5), TARGET),
    "bce": (nn.BCEWithLogitsLoss(WEIGHT), TARGET),
    "kl": (nn.KLDivLoss("batchmean"), TARGET),
    "kl of logs": (nn.KLDivLoss("none", log_target=True), TARGET),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_gradients_agree_with_finite_differences(name: str, rng: np.random.Generator) -> None:
    loss_fn, target = SMOOTH[name]
    arrays = [rng.normal(size=(5, 3)) - 1, *([] if target is None else [target])]

    def call(x: ndl.Tensor, y: ndl.Tensor | np.ndarray = LABELS) -> ndl.Tensor:
        return loss_fn(x, y)

    def reference(*values: np.ndarray) -> np.ndarray:
        return call(*map(ndl.Tensor, values)).numpy()

    wanted = range(len(arrays))
    assert_gradient(call, reference, arrays, wanted, rng)
    assert_second_order(call, arrays, wanted, rng)


# Errors

X = ndl.ones(4, 3)
ERRORS: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: nn.SoftmaxLoss()(X, np.array([0, 1, 2, 3])),
        ValueError,
        "cross_entropy: expected labels from 0 to 2; received 3",
    ),
    (lambda: nn.CrossEntropyLoss()(X, np.array([0, -1, 2, 1])), ValueError, "received -1"),
    (lambda: nn.NLLLoss()(X, np.array([0, 7, 2, 1])), ValueError, "nll_loss: .*received 7"),
    (
        lambda: nn.SoftmaxLoss()(X, np.array([0, 1])),
        ValueError,
        r"expected labels for classes along axis 1 of \(4, 3\); received labels \(2,\)",
    ),
    (
        lambda: nn.SoftmaxLoss()(X, np.array([0.5, 1, 2, 0])),
        TypeError,
        "cross_entropy labels: expected integer indices; received float64",
    ),
    (
        lambda: nn.CrossEntropyLoss([1.0, 2.0])(X, np.zeros(4, int)),
        ValueError,
        r"expected a weight for each of 3 classes; received \(2,\)",
    ),
    (
        lambda: nn.CrossEntropyLoss(label_smoothing=1.5)(X, np.zeros(4, int)),
        ValueError,
        "expected label_smoothing between 0 and 1; received 1.5",
    ),
    (
        lambda: nn.MSELoss()(X, ndl.ones(3, 4)),
        ValueError,
        r"mse_loss: expected input and target of one shape; received \(4, 3\) and \(3, 4\)",
    ),
    (lambda: nn.L1Loss()(X, ndl.ones(4)), ValueError, "l1_loss: expected input and target"),
    (lambda: nn.HuberLoss()(X, ndl.ones(1)), ValueError, "huber_loss: expected input and target"),
    (lambda: nn.HuberLoss(0.0)(X, X), ValueError, "huber_loss: expected delta > 0; received 0.0"),
    (lambda: nn.BCEWithLogitsLoss()(X, ndl.ones(4)), ValueError, "bce_with_logits: expected input"),
    (lambda: nn.KLDivLoss()(X, ndl.ones(4)), ValueError, "kl_div: expected input and target"),
]


@pytest.mark.parametrize("index", range(len(ERRORS)))
def test_errors_say_what_was_expected(index: int) -> None:
    call, kind, message = ERRORS[index]
    with pytest.raises(kind, match=message):
        call()


@pytest.mark.parametrize(
    "make",
    [
        nn.CrossEntropyLoss,
        nn.NLLLoss,
        nn.BCEWithLogitsLoss,
        nn.MSELoss,
        nn.L1Loss,
        nn.HuberLoss,
        nn.KLDivLoss,
    ],
)
def test_reductions_are_checked_when_the_loss_is_made(make: Callable[..., nn.Module]) -> None:
    with pytest.raises(
        ValueError, match="expected reduction 'mean', 'sum' or 'none'; received 'avg'"
    ):
        make(reduction="avg")


def test_functions_and_modules_are_the_same() -> None:
    x, y = ndl.Tensor(draw(4, 3)), ndl.Tensor(draw(4, 3, seed=1))
    assert functional.mse_loss(x, y).item() == nn.MSELoss()(x, y).item()
    assert functional.huber_loss(x, y, 0.5).item() == nn.HuberLoss(0.5)(x, y).item()
    labels = labels_of(4, classes=3)
    assert functional.cross_entropy(x, labels).item() == nn.SoftmaxLoss()(x, labels).item()


# Labels out of range, in every mode

LABELLED: dict[str, Callable[[ndl.Tensor, ndl.Tensor], ndl.Tensor]] = {
    **{
        f"cross_entropy, {reduction}": lambda x, y, reduction=reduction: ndl.cross_entropy(
            x, y, reduction=reduction
        )
        for reduction in REDUCTIONS
    },
    "cross_entropy, smoothed": lambda x, y: ndl.cross_entropy(x, y, label_smoothing=0.1),
    "cross_entropy, weighted": lambda x, y: ndl.cross_entropy(x, y, ndl.ones(5)),
    "nll_loss": lambda x, y: ndl.nll_loss(x, y),
    "one_hot": lambda x, y: ndl.one_hot(y, 5) * x,
}


def outcome(mode: str, function: Callable[..., ndl.Tensor], *args: ndl.Tensor) -> Any:
    """The bits, or the error's type and words."""
    try:
        if mode == "lazy":
            with ndl.lazy():
                return function(*args).numpy().tobytes()
        return (ndl.jit(function) if mode == "jit" else function)(*args).numpy().tobytes()
    except (ValueError, IndexError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", LABELLED)
def test_labels_out_of_range_are_refused_alike_in_every_mode(name: str) -> None:
    kind, who = (IndexError if name == "one_hot" else ValueError), name.split(",")[0]
    x = ndl.Tensor(np.random.default_rng(0).standard_normal((37, 5)), dtype="float32")
    right = np.arange(37) % 5
    for bad in (None, 5, -1, -100, 2**40):
        labels = right.copy()
        if bad is not None:
            labels[33] = bad
        y = ndl.Tensor(labels)
        found = [outcome(mode, LABELLED[name], x, y) for mode in ("eager", "lazy", "jit")]
        assert found[0] == found[1] == found[2]
        if bad is None or bad == -100 and name != "one_hot":
            assert isinstance(found[0], bytes)
        else:
            assert found[0] == (kind, f"{who}: expected labels from 0 to 4; received {bad}")


@pytest.mark.parametrize("device", [ndl.cpu(), ndl.cpu_numpy()])
def test_labels_of_images_are_checked_and_ignored(device: Any) -> None:
    x = ndl.ones(2, 3, 4, 5, device=device)
    labels = np.full((2, 4, 5), 255)
    labels[1, 2, 3] = 2
    jitted = ndl.jit(lambda x, y: ndl.cross_entropy(x, y, ignore_index=255))
    assert jitted(x, ndl.Tensor(labels, device=device)).item() == np.float32(math.log(3))
    labels[1, 3, 4] = 3
    with pytest.raises(ValueError, match="expected labels from 0 to 2; received 3"):
        jitted(x, ndl.Tensor(labels, device=device))


def test_a_step_that_is_refused_for_its_labels_changes_nothing() -> None:
    def trained(batches: list[np.ndarray]) -> list[bytes]:
        np.random.seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))
        optimizer = ndl.optim.Adam(model.parameters(), 0.1)
        x = ndl.Tensor(np.random.default_rng(1).standard_normal((9, 6)), dtype="float32")

        @ndl.jit
        def step(y: ndl.Tensor) -> ndl.Tensor:
            loss = ndl.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            return loss.detach()

        for labels in batches:
            if labels.max() > 2:
                with pytest.raises(ValueError, match="cross_entropy: .* from 0 to 2; received 3"):
                    step(ndl.Tensor(labels))
            else:
                step(ndl.Tensor(labels))
        state = {**model.state_dict(), **optimizer.state_dict()}
        return [x.numpy().tobytes() for x in state.values() if isinstance(x, ndl.Tensor)]

    good, bad = np.arange(9) % 3, np.arange(9) % 4
    expected = trained([good, good, good])
    assert trained([good, bad, good, bad, good]) == expected
    assert trained([good, good]) != expected
