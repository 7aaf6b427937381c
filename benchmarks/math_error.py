"""How far the functions of needle/compiler/math.py are from the exact values.

    python benchmarks/math_error.py [--step 1] [--functions exp sin] [--dtypes float32 float64]
                                    [--json math_error.json]

float32: functions of one argument on every step-th of the 2^32 bit patterns, against the C library
in double. float64, and functions of two arguments: samples of random bits, of every exponent, of
the range that matters, near 1 and near multiples of pi / 2, and all pairs of special values;
float64 against libquadmath. Errors are in units in the last place of the exact value, with the
arguments at the largest. "special" counts wrong NaNs, zeros or their signs, and values beyond 1
where there are none. The exit status is 1 if a function of math.py is beyond its
bound of 2 (pow in float64: 4) or has such values. It needs a C compiler with libquadmath (gcc).

The composites at the end are what their ops make of them; they have no bound, and their unit is
that of the last place of max(|y|, 1).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import needle as ndl

# In the order of math_error.c; where each is neither trivial nor constant
UNARY: dict[str, tuple[Callable[..., Any], tuple[float, float]]] = {
    "exp": (ndl.exp, (-750, 720)), "expm1": (ndl.expm1, (-40, 720)), "log": (ndl.log, (0.3, 3)),
    "log1p": (ndl.log1p, (-1, 3)), "tanh": (ndl.tanh, (-20, 20)), "sin": (ndl.sin, (-200, 200)),
    "cos": (ndl.cos, (-200, 200)), "erf": (ndl.erf, (-6, 6)), "sqrt": (ndl.sqrt, (0, 10)),
    "rsqrt": (ndl.rsqrt, (0, 10)), "sigmoid": (ndl.sigmoid, (-750, 40)),
    "silu": (ndl.silu, (-750, 40)), "gelu": (ndl.gelu, (-40, 9)),
    "gelu tanh": (lambda x: ndl.gelu(x, "tanh"), (-40, 9)),
    "softplus": (ndl.softplus, (-750, 40)),
}  # fmt: skip
BINARY: dict[str, Callable[..., Any]] = {"pow": lambda x, y: x**y, "remainder": lambda x, y: x % y}
COMPOSITES = ("sigmoid", "silu", "gelu", "gelu tanh", "softplus")
AT_MOST_ONE = ("tanh", "sin", "cos", "erf", "sigmoid")
CHUNK = 1 << 22
SPECIAL = [
    0.0, 5e-324, 1e-310, 2.0**-149, 1e-40, 2.0**-126, 2.0**-1022, 0.5, 1.0, 1.5, 2.0, 3.0, 2.5,
    24.0, 2.0**23 - 0.5, 2.0**24 + 2, 2.0**53, 88.72, 88.73, 103.9, 104.1, 709.7, 709.8, 745.1,
    745.2, np.pi / 2, np.pi, 1e5, 1e9, 1e22, 6381956970095103 * 2.0**797, 2.0**127, 2.0**1023,
    np.inf, np.nan,
]  # fmt: skip


class Worst(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_double) for name in ("error", "x", "y", "found", "exact")),
        ("special", ctypes.c_int64), ("special_x", ctypes.c_double), ("special_y", ctypes.c_double),
    ]  # fmt: skip


@cache
def library() -> ctypes.CDLL:
    """math_error.c, compiled."""
    with tempfile.TemporaryDirectory() as folder:
        target = str(Path(folder) / "math_error.so")
        source = str(Path(__file__).with_suffix(".c"))
        command = [os.environ.get("CC", "gcc"), "-O2", "-fno-builtin", "-shared", "-fPIC", source]
        try:
            subprocess.run([*command, "-o", target, "-lquadmath", "-lm"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"math_error.py: expected a C compiler with libquadmath (gcc); got {error}")
        return ctypes.CDLL(target)


def check(
    number: int, arrays: list[np.ndarray], found: np.ndarray, lowest: int, worst: list[Worst]
) -> None:
    """Compare, a part of the elements in each thread."""
    run = getattr(library(), "check_float" if found.dtype == np.float32 else "check_double")
    size, item = -(-len(found) // len(worst)), found.itemsize

    def part(n: int) -> None:
        start = n * size
        pointers = [ctypes.c_void_p(x.ctypes.data + start * item) for x in (*arrays, found)]
        pointers[1:1] = [ctypes.c_void_p()] * (2 - len(arrays))
        count = max(0, min(size, len(found) - start))
        run(number, *pointers, ctypes.c_int64(count), lowest, ctypes.byref(worst[n]))

    with ThreadPoolExecutor(len(worst)) as threads:
        list(threads.map(part, range(len(worst))))


def edges(dtype: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        x = np.array(SPECIAL, dtype)
        x = np.concatenate([x, np.nextafter(x, dtype.type(0)), np.nextafter(x, dtype.type(np.inf))])
    return np.concatenate([x, -x])


def patterns(step: int) -> Iterator[np.ndarray]:
    """Every step-th float32."""
    for first in range(0, 1 << 32, step * CHUNK):
        last = min(first + step * CHUNK, 1 << 32)
        yield np.arange(first, last, step, np.int64).astype(np.uint32).view(np.float32)


def sample(name: str, dtype: np.dtype, step: int) -> Iterator[np.ndarray]:
    """Arguments of a function of float64."""
    rng, count = np.random.default_rng(0), CHUNK // step
    yield edges(dtype)
    yield rng.integers(0, 1 << 64, count // 4, np.uint64).view(dtype)
    exponents = np.repeat(np.arange(2048, dtype=np.uint64) << np.uint64(52), 64)
    yield (exponents + rng.integers(0, 1 << 52, len(exponents), np.uint64)).view(dtype)
    yield rng.uniform(*UNARY[name][1], count)
    yield rng.uniform(-1, 1, count // 2)
    yield 1 + rng.integers(-1000, 1000, count // 8) * 2.0**-52
    yield 1 + rng.standard_normal(count // 8) * 10.0 ** rng.uniform(-16, -1, count // 8)
    turns = np.floor(2.0 ** rng.uniform(0, 60, count // 8)) * np.longdouble(np.pi) / 2
    near = turns + turns / np.longdouble(np.pi) * np.longdouble("1.2246467991473531772e-16")
    yield near.astype(dtype)
    yield rng.choice([-1, 1], count // 4) * 10.0 ** rng.uniform(-20, 20, count // 4)


def pairs(name: str, dtype: np.dtype, step: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Arguments of a function of two."""
    rng, count = np.random.default_rng(0), CHUNK // step
    grid = np.meshgrid(edges(dtype), edges(dtype))
    yield grid[0].ravel(), grid[1].ravel()
    reach = 110 if dtype == np.float32 else 760
    widest = 88 if dtype == np.float32 else 708
    for _ in range(16 if dtype == np.float32 else 1):
        bits = rng.integers(0, 256, (2, count * dtype.itemsize), np.uint8).view(dtype)
        yield bits[0], bits[1]
        yield rng.uniform(-100, 100, count).astype(dtype), rng.uniform(-5, 5, count).astype(dtype)
        a = np.exp(rng.uniform(-widest, widest, count)).astype(dtype)
        b = a * np.exp(rng.uniform(-40, 5, count))
        yield (
            a,
            (reach * rng.uniform(-1, 1, count) / np.log(a) if name == "pow" else b).astype(dtype),
        )
        near = (1 + rng.standard_normal(count) * 10.0 ** rng.uniform(-8, -1, count)).astype(dtype)
        near[near == 1] = 0.5
        b = reach * rng.uniform(-1, 1, count) / np.log(np.abs(near))
        yield near, b.astype(dtype)
        whole = rng.integers(-60, 60, (2, count))
        yield whole[0].astype(dtype), whole[1].astype(dtype)


def measure(name: str, dtype: np.dtype, step: int) -> dict[str, Any]:
    """A row of the table."""
    start, count, beyond = time.perf_counter(), 0, 0
    lowest = 0 if name in COMPOSITES else -126 if dtype == np.float32 else -1022
    worst = [Worst() for _ in range(ndl.get_num_threads())]
    if name in BINARY:
        function, number = BINARY[name], list(BINARY).index(name)
        batches: Iterator[Any] = pairs(name, dtype, step)
    else:
        function, number = UNARY[name][0], list(UNARY).index(name)
        one = patterns(step) if dtype == np.float32 else sample(name, dtype, step)
        batches = ((x,) for x in one)
    with ndl.no_grad(), np.errstate(all="ignore"):
        for batch in batches:
            arrays = [np.ascontiguousarray(x) for x in batch]
            found = function(*(ndl.Tensor(x, dtype=str(dtype)) for x in arrays)).numpy()
            assert found.dtype == dtype
            check(number, arrays, found, lowest, worst)
            count += len(found)
            if name in AT_MOST_ONE:
                beyond += int(np.count_nonzero(np.abs(found) > 1))
    top = max(worst, key=lambda each: each.error)
    entry = {key: getattr(top, key) for key in ("error", "x", "y", "found", "exact")}
    special = sum(each.special for each in worst) + beyond
    at = next(([each.special_x, each.special_y] for each in worst if each.special), None)
    seconds = time.perf_counter() - start
    return {"name": name, "dtype": str(dtype), "count": count, **entry, "special": special,
            "special_at": at, "seconds": seconds}  # fmt: skip


def bound(entry: dict[str, Any]) -> float:
    if entry["name"] in COMPOSITES:
        return np.inf
    return 4 if (entry["name"], entry["dtype"]) == ("pow", "float64") else 2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--step", type=int, default=1)
    parser.add_argument("--functions", nargs="*", default=[*UNARY, *BINARY])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float64"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found, wrong = [], 0
    head = f"{'':10s} {'arguments':>13s} {'ULP':>7s} {'special':>7s} {'seconds':>7s}  at"
    for dtype in options.dtypes:
        print(f"\n{dtype}\n{head}")
        for name in options.functions:
            entry = measure(name, np.dtype(dtype), options.step)
            found.append(entry)
            bad = entry["error"] > bound(entry) or (entry["special"] and bound(entry) < np.inf)
            wrong += bool(bad)
            at = f"{entry['x']!r}" + (f", {entry['y']!r}" if name in BINARY else "")
            print(
                f"{name:10s} {entry['count']:13,d} {entry['error']:7.3f} {entry['special']:7d} "
                f"{entry['seconds']:7.1f}  {at}{'  BEYOND ITS BOUND' if bad else ''}"
                + (f"  special: {entry['special_at']}" if entry["special"] else ""),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
