"""What a jitted function says about itself: ops, where they were written, memory, variants."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checks import draw

import needle as ndl
from needle import nn, ops, optim
from needle.autograd import Tensor, TensorOp


def data(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(draw(*shape, seed=seed, dtype="float32"), requires_grad=False)


def training_step() -> Any:
    """A jitted step of SGD on one layer and a loss."""
    np.random.seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    opt = optim.SGD(model.parameters(), lr=0.1)

    @ndl.jit
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = ndl.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        return loss.detach()

    return step


def labels(count: int) -> Tensor:
    return Tensor(np.arange(count) % 4, dtype="int64", requires_grad=False)


@pytest.fixture(scope="module")
def step() -> Any:
    found = training_step()
    found(data(8, 16), labels(8))
    return found


def line_of(words: str) -> int:
    """The number of this file's line that holds some words."""
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if words in line)


def test_the_summary_names_ops_and_the_users_lines(step: Any) -> None:
    text = step.explain()
    assert text == str(step)
    for name in ("matmul", "relu", "log", "summation", "max"):
        assert re.search(rf"\b{name}\b", text), name
    for words in ("loss = ndl.cross" + "_entropy", "loss.back" + "ward()"):
        assert f"{Path(__file__).name}:{line_of(words)}" in text


def test_the_summary_counts_kernels_bytes_and_flops(step: Any) -> None:
    text = step.explain()
    found = re.search(r"program: (\d+) ops in (\d+) kernels, (\d+) nests, (\d+) different", text)
    assert found
    count, kernels, nests, codes = map(int, found.groups())
    assert count > nests >= codes >= kernels > 1
    assert len(re.findall(r"^kernel \d+$", text, re.MULTILINE)) == kernels
    nest = r"^  \S.*, \d+ parallel units?, [\d.]+ K?i?B read, [\d.]+ K?i?B written, [\d,]+ flops$"
    assert len(re.findall(nest, text, re.MULTILINE)) == nests


def test_the_flops_and_bytes_of_a_product() -> None:
    product = ndl.jit(lambda x, y: x @ y)
    product(data(64, 32), data(32, 16))
    sizes = f"{4 * (64 * 32 + 32 * 16) / 1024:.1f} KiB read, {4 * 64 * 16 / 1024:.1f} KiB written"
    line = next(x for x in product.explain().splitlines() if "contraction" in x)
    assert line.startswith("  contraction 64 x 16 x 32, ")
    assert line.endswith(f"{sizes}, {2 * 64 * 32 * 16:,} flops")


def test_the_summary_tells_of_memory(step: Any) -> None:
    text = step.explain()
    assert re.search(
        r"^memory: arena of [\d.]+ K?i?B for temporaries of [\d.]+ K?i?B in \d+ b", text, re.M
    )
    pair = r"^  output \d+, b\d+:float32\[128\], overwrites input \d+, b\d+:float32\[128\]$"
    assert re.search(pair, text, re.MULTILINE)


def test_a_donation_that_cannot_be_says_why() -> None:
    weight = nn.Parameter(draw(4, 4, dtype="float32"))

    @ndl.jit
    def mix() -> None:
        weight.data = weight.data @ weight.data

    mix()
    assert "gets memory of its own: the contraction reads it whole" in mix.explain()


def test_a_refused_fusion_says_why(step: Any) -> None:
    assert "not fused: max[8]: a contraction's epilogue does not reduce" in step.explain()


def test_variants_and_their_reasons() -> None:
    f = ndl.jit(lambda x: ops.exp(x).sum())
    assert "f" not in repr(f).split(",")[1]
    f(data(2, 3))
    f(data(4, 3))
    text = f.explain()
    assert "2 variants" in text
    assert "first call" in text
    assert "float32[2, 3]" in text
    assert "-> " in text


def test_whether_the_disk_cache_knew_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NEEDLE_CACHE_DIR", str(tmp_path))
    texts = []
    for _ in range(2):
        f = ndl.jit(lambda x: ops.sin(x) + 3.25)
        f(data(5))
        texts.append(f.explain())
    assert "; compiled now" in texts[0]
    assert "; from the disk cache" in texts[1]
    assert texts[0].replace("compiled now", "from the disk cache") == texts[1]


def test_host_calls_are_listed(step: Any) -> None:
    class Mine(TensorOp):
        def compute(self, x: np.ndarray) -> np.ndarray:
            return x + 1

    def calls(x: Tensor) -> Tensor:
        return Mine()(ops.exp(x)).sum() + ops.argsort(x, 0).sum().astype("float32")

    f = ndl.jit(calls)
    f(data(3, 4))
    last = f.explain().splitlines()[-1]
    assert last.startswith("host calls: ")
    assert "Mine" in last
    assert "ArgSort" in last
    assert "  host call " in f.explain()
    assert step.explain().splitlines()[-1] == "host calls: none"
    for level in ("loops", "llvm", "asm"):
        assert "host " in f.explain(level)


def test_levels(step: Any) -> None:
    graph = step.explain("graph")
    assert "MatMul(dot=False)" in graph
    assert "return %" in graph
    loops = step.explain("loops")
    assert "contraction [8 8 16] float32" in loops
    assert "reduce" in loops
    assert "define" in step.explain("llvm")
    assert ".globl" in step.explain("asm") or "ret" in step.explain("asm")


def test_one_kernel(step: Any) -> None:
    whole = step.explain("loops")
    for number in (0, 1):
        part = step.explain("loops", number)
        text = part[part.index(f"kernel {number}") :]
        assert text in whole
        assert "kernel 2" not in part
    assert "kernel 1\n" not in step.explain(kernel=0)


def test_unknown_levels_and_kernels(step: Any) -> None:
    with pytest.raises(ValueError, match="explain: expected a level of summary, .*; received 'x'"):
        step.explain("x")
    with pytest.raises(ValueError, match=r"explain: expected a kernel below \d+; received 99"):
        step.explain(kernel=99)
