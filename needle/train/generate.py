"""Text from a trained language model, token by token.

In: a model of make_model, a tokenizer, a prompt. Out: pieces of text as they are drawn. Next:
trainer.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from needle.autograd import Tensor, no_grad
from needle.data import Tokenizer
from needle.errors import expect
from needle.jit import jit
from needle.models.sampling import check_sampling, sample
from needle.nn import Module
from needle.train.model import BatchFirst


def write_text(
    model: Module,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Iterator[str]:
    """What follows a prompt, in pieces: max_tokens tokens, drawn as by `needle.models.sample`.

    ValueError, at once: an empty prompt, a character that the tokenizer does not know, an option
    out of range.
    """
    ids = tokenizer.encode(prompt).tolist()
    expect(ids, "generate: expected a prompt of at least one token; received none")
    expect(max_tokens >= 0, f"generate: expected tokens to add; received {max_tokens}")
    options = temperature, top_k, top_p
    check_sampling(*options)
    model.eval()
    follow = remember if isinstance(model, BatchFirst) else look_back
    return tokenizer.stream(follow(model, ids, max_tokens, options))


def remember(model: Any, ids: list[int], count: int, options: Any) -> Iterator[int]:
    """The tokens that follow, by a recurrent model, whose state knows all of them."""
    state: Any = None
    step = jit(lambda tokens, state: model.model(tokens, state))
    for _ in range(count):
        tokens = Tensor(np.array(ids, np.int32)[:, None], requires_grad=False)
        with no_grad():
            logits, state = model.model(tokens) if state is None else step(tokens, state)
        ids = [int(sample(logits.numpy()[-1], *options))]
        yield ids[0]


def look_back(model: Any, ids: list[int], count: int, options: Any) -> Iterator[int]:
    """The tokens that follow, by a model with a context of block_size tokens.

    Where the context is full, its second half becomes the prompt for what follows.
    """
    names, most = ("temperature", "top_k", "top_p"), model.config.block_size
    while count:
        ids = ids if len(ids) < most else ids[-max(1, most // 2) :]
        room = min(count, max(1, most - len(ids)))
        for token in model.generate(ids, room, **dict(zip(names, options, strict=True))):
            ids.append(token)
            yield token
        count -= room
