"""NDArray and the apps as code for the course's NDArray, convolution and sequence assignments uses
them; every expected value is NumPy's, or one that the course publishes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import backend_ndarray as nd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from models import LanguageModel, ResNet9  # noqa: E402
from simple_ml import (  # noqa: E402
    epoch_general_cifar10,
    evaluate_cifar10,
    evaluate_ptb,
    train_cifar10,
    train_ptb,
)


def steps(x: np.ndarray) -> tuple[int, ...]:
    return tuple(step // x.itemsize for step in x.strides)


# NDArray


@pytest.mark.parametrize(
    "index", [np.s_[3:4, 1:4], np.s_[1:4, 3:4], np.s_[3:4, 3:4], np.s_[::2, 1], np.s_[4:]], ids=str
)
def test_strides_are_numpys_along_axes_of_one_element_too(index: Any) -> None:
    x = np.random.randn(5, 5)
    a = nd.array(x)
    assert a[index].strides == steps(x[index])
    assert a[index]._handle.ptr() == a._handle.ptr()
    assert a[index].compact().is_compact()


def test_as_strided_sees_tiles_from_a_views_first_element_on() -> None:
    x = np.arange(48, dtype=np.float32).reshape(6, 8)
    a = nd.array(x)
    tiles = a.as_strided((3, 4, 2, 2), (16, 2, 8, 1))
    np.testing.assert_array_equal(
        tiles.compact().numpy(), x.reshape(3, 2, 4, 2).transpose(0, 2, 1, 3)
    )
    np.testing.assert_array_equal(a[2:, 3:].as_strided((2, 2), (8, 1)).numpy(), x[2:4, 3:5])
    tiles[0, 1] = 0.0
    assert (a.numpy()[:2, 2:4] == 0).all()
    with pytest.raises(ValueError, match="expected a view inside 48 elements"):
        a[2:].as_strided((6, 8), (8, 1))


def test_fill_and_compact_strides() -> None:
    a = nd.array(np.zeros((3, 4)))
    a[1:, ::2].fill(7.0)
    assert a.numpy().sum() == 7 * 4
    assert nd.NDArray.compact_strides((2, 3, 4)) == steps(np.empty((2, 3, 4)))


def test_writing_takes_as_many_elements_in_another_shape() -> None:
    x = np.random.randn(4, 3).astype(np.float32)
    a, out = nd.array(x), nd.full((4, 2, 3), 0.0)
    before = out._handle.ptr()
    out[:, 1:2, :] = a
    assert out._handle.ptr() == before
    np.testing.assert_array_equal(out.numpy(), np.stack([np.zeros_like(x), x], axis=1))
    out[:, 0, :] = a.reshape((12,))
    np.testing.assert_array_equal(out.numpy(), np.stack([x, x], axis=1))
    with pytest.raises(ValueError, match="broadcast"):
        out[:, 0, :] = a[:3]


def test_subclasses_may_index_in_their_own_way() -> None:
    class Slices(nd.NDArray):
        def __getitem__(self, index: Any) -> Any:
            return tuple(self.process_slice(s, axis) for axis, s in enumerate(index))

    found = Slices(np.ones((4, 5, 6)))[1::2, 2:5, :-1]
    assert found == (slice(1, 4, 2), slice(2, 5, 1), slice(0, 5, 1))


# Apps


def test_resnet9_is_the_courses() -> None:
    np.random.seed(0)
    model = ResNet9(device=ndl.cpu())
    assert sum(int(np.prod(p.shape)) for p in model.parameters()) == 431946
    x = ndl.Tensor(np.random.randn(2, 3, 32, 32), device=ndl.cpu())
    published = [-1.8912625, 0.64833605, 1.9400386, 1.1435282, 1.89777]
    np.testing.assert_allclose(model(x).numpy()[0, :5], published, rtol=1e-5)


def images() -> list[tuple[ndl.Tensor, ndl.Tensor]]:
    rng = np.random.default_rng(1)
    labels = [rng.integers(0, 10, size) for size in (8, 5)]
    planes = [rng.normal(size=(len(y), 3, 32, 32)) + y[:, None, None, None] for y in labels]
    return [
        (ndl.Tensor(x.astype(np.float32)), ndl.Tensor(y))
        for x, y in zip(planes, labels, strict=True)
    ]


def test_images_train_and_are_evaluated_by_samples() -> None:
    model, loader = ResNet9(), images()
    before = evaluate_cifar10(model, loader)
    with ndl.no_grad():
        logits = np.concatenate([model(x).numpy() for x, _ in loader]).astype(np.float64)
    y = np.concatenate([labels.numpy() for _, labels in loader])
    losses = np.log(np.exp(logits).sum(1)) - logits[np.arange(13), y]
    np.testing.assert_allclose(before, ((logits.argmax(1) == y).mean(), losses.mean()), rtol=1e-5)
    first = train_cifar10(model, loader, n_epochs=1)
    assert model.training
    assert train_cifar10(model, loader, n_epochs=3)[1] < first[1]
    state = np.random.get_state()[1][0]
    epoch_general_cifar10(loader, model)
    assert not model.training
    assert state == np.random.get_state()[1][0] == 4  # the course's seed


@pytest.mark.parametrize("kind", ["rnn", "lstm", "transformer"])
def test_language_models_train(kind: str) -> None:
    ids = np.tile(np.arange(12, dtype=np.float32), 10).reshape(-1, 4)  # 30 steps, each the same
    model = LanguageModel(6, 12, 8, 2, kind, seq_len=7)
    logits, state = model(ndl.Tensor(ids[:7]))
    assert logits.shape == (28, 12)
    if kind != "transformer":
        states = state if kind == "lstm" else (state,)
        assert [each.shape for each in states] == [(2, 4, 8)] * len(states)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    before = evaluate_ptb(model, ids, seq_len=7)
    train_ptb(model, ids, seq_len=7, n_epochs=4, lr=0.5, clip=1.0)
    after = evaluate_ptb(model, ids, seq_len=7)
    assert after[1] < before[1] - 0.1


def test_the_state_goes_on_from_piece_to_piece() -> None:
    """29 steps in pieces of 7 have the loss of 29 steps at once."""
    ids = np.random.randint(0, 9, (30, 3)).astype(np.float32)
    model = LanguageModel(4, 9, 5, seq_model="lstm")
    np.testing.assert_allclose(
        evaluate_ptb(model, ids, seq_len=7), evaluate_ptb(model, ids, seq_len=29), rtol=1e-5
    )


def test_an_unknown_sequence_model_is_refused() -> None:
    with pytest.raises(ValueError, match="LanguageModel: expected seq_model 'rnn', 'lstm' or"):
        LanguageModel(4, 9, 5, seq_model="gru")
