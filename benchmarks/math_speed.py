"""What the functions of needle/compiler/math.py cost on 10^6 elements, beside PyTorch.

    python benchmarks/math_speed.py [--json math_speed.json] [--rounds 7] [names...]

Needle's eager op, the same op out of a jitted function, and PyTorch take turns, with 1 thread each
and then with 2, in float32 and float64. The table shows the medians in nanoseconds per element and
the ratios needle / PyTorch (below 1: needle is faster). Arguments are drawn evenly from the range
beside each function, those of log, log1p, rsqrt and pow's base from its logarithm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from eager import mean_ratio, time_call

import needle as ndl

SIZE = 10**6
Function = Callable[..., Any]
FUNCTIONS: dict[str, tuple[Function, Function, tuple[float, float], bool]] = {
    "exp": (ndl.exp, torch.exp, (-20, 20), False),
    "expm1": (ndl.expm1, torch.expm1, (-20, 20), False),
    "log": (ndl.log, torch.log, (1e-3, 1e3), True),
    "log1p": (ndl.log1p, torch.log1p, (1e-3, 1e3), True),
    "tanh": (ndl.tanh, torch.tanh, (-10, 10), False),
    "sin": (ndl.sin, torch.sin, (-10, 10), False),
    "cos": (ndl.cos, torch.cos, (-10, 10), False),
    "sin of 10^4": (ndl.sin, torch.sin, (-1e4, 1e4), False),
    "erf": (ndl.erf, torch.erf, (-4, 4), False),
    "sqrt": (ndl.sqrt, torch.sqrt, (1e-3, 1e3), True),
    "rsqrt": (ndl.rsqrt, torch.rsqrt, (1e-3, 1e3), True),
    "pow": (lambda x, y: x**y, torch.pow, (1e-2, 1e2), True),
    "pow scalar": (lambda x: x**2.5, lambda x: torch.pow(x, 2.5), (1e-2, 1e2), True),
    "remainder": (lambda x, y: x % y, torch.remainder, (-100, 100), False),
    "sigmoid": (ndl.sigmoid, torch.sigmoid, (-10, 10), False),
    "silu": (ndl.silu, F.silu, (-10, 10), False),
    "gelu": (ndl.gelu, F.gelu, (-5, 5), False),
    "gelu tanh": (
        lambda x: ndl.gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), (-5, 5), False
    ),
    "softplus": (ndl.softplus, F.softplus, (-10, 10), False),
}  # fmt: skip


def arguments(name: str, dtype: str) -> list[np.ndarray]:
    """One array, or two where the function takes two."""
    (low, high), even_logarithm = FUNCTIONS[name][2:]
    rng = np.random.default_rng(0)
    x = np.exp(rng.uniform(*np.log((low, high)), SIZE)) if even_logarithm else None
    found = [rng.uniform(low, high, SIZE) if x is None else x]
    if name in ("pow", "remainder"):
        found.append(rng.uniform(-5, 5, SIZE))
    return [each.astype(dtype) for each in found]


def measure(name: str, dtype: str, threads: int, rounds: int) -> dict[str, Any]:
    ours, theirs = FUNCTIONS[name][:2]
    ndl.set_num_threads(threads)
    torch.set_num_threads(threads)
    arrays = arguments(name, dtype)
    xs = [ndl.Tensor(x, dtype=dtype, requires_grad=False) for x in arrays]
    calls = {
        "eager": partial(ours, *xs),
        "jit": partial(ndl.jit(ours), *xs),
        "torch": partial(theirs, *map(torch.tensor, arrays)),
    }
    times: dict[str, list[float]] = {kind: [] for kind in calls}
    with ndl.no_grad(), torch.no_grad():
        for _ in range(rounds):
            for kind, call in calls.items():
                time.sleep(0.05)  # the other library's threads stop waiting in a loop
                times[kind].append(time_call(call))
    found = {kind: statistics.median(each) * 1e3 / SIZE for kind, each in times.items()}
    return {"name": name, "dtype": dtype, "threads": threads, **found,
            "ratio": {"ratio": found["eager"] / found["torch"]},
            "jit ratio": {"ratio": found["jit"] / found["torch"]}}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "float64"])
    options = parser.parse_args()
    found = []
    for threads in options.threads:
        for dtype in options.dtypes:
            print(f"\n{dtype}, threads: {threads}; ns per element")
            print(f"{'':12s} {'eager':>7s} {'jit':>7s} {'PyTorch':>8s} {'ratio':>6s} {'jit':>6s}")
            for name in options.names or FUNCTIONS:
                entry = measure(name, dtype, threads, options.rounds)
                found.append(entry)
                times = f"{entry['eager']:7.3f} {entry['jit']:7.3f} {entry['torch']:8.3f}"
                ratios = (entry["ratio"]["ratio"], entry["jit ratio"]["ratio"])
                print(f"{name:12s} {times} {ratios[0]:6.2f} {ratios[1]:6.2f}", flush=True)
    print(f"\ngeometric mean of ratios: {mean_ratio(found, ['ratio', 'jit ratio']):.2f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
