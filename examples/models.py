"""The models of the course's convolution, sequence and Transformer assignments.

In: images (n, 3, 32, 32), or token ids (seq, batch). Out: logits. simple_ml.py trains them.
"""

from __future__ import annotations

from typing import Any

import needle as ndl
from needle import models, nn

__all__ = ["LanguageModel", "ResNet9"]


class ResNet9(models.ResNet9):
    """Images (n, 3, 32, 32) -> logits (n, 10): needle's own ResNet9."""

    def __init__(self, device: Any = None, dtype: Any = "float32") -> None:
        super().__init__(10, device=device, dtype=dtype)


class LanguageModel(nn.Module):
    """Embedding -> RNN, LSTM or causal Transformer -> Linear: what comes after each token.

    seq_model: "rnn", "lstm" or "transformer", which takes up to seq_len tokens at a time; its
    hidden_size is that of its feed-forward layers.
    """

    def __init__(
        self,
        embedding_size: int,
        output_size: int,
        hidden_size: int,
        num_layers: int = 1,
        seq_model: str = "rnn",
        seq_len: int = 40,
        device: Any = None,
        dtype: Any = "float32",
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(output_size, embedding_size, **place)
        width = hidden_size
        if seq_model == "transformer":
            options = {"causal": True, "sequence_len": seq_len, **place}
            self.seq_model = nn.Transformer(embedding_size, hidden_size, num_layers, **options)
            width = embedding_size
        elif seq_model in ("rnn", "lstm"):
            layer = {"rnn": nn.RNN, "lstm": nn.LSTM}[seq_model]
            self.seq_model = layer(embedding_size, hidden_size, num_layers, **place)
        else:
            expected = "seq_model 'rnn', 'lstm' or 'transformer'"
            raise ValueError(f"LanguageModel: expected {expected}; received {seq_model!r}")
        self.linear = nn.Linear(width, output_size, **place)

    def forward(self, x: ndl.Tensor, h: Any = None) -> tuple[ndl.Tensor, Any]:
        """Ids x (seq, batch) and the state before, None at first -> logits (seq * batch,
        output_size) and the state after: h, or (h, c) of an LSTM."""
        y, h = self.seq_model(self.embedding(x), h)
        return self.linear(y.reshape((-1, y.shape[2]))), h
