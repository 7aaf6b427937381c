"""Random programs: what the promise of equal bits is tested with.

`Maker(choice).program()` gives arrays and a function of Tensors over them; `choice` decides
everything, so that hypothesis can shrink a program and a seed can repeat one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import ml_dtypes
import numpy as np

import needle as ndl
from needle import nn, ops
from needle.autograd import Tensor
from needle.dtype import FLOATS, as_dtype

SIZES = (1, 2, 3, 5, 7, 16, 17, 33, 64, 0)
FLOAT_NAMES = ("float32", "float32", "float64", "bfloat16", "float16")
OTHER_NAMES = ("int32", "int64", "int8", "uint8", "int16", "bool")
Step = Callable[[list[Tensor]], Tensor]


class Choice(Protocol):
    """Where decisions come from."""

    def below(self, n: int) -> int:
        """An integer from 0 to n - 1; 0 is the simplest."""
        ...


class Seeded:
    """Decisions of a seeded generator."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def below(self, n: int) -> int:
        return int(self.rng.integers(n))


UNARY = (
    "exp", "log", "tanh", "sqrt", "rsqrt", "sin", "cos", "erf", "expm1", "log1p", "relu", "sigmoid",
    "gelu", "silu", "softplus", "elu", "leaky_relu", "abs", "negate", "sign", "floor", "ceil",
    "round", "square", "isnan", "isinf", "isfinite",
)  # fmt: skip
BINARY = (
    "add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "less", "less_equal",
    "equal", "not_equal", "remainder", "floor_divide", "logical_and", "logical_or", "logical_xor",
)  # fmt: skip
SCALAR: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: x + 2.5, lambda x: x * 0.5, lambda x: x / 3.0, lambda x: 1.0 - x, lambda x: 2.0 / x,
    lambda x: x**2, lambda x: x**3, lambda x: x**0.5, lambda x: ops.clip(x, -1.0, 1.0),
    lambda x: x > 0.0, lambda x: ops.where(x > 0.5, x, 0.25),
)  # fmt: skip
OVER_AXIS: tuple[Callable[[Tensor, int], Any], ...] = (
    lambda x, axis: x.sum(axis), lambda x, axis: x.sum(axis, keepdims=True),
    lambda x, axis: x.mean(axis), lambda x, axis: ops.cumsum(x, axis),
    lambda x, axis: ops.flip(x, axis), lambda x, axis: ops.any(x, axis), lambda x, axis: x.sum(),
    lambda x, axis: ops.roll(x, 2, axis), lambda x, axis: ops.repeat(x, 2, axis),
    lambda x, axis: ops.concatenate([x, x * 2, x], axis), lambda x, axis: ops.stack([x, x], axis),
    lambda x, axis: ops.concatenate([x] * 6, axis), lambda x, axis: ops.argsort(x, axis),
    lambda x, axis: ops.prod(x, axis), lambda x, axis: ops.all(x, axis),
)  # fmt: skip
OVER_FULL_AXIS: tuple[Callable[[Tensor, int], Any], ...] = (  # that has elements
    lambda x, axis: x.max(axis), lambda x, axis: x.min(axis), lambda x, axis: ops.argmax(x, axis),
    lambda x, axis: ops.argmin(x, axis), lambda x, axis: ops.softmax(x, axis),
    lambda x, axis: ops.logsoftmax(x, axis), lambda x, axis: ops.logsumexp(x, axis),
    lambda x, axis: ops.var(x, axis), lambda x, axis: ops.std(x, axis, correction=1),
    lambda x, axis: ops.norm(x, 2, axis), lambda x, axis: x - x.max(axis, keepdims=True),
    lambda x, axis: ops.take(x, np.array([0, -1, 0]), axis),
    lambda x, axis: ops.split(x, axis, 2)[0],
)  # fmt: skip


def random_array(choice: Choice, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Numbers of mixed sizes, some of them special."""
    rng = np.random.default_rng(choice.below(1000))
    x = rng.normal(size=shape) * 10.0 ** rng.integers(-2, 2, shape)
    if dtype in ("float32", "float64") and choice.below(4) == 1:
        special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38])
        x = np.where(rng.random(shape) < 0.1, rng.choice(special, shape), x)
    with np.errstate(all="ignore"):
        if dtype == "bool":
            return np.asarray(x > 0)
        kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
        whole = as_dtype(dtype) not in FLOATS
        return np.clip(np.round(x * 3), -100, 100).astype(kind) if whole else x.astype(kind)


class Maker:
    """Makes one program."""

    def __init__(self, choice: Choice, steps: int = 8) -> None:
        self.choice = choice
        self.most = steps
        self.chosen: list[str] = []

    def pick(self, items: Sequence[Any]) -> Any:
        return items[self.choice.below(len(items))]

    def program(self) -> tuple[list[np.ndarray], Callable[..., list[Tensor]]]:
        """(arrays, function): the function's results, then gradients of the float arrays."""
        arrays = [self.array() for _ in range(1 + self.choice.below(3))]
        steps: list[Step] = []
        with ndl.no_grad():
            device = ndl.cpu_numpy()
            values = [Tensor(x, device=device, requires_grad=False) for x in arrays]
            for _ in range(1 + self.choice.below(self.most)):
                step = self.step(values)
                if step is not None:
                    values.append(step(values))
                    steps.append(step)
        with_gradient = self.choice.below(2) == 1

        def run(*inputs: Tensor) -> list[Tensor]:
            found = list(inputs)
            for step in steps:
                found.append(step(found))
            results = found[len(inputs) :][-3:]
            total = sum_of([y for y in results if y.requires_grad])
            if not with_gradient or total is None:
                return [y.detach() for y in results]
            total.backward()
            grads = [x.grad for x in inputs if x.grad is not None]
            for x in inputs:
                x.grad = None
            return [y.detach() for y in [*results, *grads]]

        return arrays, run

    def array(self) -> np.ndarray:
        shape = tuple(self.pick(SIZES) for _ in range(self.choice.below(4)))
        dtype = self.pick(FLOAT_NAMES if self.choice.below(4) else OTHER_NAMES)
        x = random_array(self.choice, shape, dtype)
        layout = self.choice.below(4)
        if layout == 1 and x.ndim > 1:
            return np.asfortranarray(x)
        if layout == 2 and x.ndim and x.shape[-1] > 1:
            return np.repeat(x, 2, -1)[..., ::2]
        return x[::-1] if layout == 3 and x.ndim else x

    # Steps: functions of all values so far

    def step(self, values: list[Tensor]) -> Step | None:
        """A step that works on these values, None if the chosen one does not."""
        kinds = (self.unary, self.scalar, self.binary, self.over_axis, self.move, self.product,
                 self.cast, self.normalize, self.loss)  # fmt: skip
        step = self.pick(kinds)(values)
        if step is None:
            return None
        try:
            found = step(values)
        except (ValueError, TypeError, IndexError):
            return None
        return step if found.size < 20_000 else None

    def source(self, values: Sequence[Tensor]) -> int:
        return len(values) - 1 - self.choice.below(len(values))

    def unary(self, values: list[Tensor]) -> Step:
        name, a = self.pick(UNARY), self.source(values)
        self.chosen.append(name)
        return lambda v: getattr(ops, name)(v[a])

    def scalar(self, values: list[Tensor]) -> Step:
        function, a = self.pick(SCALAR), self.source(values)
        return lambda v: function(v[a])

    def binary(self, values: list[Tensor]) -> Step:
        name, a, b = self.pick(BINARY), self.source(values), self.source(values)
        self.chosen.append(name)
        return lambda v: getattr(ops, name)(v[a], v[b])

    def over_axis(self, values: list[Tensor]) -> Step | None:
        a = self.source(values)
        shape = values[a].shape
        if not shape:
            return None
        axis = self.choice.below(len(shape))
        table = OVER_AXIS + OVER_FULL_AXIS if shape[axis] else OVER_AXIS
        function = self.pick(table)
        return lambda v: function(v[a], axis)

    def move(self, values: list[Tensor]) -> Step | None:
        a = self.source(values)
        x = values[a]
        order = list(range(x.ndim))
        for place in order[:]:
            order.insert(self.choice.below(len(order)), order.pop(place))
        shape = self.reshaped(x.shape)
        cuts = tuple(slice(None, None, self.pick((1, 2, -1, -2))) for _ in x.shape)
        wide = (2, *x.shape)
        moves: tuple[Step, ...] = (
            lambda v: ops.permute(v[a], order), lambda v: v[a].reshape(shape), lambda v: v[a][cuts],
            lambda v: v[a].broadcast_to(wide), lambda v: ops.pad(v[a], 1, 2),
            lambda v: ops.tril(v[a]), lambda v: ops.tile(v[a], 2),
            lambda v: ops.dilate(v[a], tuple(range(v[a].ndim)), 1),
        )  # fmt: skip
        return self.pick(moves)

    def reshaped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = int(np.prod(shape))
        parts = [n for n in (2, 3, 4, 5, 7, 8) if size and size % n == 0]
        if not parts:
            return (size,)
        n = self.pick(parts)
        return self.pick(((size // n, n), (n, size // n), (size,), (1, n, size // n)))

    def product(self, values: list[Tensor]) -> Step | None:
        a, b = self.source(values), self.source(values)
        x, y = values[a], values[b]
        if x.ndim < 1 or y.ndim < 1 or x.size * y.size > 2_000_000:
            return None
        if x.ndim > 1 and y.ndim > 1 and x.shape[-1] != y.shape[-2]:
            if x.shape[-1] == y.shape[-1]:
                return lambda v: ops.matmul(v[a], ops.transpose(v[b]))
            if x.shape[-2] == y.shape[-2]:
                return lambda v: ops.matmul(ops.transpose(v[a]), v[b])
        return lambda v: ops.matmul(v[a], v[b])

    def cast(self, values: list[Tensor]) -> Step:
        a, dtype = self.source(values), self.pick(FLOAT_NAMES + OTHER_NAMES)
        return lambda v: v[a].astype(dtype)

    def normalize(self, values: list[Tensor]) -> Step | None:
        a = self.source(values)
        x = values[a]
        if x.ndim < 2 or x.dtype not in FLOATS or not x.size:
            return None
        size = x.shape[-1]
        weight = np.linspace(0.5, 1.5, size).astype(x.dtype)
        moves: list[Step] = [
            lambda v: nn.functional.layer_norm(v[a], (size,), Tensor(weight, device=v[a].device))
        ]
        if x.ndim == 2 and x.shape[0] > 1:
            moves.append(
                lambda v: nn.functional.batch_norm(v[a], None, None, None, None, training=True)
            )
        return self.pick(moves)

    def loss(self, values: list[Tensor]) -> Step | None:
        a = self.source(values)
        x = values[a]
        if x.ndim != 2 or x.dtype not in FLOATS or not x.size:
            return None
        labels = np.arange(x.shape[0]) % x.shape[1]
        losses: tuple[Step, ...] = (
            lambda v: nn.functional.cross_entropy(v[a], labels),
            lambda v: nn.functional.mse_loss(v[a], v[a] * 0.5),
            lambda v: nn.functional.huber_loss(v[a], v[a] * 0.5),
        )
        return self.pick(losses)


def sum_of(values: Sequence[Tensor]) -> Tensor | None:
    """One number that all values count in, each by itself: in float64."""
    total: Tensor | None = None
    for y in values:
        part = (y.astype("float64") * 0.5).sum()
        total = part if total is None else total + part
    return total
