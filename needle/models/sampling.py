"""The next token from logits: temperature, top-k, top-p, and the draw. NumPy arrays in and out.

Next: decoder.py.
"""

from __future__ import annotations

import numpy as np

from needle.errors import expect
from needle.init import rand


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """ValueError where an option is out of range."""
    fits = temperature >= 0
    expect(fits, f"generate: expected a temperature of at least 0; received {temperature}")
    received = f"received {top_k}"
    expect(top_k is None or top_k >= 1, f"generate: expected top_k of at least 1; {received}")
    fits = top_p is None or 0 < top_p <= 1
    expect(fits, f"generate: expected top_p above 0 and up to 1; received {top_p}")


def top_k_logits(logits: np.ndarray, k: int) -> np.ndarray:
    """Logits (..., V) with -inf below the k-th largest; equal ones stay (Fan et al., 2018)."""
    k = min(k, logits.shape[-1])
    least = np.partition(logits, -k, -1)[..., -k, None]
    return np.where(logits < least, -np.inf, logits)


def top_p_logits(logits: np.ndarray, p: float) -> np.ndarray:
    """Logits (..., V) with -inf but for the likeliest that together have the share p: the fewest
    whose probabilities add up to p or more, one at least (Holtzman et al., 2020)."""
    order = np.argsort(-logits, -1, kind="stable")
    shares = np.take_along_axis(probabilities(logits), order, -1)
    dropped = np.cumsum(shares, -1) - shares >= p
    dropped[..., 0] = False
    found = np.empty_like(dropped)
    np.put_along_axis(found, order, dropped, -1)
    return np.where(found, -np.inf, logits)


def probabilities(logits: np.ndarray) -> np.ndarray:
    """softmax over the last axis, in float64."""
    wide = logits.astype(np.float64)
    e = np.exp(wide - wide.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def sample(
    logits: np.ndarray, temperature: float = 1.0, top_k: int | None = None,
    top_p: float | None = None,
) -> np.ndarray:  # fmt: skip
    """Ids (...) drawn from logits (..., V) / temperature, cut by top_k, then by top_p.

    temperature 0 takes the likeliest, the first of equal ones, and draws nothing. One uniform
    number per id, from the source that `ndl.seed` governs, picks where the running sum of the
    probabilities passes it. ValueError where logits are NaN, or an option is out of range.
    """
    check_sampling(temperature, top_k, top_p)
    expect(not np.isnan(logits).any(), "generate: expected logits; received NaN")
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.astype(np.float64) / temperature
    logits = logits if top_k is None else top_k_logits(logits, top_k)
    logits = logits if top_p is None else top_p_logits(logits, top_p)
    sums = np.cumsum(probabilities(logits), -1)
    drawn = rand(*logits.shape[:-1], 1, dtype="float64").numpy()
    return (sums <= drawn * sums[..., -1:]).sum(-1)
