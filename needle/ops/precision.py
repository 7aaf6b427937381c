"""Which ops autocast runs in low precision, which in float32, which as they come. Next: random.py.

The lists are those of PyTorch's autocast on GPUs; mean, var, std and batch normalisation, which
PyTorch leaves to kernels that add in float32, stand in the list of float32. A composite is cast as
a whole: its expansion runs in the dtypes that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import needle.ops.activation as act
import needle.ops.contract as con
import needle.ops.conv as cv
import needle.ops.elementwise as ew
import needle.ops.index as ix
import needle.ops.loss as lo
import needle.ops.movement as mo
import needle.ops.normalize as no
import needle.ops.reduce as re
import needle.ops.scan as sc
import needle.ops.tuples as tu
import needle.ops.update as up
from needle.autograd import Op
from needle.ops.composite import CompositeGradient
from needle.ops.device import ToDevice
from needle.ops.elementwise import NARROWABLE, narrowed, widened
from needle.ops.random import RandomUniform

LOW: tuple[type[Op], ...] = (con.MatMul, con.BroadcastMatMul, cv.Conv, cv.ConvTranspose)
FLOAT32: tuple[type[Op], ...] = (
    ew.Exp, ew.Expm1, ew.Log, ew.Log1p, ew.Rsqrt, ew.EWisePow, ew.PowerScalar, act.Softplus,
    re.Summation, re.CumSum, no.Mean, no.Variance, no.StandardDeviation,
    no.LogSumExp, no.Softmax, no.LogSoftmax,
    no.LayerNorm, no.RMSNorm, no.BatchNorm, no.NormalizeWith, lo.PairLoss, lo.ClassLoss,
)  # fmt: skip
AS_GIVEN: tuple[type[Op], ...] = (
    # elementwise: in the widest of the operands' dtypes, as everywhere
    ew.EWiseAdd, ew.Subtract, ew.AddScalar, ew.EWiseMul, ew.MulScalar, ew.EWiseDiv, ew.DivScalar,
    ew.Negate, ew.Abs, ew.Sign, ew.Sqrt, ew.Sin, ew.Cos, ew.Tanh, ew.Erf, ew.ReLU, ew.Floor,
    ew.Ceil, ew.Round, ew.Remainder, ew.FloorDivide, ew.Maximum, ew.Minimum, ew.Equal, ew.NotEqual,
    ew.Less, ew.LessEqual, ew.LogicalAnd, ew.LogicalOr, ew.LogicalNot, ew.Where, ew.Clip,
    ew.Cast, ew.StopGradient, ew.BroadcastTo, no.Masked,
    act.Sigmoid, act.SiLU, act.GELU, act.ELU, act.LeakyReLU,
    # choice and movement
    re.Max, re.Min, re.ArgMax, re.ArgMin, ix.ArgSort, ix.Gather, ix.ScatterAdd, ix.IndexCopy,
    ix.Checked,
    mo.Reshape, mo.After, mo.Permute, mo.Transpose, mo.Slice, mo.Unslice, mo.Pad, mo.Flip,
    mo.Dilate, mo.UnDilate, mo.Concatenate, mo.Stack, mo.Split, cv.Windows, ToDevice,
    tu.MakeTensorTuple, tu.TupleGetItem, tu.FusedAddScalars,
    # what never runs in low precision for autocast's sake
    CompositeGradient, RandomUniform, up.ClippedByNorm, up.BiasCorrection, up.SGDUpdate,
    up.AdagradUpdate, up.RMSpropUpdate, up.AdamUpdate, up.LionUpdate, up.AdafactorUpdate,
    up.Unscaled, up.ScaleUpdate, no.RunningStatistics, sc.Scan,
)  # fmt: skip
CASTS: dict[type[Op], Callable[[Any], Any]] = {
    **dict.fromkeys(LOW, narrowed),
    **dict.fromkeys(FLOAT32, widened),
}


def cast_operands(op: Op, inputs: Sequence[Any]) -> Any:
    """The operands of an op as autocast gives them to it; to a user's own op, and to a contraction
    of float64 or integers, as they are."""
    cast = CASTS.get(type(op))
    if cast is None or (cast is narrowed and not all([x.dtype in NARROWABLE for x in inputs])):
        return inputs
    return tuple([cast(x) for x in inputs])
