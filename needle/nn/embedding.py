"""Embedding: rows of a table by ids; and where a token stands. Next: attention.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from needle.autograd import Tensor
from needle.errors import expect
from needle.init import randn
from needle.nn import functional
from needle.nn.module import Module, Parameter, RowParameter
from needle.ops import where
from needle.ops.elementwise import Operand


class Embedding(Module):
    """y = weight[ids]: (..., embedding_dim) for ids (...), integers or floats without fractions.

    weight (num_embeddings, embedding_dim) is drawn by randn. padding_idx: an id whose row begins as
    zeros and gets no gradient. sparse: a step of an optimizer changes only the rows, of the weight
    and of the optimizer's states, whose gradient is not all zeros (Adam is then lazy, as PyTorch's
    SparseAdam); inside `ndl.jit` it takes the time of the rows that were read, unless the gradient
    is clipped, read or returned. IndexError: ids below 0 or from num_embeddings on.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: Any = None,
        dtype: Any = "float32",
        *,
        padding_idx: int | None = None,
        sparse: bool = False,
    ) -> None:
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        drawn = randn(num_embeddings, embedding_dim, device=device, dtype=dtype)
        if padding_idx is not None:
            at = f"received {padding_idx} of {num_embeddings} ids"
            fits = -num_embeddings <= padding_idx < num_embeddings
            expect(fits, f"embedding: expected padding_idx to be an id; {at}")
            padding_idx %= num_embeddings
            kept = np.arange(num_embeddings) != padding_idx
            drawn = where(Tensor(kept[:, None], device=drawn.device), drawn, 0.0)
        self.padding_idx, self.sparse = padding_idx, sparse
        self.weight = (RowParameter if sparse else Parameter)(drawn)

    def forward(self, ids: Operand) -> Tensor:
        return functional.embedding(ids, self.weight, self.padding_idx)
