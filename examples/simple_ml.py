"""A two-layer network trained by hand: autograd and nothing else, no layers and no optimizer; then
the training loops of the course's later assignments, for images and for text.

    python examples/simple_ml.py                 the embedded digits
    python examples/simple_ml.py --data FOLDER   MNIST, from a folder with its four IDX files

In: images as rows of a matrix X (n, features) and labels y (n,). Out: the weights W1 (features,
hidden) and W2 (hidden, classes) of logits = relu(X @ W1) @ W2. Next: mlp_resnet.py, the same with
layers, an optimizer and a data loader; models.py, what `train_cifar10` and `train_ptb` train.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

import needle as ndl
from needle import nn
from needle.data import DataLoader, digits, get_batch, parse_mnist

__all__ = [
    "epoch_general_cifar10", "epoch_general_ptb", "evaluate_cifar10", "evaluate_ptb", "loss_err",
    "nn_epoch", "parse_mnist", "softmax_loss", "train_cifar10", "train_ptb",
]  # fmt: skip

SEED = 4  # the course's, which its functions give NumPy's generator whenever they are called
Arrays = tuple[np.ndarray, np.ndarray]
Loss = Callable[[ndl.Tensor, ndl.Tensor], ndl.Tensor]
Stats = tuple[float, float]  # accuracy, loss: means over samples, or over tokens


def softmax_loss(Z: ndl.Tensor, y_one_hot: ndl.Tensor) -> ndl.Tensor:
    """The mean of ln(sum of e^Z) - Z[label], of logits Z and one-hot labels, both (n, classes)."""
    losses = ndl.logsumexp(Z, axes=1) - (Z * y_one_hot).sum(axes=1)  # (n,)
    return losses.sum() / Z.shape[0]


def nn_epoch(
    X: np.ndarray, y: np.ndarray, W1: ndl.Tensor, W2: ndl.Tensor, lr: float = 0.1, batch: int = 100
) -> tuple[ndl.Tensor, ndl.Tensor]:
    """One pass of gradient descent over X (n, features) and y (n,), in order and `batch` at a time.

    Gives new weights and leaves W1 and W2 as they are.
    """
    W1, W2 = ndl.Tensor(W1), ndl.Tensor(W2)
    for start in range(0, len(X), batch):
        x = ndl.Tensor(X[start : start + batch], requires_grad=False)
        labels = ndl.init.one_hot(W2.shape[1], y[start : start + batch])
        loss = softmax_loss(ndl.relu(x @ W1) @ W2, labels)
        loss.backward()
        # .data: the step itself is not part of the next step's graph.
        W1.data = W1.data - lr * W1.grad.data
        W2.data = W2.data - lr * W2.grad.data
    return W1, W2


def loss_err(h: ndl.Tensor, y: np.ndarray) -> tuple[np.ndarray, float]:
    """The softmax loss and the error rate of logits h (n, classes) for labels y (n,)."""
    labels = ndl.init.one_hot(h.shape[1], y)
    return softmax_loss(h, labels).numpy(), float(np.mean(h.numpy().argmax(axis=1) != y))


# Training loops, by the course's names and with its draws of random numbers


def run_epoch(
    batches: Iterable[tuple[ndl.Tensor, ndl.Tensor]],
    forward: Callable[[ndl.Tensor], ndl.Tensor],
    loss_fn: Loss,
    opt: ndl.optim.Optimizer | None,
    clip: float | None = None,
) -> Stats:
    """One pass over batches (x, labels), which trains where there is an optimizer."""
    correct, total, count = 0, 0.0, 0
    for x, y in batches:
        logits = forward(x)
        loss = loss_fn(logits, y)
        if opt is not None:
            opt.reset_grad()
            loss.backward()
            if clip is not None:
                opt.clip_grad_norm(clip)
            opt.step()
        correct += int((logits.numpy().argmax(axis=1) == y.numpy()).sum())
        total += float(loss) * len(y)
        count += len(y)
    return correct / count, total / count


def epoch_general_cifar10(
    dataloader: DataLoader,
    model: nn.Module,
    loss_fn: Loss | None = None,
    opt: ndl.optim.Optimizer | None = None,
) -> Stats:
    """One pass over images, in training mode where there is an optimizer: accuracy, loss."""
    np.random.seed(SEED)
    model.train() if opt is not None else model.eval()
    return run_epoch(dataloader, model, loss_fn or nn.SoftmaxLoss(), opt)


def train_cifar10(
    model: nn.Module,
    dataloader: DataLoader,
    n_epochs: int = 1,
    optimizer: Callable[..., ndl.optim.Optimizer] = ndl.optim.Adam,
    lr: float = 0.001,
    weight_decay: float = 0.001,
    loss_fn: Callable[[], Loss] = nn.SoftmaxLoss,
) -> Stats:
    """Train a model of images: accuracy and loss over the last epoch."""
    np.random.seed(SEED)
    opt = optimizer(model.parameters(), lr=lr, weight_decay=weight_decay)
    epochs = [epoch_general_cifar10(dataloader, model, loss_fn(), opt) for _ in range(n_epochs)]
    return epochs[-1]


def evaluate_cifar10(
    model: nn.Module, dataloader: DataLoader, loss_fn: Callable[[], Loss] = nn.SoftmaxLoss
) -> Stats:
    """Accuracy and loss of a model of images."""
    np.random.seed(SEED)
    with ndl.no_grad():
        return epoch_general_cifar10(dataloader, model, loss_fn())


def epoch_general_ptb(
    data: np.ndarray,
    model: nn.Module,
    seq_len: int = 40,
    loss_fn: Loss | None = None,
    opt: ndl.optim.Optimizer | None = None,
    clip: float | None = None,
    device: Any = None,
    dtype: Any = "float32",
) -> Stats:
    """One pass over the tokens (steps, batch) of `batchify`, seq_len steps at a time: accuracy,
    loss. The state goes on from piece to piece, its history does not."""
    np.random.seed(SEED)
    model.train() if opt is not None else model.eval()
    state: Any = None

    def forward(x: ndl.Tensor) -> ndl.Tensor:
        nonlocal state
        logits, state = model(x, state)
        state = tuple(h.detach() for h in state) if isinstance(state, tuple) else state.detach()
        return logits

    starts = range(0, len(data) - 1, seq_len)
    batches = (get_batch(data, start, seq_len, device=device, dtype=dtype) for start in starts)
    return run_epoch(batches, forward, loss_fn or nn.SoftmaxLoss(), opt, clip)


def train_ptb(
    model: nn.Module,
    data: np.ndarray,
    seq_len: int = 40,
    n_epochs: int = 1,
    optimizer: Callable[..., ndl.optim.Optimizer] = ndl.optim.SGD,
    lr: float = 4.0,
    weight_decay: float = 0.0,
    loss_fn: Callable[[], Loss] = nn.SoftmaxLoss,
    clip: float | None = None,
    device: Any = None,
    dtype: Any = "float32",
) -> Stats:
    """Train a language model: accuracy and loss per token over the last epoch."""
    np.random.seed(SEED)
    opt = optimizer(model.parameters(), lr=lr, weight_decay=weight_decay)
    settings = loss_fn(), opt, clip, device, dtype
    epochs = [epoch_general_ptb(data, model, seq_len, *settings) for _ in range(n_epochs)]
    return epochs[-1]


def evaluate_ptb(
    model: nn.Module,
    data: np.ndarray,
    seq_len: int = 40,
    loss_fn: Callable[[], Loss] = nn.SoftmaxLoss,
    device: Any = None,
    dtype: Any = "float32",
) -> Stats:
    """Accuracy and loss per token of a language model."""
    np.random.seed(SEED)
    with ndl.no_grad():
        return epoch_general_ptb(data, model, seq_len, loss_fn(), device=device, dtype=dtype)


# What this file does as a program


def read_data(folder: Path | None, train: bool) -> Arrays:
    """X (n, features) and y (n,): MNIST from a folder, or the embedded digits."""
    if folder is None:
        images, labels = digits(train=train)[:]
        return images.reshape(len(images), -1), labels
    part = "train" if train else "t10k"
    return parse_mnist(
        folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz"
    )


def train_nn(
    train_set: Arrays, test_set: Arrays, hidden_dim: int, epochs: int, lr: float, batch: int
) -> float:
    """Train on one set, print loss and error of both after each epoch; gives the test error."""
    features, classes = train_set[0].shape[1], int(train_set[1].max()) + 1
    W1 = ndl.init.randn(features, hidden_dim, std=1 / np.sqrt(features))
    W2 = ndl.init.randn(hidden_dim, classes, std=1 / np.sqrt(hidden_dim))
    test_error = 1.0
    print("epoch | train loss | train error |  test loss |  test error")
    for epoch in range(1, epochs + 1):
        W1, W2 = nn_epoch(*train_set, W1, W2, lr=lr, batch=batch)
        with ndl.no_grad():
            found = [
                loss_err(ndl.relu(ndl.Tensor(X) @ W1) @ W2, y) for X, y in (train_set, test_set)
            ]
        test_error = found[1][1]
        columns = [f"{loss:10.4f} | {error:11.2%}" for loss, error in found]
        print(f"{epoch:5} | {' | '.join(columns)}")
    return test_error


def main(arguments: list[str] | None = None) -> float:
    """Read the command line, train; gives the test error."""
    parser = argparse.ArgumentParser(description="Train a two-layer network by hand.")
    parser.add_argument("--data", type=Path, help="a folder with MNIST's IDX files (else digits)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=100, help="size of the hidden layer")
    parser.add_argument("--lr", type=float, default=0.2, help="learning rate")
    parser.add_argument("--batch", type=int, default=50, help="samples per step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    np.random.seed(options.seed)
    train_set, test_set = (read_data(options.data, train) for train in (True, False))
    return train_nn(train_set, test_set, options.hidden, options.epochs, options.lr, options.batch)


if __name__ == "__main__":
    main()
