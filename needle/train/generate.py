"""Text from a trained language model, token by token.

In: a model of make_model, a tokenizer, a prompt. Out: pieces of text as they are drawn. Next:
trainer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from needle.autograd import Tensor, no_grad
from needle.data import Tokenizer
from needle.errors import expect
from needle.jit import jit
from needle.nn import Module
from needle.train.model import BatchFirst

Next = Callable[[list[int]], np.ndarray]


def write_text(
    model: Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    *,
    block_size: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> Iterator[str]:
    """What follows a prompt, in pieces: max_tokens tokens, each drawn by `draw`.

    block_size: how many of the latest tokens a model without a state sees. ValueError for an empty
    prompt, a character that the tokenizer does not know, or an option out of range.
    """
    ids = tokenizer.encode(prompt).tolist()
    expect(ids, "generate: expected a prompt of at least one token; received none")
    fits = 0 <= temperature < np.inf and max_tokens >= 0
    expected = "a temperature and max_tokens of at least 0"
    expect(fits, f"generate: expected {expected}; received {temperature} and {max_tokens}")
    expect(top_k is None or top_k > 0, f"generate: expected top_k of at least 1; received {top_k}")
    fits = top_p is None or 0 < top_p <= 1
    expect(fits, f"generate: expected a top_p above 0 and at most 1; received {top_p}")
    model.eval()
    look = remember(model) if isinstance(model, BatchFirst) else look_back(model, block_size)
    rng = np.random.default_rng(seed)

    def tokens() -> Iterator[int]:
        new = list(ids)
        for _ in range(max_tokens):
            with no_grad():
                logits = look(new)
            new = [draw(logits, temperature, top_k, top_p, rng)]
            yield new[0]

    return tokenizer.stream(tokens())


def draw(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None, rng: Any
) -> int:
    """A token by the softmax of logits (vocab_size,) / temperature; the likeliest where that is 0.

    top_k: among so many of the likeliest. top_p: among the fewest of the likeliest that together
    have this probability (Holtzman et al., 2020).
    """
    if temperature == 0:
        return int(logits.argmax())
    order = np.argsort(-logits, kind="stable")[:top_k]
    scaled = logits[order].astype(np.float64) / temperature
    shares = np.exp(scaled - scaled[0])
    shares /= shares.sum()
    kept = 1 + int(np.searchsorted(np.cumsum(shares)[:-1], 1.0 if top_p is None else top_p))
    shares = shares[:kept] / shares[:kept].sum()
    return int(rng.choice(order[:kept], p=shares))


def remember(model: BatchFirst) -> Next:
    """What a recurrent model says after all tokens so far; it is called with the new ones."""
    state: Any = None
    step = jit(lambda tokens, state: model.model(tokens, state))

    def look(new: list[int]) -> np.ndarray:
        nonlocal state
        tokens = Tensor(np.array(new, np.int32)[:, None], requires_grad=False)
        logits, state = model.model(tokens) if state is None else step(tokens, state)
        return logits.numpy()[-1]

    return look


def look_back(model: Module, block_size: int) -> Next:
    """What a causal model says after the latest block_size tokens; it is called with the new ones.

    The window is filled up behind them, where no token looks, so that one program serves all.
    """
    seen: list[int] = []
    step = jit(lambda tokens: model(tokens))

    def look(new: list[int]) -> np.ndarray:
        seen.extend(new)
        del seen[:-block_size]
        window = np.zeros((1, block_size), np.int32)
        window[0, : len(seen)] = seen
        return step(Tensor(window, requires_grad=False)).numpy()[0, len(seen) - 1]

    return look
