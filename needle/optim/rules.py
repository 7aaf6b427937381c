"""The optimizers, from the simple to the complex: each a choice of states and of an update.

SGD, Lion (one mean of gradients); Adagrad, RMSprop, Adam, AdamW (steps divided by the gradients'
size, per element); Adafactor (that size kept as rows and columns). The arithmetic stands in
needle/ops/update.py. Next: scaling.py.
"""

from __future__ import annotations

from needle.ops import minimum, update
from needle.optim.optimizer import Optimizer, ParameterGroup, Params, Update


class SGD(Optimizer):
    """Gradient descent with momentum: p moves by lr against a running mean of the gradients.

    g = grad + weight_decay * p;  u = momentum * u + (1 - dampening) * g;  p = p - lr * u

    u begins at 0. dampening: None stands for momentum, so that u is a mean, as in the course; with
    dampening=0 u is a sum, up to 1 / (1 - momentum) times as large, as in PyTorch. nesterov: the
    step is (1 - dampening) * g + momentum * u (Sutskever et al., 2013). Without momentum
    p = p - lr * g. ValueError: nesterov without momentum, and Optimizer's.
    """

    def __init__(
        self, params: Params, lr: float = 0.01, momentum: float = 0.0, weight_decay: float = 0.0,
        *, nesterov: bool = False, dampening: float | None = None,
    ) -> None:  # fmt: skip
        options = {"nesterov": nesterov, "dampening": dampening}
        super().__init__(params, lr, momentum=momentum, weight_decay=weight_decay, **options)
        if any(group["nesterov"] and not group["momentum"] for group in self.param_groups):
            raise ValueError("SGD: expected momentum above 0 for nesterov; received 0")
        self.u = self.zeros("momentum")

    def update(self, group: ParameterGroup) -> Update:
        momentum, dampening = group["momentum"], group["dampening"]
        dampening = momentum if dampening is None else dampening
        op = update.SGDUpdate(momentum, dampening, group["weight_decay"], group["nesterov"])
        return op, (group.rate,), (self.u,)


class Lion(Optimizer):
    """Every element moves by lr, against the sign of a mean of the gradients (Chen et al., 2023).

    p = p - lr * (sign(beta1 m + (1 - beta1) g) + weight_decay * p);  m = beta2 m + (1 - beta2) g

    A good lr is 3 to 10 times smaller than AdamW's, and weight_decay as many times larger.
    """

    def __init__(
        self, params: Params, lr: float = 1e-4, beta1: float = 0.9, beta2: float = 0.99,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay)
        self.m = self.zeros()

    def update(self, group: ParameterGroup) -> Update:
        return update.LionUpdate(**group.options), (group.rate,), (self.m,)


class Adagrad(Optimizer):
    """Each element's step shrinks with the sum of its squared gradients (Duchi et al., 2011).

    g = grad + weight_decay * p;  s = s + g^2;  p = p - lr * g / (sqrt(s) + eps)
    """

    def __init__(
        self, params: Params, lr: float = 0.01, eps: float = 1e-10, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, lr, eps=eps, weight_decay=weight_decay)
        self.s = self.zeros()

    def update(self, group: ParameterGroup) -> Update:
        return update.AdagradUpdate(**group.options), (group.rate,), (self.s,)


class RMSprop(Optimizer):
    """The gradient over the root of a running mean of its square (Tieleman and Hinton, 2012).

    g = grad + weight_decay * p;  v = alpha v + (1 - alpha) g^2;  p = p - lr * g / (sqrt(v) + eps)

    centered: v - a^2 in place of v, with a = alpha a + (1 - alpha) g (Graves, 2013). momentum:
    u = momentum * u + g / (sqrt(v) + eps);  p = p - lr * u.
    """

    def __init__(
        self, params: Params, lr: float = 0.01, alpha: float = 0.99, eps: float = 1e-8,
        weight_decay: float = 0.0, momentum: float = 0.0, centered: bool = False,
    ) -> None:  # fmt: skip
        options = {"weight_decay": weight_decay, "momentum": momentum, "centered": centered}
        super().__init__(params, lr, alpha=alpha, eps=eps, **options)
        self.v, self.a, self.u = self.zeros(), self.zeros("centered"), self.zeros("momentum")

    def update(self, group: ParameterGroup) -> Update:
        return update.RMSpropUpdate(**group.options), (group.rate,), (self.v, self.a, self.u)


class Adam(Optimizer):
    """Steps from running means of the gradient and of its square (Kingma and Ba, 2015).

    g = grad + weight_decay * p;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
    p = p - lr * (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    t counts the optimizer's steps, from 1; m and v begin at 0.
    """

    decoupled = False  # whether weight decay shrinks p instead of adding to the gradient

    def __init__(
        self, params: Params, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.999,
        eps: float = 1e-8, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
        self.m, self.v = self.zeros(), self.zeros()

    def update(self, group: ParameterGroup) -> Update:
        corrections = update.BiasCorrection(group["beta1"], group["beta2"])(self.t)
        op = update.AdamUpdate(**group.options, decoupled=self.decoupled)
        return op, (group.rate, *corrections), (self.m, self.v)


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019).

    p = p * (1 - lr * weight_decay), then Adam's step without weight decay.
    """

    decoupled = True

    def __init__(
        self, params: Params, lr: float = 1e-3, beta1: float = 0.9, beta2: float = 0.999,
        eps: float = 1e-8, weight_decay: float = 0.01,
    ) -> None:  # fmt: skip
        super().__init__(params, lr, beta1, beta2, eps, weight_decay)


class Adafactor(Optimizer):
    """Adam's second moment in the memory of a row and a column (Shazeer and Stern, 2018).

    share = t^decay_rate;  v = (1 - share) v + share (g^2 + eps1);  u = g / sqrt(v)
    u = u / max(1, rms(u) / clip);  rho = min(lr, 1 / sqrt(t))
    p = p * (1 - lr * weight_decay) - rho * max(eps2, rms(p)) * u

    Of a parameter with two axes or more only v's means over the last axis (row) and over the one
    before it (column) are kept, and v = row * column / mean(row). rms(x) = sqrt(mean of x^2).
    scale_parameter=False: the step is rho * u.
    """

    def __init__(
        self, params: Params, lr: float = 0.01, decay_rate: float = -0.8, eps1: float = 1e-30,
        eps2: float = 1e-3, clip: float = 1.0, weight_decay: float = 0.0,
        scale_parameter: bool = True,
    ) -> None:  # fmt: skip
        options = {"clip": clip, "weight_decay": weight_decay, "scale_parameter": scale_parameter}
        super().__init__(params, lr, decay_rate=decay_rate, eps1=eps1, eps2=eps2, **options)
        matrices = [p for p in self.params if p.ndim > 1]
        self.row = {p: self.zeros_for(p, p.shape[:-1]) for p in matrices}
        self.column = {p: self.zeros_for(p, (*p.shape[:-2], p.shape[-1])) for p in matrices}
        self.v = {p: self.zeros_for(p, p.shape) for p in self.params if p.ndim < 2}

    def update(self, group: ParameterGroup) -> Update:
        options = dict(group.options)
        share = self.t ** options.pop("decay_rate")
        numbers = (group.rate, minimum(group.rate, self.t**-0.5), share)
        return update.AdafactorUpdate(**options), numbers, (self.row, self.column, self.v)
