"""What the compiler did with a program, as text.

summary   each kernel: its nests with ops, parallel units, bytes and flops; why fusions were
          refused; the memory plan; host calls
graph     the nodes after simplify
loops     the nests; of one kernel, or of all
llvm, asm the code of each nest
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from typing import Any

from needle.compiler import compile as passes
from needle.compiler import engine
from needle.compiler.compile import format_bytes
from needle.compiler.graph import Input, Node
from needle.compiler.loops import (
    ARITHMETIC,
    AnyNest,
    Buffer,
    Contraction,
    HostCall,
    Scatter,
    show,
)  # fmt: skip
from needle.errors import expect

LEVELS = ("summary", "graph", "loops", "llvm", "asm")


def explain(program: passes.Program, level: str = "summary", kernel: int | None = None) -> str:
    """One stage of a program, whole or for one kernel.

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
        return "\n".join(summary(program, lowered, chosen))
    return "\n\n".join(show_stage(lowered, each, level) for each in chosen)


def show_stage(lowered: passes.Lowered, kernel: int, level: str) -> str:
    parts = [f"kernel {kernel}"]
    for nest in lowered.schedule.kernels[kernel]:
        if level == "loops" or isinstance(nest, HostCall):
            parts.append(show(nest))
        else:
            text = passes.text_of(nest)("kernel")
            parts.append(text if level == "llvm" else engine.assembly(text))
    return "\n".join(parts)


def summary(
    program: passes.Program, lowered: passes.Lowered, chosen: Iterable[int]
) -> Iterator[str]:
    kernels = lowered.schedule.kernels
    nests = sum(map(len, kernels))
    ops = sum(not node.is_leaf for node in lowered.graph.nodes)
    codes = len({each.key for each in program.recipe.launches})
    found = "from the disk cache" if program.lowered is None else "compiled now"
    yield (
        f"program: {number_of(ops, 'op')} in {number_of(len(kernels), 'kernel')}, "
        f"{number_of(nests, 'nest')}, {codes} different; {found}"
    )
    for number in chosen:
        yield f"kernel {number}"
        for nest in kernels[number]:
            yield from describe_nest(nest)
    yield from describe_memory(lowered)
    refusals = dict.fromkeys(each for group in lowered.fuser.groups for each in group.refusals)
    for each in refusals:
        yield f"not fused: {each}"
    hosts = [nest.op for kernel in kernels for nest in kernel if isinstance(nest, HostCall)]
    yield f"host calls: {', '.join(map(str, hosts)) or 'none'}"


def describe_nest(nest: AnyNest) -> Iterator[str]:
    """Ops and where they were written, sizes, parallel units, bytes and flops."""
    read, written = (sum(map(nbytes, each)) for each in (nest.reads(), nest.writes()))
    size = f"{format_bytes(read)} read, {format_bytes(written)} written"
    units = "" if isinstance(nest, HostCall) else ", " + units_of(nest)
    yield f"  {kind_of(nest)}{units}, {size}, {flops(nest):,} flops"
    names = [node.name for node in nest.ops if isinstance(node, Node)]
    yield f"    {', '.join(names)}"
    places = dict.fromkeys(node.place for node in nest.ops if isinstance(node, Node) and node.place)
    for place in places:
        yield f"    {place}"


def units_of(nest: AnyNest) -> str:
    return number_of(passes.structure(nest).units, "parallel unit")


def kind_of(nest: AnyNest) -> str:
    if isinstance(nest, Contraction):
        sizes = " x ".join(map(str, (*nest.batch, nest.m, nest.n, nest.k)))
        return f"contraction {sizes}"
    if isinstance(nest, Scatter):
        return f"scatter {nest.places} places to {nest.rows} rows"
    if isinstance(nest, HostCall):
        return f"host call {nest.op}"
    outer = " x ".join(map(str, nest.outer)) or "1"
    return f"{nest.order} {outer}, loop {nest.inner}"


def flops(nest: AnyNest) -> int:
    """Arithmetic on floats: operations of the expressions times the points of the loops."""
    if isinstance(nest, Contraction):
        return 2 * prod(nest.batch) * nest.m * nest.n * nest.k + flops(nest.epilogue)
    if isinstance(nest, Scatter):
        return nest.lead * nest.places * nest.trail
    if isinstance(nest, HostCall):
        return 0
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
