"""What an eager op costs on small arrays, beside PyTorch, in one process: forward alone, and
forward with backward.

    python benchmarks/eager.py [--json eager.json] [--rounds 7] [names...]

Each op runs on float32 inputs of a few hundred elements that require gradients, so that the time is
the framework's own. Needle and PyTorch take turns for some rounds; the table shows the medians in
microseconds and the ratio needle / PyTorch (below 1: needle is faster), and geometric means over
the primitives and over the composites. A third table has arrays of 10^7 elements, forward alone, on
all threads. "fwd+bwd" is one forward and one backward from a gradient of
ones. The last row is a training step of a 3-layer perceptron with Adam.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import needle as ndl
from needle import nn

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    sys.exit("eager.py: expected PyTorch beside needle; install it with pip install torch==2.13.0")

A = np.random.default_rng(0).uniform(0.5, 1.5, (32, 16)).astype(np.float32)
B = np.random.default_rng(1).uniform(0.5, 1.5, (32, 16)).astype(np.float32)
V = np.random.default_rng(2).uniform(0.5, 1.5, (16,)).astype(np.float32)
W = np.random.default_rng(3).uniform(0.5, 1.5, (16, 8)).astype(np.float32)
ONE = np.ones(16, np.float32)
LABELS = np.arange(32) % 16
IDS = np.arange(24) % 32

# name: (inputs, needle's function, PyTorch's)
Row = tuple[list[np.ndarray], Callable[..., Any], Callable[..., Any]]

PRIMITIVES: dict[str, Row] = {
    "add": ([A, B], lambda a, b: a + b, lambda a, b: a + b),
    "add broadcast": ([A, V], lambda a, b: a + b, lambda a, b: a + b),
    "add scalar": ([A], lambda a: a + 2.0, lambda a: a + 2.0),
    "subtract": ([A, B], lambda a, b: a - b, lambda a, b: a - b),
    "multiply": ([A, B], lambda a, b: a * b, lambda a, b: a * b),
    "multiply scalar": ([A], lambda a: a * 2.0, lambda a: a * 2.0),
    "divide": ([A, B], lambda a, b: a / b, lambda a, b: a / b),
    "power scalar": ([A], lambda a: a**3.0, lambda a: a**3.0),
    "negate": ([A], lambda a: -a, lambda a: -a),
    "abs": ([A], ndl.abs, torch.abs),
    "exp": ([A], ndl.exp, torch.exp),
    "log": ([A], ndl.log, torch.log),
    "sqrt": ([A], ndl.sqrt, torch.sqrt),
    "sin": ([A], ndl.sin, torch.sin),
    "tanh": ([A], ndl.tanh, torch.tanh),
    "relu": ([A], ndl.relu, torch.relu),
    "maximum": ([A, B], ndl.maximum, torch.maximum),
    "where": ([A, B], lambda a, b: ndl.where(MASK_N, a, b), lambda a, b: torch.where(MASK_T, a, b)),
    "clip": ([A], lambda a: ndl.clip(a, 0.8, 1.2), lambda a: torch.clamp(a, 0.8, 1.2)),
    "sum": ([A], lambda a: a.sum(), lambda a: a.sum()),
    "sum rows": ([A], lambda a: a.sum(axis=1), lambda a: a.sum(1)),
    "max rows": ([A], lambda a: a.max(axis=1), lambda a: a.amax(1)),
    "cumsum": ([A], lambda a: a.cumsum(1), lambda a: a.cumsum(1)),
    "matmul": ([A, W], lambda a, b: a @ b, lambda a, b: a @ b),
    "reshape": ([A], lambda a: a.reshape((16, 32)), lambda a: a.reshape(16, 32)),
    "transpose": ([A], lambda a: a.transpose(), lambda a: a.transpose(0, 1)),
    "broadcast_to": ([V], lambda a: a.broadcast_to((32, 16)), lambda a: a.broadcast_to(32, 16)),
    "slice": ([A], lambda a: a[2:20], lambda a: a[2:20]),
    "index rows": ([A], lambda a: a[IDS_N], lambda a: a[IDS_T]),
    "concatenate": ([A, B], lambda a, b: ndl.concatenate([a, b]), lambda a, b: torch.cat([a, b])),
    "stack": ([A, B], lambda a, b: ndl.stack([a, b]), lambda a, b: torch.stack([a, b])),
    "flip": ([A], lambda a: ndl.flip(a, 1), lambda a: torch.flip(a, [1])),
    "pad": ([A], lambda a: ndl.pad(a, [(1, 1), (1, 1)]), lambda a: F.pad(a, (1, 1, 1, 1))),
}

COMPOSITES: dict[str, Row] = {
    "mean": ([A], lambda a: a.mean(axis=1), lambda a: a.mean(1)),
    "var": ([A], lambda a: a.var(axis=1), lambda a: a.var(1, correction=0)),
    "softmax": ([A], lambda a: ndl.softmax(a), lambda a: torch.softmax(a, -1)),
    "log_softmax": ([A], lambda a: ndl.log_softmax(a), lambda a: torch.log_softmax(a, -1)),
    "logsumexp": ([A], lambda a: ndl.logsumexp(a, axis=1), lambda a: torch.logsumexp(a, 1)),
    "sigmoid": ([A], ndl.sigmoid, torch.sigmoid),
    "silu": ([A], ndl.silu, F.silu),
    "gelu tanh": ([A], lambda a: ndl.gelu(a, "tanh"), lambda a: F.gelu(a, approximate="tanh")),
    "softplus": ([A], ndl.softplus, F.softplus),
    "elu": ([A], ndl.elu, F.elu),
    "leaky relu": ([A], ndl.leaky_relu, F.leaky_relu),
    "layer norm": (
        [A, V, ONE],
        lambda a, w, b: nn.functional.layer_norm(a, (16,), w, b),
        lambda a, w, b: F.layer_norm(a, (16,), w, b),
    ),
    "batch norm": (
        [A, V, ONE],
        lambda a, w, b: nn.functional.batch_norm(a, None, None, w, b, training=True),
        lambda a, w, b: F.batch_norm(a, None, None, w, b, training=True),
    ),
    "cross entropy": (
        [A],
        lambda a: nn.functional.cross_entropy(a, LABELS_N),
        lambda a: F.cross_entropy(a, LABELS_T),
    ),
    "mse": ([A, B], nn.functional.mse_loss, F.mse_loss),
}

MASK_N, MASK_T = ndl.Tensor(A > 1), torch.tensor(A > 1)
LABELS_N, LABELS_T = ndl.Tensor(LABELS), torch.tensor(LABELS)
IDS_N, IDS_T = ndl.Tensor(IDS), torch.tensor(IDS)


MOVES = {
    "reshape", "transpose", "broadcast_to", "slice", "index rows", "concatenate", "stack", "flip",
    "pad", "matmul", "where", "cross entropy",
}  # fmt: skip


def enlarged(rows: dict[str, Row]) -> dict[str, Row]:
    """Elementwise ops, reductions and composites on arrays of 10^7 elements."""
    rng = np.random.default_rng(4)
    wide = {(32, 16): (10_000, 1_000), (16,): (1_000,)}
    found = {}
    for name, (arrays, ours, theirs) in rows.items():
        if name not in MOVES:
            large = [rng.uniform(0.5, 1.5, wide[x.shape]).astype(np.float32) for x in arrays]
            if name == "layer norm":
                theirs = lambda a, w, b: F.layer_norm(a, (1_000,), w, b)  # noqa: E731
                ours = lambda a, w, b: nn.functional.layer_norm(a, (1_000,), w, b)  # noqa: E731
            found[name] = large, ours, theirs
    return found


def run_large(rounds: int, names: list[str]) -> list[dict[str, Any]]:
    """Forward alone, on all threads, in milliseconds."""
    torch.set_num_threads(ndl.get_num_threads())
    found = []
    print(f"\n{'10^7 elements':18s} {'fwd ms':>9s} {'PyTorch':>9s} {'ratio':>6s}")
    for name, (arrays, ours, theirs) in enlarged(PRIMITIVES | COMPOSITES).items():
        if names and name not in names:
            continue
        xs = [ndl.Tensor(x, requires_grad=False) for x in arrays]
        ts = [torch.tensor(x) for x in arrays]
        a, b = compare(partial(ours, *xs), partial(theirs, *ts), rounds)
        entry = {"needle_us": a, "torch_us": b, "ratio": a / b}
        found.append({"name": name, "fwd": entry})
        print(f"{name:18s} {a / 1e3:9.2f} {b / 1e3:9.2f} {a / b:6.2f}", flush=True)
    torch.set_num_threads(1)
    print(f"geometric mean of ratios: {mean_ratio(found, ['fwd']):.2f}")
    return found


def time_call(call: Callable[[], Any], seconds: float = 0.02) -> float:
    """Microseconds of one call, as the mean over a run of about `seconds`."""
    call()
    start = time.perf_counter()
    call()
    count = max(3, int(seconds / max(time.perf_counter() - start, 1e-7)))
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count * 1e6


def calls_of(row: Row) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """The forward, and forward with backward, of one row in both frameworks."""
    arrays, ours, theirs = row
    xs = [ndl.Tensor(array) for array in arrays]
    ts = [torch.tensor(array, requires_grad=True) for array in arrays]
    dy, dt = (
        ndl.Tensor(np.ones(ours(*xs).shape, np.float32), requires_grad=False),
        torch.ones_like(theirs(*ts)),
    )

    def ours_both() -> None:
        ours(*xs).backward(dy)
        for x in xs:
            x.grad = None

    def theirs_both() -> None:
        theirs(*ts).backward(dt)
        for t in ts:
            t.grad = None

    return {"fwd": (lambda: ours(*xs), lambda: theirs(*ts)), "fwd+bwd": (ours_both, theirs_both)}


def training_steps() -> tuple[Callable[[], float], Callable[[], float]]:
    """One step of an 8-64-64-2 perceptron, batch 32, cross-entropy and Adam, in both frameworks."""
    sizes = [(8, 64), (64, 64), (64, 2)]
    layers = [layer for pair in sizes for layer in (nn.Linear(*pair), nn.ReLU())][:-1]
    model, loss_fn = nn.Sequential(*layers), nn.SoftmaxLoss()
    opt = ndl.optim.Adam(model.parameters(), lr=1e-3)
    x = ndl.Tensor(np.random.randn(32, 8).astype(np.float32), requires_grad=False)
    y = ndl.Tensor(np.random.randint(0, 2, 32))

    def ours() -> float:
        opt.reset_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        return float(loss)

    peers = [layer for pair in sizes for layer in (torch.nn.Linear(*pair), torch.nn.ReLU())][:-1]
    other = torch.nn.Sequential(*peers)
    adam = torch.optim.Adam(other.parameters(), 1e-3)
    tx, ty = torch.tensor(x.numpy()), torch.tensor(y.numpy())

    def theirs() -> float:
        adam.zero_grad(set_to_none=True)
        loss = F.cross_entropy(other(tx), ty)
        loss.backward()
        adam.step()
        return loss.item()

    return ours, theirs


def compare(ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The median times of both, taken in turns."""
    pairs = [(time_call(ours), time_call(theirs)) for _ in range(rounds)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def run_table(
    title: str, rows: dict[str, Row], rounds: int, names: list[str]
) -> list[dict[str, Any]]:
    found = []
    print(
        f"\n{title:18s} {'fwd us':>9s} {'PyTorch':>9s} {'ratio':>6s}   {'fwd+bwd us':>10s} "
        f"{'PyTorch':>9s} {'ratio':>6s}"
    )
    for name, row in rows.items():
        if names and name not in names:
            continue
        entry: dict[str, Any] = {"name": name}
        for kind, (ours, theirs) in calls_of(row).items():
            a, b = compare(ours, theirs, rounds)
            entry[kind] = {"needle_us": a, "torch_us": b, "ratio": a / b}
        one, both = entry["fwd"], entry["fwd+bwd"]
        print(
            f"{name:18s} {one['needle_us']:9.1f} {one['torch_us']:9.1f} {one['ratio']:6.2f}   "
            f"{both['needle_us']:10.1f} {both['torch_us']:9.1f} {both['ratio']:6.2f}",
            flush=True,
        )
        found.append(entry)
    for kind in ("fwd", "fwd+bwd"):
        print(f"geometric mean of ratios, {kind}: {mean_ratio(found, [kind]):.2f}")
    print(f"geometric mean of ratios, all: {mean_ratio(found, ['fwd', 'fwd+bwd']):.2f}")
    return found


def mean_ratio(entries: list[dict[str, Any]], kinds: list[str]) -> float:
    logs = [math.log(entry[kind]["ratio"]) for entry in entries for kind in kinds]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tables = {
        "primitives": run_table("primitives", PRIMITIVES, options.rounds, options.names),
        "composites": run_table("composites", COMPOSITES, options.rounds, options.names),
    }
    tables["large"] = run_large(options.rounds, options.names)
    if not options.names:
        ours, theirs = compare(*training_steps(), options.rounds)
        tables["mlp_tiny"] = [
            {"name": "mlp_tiny", "needle_us": ours, "torch_us": theirs, "ratio": ours / theirs}
        ]
        print(
            f"\nmlp_tiny training step: needle {ours:.0f} us, PyTorch {theirs:.0f} us, ratio "
            f"{ours / theirs:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(tables, indent=1))


if __name__ == "__main__":
    main()
