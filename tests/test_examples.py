"""The course's apps in examples/: their functions against NumPy, and short runs as scripts."""

from __future__ import annotations

import gzip
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import nn

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def apps() -> Iterator[dict[str, ModuleType]]:
    """The modules, imported by their names as course code does."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import mlp_resnet
        import simple_ml
    finally:
        sys.path.remove(str(EXAMPLES))
    yield {"simple_ml": simple_ml, "mlp_resnet": mlp_resnet}
    for name in ("simple_ml", "mlp_resnet"):
        del sys.modules[name]


@pytest.fixture
def simple_ml(apps: dict[str, ModuleType]) -> Any:
    return apps["simple_ml"]


@pytest.fixture
def mlp_resnet(apps: dict[str, ModuleType]) -> Any:
    return apps["mlp_resnet"]


@pytest.fixture(scope="module")
def mnist_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like MNIST's: 120 and 40 images, each with a bright row that tells its class."""
    folder = tmp_path_factory.mktemp("mnist")
    rng = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 40)):
        y = np.arange(count) % 10
        x = rng.integers(0, 60, (count, 28, 28))
        x[np.arange(count), 2 * y + 3] += 190
        for kind, array in (("images-idx3", x), ("labels-idx1", y)):
            header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">u4").tobytes()
            data = header + array.astype(np.uint8).tobytes()
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(data))
    return folder


def one_hot(y: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes)[y]


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


# simple_ml


def test_softmax_loss_and_loss_err(simple_ml: Any) -> None:
    logits, y = np.random.randn(7, 4), np.random.randint(0, 4, 7)
    expected = -log_softmax(logits)[np.arange(7), y].mean()
    loss = simple_ml.softmax_loss(ndl.Tensor(logits), ndl.Tensor(one_hot(y, 4)))
    np.testing.assert_allclose(loss.numpy(), expected)
    found, error = simple_ml.loss_err(ndl.Tensor(logits), y.astype(np.uint8))
    np.testing.assert_allclose(found, expected)
    assert error == np.mean(logits.argmax(1) != y)


def test_nn_epoch_is_gradient_descent(simple_ml: Any) -> None:
    X, y = np.random.randn(50, 5), np.random.randint(0, 3, 50).astype(np.uint8)
    w1, w2 = np.random.randn(5, 10), np.random.randn(10, 3)
    W1, W2 = ndl.Tensor(w1), ndl.Tensor(w2)
    found = simple_ml.nn_epoch(X, y, W1, W2, lr=0.3, batch=20)
    np.testing.assert_array_equal(W1.numpy(), w1)
    np.testing.assert_array_equal(W2.numpy(), w2)
    for start in (0, 20, 40):
        x, labels = X[start : start + 20], y[start : start + 20]
        hidden = np.maximum(x @ w1, 0)
        d_logits = (np.exp(log_softmax(hidden @ w2)) - one_hot(labels, 3)) / len(x)
        d_hidden = (d_logits @ w2.T) * (hidden > 0)
        w1, w2 = w1 - 0.3 * x.T @ d_hidden, w2 - 0.3 * hidden.T @ d_logits
    np.testing.assert_allclose(found[0].numpy(), w1)
    np.testing.assert_allclose(found[1].numpy(), w2)
    assert all(w.is_leaf() and w.requires_grad for w in found)


def test_parse_mnist(simple_ml: Any, mnist_folder: Path) -> None:
    images, labels = (
        str(mnist_folder / f"t10k-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1")
    )
    X, y = simple_ml.parse_mnist(images, labels)
    assert (X.shape, X.dtype) == ((40, 784), np.float32)
    assert (y.shape, y.dtype) == ((40,), np.uint8)
    assert X.min() >= 0
    assert X.max() <= 1
    assert (X[7].reshape(28, 28).mean(1) > 0.5).nonzero()[0].tolist() == [17]


def test_simple_ml_learns(simple_ml: Any, mnist_folder: Path, capsys: Any) -> None:
    assert simple_ml.main(["--epochs", "8", "--hidden", "50"]) < 0.1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 9
    assert lines[0].startswith("epoch")
    assert simple_ml.main(["--data", str(mnist_folder), "--epochs", "8", "--batch", "10"]) < 0.1


# mlp_resnet


@pytest.mark.parametrize(
    ("norm", "dim", "hidden"), [(nn.BatchNorm1d, 15, 2), (nn.LayerNorm1d, 8, 4)]
)
def test_residual_block_has_the_parameters_of_its_layers(
    mlp_resnet: Any, norm: Any, dim: int, hidden: int
) -> None:
    block = mlp_resnet.ResidualBlock(dim, hidden, norm)
    count = sum(p.size for p in block.parameters())
    assert count == (dim + 1) * hidden + (hidden + 1) * dim + 2 * (dim + hidden)


def test_mlp_resnet_is_what_it_says(mlp_resnet: Any) -> None:
    model = mlp_resnet.MLPResNet(6, 4, 2, 3, nn.LayerNorm1d, 0.5)
    model.eval()
    p = [each.numpy().astype(np.float64) for each in model.parameters()]
    assert len(p) == 2 + 2 * 8 + 2
    x = np.random.randn(5, 6)

    def normalized(h: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
        centred = h - h.mean(1, keepdims=True)
        return centred / np.sqrt(h.var(1, keepdims=True) + 1e-5) * weight + bias

    h = np.maximum(x @ p[0] + p[1], 0)
    for index in (2, 10):
        w1, b1, g1, c1, w2, b2, g2, c2 = p[index : index + 8]
        inner = np.maximum(normalized(h @ w1 + b1, g1, c1), 0)
        h = np.maximum(h + normalized(inner @ w2 + b2, g2, c2), 0)
    found = model(ndl.Tensor(x.astype(np.float32).reshape(5, 2, 3, 1)))
    np.testing.assert_allclose(found.numpy(), h @ p[-2] + p[-1], rtol=1e-4, atol=1e-5)


def test_mlp_resnet_draws_in_the_order_of_its_layers(mlp_resnet: Any) -> None:
    np.random.seed(4)
    model = mlp_resnet.MLPResNet(6, 4, 1, 3)
    np.random.seed(4)
    for fan_in, fan_out in ((6, 4), (4, 2), (2, 4), (4, 3)):
        weight = (2 * np.random.rand(fan_in, fan_out) - 1) * np.sqrt(6 / fan_in)
        bias = (2 * np.random.rand(fan_out) - 1) * np.sqrt(6 / fan_out)
        found = [p.numpy() for p in model.parameters() if p.shape == (fan_in, fan_out)]
        assert any(np.allclose(each, weight, atol=1e-6) for each in found)
        found = [p.numpy()[0] for p in model.parameters() if p.shape == (1, fan_out)]
        assert any(np.allclose(each, bias, atol=1e-6) for each in found)


def test_epoch_evaluates_or_trains(mlp_resnet: Any) -> None:
    X, y = np.random.randn(25, 6).astype(np.float32), np.random.randint(0, 3, 25)
    loader = ndl.data.DataLoader(ndl.data.NDArrayDataset(X, y), batch_size=10)
    model = mlp_resnet.MLPResNet(6, 8, 1, 3)
    before = [p.numpy().copy() for p in model.parameters()]
    error, loss = mlp_resnet.epoch(loader, model)
    assert not model.training
    logits = model(ndl.Tensor(X)).numpy().astype(np.float64)
    losses = -log_softmax(logits)[np.arange(25), y]
    assert error == np.mean(logits.argmax(1) != y)
    assert loss == pytest.approx(
        np.mean([part.mean() for part in np.split(losses, (10, 20))]), rel=1e-5
    )
    for p, old in zip(model.parameters(), before, strict=True):
        np.testing.assert_array_equal(p.numpy(), old)
        assert p.grad is None
    opt = ndl.optim.Adam(model.parameters(), lr=0.05)
    stats = [mlp_resnet.epoch(loader, model, opt) for _ in range(15)]
    assert model.training
    assert stats[-1][1] < stats[0][1] / 2


def test_train_mnist_is_decided_by_its_own_seed(mlp_resnet: Any, mnist_folder: Path) -> None:
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(mlp_resnet.train_mnist).parameters.items()
    }
    assert defaults == {
        "batch_size": 100, "epochs": 10, "optimizer": ndl.optim.Adam, "lr": 0.001,
        "weight_decay": 0.001, "hidden_dim": 100, "data_dir": "data",
    }  # fmt: skip
    arguments = (20, 2, ndl.optim.Adam, 0.005, 0.001, 20)
    np.random.seed(1)
    first = mlp_resnet.train_mnist(*arguments, data_dir=str(mnist_folder))
    np.random.seed(2)
    second = mlp_resnet.train_mnist(*arguments, data_dir=mnist_folder)
    assert first == second
    assert len(first) == 4
    train_error, train_loss, test_error, test_loss = first
    assert 0 <= test_error <= 1
    assert 0 <= train_error <= 1
    assert max(train_loss, test_loss) < 3


def test_mlp_resnet_learns_the_digits(mlp_resnet: Any, capsys: Any) -> None:
    assert mlp_resnet.main(["--epochs", "3", "--lr", "0.003"]) < 0.08
    assert len(capsys.readouterr().out.splitlines()) == 4


# As scripts


@pytest.mark.parametrize("name", ["simple_ml", "mlp_resnet"])
def test_runs_as_a_script(name: str, mnist_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--data", str(mnist_folder)]
    run = subprocess.run(
        [*command, "--epochs", "1"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.splitlines()) == 2
    assert not run.stderr
