"""An MLP-ResNet: residual blocks of linear layers, trained with an optimizer and a data loader.

    python examples/mlp_resnet.py                 the embedded digits
    python examples/mlp_resnet.py --data FOLDER   MNIST, from a folder with its four IDX files

In: images of any shape, flattened by the model. Out: error rates and losses. The numbers that its
functions give after `np.random.seed` are those of CMU 10-414/714: `epoch` and `train_mnist` seed
NumPy's generator by themselves, as there.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

import needle as ndl
from needle import nn
from needle.data import DataLoader, ImageDataset, digits, mnist

SEED = 4  # the course's, where its values depend on the draws of dropout and shuffling
Stats = tuple[float, float]  # error rate, loss


def ResidualBlock(
    dim: int,
    hidden_dim: int,
    norm: Callable[[int], nn.Module] = nn.BatchNorm1d,
    drop_prob: float = 0.1,
) -> nn.Module:
    """y = relu(x + f(x)), f = norm(linear(dropout(relu(norm(linear(x)))))), of x (n, dim)."""
    return nn.Sequential(
        nn.Residual(
            nn.Sequential(
                nn.Linear(dim, hidden_dim),
                norm(hidden_dim),
                nn.ReLU(),
                nn.Dropout(drop_prob),
                nn.Linear(hidden_dim, dim),
                norm(dim),
            )
        ),
        nn.ReLU(),
    )


def MLPResNet(
    dim: int,
    hidden_dim: int = 100,
    num_blocks: int = 3,
    num_classes: int = 10,
    norm: Callable[[int], nn.Module] = nn.BatchNorm1d,
    drop_prob: float = 0.1,
) -> nn.Module:
    """Images (n, ...) with `dim` numbers each -> logits (n, num_classes)."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(dim, hidden_dim),
        nn.ReLU(),
        *(ResidualBlock(hidden_dim, hidden_dim // 2, norm, drop_prob) for _ in range(num_blocks)),
        nn.Linear(hidden_dim, num_classes),
    )


def epoch(
    dataloader: DataLoader, model: nn.Module, opt: ndl.optim.Optimizer | None = None
) -> Stats:
    """One pass over the data, which trains where there is an optimizer: error rate, mean loss."""
    np.random.seed(SEED)
    if opt is None:
        model.eval()
    else:
        model.train()
    loss_function = nn.SoftmaxLoss()
    errors, losses, samples = 0, [], 0
    for X, y in dataloader:
        logits = model(X)
        loss = loss_function(logits, y)
        if opt is not None:
            opt.reset_grad()
            loss.backward()
            opt.step()
        errors += int((logits.numpy().argmax(axis=1) != y.numpy()).sum())
        losses.append(float(loss))
        samples += len(y)
    return errors / samples, float(np.mean(losses))


def train_on(
    train_set: ImageDataset,
    test_set: ImageDataset,
    batch_size: int = 100,
    epochs: int = 10,
    optimizer: Callable[..., ndl.optim.Optimizer] = ndl.optim.Adam,
    lr: float = 0.001,
    weight_decay: float = 0.001,
    hidden_dim: int = 100,
    report: Callable[[int, Stats, Stats], None] | None = None,
) -> tuple[float, float, float, float]:
    """Train an MLPResNet: error rate and loss in training, then in testing, of the last epoch."""
    features, classes = math.prod(train_set[0][0].shape), int(train_set.labels.max()) + 1
    train_loader = DataLoader(train_set, batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size)
    model = MLPResNet(features, hidden_dim, num_classes=classes)
    opt = optimizer(model.parameters(), lr=lr, weight_decay=weight_decay)
    trained = tested = (math.nan, math.nan)
    for number in range(1, epochs + 1):
        trained, tested = epoch(train_loader, model, opt), epoch(test_loader, model)
        if report is not None:
            report(number, trained, tested)
    return *trained, *tested


def train_mnist(
    batch_size: int = 100,
    epochs: int = 10,
    optimizer: Callable[..., ndl.optim.Optimizer] = ndl.optim.Adam,
    lr: float = 0.001,
    weight_decay: float = 0.001,
    hidden_dim: int = 100,
    data_dir: str | Path = "data",
) -> tuple[float, float, float, float]:
    """`train_on` MNIST, whose four IDX files lie in the folder data_dir."""
    np.random.seed(SEED)
    sets = (mnist(data_dir, train=train) for train in (True, False))
    return train_on(*sets, batch_size, epochs, optimizer, lr, weight_decay, hidden_dim)


def print_epoch(number: int, trained: Stats, tested: Stats) -> None:
    """One line of the table that `main` prints."""
    columns = [f"{error:11.2%} | {loss:10.4f}" for error, loss in (trained, tested)]
    print(f"{number:5} | {' | '.join(columns)}")


def main(arguments: list[str] | None = None) -> float:
    """Read the command line, train; gives the test error."""
    parser = argparse.ArgumentParser(description="Train an MLP-ResNet.")
    parser.add_argument("--data", type=Path, help="a folder with MNIST's IDX files (else digits)")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--hidden", type=int, default=100, help="size of the hidden layers")
    parser.add_argument("--lr", type=float, default=0.001, help="learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.001)
    parser.add_argument("--batch", type=int, default=100, help="samples per step")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    np.random.seed(options.seed)
    read = digits if options.data is None else lambda train: mnist(options.data, train=train)
    print("epoch | train error | train loss |  test error |  test loss")
    stats = train_on(
        read(train=True),
        read(train=False),
        options.batch,
        options.epochs,
        lr=options.lr,
        weight_decay=options.weight_decay,
        hidden_dim=options.hidden,
        report=print_epoch,
    )
    return stats[2]


if __name__ == "__main__":
    main()
