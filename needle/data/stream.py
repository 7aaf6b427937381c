"""The random numbers of one sample: what a transform draws from.

Comes in: a stream (a 64-bit number for the epoch) and a sample's index. Goes out: `sample_rng()`, a
generator that depends on these two alone, so that neither threads nor processes nor their number
change a draw. Where the loader opens no stream (no seed, no workers), it is NumPy's global
generator, as in the course. Next: transforms.py.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

MASK = (1 << 64) - 1


class Key(tuple[int, int]):
    """What keys a Philox: to it a seed sequence, without the 8 us that NumPy's costs."""

    def generate_state(self, n_words: int, dtype: type = np.uint32) -> np.ndarray:
        return np.array(self, dtype)


class Sample(threading.local):
    """The sample that this thread is reading."""

    key: Key | None = None  # (stream, index)
    rng: np.random.RandomState | None = None  # made at the first draw


SAMPLE = Sample()


def sample_rng() -> np.random.RandomState:
    """The generator that a transform draws from, with NumPy's legacy methods (`rand`, `randint`).

    Within a DataLoader that has a seed or workers: one of its own per (seed, epoch, index), Philox
    keyed by them (Salmon et al. 2011). Elsewhere: the generator behind `np.random.rand`, which
    `np.random.seed` governs.
    """
    if SAMPLE.key is None:
        return np.random.mtrand._rand
    if SAMPLE.rng is None:
        np.random.bit_generator.ISeedSequence.register(Key)
        SAMPLE.rng = np.random.RandomState(np.random.Philox(SAMPLE.key))
    return SAMPLE.rng


@contextmanager
def open_stream(stream: int | None, index: int) -> Iterator[None]:
    """Within the block `sample_rng()` is that of (stream, index); None changes nothing."""
    before = SAMPLE.key, SAMPLE.rng
    if stream is not None:
        SAMPLE.key, SAMPLE.rng = Key((stream, index & MASK)), None
    try:
        yield
    finally:
        if stream is not None:
            SAMPLE.key, SAMPLE.rng = before


def stream_of(seed: int, epoch: int) -> int:
    """The stream of an epoch of a seeded loader."""
    return int(np.random.SeedSequence(seed, spawn_key=(epoch,)).generate_state(1, np.uint64)[0])


def stream_from_numpy(epoch: int) -> int:
    """The epoch's stream that NumPy's global generator decides, whose state stays as it is."""
    twin = np.random.RandomState()
    twin.set_state(np.random.get_state())
    return stream_of(int(twin.randint(0, 1 << 63, dtype=np.int64)), epoch)
