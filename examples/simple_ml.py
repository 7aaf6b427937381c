"""A two-layer network trained by hand: autograd and nothing else, no layers and no optimizer.

    python examples/simple_ml.py                 the embedded digits
    python examples/simple_ml.py --data FOLDER   MNIST, from a folder with its four IDX files

In: images as rows of a matrix X (n, features) and labels y (n,). Out: the weights W1 (features,
hidden) and W2 (hidden, classes) of logits = relu(X @ W1) @ W2. Next: mlp_resnet.py, the same with
layers, an optimizer and a data loader.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import needle as ndl
from needle.data import digits, parse_mnist

__all__ = ["loss_err", "nn_epoch", "parse_mnist", "softmax_loss"]

Arrays = tuple[np.ndarray, np.ndarray]


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
