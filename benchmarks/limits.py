"""What this machine can do at most, and how near to it contractions come, beside NumPy (OpenBLAS),
PyTorch (MKL) and JAX where they are installed.

    python benchmarks/limits.py [--json limits.json] [--rounds 5] [--threads 2] [--dtypes float32]
        [--libraries needle NumPy PyTorch JAX]

The arithmetic peak is measured in every round, just before all take their turns; the table shows
medians of rounds as shares of it: of C = A B (NN), and of the gradients dA = dC B^T (NT) and
dB = A^T dC (TN). The peak is the best of 7 quarters of a millisecond; `loop` is what the same loop
of multiply-adds reaches when it is timed as the products are, over 20 ms. The second table has
shapes that wait for memory: a matrix of 256 MB and few vectors, in GB/s as a share of the bandwidth
that was measured beside them. On machines that set OPENBLAS_CORETYPE, unset it for NumPy's sake.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import needle as ndl
from needle.compiler import limits, runtime

Matmul = Callable[[], Any]
LIBRARIES = ["needle", "NumPy", "PyTorch", "JAX"]

SQUARES = [(n, n, n) for n in (2048, 1024, 512, 256)]
SHAPES: list[tuple[int, ...]] = [*SQUARES, (100, 784, 100), (48, 64, 32, 64), (512, 784, 1024)]
FORMS = ("NN", "NT", "TN")
SIDE = 8192  # of the large matrix
FEW = (1, 4, 8)  # vectors that it is multiplied with


def turn(x: Any) -> Any:
    return x.swapaxes(-1, -2)


class Peer:
    """A framework: arrays of its own, and products of them."""

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        if name == "PyTorch":
            self.torch = import_module("torch")
            self.torch.set_num_threads(threads)
        elif name == "JAX":
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
            self.jax = import_module("jax")
            self.jax.config.update("jax_enable_x64", True)

    def array(self, x: np.ndarray) -> Any:
        if self.name == "needle":
            return ndl.Tensor(x, requires_grad=False)
        if self.name == "PyTorch":
            return self.torch.tensor(x)
        return self.jax.numpy.asarray(x) if self.name == "JAX" else x

    def product(self, a: Any, b: Any, form: str) -> Matmul:
        """a @ b, with an operand that is transposed first."""
        if self.name == "JAX":
            left, right = form

            def both(a: Any, b: Any) -> Any:
                return (turn(a) if left == "T" else a) @ (turn(b) if right == "T" else b)

            function = self.jax.jit(both)
            return lambda: function(a, b).block_until_ready()
        flip = ndl.transpose if self.name == "needle" else turn
        if form == "NT":
            return lambda: a @ flip(b)
        return (lambda: flip(a) @ b) if form == "TN" else (lambda: a @ b)


def peers(names: list[str], threads: int) -> list[Peer]:
    found = []
    for name in names:
        try:
            found.append(Peer(name, threads))
        except ImportError:
            print(f"{name}: not installed")
    return found


def seconds(call: Matmul, least: float = 0.02) -> float:
    """The mean of as many calls as fill some milliseconds, after one that does not count."""
    start = time.perf_counter()
    call()
    count = max(1, int(least / max(time.perf_counter() - start, 1e-6)))
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def rounds_of(
    calls: dict[str, Matmul], rounds: int, limit: Callable[[], float]
) -> Iterator[tuple[float, dict[str, float]]]:
    """(the limit, seconds of each) of every round; the order turns; threads fall asleep between."""
    names = list(calls)
    for number in range(rounds):
        best = limit()
        found = {}
        for name in names[number % len(names) :] + names[: number % len(names)]:
            time.sleep(0.1)
            found[name] = seconds(calls[name])
        yield best, found


def fresh(measure: Any, *args: Any) -> float:
    measure.cache_clear()
    return float(measure(*args))


def operands(shape: tuple[int, ...], form: str, dtype: str) -> list[np.ndarray]:
    """Of C = A B with A (..., m, k) and B (..., k, n), what this form multiplies."""
    *batch, m, k, n = shape
    sides = {"NN": ((m, k), (k, n)), "NT": ((m, n), (k, n)), "TN": ((m, k), (m, n))}[form]
    rng = np.random.default_rng(0)
    return [rng.standard_normal((*batch, *side)).astype(dtype) for side in sides]


def contractions(found: list[Peer], dtype: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    print(f"\n{dtype}, threads: {threads}; per cent of the arithmetic peak")
    names = ["loop", *(peer.name for peer in found)]
    print(f"{'':16s} {'':3s} {'peak GF/s':>10s} " + "".join(f"{name:>9s}" for name in names))
    launch, operations = limits.multiply_adds(np.dtype(dtype), threads)
    loop, rows = runtime.Program([launch], 0).run, []
    for shape in SHAPES:
        for form in FORMS:
            calls, work = {"loop": loop}, dict.fromkeys(names, 2 * prod(shape))
            work["loop"] = operations
            for peer in found:
                a, b = (peer.array(x) for x in operands(shape, form, dtype))
                calls[peer.name] = peer.product(a, b, form)
            shares: dict[str, list[float]] = {name: [] for name in calls}
            peaks = []
            limit = partial(fresh, limits.measure_peak, np.dtype(dtype), threads)
            for peak, times in rounds_of(calls, rounds, limit):
                peaks.append(peak)
                for name, each in times.items():
                    shares[name].append(work[name] / each / peak)
            row = {name: statistics.median(each) for name, each in shares.items()}
            peak = statistics.median(peaks)
            rows.append({"shape": shape, "form": form, "dtype": dtype, "threads": threads,
                         "peak": peak, **row})  # fmt: skip
            name = " x ".join(map(str, shape))
            values = "".join(f"{100 * each:9.1f}" for each in row.values())
            print(f"{name:16s} {form:3s} {peak / 1e9:10.1f} {values}", flush=True)
    return rows


def thin(found: list[Peer], dtype: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    print(f"\n{dtype}, threads: {threads}; per cent of the bandwidth, N = {SIDE}")
    print(f"{'':20s} {'GB/s':>9s} " + "".join(f"{p.name:>9s}" for p in found))
    rng, rows = np.random.default_rng(0), []
    large = rng.standard_normal((SIDE, SIDE), np.float32).astype(dtype)
    matrices = {peer.name: peer.array(large) for peer in found}
    for few in FEW:
        small = rng.standard_normal((few, SIDE)).astype(dtype)
        for name, form in ((f"({few}, N) @ W", "NN"), (f"({few}, N) @ W^T", "NT")):
            calls = {
                peer.name: peer.product(peer.array(small), matrices[peer.name], form)
                for peer in found
            }
            shares: dict[str, list[float]] = {each: [] for each in calls}
            speeds = []
            limit = partial(fresh, limits.measure_bandwidth, threads)
            for speed, times in rounds_of(calls, rounds, limit):
                speeds.append(speed)
                for each, time_ in times.items():
                    shares[each].append(large.nbytes / time_ / speed)
            row = {each: statistics.median(x) for each, x in shares.items()}
            speed = statistics.median(speeds)
            rows.append({"name": name, "dtype": dtype, "threads": threads, "bandwidth": speed,
                         **row})  # fmt: skip
            values = "".join(f"{100 * each:9.1f}" for each in row.values())
            print(f"{name:20s} {speed / 1e9:9.1f} {values}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=ndl.get_num_threads())
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float64"])
    parser.add_argument("--libraries", nargs="*", default=LIBRARIES, choices=LIBRARIES)
    options = parser.parse_args()
    ndl.set_num_threads(options.threads)
    for dtype in options.dtypes:
        one, all_ = (limits.measure_peak(np.dtype(dtype), n) / 1e9 for n in (1, options.threads))
        print(f"{dtype}: {one:.0f} GFLOP/s on one core, {all_:.0f} on {options.threads} threads")
    print(f"reading memory: {limits.measure_bandwidth(options.threads) / 1e9:.1f} GB/s")
    found, tables = peers(options.libraries, options.threads), {}
    with ndl.no_grad():
        for dtype in options.dtypes:
            given = (found, dtype, options.threads, options.rounds)
            tables[dtype] = {"contractions": contractions(*given), "thin": thin(*given)}
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
