"""Losses as modules: functions whose settings are dataclass fields. Next: summary.py.

`reduction` is "mean", "sum" or "none".
"""

from __future__ import annotations

from typing import Any

from needle.autograd import Tensor
from needle.nn import functional
from needle.nn.module import Function, Module
from needle.ops.loss import check_reduction


class SoftmaxLoss(Module):
    """loss = mean of ln(sum of e^logits) - logits[y], of logits (n, classes) and labels y (n,)."""

    forward = staticmethod(functional.cross_entropy)


class Loss(Function):
    """What losses share: `reduction` is checked when one is made, and weights become buffers."""

    def __post_init__(self) -> None:
        settings = vars(self)
        if (self.function, settings["reduction"]) != (functional.kl_div, "batchmean"):
            check_reduction(type(self).__name__, settings["reduction"])
        for name, value in settings.items():
            if name.endswith("weight") and value is not None:
                setattr(self, name, Tensor(value, requires_grad=False))


class CrossEntropyLoss(Loss):
    """loss = -weight[y] * ln softmax(logits)[y], of logits (n, classes, ...) and labels (n, ...).

    "mean" divides by the sum of the labels' weights. Labels equal to ignore_index count nothing.
    label_smoothing s moves s of the target to all classes equally (Szegedy et al., 2016).
    """

    function = staticmethod(functional.cross_entropy)
    weight: Any = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    reduction: str = "mean"


class NLLLoss(Loss):
    """loss = -weight[y] * x[y], of log-probabilities x (n, classes, ...) and labels (n, ...)."""

    function = staticmethod(functional.nll_loss)
    weight: Any = None
    ignore_index: int = -100
    reduction: str = "mean"


class BCEWithLogitsLoss(Loss):
    """loss = -(pos_weight * y * ln s(x) + (1 - y) * ln(1 - s(x))), s the sigmoid, y in [0, 1]."""

    function = staticmethod(functional.bce_with_logits)
    pos_weight: Any = None
    reduction: str = "mean"


class MSELoss(Loss):
    """loss = (x - y)^2"""

    function = staticmethod(functional.mse_loss)
    reduction: str = "mean"


class L1Loss(Loss):
    """loss = |x - y|"""

    function = staticmethod(functional.l1_loss)
    reduction: str = "mean"


class HuberLoss(Loss):
    """loss = d^2 / 2 where |d| <= delta, else delta * (|d| - delta / 2), d = x - y (Huber, 1964)"""

    function = staticmethod(functional.huber_loss)
    delta: float = 1.0
    reduction: str = "mean"


class KLDivLoss(Loss):
    """loss = y * (ln y - x), of log-probabilities x and probabilities y (log_target: their logs).

    reduction "batchmean", the divergence's own, divides the sum by the number of samples.
    (Kullback and Leibler, 1951)
    """

    function = staticmethod(functional.kl_div)
    reduction: str = "mean"
    log_target: bool = False
