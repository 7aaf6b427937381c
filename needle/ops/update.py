"""Optimizer updates: one parameter's step, as one composite each. Next: random.py.

Every update takes (parameter, gradient, learning rate, other numbers, states) and gives (parameter,
states); needle.optim keeps the states. What changes from step to step is a 0-d float64 tensor, cast
once. States, and the arithmetic, are in the parameter's dtype, or in float32 where that is float16
or bfloat16. ClippedByNorm limits gradients before an update; Unscaled and ScaleUpdate are those of
a loss that was scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from needle.autograd import Tensor, primitive
from needle.dtype import LOW_PRECISION, DType, float32, promote
from needle.errors import expect
from needle.ops.composite import CompositeTuple
from needle.ops.elementwise import (
    astype,
    isnan,
    maximum,
    minimum,
    not_equal,
    rsqrt,
    sign,
    sqrt,
    where,
)
from needle.ops.index import Gather, IndexCopy, ScatterAdd, last_places
from needle.ops.movement import flatten, reshape, stack, unsqueeze
from needle.ops.normalize import average
from needle.ops.reduce import any as any_of
from needle.ops.reduce import norm, summation


def working_dtype(dtype: DType) -> DType:
    """What an update of a parameter of this dtype computes in, and keeps its states in."""
    return float32 if dtype in LOW_PRECISION else dtype


def update_rows(
    update: Callable[..., Any], p: Tensor, grad: Any, numbers: Sequence[Tensor], *states: Tensor
) -> list[Tensor]:
    """An update of the rows of p and of its states whose gradient is not all zeros; others stay.

    Where the gradient is that of rows read by index and was not asked for, nothing else is read or
    written: the gradients of a row that was read twice are added, in order, as in the whole.
    """
    shapes = {x.shape for x in states} - {p.shape}
    expect(not shapes, f"step: expected states of shape {p.shape} for rows; received {shapes}")
    if type(grad.op) is not ScatterAdd or grad.cached_data is not None or len(grad.inputs) > 2:
        return moved(update, grad, numbers, (p, *states))
    source, index = grad.inputs
    index = flatten(index)
    rows = reshape(source, (len(index), *p.shape[1:]))
    last = last_places(index, len(p))
    g = Gather(0)(ScatterAdd(0, rows.shape)(rows, last), last)
    found = moved(update, g, numbers, [Gather(0)(x, index) for x in (p, *states)])
    pairs = zip((p, *states), found, strict=True)
    return [IndexCopy(0)(x, each, index) for x, each in pairs]


def moved(
    update: Callable[..., Any], grad: Tensor, numbers: Sequence[Tensor], held: Sequence[Tensor]
) -> list[Tensor]:
    """What is held after an update, of rows without gradient as it was."""
    has = any_of(not_equal(grad, 0.0), tuple(range(1, grad.ndim)), keepdims=True)
    found = update(held[0], grad, *numbers, *held[1:])
    return [where(has, new, old) for old, new in zip(held, found, strict=True)]


class Update(CompositeTuple):
    """One step of one parameter: p moves by what `step` says, against the gradient.

    weight_decay * p is added to the gradient first, or, where `decoupled`, p shrinks by
    lr * weight_decay, the factor being rounded to p's dtype once. Inputs p, grad, lr, ...
    """

    decoupled = False
    weight_decay: float

    def step(self, x: Tensor, g: Tensor, lr: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """(move, states) from the parameter, its gradient and what else there is."""
        raise NotImplementedError(f"{type(self).__name__}: step is not written")

    def expand(self, p: Tensor, grad: Tensor, lr: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        dtype = working_dtype(p.dtype)
        x, g = astype(p, dtype), astype(grad, dtype)
        if self.weight_decay and not self.decoupled:
            g = g + x * self.weight_decay
        move, *states = self.step(x, g, lr, *rest)
        if self.weight_decay and self.decoupled:
            x = x * astype(1.0 - lr * self.weight_decay, dtype)
        return astype(x - move, p.dtype), *states


@primitive
class SGDUpdate(Update):
    """u = momentum * u + (1 - dampening) * g with g = grad + weight_decay * p;  p = p - lr * u

    Without momentum p = p - lr * g. nesterov: p = p - lr * ((1 - dampening) * g + momentum * u),
    the step that the next gradient would see (Sutskever et al., 2013). Inputs p, grad, lr, [u].
    """

    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool

    def step(self, x: Tensor, g: Tensor, lr: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        lr = astype(lr, g.dtype)
        if not state:
            return (g * lr,)
        g = g * (1 - self.dampening) if self.dampening else g
        u = state[0] * self.momentum + g
        return (u * self.momentum + g if self.nesterov else u) * lr, u


@primitive
class AdagradUpdate(Update):
    """s = s + g^2;  p = p - lr * g / (sqrt(s) + eps) (Duchi et al., 2011)

    weight_decay * p is added to g first. Inputs p, g, lr, s.
    """

    eps: float
    weight_decay: float

    def step(self, x: Tensor, g: Tensor, lr: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        s = s + g * g
        return g * astype(lr, g.dtype) / (sqrt(s) + self.eps), s


@primitive
class RMSpropUpdate(Update):
    """v = alpha v + (1 - alpha) g^2;  p = p - lr * g / (sqrt(v) + eps) (Tieleman and Hinton, 2012)

    centered: sqrt(v - a^2) for sqrt(v), with a = alpha a + (1 - alpha) g (Graves, 2013). momentum:
    u = momentum * u + the step; p = p - lr * u. Inputs p, g, lr, v, [a], [u].
    """

    alpha: float
    eps: float
    weight_decay: float
    momentum: float
    centered: bool

    def step(self, x: Tensor, g: Tensor, lr: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        v = states[0] * self.alpha + g * g * (1 - self.alpha)
        found, spread = [v], v
        if self.centered:
            a = states[1] * self.alpha + g * (1 - self.alpha)
            found.append(a)
            spread = maximum(v - a * a, 0.0)
        u = g / (sqrt(spread) + self.eps)
        if self.momentum:
            u = states[-1] * self.momentum + u
            found.append(u)
        return u * astype(lr, g.dtype), *found


@primitive
class BiasCorrection(CompositeTuple):
    """(1 - b1^t, 1 - b2^t): the shares of a mean's weights that t steps from zero have handed out

    (Kingma and Ba, 2015, section 3). Input t, float64.
    """

    beta1: float
    beta2: float

    def expand(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return 1.0 - self.beta1**t, 1.0 - self.beta2**t


@primitive
class AdamUpdate(Update):
    """m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p = p - lr * (m / c1) / (sqrt(v / c2) + eps)

    c1 and c2 correct the bias (BiasCorrection; Kingma and Ba, 2015). decoupled: p shrinks by
    lr * weight_decay first (AdamW, Loshchilov and Hutter, 2019); else weight_decay * p is added to
    g. Inputs p, g, lr, c1, c2, m, v.
    """

    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool

    def step(self, x: Tensor, g: Tensor, lr: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        c1, c2, m, v = rest
        rate, root = astype(lr / c1, g.dtype), astype(sqrt(c2), g.dtype)
        m = m * self.beta1 + g * (1 - self.beta1)
        v = v * self.beta2 + g * g * (1 - self.beta2)
        return m * rate / (sqrt(v) / root + self.eps), m, v


@primitive
class LionUpdate(Update):
    """p = p - lr * (sign(b1 m + (1 - b1) g) + weight_decay * p);  m = b2 m + (1 - b2) g

    (Chen et al., 2023). Inputs p, g, lr, m.
    """

    decoupled = True
    beta1: float
    beta2: float
    weight_decay: float

    def step(self, x: Tensor, g: Tensor, lr: Tensor, m: Tensor) -> tuple[Tensor, ...]:
        direction = sign(m * self.beta1 + g * (1 - self.beta1))
        return direction * astype(lr, g.dtype), m * self.beta2 + g * (1 - self.beta2)


@primitive
class AdafactorUpdate(Update):
    """v = (1 - share) v + share (g^2 + eps1);  u = g / sqrt(v);  u = u / max(1, rms(u) / clip)
    p = p - rho * max(eps2, rms(p)) * u

    (Shazeer and Stern, 2018, algorithms 4 to 6, without first moment.) share = t^decay_rate. Of a
    matrix (the last two axes) only the means of v over columns and over rows are kept, and
    v = row * column / mean(row). Without scale_parameter the step is rho * u. weight_decay is
    decoupled, by lr. Inputs p, g, lr, rho, share, then row and column, or v.
    """

    decoupled = True
    eps1: float
    eps2: float
    clip: float
    weight_decay: float
    scale_parameter: bool

    def step(self, x: Tensor, g: Tensor, lr: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        rho, share, *states = [astype(each, g.dtype) for each in rest]
        squares, last = g * g + self.eps1, g.ndim - 1
        if len(states) == 1:
            found = [states[0] * (1.0 - share) + squares * share]
            u = g * rsqrt(found[0])
        else:
            means = [average(squares, (axis,), keepdims=False) for axis in (last, last - 1)]
            pairs = zip(states, means, strict=True)
            found = [state * (1.0 - share) + each * share for state, each in pairs]
            ratio = found[0] / average(found[0], (last - 1,))
            u = g * unsqueeze(rsqrt(ratio), -1) * unsqueeze(rsqrt(found[1]), -2)
        u = u / maximum(root_mean_square(u) / self.clip, 1.0)
        rho = rho * maximum(root_mean_square(x), self.eps2) if self.scale_parameter else rho
        return u * rho, *found


def root_mean_square(x: Tensor) -> Tensor:
    return sqrt(average(x * x, tuple(range(x.ndim)), keepdims=False))


@primitive
class ClippedByNorm(CompositeTuple):
    """(n, g1 * c, g2 * c, ...) with n the norm of all elements, c = min(1, max_norm / (n + 1e-6))

    n = (sum of |g|^ord)^(1/ord), the largest |g| for ord = inf, in the widest of the dtypes.
    (Pascanu et al., 2013.) Inputs g1, g2, ...
    """

    max_norm: float
    ord: float

    def expand(self, *grads: Tensor) -> tuple[Tensor, ...]:
        wide = [astype(g, working_dtype(g.dtype)) for g in grads]
        dtype = promote("clip_grad_norm", *(g.dtype for g in wide))
        total = norm(stack([astype(norm(g, self.ord), dtype) for g in wide], 0), self.ord)
        scale = minimum(self.max_norm / (total + 1e-6), 1.0)
        clipped = (x * astype(scale, x.dtype) for x in wide)
        return (total, *(astype(x, g.dtype) for x, g in zip(clipped, grads, strict=True)))


@primitive
class Unscaled(CompositeTuple):
    """(whether an infinity or NaN is among the results, g1 / scale, g2 / scale, ...)

    That is one sum of 0 * g over all: NaN if there is, else 0. Inputs scale (0-d, float64), g1, ...
    """

    def expand(self, scale: Tensor, *grads: Tensor) -> tuple[Tensor, ...]:
        wide = [astype(g, working_dtype(g.dtype)) for g in grads]
        found = [g * astype(1.0 / scale, g.dtype) for g in wide]
        sums = [astype(summation(g * 0.0), float32) for g in found]
        results = (astype(x, g.dtype) for x, g in zip(found, grads, strict=True))
        return isnan(summation(stack(sums, 0))), *results


@primitive
class ScaleUpdate(CompositeTuple):
    """(scale, steps): the loss scale after a step, and how many steps it has stood since

    scale * backoff where the step found an infinity, scale * growth after `interval` steps without
    one, unless float32 cannot hold it (Micikevicius et al., 2018). Inputs scale, steps (0-d,
    float64), found (bool).
    """

    growth: float
    backoff: float
    interval: float

    def expand(self, scale: Tensor, steps: Tensor, found: Tensor) -> tuple[Tensor, Tensor]:
        steps, grown = where(found, 0.0, steps + 1.0), scale * self.growth
        full = steps >= self.interval
        grows = full & (grown <= float(np.finfo(np.float32).max))
        stands = where(grows, grown, scale)
        return where(found, scale * self.backoff, stands), where(full, 0.0, steps)
