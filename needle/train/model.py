"""The model of a run (needle/models/mlp_resnet.py), and what it is worth on data.

Next: metrics.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from needle import nn, ops
from needle.autograd import Tensor, no_grad
from needle.backend.device import Device
from needle.data import DataLoader, ImageDataset
from needle.models.mlp_resnet import make_mlp_resnet
from needle.train.config import TASKS, TrainConfig

TEST_BATCH = 1000


def make_model(config: TrainConfig, device: Device | None = None) -> nn.Module:
    """The configured model with random parameters, (n, height, width, channels) -> (n, classes)."""
    task = TASKS[config.data]
    numbers = config.hidden_dim, config.num_blocks, len(task.classes), config.dropout
    return make_mlp_resnet(math.prod(task.shape), *numbers, device)


def state_size(config: TrainConfig) -> int:
    """How many numbers the configured model's parameters and running statistics are."""
    task, hidden, half = TASKS[config.data], config.hidden_dim, config.hidden_dim // 2
    block = (hidden + 1) * half + (half + 1) * hidden + 4 * (half + hidden)
    outer = (math.prod(task.shape) + 1) * hidden + (hidden + 1) * len(task.classes)
    return outer + config.num_blocks * block


class Evaluation(NamedTuple):
    """loss: the mean cross-entropy.

    confusion: how many samples there are of each true (rows) and predicted (columns) class, int64.
    """

    loss: float
    confusion: np.ndarray

    @property
    def accuracy(self) -> float:
        """The share of samples that are predicted right."""
        return float(np.trace(self.confusion) / self.confusion.sum())


def evaluate(model: nn.Module, dataset: ImageDataset, classes: int) -> Evaluation:
    """The model in evaluation mode on all samples; its mode is put back afterwards."""
    training, device = model.training, model.parameters()[0].device
    confusion, total = np.zeros((classes, classes), np.int64), 0.0
    model.eval()
    try:
        with no_grad():
            for x, y in DataLoader(dataset, TEST_BATCH, seed=0, device=device):
                logits = model(x)
                total += nn.functional.cross_entropy(logits, y, reduction="sum").item()
                np.add.at(confusion, (y.numpy(), logits.numpy().argmax(1)), 1)
    finally:
        model.train(training)
    return Evaluation(total / len(dataset), confusion)


def class_probabilities(model: nn.Module, image: np.ndarray) -> np.ndarray:
    """The softmax of the model, in evaluation mode, for an image (height, width, channels)."""
    model.eval()
    with no_grad():
        x = Tensor(image[None], device=model.parameters()[0].device)
        return ops.softmax(model(x), 1).numpy()[0]
