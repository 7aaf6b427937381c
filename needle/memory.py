"""What memory needle holds: bytes of arrays, and values of the graph."""

from __future__ import annotations

from dataclasses import dataclass

from needle import autograd
from needle.array.memory import POOLS, USAGE, empty_pools


@dataclass(frozen=True)
class Report:
    """Bytes of live arrays, the most there were since `reset_peak`, bytes kept for reuse, and live
    graph values."""

    live: int
    peak: int
    cached: int
    live_values: int

    def __str__(self) -> str:
        mib = [f"{each / 2**20:.1f} MiB" for each in (self.live, self.peak, self.cached)]
        return f"live {mib[0]}, peak {mib[1]}, cached {mib[2]}, {self.live_values} live values"


def report() -> Report:
    """All four numbers at once."""
    return Report(live(), peak(), cached(), live_values())


def live() -> int:
    """Bytes of memory that arrays hold now."""
    return USAGE.live


def peak() -> int:
    """The most bytes that arrays held at once, since the start or `reset_peak`."""
    return USAGE.peak


def cached() -> int:
    """Bytes that the allocator keeps for reuse."""
    return sum(size * len(pool) for size, pool in list(POOLS.items()))


def empty_cache() -> None:
    """Give the bytes that are kept for reuse back to the system."""
    empty_pools()


def live_values() -> int:
    """How many Tensors and TensorTuples exist."""
    return autograd.TENSOR_COUNTER


def reset_peak() -> None:
    """Begin to measure the peak anew."""
    USAGE.peak = USAGE.mark = USAGE.live
