"""What this machine can do at most, measured: arithmetic, and reading memory. For explain.py and
benchmarks, which set a kernel's time against it.

    peak        multiply-adds of registers, as many chains as a contraction's tile has
    bandwidth   vectors read from an array that no cache holds
"""

from __future__ import annotations

from functools import cache
from time import perf_counter

import numpy as np

from needle.compiler import engine, runtime
from needle.compiler.contract import Core, Function
from needle.compiler.vectors import constant, typed
from needle.dtype import DType, float32

KERNEL = "(ptr %args, i64 %begin, i64 %end, ptr %scratch)"
TURNS = 1000  # of the loop of multiply-adds in a unit
BLOCK = 1 << 15  # bytes that a unit reads
SIZE = 1 << 28  # bytes that are read in all: more than caches hold
ROUNDS = 7  # of which the fastest counts: others share the machine


def emit_peak(dtype: DType, bits: int, name: str) -> str:
    """A unit is TURNS turns of 2 * rows chains of multiply-adds."""
    core = Core(dtype, bits)
    f, kind = Function(name, KERNEL, ""), typed(dtype, core.lanes)
    one = f.load("%scratch", dtype, core.lanes)  # what is not known cannot be left out
    chains = [(kind, one)] * (2 * core.rows)

    def turn(_: str, sums: list[str]) -> list[str]:
        return [f.arithmetic("fma", dtype, core.lanes, [one, one, x]) for x in sums]

    with f.span("%end", 1, "%begin"):
        found = f.loop(0, TURNS, 1, chains, turn)
        for x in found:
            f.store(x, "%scratch", dtype, core.lanes)
    return f.text


def emit_read(bits: int, name: str) -> str:
    """A unit is BLOCK bytes of args[0]."""
    f, lanes, several = Function(name, KERNEL, ""), bits // 32, 8
    sums = [(typed(float32, lanes), constant(0, float32, lanes))] * several
    step = several * bits // 8
    source = f.argument("%args", 0, "ptr")

    def turn(place: str, sums: list[str]) -> list[str]:
        places = [f.byte(f.byte(source, place), u * bits // 8) for u in range(several)]
        found = [f.load(each, float32, lanes) for each in places]
        pairs = zip(sums, found, strict=True)
        return [f.arithmetic("add", float32, lanes, [*pair]) for pair in pairs]

    first, last = (f.whole("mul", each, BLOCK) for each in ("%begin", "%end"))
    for x in f.loop(first, last, step, sums, turn):
        f.store(x, "%scratch", float32, lanes)
    return f.text


def multiply_adds(dtype: DType, threads: int) -> tuple[runtime.Launch, int]:
    """A launch of nothing but multiply-adds, on so many threads, and how many operations it is."""
    bits, units = engine.host().vector_bits, 32 * threads
    core = Core(dtype, bits)
    address = engine.kernel(f"peak {dtype} {bits}", lambda name: emit_peak(dtype, bits, name))
    operations = units * TURNS * 2 * core.rows * core.lanes * 2
    return runtime.Launch(address, [0], units), operations


def fastest(launch: runtime.Launch) -> float:
    """Seconds that a launch takes, on as many threads as programs run on."""
    program, found = runtime.Program([launch], 0), []
    for _ in range(ROUNDS):
        start = perf_counter()
        program.run()
        found.append(perf_counter() - start)
    return min(found)


def peak(dtype: DType = float32, threads: int | None = None) -> float:
    """Operations per second of float32 or float64 on so many threads, by default all: a
    multiply-add is two."""
    return measure_peak(dtype, threads or runtime.get_num_threads())


def bandwidth(threads: int | None = None) -> float:
    """Bytes per second that so many threads, by default all, read from memory."""
    return measure_bandwidth(threads or runtime.get_num_threads())


@cache
def measure_peak(dtype: DType, threads: int) -> float:
    launch, operations = multiply_adds(dtype, threads)
    return operations / on_threads(threads, launch)


@cache
def measure_bandwidth(threads: int) -> float:
    bits = engine.host().vector_bits
    address = engine.kernel(f"read {bits}", lambda name: emit_read(bits, name))
    memory = np.ones(SIZE // 4, np.float32)
    launch = runtime.Launch(address, [memory.ctypes.data], SIZE // BLOCK)
    return SIZE / on_threads(threads, launch)


def on_threads(threads: int, launch: runtime.Launch) -> float:
    before = runtime.get_num_threads()
    if threads == before:
        return fastest(launch)
    runtime.set_num_threads(threads)
    try:
        return fastest(launch)
    finally:
        runtime.set_num_threads(before)
