"""The model of a run (needle/models/), and what it is worth on data.

Next: metrics.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import numpy as np

from needle import nn, ops
from needle.autograd import Tensor, no_grad
from needle.backend.device import Device
from needle.data import DataLoader, TokenDataset
from needle.models import GPT, GPTConfig, LSTMLanguageModel, ResNet9, make_mlp_resnet
from needle.train.config import TrainConfig
from needle.train.task import Task, enlarge, task_of

TEST_BATCH = 1000
TEST_TOKENS = 8192  # in a batch of windows


def make_model(config: TrainConfig, device: Device | None = None) -> nn.Module:
    """The configured model with random parameters.

    Images (n, height, width, channels), for resnet9 (n, 3, 32, 32) -> (n, classes); tokens (n, t)
    -> (n, t, vocab_size).
    """
    if config.data == "text":
        return make_language_model(config, device)
    task = cast(Task, task_of(config))
    if config.model == "resnet9":
        return ResNet9(len(task.classes), device=device)
    numbers = config.hidden_dim, config.num_blocks, len(task.classes), config.dropout
    return make_mlp_resnet(math.prod(task.shape), *numbers, device)


class BatchFirst(nn.Module):
    """LSTMLanguageModel with the axes of the other models: tokens (n, t) -> logits (n, t, vocab).

    Called with a state it gives the next one, too.
    """

    def __init__(self, model: LSTMLanguageModel) -> None:
        self.model = model

    def forward(self, tokens: Tensor, state: Any = None) -> Any:
        logits, after = self.model(tokens.transpose(), state)
        batch, steps = tokens.shape
        logits = logits.reshape((steps, batch, logits.shape[-1])).transpose((0, 1))
        return logits if state is None else (logits, after)


def make_language_model(config: TrainConfig, device: Device | None) -> nn.Module:
    vocabulary, width = config.vocab_size, config.hidden_dim
    if config.model == "gpt":
        shape = config.block_size, vocabulary, config.num_blocks, config.num_heads, width
        return GPT(GPTConfig(*shape, config.dropout, config.bias, gelu="none"), device)
    sizes = width, width, config.num_blocks, config.dropout
    return BatchFirst(LSTMLanguageModel(vocabulary, *sizes, device=device))


def state_size(config: TrainConfig) -> int | None:
    """How many numbers the configured model's parameters and running statistics are; None for one
    whose size the configuration does not decide."""
    if config.model == "resnet9":
        return None
    width, blocks, vocabulary = config.hidden_dim, config.num_blocks, config.vocab_size
    if config.model == "lstm":
        return blocks * 8 * width * (width + 1) + (2 * width + 1) * vocabulary
    if config.model == "gpt":
        vectors = (11 * blocks + 1 if config.bias else 0) + 2 * blocks + 1
        return (vocabulary + config.block_size + 12 * blocks * width + vectors) * width
    half, task = width // 2, cast(Task, task_of(config))
    block = (width + 1) * half + (half + 1) * width + 4 * (half + width)
    return (math.prod(task.shape) + 1) * width + blocks * block + (width + 1) * len(task.classes)


class Evaluation(NamedTuple):
    """loss: the mean cross-entropy. accuracy: the share of predictions that are right.

    samples: how many predictions there are. confusion: of each true (rows) and predicted (columns)
    class, int64; None where classes are tokens.
    """

    loss: float
    accuracy: float
    samples: int
    confusion: np.ndarray | None


def evaluate(model: nn.Module, dataset: Any, classes: int | None) -> Evaluation:
    """The model in evaluation mode on all samples; its mode is put back afterwards.

    classes: how many there are, for a confusion matrix.
    """
    training, device = model.training, model.parameters()[0].device
    confusion = None if classes is None else np.zeros((classes, classes), np.int64)
    total, right, samples = 0.0, 0, 0
    windows = isinstance(dataset, TokenDataset)
    batch = max(1, TEST_TOKENS // dataset.block_size) if windows else TEST_BATCH
    model.eval()
    try:
        with no_grad():
            for x, y in DataLoader(dataset, batch, seed=0, device=device):
                logits, y = in_rows(model(x), y)
                total += nn.functional.cross_entropy(logits, y, reduction="sum").item()
                said, labels = ops.argmax(logits, 1).numpy(), y.numpy()
                right, samples = right + int((said == labels).sum()), samples + len(labels)
                if confusion is not None:
                    np.add.at(confusion, (labels, said), 1)
    finally:
        model.train(training)
    return Evaluation(total / samples, right / samples, samples, confusion)


def in_rows(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (..., classes) and labels (...) with a row for each prediction."""
    if logits.ndim == 2:
        return logits, y
    return logits.reshape((-1, logits.shape[-1])), y.reshape((-1,))


def class_probabilities(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """The softmax of the model, in evaluation mode, for an image (height, width, channels)."""
    if isinstance(model, ResNet9):
        image = enlarge(image[None])[0].transpose(2, 0, 1)
    model.eval()
    with no_grad():
        x = Tensor(image[None], device=model.parameters()[0].device)
        return ops.softmax(model(x), 1).numpy()[0]
