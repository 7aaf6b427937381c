"""Attention in the course's form and in the field's, and the cache of what was seen. Next:
transformer.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from needle.autograd import Tensor
from needle.errors import expect
from needle.init import zeros
from needle.nn import functional
from needle.nn.activation import Dropout
from needle.nn.linear import Linear
from needle.nn.module import Module
from needle.nn.normalization import LayerNorm1d
from needle.ops import index_copy, less, maximum, split
from needle.ops.index import Checked

Keep = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, T, heads * d) -> (B, heads, T, d)"""
    return x.reshape((*x.shape[:2], heads, -1)).permute((0, 2, 1, 3))


def join_heads(x: Tensor) -> Tensor:
    """(B, heads, T, d) -> (B, T, heads * d)"""
    return x.permute((0, 2, 1, 3)).reshape((x.shape[0], x.shape[2], -1))


class MultiHeadAttention(Module):
    """(softmax(q k^T / sqrt(d)) v, the probabilities) of q, k, v (B, heads, T, d), without weights.

    causal: a query sees the keys up to its place, the last query all of them. The course's form:
    probabilities are returned as they are used, after dropout.
    """

    def __init__(
        self, *, dropout: float = 0.0, causal: bool = False, device: Any = None,
        dtype: Any = "float32",
    ) -> None:  # fmt: skip
        self.causal = causal
        self.dropout = Dropout(dropout)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        scores = q @ k.transpose() / q.shape[-1] ** 0.5
        if self.causal:
            queries, keys = scores.shape[-2:]
            seen = functional.causal_mask(queries, keys, q, keys - queries)
            hidden = Tensor(-np.inf, device=q.device, dtype=scores.dtype)
            scores = functional.where(seen, scores, hidden)
        probs = self.dropout(functional.softmax(scores))
        return probs @ v, probs


class AttentionLayer(Module):
    """The course's attention: each input normalised and projected, then num_head heads, then out.

    q (B, T, q_features), k and v (B, S, k_features or v_features), by default q; gives
    (B, T, out_features). The projections have no bias.
    """

    def __init__(
        self, q_features: int, num_head: int, dim_head: int, *, k_features: int | None = None,
        v_features: int | None = None, out_features: int | None = None, dropout: float = 0.0,
        causal: bool = True, device: Any = None, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        place = {"device": device, "dtype": dtype}
        self.num_head, self.dim_head = num_head, dim_head
        k_features, v_features = k_features or q_features, v_features or q_features
        inner = num_head * dim_head
        self.prenorm_q = LayerNorm1d(q_features, **place)
        self.prenorm_k = LayerNorm1d(k_features, **place)
        self.prenorm_v = LayerNorm1d(v_features, **place)
        self.q_projection = Linear(q_features, inner, bias=False, **place)
        self.k_projection = Linear(k_features, inner, bias=False, **place)
        self.v_projection = Linear(v_features, inner, bias=False, **place)
        self.attn = MultiHeadAttention(dropout=dropout, causal=causal, **place)
        self.out_projection = Linear(inner, out_features or q_features, bias=False, **place)

    def forward(self, q: Tensor, k: Tensor | None = None, v: Tensor | None = None) -> Tensor:
        k, v = q if k is None else k, q if v is None else v
        q = self.q_projection(self.prenorm_q(q))
        k = self.k_projection(self.prenorm_k(k))
        v = self.v_projection(self.prenorm_v(v))
        found, _ = self.attn(*(split_heads(x, self.num_head) for x in (q, k, v)))
        return self.out_projection(join_heads(found))


class MultiheadAttention(Module):
    """softmax(q k^T / sqrt(d)) v in num_heads heads; q, k and v are projected, and the result.

    query (B, T, embed_dim), key (B, S, kdim), value (B, S, vdim), or with the sequence first unless
    batch_first; head_dim is embed_dim / num_heads by default. Gives (y, weights): y like query,
    weights (B, T, S) as the mean over heads, (B, heads, T, S) without average_attn_weights, None
    unless need_weights. attn_mask (T, S) or (B, heads, T, S) and key_padding_mask (B, S), as in
    PyTorch: bool, True where a key is *not* seen, or numbers to add. num_kv_heads: fewer heads of
    keys and values, shared by neighbouring ones (Ainslie et al., 2023). rotary: the base by which
    queries and keys are turned (functional.rotary), at `positions` (T,), and rotary_scaling what
    becomes of its frequencies. keep: a function of the keys and values (B, heads, T, d) to those
    that are attended to (KVCache.keep).
    Where kdim and vdim are embed_dim, `in_proj` is q, k and v in one. (Vaswani et al., 2017)
    """

    def __init__(
        self, embed_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True,
        kdim: int | None = None, vdim: int | None = None, batch_first: bool = False,
        device: Any = None, dtype: Any = "float32", *, num_kv_heads: int | None = None,
        head_dim: int | None = None, rotary: float | None = None,
        rotary_scaling: functional.RotaryScaling | None = None,
    ) -> None:  # fmt: skip
        place = {"device": device, "dtype": dtype}
        groups = num_kv_heads or num_heads
        fits = num_heads % groups == 0 and (head_dim or embed_dim % num_heads == 0)
        sizes = f"{embed_dim}, {num_heads} and {groups}"
        expect(fits, f"attention: expected heads that share embed_dim evenly; received {sizes}")
        self.embed_dim, self.num_heads, self.num_kv_heads = embed_dim, num_heads, groups
        self.head_dim, self.batch_first = head_dim or embed_dim // num_heads, batch_first
        self.dropout = functional.check_probability(dropout)
        self.rotary, self.rotary_scaling = rotary, rotary_scaling
        self.widths = self.head_dim * num_heads, self.head_dim * groups, self.head_dim * groups
        if kdim in (None, embed_dim) and vdim in (None, embed_dim):
            self.in_proj = Linear(embed_dim, sum(self.widths), bias, **place)
        else:
            sides = zip((embed_dim, kdim or embed_dim, vdim or embed_dim), self.widths, strict=True)
            self.projections = [Linear(n, width, bias, **place) for n, width in sides]
        self.out_proj = Linear(self.widths[0], embed_dim, bias, **place)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """q, k and v (B, heads, T, d)."""
        if query is key is value and hasattr(self, "in_proj"):
            found = list(split(self.in_proj(query), -1, self.widths))
        elif hasattr(self, "in_proj"):
            weights = split(self.in_proj.weight, -1, self.widths)
            bias = self.in_proj.bias
            biases = [None] * 3 if bias is None else list(split(bias, -1, self.widths))
            parts = zip((query, key, value), weights, biases, strict=True)
            found = [functional.linear(*each) for each in parts]
        else:
            pairs = zip(self.projections, (query, key, value), strict=True)
            found = [each(x) for each, x in pairs]
        heads = self.num_heads, self.num_kv_heads, self.num_kv_heads
        return [split_heads(x, n) for x, n in zip(found, heads, strict=True)]

    def forward(
        self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
        key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False, *, positions: Tensor | None = None, keep: Keep | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        same = key is None
        key, value = query if key is None else key, query if value is None else value
        if not self.batch_first:
            query = query.transpose((0, 1))
            key, value = (query if same else x.transpose((0, 1)) for x in (key, value))
        q, k, v = self.project(query, key, value)
        if self.rotary is not None:
            if positions is None:
                positions = Tensor(np.arange(q.shape[-2]), device=q.device)
            turns = positions, self.rotary, self.rotary_scaling
            q, k = (functional.rotary(x, *turns) for x in (q, k))
        k, v = (k, v) if keep is None else keep(k, v)
        mask = added(attn_mask, q.dtype)
        if is_causal and mask is None:
            mask = functional.causal_mask(q.shape[-2], k.shape[-2], q)
        if key_padding_mask is not None:
            hidden = added(key_padding_mask.reshape((len(k), 1, 1, -1)), q.dtype)
            mask = joined(mask, hidden)
        y, probs = functional.attend(q, k, v, mask, self.dropout * self.training)
        y = self.out_proj(join_heads(y))
        y = y if self.batch_first else y.transpose((0, 1))
        if not need_weights:
            return y, None
        return y, probs.mean(1) if average_attn_weights else probs


def added(mask: Tensor | None, dtype: Any) -> Tensor | None:
    """A mask in PyTorch's sense, True where a key is not seen, as one of functional.attend."""
    if mask is None:
        return None
    return ~mask if mask.dtype == functional.bool_ else mask.to(dtype)


def joined(mask: Tensor | None, other: Tensor | None) -> Tensor | None:
    """Both masks in one: what is seen by both, or the sum."""
    if mask is None or other is None:
        return other if mask is None else mask
    if mask.dtype == other.dtype:
        return mask & other if mask.dtype == functional.bool_ else mask + other
    seen, numbers = (mask, other) if mask.dtype == functional.bool_ else (other, mask)
    return functional.where(seen, numbers, Tensor(-np.inf, device=seen.device, dtype=numbers.dtype))


class KVCache(Module):
    """Keys and values of up to `capacity` places, per layer (batch, heads, capacity, dim).

    `position`, how many are filled, is a Tensor: one compiled step serves all tokens, and inside
    `ndl.jit` what is new is written in place. A step asks for its `places`, has every layer `keep`
    its keys and values there, attends to all places by `mask`, and ends with `advance`.
    """

    def __init__(
        self, num_layers: int, batch: int, num_heads: int, capacity: int, head_dim: int,
        device: Any = None, dtype: Any = "float32",
    ) -> None:  # fmt: skip
        shape, self.capacity = (batch, num_heads, capacity, head_dim), capacity
        place = {"device": device, "dtype": dtype}
        self.keys = [zeros(shape, **place) for _ in range(num_layers)]
        self.values = [zeros(shape, **place) for _ in range(num_layers)]
        self.position = zeros((), device=device, dtype="int64")

    def places(self, length: int, count: Tensor | None = None) -> Tensor:
        """Where `length` tokens go (length,), of which the last `count` count: those before them
        go where the first of these does, and are overwritten. IndexError, before anything is
        written, beyond the capacity."""
        steps = Tensor(np.arange(length), device=self.position.device)
        if count is not None:
            steps = maximum(steps - (length - count), 0)
        return Checked("cache: expected places", self.capacity)(self.position.data + steps)

    def mask(self, places: Tensor) -> Tensor:
        """(length, capacity), an attn_mask of MultiheadAttention: True for what is not seen, the
        places after a token's own."""
        every = Tensor(np.arange(self.capacity), device=places.device)
        return less(places.unsqueeze(-1), every)

    def keep(self, layer: int, places: Tensor) -> Keep:
        """A function that writes a layer's new keys and values, and gives all of them."""

        def write(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            for held, x in ((self.keys[layer], k), (self.values[layer], v)):
                held.data = index_copy(held, 2, places, x)
            return self.keys[layer].data, self.values[layer].data

        return write

    def advance(self, count: Any) -> None:
        """Move on by `count` tokens."""
        self.position.data = self.position + count

    def clear(self) -> None:
        """Forget all places."""
        self.position.data = self.position * 0
