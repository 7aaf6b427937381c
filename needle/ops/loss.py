"""Losses, as composites of an elementwise part and a reduction ("mean", "sum" or "none"). Next:
update.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from needle.array.spec import Spec
from needle.autograd import Tensor, primitive
from needle.dtype import int64
from needle.errors import expect
from needle.ops import elementwise as ew
from needle.ops.composite import Composite, differentiate
from needle.ops.elementwise import Operand, as_float, as_tensor, astype, widened
from needle.ops.index import Checked, as_indices
from needle.ops.movement import reshape, unsqueeze
from needle.ops.normalize import logsoftmax


def check_reduction(name: str, reduction: str) -> None:
    fits = reduction in ("mean", "sum", "none")
    expect(fits, f"{name}: expected reduction 'mean', 'sum' or 'none'; received {reduction!r}")


def reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / float(losses.shape[0] if reduction == "batchmean" else losses.size)


# Losses of two tensors


def huber(x: Tensor, y: Tensor, delta: float) -> Tensor:
    """d^2 / 2 where |d| <= delta, else delta * (|d| - delta / 2), d = x - y;  dx = d, at most
    delta"""
    d = (x - y).abs()
    near = ew.minimum(d, delta)
    return near * near * 0.5 + (d - near) * delta


def logistic(x: Tensor, y: Tensor, positive: Tensor | None = None) -> Tensor:
    """-(w y ln s(x) + (1 - y) ln(1 - s(x))), s the sigmoid, as (1 - y) x + (1 + (w - 1) y) ln(1 +
    e^-x)

    ln(1 + e^-x) is taken as ln(1 + e^-|x|) + max(-x, 0).
    """
    softplus = ew.log1p((-x.abs()).exp()) + ew.maximum(-x, 0.0)
    if positive is not None:
        softplus = softplus * ((positive - 1.0) * y + 1.0)
    return (1.0 - y) * x + softplus


def divergence(x: Tensor, y: Tensor, log_target: bool) -> Tensor:
    """y * (ln y - x), 0 where y is 0; of log_target y: e^y * (y - x);  dx = -y"""
    if log_target:
        return y.exp() * (y - x)
    safe = ew.where(y > 0.0, y, 1.0)
    return ew.where(y > 0.0, safe * (safe.log() - x), y * 0.0)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse_loss": lambda x, y: ew.square(x - y),
    "l1_loss": lambda x, y: (x - y).abs(),
    "huber_loss": huber,
    "bce_with_logits": logistic,
    "kl_div": divergence,
}


@primitive
class PairLoss(Composite):
    """y = what LOSSES says of two tensors of one shape, reduced. Inputs x, y, [more]; `settings`
    are the loss's own."""

    name: str
    reduction: str
    settings: tuple[float, ...]

    def check(self, x: Spec, y: Spec, *more: Spec) -> None:
        if (self.name, self.reduction) != ("kl_div", "batchmean"):
            check_reduction(self.name, self.reduction)
        fits, wanted = x.shape == y.shape, "expected input and target of one shape"
        expect(fits, f"{self.name}: {wanted}; received {x.shape} and {y.shape}")

    def expand(self, *inputs: Tensor) -> Tensor:
        return reduced(LOSSES[self.name](*inputs, *self.settings), self.reduction)


def pair_loss(name: str, reduction: str, settings: Any, x: Operand, *others: Operand) -> Tensor:
    x = widened(as_float(x))
    given = (astype(as_tensor(each, x), x.dtype) for each in others if each is not None)
    return PairLoss(name, reduction, settings)(x, *given)


def mse_loss(x: Operand, y: Operand, reduction: str = "mean") -> Tensor:
    """(x - y)^2;  dx = 2 (x - y)"""
    return pair_loss("mse_loss", reduction, (), x, y)


def l1_loss(x: Operand, y: Operand, reduction: str = "mean") -> Tensor:
    """|x - y|;  dx = sign(x - y)"""
    return pair_loss("l1_loss", reduction, (), x, y)


def huber_loss(x: Operand, y: Operand, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    """Quadratic for |x - y| <= delta, linear beyond (Huber, 1964)"""
    expect(delta > 0, f"huber_loss: expected delta > 0; received {delta}")
    return pair_loss("huber_loss", reduction, (float(delta),), x, y)


def bce_with_logits(
    x: Operand, y: Operand, pos_weight: Operand = None, reduction: str = "mean"
) -> Tensor:
    """Binary cross-entropy of logits x and targets y in [0, 1]; pos_weight weighs the positive
    class"""
    return pair_loss("bce_with_logits", reduction, (), x, y, pos_weight)


def kl_div(x: Operand, y: Operand, reduction: str = "mean", log_target: bool = False) -> Tensor:
    """y * (ln y - x) for log-probabilities x and probabilities y (log_target: their logarithms)

    reduction "batchmean", the divergence's own (Kullback and Leibler, 1951), divides the sum by x's
    first size.
    """
    return pair_loss("kl_div", reduction, (bool(log_target),), x, y)


# Losses of class labels


@primitive
class ClassLoss(Composite):
    """-weight[y] * x[y], of log-probabilities x (n, classes, ...) and labels y (n, ...), or of
    x (classes,) and y (); "cross_entropy" is that of logsoftmax(x)

    Inputs x, y, [weight (classes,)]. Ignored labels count nothing; "mean" divides by the sum of the
    weights of the labels. With label smoothing s, the target is (1 - s) on the label and
    s / classes on every class (Szegedy et al., 2016).
    """

    name: str
    ignore_index: int
    label_smoothing: float
    reduction: str

    def check(self, x: Spec, y: Spec, *weight: Spec) -> None:
        check_reduction(self.name, self.reduction)
        wanted, smoothing = "expected label_smoothing between 0 and 1", self.label_smoothing
        expect(0 <= smoothing <= 1, f"{self.name}: {wanted}; received {smoothing}")
        axis = class_axis(x)
        fits = x.ndim and y.shape == x.shape[:axis] + x.shape[axis + 1 :]
        wanted = f"expected labels for classes along axis 1 of {x.shape}"
        expect(fits, f"{self.name}: {wanted}; received labels {y.shape}")
        for each in weight:
            wanted = f"expected a weight for each of {x.shape[axis]} classes"
            fits = each.shape == (x.shape[axis],)
            expect(fits, f"{self.name}: {wanted}; received {each.shape}")

    def expand(self, x: Tensor, y: Tensor, *weight: Tensor) -> Tensor:
        return self.loss(x, y, weight, is_known=False)

    def expand_gradient(self, dy: Tensor, *inputs: Tensor) -> Any:
        """That of labels which forward has checked."""
        known = SimpleNamespace(expand=lambda x, y, *weight: self.loss(x, y, weight, is_known=True))
        rest = len(inputs) - 1
        return (*differentiate(known, [dy], inputs, (True, *[False] * rest)), *[None] * rest)

    def loss(self, x: Tensor, y: Tensor, weight: Sequence[Tensor], is_known: bool) -> Tensor:
        axis = class_axis(x)
        classes, smoothing = x.shape[axis], self.label_smoothing
        column = (classes,) + (1,) * (x.ndim - axis - 1)  # how a number for each class meets x
        x = logsoftmax(x, axis) if self.name == "cross_entropy" else x
        counts = ew.not_equal(y, self.ignore_index)
        hit = ew.equal(unsqueeze(y, axis), reshape(np.arange(classes, dtype=y.dtype), column))
        hit = ew.logical_and(hit, unsqueeze(counts, axis))
        scale = counts.astype(x.dtype)
        weighted = x * reshape(weight[0], column) if weight else x
        picked = -ew.where(hit, weighted, 0.0).sum(axis)
        if not is_known:  # once per label; an ignored one has picked -0.0 as it is
            who = f"{self.name}: expected labels"
            label = Checked(who, classes, False, self.ignore_index, True)(y)
            picked = ew.where(ew.not_equal(label, self.ignore_index), picked, -0.0)
        if smoothing:
            spread = -weighted.sum(axis) * (smoothing / classes) * scale
            picked = picked * (1 - smoothing) + spread
        if self.reduction != "mean":
            return reduced(picked, self.reduction)
        if weight:
            scale = ew.where(hit, reshape(weight[0], column), 0.0)
        return picked.sum() / scale.sum()


def class_axis(x: Spec | Tensor) -> int:
    return min(x.ndim - 1, 1)


def class_loss(
    name: str, x: Operand, labels: Operand, weight: Operand, ignore_index: int, smoothing: float,
    reduction: str,
) -> Tensor:  # fmt: skip
    x = widened(as_float(x))
    labels = astype(as_indices(f"{name} labels", labels, x), int64)
    more = () if weight is None else (astype(as_tensor(weight, x).detach(), x.dtype),)
    return ClassLoss(name, ignore_index, smoothing, reduction)(x, labels, *more)


def cross_entropy(
    logits: Operand, labels: Operand, weight: Operand = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Softmax cross-entropy of logits (n, classes, ...) and integer labels (n, ...);
    dx = softmax(x) - one_hot(y)

    weight: (classes,); label_smoothing (Szegedy et al., 2016) in [0, 1]; labels equal to
    ignore_index count nothing.
    """
    settings = ignore_index, label_smoothing, reduction
    return class_loss("cross_entropy", logits, labels, weight, *settings)


def nll_loss(
    x: Operand, labels: Operand, weight: Operand = None, ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """Negative log-likelihood of log-probabilities (n, classes, ...) and integer labels (n,
    ...)."""
    return class_loss("nll_loss", x, labels, weight, ignore_index, 0.0, reduction)
