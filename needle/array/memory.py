"""Storage: a block of one device's memory, counted from its allocation to its last view. Next:
ndarray.py."""

from __future__ import annotations

import gc
from typing import Any

# Python's collector counts objects, not bytes: a few forgotten cycles can hold gigabytes. Where
# live bytes have grown by
# half since the last look and by 64 MiB at least, it is asked to look.
COLLECT_GROWTH = 64 << 20


class Usage:
    """Bytes of all live Storages: now, at the peak, and at which the collector is asked next."""

    live = 0
    peak = 0
    collect_at = COLLECT_GROWTH


class Storage:
    """Memory that one or more NDArrays view; `owner` is the device's object that holds it."""

    __slots__ = ("__weakref__", "nbytes", "owner")

    def __init__(self, owner: Any, usage: type[Usage] = Usage) -> None:
        self.owner = owner
        self.nbytes = owner.nbytes
        usage.live += self.nbytes
        if usage.live > usage.peak:
            usage.peak = usage.live
        if usage.live > usage.collect_at:
            collect()

    def __del__(self, usage: type[Usage] = Usage) -> None:
        usage.live -= self.nbytes

    def __repr__(self) -> str:
        return f"Storage({self.nbytes} bytes)"


def collect() -> None:
    """Free what only reference cycles hold, and set the mark at which to do so again."""
    gc.collect()
    Usage.collect_at = max(Usage.live + COLLECT_GROWTH, Usage.live * 3 // 2)
