"""How near to the machine's arithmetic peak convolutions come, beside PyTorch's (oneDNN).

    python benchmarks/convolutions.py [--json convolutions.json] [--rounds 3] [--threads 2]
        [--sizes 32 224] [--libraries needle PyTorch]

The layers of ResNet-18 at batch 32 with images of 32 x 32 (without the first pooling, as for
CIFAR) and at batch 8 with 224 x 224: y = x * w, and the gradients dx and dw, each by itself,
padding included. Medians of rounds as shares of the peak measured just before; PyTorch has its turn
with both memory formats, and the faster counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
from limits import fresh, peers, rounds_of  # benchmarks/limits.py

import needle as ndl
from needle import ops
from needle.compiler import limits


@dataclass(frozen=True)
class Layer:
    """A convolution of ResNet-18."""

    batch: int
    side: int  # of the image
    inputs: int
    outputs: int
    kernel: int
    stride: int

    @property
    def out(self) -> int:
        return -(-self.side // self.stride)

    @property
    def flops(self) -> int:
        taps = self.kernel**2 * self.inputs
        return 2 * self.batch * self.out**2 * taps * self.outputs

    def __str__(self) -> str:
        return (
            f"{self.kernel}x{self.kernel}/{self.stride} {self.inputs}>{self.outputs} @{self.side}"
        )


def layers(batch: int, side: int) -> list[Layer]:
    """The different convolutions of ResNet-18 (He et al., 2016)."""
    first = Layer(batch, side, 3, 64, 7, 2) if side > 64 else Layer(batch, side, 3, 64, 3, 1)
    side = side // 4 if side > 64 else side
    found = [first, Layer(batch, side, 64, 64, 3, 1)]
    for inputs in (64, 128, 256):
        outputs = 2 * inputs
        found += [
            Layer(batch, side, inputs, outputs, 3, 2),
            Layer(batch, side, inputs, outputs, 1, 2),
        ]
        side //= 2
        found.append(Layer(batch, side, outputs, outputs, 3, 1))
    return found


def arrays(layer: Layer) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, w and dy, channels last."""
    rng, k = np.random.default_rng(0), layer.kernel
    shapes = (
        (layer.batch, layer.side, layer.side, layer.inputs),
        (k, k, layer.inputs, layer.outputs),
        (layer.batch, layer.out, layer.out, layer.outputs),
    )
    x, w, dy = (rng.standard_normal(shape, np.float32) for shape in shapes)
    return x, w, dy


Calls = dict[str, Callable[[], Any]]


def in_needle(layer: Layer) -> Calls:
    x, w, dy = (ndl.Tensor(each, requires_grad=False) for each in arrays(layer))
    settings = {"stride": layer.stride, "padding": (layer.kernel - 1) // 2}

    def back(x: Any, w: Any, dy: Any, which: int) -> Any:
        _, pullback = ndl.vjp(lambda x, w: ops.conv(x, w, **settings), x, w)
        return pullback(dy)[which]

    forward = ndl.jit(lambda x, w: ops.conv(x, w, **settings))
    gradients = [ndl.jit(partial(back, which=which)) for which in (0, 1)]
    return {
        "y": lambda: forward(x, w),
        "dx": lambda: gradients[0](x, w, dy),
        "dw": lambda: gradients[1](x, w, dy),
    }


def in_torch(torch: Any, layer: Layer, last: bool) -> Calls:
    x, w, dy = arrays(layer)
    form = torch.channels_last if last else torch.contiguous_format
    x, dy = (torch.tensor(np.moveaxis(a, -1, 1)).contiguous(memory_format=form) for a in (x, dy))
    w = torch.tensor(np.moveaxis(w, (-1, -2), (0, 1))).contiguous(memory_format=form)
    pad = (layer.kernel - 1) // 2
    rest = [layer.stride] * 2, [pad] * 2, [1, 1], False, [0, 0], 1
    back = torch.ops.aten.convolution_backward
    return {
        "y": lambda: torch.nn.functional.conv2d(x, w, None, layer.stride, pad),
        "dx": lambda: back(dy, x, w, None, *rest, [True, False, False]),
        "dw": lambda: back(dy, x, w, None, *rest, [False, True, False]),
    }


def calls_of(name: str, peer: Any, layer: Layer) -> dict[str, Calls]:
    if name == "needle":
        return {name: in_needle(layer)}
    return {
        f"{name} {form}": in_torch(peer.torch, layer, form == "NHWC") for form in ("NCHW", "NHWC")
    }


def measure(
    layer: Layer, libraries: dict[str, Any], threads: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for y, dx and dw: shares of the peak."""
    found: dict[str, Calls] = {}
    for name, peer in libraries.items():
        found |= calls_of(name, peer, layer)
    limit = partial(fresh, limits.measure_peak, np.dtype(np.float32), threads)
    rows = []
    for what in ("y", "dx", "dw"):
        shares: dict[str, list[float]] = {name: [] for name in found}
        calls = {name: each[what] for name, each in found.items()}
        for peak, times in rounds_of(calls, rounds, limit):
            for name, each in times.items():
                shares[name].append(layer.flops / each / peak)
        row = {"layer": str(layer), "batch": layer.batch, "what": what}
        for name in libraries:
            row[name] = max(statistics.median(v) for k, v in shares.items() if k.startswith(name))
        rows.append(row)
        values = "".join(f"{100 * row[name]:10.1f}" for name in libraries)
        print(f"{layer!s:22s} {what:3s} {layer.flops / 1e9:8.2f} {values}", flush=True)
    return rows


def mean(values: list[float]) -> float:
    return exp(sum(map(log, values)) / len(values))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=ndl.get_num_threads())
    parser.add_argument("--sizes", nargs="*", type=int, default=[32, 224])
    parser.add_argument("--libraries", nargs="*", default=["needle", "PyTorch"])
    options = parser.parse_args()
    ndl.set_num_threads(options.threads)
    libraries = {peer.name: peer for peer in peers(options.libraries, options.threads)}
    rows: list[dict[str, Any]] = []
    for side in options.sizes:
        batch = 32 if side <= 64 else 8
        print(
            f"\nbatch {batch}, images {side} x {side}, {options.threads} threads; per cent of peak"
        )
        print(f"{'':26s} {'GFLOP':>8s} " + "".join(f"{name:>10s}" for name in libraries))
        for layer in layers(batch, side):
            rows += measure(layer, libraries, options.threads, options.rounds)
    for name in libraries:
        values = [row[name] for row in rows]
        rest = [row[name] for row in rows if " 3>" not in row["layer"]]
        print(f"{name}: geometric mean {100 * mean(values):.1f}, least {100 * min(rest):.1f} "
              "(without the first layers)")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
