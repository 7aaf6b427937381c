"""A tour of the public API in a second or two: if this fails, read nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import needle as ndl
from needle import nn


def test_tensors() -> None:
    x = ndl.Tensor([[1, 2, 3], [4, 5, 6]])
    assert (x.shape, x.dtype, str(x.device), x.requires_grad) == ((2, 3), "float32", "cpu()", True)
    assert (x + 1).tolist() == [[2, 3, 4], [5, 6, 7]]
    assert (x @ x.T).tolist() == [[14, 32], [32, 77]]
    assert x[:, ::2].sum(axis=0).tolist() == [5, 9]
    assert x[x > 4].tolist() == [5, 6]
    assert ndl.where(x > 2, x, 0).max().item() == 6
    assert ndl.einsum("ij->j", x).reshape(3, 1).squeeze().tolist() == [5, 7, 9]
    assert ndl.concatenate([x, x]).T.shape == (3, 4)
    assert [each.tolist() for each in ndl.split(x, axis=0)] == [[1, 2, 3], [4, 5, 6]]
    assert ndl.softmax(x).sum(-1).numpy() == pytest.approx(1)
    assert np.asarray(x).base is None or np.shares_memory(np.asarray(x), x.numpy())
    assert repr(ndl.arange(3)) == "Tensor([0, 1, 2], dtype=int64, device=cpu())"


def test_gradients_and_gradients_of_gradients() -> None:
    x = ndl.Tensor([1.0, 2.0, 3.0])
    (x**3).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [3, 12, 27]
    x.grad.sum().backward()
    assert x.grad.tolist() == [6, 12, 18]
    with ndl.no_grad():
        assert not (x * 2).requires_grad


def test_eager_and_lazy_give_the_same_bits() -> None:
    x = ndl.Tensor(np.linspace(-2, 2, 12).reshape(3, 4))
    eager = ndl.gelu(ndl.tanh(x) @ x.T).mean()
    with ndl.lazy():
        lazy = ndl.gelu(ndl.tanh(x) @ x.T).mean()
        assert lazy.cached_data is None
    assert lazy.item() == eager.item()


def test_an_op_of_ones_own() -> None:
    class Square(ndl.TensorOp):
        def compute(self, a: np.ndarray) -> np.ndarray:
            return a * a

        def gradient(self, out_grad: ndl.Tensor, node: ndl.Tensor) -> ndl.Tensor:
            return out_grad * 2 * node.inputs[0]

    x = ndl.Tensor([3.0])
    Square()(x).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [6]


def small_model() -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Residual(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.1))),
        nn.Linear(32, 10),
    )


def test_training_on_the_embedded_digits(tmp_path: Path) -> None:
    ndl.seed(0)
    model = small_model()
    loader = ndl.data.DataLoader(ndl.data.digits(), batch_size=64, shuffle=True, seed=0)
    optimizer = ndl.optim.Adam(model.parameters(), lr=1e-2, weight_decay=1e-4)
    loss_function = nn.SoftmaxLoss()
    for _ in range(3):
        for images, labels in loader:
            loss = loss_function(model(images), labels)
            optimizer.reset_grad()
            loss.backward()
            optimizer.step()
    images, labels = ndl.data.digits(train=False)[:]
    model.eval()
    with ndl.no_grad():
        guesses = model(ndl.Tensor(images)).argmax(axis=1).numpy()
    assert (guesses == labels).mean() > 0.9

    ndl.save_tensors(tmp_path / "model.safetensors", model.state_dict())
    arrays, _ = ndl.load_tensors(tmp_path / "model.safetensors")
    other = small_model()
    other.load_state_dict(arrays)
    other.eval()
    assert other(ndl.Tensor(images)).argmax(axis=1).tolist() == guesses.tolist()


def test_memory_and_errors() -> None:
    before = ndl.memory.live_values()
    x = ndl.Tensor(np.ones((2, 3)))
    assert ndl.memory.live_values() == before + 1
    assert ndl.memory.live() >= 48
    with pytest.raises(ValueError, match=r"^matmul: inner dimensions differ: \(2, 3\) @ \(2, 3\)$"):
        x @ x
