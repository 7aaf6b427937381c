"""An LSTM language model: what comes next in a sequence of tokens."""

from __future__ import annotations

from typing import Any

from needle.autograd import Tensor
from needle.errors import expect
from needle.nn import LSTM, Dropout, Embedding, Linear, Module
from needle.ops import reshape


class LSTMLanguageModel(Module):
    """Embedding -> dropout -> LSTM -> dropout -> Linear: (logits, (h, c)) of tokens.

    tokens (seq, batch) of integers below `vocabulary`; logits (seq * batch, vocabulary), step by
    step; the state, of shape (num_layers, batch, hidden_size) each, goes on with the next piece of
    the same sequences. (Mikolov et al., 2010; Zaremba, Sutskever and Vinyals, 2014.)
    """

    def __init__(
        self, vocabulary: int, embedding_size: int = 100, hidden_size: int = 256,
        num_layers: int = 1, dropout: float = 0.0, device: Any = None, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        place = {"device": device, "dtype": dtype}
        self.embedding = Embedding(vocabulary, embedding_size, **place)
        self.lstm = LSTM(embedding_size, hidden_size, num_layers, dropout=dropout, **place)
        self.dropout = Dropout(dropout)
        self.output = Linear(hidden_size, vocabulary, **place)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shape = f"received shape {tokens.shape}"
        expect(tokens.ndim == 2, f"lstm: expected tokens (seq, batch); {shape}")
        y, state = self.lstm(self.drop(self.embedding(tokens)), state)
        return self.output(reshape(self.drop(y), (-1, self.lstm.hidden_size))), state

    def drop(self, x: Tensor) -> Tensor:
        return self.dropout(x) if self.dropout.p else x
