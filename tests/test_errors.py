"""What a user does wrong, and the sentence that says so: one table over all families of ops.

Every sentence has the form `op: what was expected; what was received`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import Tensor, init, ops

V, M, CUBE = Tensor(np.ones(3)), Tensor(np.ones((2, 3))), Tensor(np.ones((2, 3, 4)))
INT, BYTE, TRUE = Tensor([1, 2], dtype="int8"), Tensor([1, 2], dtype="uint8"), Tensor([True, False])
HALF, BRAIN = Tensor([1.0, 2.0], dtype="float16"), Tensor([1.0, 2.0], dtype="bfloat16")
LONG = Tensor([1, 2], dtype="int64")
LOGITS = Tensor(np.zeros((2, 3)))

ERRORS: dict[str, tuple[Any, type[Exception], str]] = {
    # Shapes that do not fit
    "add": (
        lambda: V + M.T,
        ValueError,
        r"add: expected shapes that broadcast together; received \(3,\) and \(3, 2\)",
    ),
    "subtract": (
        lambda: M - CUBE,
        ValueError,
        r"subtract: expected shapes that broadcast together; received .*",
    ),
    "where": (
        lambda: ndl.where(TRUE, V, V),
        ValueError,
        r"where: expected shapes that broadcast together; received .*",
    ),
    "maximum": (
        lambda: ndl.maximum(V, TRUE),
        ValueError,
        r"maximum: expected shapes that broadcast together; .*",
    ),
    "matmul": (lambda: M @ M, ValueError, r"matmul: inner dimensions differ: \(2, 3\) @ \(2, 3\)"),
    "matmul of vectors": (
        lambda: V @ TRUE,
        ValueError,
        r"matmul: inner dimensions differ: \(3,\) @ \(2,\)",
    ),
    "matmul of scalars": (
        lambda: V @ Tensor(1.0),
        ValueError,
        r"matmul: expected .*axes; received \(3,\) @ \(\); use \* with scalars",
    ),
    "matmul of batches": (
        lambda: Tensor(np.ones((2, 3, 4))) @ Tensor(np.ones((3, 4, 5))),
        ValueError,
        r"matmul: expected shapes that broadcast together; received \(2,\) and \(3,\)",
    ),
    "reshape": (
        lambda: M.reshape(4),
        ValueError,
        r"reshape: expected a shape of 6 elements; received \(4,\) for \(2, 3\)",
    ),
    "reshape, -1 twice": (
        lambda: M.reshape(-1, -1),
        ValueError,
        r"reshape: expected a shape of 6 elements; received \(-1, -1\) .*",
    ),
    "reshape, -2": (
        lambda: M.reshape(-2, -3),
        ValueError,
        r"reshape: expected sizes of at least -1; received \(-2, -3\)",
    ),
    "reshape, text": (
        lambda: M.reshape("ab"),
        TypeError,
        r"reshape: expected a shape of integers; received 'ab'",
    ),
    "reshape, floats": (
        lambda: M.reshape(6.0),
        TypeError,
        r"reshape: expected a shape of integers; received 6.0",
    ),
    "broadcast_to": (
        lambda: M.broadcast_to((3, 3)),
        ValueError,
        r"broadcast_to: expected a shape to which \(2, 3\) broadcasts; received \(3, 3\)",
    ),
    "broadcast_to, -1": (
        lambda: M.broadcast_to((-1, 3)),
        ValueError,
        r"broadcast_to: expected sizes of at least 0; received \(-1, 3\)",
    ),
    "concatenate": (
        lambda: ndl.concatenate([V, M]),
        ValueError,
        r"concatenate: expected shapes equal but for axis 0; received .*\(3,\), \(2, 3\).*",
    ),
    "concatenate nothing": (
        lambda: ndl.concatenate([]),
        ValueError,
        r"concatenate: expected at least one tensor; received none",
    ),
    "stack": (
        lambda: ndl.stack([V, M]),
        ValueError,
        r"stack: expected equal shapes; received .*\(3,\), \(2, 3\).*",
    ),
    "stack nothing": (
        lambda: ndl.stack([]),
        ValueError,
        r"stack: expected at least one tensor; received none",
    ),
    "split": (
        lambda: ndl.split(M, 1, (1, 1)),
        ValueError,
        r"split: expected sizes that add to 3; received \(1, 1\)",
    ),
    "split, size 0": (
        lambda: ndl.split(M, 1, 0),
        ValueError,
        r"split: expected a size of at least 1; received 0",
    ),
    "chunk": (lambda: ndl.chunk(M, 0), ValueError, r"chunk: expected at least 1 chunk; received 0"),
    "squeeze": (
        lambda: ndl.squeeze(M, 0),
        ValueError,
        r"squeeze: expected axes of size 1; received axes \(0,\) of shape \(2, 3\)",
    ),
    "pad": (
        lambda: ndl.pad(M, [(1, 1)]),
        ValueError,
        r"pad: expected 2 pairs of widths.*; received \(\(1, 1\),\)",
    ),
    "pad, no pairs": (
        lambda: ndl.pad(V, [(1, 2, 3)]),
        ValueError,
        r"pad: expected .*pair.* of widths.*; received .*\(1, 2, 3\).*",
    ),
    "pad, negative": (
        lambda: ndl.pad(V, -1),
        ValueError,
        r"pad: expected sizes of at least 0; received \(-1, -1\)",
    ),
    "pad, mode": (
        lambda: ndl.pad(V, 1, mode="edge"),
        ValueError,
        "pad: expected a mode of constant, reflect, replicate, circular; received 'edge'",
    ),
    "pad, a value that no mode but one has": (
        lambda: ndl.pad(V, 1, 2.0, mode="reflect"),
        ValueError,
        "pad: expected no value with 'reflect'; received 2.0",
    ),
    "pad, reflect": (
        lambda: ndl.pad(M, [(1, 0), (0, 3)], mode="reflect"),
        ValueError,
        r"pad: expected 'reflect' widths of at most 2 for size 3; received \(0, 3\)",
    ),
    "pad, circular": (
        lambda: ndl.pad(M, [(3, 0), (0, 0)], mode="circular"),
        ValueError,
        r"pad: expected 'circular' widths of at most 2 for size 2; received \(3, 0\)",
    ),
    "pad, replicate": (
        lambda: ndl.pad(ndl.ones(2, 0), 1, mode="replicate"),
        ValueError,
        r"pad: expected 'replicate' widths of at most 0 for size 0; received \(1, 1\)",
    ),
    "pad, mode and pairs": (
        lambda: ndl.pad(M, [(1, 1)], mode="replicate"),
        ValueError,
        r"pad: expected 2 pairs of widths.*; received \(\(1, 1\),\)",
    ),
    "tile": (
        lambda: ndl.tile(V, -1),
        ValueError,
        r"tile: expected sizes of at least 0; received \(-1,\)",
    ),
    "repeat": (
        lambda: ndl.repeat(V, -1),
        ValueError,
        r"repeat: expected repeats of at least 0; received -1",
    ),
    "roll": (
        lambda: ndl.roll(M, (1, 2), 0),
        ValueError,
        r"roll: expected a shift for each axis; received .*",
    ),
    "dilate": (
        lambda: ndl.dilate(V, 0, -1),
        ValueError,
        r"dilate: expected a dilation of at least 0; received -1",
    ),
    "tril": (
        lambda: ndl.tril(V),
        ValueError,
        r"tril: expected at least 2 axes; received shape \(3,\)",
    ),
    "tensordot": (
        lambda: ndl.tensordot(V, M, 1),
        ValueError,
        r"tensordot: expected axes of equal sizes, none twice; received \[0\] and \[0\] of .*",
    ),
    "tensordot, axes": (
        lambda: ndl.tensordot(V, V, 3),
        ValueError,
        r"tensordot: expected at most 1 axes; received 3",
    ),
    "einsum": (
        lambda: ndl.einsum("ij,jk->ik", M, M),
        ValueError,
        r"einsum: expected one size for 'j'; received 3 and 2",
    ),
    "einsum, operands": (
        lambda: ndl.einsum("ij,jk", M),
        ValueError,
        r"einsum: expected 2 operands for 'ij,jk'; received 1",
    ),
    "einsum, axes": (
        lambda: ndl.einsum("ijk->i", M),
        ValueError,
        r"einsum: expected .*'ijk' .*'ijk->i'; received shape \(2, 3\)",
    ),
    "einsum, output": (
        lambda: ndl.einsum("ij->iz", M),
        ValueError,
        r"einsum: expected each output letter once .*; received 'ij->i[zi]'",
    ),
    "einsum, twice": (
        lambda: ndl.einsum("ij->ii", M),
        ValueError,
        r"einsum: expected each output letter once .*; received 'ij->i[zi]'",
    ),
    "einsum, signs": (
        lambda: ndl.einsum("i;j", M),
        ValueError,
        r"einsum: expected letters, commas, '...' and '->'; received 'i;j'",
    ),
    "einsum, diagonal": (
        lambda: ndl.einsum("ii", Tensor(np.ones((3, 1)))),
        ValueError,
        r"einsum: expected one size for 'i'.*; received .*\(3, 1\).*",
    ),
    "item": (lambda: M.item(), ValueError, r"item: expected .*one element; received .*\(2, 3\)"),
    "bool": (lambda: bool(V), ValueError, r"bool: expected .*one element.*any\(\).*"),
    "len": (
        lambda: len(Tensor(1.0)),
        TypeError,
        r"len: expected a tensor with axes; received a scalar",
    ),
    "float": (lambda: float(M), ValueError, r"item: expected .*one element; received .*\(2, 3\)"),
    "max of nothing": (
        lambda: Tensor(np.ones((0, 3))).max(0),
        ValueError,
        r"max: expected at least one element along axes \(0,\); received \(0, 3\)",
    ),
    "argmax of nothing": (
        lambda: Tensor([]).argmax(),
        ValueError,
        r"argmax: expected at least one element along axis 0; received \(0,\)",
    ),
    "softmax of nothing": (
        lambda: ndl.softmax(Tensor([])),
        ValueError,
        r"softmax: expected at least one element along axes \(0,\); received \(0,\)",
    ),
    "logsumexp of nothing": (
        lambda: ndl.logsumexp(Tensor([])),
        ValueError,
        r"logsumexp: expected at least one element along axes \(0,\); .*",
    ),
    "topk": (lambda: ndl.topk(V, 4), ValueError, r"topk: expected k between 0 and 3; received 4"),
    # Axes
    "sum": (
        lambda: M.sum(2),
        ValueError,
        r"summation: expected an axis between -2 and 1; received 2",
    ),
    "sum, negative": (
        lambda: M.sum((0, -3)),
        ValueError,
        r"summation: expected an axis between -2 and 1; received -3",
    ),
    "sum, twice": (
        lambda: M.sum((0, -2)),
        ValueError,
        r"summation: expected axes without repeats; received \(0, -2\)",
    ),
    "sum, text": (
        lambda: M.sum("a"),
        TypeError,
        r"summation: expected an integer axis; received 'a'",
    ),
    "sum, both": (
        lambda: M.sum(0, axis=0),
        TypeError,
        r"summation: expected axes or axis, not both",
    ),
    "sum of a scalar": (
        lambda: Tensor(1.0).sum(0),
        ValueError,
        r"summation: expected an axis None \(the input is a scalar\); received 0",
    ),
    "mean": (lambda: M.mean(5), ValueError, r"mean: expected an axis between -2 and 1; received 5"),
    "softmax": (
        lambda: ndl.softmax(M, 2),
        ValueError,
        r"softmax: expected an axis between -2 and 1; received 2",
    ),
    "cumsum": (
        lambda: M.cumsum(-3),
        ValueError,
        r"cumsum: expected an axis between -2 and 1; received -3",
    ),
    "sort": (
        lambda: ndl.sort(M, 2),
        ValueError,
        r"argsort: expected an axis between -2 and 1; received 2",
    ),
    "argmin": (
        lambda: M.argmin(2),
        ValueError,
        r"argmin: expected an axis between -2 and 1; received 2",
    ),
    "flip": (
        lambda: ndl.flip(M, 3),
        ValueError,
        r"flip: expected an axis between -2 and 1; received 3",
    ),
    "permute": (
        lambda: M.permute(0, 0),
        ValueError,
        r"permute: expected an order of 2 axes; received \(0, 0\)",
    ),
    "transpose": (
        lambda: V.transpose(),
        ValueError,
        r"transpose: expected at least 2 axes; received shape \(3,\)",
    ),
    "transpose, order": (
        lambda: CUBE.transpose((2, 0, 1)),
        ValueError,
        r"transpose: expected two axes.*; received \(2, 0, 1\); use permute for an order",
    ),
    "unsqueeze": (
        lambda: V.unsqueeze(3),
        ValueError,
        r"unsqueeze: expected an axis between -2 and 1; received 3",
    ),
    "flatten": (
        lambda: CUBE.flatten(2, 1),
        ValueError,
        r"flatten: expected start <= end; received axes 2 and 1",
    ),
    "concatenate, axis": (
        lambda: ndl.concatenate([V, V], 1),
        ValueError,
        r"concatenate: expected an axis between -1 and 0; received 1",
    ),
    # Dtypes
    "bfloat16 and int64": (
        lambda: BRAIN + LONG,
        TypeError,
        r"add: expected dtypes that can mix; received bfloat16 and int64; convert one .*",
    ),
    "bfloat16 and float16": (
        lambda: BRAIN * HALF,
        TypeError,
        r"multiply: expected dtypes that can mix; received bfloat16 and float16; .*",
    ),
    "bfloat16 @ int64": (
        lambda: BRAIN @ LONG,
        TypeError,
        r"matmul: expected dtypes that can mix; received bfloat16 and int64; .*",
    ),
    "bfloat16 less int64": (
        lambda: BRAIN < LONG,
        TypeError,
        r"less: expected dtypes that can mix; received .*",
    ),
    "stack of dtypes": (
        lambda: ndl.stack([BRAIN, LONG]),
        TypeError,
        r"stack: expected dtypes that can mix; received .*",
    ),
    "astype": (
        lambda: V.astype("float8"),
        TypeError,
        r"dtype: expected one of float64, .*; received 'float8'",
    ),
    "rand of integers": (
        lambda: ndl.rand(2, dtype="int8"),
        TypeError,
        r"rand: expected a float dtype; received int8",
    ),
    # Scalars
    "int8 + 300": (
        lambda: INT + 300,
        ValueError,
        r"add_scalar: expected a scalar that fits int8; received 300",
    ),
    "uint8 - 300": (
        lambda: BYTE - 300,
        ValueError,
        r"subtract: expected a scalar that fits uint8; received 300",
    ),
    "uint8 * -1": (
        lambda: BYTE * -1,
        ValueError,
        r"mul_scalar: expected a scalar that fits uint8; received -1",
    ),
    "maximum(int8, 300)": (
        lambda: ndl.maximum(INT, 300),
        ValueError,
        r"maximum: expected a scalar that fits int8; received 300",
    ),
    "int8 % 300": (
        lambda: INT % 300,
        ValueError,
        r"remainder: expected a scalar that fits int8; received 300",
    ),
    "clip": (
        lambda: ndl.clip(V, 2, 1),
        ValueError,
        r"clip: expected low <= high; received low=2, high=1",
    ),
    "clip, int8": (
        lambda: ndl.clip(INT, -1, 300),
        ValueError,
        r"clip: expected a scalar that fits int8; received 300",
    ),
    "pad, uint8": (
        lambda: ndl.pad(BYTE, 1, 2.5),
        ValueError,
        r"pad: expected a scalar that fits uint8; received 2.5",
    ),
    "a number beyond floats": (
        lambda: V * 10**400,
        ValueError,
        r"mul_scalar: expected a scalar that fits float64; received 1000.*",
    ),
    "V + text": (lambda: V + "a", TypeError, r"Tensor: expected real numbers; received str of <U1"),
    "V * None": (
        lambda: V * None,
        TypeError,
        r"Tensor: expected real numbers; received NoneType of object",
    ),
    "V - 1j": (
        lambda: V - 1j,
        TypeError,
        r"Tensor: expected real numbers; received complex of complex128",
    ),
    "power_scalar": (
        lambda: ndl.power_scalar(V, "a"),
        TypeError,
        r"power_scalar: expected a number; received 'a'",
    ),
    "add_scalar": (
        lambda: ndl.add_scalar(V, [1.0, 2.0]),
        TypeError,
        r"add_scalar: expected a number; received \[1.0, 2.0\]",
    ),
    "a tuple": (
        lambda: ndl.exp(ndl.split(V)),
        TypeError,
        r"expected a Tensor; received a TensorTuple; take one of its items",
    ),
    "gelu": (
        lambda: ndl.gelu(V, "fast"),
        ValueError,
        r"gelu: expected approximate 'none' or 'tanh'; received 'fast'",
    ),
    "softplus": (
        lambda: ndl.softplus(V, 0),
        ValueError,
        r"softplus: expected beta > 0; received 0",
    ),
    # Indices
    "x[i]": (
        lambda: V[3],
        IndexError,
        r"getitem: expected an index below 3 for axis 0; received 3",
    ),
    "x[i, j]": (
        lambda: M[0, -4],
        IndexError,
        r"getitem: expected an index below 3 for axis 1; received -4",
    ),
    "x[[i]]": (lambda: V[[0, 3]], IndexError, r"gather: expected indices below 3; received 3"),
    "x[i, j, k]": (
        lambda: M[0, 0, 0],
        IndexError,
        r"getitem: expected at most 2 indices .*; received 3.*",
    ),
    "x[..., ...]": (
        lambda: M[..., ...],
        IndexError,
        r"getitem: expected .* one '...'; received .*",
    ),
    "x[mask]": (
        lambda: V[TRUE],
        IndexError,
        r"getitem: expected a mask of shape \(3,\); received \(2,\)",
    ),
    "x[True]": (
        lambda: V[True],
        IndexError,
        r"getitem: expected an integer, a slice, .*; received .*bool",
    ),
    "x[1.5]": (
        lambda: V[1.5],
        IndexError,
        r"getitem: expected an integer, a slice, None, \.\.\. or an array; received float",
    ),
    "x['a']": (
        lambda: V["a"],
        IndexError,
        r"getitem: expected an integer, a slice, None, \.\.\. or an array; received str",
    ),
    "x[[0.5]]": (
        lambda: V[[0.5]],
        TypeError,
        r"getitem: expected integer indices; received float64",
    ),
    "take": (
        lambda: ndl.take(V, [-4]),
        IndexError,
        r"gather: expected indices below 3; received -4",
    ),
    "gather": (
        lambda: ndl.gather(M, 1, [[3]]),
        IndexError,
        r"gather: expected indices below 3; received 3",
    ),
    "gather, axes": (
        lambda: ndl.gather(M, 1, [0]),
        ValueError,
        r"gather: expected an index of 2 axes within \(2, 3\) but for axis 1; received \(1,\)",
    ),
    "scatter_add": (
        lambda: ndl.scatter_add(V, 0, [3], [1.0]),
        IndexError,
        r"scatter_add: expected indices below 3; received 3",
    ),
    "scatter_add, source": (
        lambda: ndl.scatter_add(V, 0, [0, 1], [1.0]),
        ValueError,
        r"scatter_add: expected a source of shape \(2,\); received \(1,\)",
    ),
    "one_hot": (
        lambda: ndl.one_hot([0, 3], 3),
        IndexError,
        r"one_hot: expected labels from 0 to 2; received 3",
    ),
    "one_hot, negative": (
        lambda: ndl.one_hot([-1], 3),
        IndexError,
        r"one_hot: expected labels from 0 to 2; received -1",
    ),
    "one_hot, fractions": (
        lambda: ndl.one_hot([0.5], 3),
        TypeError,
        r"one_hot: expected integer indices; received float64",
    ),
    "TensorTuple": (
        lambda: ndl.split(V)[3],
        IndexError,
        r"TensorTuple: expected an index below 3; received 3",
    ),
    # Losses
    "cross_entropy, labels": (
        lambda: ndl.cross_entropy(LOGITS, [0, 3]),
        ValueError,
        r"cross_entropy: expected labels from 0 to 2; received 3",
    ),
    "cross_entropy, negative": (
        lambda: ndl.cross_entropy(LOGITS, [0, -1]),
        ValueError,
        r"cross_entropy: expected labels from 0 to 2; received -1",
    ),
    "cross_entropy, shape": (
        lambda: ndl.cross_entropy(LOGITS, [0, 1, 2]),
        ValueError,
        r"cross_entropy: expected labels for classes along axis 1 of \(2, 3\); received .*\(3,\)",
    ),
    "cross_entropy, fractions": (
        lambda: ndl.cross_entropy(LOGITS, [0.5, 1]),
        TypeError,
        r"cross_entropy.*: expected integer .*; received float64.*",
    ),
    "cross_entropy, weight": (
        lambda: ndl.cross_entropy(LOGITS, [0, 1], np.ones(2)),
        ValueError,
        r"cross_entropy: expected a weight for each of 3 classes; received \(2,\)",
    ),
    "cross_entropy, smoothing": (
        lambda: ndl.cross_entropy(LOGITS, [0, 1], label_smoothing=2),
        ValueError,
        r"cross_entropy: expected label_smoothing between 0 and 1; received 2",
    ),
    "cross_entropy, reduction": (
        lambda: ndl.cross_entropy(LOGITS, [0, 1], reduction="max"),
        ValueError,
        r"cross_entropy: expected reduction 'mean', 'sum' or 'none'; received 'max'",
    ),
    "nll_loss": (
        lambda: ndl.nll_loss(LOGITS, [5, 0]),
        ValueError,
        r"nll_loss: expected labels from 0 to 2; received 5",
    ),
    "mse_loss": (
        lambda: ndl.mse_loss(V, M),
        ValueError,
        r"mse_loss: expected input and target of one shape; received \(3,\) and \(2, 3\)",
    ),
    "l1_loss": (
        lambda: ndl.l1_loss(V, V, "all"),
        ValueError,
        r"l1_loss: expected reduction 'mean', 'sum' or 'none'; received 'all'",
    ),
    "huber_loss": (
        lambda: ndl.huber_loss(V, V, 0),
        ValueError,
        r"huber_loss: expected delta > 0; received 0",
    ),
    "bce_with_logits": (
        lambda: ndl.bce_with_logits(V, TRUE),
        ValueError,
        r"bce_with_logits: expected input and target of one shape; .*",
    ),
    "kl_div": (
        lambda: ndl.kl_div(V, V, "avg"),
        ValueError,
        r"kl_div: expected reduction .*; received 'avg'",
    ),
    # Constants and random numbers
    "arange": (
        lambda: ndl.arange(0, 3, 0),
        ValueError,
        r"arange: expected a step other than 0; received 0",
    ),
    "linspace": (
        lambda: ndl.linspace(0, 1, -1),
        ValueError,
        r"linspace: expected at least 0 numbers; received -1",
    ),
    "zeros": (
        lambda: ndl.zeros(-1),
        ValueError,
        r".*: expected sizes of at least 0; received \(-1,\)",
    ),
    "rand": (
        lambda: ndl.rand(2, -1),
        ValueError,
        r"rand: expected sizes of at least 0; received \(2, -1\)",
    ),
    "randint": (
        lambda: ndl.randint(5, 5),
        ValueError,
        r"randint: expected low < high; received 5 and 5",
    ),
    "gain": (
        lambda: init.calculate_gain("swish"),
        ValueError,
        r"calculate_gain: expected one of .*; received 'swish'",
    ),
    "orthogonal": (
        lambda: init.orthogonal(3),
        ValueError,
        r"orthogonal: expected at least 2 axes; received shape \(3,\)",
    ),
    "fans": (
        lambda: init.kaiming_uniform(0, 3),
        ValueError,
        r"kaiming_uniform: expected fans above 0; received .*",
    ),
    "op fields": (
        lambda: ops.PowerScalar(),
        TypeError,
        r"PowerScalar: expected fields \(scalar\); received \(\)",
    ),
}


@pytest.mark.parametrize("lazy", [False, True], ids=["eager", "lazy"])
@pytest.mark.parametrize("case", ERRORS)
def test_the_sentence(case: str, lazy: bool) -> None:
    call, error, words = ERRORS[case]
    if lazy:
        with ndl.lazy():
            raised = what_it_raises(call, error, ask=True)
    else:
        raised = what_it_raises(call, error, ask=False)
    assert raised.match(f"^{words}$")
    assert "\n" not in str(raised.value)


def what_it_raises(call: Any, error: type[Exception], ask: bool) -> Any:
    def run() -> None:
        found = call()
        if ask:
            found.numpy()  # only values tell that an index is out of range

    with pytest.raises(error) as raised:
        run()
    return raised
