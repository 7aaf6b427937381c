"""Linear maps, and the flattening that precedes them. Next: normalization.py."""

from __future__ import annotations

from typing import Any

from needle.autograd import Tensor
from needle.errors import expect
from needle.init import kaiming_uniform
from needle.nn import functional
from needle.nn.module import Module, Parameter


class Linear(Module):
    """y = x @ weight + bias, from (..., in_features) to (..., out_features).

    weight (in_features, out_features) and bias (1, out_features) are drawn by kaiming_uniform, in
    this order, the bias as from one input for each of out_features outputs (as in the course).
    """

    outputs_first = ("weight",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = "float32",
    ) -> None:
        self.in_features, self.out_features = in_features, out_features
        place = {"device": device, "dtype": dtype}
        self.weight = Parameter(kaiming_uniform(in_features, out_features, **place))
        drawn = kaiming_uniform(out_features, 1, (1, out_features), **place) if bias else None
        self.bias = None if drawn is None else Parameter(drawn)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)


class Flatten(Module):
    """y = x with all axes but the first made one: (n, ...) to (n, features)."""

    def forward(self, x: Tensor) -> Tensor:
        expect(x.ndim, "flatten: expected a tensor with axes; received a scalar")
        return functional.flatten(x, 1) if x.ndim > 1 else x.unsqueeze(1)
