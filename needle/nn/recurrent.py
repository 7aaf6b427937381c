"""Recurrent layers: RNN, LSTM and GRU, and their cells. Next: container.py.

A layer computes the input's share of all time steps as one product, and runs the rest by `scan`: a
step is one product with W_hh and one loop over what follows it. Weights are those of the course,
(inputs, gates * hidden), gates side by side in PyTorch's order.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np

from needle.array.ndarray import NDArray
from needle.autograd import Tensor
from needle.dtype import INTEGERS
from needle.errors import expect
from needle.init import rand, zeros
from needle.nn import functional
from needle.nn.activation import Dropout
from needle.nn.module import Module, Parameter
from needle.ops import (
    arange,
    astype,
    concatenate,
    less,
    matmul,
    permute,
    relu,
    reshape,
    sigmoid,
    split,
    stack,
    tanh,
    where,
)  # fmt: skip
from needle.scan import scan

State = tuple[Tensor, ...]


class Cell(Module):
    """One time step. W_ih (input_size, gates * hidden_size), W_hh (hidden_size, ...), bias_ih and
    bias_hh are drawn from U(-k, k), k = hidden_size^-1/2, in this order."""

    gates: ClassVar[int] = 1
    states: ClassVar[int] = 1  # how many tensors the state has

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, device: Any = None,
        dtype: Any = "float32",
    ) -> None:  # fmt: skip
        for size in (input_size, hidden_size):
            fits = isinstance(size, int) and size > 0
            expect(fits, f"{self.name}: expected sizes of at least 1; received {size!r}")
        self.input_size, self.hidden_size = input_size, hidden_size
        bound, width = 1 / math.sqrt(hidden_size), self.gates * hidden_size

        def draw(*shape: int) -> Parameter:
            return Parameter(rand(*shape, low=-bound, high=bound, device=device, dtype=dtype))

        self.W_ih, self.W_hh = draw(input_size, width), draw(hidden_size, width)
        self.bias_ih: Tensor | None = draw(width) if bias else None
        self.bias_hh: Tensor | None = draw(width) if bias else None

    @property
    def name(self) -> str:
        return type(self).__name__

    def project(self, x: Tensor) -> Tensor:
        """The input's share of the gates, of x (..., input_size), both biases in it."""
        bias = self.bias_ih
        if bias is not None and self.bias_hh is not None:
            bias = bias + self.bias_hh
        return functional.linear(x, self.W_ih, bias)

    def step(self, gates: Tensor, state: State) -> State:
        """The next state, from the input's share and the state before."""
        raise NotImplementedError(f"{self.name}: step is not written")

    def begin(self, x: Tensor, batch: int) -> State:
        """A state of zeros."""
        zero = zeros(batch, self.hidden_size, device=x.device, dtype=x.dtype)
        return (zero,) * self.states

    def advance(self, x: Tensor, state: State | None) -> State:
        shape = f"{self.name}: expected x of shape (batch, {self.input_size})"
        fits = x.ndim == 2 and x.shape[1] == self.input_size
        expect(fits, f"{shape}; received {x.shape}")
        state = self.begin(x, len(x)) if state is None else state
        check_state(self.name, state, (len(x), self.hidden_size))
        return self.step(self.project(x), state)

    def forward(self, x: Tensor, h: Any = None) -> Any:
        return self.advance(x, None if h is None else (h,))[0]


def check_state(name: str, state: State, shape: tuple[int, ...]) -> None:
    for each in state:
        expect(
            each.shape == shape, f"{name}: expected a state of shape {shape}; received {each.shape}"
        )


class RNNCell(Cell):
    """h' = nonlinearity(x W_ih + bias_ih + h W_hh + bias_hh), "tanh" or "relu"

    of x (batch, input_size) and h (batch, hidden_size), zeros by default (Elman, 1990).
    """

    def __init__(
        self, input_size: int, hidden_size: int, bias: bool = True, nonlinearity: str = "tanh",
        device: Any = None, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        known = {"tanh": tanh, "relu": relu}
        received = f"received {nonlinearity!r}"
        expect(nonlinearity in known, f"{self.name}: expected 'tanh' or 'relu'; {received}")
        self.nonlinearity = nonlinearity
        self.function = known[nonlinearity]
        super().__init__(input_size, hidden_size, bias, device, dtype)

    def step(self, gates: Tensor, state: State) -> State:
        (h,) = state
        return (astype(self.function(gates + matmul(h, self.W_hh)), h.dtype),)


class LSTMCell(Cell):
    """i, f, g, o = x W_ih + bias_ih + h W_hh + bias_hh
    c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c')

    of x (batch, input_size) and the state (h, c), each (batch, hidden_size), zeros by default;
    gives (h', c') (Hochreiter and Schmidhuber, 1997; Gers et al., 2000).
    """

    gates = 4
    states = 2

    def step(self, gates: Tensor, state: State) -> State:
        h, c = state
        i, f, g, o = split(gates + matmul(h, self.W_hh), 1, self.hidden_size)
        after = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return astype(sigmoid(o) * tanh(after), h.dtype), astype(after, c.dtype)

    def forward(self, x: Tensor, h: Any = None) -> tuple[Tensor, Tensor]:
        after, c = self.advance(x, None if h is None else tuple(h))
        return after, c


class GRUCell(Cell):
    """r, z = sigmoid of their shares of x W_ih + bias_ih + h W_hh + bias_hh
    n = tanh(its share of x W_ih + bias_ih + r (h W_hh + bias_hh));  h' = (1 - z) n + z h

    of x (batch, input_size) and h (batch, hidden_size), zeros by default (Cho et al., 2014; r
    comes after the product, as in cuDNN and PyTorch).
    """

    gates = 3

    def project(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.W_ih, self.bias_ih)

    def step(self, gates: Tensor, state: State) -> State:
        (h,) = state
        size = self.hidden_size
        recurrent = split(functional.linear(h, self.W_hh, self.bias_hh), 1, size)
        r, z, n = zip(split(gates, 1, size), recurrent, strict=True)
        update = sigmoid(z[0] + z[1])
        new = tanh(n[0] + sigmoid(r[0] + r[1]) * n[1])
        return (astype((h - new) * update + new, h.dtype),)


# Layers


class Recurrent(Module):
    """Layers of cells over time: see RNN."""

    kind: type[Cell]
    name: str  # of the attribute that holds the cells

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        device: Any = None, dtype: Any = "float32", *, batch_first: bool = False,
        dropout: float = 0.0, bidirectional: bool = False, checkpoint_every: int | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        fits = isinstance(num_layers, int) and num_layers > 0
        expect(fits, f"{name}: expected num_layers of at least 1; received {num_layers!r}")
        options |= {"bias": bias, "device": device, "dtype": dtype}
        directions = 1 + bidirectional
        sizes = [input_size] + [directions * hidden_size] * (num_layers - 1)
        every = [size for size in sizes for _ in range(directions)]
        setattr(self, self.name, [self.kind(size, hidden_size, **options) for size in every])
        self.num_layers, self.bidirectional = num_layers, bidirectional
        self.batch_first = batch_first
        self.input_size, self.hidden_size = input_size, hidden_size
        self.between, self.checkpoint_every = Dropout(dropout), checkpoint_every

    @property
    def cells(self) -> list[Cell]:
        """Layer by layer, of each the one that goes forward first."""
        found: list[Cell] = getattr(self, self.name)
        return found

    def forward(self, x: Tensor, h0: Any = None, lengths: Any = None) -> tuple[Tensor, Any]:
        out, (h,) = self.run(x, None if h0 is None else (h0,), lengths)
        return out, h

    def run(self, x: Tensor, state: State | None, lengths: Any) -> tuple[Tensor, list[Tensor]]:
        """Outputs, and of each part of the state those of all cells, stacked."""
        name, count = type(self).__name__, len(self.cells)
        shape = f"{name}: expected x of shape (seq, batch, {self.input_size})"
        fits = x.ndim == 3 and x.shape[2] == self.input_size
        expect(fits, f"{shape}, or batch first where that is set; received {x.shape}")
        x = permute(x, (1, 0, 2)) if self.batch_first else x
        steps, batch, _ = x.shape
        if state is not None:
            check_state(name, state, (count, batch, self.hidden_size))
        valid = None if lengths is None else mask_of(name, lengths, steps, batch, x)
        directions = 1 + self.bidirectional
        last: list[State] = []
        for layer in range(self.num_layers):
            x = self.between(x) if layer and self.between.p else x
            ys = []
            for number in range(layer * directions, (layer + 1) * directions):
                begin = None if state is None else tuple([each[number] for each in state])
                y, end = self.sweep(self.cells[number], x, begin, valid, number % directions == 1)
                ys.append(y)
                last.append(end)
            x = ys[0] if len(ys) == 1 else concatenate(ys, 2)
        x = permute(x, (1, 0, 2)) if self.batch_first else x
        return x, [stack(each) for each in zip(*last, strict=True)]

    def sweep(
        self, cell: Cell, x: Tensor, state: State | None, valid: Tensor | None, reverse: bool
    ) -> tuple[Tensor, State]:
        """One cell over all time steps: its outputs, and its last state."""

        def body(state: State, given: tuple[Tensor, Tensor | None]) -> tuple[State, Tensor]:
            gates, inside = given
            after = cell.step(gates, state)
            if inside is None:
                return after, after[0]
            kept = tuple([where(inside, a, b) for a, b in zip(after, state, strict=True)])
            return kept, where(inside, after[0], 0.0)

        begin = cell.begin(x, x.shape[1]) if state is None else state
        given = cell.project(x), valid
        end, y = scan(body, begin, given, None, reverse, self.checkpoint_every)
        return y, end


def mask_of(name: str, lengths: Any, steps: int, batch: int, x: Tensor) -> Tensor:
    """Whether a step lies within a sequence, (steps, batch, 1)."""
    wanted = f"{name}: expected lengths of {batch} integers from 1 to {steps}"
    if not isinstance(lengths, Tensor):
        given = np.asarray(lengths)
        inside = given.dtype.kind in "iu" and bool(((given > 0) & (given <= steps)).all())
        expect(inside, f"{wanted}; received {given.tolist()}")
        lengths = Tensor(NDArray(given, x.device), requires_grad=False)
    fits = lengths.shape == (batch,) and lengths.dtype in INTEGERS
    expect(fits, f"{wanted}; received {lengths.dtype}{list(lengths.shape)}")
    times = reshape(arange(steps, device=x.device), (steps, 1, 1))
    return less(times, reshape(lengths, (1, batch, 1)))


class RNN(Recurrent):
    """Layers of RNNCells over time: (out, h) of x (seq, batch, input_size).

    out (seq, batch, hidden_size) holds the last layer's h of every step, h (num_layers, batch,
    hidden_size) every layer's of the last step. Called as rnn(x, h0=None, lengths=None): h0 has h's
    shape, zeros by default.

    nonlinearity: "tanh" or "relu". batch_first: x and out are (batch, seq, ...). dropout: its
    probability between layers. bidirectional: a second cell for each layer goes from the last step
    to the first; outputs lie side by side, and h has both cells of each layer in turn. lengths:
    (batch,) of integers; beyond its length a sequence's out is 0, and h is that of its last step,
    as with PyTorch's packed sequences. checkpoint_every: see `ndl.scan`. The cells are `rnn_cells`.
    """

    kind, name = RNNCell, "rnn_cells"

    def __init__(
        self, input_size: int, hidden_size: int, num_layers: int = 1, bias: bool = True,
        nonlinearity: str = "tanh", device: Any = None, dtype: Any = "float32", **options: Any,
    ) -> None:  # fmt: skip
        options |= {"nonlinearity": nonlinearity, "device": device, "dtype": dtype}
        super().__init__(input_size, hidden_size, num_layers, bias, **options)


class LSTM(Recurrent):
    """Layers of LSTMCells over time: (out, (h, c)) of x (seq, batch, input_size).

    Called as lstm(x, h=None, lengths=None), h being (h0, c0). Shapes and options are those of RNN.
    The cells are `lstm_cells`.
    """

    kind, name = LSTMCell, "lstm_cells"

    def forward(self, x: Tensor, h: Any = None, lengths: Any = None) -> tuple[Tensor, Any]:
        out, state = self.run(x, None if h is None else tuple(h), lengths)
        return out, tuple(state)


class GRU(Recurrent):
    """Layers of GRUCells over time: (out, h) of x (seq, batch, input_size).

    Called as gru(x, h0=None, lengths=None). Shapes and options are those of RNN. The cells are
    `gru_cells`.
    """

    kind, name = GRUCell, "gru_cells"
