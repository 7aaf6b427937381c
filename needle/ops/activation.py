"""Activations, as composites. Next: normalize.py."""

from __future__ import annotations

import math

from needle.autograd import Tensor, primitive
from needle.ops.composite import Composite
from needle.ops.elementwise import Operand, as_float, erf, expm1, log1p, maximum, minimum, where

# Beyond it e^-x and 1 - erf(x) are 0 in every dtype; x clipped to it keeps inf * 0 out of y and dx.
FAR = 1e4


@primitive
class Sigmoid(Composite):
    """y = 1 / (1 + e^-x);  dx = dy * y * (1 - y)"""

    reads_output = True

    def expand(self, x: Tensor) -> Tensor:
        return 1.0 / ((-x).exp() + 1.0)

    def expand_gradient(self, out_grad: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return out_grad * y * (1.0 - y)


@primitive
class SiLU(Composite):
    """y = x * sigmoid(x) (Hendrycks and Gimpel, 2016);
    dx = dy * s * (1 + x * (1 - s)), s = sigmoid(x)"""

    def expand(self, x: Tensor) -> Tensor:
        return x.clip(-FAR) / ((-x).exp() + 1.0)

    def expand_gradient(self, out_grad: Tensor, x: Tensor) -> Tensor:
        s = 1.0 / ((-x).exp() + 1.0)
        return out_grad * s * (x.clip(-FAR, FAR) * (1.0 - s) + 1.0)


@primitive
class GELU(Composite):
    """y = x * P(X <= x), X standard normal (Hendrycks and Gimpel, 2016);
    dx = dy * (P(X <= x) + x * density(x))

    approximate "none": P by erf; "tanh": y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3)))
    """

    approximate: str = "none"

    def expand(self, x: Tensor) -> Tensor:
        half = x.clip(-FAR) * 0.5
        if self.approximate == "none":
            return half * (erf(x * math.sqrt(0.5)) + 1.0)
        return half * (((x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)).tanh() + 1.0)

    def expand_gradient(self, out_grad: Tensor, x: Tensor) -> Tensor:
        x = x.clip(-FAR, FAR)
        if self.approximate == "none":
            density = (x * x * -0.5).exp() * (1 / math.sqrt(2 * math.pi))
            return out_grad * ((erf(x * math.sqrt(0.5)) + 1.0) * 0.5 + x * density)
        k = math.sqrt(2 / math.pi)
        t = ((x + x * x * x * 0.044715) * k).tanh()
        slope = x * 0.5 * (1.0 - t * t) * (x * x * (3 * 0.044715) + 1.0) * k
        return out_grad * ((t + 1.0) * 0.5 + slope)


@primitive
class Softplus(Composite):
    """y = ln(1 + e^(beta x)) / beta, linear where e^(beta x) overflows;
    dx = dy * sigmoid(beta x)"""

    beta: float = 1.0

    def expand(self, x: Tensor) -> Tensor:
        z = x * self.beta
        return (log1p((-z.abs()).exp()) + maximum(z, 0.0)) / self.beta

    def expand_gradient(self, out_grad: Tensor, x: Tensor) -> Tensor:
        return out_grad / ((x * -self.beta).exp() + 1.0)


@primitive
class ELU(Composite):
    """y = x where x > 0, else alpha * (e^x - 1) (Clevert et al., 2015);
    dx = dy, or dy * alpha * e^x"""

    alpha: float = 1.0

    def expand(self, x: Tensor) -> Tensor:
        return where(x > 0.0, x, expm1(minimum(x, 0.0)) * self.alpha)

    def expand_gradient(self, out_grad: Tensor, x: Tensor) -> Tensor:
        return where(x > 0.0, out_grad, out_grad * (minimum(x, 0.0).exp() * self.alpha))


@primitive
class LeakyReLU(Composite):
    """y = x where x > 0, else slope * x (Maas et al., 2013);  dx = dy, or slope * dy (also at 0)"""

    slope: float = 0.01

    def expand(self, x: Tensor) -> Tensor:
        return where(x > 0.0, x, x * self.slope)

    def expand_gradient(self, out_grad: Tensor, x: Tensor) -> Tensor:
        return where(x > 0.0, out_grad, out_grad * self.slope)


def sigmoid(x: Operand) -> Tensor:
    """1 / (1 + e^-x)"""
    return Sigmoid()(as_float(x))


def silu(x: Operand) -> Tensor:
    """x * sigmoid(x) (Hendrycks and Gimpel, 2016)"""
    return SiLU()(as_float(x))


def gelu(x: Operand, approximate: str = "none") -> Tensor:
    """x * P(X <= x), X standard normal (Hendrycks and Gimpel, 2016); approximate="tanh" for the
    quicker form"""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: expected approximate 'none' or 'tanh'; received {approximate!r}")
    return GELU(approximate)(as_float(x))


def softplus(x: Operand, beta: float = 1.0) -> Tensor:
    """ln(1 + e^(beta x)) / beta"""
    if not beta > 0:
        raise ValueError(f"softplus: expected beta > 0; received {beta}")
    return Softplus(float(beta))(as_float(x))


def elu(x: Operand, alpha: float = 1.0) -> Tensor:
    """x where x > 0, else alpha * (e^x - 1) (Clevert et al., 2015)"""
    return ELU(float(alpha))(as_float(x))


def leaky_relu(x: Operand, slope: float = 0.01) -> Tensor:
    """x where x > 0, else slope * x (Maas et al., 2013)"""
    return LeakyReLU(float(slope))(as_float(x))
