"""The op table: one row per op or function, which every check in test_ops.py walks.

A row says how to call it, what it means in float64 NumPy, and what PyTorch calls it. References are
plain NumPy and math, not the ops' own `compute`. A primitive, a composite or a public function of
needle.ops without a row fails the suite; so does a wider tolerance without a reason.

Inputs are drawn on a grid that keeps clear of 0, of integers and of each other, where derivatives
jump: numbers in [-3, 3) by default, 12 of them lie in cells of width 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from zlib import crc32

import numpy as np

from needle import ops
from needle.dtype import FLOATS, as_dtype
from needle.ops import normalize, update
from needle.ops.index import Checked, Gather, IndexCopy, ScatterAdd
from needle.ops.movement import After, Slice, Unslice
from needle.ops.random import RandomUniform
from needle.scan import scan

Array = np.ndarray
Function = Callable[..., Any]


@dataclass(frozen=True)
class Input:
    """How an input is drawn: floats in [low, high), or given values."""

    shape: tuple[int, ...] = (3, 4)
    low: float = -3.0
    high: float = 3.0
    values: Any = None
    fixed: bool = False  # whether given floats stay float64, whatever the dtype of the others

    def draw(self, rng: np.random.Generator, dtype: Any) -> Array:
        kind = as_dtype(dtype)
        if self.values is not None:
            found = np.asarray(self.values)
            return found if self.fixed or found.dtype not in FLOATS else found.astype(kind)
        size = math.prod(self.shape)
        cells = rng.permutation(size) + 0.5 + 0.3 * rng.uniform(-1, 1, size)
        numbers = self.low + (self.high - self.low) * cells / max(size, 1)
        numbers = np.where(np.abs(numbers) < 0.04, numbers + 0.1, numbers)
        return numbers.reshape(self.shape).astype(kind)


@dataclass(frozen=True)
class Row:
    """One op or function, called in one way."""

    name: str
    function: Function  # of Tensors
    reference: Function  # of float64 arrays (and of the fixed inputs)
    inputs: tuple[Input, ...]
    torch: str | Function | None = None  # a function of torch, or of (torch, *tensors)
    case: str = ""
    length: int = 1  # how many numbers its longest sum adds
    wanted: tuple[int, ...] | None = None  # inputs with a gradient: all floats by default
    roundings: int = 1  # ops in a row that round, where it is more than one
    factor: float = 1.0  # on the tolerance
    reason: str = ""  # for a factor
    elementwise: bool = False  # works on any shapes that broadcast

    @property
    def id(self) -> str:
        return f"{self.name}[{self.case}]" if self.case else self.name

    def rng(self) -> np.random.Generator:
        return np.random.default_rng(crc32(self.id.encode()))

    def arrays(self, dtype: Any = "float64", rng: np.random.Generator | None = None) -> list[Array]:
        rng = self.rng() if rng is None else rng
        return [each.draw(rng, dtype) for each in self.inputs]

    def places(self, arrays: Sequence[Array]) -> tuple[int, ...]:
        """The inputs whose gradient is wanted."""
        if self.wanted is not None:
            return self.wanted
        return tuple(place for place, x in enumerate(arrays) if x.dtype in FLOATS)

    def expected(self, arrays: Sequence[Array]) -> Any:
        """The reference on the arrays, widened to float64 without rounding."""
        wide = [x.astype(np.float64) if x.dtype in FLOATS else x for x in arrays]
        with np.errstate(all="ignore"):
            return self.reference(*wide)

    def in_torch(self, torch: Any, *tensors: Any) -> Any:
        if isinstance(self.torch, str):
            return getattr(torch, self.torch)(*tensors)
        assert self.torch is not None
        return self.torch(torch, *tensors)


REAL = Input()
POSITIVE = Input(low=0.1, high=4.0)
UNIT = Input(low=0.05, high=0.95)
MATRIX = Input((3, 4))
CUBE = Input((2, 3, 4))
ROW = Input((4,))


def scan_rows(h: Any, x: Any, w: Any) -> Any:
    last, ys = scan(lambda h, x: (ops.sin(h * w + x), h + x), h, x)
    return last, ys


def loop_rows(h: Array, x: Array, w: Array) -> Any:
    ys = []
    for each in x:
        ys.append(h + each)
        h = np.sin(h * w + each)
    return h, np.stack(ys)


def unary(
    name: str,
    reference: Function,
    torch: Any = None,
    x: Input = REAL,
    function: Any = None,
    **more: Any,
) -> Row:
    given = function or ops.FUNCTIONS[name]
    return Row(name, given, reference, (x,), torch, elementwise=x.values is None, **more)


def binary(
    name: str,
    reference: Function,
    torch: Any = None,
    a: Input = REAL,
    b: Input = REAL,
    function: Any = None,
    **more: Any,
) -> Row:
    given = function or ops.FUNCTIONS[name]
    return Row(name, given, reference, (a, b), torch, elementwise=a.values is None, **more)


def erf(x: Array) -> Array:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def clipped(low: float, high: float) -> Function:
    return lambda x: np.minimum(np.maximum(x, low), high)


CANCELS = "1 + erf(x) cancels below 0: its error is relative to 1, the result's smallest is 0.004"
SPECIAL = Input(values=np.array([0.0, -0.0, 1.5, np.inf, -np.inf, np.nan]))
TRUTHS = Input(values=np.array([0.0, 2.0, np.nan, -0.0]))
FLAGS = Input(values=np.array([True, True, False, False]))
OTHER_FLAGS = Input(values=np.array([True, False, True, False]))
SMALL = Input(values=np.array([0.0, 1.0, 2.0, 1.0, 0.0, -1.0]))
OTHER_SMALL = Input(values=np.array([0.0, 2.0, 1.0, 1.0, -0.0, -1.0]))

ELEMENTWISE = [
    unary("exp", np.exp, "exp"),
    unary("expm1", np.expm1, "expm1"),
    unary("log", np.log, "log", POSITIVE),
    unary("log1p", np.log1p, "log1p", Input(low=-0.9, high=3.0)),
    unary("sqrt", np.sqrt, "sqrt", POSITIVE),
    unary("rsqrt", lambda x: 1 / np.sqrt(x), "rsqrt", POSITIVE),
    unary("square", lambda x: x * x, "square"),
    unary("sin", np.sin, "sin"),
    unary("cos", np.cos, "cos"),
    unary("tanh", np.tanh, "tanh"),
    unary("erf", erf, "erf"),
    unary("relu", lambda x: np.where(x > 0, x, 0), "relu"),
    unary("abs", lambda x: np.where(x < 0, -x, x), "abs"),
    unary("sign", lambda x: np.where(x > 0, 1.0, -1.0), "sign"),
    unary("floor", np.floor, "floor"),
    unary("ceil", np.ceil, "ceil"),
    unary("round", np.round, "round"),
    unary("negate", lambda x: 0 - x, "negative"),
    unary("sigmoid", sigmoid, "sigmoid"),
    unary("silu", lambda x: x * sigmoid(x), lambda t, x: t.nn.functional.silu(x)),
    unary(
        "gelu",
        lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
        lambda t, x: t.nn.functional.gelu(x),
        factor=100,
        reason=CANCELS,
    ),
    unary(
        "gelu",
        gelu_tanh,
        lambda t, x: t.nn.functional.gelu(x, approximate="tanh"),
        function=lambda x: ops.gelu(x, "tanh"),
        case="tanh",
        factor=100,
        reason=CANCELS.replace("erf", "tanh"),
    ),
    unary("softplus", lambda x: np.log(1 + np.exp(x)), lambda t, x: t.nn.functional.softplus(x)),
    unary(
        "softplus",
        lambda x: np.log(1 + np.exp(2.5 * x)) / 2.5,
        lambda t, x: t.nn.functional.softplus(x, beta=2.5),
        function=lambda x: ops.softplus(x, 2.5),
        case="beta",
    ),
    unary("elu", lambda x: np.where(x > 0, x, np.exp(x) - 1), lambda t, x: t.nn.functional.elu(x)),
    unary(
        "elu",
        lambda x: np.where(x > 0, x, 0.3 * (np.exp(x) - 1)),
        lambda t, x: t.nn.functional.elu(x, 0.3),
        function=lambda x: ops.elu(x, 0.3),
        case="alpha",
    ),
    unary(
        "leaky_relu",
        lambda x: np.where(x > 0, x, 0.01 * x),
        lambda t, x: t.nn.functional.leaky_relu(x),
    ),
    unary(
        "leaky_relu",
        lambda x: np.where(x > 0, x, 0.2 * x),
        lambda t, x: t.nn.functional.leaky_relu(x, 0.2),
        function=lambda x: ops.leaky_relu(x, 0.2),
        case="slope",
    ),
    unary(
        "clip",
        clipped(-1, 1.5),
        lambda t, x: t.clamp(x, -1, 1.5),
        function=lambda x: ops.clip(x, -1, 1.5),
    ),
    unary(
        "clip",
        clipped(0.0, math.inf),
        lambda t, x: t.clamp(x, min=0.0),
        function=lambda x: ops.clip(x, 0.0),
        case="low",
    ),
    unary(
        "clip",
        clipped(-math.inf, 1),
        lambda t, x: t.clamp(x, max=1),
        function=lambda x: ops.clip(x, high=1),
        case="high",
    ),
    unary("stop_gradient", lambda x: x, lambda t, x: x.detach(), wanted=()),
    unary(
        "astype",
        lambda x: x.astype(np.int32),
        lambda t, x: x.to(t.int32),
        function=lambda x: ops.astype(x, "int32"),
        case="int32",
    ),
    unary(
        "astype",
        lambda x: x != 0,
        lambda t, x: x.to(t.bool),
        function=lambda x: ops.astype(x, bool),
        case="bool",
    ),
    unary(
        "to_device",
        lambda x: x,
        lambda t, x: x.to("cpu"),
        function=lambda x: ops.to_device(x, "cpu_numpy"),
    ),
    # With a Python scalar
    unary("add_scalar", lambda x: x + 2.5, lambda t, x: x + 2.5, function=lambda x: x + 2.5),
    unary("mul_scalar", lambda x: x * -3, lambda t, x: x * -3, function=lambda x: x * -3),
    unary("divide_scalar", lambda x: x / 3, lambda t, x: x / 3, function=lambda x: x / 3),
    *(
        unary(
            "power_scalar",
            lambda x, n=n: x**n,
            lambda t, x, n=n: x**n,
            domain,
            function=lambda x, n=n: x**n,
            case=str(n),
        )
        for n, domain in (
            (2, REAL),
            (3, REAL),
            (0, REAL),
            (1, REAL),
            (-1, POSITIVE),
            (0.5, POSITIVE),
        )
    ),
    unary("subtract", lambda x: x - 2, lambda t, x: x - 2, function=lambda x: x - 2, case="x - 2"),
    unary("subtract", lambda x: 2 - x, lambda t, x: 2 - x, function=lambda x: 2 - x, case="2 - x"),
    unary(
        "divide",
        lambda x: 2 / x,
        lambda t, x: 2 / x,
        POSITIVE,
        function=lambda x: 2 / x,
        case="2 / x",
    ),
    unary(
        "power", lambda x: 2.5**x, lambda t, x: 2.5**x, function=lambda x: 2.5**x, case="2.5 ** x"
    ),
    unary(
        "remainder",
        lambda x: x - np.floor(x / 1.5) * 1.5,
        lambda t, x: t.remainder(x, 1.5),
        function=lambda x: x % 1.5,
        case="x % 1.5",
    ),
    unary(
        "maximum",
        lambda x: np.where(x > 0.5, x, 0.5),
        lambda t, x: t.clamp(x, min=0.5),
        function=lambda x: ops.maximum(x, 0.5),
        case="x, 0.5",
    ),
    # Of two tensors
    binary("add", lambda a, b: a + b, "add"),
    binary("subtract", lambda a, b: a - b, "subtract"),
    binary("multiply", lambda a, b: a * b, "multiply"),
    binary("divide", lambda a, b: a / b, "divide", b=POSITIVE),
    binary("power", lambda a, b: np.exp(b * np.log(a)), "pow", POSITIVE, REAL),
    binary(
        "remainder", lambda a, b: a - np.floor(a / b) * b, "remainder", b=Input(low=3.1, high=4.0)
    ),
    binary(
        "floor_divide",
        lambda a, b: np.floor(a / b),
        "floor_divide",
        b=Input(low=3.1, high=4.0),
        wanted=(),
    ),
    binary("maximum", lambda a, b: np.where(a > b, a, b), "maximum"),
    binary("minimum", lambda a, b: np.where(a < b, a, b), "minimum"),
    binary("equal", lambda a, b: a == b, "eq", SMALL, OTHER_SMALL),
    binary("not_equal", lambda a, b: a != b, "ne", SMALL, OTHER_SMALL),
    binary("less", lambda a, b: a < b, "lt", SMALL, OTHER_SMALL),
    binary("less_equal", lambda a, b: a <= b, "le", SMALL, OTHER_SMALL),
    binary("greater", lambda a, b: a > b, "gt", SMALL, OTHER_SMALL),
    binary("greater_equal", lambda a, b: a >= b, "ge", SMALL, OTHER_SMALL),
    binary("logical_and", lambda a, b: a & b, "logical_and", FLAGS, OTHER_FLAGS),
    binary("logical_or", lambda a, b: a | b, "logical_or", FLAGS, OTHER_FLAGS),
    binary("logical_xor", lambda a, b: a ^ b, "logical_xor", FLAGS, OTHER_FLAGS),
    unary("logical_not", lambda x: x == 0, "logical_not", TRUTHS),
    unary("isnan", lambda x: np.array([0, 0, 0, 0, 0, 1], bool), "isnan", SPECIAL),
    unary("isinf", lambda x: np.array([0, 0, 0, 1, 1, 0], bool), "isinf", SPECIAL),
    unary("isfinite", lambda x: np.array([1, 1, 1, 0, 0, 0], bool), "isfinite", SPECIAL),
    Row(
        "where",
        ops.where,
        lambda c, a, b: a * c + b * ~c,
        (Input(values=np.arange(12).reshape(3, 4) % 3 == 0), REAL, REAL),
        "where",
    ),
    Row(
        "where",
        lambda c, a: ops.where(c, a, -1.0),
        lambda c, a: a * c - ~c,
        (Input(values=np.array([[True], [False], [True]])), REAL),
        lambda t, c, a: t.where(c, a, -1.0),
        case="scalar",
    ),
]


def windows(x: Array, before: int, after: int, value: float) -> Array:
    found = np.full([size + before + after for size in x.shape], float(value))
    found[tuple(slice(before, before + size) for size in x.shape)] = x
    return found


def spaced(x: Array, axis: int, dilation: int) -> Array:
    shape = list(x.shape)
    shape[axis] *= dilation + 1
    found = np.zeros(shape)
    found[(slice(None),) * axis + (slice(None, None, dilation + 1),)] = x
    return found


def unsliced(x: Array) -> Array:
    found = np.zeros((5, 6))
    found[3::-2, 1:5] = x
    return found


MOVEMENT = [
    Row(
        "broadcast_to",
        lambda x: ops.broadcast_to(x, (2, 3, 4)),
        lambda x: np.ones((2, 1, 1)) * x * np.ones((3, 1)),
        (Input((1, 4)),),
        lambda t, x: x.expand(2, 3, 4),
        length=6,
    ),
    Row(
        "reshape",
        lambda x: ops.reshape(x, (2, -1)),
        lambda x: x.reshape(2, 6),
        (MATRIX,),
        lambda t, x: x.reshape(2, -1),
    ),
    Row(
        "permute",
        lambda x: ops.permute(x, (2, 0, -2)),
        lambda x: np.einsum("ijk->kij", x),
        (CUBE,),
        lambda t, x: x.permute(2, 0, 1),
    ),
    Row("transpose", ops.transpose, lambda x: np.einsum("ijk->ikj", x), (CUBE,), lambda t, x: x.mT),
    Row(
        "transpose",
        lambda x: ops.transpose(x, (0, -1)),
        lambda x: np.einsum("ijk->kji", x),
        (CUBE,),
        lambda t, x: x.transpose(0, -1),
        case="axes",
    ),
    Row("squeeze", ops.squeeze, lambda x: x[0, :, 0], (Input((1, 3, 1, 4)),), "squeeze"),
    Row(
        "squeeze",
        lambda x: ops.squeeze(x, -2),
        lambda x: x[:, :, 0],
        (Input((1, 3, 1, 4)),),
        lambda t, x: x.squeeze(-2),
        case="axis",
    ),
    Row(
        "unsqueeze",
        lambda x: ops.unsqueeze(x, 1),
        lambda x: x[:, None],
        (MATRIX,),
        lambda t, x: x.unsqueeze(1),
    ),
    Row(
        "flatten",
        lambda x: ops.flatten(x, 1),
        lambda x: x.reshape(2, 12),
        (CUBE,),
        lambda t, x: x.flatten(1),
    ),
    Row(
        "flip",
        lambda x: ops.flip(x, (0, 2)),
        lambda x: x[::-1, :, ::-1],
        (CUBE,),
        lambda t, x: x.flip((0, 2)),
    ),
    Row(
        "pad",
        lambda x: ops.pad(x, 2, 1.5),
        lambda x: windows(x, 2, 2, 1.5),
        (MATRIX,),
        lambda t, x: t.nn.functional.pad(x, (2, 2, 2, 2), value=1.5),
    ),
    Row(
        "pad",
        lambda x: ops.pad(x, ((0, 1), (0, 1))),
        lambda x: windows(x, 0, 1, 0),
        (MATRIX,),
        lambda t, x: t.nn.functional.pad(x, (0, 1, 0, 1)),
        case="pairs",
    ),
    *(
        Row(
            "pad",
            lambda x, mode=mode: ops.pad(x, ((0, 0), (1, 0), (3, 2)), mode=mode),
            lambda x, name=name: np.pad(x, ((0, 0), (1, 0), (3, 2)), name),
            (Input((2, 3, 4)),),
            lambda t, x, mode=mode: t.nn.functional.pad(x[None], (3, 2, 1, 0), mode=mode)[0],
            case=mode,
        )
        for mode, name in (("reflect", "reflect"), ("replicate", "edge"), ("circular", "wrap"))
    ),
    Row("dilate", lambda x: ops.dilate(x, 1, 2), lambda x: spaced(x, 1, 2), (MATRIX,)),
    Row("undilate", lambda x: ops.undilate(x, (0,), 1), lambda x: x[::2], (Input((5, 4)),)),
    Row(
        "concatenate",
        lambda a, b, c: ops.concatenate([a, b, c], 1),
        lambda a, b, c: np.hstack([a, b, c]),
        (MATRIX, Input((3, 1)), Input((3, 0))),
        lambda t, a, b, c: t.cat([a, b, c], 1),
    ),
    Row(
        "stack",
        lambda a, b: ops.stack([a, b], -1),
        lambda a, b: np.array([a, b]).transpose(1, 2, 0),
        (MATRIX, MATRIX),
        lambda t, a, b: t.stack([a, b], -1),
    ),
    Row("split", ops.split, lambda x: (x[0], x[1], x[2]), (MATRIX,), lambda t, x: t.unbind(x)),
    Row(
        "split",
        lambda x: ops.split(x, 1, (1, 3)),
        lambda x: (x[:, :1], x[:, 1:]),
        (MATRIX,),
        lambda t, x: t.split(x, (1, 3), 1),
        case="sizes",
    ),
    Row(
        "split",
        lambda x: ops.split(x, 1, 3),
        lambda x: (x[:, :3], x[:, 3:]),
        (MATRIX,),
        lambda t, x: t.split(x, 3, 1),
        case="size",
    ),
    Row(
        "chunk",
        lambda x: ops.chunk(x, 2),
        lambda x: (x[:2], x[2:]),
        (MATRIX,),
        lambda t, x: t.chunk(x, 2),
    ),
    Row(
        "unbind",
        lambda x: ops.unbind(x, 1),
        lambda x: tuple(x.T),
        (MATRIX,),
        lambda t, x: t.unbind(x, 1),
    ),
    Row(
        "roll",
        lambda x: ops.roll(x, (1, -2), (0, 1)),
        lambda x: x[[2, 0, 1]][:, [2, 3, 0, 1]],
        (MATRIX,),
        lambda t, x: t.roll(x, (1, -2), (0, 1)),
    ),
    Row(
        "roll",
        lambda x: ops.roll(x, 5),
        lambda x: x.ravel()[(np.arange(12) - 5) % 12].reshape(3, 4),
        (MATRIX,),
        lambda t, x: t.roll(x, 5),
        case="flat",
    ),
    Row(
        "repeat",
        lambda x: ops.repeat(x, 2, 1),
        lambda x: x[:, [0, 0, 1, 1, 2, 2, 3, 3]],
        (MATRIX,),
        lambda t, x: t.repeat_interleave(x, 2, 1),
        length=2,
    ),
    Row(
        "repeat",
        lambda x: ops.repeat(x, 3),
        lambda x: x.ravel()[np.arange(36) // 3],
        (MATRIX,),
        lambda t, x: t.repeat_interleave(x, 3),
        case="flat",
        length=3,
    ),
    Row(
        "tile",
        lambda x: ops.tile(x, (2, 1, 3)),
        lambda x: np.array([[[x[i, j % 4] for j in range(12)] for i in range(3)]] * 2),
        (MATRIX,),
        lambda t, x: t.tile(x, (2, 1, 3)),
        length=6,
    ),
    Row("Scan", scan_rows, loop_rows, (ROW, MATRIX, ROW), length=3, roundings=9),
    Row("make_tuple", lambda a, b: ops.make_tuple(a, b), lambda a, b: (a, b), (MATRIX, ROW)),
    Row(
        "tuple_get_item",
        lambda x: ops.tuple_get_item(ops.split(x, 0), 1),
        lambda x: x[1],
        (MATRIX,),
        lambda t, x: x[1],
    ),
    Row(
        "fused_add_scalars",
        lambda x: ops.fused_add_scalars(x, 1.5, -2),
        lambda x: (x + 1.5, x - 2),
        (MATRIX,),
        lambda t, x: (x + 1.5, x - 2),
    ),
    Row("After", lambda x, y: After()(x, y), lambda x, y: x, (MATRIX, Input((2,))), wanted=(0,)),
    Row(
        "Slice",
        lambda x: Slice(((3, 2, -2), (1, 4, 1)))(x),
        lambda x: x[3::-2, 1:5],
        (Input((5, 6)),),
    ),
    Row(
        "Unslice", lambda x: Unslice(((3, 2, -2), (1, 4, 1)), (5, 6))(x), unsliced, (Input((2, 4)),)
    ),
]


def extreme(kind: str) -> Function:
    """The largest of the rows by a plain loop."""
    better = (lambda a, b: a > b) if kind == "max" else (lambda a, b: a < b)

    def find(x: Array) -> Array:
        best = x[:, 0]
        for column in x.T:
            best = np.where(better(column, best), column, best)
        return best

    return find


def summed(x: Array, axis: int) -> Array:
    return np.einsum(x, list(range(x.ndim)), [each for each in range(x.ndim) if each != axis])


def moments(x: Array, correction: int = 0) -> Array:
    n = x.shape[1]
    return ((x - x.sum(1, keepdims=True) / n) ** 2).sum(1) / (n - correction)


def log_sum_exp(x: Array) -> Array:
    return np.log(np.exp(x).sum(-1))


def p_norm(x: Array, p: float) -> Array:
    return (np.abs(x) ** p).sum(1) ** (1 / p)


REDUCTIONS = [
    Row("summation", ops.summation, lambda x: summed(x.ravel(), 0), (MATRIX,), "sum", length=12),
    Row(
        "summation",
        lambda x: ops.summation(x, (0, -1)),
        lambda x: np.einsum("ijk->j", x),
        (CUBE,),
        lambda t, x: x.sum((0, -1)),
        case="axes",
        length=8,
    ),
    Row(
        "summation",
        lambda x: ops.summation(x, axis=1, keepdims=True),
        lambda x: np.einsum("ijk->ik", x)[:, None],
        (CUBE,),
        lambda t, x: x.sum(1, keepdim=True),
        case="keepdims",
        length=3,
    ),
    Row("max", lambda x: ops.max(x, 1), extreme("max"), (MATRIX,), lambda t, x: t.amax(x, 1)),
    Row("min", lambda x: ops.min(x, 1), extreme("min"), (MATRIX,), lambda t, x: t.amin(x, 1)),
    Row(
        "max",
        ops.max,
        lambda x: np.sort(x.ravel())[-1],
        (CUBE,),
        lambda t, x: t.amax(x),
        case="all",
    ),
    Row(
        "min",
        lambda x: ops.min(x, (0, 2), keepdims=True),
        lambda x: np.sort(np.einsum("ijk->jik", x).reshape(3, 8))[None, :, :1],
        (CUBE,),
        lambda t, x: t.amin(x, (0, 2), keepdim=True),
        case="keepdims",
    ),
    Row(
        "prod",
        lambda x: ops.prod(x, 1),
        lambda x: x[:, 0] * x[:, 1] * x[:, 2] * x[:, 3],
        (MATRIX,),
        lambda t, x: x.prod(1),
        roundings=2,
    ),
    Row(
        "prod",
        ops.prod,
        lambda x: np.multiply.reduce(x.ravel()),
        (Input((5,)),),
        lambda t, x: x.prod(),
        case="all",
        roundings=3,
    ),
    Row(
        "any",
        lambda x: ops.any(x, 1),
        lambda x: (x != 0).sum(1) > 0,
        (Input(values=np.array([[0.0, -0.0], [0, np.nan], [1, 0]])),),
        lambda t, x: x.any(1),
        wanted=(),
    ),
    Row(
        "all",
        lambda x: ops.all(x, 1),
        lambda x: (x == 0).sum(1) == 0,
        (Input(values=np.array([[1.0, -2.0], [0, np.nan], [1, 0]])),),
        lambda t, x: x.all(1),
        wanted=(),
    ),
    Row(
        "argmax",
        lambda x: ops.argmax(x, 1),
        lambda x: np.array([sorted(range(4), key=row.__getitem__)[-1] for row in x]),
        (MATRIX,),
        lambda t, x: x.argmax(1),
    ),
    Row(
        "argmin",
        lambda x: ops.argmin(x, -1, keepdims=True),
        lambda x: np.array([[sorted(range(4), key=row.__getitem__)[0]] for row in x]),
        (MATRIX,),
        lambda t, x: x.argmin(-1, keepdim=True),
    ),
    Row(
        "argmax",
        ops.argmax,
        lambda x: np.int64(sorted(range(12), key=x.ravel().__getitem__)[-1]),
        (MATRIX,),
        lambda t, x: x.argmax(),
        case="all",
    ),
    Row(
        "cumsum",
        lambda x: ops.cumsum(x, 1),
        lambda x: x @ np.tri(4).T,
        (MATRIX,),
        lambda t, x: x.cumsum(1),
        length=4,
    ),
    *(
        Row(
            "norm",
            lambda x, p=p: ops.norm(x, p, 1),
            lambda x, p=p: p_norm(x, p),
            (MATRIX,),
            lambda t, x, p=p: t.linalg.vector_norm(x, p, 1),
            case=str(p),
            length=4,
            roundings=6,
        )
        for p in (2, 1, 3, 0.5, -1)
    ),
    Row(
        "norm",
        lambda x: ops.norm(x, math.inf),
        lambda x: np.sort(np.abs(x.ravel()))[-1],
        (MATRIX,),
        lambda t, x: t.linalg.vector_norm(x, math.inf),
        case="inf",
    ),
    Row(
        "norm",
        lambda x: ops.norm(x, 0, axis=0, keepdims=True),
        lambda x: (x != 0).sum(0, keepdims=True).astype(np.float64),
        (MATRIX,),
        lambda t, x: t.linalg.vector_norm(x, 0, 0, keepdim=True),
        case="0",
        wanted=(),
    ),
    Row(
        "mean",
        lambda x: ops.mean(x, (0, 2)),
        lambda x: np.einsum("ijk->j", x) / 8,
        (CUBE,),
        lambda t, x: x.mean((0, 2)),
        length=8,
    ),
    Row(
        "mean",
        ops.mean,
        lambda x: summed(x.ravel(), 0) / 12,
        (MATRIX,),
        "mean",
        case="all",
        length=12,
    ),
    Row(
        "var",
        lambda x: ops.var(x, 1),
        moments,
        (MATRIX,),
        lambda t, x: t.var(x, 1, correction=0),
        length=4,
    ),
    Row(
        "var",
        lambda x: ops.var(x, axis=1, correction=1),
        lambda x: moments(x, 1),
        (MATRIX,),
        lambda t, x: t.var(x, 1),
        case="correction",
        length=4,
    ),
    Row(
        "std",
        lambda x: ops.std(x, 1),
        lambda x: np.sqrt(moments(x)),
        (MATRIX,),
        lambda t, x: t.std(x, 1, correction=0),
        length=4,
    ),
    Row(
        "std",
        lambda x: ops.std(x, -1, keepdims=True, correction=1),
        lambda x: np.sqrt(moments(x, 1))[:, None],
        (MATRIX,),
        lambda t, x: t.std(x, -1, keepdim=True),
        case="correction",
        length=4,
    ),
    Row(
        "logsumexp",
        lambda x: ops.logsumexp(x, -1),
        log_sum_exp,
        (MATRIX,),
        lambda t, x: t.logsumexp(x, -1),
        length=4,
    ),
    Row(
        "logsumexp",
        ops.logsumexp,
        lambda x: log_sum_exp(x.ravel()),
        (CUBE,),
        lambda t, x: t.logsumexp(x, (0, 1, 2)),
        case="all",
        length=24,
    ),
    Row(
        "softmax",
        ops.softmax,
        lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
        (MATRIX,),
        lambda t, x: t.softmax(x, -1),
        length=4,
    ),
    Row(
        "softmax",
        lambda x: ops.softmax(x, (0, 2)),
        lambda x: np.exp(x) / np.einsum("ijk->j", np.exp(x))[None, :, None],
        (CUBE,),
        case="axes",
        length=8,
    ),
    *(
        Row(
            name,
            ops.FUNCTIONS[name],
            lambda x: x - log_sum_exp(x)[:, None],
            (MATRIX,),
            lambda t, x: t.log_softmax(x, -1),
            length=4,
        )
        for name in ("logsoftmax", "log_softmax")
    ),
]


def times(a: Array, b: Array) -> Array:
    """The product of two matrices by its definition."""
    return np.array([[math.fsum(row * column) for column in b.T] for row in a]).reshape(
        a.shape[0], b.shape[1]
    )


def einsum_row(equation: str, *shapes: tuple[int, ...], length: int) -> Row:
    return Row(
        "einsum",
        lambda *xs: ops.einsum(equation, *xs),
        lambda *xs: np.einsum(equation, *xs),
        tuple(map(Input, shapes)),
        lambda t, *xs: t.einsum(equation, *xs),
        case=equation,
        length=length,
        roundings=len(shapes),
    )


CONTRACTIONS = [
    Row("matmul", ops.matmul, times, (MATRIX, Input((4, 5))), "matmul", length=4),
    Row(
        "matmul",
        ops.matmul,
        lambda a, b: np.array([[times(a[i, 0], b[j]) for j in range(3)] for i in range(2)]),
        (Input((2, 1, 3, 4)), Input((3, 4, 2))),
        "matmul",
        case="batches",
        length=8,
    ),
    Row(
        "matmul",
        ops.matmul,
        lambda a, b: np.array([times(each, b) for each in a]),
        (CUBE, Input((4, 2))),
        "matmul",
        case="batch @ matrix",
        length=6,
    ),
    Row(
        "matmul",
        ops.matmul,
        lambda a, b: times(a[None], b)[0],
        (ROW, Input((4, 2))),
        "matmul",
        case="vector @ matrix",
        length=4,
    ),
    Row(
        "matmul",
        ops.matmul,
        lambda a, b: times(a, b[:, None])[:, 0],
        (MATRIX, ROW),
        "matmul",
        case="matrix @ vector",
        length=4,
    ),
    Row(
        "matmul",
        ops.matmul,
        lambda a, b: np.float64(math.fsum(a * b)),
        (ROW, ROW),
        "matmul",
        case="vectors",
        length=4,
    ),
    Row("outer", ops.outer, lambda a, b: a[:, None] * b, (Input((3,)), ROW), "outer", length=4),
    Row(
        "tensordot",
        ops.tensordot,
        lambda a, b: np.einsum("ijk,jkl->il", a, b),
        (CUBE, Input((3, 4, 2))),
        lambda t, a, b: t.tensordot(a, b),
        length=12,
    ),
    Row(
        "tensordot",
        lambda a, b: ops.tensordot(a, b, ((0, 2), (1, 0))),
        lambda a, b: np.einsum("ijk,ki->j", a, b),
        (CUBE, Input((4, 2))),
        lambda t, a, b: t.tensordot(a, b, ((0, 2), (1, 0))),
        case="axes",
        length=8,
    ),
    einsum_row("ij,jk->ik", (3, 4), (4, 2), length=4),
    einsum_row("bij,bkj->bik", (2, 3, 4), (2, 5, 4), length=5),
    einsum_row("ii->i", (3, 3), length=1),
    einsum_row("ij->", (3, 4), length=12),
    einsum_row("...ij,j", (2, 3, 4), (4,), length=6),
    einsum_row("a,ab,bc->c", (3,), (3, 4), (4, 2), length=12),
]

TAKEN = np.array([[1, -1, 0], [2, 2, 0]])
ALONG = np.array([[0, 3], [1, 1], [-1, 2]])


def item_row(case: str, index: Any, shape: tuple[int, ...] = (2, 3, 4), length: int = 1) -> Row:
    return Row(
        "getitem",
        lambda x: x[index],
        lambda x: np.asarray(x[index]),
        (Input(shape),),
        None if "::-" in case else lambda t, x: x[index],
        case=case,
        length=length,
    )


def added(x: Array, source: Array) -> Array:
    found = x.copy()
    for i in range(3):
        for j in range(2):
            found[i, ALONG[i, j]] += source[i, j]
    return found


def scattered(x: Array) -> Array:
    found = np.zeros((3, 4))
    for i in range(2):
        for j in range(3):
            found[TAKEN[i, j]] += x[i, j]
    return found


INDEX = [
    item_row("1", 1),
    item_row("..., -1", (..., -1)),
    item_row("None, 1:, ::2", (None, slice(1, None), slice(None, None, 2))),
    item_row("::-1, 2:0:-1", (slice(None, None, -1), slice(2, 0, -1))),
    item_row("[0, 0, -1]", ([0, 0, -1],), length=2),
    item_row(":, [0, 2], 1", (slice(None), [0, 2], 1)),
    item_row("[[0], [1]], :, [1, 1]", ([[0], [1]], slice(None), [1, 1]), length=2),
    item_row("mask", (np.arange(24).reshape(2, 3, 4) % 5 == 0,)),
    item_row("0, mask", (0, np.array([True, False, True]))),
    Row(
        "take",
        lambda x: ops.take(x, TAKEN),
        lambda x: np.array([[x[i] for i in row] for row in TAKEN]),
        (MATRIX,),
        lambda t, x: t.nn.functional.embedding(t.tensor(TAKEN % 3), x),
        length=3,
    ),
    Row(
        "take",
        lambda x: ops.take(x, [3, 0, 3], 1),
        lambda x: np.array([[row[3], row[0], row[3]] for row in x]),
        (MATRIX,),
        lambda t, x: t.index_select(x, 1, t.tensor([3, 0, 3])),
        case="axis",
        length=2,
    ),
    Row(
        "gather",
        lambda x: ops.gather(x, 1, ALONG),
        lambda x: np.array([[x[i, j] for j in ALONG[i]] for i in range(3)]),
        (MATRIX,),
        lambda t, x: t.gather(x, 1, t.tensor(ALONG % 4)),
        length=2,
    ),
    Row(
        "scatter_add",
        lambda x, source: ops.scatter_add(x, 1, ALONG, source),
        added,
        (MATRIX, Input((3, 2))),
        lambda t, x, source: t.scatter_add(x, 1, t.tensor(ALONG % 4), source),
        length=3,
        roundings=2,
    ),
    Row(
        "Gather",
        lambda x, i, j: Gather(1)(x, i, j),
        lambda x, i, j: np.array([[x[n, a, b] for a, b in zip(i, j, strict=True)] for n in (0, 1)]),
        (CUBE, Input(values=np.array([2, 0])), Input(values=np.array([-1, 3]))),
    ),
    Row(
        "ScatterAdd",
        lambda x, i: ScatterAdd(0, (3, 4))(x, i),
        lambda x, i: scattered(x),
        (Input((2, 3, 4)), Input(values=TAKEN)),
        length=3,
    ),
    Row(
        "index_copy",
        lambda x, source: ops.index_copy(x, 1, [3, 0, -1], source),
        lambda x, source: np.stack([source[:, 1], x[:, 1], x[:, 2], source[:, 2]], 1),
        (MATRIX, Input((3, 3))),
        # of equal indices, torch takes any
        lambda t, x, source: t.index_copy(x, 1, t.tensor([0, 3]), source[:, 1:]),
    ),
    Row(
        "IndexCopy",
        lambda x, source, i: IndexCopy(0)(x, source, i),
        lambda x, source, i: np.stack([x[0], source[0], source[1]]),
        (MATRIX, Input((2, 4)), Input(values=np.array([1, -1]))),
    ),
    Row(
        "Checked",
        lambda i: Checked("embedding", 4)(i),
        lambda i: i,
        (Input(values=np.array([3, 0, 2])),),
    ),
    Row(
        "Checked",
        lambda i: Checked("labels", 4, False, -7)(i),
        lambda i: i,
        (Input(values=np.array([3, -7, 2])),),
        case="ignored",
    ),
    Row(
        "Checked",
        lambda i: Checked("labels", 4, True, 9)(i),
        lambda i: np.array([3, 9, 0, 3]),
        (Input(values=np.array([3, 9, -4, -1])),),
        case="from the end",
    ),
    Row(
        "one_hot",
        lambda i: ops.one_hot(i, 4, "float64"),
        lambda i: np.array([[float(j == k) for k in range(4)] for j in i]),
        (Input(values=np.array([3, 0, 2])),),
        lambda t, i: t.nn.functional.one_hot(i, 4).double(),
    ),
    Row(
        "arange",
        lambda: ops.arange(1, 3, 0.5, dtype="float64"),
        lambda: np.array([1, 1.5, 2, 2.5]),
        (),
        lambda t: t.arange(1, 3, 0.5, dtype=t.float64),
    ),
    Row(
        "linspace",
        lambda: ops.linspace(-1, 1, 5, dtype="float64"),
        lambda: np.array([-1, -0.5, 0, 0.5, 1]),
        (),
        lambda t: t.linspace(-1, 1, 5, dtype=t.float64),
    ),
    Row(
        "eye",
        lambda: ops.eye(2, 3, dtype="float64"),
        lambda: np.array([[1.0, 0, 0], [0, 1, 0]]),
        (),
        lambda t: t.eye(2, 3, dtype=t.float64),
    ),
    Row(
        "tril",
        lambda x: ops.tril(x, 1),
        lambda x: x * (np.arange(4) <= np.arange(3)[:, None] + 1),
        (CUBE,),
        lambda t, x: t.tril(x, 1),
    ),
    Row(
        "triu",
        lambda x: ops.triu(x, -1),
        lambda x: x * (np.arange(4) >= np.arange(3)[:, None] - 1),
        (CUBE,),
        lambda t, x: t.triu(x, -1),
    ),
    Row(
        "argsort",
        lambda x: ops.argsort(x, 0),
        lambda x: np.array([sorted(range(3), key=column.__getitem__) for column in x.T]).T,
        (MATRIX,),
        lambda t, x: x.argsort(0),
    ),
    Row(
        "argsort",
        lambda x: ops.argsort(x, descending=True),
        lambda x: np.array([[3, 0, 1, 2], [1, 2, 3, 0]]),
        (Input(values=np.array([[1.0, 1, 0, 2], [0, 5, 5, 1]])),),
        lambda t, x: x.argsort(descending=True, stable=True),
        case="descending",
        wanted=(),
    ),
    Row(
        "sort",
        ops.sort,
        lambda x: (
            np.array([sorted(row) for row in x]),
            np.array([sorted(range(4), key=row.__getitem__) for row in x]),
        ),
        (MATRIX,),
        lambda t, x: t.sort(x),
    ),
    Row(
        "topk",
        lambda x: ops.topk(x, 2, 0),
        lambda x: (
            np.array([sorted(column)[:0:-1] for column in x.T]).T,
            np.array([sorted(range(3), key=column.__getitem__)[:0:-1] for column in x.T]).T,
        ),
        (MATRIX,),
        lambda t, x: t.topk(x, 2, 0),
    ),
    Row(
        "topk",
        lambda x: ops.topk(x, 1, largest=False)[0],
        lambda x: np.array([[min(row)] for row in x]),
        (MATRIX,),
        lambda t, x: t.topk(x, 1, largest=False)[0],
        case="smallest",
    ),
]

LABELS = np.array([2, 0, 3])
SOME = np.array([2, -100, 3])
PADDED = np.array([0, 2, 0])
WEIGHT = Input((4,), low=0.2, high=2.0)


def log_softmax(x: Array) -> Array:
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def nll(x: Array, y: Array, weight: Any = None, ignore: int = -100, s: float = 0.0) -> Array:
    """The losses and the weights of the rows, one by one."""
    w = np.ones(x.shape[1]) if weight is None else weight
    found = []
    for row, label in zip(x, y, strict=True):
        if label == ignore:
            found.append((0.0, 0.0))
            continue
        smooth = -(w * row).sum() * s / len(row)
        found.append((-(1 - s) * w[label] * row[label] + smooth, w[label]))
    return np.array(found)


def class_row(kind: str, case: str, labels: Array, weighted: bool = False, **options: Any) -> Row:
    """cross_entropy or nll_loss in one of its variants."""
    reduction = options.get("reduction", "mean")
    ignore = options.get("ignore_index", -100)
    smoothing = options.get("label_smoothing", 0.0)

    def reference(x: Array, y: Array, w: Any = None) -> Array:
        x = log_softmax(x) if kind == "cross_entropy" else x
        found = nll(x, y, w, ignore, smoothing)
        losses, weights = found.T
        return {"mean": losses.sum() / weights.sum(), "sum": losses.sum(), "none": losses}[
            reduction
        ]

    return Row(
        kind,
        lambda x, y, *w: ops.FUNCTIONS[kind](x, y, *w, **options),
        reference,
        (REAL, Input(values=labels), *((WEIGHT,) if weighted else ())),
        lambda t, x, y, *w: getattr(t.nn.functional, kind)(x, y, *w, **options),
        case=case,
        length=12,
        wanted=(0,),
    )


def pair_rows(name: str, losses: Function, y: Input, torch: Any, **options: Any) -> list[Row]:
    """A loss of two tensors, by each reduction."""
    total = {"mean": np.mean, "sum": np.sum, "none": np.asarray}
    return [
        Row(
            name,
            lambda a, b, r=reduction: ops.FUNCTIONS[name](a, b, reduction=r, **options),
            lambda a, b, r=reduction: total[r](losses(a, b)),
            (REAL, y),
            lambda t, a, b, r=reduction: torch(t)(a, b, reduction=r, **options),
            case=", ".join([reduction, *options]),
            length=12 if reduction != "none" else 1,
        )
        for reduction in ("mean", "sum", "none")
    ]


def bce(x: Array, y: Array, w: Any = 1.0) -> Array:
    return -(w * y * np.log(sigmoid(x)) + (1 - y) * np.log(1 - sigmoid(x)))


def huber(x: Array, y: Array, delta: float) -> Array:
    d = np.abs(x - y)
    return np.where(d <= delta, d * d / 2, delta * (d - delta / 2))


def kl_div_of_torch(torch: Any) -> Function:
    """PyTorch's, but for the warning that its mean will change."""

    def kl_div(a: Any, b: Any, reduction: str, **options: Any) -> Any:
        mean = reduction == "mean"
        found = torch.nn.functional.kl_div(a, b, reduction="sum" if mean else reduction, **options)
        return found / a.numel() if mean else found

    return kl_div


def weighted_bce_of_torch(torch: Any, x: Any, y: Any, w: Any) -> Any:
    """PyTorch's own gives pos_weight no gradient."""
    log_sigmoid = torch.nn.functional.logsigmoid
    return -(w * y * log_sigmoid(x) + (1 - y) * log_sigmoid(-x)).mean()


LOSSES = [
    *pair_rows("mse_loss", lambda a, b: (a - b) ** 2, REAL, lambda t: t.nn.functional.mse_loss),
    *pair_rows("l1_loss", lambda a, b: np.abs(a - b), REAL, lambda t: t.nn.functional.l1_loss),
    *pair_rows(
        "huber_loss", lambda a, b: huber(a, b, 1.0), REAL, lambda t: t.nn.functional.huber_loss
    ),
    *pair_rows(
        "huber_loss",
        lambda a, b: huber(a, b, 2.5),
        REAL,
        lambda t: t.nn.functional.huber_loss,
        delta=2.5,
    ),
    *pair_rows(
        "bce_with_logits", bce, UNIT, lambda t: t.nn.functional.binary_cross_entropy_with_logits
    ),
    *pair_rows("kl_div", lambda a, b: b * (np.log(b) - a), UNIT, kl_div_of_torch),
    *pair_rows("kl_div", lambda a, b: np.exp(b) * (b - a), REAL, kl_div_of_torch, log_target=True),
    Row(
        "kl_div",
        lambda a, b: ops.kl_div(a, b, "batchmean"),
        lambda a, b: (b * (np.log(b) - a)).sum() / 3,
        (REAL, UNIT),
        lambda t, a, b: t.nn.functional.kl_div(a, b, reduction="batchmean"),
        case="batchmean",
        length=12,
    ),
    Row(
        "bce_with_logits",
        lambda x, y, w: ops.bce_with_logits(x, y, w),
        lambda x, y, w: bce(x, y, w).mean(),
        (REAL, UNIT, WEIGHT),
        weighted_bce_of_torch,
        case="pos_weight",
        length=12,
    ),
    *(
        class_row(kind, case, labels, **options)
        for kind in ("cross_entropy", "nll_loss")
        for case, labels, options in (
            ("mean", LABELS, {}),
            ("sum", LABELS, {"reduction": "sum"}),
            ("none", LABELS, {"reduction": "none"}),
            ("weight", LABELS, {"weighted": True}),
            ("ignore_index", SOME, {}),
            ("ignore_index in range", PADDED, {"ignore_index": 0}),
            ("ignore_index, weight", PADDED, {"ignore_index": 0, "weighted": True}),
        )
    ),
    class_row("cross_entropy", "smoothing", LABELS, label_smoothing=0.1),
    class_row("cross_entropy", "smoothing, weight", SOME, weighted=True, label_smoothing=0.3),
    Row(
        "cross_entropy",
        lambda x, y: ops.cross_entropy(x, y),
        lambda x, y: nll(log_softmax(np.einsum("ncl->nlc", x).reshape(8, 3)), y.ravel())[
            :, 0
        ].mean(),
        (CUBE, Input(values=np.array([[0, 1, 2, 1], [2, 2, 0, 1]]))),
        lambda t, x, y: t.nn.functional.cross_entropy(x, y),
        case="axes behind the classes",
        length=24,
    ),
    Row(
        "cross_entropy",
        lambda x, y: ops.cross_entropy(x, y),
        lambda x, y: nll(log_softmax(x[None]), y[None])[0, 0],
        (ROW, Input(values=np.array(1))),
        lambda t, x, y: t.nn.functional.cross_entropy(x, y),
        case="classes alone",
        length=4,
    ),
]


def normalized(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    n = math.prod(x.shape[axis] for axis in axes)
    centred = x - x.sum(axes, keepdims=True) / n
    return centred / np.sqrt((centred**2).sum(axes, keepdims=True) / n + eps)


def root_mean(x: Array, axes: tuple[int, ...], eps: float) -> Array:
    return x / np.sqrt((x * x).mean(axes, keepdims=True) + eps)


def channels(x: Array) -> Array:
    return x.reshape(1, -1, 1)


GAIN = Input((3, 4), low=0.5, high=1.5)
CHANNEL = Input((3,), low=0.5, high=1.5)
BATCH = Input((4, 3, 2))
KEPT = np.arange(12).reshape(3, 4) % 3 > 0

NORMALIZATIONS = [
    Row(
        "LayerNorm",
        normalize.LayerNorm(2, 1e-5),
        lambda x: normalized(x, (1, 2), 1e-5),
        (CUBE,),
        lambda t, x: t.nn.functional.layer_norm(x, (3, 4), eps=1e-5),
        length=12,
    ),
    Row(
        "LayerNorm",
        normalize.LayerNorm(2, 1e-5),
        lambda x, w, b: normalized(x, (1, 2), 1e-5) * w + b,
        (CUBE, GAIN, Input((3, 4))),
        lambda t, x, w, b: t.nn.functional.layer_norm(x, (3, 4), w, b, 1e-5),
        case="affine",
        length=24,
    ),
    Row(
        "RMSNorm",
        normalize.RMSNorm(1, 1e-5),
        lambda x: root_mean(x, (2,), 1e-5),
        (CUBE,),
        lambda t, x: t.nn.functional.rms_norm(x, (4,), eps=1e-5),
        length=8,
    ),
    Row(
        "RMSNorm",
        normalize.RMSNorm(2, 1e-3),
        lambda x, w: root_mean(x, (1, 2), 1e-3) * w,
        (CUBE, GAIN),
        lambda t, x, w: t.nn.functional.rms_norm(x, (3, 4), w, 1e-3),
        case="weight",
        length=24,
    ),
    Row(
        "BatchNorm",
        normalize.BatchNorm(1e-5),
        lambda x: normalized(x, (0, 2), 1e-5),
        (BATCH,),
        lambda t, x: t.nn.functional.batch_norm(x, None, None, training=True),
        length=8,
    ),
    Row(
        "BatchNorm",
        normalize.BatchNorm(1e-5),
        lambda x, w, b: normalized(x, (0, 2), 1e-5) * channels(w) + channels(b),
        (BATCH, CHANNEL, Input((3,))),
        lambda t, x, w, b: t.nn.functional.batch_norm(x, None, None, w, b, training=True),
        case="affine",
        length=16,
    ),
    Row(
        "RunningStatistics",
        normalize.RunningStatistics(0.1),
        lambda x, mean, var: (
            0.9 * mean + 0.1 * x.mean((0, 2)),
            0.9 * var + 0.1 * ((x - x.mean((0, 2), keepdims=True)) ** 2).mean((0, 2)),
        ),
        (BATCH, Input((3,)), CHANNEL),
        length=8,
        wanted=(),
    ),
    Row(
        "NormalizeWith",
        normalize.NormalizeWith(1e-5),
        lambda x, mean, var, w, b: (
            (x - channels(mean)) / np.sqrt(channels(var) + 1e-5) * channels(w) + channels(b)
        ),
        (BATCH, Input((3,)), CHANNEL, CHANNEL, Input((3,))),
        lambda t, x, mean, var, w, b: t.nn.functional.batch_norm(x, mean, var, w, b),
        length=8,
        wanted=(0, 3, 4),
    ),
    Row(
        "Masked",
        lambda x, mask: normalize.masked(x, mask, 0.25),
        lambda x, mask: np.where(mask, x / 0.75, 0),
        (REAL, Input(values=KEPT)),
        lambda t, x, mask: x * mask / 0.75,
    ),
    Row(
        "Masked",
        lambda x, mask: normalize.masked(x, mask, 0.25),
        lambda x, mask: x * mask / 0.75,
        (REAL, UNIT),
        lambda t, x, mask: x * mask / 0.75,
        case="float mask",
    ),
]

# Optimizer updates. The references follow the papers' equations, in their order.
P, G, STATE = REAL, Input(low=-1.0, high=1.0), Input(low=0.05, high=1.0)
RATE = Input(values=np.array(0.1), fixed=True)
C1, C2 = 1 - 0.9**3, 1 - 0.99**3
NO_GRADIENT = {"wanted": (), "length": 12}


def sgd(p: Array, g: Array, lr: Array, u: Array) -> tuple[Array, ...]:
    g = g + 0.01 * p
    u = 0.9 * u + (1 - 0.1) * g
    return p - lr * u, u


def nesterov(p: Array, g: Array, lr: Array, u: Array) -> tuple[Array, ...]:
    u = 0.9 * u + g
    return p - lr * (g + 0.9 * u), u


def rmsprop(p: Array, g: Array, lr: Array, v: Array, a: Array, b: Array) -> tuple[Array, ...]:
    v = 0.99 * v + 0.01 * g**2
    a = 0.99 * a + 0.01 * g
    b = 0.9 * b + g / (np.sqrt(np.maximum(v - a**2, 0)) + 1e-8)
    return p - lr * b, v, a, b


def adam(
    p: Array, g: Array, lr: Array, c1: Array, c2: Array, m: Array, v: Array
) -> tuple[Array, ...]:
    m = 0.9 * m + 0.1 * g
    v = 0.99 * v + 0.01 * g**2
    return p - lr * (m / c1) / (np.sqrt(v / c2) + 1e-8), m, v


def adafactor(
    p: Array, g: Array, lr: Any, rho: Any, share: Any, r: Array, c: Array
) -> tuple[Array, ...]:
    squares = g**2 + 1e-30
    r = (1 - share) * r + share * squares.mean(1)
    c = (1 - share) * c + share * squares.mean(0)
    u = g / np.sqrt(np.outer(r, c) / r.mean())
    u = u / max(1.0, math.sqrt((u**2).mean()))
    return p - rho * max(1e-3, math.sqrt((p**2).mean())) * u, r, c


def adafactor_whole(
    p: Array, g: Array, lr: Any, rho: Any, share: Any, v: Array
) -> tuple[Array, ...]:
    v = (1 - share) * v + share * (g**2 + 1e-30)
    u = g / np.sqrt(v)
    u = u / max(1.0, math.sqrt((u**2).mean()))
    return (1 - 0.01 * lr) * p - rho * u, v


def clipped_by_norm(a: Array, b: Array) -> tuple[Any, ...]:
    n = math.sqrt((a**2).sum() + (b**2).sum())
    return np.float64(n), a * min(1, 2 / (n + 1e-6)), b * min(1, 2 / (n + 1e-6))


UPDATES = [
    Row(
        "SGDUpdate",
        update.SGDUpdate(0.0, 0.0, 0.0, False),
        lambda p, g, lr: (p - lr * g,),
        (P, G, RATE),
        **NO_GRADIENT,
    ),
    Row(
        "SGDUpdate",
        update.SGDUpdate(0.9, 0.1, 0.01, False),
        sgd,
        (P, G, RATE, STATE),
        case="momentum",
        **NO_GRADIENT,
    ),
    Row(
        "SGDUpdate",
        update.SGDUpdate(0.9, 0.0, 0.0, True),
        nesterov,
        (P, G, RATE, STATE),
        case="nesterov",
        **NO_GRADIENT,
    ),
    Row(
        "AdagradUpdate",
        update.AdagradUpdate(1e-10, 0.0),
        lambda p, g, lr, s: (p - lr * g / (np.sqrt(s + g**2) + 1e-10), s + g**2),
        (P, G, RATE, STATE),
        **NO_GRADIENT,
    ),
    Row(
        "RMSpropUpdate",
        update.RMSpropUpdate(0.99, 1e-8, 0.0, 0.9, True),
        rmsprop,
        (P, G, RATE, Input(low=1.0, high=2.0), Input(low=0.05, high=0.2), STATE),
        **NO_GRADIENT,
    ),
    Row(
        "BiasCorrection",
        update.BiasCorrection(0.9, 0.99),
        lambda t: (np.float64(C1), np.float64(C2)),
        (Input(values=np.array(3.0), fixed=True),),
        **NO_GRADIENT,
    ),
    Row(
        "AdamUpdate",
        update.AdamUpdate(0.9, 0.99, 1e-8, 0.0, False),
        adam,
        (
            P,
            G,
            RATE,
            Input(values=np.array(C1), fixed=True),
            Input(values=np.array(C2), fixed=True),
            G,
            STATE,
        ),
        **NO_GRADIENT,
    ),
    Row(
        "AdamUpdate",
        update.AdamUpdate(0.9, 0.99, 1e-8, 0.02, True),
        lambda p, g, lr, *rest: adam((1 - lr * 0.02) * p, g, lr, *rest),
        (
            P,
            G,
            RATE,
            Input(values=np.array(C1), fixed=True),
            Input(values=np.array(C2), fixed=True),
            G,
            STATE,
        ),
        case="decoupled",
        **NO_GRADIENT,
    ),
    Row(
        "LionUpdate",
        update.LionUpdate(0.9, 0.99, 0.05),
        lambda p, g, lr, m: (p - lr * (np.sign(0.9 * m + 0.1 * g) + 0.05 * p), 0.99 * m + 0.01 * g),
        (P, G, RATE, G),
        **NO_GRADIENT,
    ),
    Row(
        "AdafactorUpdate",
        update.AdafactorUpdate(1e-30, 1e-3, 1.0, 0.0, True),
        adafactor,
        (P, G, RATE, RATE, RATE, Input((3,), 0.05, 1), Input((4,), 0.05, 1)),
        **NO_GRADIENT,
    ),
    Row(
        "AdafactorUpdate",
        update.AdafactorUpdate(1e-30, 1e-3, 1.0, 0.01, False),
        adafactor_whole,
        (P, G, RATE, RATE, RATE, STATE),
        case="whole",
        **NO_GRADIENT,
    ),
    Row(
        "ClippedByNorm",
        update.ClippedByNorm(2.0, 2.0),
        clipped_by_norm,
        (MATRIX, ROW),
        **{**NO_GRADIENT, "roundings": 8, "length": 16},
    ),
    Row(
        "Unscaled",
        update.Unscaled(),
        lambda scale, *grads: (np.array(False), *(g / scale for g in grads)),
        (Input(values=np.array(48.0), fixed=True), MATRIX, ROW),
        **{**NO_GRADIENT, "roundings": 2},
    ),
    Row(
        "ScaleUpdate",
        update.ScaleUpdate(2.0, 0.25, 3.0),
        lambda scale, steps, found: (2 * scale, np.float64(0)),
        tuple(Input(values=np.array(x), fixed=True) for x in (8.0, 2.0, False)),
        case="grows",
        **NO_GRADIENT,
    ),
    Row(
        "ScaleUpdate",
        update.ScaleUpdate(2.0, 0.25, 3.0),
        lambda scale, steps, found: (0.25 * scale, np.float64(0)),
        tuple(Input(values=np.array(x), fixed=True) for x in (8.0, 2.0, True)),
        case="shrinks",
        **NO_GRADIENT,
    ),
    Row(
        "ScaleUpdate",
        update.ScaleUpdate(2.0, 0.25, 3.0),
        lambda scale, steps, found: (scale, steps + 1),
        tuple(Input(values=np.array(x), fixed=True) for x in (8.0, 1.0, False)),
        case="stands",
        **NO_GRADIENT,
    ),
]


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox 4x32-10 on Python's integers, as in figure 2 of Salmon et al. (2011)."""
    x, k, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [b >> 32 ^ x[1] ^ k[0], b & mask, a >> 32 ^ x[3] ^ k[1], a & mask]
        k = [k[0] + 0x9E3779B9 & mask, k[1] + 0xBB67AE85 & mask]
    return x


def uniform(key: int, counter: int, size: int) -> Array:
    """Numbers of 24 bits from the blocks counter, counter + 1, ..."""
    words: list[int] = []
    for block in range(counter, counter + -(-size // 4)):
        words += philox([block & 0xFFFFFFFF, block >> 32, 0, 0], [key & 0xFFFFFFFF, key >> 32])
    return np.array([word >> 8 for word in words[:size]]) / 2.0**24


RANDOM = [
    Row(
        "RandomUniform",
        RandomUniform((3, 3), as_dtype("float32")),
        lambda state: uniform(7, (1 << 32) - 1, 9).reshape(3, 3),
        (Input(values=np.array([7, (1 << 32) - 1])),),
    )
]


def convolved(x: Array, w: Array, stride: int, pad: int, dilation: int, groups: int) -> Array:
    """A convolution of channels last, term by term."""
    kernel, (c, out) = w.shape[:-2], w.shape[-2:]
    x = np.pad(x, [(0, 0), *[(pad, pad)] * len(kernel), (0, 0)])
    sizes = [
        (n - dilation * (k - 1) - 1) // stride + 1
        for n, k in zip(x.shape[1:-1], kernel, strict=True)
    ]
    y = np.zeros((x.shape[0], *sizes, out))
    for place in np.ndindex(*sizes):
        for tap in np.ndindex(*kernel):
            at = tuple(p * stride + t * dilation for p, t in zip(place, tap, strict=True))
            for g in range(groups):
                ins, outs = (slice(g * n, (g + 1) * n) for n in (c, out // groups))
                y[(slice(None), *place, outs)] += x[(slice(None), *at, ins)] @ w[(*tap,)][:, outs]
    return y


def spread(x: Array, w: Array, size: Sequence[int], *settings: int) -> Array:
    """The transposed convolution, by definition: y[i] = the sum over j of x[j] d conv(e_i)[j]."""
    n, c = x.shape[0], w.shape[-2] * settings[-1]
    units = np.eye(math.prod(size) * c).reshape(-1, *size, c)
    columns = convolved(units, w, *settings).reshape(len(units), -1)
    return (x.reshape(n, -1) @ columns.T).reshape(n, *size, c)


def in_torch(name: str, **settings: Any) -> Function:
    """PyTorch's convolution, channels last."""

    def run(t: Any, x: Any, w: Any) -> Any:
        function = getattr(t.nn.functional, f"{name}{x.ndim - 2}d")
        w = w.permute(-1, -2, *range(x.ndim - 2))
        return function(x.movedim(-1, 1), w, **settings).movedim(1, -1)

    return run


def conv_row(case: str, x: tuple[int, ...], w: tuple[int, ...], *settings: int) -> Row:
    names = ("stride", "padding", "dilation", "groups")
    given = dict(zip(names, settings, strict=True))
    return Row(
        "conv",
        lambda x, w: ops.conv(x, w, *settings),
        lambda x, w: convolved(x, w, *settings),
        (Input(x), Input(w)),
        in_torch("conv", **given),
        case=case,
        length=math.prod(w[:-1]),
    )


def conv_transpose_row(
    case: str, x: tuple[int, ...], w: tuple[int, ...], size: Sequence[int], *settings: int
) -> Row:
    stride, padding, extra, dilation, groups = settings
    return Row(
        "conv_transpose",
        lambda x, w: ops.conv_transpose(x, w, *settings),
        lambda x, w: spread(x, w, size, stride, padding, dilation, groups),
        (Input(x), Input(w)),
        in_torch(
            "conv_transpose",
            stride=stride,
            padding=padding,
            output_padding=extra,
            dilation=dilation,
            groups=groups,
        ),
        case=case,
        length=math.prod(w[:-2]) * w[-1],
    )


CONVOLUTIONS = [
    Row(
        "windows",
        lambda x: ops.windows(x, (2, 3), (2, 1), (1, 2)),
        lambda x: np.stack(
            [np.stack([x[:, i : i + 3 : 2, j : j + 2] for j in (0, 2, 4)], 3) for i in (0, 1)], 3
        ),
        (Input((2, 4, 6, 3)),),
        lambda t, x: x.unfold(1, 2, 2).unfold(2, 5, 1)[..., ::2].movedim(3, -1),
    ),
    conv_row("2d", (2, 5, 4, 3), (3, 2, 3, 4), 1, 1, 1, 1),
    conv_row("1d, stride", (2, 7, 3), (3, 3, 2), 2, 1, 1, 1),
    conv_row("3d", (1, 3, 4, 3, 2), (2, 2, 2, 2, 3), 1, 0, 1, 1),
    conv_row("2d, stride, dilation", (1, 7, 6, 2), (2, 2, 2, 3), 3, 2, 2, 1),
    conv_row("2d, groups", (1, 4, 5, 4), (3, 3, 2, 6), 2, 1, 1, 2),
    conv_row("2d, taps in the padding", (2, 1, 2, 2), (3, 3, 2, 3), 2, 1, 1, 1),
    conv_row("2d, depthwise", (1, 5, 4, 3), (3, 3, 1, 6), 1, 1, 1, 3),
    conv_transpose_row("2d", (2, 3, 2, 3), (3, 2, 2, 3), (6, 3), 2, 1, 1, 1, 1),
    conv_transpose_row("1d, groups", (1, 4, 4), (3, 1, 4), (10,), 3, 1, 0, 1, 2),
]


def windows_of(x: Array, kernel: int, stride: int, pad: int, fill: float) -> Array:
    """The windows of channels-last images, their elements along a last axis."""
    count = x.ndim - 2
    x = np.pad(x, [(0, 0), *[(pad, pad)] * count, (0, 0)], constant_values=fill)
    found = np.lib.stride_tricks.sliding_window_view(
        x, (kernel,) * count, tuple(range(1, count + 1))
    )
    found = found[(slice(None), *[slice(None, None, stride)] * count)]
    return found.reshape(*found.shape[: count + 2], -1)


def channels_first(name: str, *settings: Any, **more: Any) -> Function:
    """A function of PyTorch's, of channels-last images."""

    def run(t: Any, x: Any) -> Any:
        rank = "" if "pixel" in name or name == "interpolate" else f"{x.ndim - 2}d"
        function = getattr(t.nn.functional, name + rank)
        return function(x.movedim(-1, 1), *settings, **more).movedim(1, -1)

    return run


def pool_rows(case: str, x: tuple[int, ...], kernel: int, stride: int, pad: int) -> list[Row]:
    settings = kernel, stride, pad
    return [
        Row(
            "max_pool",
            lambda x: ops.max_pool(x, *settings),
            lambda x: windows_of(x, *settings, -np.inf).max(-1),
            (Input(x),),
            channels_first("max_pool", *settings),
            case=case,
        ),
        Row(
            "avg_pool",
            lambda x: ops.avg_pool(x, *settings),
            lambda x: windows_of(x, *settings, 0.0).mean(-1),
            (Input(x),),
            channels_first("avg_pool", *settings),
            case=case,
            length=kernel ** (len(x) - 2),
        ),
    ]


def shares(x: Array, size: int, function: Function) -> Array:
    """A function of each of `size` windows that share an axis of (n, length, c) evenly."""
    n = x.shape[1]
    bounds = [(i * n // size, math.ceil((i + 1) * n / size)) for i in range(size)]
    return np.stack([function(x[:, start:stop], 1) for start, stop in bounds], 1)


IMAGES = [
    *pool_rows("2d, tiles", (2, 5, 4, 2), 2, 2, 0),
    *pool_rows("2d, overlap", (1, 5, 4, 2), 3, 2, 1),
    *pool_rows("1d, long", (1, 20, 2), 17, 1, 3),
    *pool_rows("3d", (1, 3, 4, 3, 2), 2, 1, 1),
    Row(
        "avg_pool",
        lambda x: ops.avg_pool(x, 2, 2, 1, count_include_pad=False),
        lambda x: np.nanmean(windows_of(x, 2, 2, 1, np.nan), -1),
        (Input((1, 4, 4, 2)),),
        channels_first("avg_pool", 2, 2, 1, count_include_pad=False),
        case="without padding",
        length=4,
    ),
    Row(
        "adaptive_max_pool",
        lambda x: ops.adaptive_max_pool(x, 3),
        lambda x: shares(x, 3, np.max),
        (Input((2, 7, 2)),),
        channels_first("adaptive_max_pool", 3),
    ),
    Row(
        "adaptive_max_pool",
        lambda x: ops.adaptive_max_pool(x, 1),
        lambda x: x.max((1, 2), keepdims=True),
        (Input((2, 3, 2, 2)),),
        channels_first("adaptive_max_pool", 1),
        case="global",
    ),
    Row(
        "adaptive_avg_pool",
        lambda x: ops.adaptive_avg_pool(x, 3),
        lambda x: shares(x, 3, np.mean),
        (Input((2, 7, 2)),),
        channels_first("adaptive_avg_pool", 3),
        length=3,
    ),
    Row(
        "adaptive_avg_pool",
        lambda x: ops.adaptive_avg_pool(x, 1),
        lambda x: x.mean((1, 2), keepdims=True),
        (Input((2, 3, 4, 2)),),
        channels_first("adaptive_avg_pool", 1),
        case="global",
        length=12,
    ),
    Row(
        "interpolate",
        lambda x: ops.interpolate(x, scale_factor=2),
        lambda x: np.repeat(np.repeat(x, 2, 1), 2, 2),
        (Input((1, 2, 3, 2)),),
        channels_first("interpolate", scale_factor=2),
        length=4,
    ),
    Row(
        "interpolate",
        lambda x: ops.interpolate(x, 5),
        lambda x: x[:, np.arange(5) * 3 // 5],
        (Input((2, 3, 2)),),
        channels_first("interpolate", 5),
        case="another size",
        length=2,
    ),
    Row(
        "interpolate",
        lambda x: ops.interpolate(x, (4, 5), mode="bilinear", align_corners=True),
        lambda x: np.einsum("ih,jw,nhwc->nijc", hats(2, 4), hats(3, 5), x),
        (Input((1, 2, 3, 2)),),
        channels_first("interpolate", (4, 5), mode="bilinear", align_corners=True),
        case="bilinear",
        length=10,
    ),
    Row(
        "pixel_shuffle",
        lambda x: ops.pixel_shuffle(x, 2),
        lambda x: np.einsum("nhwcij->nhiwjc", x.reshape(1, 2, 3, 2, 2, 2)).reshape(1, 4, 6, 2),
        (Input((1, 2, 3, 8)),),
        channels_first("pixel_shuffle", 2),
    ),
    Row(
        "pixel_unshuffle",
        lambda x: ops.pixel_unshuffle(x, 2),
        lambda x: np.einsum("nhiwjc->nhwcij", x.reshape(1, 2, 2, 3, 2, 2)).reshape(1, 2, 3, 8),
        (Input((1, 4, 6, 2)),),
        channels_first("pixel_unshuffle", 2),
    ),
    Row(
        "InstanceNorm",
        normalize.InstanceNorm(1e-5),
        lambda x, w, b: normalized(x, (1,), 1e-5) * w + b,
        (Input((2, 6, 3)), CHANNEL, Input((3,))),
        lambda t, x, w, b: t.nn.functional.instance_norm(
            x.movedim(-1, 1), weight=w, bias=b, eps=1e-5
        ).movedim(1, -1),
        length=12,
    ),
]


def hats(size: int, out: int) -> Array:
    """The weights of linear interpolation whose first and last elements stay."""
    places = np.arange(out)[:, None] * (size - 1) / (out - 1)
    return np.maximum(1 - np.abs(places - np.arange(size)), 0)


ROWS = [
    *ELEMENTWISE,
    *MOVEMENT,
    *REDUCTIONS,
    *CONTRACTIONS,
    *CONVOLUTIONS,
    *IMAGES,
    *INDEX,
    *LOSSES,
    *NORMALIZATIONS,
    *UPDATES,
    *RANDOM,
]

# Ops that are no node's own op: the kernel behind a - b, and the gradients of composites.
BEHIND_OTHERS = {"Subtract": "subtract", "CompositeGradient": "softmax"}
