"""Training steps of needle, to be timed against other frameworks': `build(name, mode) -> run`.

run() does one whole training step (forward, backward, optimizer) and returns the loss as a float.
mode: "jit", the step as one program, or "eager".
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

import needle as ndl
from needle import nn, ops, optim
from needle.autograd import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor]


def constant(array: np.ndarray) -> Tensor:
    return Tensor(array, requires_grad=False)


def floats(*shape: int) -> Tensor:
    return constant(np.random.randn(*shape).astype(np.float32))


def labels(below: int, *shape: int) -> Tensor:
    return constant(np.random.randint(0, below, shape))


def trainer(model: nn.Module, optimizer: optim.Optimizer) -> Step:
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.reset_grad()
        return loss.detach()

    return step


def perceptron(*sizes: int) -> nn.Module:
    layers: list[nn.Module] = []
    for inside, outside in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inside, outside), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def mlp_tiny() -> tuple[Step, Batch]:
    model = perceptron(8, 64, 64, 2)
    return trainer(model, optim.Adam(model.parameters(), 1e-3)), (floats(32, 8), labels(2, 32))


def mlp_wide() -> tuple[Step, Batch]:
    model = perceptron(784, 1024, 1024, 10)
    batch = floats(512, 784), labels(10, 512)
    return trainer(model, optim.Adam(model.parameters(), 1e-3)), batch


def residual_block(size: int) -> nn.Module:
    inner = nn.Sequential(
        nn.Linear(size, size // 2), nn.BatchNorm1d(size // 2), nn.ReLU(), nn.Dropout(0.1),
        nn.Linear(size // 2, size), nn.BatchNorm1d(size),
    )  # fmt: skip
    return nn.Sequential(nn.Residual(inner), nn.ReLU())


def mlp_resnet() -> tuple[Step, Batch]:
    blocks = [residual_block(100) for _ in range(3)]
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 100), nn.ReLU(), *blocks, nn.Linear(100, 10))
    optimizer = optim.Adam(model.parameters(), 1e-3, weight_decay=1e-3)
    return trainer(model, optimizer), (floats(100, 784), labels(10, 100))


class Attention(nn.Module):
    """Causal self-attention of several heads."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        future = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        self.mask = constant(future)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = batch, length, self.heads, width // self.heads
        parts = ops.split(self.qkv(x), 2, width)
        q, k, v = (part.reshape(shape).permute((0, 2, 1, 3)) for part in parts)  # (B, nh, T, hs)
        scores = q @ k.transpose() * (1 / math.sqrt(shape[-1])) + self.mask  # (B, nh, T, T)
        y = (ops.softmax(scores) @ v).permute((0, 2, 1, 3)).reshape(x.shape)
        return self.project(y)


class Block(nn.Module):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, length: int) -> None:
        self.norm1, self.norm2 = nn.LayerNorm1d(width), nn.LayerNorm1d(width)
        self.attention = Attention(width, heads, length)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(ops.gelu(self.up(self.norm2(x)), "tanh"))


class GPT(nn.Module):
    """A decoder-only Transformer: logits (B * T, V) for tokens (B, T)."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int, heads: int) -> None:
        self.tokens = nn.Parameter(ndl.randn(vocabulary, width, requires_grad=True))
        self.places = nn.Parameter(ndl.randn(length, width, requires_grad=True))
        self.blocks = [Block(width, heads, length) for _ in range(layers)]
        self.norm = nn.LayerNorm1d(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = ops.take(self.tokens, tokens) + self.places[:length]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)).reshape((batch * length, -1))


def gpt_nano() -> tuple[Step, Batch]:
    vocabulary, length, batch = 65, 64, 12
    model = GPT(vocabulary, length, 128, 4, 4)
    tokens = labels(vocabulary, batch, length), labels(vocabulary, batch * length)
    return trainer(model, optim.AdamW(model.parameters(), 3e-4)), tokens


WORKLOADS = {
    "mlp_tiny": mlp_tiny, "mlp_resnet": mlp_resnet, "mlp_wide": mlp_wide, "gpt_nano": gpt_nano,
}  # fmt: skip


def build(name: str, mode: str) -> Callable[[], float]:
    """One step of a workload as a function without arguments."""
    np.random.seed(0)
    step, batch = WORKLOADS[name]()
    if mode == "jit":
        step = ndl.jit(step)
    return lambda: float(step(*batch))
