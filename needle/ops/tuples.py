"""Ops on tuples of tensors. Next: elementwise.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from needle.array.spec import Spec
from needle.autograd import (
    MODE,
    Tensor,
    TensorOp,
    TensorTuple,
    TensorTupleOp,
    announce,
    is_lazy,
    primitive,
)


class Together(TensorTupleOp):
    """y = (a, b, ...)"""

    moves = True

    def infer(self, *specs: Spec) -> tuple[Spec, ...]:
        return specs

    def compute(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        return arrays


@primitive
class MakeTensorTuple(Together):
    """y = (a, b, ...);  each gradient is its item of dy"""

    def gradient(self, out_grad: TensorTuple, node: Any) -> tuple[Tensor, ...]:
        return tuple(out_grad)


@primitive
class TupleGetItem(TensorOp):
    """y = x[item] of a TensorTuple; backward adds dy to that item's gradient alone"""

    moves = True
    item: int

    def infer(self, *specs: Spec) -> Spec:
        return specs[self.item]

    def compute(self, *arrays: np.ndarray) -> np.ndarray:
        return arrays[self.item]

    def gradient(self, out_grad: Tensor, node: Any) -> TensorTuple:
        zeros = [each * 0.0 for each in node.inputs[0]]
        return make_tuple(*zeros[: self.item], out_grad, *zeros[self.item + 1 :])


@primitive
class FusedAddScalars(TensorTupleOp):
    """y = (x + c0, x + c1);  dx = dy[0] + dy[1]"""

    c0: float
    c1: float

    def infer(self, x: Spec) -> tuple[Spec, Spec]:
        return x, x

    def compute(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x + self.c0, x + self.c1

    def gradient(self, out_grad: TensorTuple, node: Any) -> Tensor:
        return out_grad[0] + out_grad[1]


def make_tuple(*tensors: Tensor) -> TensorTuple:
    """A TensorTuple of tensors."""
    return MakeTensorTuple()(*tensors)


def tuple_get_item(x: TensorTuple, index: int) -> Tensor:
    """One item of a TensorTuple."""
    if isinstance(x.op, MakeTensorTuple):
        return x.inputs[index]  # type: ignore[return-value]
    if x.cached_data is None or MODE.trace is not None or (x.op is not None and is_lazy()):
        return TupleGetItem(index)(x)
    data = x.cached_data[index]
    if x.requires_grad and data.form.is_float and MODE.grad:
        return announce(Tensor._new(TupleGetItem(index), (x,), data, True))
    return Tensor.make_const(data)


def fused_add_scalars(x: Tensor, c0: float, c1: float) -> TensorTuple:
    """(x + c0, x + c1)"""
    return FusedAddScalars(c0, c1)(x)
