"""What language models have in common: tokens in, logits out, and text that is written by them.

A model has `blocks`, each with an `attention`, and a `config` with `block_size`, and gives `hidden`
and `head`; Decoder runs it token by token on a cache. Next: pretrained.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from needle import nn
from needle.autograd import Tensor, no_grad
from needle.errors import expect
from needle.jit import jit
from needle.models.sampling import check_sampling, sample
from needle.ops.index import as_indices

CHUNK = 64  # tokens of a prompt that are read at once


class LanguageModel(nn.Module):
    """Logits (B, T, V) of the next token after each of the tokens (B, T)."""

    config: Any
    blocks: list[Any]
    _decoder: Decoder | None = None

    def hidden(self, ids: Tensor, places: Tensor | None = None, cache: Any = None) -> Tensor:
        """What the head reads (B, T, dim); with a cache, of the tokens that stand at `places`."""
        raise NotImplementedError(f"{type(self).__name__}: hidden is not written")

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of what is hidden (..., dim)."""
        raise NotImplementedError(f"{type(self).__name__}: head is not written")

    def make_cache(self, batch: int, capacity: int) -> nn.KVCache:
        """An empty cache for so many sequences and places."""
        first = self.blocks[0].attention
        sizes = len(self.blocks), batch, first.num_kv_heads, capacity, first.head_dim
        like = first.out_proj.weight
        return nn.KVCache(*sizes, device=like.device, dtype=like.dtype)

    def forward(self, ids: Any) -> Tensor:
        ids = as_indices(type(self).__name__, ids, self.parameters()[0])
        expect(ids.ndim == 2, f"{type(self).__name__}: expected ids (B, T); received {ids.shape}")
        self.check_length(ids.shape[1])
        return self.head(self.hidden(ids))

    def check_length(self, length: int, more: int = 0) -> None:
        """ValueError where a sequence does not fit the context."""
        whole, most = f"{length} and {more} more" if more else length, self.config.block_size
        name = type(self).__name__
        expect(length + more <= most, f"{name}: expected at most {most} tokens; received {whole}")

    def generate(
        self, ids: Any, max_new_tokens: int, *, temperature: float = 1.0, top_k: int | None = None,
        top_p: float | None = None,
    ) -> Iterator[Any]:  # fmt: skip
        """The tokens that follow ids (T,), as ints, or ids (B, T), as arrays (B,), one by one.

        temperature: what logits are divided by; 0 takes the likeliest token. top_k, top_p: draw
        among so many, or among the likeliest of this share (sampling.py). `ndl.seed` fixes the
        draws. One compiled step serves all tokens, and a second one reads the prompt. ValueError,
        at once: an empty prompt, more tokens than the context has, options out of range.
        """
        array = np.asarray(as_indices("generate", ids).numpy())
        rows = array[None] if array.ndim == 1 else array
        fits = rows.ndim == 2 and rows.size > 0
        expect(fits, f"generate: expected ids (T,) or (B, T), T above 0; received {array.shape}")
        expect(max_new_tokens >= 0, f"generate: expected tokens to add; received {max_new_tokens}")
        self.check_length(rows.shape[1], max_new_tokens)
        check_sampling(temperature, top_k, top_p)
        drawn = self.write(rows, max_new_tokens, (temperature, top_k, top_p))
        return drawn if array.ndim == 2 else (int(row[0]) for row in drawn)

    def write(self, rows: np.ndarray, count: int, options: Any) -> Iterator[np.ndarray]:
        """The tokens that follow, (B,) each."""
        if not count:
            return
        decoder = self.decoder(len(rows), rows.shape[1] + count)
        decoder.is_busy = True
        try:
            for _ in range(count):
                rows = sample(decoder.read(rows), *options)[:, None]
                yield rows[:, 0]
        finally:
            decoder.is_busy = False

    def decoder(self, batch: int, length: int) -> Decoder:
        """One for so many places at least, kept for the next call of its size; empty."""
        capacity = min(self.config.block_size, max(CHUNK, 1 << (length - 1).bit_length()))
        found, like = self._decoder, self.parameters()[0]
        form = batch, capacity, like.dtype, like.device
        if found is None or found.form != form or found.is_busy:
            found = self._decoder = Decoder(self, form)
        found.cache.clear()
        return found


def run_blocks(blocks: Any, x: Tensor, places: Any, cache: Any) -> Tensor:
    """x through blocks called with (x, mask, places, keep); with a cache, of what stands there."""
    if cache is None:
        for block in blocks:
            x = block(x)
        return x
    mask = cache.mask(places)
    for layer, block in enumerate(blocks):
        x = block(x, mask, places, cache.keep(layer, places))
    return x


def attend_to_past(
    attention: Callable[..., Any], x: Tensor, mask: Any, places: Any, keep: Any
) -> Tensor:
    """Causal self-attention of all of x, or of what is new to what is kept."""
    options = {"attn_mask": mask, "is_causal": mask is None, "positions": places, "keep": keep}
    return attention(x, need_weights=False, **options)[0]


class Decoder:
    """A model that reads tokens one after the other: logits (B, V) of what follows."""

    def __init__(self, model: LanguageModel, form: Any) -> None:
        self.model, self.form, self.is_busy = model, form, False
        self.cache = model.make_cache(*form[:2])
        self.step = jit(self.advance)
        one = np.zeros((form[0], 1), np.int64), np.array(1)
        self.single = [Tensor(x, device=form[3]) for x in one]  # a token, written in place

    def __reduce__(self) -> Any:
        return type(None), ()  # copies of a model begin without one

    def advance(self, ids: Tensor, count: Tensor) -> Tensor:
        """Read ids (B, T), of which the last `count` count; logits (B, V) in float32 or float64."""
        with no_grad():
            places = self.cache.places(ids.shape[1], count)
            x = self.model.hidden(ids, places, self.cache)
            self.cache.advance(count)
            logits = self.model.head(x[:, -1])
            return logits if logits.dtype == "float64" else logits.to("float32")

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Logits (B, V) after all tokens (B, T)."""
        training, logits = self.model.training, None
        if training:
            self.model.eval()
        for start in range(0, rows.shape[1], CHUNK):
            part = rows[:, start : start + CHUNK]
            size = part.shape[1]
            if size == 1:
                self.single[0].numpy()[:] = part
                logits = self.step(*self.single)
                continue
            # What does not count comes first
            part = np.pad(part, ((0, 0), (CHUNK - size, 0)), mode="edge").astype(np.int64)
            logits = self.step(*(Tensor(x, device=self.form[3]) for x in (part, np.array(size))))
        if training:
            self.model.train()
        assert logits is not None
        return logits.numpy()
