"""How fast a GPT of GPT-2's shape writes: tokens per second, one at a time, on a cache.

    python benchmarks/decode.py [--json decode.json] [--tokens 30] [--rounds 5] [--threads 2]
        [--dtypes float32 bfloat16] [--capacity 256] [--layers 12] [--libraries needle PyTorch]

A token must read all weights but the tables' other rows, and the keys and values of the cache's
capacity. The bytes of that over the time are shown as a share of the bandwidth that is measured in
the same round. PyTorch runs the same arithmetic eagerly on tensors of its own, its cache written in
place.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

import needle as ndl
from needle.compiler import limits
from needle.models import GPT, GPTConfig
from needle.models.decoder import Decoder

LIBRARIES = ["needle", "PyTorch"]
Write = Callable[[int], None]


def make_model(layers: int, dtype: str) -> GPT:
    model = GPT(GPTConfig(n_layer=layers)).eval()
    return model if dtype == "float32" else model.to(dtype)


def bytes_read(model: GPT, capacity: int) -> int:
    config, size = model.config, model.tokens.weight.dtype.itemsize
    weights = sum(p.size for p in model.parameters()) - model.places.weight.size
    return int(size * (weights + 2 * config.n_layer * capacity * config.n_embd))


def by_needle(model: GPT, capacity: int) -> Write:
    """A function that writes so many tokens, from an empty cache."""
    like = model.tokens.weight
    decoder = Decoder(model, (1, capacity, like.dtype, like.device))

    def write(count: int) -> None:
        decoder.cache.clear()
        rows = np.array([[1]])
        for _ in range(count):
            rows = decoder.read(rows).argmax(-1)[:, None]

    return write


def by_torch(model: GPT, capacity: int, dtype: str, threads: int) -> Write:
    torch = import_module("torch")
    torch.set_num_threads(threads)
    kind, f = getattr(torch, dtype), torch.nn.functional
    state = {
        name: torch.tensor(np.ascontiguousarray(p.to("float32").numpy().T)).to(kind)
        for name, p in model.named_parameters()
    }
    heads, width = model.config.n_head, model.config.n_embd
    shape = 1, heads, capacity, width // heads
    caches = [[torch.zeros(shape, dtype=kind) for _ in "kv"] for _ in model.blocks]
    seen = torch.arange(capacity)

    def linear(x: Any, name: str) -> Any:
        return f.linear(x, state[f"{name}.weight"], state[f"{name}.bias"].reshape(-1))

    def norm(x: Any, name: str) -> Any:
        return f.layer_norm(x, (width,), state[f"{name}.weight"], state[f"{name}.bias"])

    def step(token: int, place: int) -> Any:
        x = (state["tokens.weight"][:, token] + state["places.weight"][:, place]).reshape(1, 1, -1)
        for layer, cache in enumerate(caches):
            name = f"blocks.{layer}"
            parts = linear(norm(x, f"{name}.norm1"), f"{name}.attention.in_proj").split(width, -1)
            q, *new = (part.reshape(1, 1, heads, -1).transpose(1, 2) for part in parts)
            for held, part in zip(cache, new, strict=True):
                held[:, :, place] = part[:, :, 0]
            y = f.scaled_dot_product_attention(q, *cache, (seen <= place)[None])
            x = x + linear(y.transpose(1, 2).reshape(1, 1, -1), f"{name}.attention.out_proj")
            y = f.gelu(linear(norm(x, f"{name}.norm2"), f"{name}.up"), approximate="tanh")
            x = x + linear(y, f"{name}.down")
        return norm(x, "norm")[0, 0] @ head

    head = state["tokens.weight"]  # (width, V): as a transposed view it is read in order
    head = head.T.contiguous().T

    def write(count: int) -> None:
        with torch.inference_mode():
            token = 1
            for place in range(count):
                token = int(step(token, place).argmax())

    return write


def writers(names: list[str], model: GPT, dtype: str, options: Any) -> dict[str, Write]:
    found = {}
    for name in names:
        try:
            if name == "needle":
                found[name] = by_needle(model, options.capacity)
            else:
                found[name] = by_torch(model, options.capacity, dtype, options.threads)
        except ImportError:
            print(f"{name}: not installed")
    return found


def measure(dtype: str, options: Any) -> list[dict[str, Any]]:
    model = make_model(options.layers, dtype)
    size = bytes_read(model, options.capacity)
    calls = writers(options.libraries, model, dtype, options)
    speeds: dict[str, list[float]] = {name: [] for name in calls}
    shares: dict[str, list[float]] = {name: [] for name in calls}
    for write in calls.values():
        write(2)
    for _ in range(options.rounds):
        for name, write in calls.items():
            limits.measure_bandwidth.cache_clear()
            bandwidth = limits.measure_bandwidth(options.threads)
            start = time.perf_counter()
            write(options.tokens)
            each = (time.perf_counter() - start) / options.tokens
            speeds[name].append(1 / each)
            shares[name].append(size / each / bandwidth)
    rows = []
    for name in calls:
        speed, share = statistics.median(speeds[name]), statistics.median(shares[name])
        rows.append({"library": name, "dtype": dtype, "threads": options.threads, "bytes": size,
                     "tokens_per_second": speed, "share_of_bandwidth": share})  # fmt: skip
        text = f"{speed:8.1f} tokens/s, {size / 1e6:.0f} MB a token"
        print(f"{dtype:9s} {name:8s} {text}, {100 * share:5.1f} % of the bandwidth", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=ndl.get_num_threads())
    parser.add_argument("--capacity", type=int, default=256)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--libraries", nargs="*", default=LIBRARIES, choices=LIBRARIES)
    options = parser.parse_args()
    ndl.set_num_threads(options.threads)
    rows = [row for dtype in options.dtypes for row in measure(dtype, options)]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
