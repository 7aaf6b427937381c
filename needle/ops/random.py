"""Random numbers: a counter-based generator, as a primitive.

Philox 4x32-10 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
2011) turns a key and a counter into four 32-bit words; nothing but (key, counter, place) decides a
number, so that order and threads don't.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from needle.array.spec import Spec
from needle.autograd import TensorOp, primitive
from needle.dtype import DType, bfloat16, float16, float32, float64, int64
from needle.errors import expect
from needle.ops.elementwise import rule

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
# As many as the dtype's significand holds, so that no number rounds up to 1.
BITS = {bfloat16: 8, float16: 11, float32: 24, float64: 53}


def philox(key: int, counters: np.ndarray, upper: int = 0) -> np.ndarray:
    """Four 32-bit words for each counter, uint32 of shape (n, 4). Counters have 128 bits:
    `counters` are the lower 64, upper those above, the same for all."""
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
    above = np.full_like(counters, upper)
    words = [counters & low, counters >> high, above & low, above >> high]
    k0, k1 = np.uint32(key & 0xFFFFFFFF), np.uint32(key >> 32 & 0xFFFFFFFF)
    for _ in range(ROUNDS):
        p0, p1 = words[0] * MULTIPLIERS[0], words[2] * MULTIPLIERS[1]
        words = [p1 >> high ^ words[1] ^ k0, p1 & low, p0 >> high ^ words[3] ^ k1, p0 & low]
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return np.stack(words, -1).astype(np.uint32)


@primitive
class RandomUniform(TensorOp):
    """y = uniform numbers in [0, 1) from state (key, counter), int64

    Element i is made of word i mod 4 of Philox's block counter + i div 4; a float64 element takes
    two words.
    """

    moves = True
    shape: tuple[int, ...]
    dtype: DType

    def infer(self, state: Spec) -> Spec:
        fits = state == Spec((2,), int64)
        expect(fits, f"random_uniform: expected a state (key, counter) of int64; received {state}")
        return Spec(self.shape, self.dtype)

    @property
    def blocks(self) -> int:
        """How far the counter advances."""
        words = math.prod(self.shape) * (2 if self.dtype == float64 else 1)
        return -(-words // 4)

    def compute(self, state: np.ndarray) -> np.ndarray:
        key, counter = (int(each) for each in state)
        counters = np.arange(self.blocks, dtype=np.uint64) + np.uint64(counter % (1 << 64))
        words = philox(key % (1 << 64), counters).ravel()
        size = math.prod(self.shape)
        kind: Any = np.float64 if self.dtype == float64 else np.float32
        if self.dtype == float64:
            pairs = words[: 2 * size].astype(np.uint64).reshape(-1, 2)
            whole = pairs[:, 0] << np.uint64(21) | pairs[:, 1] >> np.uint64(11)
        else:
            whole = words[:size] >> np.uint32(32 - BITS[self.dtype])
        scale = kind(2.0 ** -BITS[self.dtype])
        return (whole.astype(kind) * scale).astype(self.dtype).reshape(self.shape)

    gradient = rule(None)
