"""The order of nests, and where their values lie. Before: nests. After: kernels on one arena.
Next: emit.py.

    schedule   nests -> kernels, each a list of nests that no barrier separates: a nest belongs to
               the kernel after the last one that writes what it reads or that it waits for. An
               output that takes an input's place in memory is written after the last kernel that
               reads the input.
    plan       temporaries -> offsets in one arena: two share memory if no kernel needs both
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from needle.compiler import OFF
from needle.compiler.graph import Constant, Input
from needle.compiler.loops import (
    AnyNest,
    Buffer,
    Contraction,
    HostCall,
    Repeat,
    Scatter,
    ordered,
)  # fmt: skip

ALIGNMENT = 64


@dataclass
class Schedule:
    """Kernels in order, and which outputs may take an input's place."""

    kernels: list[list[AnyNest]]
    in_place: dict[Buffer, Buffer] = field(default_factory=dict)  # output -> input
    refused: dict[Buffer, str] = field(default_factory=dict)  # donations that cannot be


def has_checks(nest: AnyNest) -> bool:
    """Whether a nest may find an index out of range."""
    if isinstance(nest, HostCall):
        return True
    if isinstance(nest, Repeat):
        return any(map(has_checks, nest.nests))
    if isinstance(nest, Scatter):
        return any(each.op == "check" for each in ordered([nest.row, nest.value]))
    epilogue = nest.epilogue if isinstance(nest, Contraction) else nest
    return any(each.op == "check" for each in epilogue.expressions())


class Levels:
    """For every nest, how many barriers come before it, and who reads and writes each buffer."""

    def __init__(
        self, nests: Sequence[AnyNest], waits: Mapping[AnyNest, Sequence[AnyNest]]
    ) -> None:
        self.waits = waits
        self.places = {nest: place for place, nest in enumerate(nests)}
        self.readers: dict[Buffer, list[AnyNest]] = {}
        self.writers: dict[Buffer, list[AnyNest]] = {}
        self.of: dict[AnyNest, int] = {}
        for nest in nests:
            for buffer in nest.reads():
                self.readers.setdefault(buffer, []).append(nest)
            for buffer in nest.writes():
                self.writers.setdefault(buffer, []).append(nest)
        for nest in nests:
            self.of[nest] = max((self.of[x] for x in self.before(nest)), default=-1) + 1

    def before(self, nest: AnyNest) -> set[AnyNest]:
        """Whatever writes what a nest reads, and what it waits for."""
        writers = [x for buffer in nest.reads() for x in self.writers.get(buffer, [])]
        return {*writers, *self.waits.get(nest, [])} - {nest}

    def others(self, source: Buffer, nest: AnyNest, checking: Sequence[AnyNest]) -> list[int]:
        """The levels of what checks, and of what reads a buffer besides a nest."""
        readers = [each for each in self.readers.get(source, []) if each is not nest]
        return [self.of[each] for each in (*readers, *checking)]

    def needed_by(self, nests: Sequence[AnyNest]) -> set[AnyNest]:
        """Some nests, and all that come before them."""
        found: set[AnyNest] = set()
        stack = list(nests)
        while stack:
            nest = stack.pop()
            if nest not in found:
                found.add(nest)
                stack += self.before(nest)
        return found

    def lift(self, nest: AnyNest, least: int) -> None:
        """Let a nest come no sooner than `least`, and what reads it after it."""
        self.of[nest] = least
        queue, queued = [(self.places[nest], nest)], {nest}
        while queue:
            _, writer = heappop(queue)  # in order, so that each is met once
            readers = [x for b in writer.writes() for x in self.readers.get(b, [])]
            for reader in dict.fromkeys(readers):
                if reader is not writer and self.of[reader] <= self.of[writer]:
                    self.of[reader] = self.of[writer] + 1
                    if reader not in queued:
                        queued.add(reader)
                        heappush(queue, (self.places[reader], reader))


def schedule(
    nests: Sequence[AnyNest],
    donated: Mapping[Buffer, Buffer],
    waits: Mapping[AnyNest, Sequence[AnyNest]],
) -> Schedule:
    """Nests as kernels; donated: output -> the input whose memory it may overwrite; waits: nest ->
    others that come before it, though it reads nothing of theirs."""
    found, levels = Schedule([]), Levels(nests, waits)
    checking = [nest for nest in nests if has_checks(nest)]
    ahead = levels.needed_by(checking)
    for output, source in (donated if "reuse" not in OFF else {}).items():
        nest = levels.writers[output][0]
        reason = why_not(nest, output, source, len(levels.writers[output]))
        least = max(levels.others(source, nest, checking), default=-1) + 1
        if not reason and least > levels.of[nest] and output in levels.readers:
            reason = "it is read before the input was read for the last time"
        if not reason and nest in ahead:
            reason = "it is written before the last check"
        if reason:
            found.refused[output] = reason
            continue
        found.in_place[output] = source
        if least > levels.of[nest]:
            levels.lift(nest, least)
    for output, source in list(found.in_place.items()):  # what was lifted later may come after it
        nest = levels.writers[output][0]
        if any(each >= levels.of[nest] for each in levels.others(source, nest, checking)):
            del found.in_place[output]
    kernels: list[list[AnyNest]] = [[] for _ in range(max(levels.of.values(), default=-1) + 1)]
    for nest in nests:
        kernels[levels.of[nest]].append(nest)
    found.kernels = [each for each in kernels if each]
    return found


def why_not(nest: AnyNest, output: Buffer, source: Buffer, count: int) -> str:
    """Why a nest cannot write over what it reads, or the empty string."""
    if count > 1:
        return "several nests write it"
    if isinstance(nest, Repeat):
        return "a loop writes it"
    if isinstance(nest, (Scatter, HostCall)):
        read = nest.loads() if isinstance(nest, Scatter) and nest.base is source else nest.reads()
        return "" if source not in read else "the nest reads other places of it"
    body = nest.epilogue if isinstance(nest, Contraction) else nest
    if isinstance(nest, Contraction) and source in (nest.a.buffer, nest.b.buffer):
        return "the contraction reads it whole"
    places = {store.access for store in body.stores if store.access.buffer is output}
    found = body.expressions()
    loads = [x.attr for x in found if x.op == "load" and x.attr.buffer is source]
    touched = frozenset().union(*(each.axes for each in (*loads, *places)))
    if loads and body.inner_axis in touched and any(each.op == "reduce" for each in found):
        return "the nest reads it in several loops"
    for each in loads:
        if each.dynamic or not all(
            (p.offset, p.strides, p.dynamic) == (each.offset, each.strides, ()) for p in places
        ):
            return "the nest reads other places of it"
    return ""


@dataclass
class Plan:
    """Offsets of temporaries in an arena of `size` bytes."""

    size: int
    offsets: dict[Buffer, int]
    lives: dict[Buffer, tuple[int, int]]  # from kernel to kernel
    temporaries: int  # bytes, if nothing were shared


def plan(kernels: Sequence[Sequence[AnyNest]], outputs: Sequence[Buffer]) -> Plan:
    """Lay out what only the program itself reads, in kernels' order, best fit first."""
    lives: dict[Buffer, tuple[int, int]] = {}
    for place, nests in enumerate(kernels):
        for nest in nests:
            for buffer in nest.reads() | nest.writes():
                lives[buffer] = (lives.get(buffer, (place, 0))[0], place)
    for buffer in outputs:
        lives.pop(buffer, None)
    lives = {b: x for b, x in lives.items() if not isinstance(b.source, (Input, Constant))}
    by_start: dict[int, list[Buffer]] = {}
    by_end: dict[int, list[Buffer]] = {}
    for buffer, (start, end) in lives.items():
        by_start.setdefault(start, []).append(buffer)
        by_end.setdefault(end, []).append(buffer)
    arena = Arena()
    offsets: dict[Buffer, int] = {}
    for place in range(len(kernels)):
        for buffer in sorted(by_start.get(place, []), key=lambda b: (-nbytes(b), b.name)):
            offsets[buffer] = arena.take(nbytes(buffer))
        for buffer in [] if "reuse" in OFF else by_end.get(place, []):
            arena.give(offsets[buffer], nbytes(buffer))
    return Plan(arena.size, offsets, lives, sum(map(nbytes, lives)))


def nbytes(buffer: Buffer) -> int:
    """Bytes that a buffer takes, rounded up so that all begin at cache lines."""
    return max(-(-buffer.size * buffer.dtype.itemsize // ALIGNMENT), 1) * ALIGNMENT


class Arena:
    """One block: free ranges, by offset."""

    def __init__(self) -> None:
        self.size = 0
        self.free: list[tuple[int, int]] = []  # (offset, size), sorted, never adjacent

    def take(self, size: int) -> int:
        fits = [(n, offset) for offset, n in self.free if n >= size]
        if fits:
            n, offset = min(fits)
            self.free.remove((offset, n))
            if n > size:
                self.free.append((offset + size, n - size))
                self.free.sort()
            return offset
        if self.free and sum(self.free[-1]) == self.size:
            offset, _ = self.free.pop()  # the last range grows
        else:
            offset = self.size
        self.size = offset + size
        return offset

    def give(self, offset: int, size: int) -> None:
        found: list[tuple[int, int]] = []
        for each in sorted([*self.free, (offset, size)]):
            if found and sum(found[-1]) == each[0]:
                found[-1] = (found[-1][0], found[-1][1] + each[1])
            else:
                found.append(each)
        self.free = found
