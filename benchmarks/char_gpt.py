"""nanoGPT's character model for a CPU, trained in needle and in PyTorch in one run.

    python benchmarks/char_gpt.py --data-dir FOLDER [--steps 2000] [--json char_gpt.json]

The text (tinyshakespeare, where nanoGPT publishes a validation loss of 1.88) is a file, or all in a
folder; its last tenth validates. Both frameworks see the same windows of it in the same order, and
take turns, `--every` steps each; then each validates on all of the last tenth. The table has the
losses, the seconds spent in training steps, compilation among them, and those spent in validation;
and, as `estimate`, the loss over 240 windows drawn at random, which is what nanoGPT publishes.
The configuration is that of `needle train gpt`: 4 layers, 4 heads, 128 wide, windows of 64,
batches of 12, AdamW (beta2 0.99, weight decay 0.1 on matrices), a warm-up of 100 steps to 1e-3,
half a cosine to 1e-4, gradients clipped to a norm of 1, no bias, no dropout. PyTorch runs eagerly,
as nanoGPT does on a CPU, or with --compile through torch.compile.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

import needle as ndl
from needle.data import CharTokenizer, TokenDataset
from needle.train import TrainConfig, evaluate, make_model
from needle.train.task import read_texts
from needle.train.trainer import make_optimizer, make_schedule

try:
    import torch
    from torch import nn
    from torch.nn import functional
except ImportError:
    sys.exit("char_gpt.py: expected PyTorch beside needle; install it with pip install torch==2.13")

Windows = list[tuple[np.ndarray, np.ndarray]]
VALIDATION_BATCH = 128
ESTIMATED = 20 * 12  # windows that nanoGPT validates on with --eval_iters=20


class Needle:
    """The model, its optimizer and schedule as `needle train gpt` makes them."""

    name = f"needle {ndl.__version__}"

    def __init__(self, config: TrainConfig) -> None:
        ndl.seed(config.seed)
        self.config = config
        self.model = make_model(config)
        self.optimizer = make_optimizer(config, self.model)
        self.schedule = make_schedule(config, self.optimizer, config.max_steps)
        self.step = ndl.jit(self.step_eagerly)

    def step_eagerly(self, x: ndl.Tensor, y: ndl.Tensor) -> ndl.Tensor:
        logits = self.model(x)
        rows = logits.reshape((-1, logits.shape[-1]))
        loss = ndl.nn.functional.cross_entropy(rows, y.reshape((-1,)))
        loss.backward()
        self.optimizer.clip_grad_norm(self.config.max_norm)
        self.optimizer.step()
        self.optimizer.reset_grad()
        return loss.detach()

    def train(self, batches: Windows) -> float:
        for x, y in batches:
            loss = self.step(*(ndl.Tensor(each, requires_grad=False) for each in (x, y)))
            self.schedule.step()
        return float(loss)

    def validate(self, data: TokenDataset) -> float:
        return evaluate(self.model, data, None).loss


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = *x.shape[:2], self.heads, -1
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).reshape(x.shape))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (nn.LayerNorm(width, bias=bias) for _ in range(2))
        self.attn = Attention(width, heads, bias)
        self.c_fc = nn.Linear(width, 4 * width, bias=bias)
        self.c_proj = nn.Linear(4 * width, width, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.c_proj(functional.gelu(self.c_fc(self.ln_2(x))))


class GPT(nn.Module):
    """nanoGPT's model, without dropout; its head shares the embedding's weights."""

    def __init__(self, config: TrainConfig) -> None:
        super().__init__()
        width, bias = config.hidden_dim, config.bias
        self.wte = nn.Embedding(config.vocab_size, width)
        self.wpe = nn.Embedding(config.block_size, width)
        self.h = nn.ModuleList(
            Block(width, config.num_heads, bias) for _ in range(config.num_blocks)
        )
        self.ln_f = nn.LayerNorm(width, bias=bias)
        for name, p in self.named_parameters():
            if p.ndim > 1:
                scale = (
                    1 / math.sqrt(2 * config.num_blocks) if name.endswith("c_proj.weight") else 1
                )
                nn.init.normal_(p, 0.0, 0.02 * scale)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x) @ self.wte.weight.T


class Torch:
    """The same in PyTorch."""

    def __init__(self, config: TrainConfig, compiled: bool) -> None:
        mode = "torch.compile" if compiled else "eager"
        self.name = f"PyTorch {torch.__version__}, {mode}"
        torch.manual_seed(config.seed)
        self.config, self.count = config, 0
        self.model = GPT(config)
        self.call = torch.compile(self.model) if compiled else self.model
        parameters = list(self.model.parameters())
        matrices, vectors = (
            [p for p in parameters if (p.ndim > 1) is one] for one in (True, False)
        )
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = config.beta1, config.beta2
        self.optimizer = torch.optim.AdamW(groups, config.lr, betas, fused=True)

    def rate(self) -> float:
        """nanoGPT's get_lr."""
        config = self.config
        if self.count < config.warmup_steps:
            return config.lr * (self.count + 1) / (config.warmup_steps + 1)
        share = (self.count - config.warmup_steps) / (config.max_steps - config.warmup_steps)
        return config.min_lr + (1 + math.cos(math.pi * share)) / 2 * (config.lr - config.min_lr)

    def loss(self, x: np.ndarray, y: np.ndarray, reduction: str = "mean") -> torch.Tensor:
        tokens, labels = (torch.from_numpy(each.astype(np.int64)) for each in (x, y))
        logits = self.call(tokens)
        rows = logits.view(-1, logits.shape[-1])
        return functional.cross_entropy(rows, labels.view(-1), reduction=reduction)

    def train(self, batches: Windows) -> float:
        for x, y in batches:
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate()
            loss = self.loss(x, y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.count += 1
            found = loss.item()
        return found

    @torch.no_grad()
    def validate(self, data: TokenDataset) -> float:
        parts = [data[i : i + VALIDATION_BATCH] for i in range(0, len(data), VALIDATION_BATCH)]
        sums = [self.loss(x, y, "sum").item() for x, y in parts]
        return sum(sums) / sum(y.size for _, y in parts)


def run(config: TrainConfig, every: int, compiled: bool, only: str | None) -> dict[str, Any]:
    """Train both, or one; what a row of the table says of each, by name."""
    train, test = read_texts(config)
    tokenizer = CharTokenizer(train + test)
    config = replace(config, vocab_size=tokenizer.vocab_size)
    tokens, data = tokenizer.encode(train), TokenDataset(tokenizer.encode(test), config.block_size)
    rng, estimated = np.random.default_rng(config.seed), copy(data)
    starts = rng.integers(
        0, len(tokens) - config.block_size, (config.max_steps, config.batch_size, 1)
    )
    estimated.starts = rng.integers(0, len(data.tokens) - config.block_size, ESTIMATED)
    windows = tokens[starts + np.arange(config.block_size + 1)]
    batches = [(each[:, :-1], each[:, 1:]) for each in windows]
    begun = time.perf_counter()
    rows: list[Any] = [] if only == "needle" else [Torch(config, compiled)]
    rows += [] if only == "pytorch" else [Needle(config)]
    found = {
        each.name: {"parameters": count(each.model), "train_s": 0.0, "validate_s": 0.0}
        for each in rows
    }
    for start in range(0, config.max_steps, every):
        for each in rows:
            times = [time.perf_counter()]
            last = each.train(batches[start : start + every])
            times.append(time.perf_counter())
            loss = each.validate(data)
            times.append(time.perf_counter())
            told = found[each.name]
            told["train_s"] += times[1] - times[0]
            told["validate_s"] += times[2] - times[1]
            told |= {"train_loss": last, "validation_loss": loss}
            step, spent = min(start + every, config.max_steps), told["train_s"]
            print(f"step {step:5}  {each.name:32} validation loss {loss:.4f}  {spent:6.1f} s")
    for each in rows:
        found[each.name]["estimate"] = each.validate(estimated)
    print(f"all in {time.perf_counter() - begun:.1f} s")
    return found


def count(model: Any) -> int:
    return sum(math.prod(p.shape) for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description="A character GPT in needle and in PyTorch.")
    parser.add_argument("--data-dir", required=True, help="a text file, or a folder of them")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=int, default=500, help="steps of a turn")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--threads", type=int, help="by default all")
    parser.add_argument("--compile", action="store_true", help="PyTorch through torch.compile")
    parser.add_argument("--only", choices=("needle", "pytorch"), help="train one of them")
    parser.add_argument("--json", type=Path, help="write the numbers here, too")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        ndl.set_num_threads(options.threads)
    config = TrainConfig.for_data(
        model="gpt", data_dir=options.data_dir, max_steps=options.steps, seed=options.seed
    )
    found = run(config, options.every, options.compile, options.only)
    for name, told in found.items():
        print(f"{name:32} " + "  ".join(f"{key} {value:,.4g}" for key, value in told.items()))
    if options.json:
        options.json.write_text(json.dumps({"steps": options.steps, "runs": found}, indent=2))


if __name__ == "__main__":
    main()
