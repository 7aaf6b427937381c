"""Transformer layers: the course's, and the field's encoders and decoders. Next: loss.py."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np

from needle.autograd import Tensor
from needle.errors import expect
from needle.init import zeros_like
from needle.nn import functional
from needle.nn.activation import Dropout, ReLU
from needle.nn.attention import AttentionLayer, MultiheadAttention
from needle.nn.container import Residual, Sequential
from needle.nn.embedding import Embedding
from needle.nn.linear import Linear
from needle.nn.module import Module
from needle.nn.normalization import LayerNorm, LayerNorm1d

Maybe = Tensor | None


class TransformerLayer(Module):
    """The course's layer, x + attention, then + a two-layer network, each normalised first.

    x (B, T, q_features) -> the same; the network has hidden_size hidden units and ReLU.
    """

    def __init__(
        self, q_features: int, num_head: int, dim_head: int, hidden_size: int, *,
        dropout: float = 0.0, causal: bool = True, device: Any = None, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        place = {"device": device, "dtype": dtype}
        attention = AttentionLayer(
            q_features, num_head, dim_head, dropout=dropout, causal=causal, **place
        )
        self.attention = Residual(Sequential(attention, Dropout(dropout)))
        self.network = Residual(
            Sequential(
                LayerNorm1d(q_features, **place), Linear(q_features, hidden_size, **place), ReLU(),
                Dropout(dropout), Linear(hidden_size, q_features, **place), Dropout(dropout),
            )
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.attention(x))


class Transformer(Module):
    """The course's Transformer: learned positions, then layers; called as its RNN: (x, h).

    x (T, B, embedding_size), or (B, T, embedding_size) if batch_first; h is taken and given for the
    form's sake. sequence_len: the most places. IndexError for longer sequences.
    """

    def __init__(
        self, embedding_size: int, hidden_size: int, num_layers: int, *, num_head: int = 8,
        dim_head: int = 32, dropout: float = 0.0, causal: bool = True, device: Any = None,
        dtype: Any = "float32", batch_first: bool = False, sequence_len: int = 2048,
    ) -> None:  # fmt: skip
        place = {"device": device, "dtype": dtype}
        self.batch_first = batch_first
        self.embedding = Embedding(sequence_len, embedding_size, **place)
        sizes = embedding_size, num_head, dim_head, hidden_size
        options = {"dropout": dropout, "causal": causal, **place}
        self.layers = [TransformerLayer(*sizes, **options) for _ in range(num_layers)]

    def forward(self, x: Tensor, h: Any = None) -> tuple[Tensor, Tensor]:
        x = x if self.batch_first else x.transpose((0, 1))
        x = x + self.embedding(Tensor(np.arange(x.shape[1]), device=x.device))
        for layer in self.layers:
            x = layer(x)
        x = x if self.batch_first else x.transpose((0, 1))
        return x, zeros_like(x)


def attend(
    attention: MultiheadAttention, x: Tensor, memory: Maybe, mask: Maybe, padding: Maybe,
    is_causal: bool,
) -> Tensor:  # fmt: skip
    """What x attends to in memory, or, without that, in itself."""
    masks = {"attn_mask": mask, "key_padding_mask": padding, "is_causal": is_causal}
    return attention(x, memory, memory, need_weights=False, **masks)[0]


class TransformerEncoderLayer(Module):
    """Self-attention, then a two-layer network, each added to what it reads.

    x = norm1(x + attention(x)); y = norm2(x + network(x)); norm_first: x + attention(norm1(x)), and
    so on (Xiong et al., 2020). src (T, B, d_model), or (B, T, d_model) if batch_first; masks as
    those of MultiheadAttention. activation: a function, or "relu" or "gelu". (Vaswani et al., 2017)
    """

    crosses = False  # whether it attends to another sequence too

    def __init__(
        self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = "relu", layer_norm_eps: float = 1e-5,
        batch_first: bool = False, norm_first: bool = False, bias: bool = True,
        device: Any = None, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        place = {"device": device, "dtype": dtype}
        names = {"relu": functional.relu, "gelu": functional.gelu}
        known = callable(activation) or activation in names
        expect(known, f"activation: expected relu, gelu or a function; received {activation!r}")
        self.activation: Any = activation if callable(activation) else names[activation]
        self.norm_first, self.dropout = norm_first, functional.check_probability(dropout)
        attention = d_model, nhead, dropout, bias, None, None, batch_first
        self.self_attn = MultiheadAttention(*attention, **place)
        if self.crosses:
            self.multihead_attn = MultiheadAttention(*attention, **place)
        self.linear1 = Linear(d_model, dim_feedforward, bias, **place)
        self.linear2 = Linear(dim_feedforward, d_model, bias, **place)
        norms = [LayerNorm(d_model, layer_norm_eps, **place) for _ in range(2 + self.crosses)]
        self.norm1, self.norm2 = norms[:2]
        if self.crosses:
            self.norm3 = norms[2]

    def drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout) if self.training and self.dropout else x

    def add(self, x: Tensor, norm: Module, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """x with a branch of it, one of the two normalised."""
        if self.norm_first:
            return x + self.drop(branch(norm(x)))
        return norm(x + self.drop(branch(x)))

    def network(self, x: Tensor) -> Tensor:
        return self.linear2(self.drop(self.activation(self.linear1(x))))

    def forward(
        self, src: Tensor, src_mask: Maybe = None, src_key_padding_mask: Maybe = None,
        is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        masks = src_mask, src_key_padding_mask, is_causal
        x = self.add(src, self.norm1, lambda x: attend(self.self_attn, x, None, *masks))
        return self.add(x, self.norm2, self.network)


class TransformerDecoderLayer(TransformerEncoderLayer):
    """Self-attention, attention to the encoder's result, and a two-layer network.

    tgt (T, B, d_model) and memory (S, B, d_model), or batch first; the arguments are those of
    TransformerEncoderLayer. (Vaswani et al., 2017)
    """

    crosses = True

    def forward(  # type: ignore[override]
        self, tgt: Tensor, memory: Tensor, tgt_mask: Maybe = None, memory_mask: Maybe = None,
        tgt_key_padding_mask: Maybe = None, memory_key_padding_mask: Maybe = None,
        tgt_is_causal: bool = False, memory_is_causal: bool = False,
    ) -> Tensor:  # fmt: skip
        own = tgt_mask, tgt_key_padding_mask, tgt_is_causal
        other = memory_mask, memory_key_padding_mask, memory_is_causal
        x = self.add(tgt, self.norm1, lambda x: attend(self.self_attn, x, None, *own))
        x = self.add(x, self.norm2, lambda x: attend(self.multihead_attn, x, memory, *other))
        return self.add(x, self.norm3, self.network)


class TransformerEncoder(Module):
    """num_layers copies of a layer, one after the other, and a norm at the end if there is one.

    Called with what the layer takes. The copies begin with the same parameters.
    """

    def __init__(self, layer: Module, num_layers: int, norm: Module | None = None) -> None:
        self.layers = [deepcopy(layer) for _ in range(num_layers)]
        self.norm = norm

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        for layer in self.layers:
            x = layer(x, *args, **options)
        return x if self.norm is None else self.norm(x)


class TransformerDecoder(TransformerEncoder):
    """TransformerEncoder of decoder layers: called with (tgt, memory, masks)."""
