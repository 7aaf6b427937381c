"""Activations and dropout as modules: functions without parameters. Next: linear.py.

Those without settings are their functions; the settings of the others are dataclass fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from needle.autograd import Tensor
from needle.nn import functional
from needle.nn.module import Function, Module


class Identity(Module):
    """y = x"""

    def forward(self, x: Tensor) -> Tensor:
        return x


class ReLU(Module):
    """y = max(x, 0)"""

    forward = staticmethod(functional.relu)


class SiLU(Module):
    """y = x * sigmoid(x) (Hendrycks and Gimpel, 2016)"""

    forward = staticmethod(functional.silu)


class Sigmoid(Module):
    """y = 1 / (1 + e^-x)"""

    forward = staticmethod(functional.sigmoid)


class Tanh(Module):
    """y = (e^x - e^-x) / (e^x + e^-x)"""

    forward = staticmethod(functional.tanh)


class LeakyReLU(Function):
    """y = x where x > 0, else slope * x (Maas et al., 2013)"""

    function = staticmethod(functional.leaky_relu)
    slope: float = 0.01


class ELU(Function):
    """y = x where x > 0, else alpha * (e^x - 1) (Clevert et al., 2015)"""

    function = staticmethod(functional.elu)
    alpha: float = 1.0


class GELU(Function):
    """y = x * P(X <= x), X standard normal; approximate="tanh" for the quicker form

    (Hendrycks and Gimpel, 2016)
    """

    function = staticmethod(functional.gelu)
    approximate: str = "none"


class Softplus(Function):
    """y = ln(1 + e^(beta x)) / beta"""

    function = staticmethod(functional.softplus)
    beta: float = 1.0


class Softmax(Function):
    """y = e^x / (sum of e^x over axes), axes being an int, several, or None for all."""

    function = staticmethod(functional.softmax)
    axes: Any = -1


class LogSoftmax(Function):
    """y = x - ln(sum of e^x over axes), axes being an int, several, or None for all."""

    function = staticmethod(functional.log_softmax)
    axes: Any = -1


class Dropout(Module):
    """y = x * mask / (1 - p) in training, else x; an element is kept with probability 1 - p.

    In training the mask is drawn whatever p is. (Srivastava et al., 2014)
    """

    def __init__(self, p: float = 0.5) -> None:
        self.p = functional.check_probability(p)

    def forward(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.p, self.training)


class DropoutChannels(Dropout):
    """Dropout of whole channels, of x (n, channels, *sizes) or, where channels_last, (n, *sizes,
    channels) (Tompson et al., 2015)"""

    function: Callable[..., Tensor]

    def __init__(self, p: float = 0.5, channels_last: bool = False) -> None:
        super().__init__(p)
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.p, self.training, channels_last=self.channels_last)


class Dropout1d(DropoutChannels):
    """Dropout of channels, x (n, channels, length)"""

    function = staticmethod(functional.dropout1d)


class Dropout2d(DropoutChannels):
    """Dropout of channels, x (n, channels, height, width)"""

    function = staticmethod(functional.dropout2d)


class Dropout3d(DropoutChannels):
    """Dropout of channels, x (n, channels, depth, height, width)"""

    function = staticmethod(functional.dropout3d)
