"""What the compiler did with a program, as text.

summary   each kernel: its nests with ops, parallel units, bytes and flops; why fusions were
          refused; the memory plan; host calls
graph     the nodes after simplify
loops     the nests; of one kernel, or of all
llvm, asm the code of each nest

With `time`, the summary has each kernel's and nest's time, and how near it comes to what the
machine can do: see Times.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, repeat
from math import prod
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray, empty
from needle.compiler import compile as passes
from needle.compiler import engine, limits, runtime
from needle.compiler.compile import format_bytes
from needle.compiler.graph import Input, Node, nodes_of
from needle.compiler.loops import (
    ARITHMETIC,
    AnyNest,
    Buffer,
    Contraction,
    HostCall,
    Repeat,
    Scatter,
    show,
)  # fmt: skip
from needle.errors import expect

LEVELS = ("summary", "graph", "loops", "llvm", "asm")
ROUNDS = 15  # in which kernels are timed


def explain(
    program: passes.Program,
    level: str = "summary",
    kernel: int | None = None,
    given: Mapping[int, NDArray] | None = None,
) -> str:
    """One stage of a program, whole or for one kernel. given: times are wanted, with these inputs.

    ValueError: an unknown level, a kernel that there is not.
    """
    levels = ", ".join(LEVELS)
    expect(level in LEVELS, f"explain: expected a level of {levels}; received {level!r}")
    lowered = program.lowered or passes.lower(program.source, program.donated)
    count = len(lowered.schedule.kernels)
    fits = kernel is None or 0 <= kernel < count
    expect(fits, f"explain: expected a kernel below {count}; received {kernel}")
    if level == "graph":
        return str(lowered.graph)
    chosen = range(count) if kernel is None else [kernel]
    if level == "summary":
        times = None if given is None else Times(program, given)
        return "\n".join(summary(program, lowered, chosen, times))
    return "\n\n".join(show_stage(lowered, each, level) for each in chosen)


def show_stage(lowered: passes.Lowered, kernel: int, level: str) -> str:
    parts = [f"kernel {kernel}"]
    nests = lowered.schedule.kernels[kernel]
    for nest in nests if level == "loops" else innermost(nests):
        if level == "loops" or isinstance(nest, HostCall):
            parts.append(show(nest))
        else:
            text = passes.text_of(nest)("kernel")
            parts.append(text if level == "llvm" else engine.assembly(text))
    return "\n".join(parts)


def innermost(nests: Iterable[AnyNest]) -> Iterator[AnyNest]:
    """The nests, and in place of a loop those of its body."""
    for nest in nests:
        yield from innermost(nest.nests) if isinstance(nest, Repeat) else [nest]


def summary(
    program: passes.Program, lowered: passes.Lowered, chosen: Iterable[int], times: Times | None
) -> Iterator[str]:
    kernels = lowered.schedule.kernels
    nests = sum(map(len, kernels))
    ops = sum(not node.is_leaf for node in nodes_of(lowered.graph))
    codes = len({each.key for each in program.recipe.launches} - {"loop"})
    found = "from the disk cache" if program.lowered is None else "compiled now"
    yield (
        f"program: {number_of(ops, 'op')} in {number_of(len(kernels), 'kernel')}, "
        f"{number_of(nests, 'nest')}, {codes} different; {found}"
    )
    for number in chosen:
        yield f"kernel {number}" + (times.of_kernel(number) if times else "")
        first = sum(map(len, kernels[:number]))
        for place, nest in enumerate(kernels[number], first):
            yield from describe_nest(nest, times.of_nest(place, nest) if times else "")
            if isinstance(nest, Repeat):
                yield from describe_body(nest, times.of_rows(place) if times else repeat(""))
    if times:
        yield times.total()
    yield from describe_memory(lowered)
    refusals = dict.fromkeys(each for group in lowered.fuser.groups for each in group.refusals)
    for each in refusals:
        yield f"not fused: {each}"
    found_nests = innermost(nest for kernel in kernels for nest in kernel)
    hosts = [nest.op for nest in found_nests if isinstance(nest, HostCall)]
    yield f"host calls: {', '.join(map(str, hosts)) or 'none'}"


class Times:
    """How long each kernel and each nest of a program take: medians over rounds in which they run
    one by one, in the program's order, on copies of the inputs and on outputs of their own. An
    input that is not given is 1, an integer 0."""

    def __init__(self, program: passes.Program, given: Mapping[int, NDArray]) -> None:
        inputs = enumerate(node.spec for node in program.source.inputs)
        ones = {n: np.full(x.shape, x.is_float, x.dtype) for n, x in inputs if n not in given}
        arrays = [NDArray(x) for _, x in sorted({**given, **ones}.items())]
        arrays += [empty(each) for each in (*program.forms, program.memory) if each is not None]
        rows = [program.launch(each) for each in program.recipe.launches]
        launches = program.recipe.launches
        pairs = list(zip(launches, rows, strict=True))
        kernels, nests = (
            [[row for _, row in group] for _, group in groupby(pairs, key)]
            for key in (lambda pair: pair[0].kernel, lambda pair: pair[0].nest)
        )
        self.owners = [each.nest for each in launches if each.key != "loop"]
        single = [[row] for each, row in pairs if each.key != "loop"]
        self.threads = runtime.get_num_threads()
        parts = [[rows], kernels, nests, single]
        found = [timed(part, [x.ptr for x in arrays]) for part in parts]
        (self.whole,), self.kernels, self.nests, self.rows = found

    def of_kernel(self, number: int) -> str:
        time = self.kernels[number]
        return f": {format_time(time)}, {time / sum(self.kernels):.1%}"

    def of_nest(self, place: int, nest: AnyNest) -> str:
        """The time, and the larger one of its shares of bandwidth and arithmetic peak."""
        wide = any(each.dtype == np.float64 for each in nest.reads() | nest.writes())
        peak = limits.peak(np.dtype(np.float64 if wide else np.float32), self.threads)
        moved = sum(map(nbytes, (*nest.reads(), *nest.writes())))
        shares = (
            (moved / limits.bandwidth(self.threads) / self.nests[place], "bandwidth"),
            (flops(nest) / peak / self.nests[place], "arithmetic peak"),
        )
        share, limit = max(shares)
        return f", {format_time(self.nests[place])}, {share:.0%} of {limit}"

    def of_rows(self, place: int) -> Iterator[str]:
        """The times of a loop's launches, each once."""
        pairs = zip(self.owners, self.rows, strict=True)
        return iter([f", {format_time(time)}" for owner, time in pairs if owner == place])

    def total(self) -> str:
        peak = limits.peak(np.dtype(np.float32), self.threads) / 1e9
        return (
            f"total: {format_time(sum(self.kernels))} kernel by kernel, {format_time(self.whole)} "
            f"at once, on {number_of(self.threads, 'thread')} with {peak:,.0f} GFLOP/s in float32 "
            f"and {limits.bandwidth(self.threads) / 1e9:,.1f} GB/s"
        )


def timed(parts: Sequence[Sequence[runtime.Launch]], pointers: Sequence[int]) -> list[float]:
    """Seconds that each part of a program takes; the parts are run in turn."""
    programs = [runtime.Program(part, len(pointers)) for part in parts]
    found: list[list[float]] = []
    for _ in range(ROUNDS):
        found.append([])
        for program in programs:
            start = perf_counter()
            program.run(*pointers)
            found[-1].append(perf_counter() - start)
    return [median(each) for each in zip(*found, strict=True)]


def format_time(seconds: float) -> str:
    """0.00123 -> 1,230.0 us"""
    return f"{seconds * 1e6:,.1f} us"


def describe_nest(nest: AnyNest, time: str = "") -> Iterator[str]:
    """Ops and where they were written, sizes, parallel units, bytes and flops."""
    read, written = (sum(map(nbytes, each)) for each in (nest.reads(), nest.writes()))
    size = f"{format_bytes(read)} read, {format_bytes(written)} written"
    kind = kind_of(nest)
    if not isinstance(nest, (HostCall, Repeat)):
        kind += ", " + number_of(passes.structure(nest).units, "parallel unit")
    yield f"  {kind}, {size}, {flops(nest):,} flops{time}"
    names = [node.name for node in nest.ops if isinstance(node, Node)]
    yield f"    {', '.join(names)}"
    places = dict.fromkeys(node.place for node in nest.ops if isinstance(node, Node) and node.place)
    for place in places:
        yield f"    {place}"


def describe_body(nest: Repeat, times: Iterator[str]) -> Iterator[str]:
    """What a turn of a loop does; times: of its nests."""
    for number, kernel in enumerate(nest.kernels):
        yield f"    kernel {number} of a turn"
        for each in kernel:
            is_loop = isinstance(each, Repeat)
            lines = list(describe_nest(each, "" if is_loop else next(times)))
            lines += describe_body(each, times) if isinstance(each, Repeat) else []
            yield from (f"    {line}" for line in lines)


def kind_of(nest: AnyNest) -> str:
    if isinstance(nest, Contraction):
        sizes = " x ".join(map(str, (*nest.batch, nest.m, nest.n, nest.k)))
        return f"contraction {sizes}"
    if isinstance(nest, Scatter):
        return f"scatter {nest.places} places to {nest.rows} rows"
    if isinstance(nest, HostCall):
        return f"host call {nest.op}"
    if isinstance(nest, Repeat):
        return f"loop of {number_of(nest.turns, 'turn')}"
    outer = " x ".join(map(str, nest.outer)) or "1"
    return f"{nest.order} {outer}, loop {nest.inner}"


def flops(nest: AnyNest) -> int:
    """Arithmetic on floats: operations of the expressions times the points of the loops."""
    if isinstance(nest, Contraction):
        return 2 * prod(nest.batch) * nest.m * nest.n * nest.k + flops(nest.epilogue)
    if isinstance(nest, Scatter):
        return nest.lead * nest.places * nest.trail if nest.base is None else 0
    if isinstance(nest, HostCall):
        return 0
    if isinstance(nest, Repeat):
        return nest.turns * sum(map(flops, nest.nests))
    points = prod(nest.outer) * nest.inner
    return points * sum(is_flop(each) for each in nest.expressions())


def is_flop(each: Any) -> bool:
    return each.dtype.kind == "f" and (each.op in ARITHMETIC or each.op in ("reduce", "scan"))


def describe_memory(lowered: passes.Lowered) -> Iterator[str]:
    plan, found = lowered.plan, lowered.schedule
    yield (
        f"memory: arena of {format_bytes(plan.size)} for temporaries of "
        f"{format_bytes(plan.temporaries)} in {number_of(len(plan.offsets), 'buffer')}"
    )
    names = {buffer: f"output {n}" for n, buffer in enumerate(lowered.outputs)}
    for output, source in found.in_place.items():
        assert isinstance(source.source, Input)
        yield f"  {names[output]}, {output}, overwrites input {source.source.number}, {source}"
    for output, reason in found.refused.items():
        yield f"  {names[output]}, {output}, gets memory of its own: {reason}"


def number_of(count: int, name: str) -> str:
    """1 nest, 2 nests"""
    return f"{count:,} {name}{'s' * (count != 1)}"


def nbytes(buffer: Buffer) -> int:
    return buffer.size * buffer.dtype.itemsize
