"""Storage: a block of host memory, from its allocation to the last array or export that looks into
it. Next: form.py.

A Storage's memory is either a Block of the allocator below, aligned for vectors and kept for reuse
when the Storage dies, since fresh pages cost more than arithmetic; or another library's array.
NumPy arrays that look into a Block hold an Export, which holds the Storage: a Block is never reused
while somebody can read it. Nothing here takes a lock: pools are deques, whose append and pop are
atomic, so that a Storage may die in any thread.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes: a cache line, and the widest vector

# Python's collector counts objects, not bytes: a few forgotten cycles can hold gigabytes. Where
# live bytes have grown by half since the last look and by 64 MiB at least, it is asked to look.
COLLECT_GROWTH = 64 << 20

# Bytes that a pool keeps, and of new blocks after which all pools are emptied.
LIMIT = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 4


class Usage:
    """Bytes of all live Storages: now, at the peak, at which the collector is asked next, and at
    which there is something to do; bytes of blocks made since the pools were emptied."""

    __slots__ = ("collect_at", "live", "made", "mark", "peak")

    def __init__(self) -> None:
        self.live = self.peak = self.made = self.mark = 0
        self.collect_at = COLLECT_GROWTH

    def grow(self) -> None:
        """Note a new peak; free what only reference cycles hold where there may be much of it."""
        self.peak = max(self.peak, self.live)
        if self.live > self.collect_at:
            gc.collect()
            self.collect_at = max(self.live + COLLECT_GROWTH, self.live * 3 // 2)
        self.mark = min(self.peak, self.collect_at)


USAGE = Usage()

Pool = deque["Block"]
NOWHERE: Pool = deque(maxlen=0)  # where other libraries' memory goes back to
POOLS: dict[int, Pool] = {}  # of free blocks, by their size


class Block:
    """Memory that passes from Storage to Storage."""

    __slots__ = ("memory", "pool", "ptr")

    def __init__(self, memory: np.ndarray, pool: Pool, ptr: int = 0) -> None:
        self.memory = memory
        self.pool = pool
        self.ptr = ptr  # 0 of other libraries' memory: whoever needs it asks the array


class Dying:
    """Finds out what sys.getrefcount says in a `__del__` that no collector called."""

    references = 0

    def __del__(self) -> None:
        Dying.references = sys.getrefcount(self)


Dying()


class Storage:
    """Memory that one or more NDArrays view."""

    __slots__ = ("__weakref__", "block", "nbytes")

    block: Block
    nbytes: int

    @staticmethod
    def on(array: np.ndarray) -> Storage:
        """The memory of another library's array, which is kept alive."""
        storage = object.__new__(Storage)
        storage.block, storage.nbytes = Block(array, NOWHERE), array.nbytes
        USAGE.live += array.nbytes
        if USAGE.live > USAGE.mark:
            USAGE.grow()
        return storage

    @property
    def is_foreign(self) -> bool:
        """Whether another library may know the memory."""
        return self.block.pool is NOWHERE

    def __del__(
        self, usage: Usage = USAGE, count: Any = sys.getrefcount, alone: int = Dying.references
    ) -> None:  # the module may be gone when the interpreter exits
        block = self.block
        usage.live -= self.nbytes
        # The collector finalizes an object while others of the same garbage can still read it.
        if count(self) <= alone:
            block.pool.append(block)

    def __repr__(self) -> str:
        return f"Storage({self.nbytes} bytes)"


def size_class(nbytes: int) -> int:
    """The size of the blocks that hold so many bytes: eight sizes between powers of two."""
    step = max(ALIGNMENT, 1 << max(nbytes - 1, 0).bit_length() >> 4)
    return max(-(-nbytes // step), 1) * step


def pool_of(nbytes: int) -> Pool:
    """The pool of free blocks for so many bytes."""
    size = size_class(nbytes)
    return POOLS.setdefault(size, deque(maxlen=max(LIMIT // size, 1)))


def new_block(pool: Pool, nbytes: int) -> Block:
    """A block of the system's memory, for a pool that has none."""
    size = size_class(nbytes)
    USAGE.made += size
    if USAGE.made > LIMIT:
        empty_pools()
    try:
        memory = np.empty(size + ALIGNMENT, np.uint8)
    except MemoryError:
        empty_pools()
        memory = np.empty(size + ALIGNMENT, np.uint8)
    return Block(memory, pool, -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT)


def empty_pools() -> None:
    """Give all free blocks back to the system."""
    USAGE.made = 0
    for pool in list(POOLS.values()):
        pool.clear()


class Export:
    """What NumPy arrays hold that look into a Storage, in NumPy's array interface."""

    __slots__ = ("__array_interface__", "storage")

    def __init__(self, storage: Storage, interface: dict[str, Any]) -> None:
        self.storage = storage
        self.__array_interface__ = interface


def exporter(view: np.ndarray) -> Storage | None:
    """The Storage that a NumPy array looks into, if one of ours."""
    base: Any = view.base
    while isinstance(base, np.ndarray):
        base = base.base
    return base.storage if type(base) is Export else None
