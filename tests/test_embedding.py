"""Embedding: rows by ids, ids that are none, and steps that change only the rows that were read."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import nn, ops, optim

OPTIMIZERS = {
    "SGD": lambda p: optim.SGD(p, 0.05),
    "Adagrad": lambda p: optim.Adagrad(p, 0.05),
    "Adam": lambda p: optim.Adam(p, 0.05, eps=1e-18),
    "momentum": lambda p: optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "Lion": lambda p: optim.Lion(p, 0.05),
}
BATCHES = np.random.default_rng(1).integers(0, 9, (6, 2, 3))


def table(dtype: str = "float64", **options: Any) -> nn.Embedding:
    np.random.seed(0)
    return nn.Embedding(9, 4, dtype=dtype, **options)


def loss_of(y: Any, w: Any) -> Any:
    return (y * w).sum() ** 2 + (y * y).sum()


def train(optimizer: Any, mode: str, dtype: str = "float64", clip: bool = False) -> list[Any]:
    """The table and the optimizer's states after some steps."""
    model = table(dtype, sparse=True, padding_idx=2)
    opt, w = optimizer(model.parameters()), ndl.Tensor(np.linspace(-1, 1, 4), dtype=dtype)

    def step(ids: Any) -> Any:
        loss = loss_of(model(ids), w)
        loss.backward()
        if clip:
            opt.clip_grad_norm(1e9)
        opt.step()
        opt.reset_grad()
        return loss

    run = ndl.jit(step) if mode == "jit" else step
    for ids in BATCHES:
        with ndl.autograd.mode(lazy=mode == "lazy"):
            run(ndl.Tensor(ids))
    states = [x for each in vars(opt).values() if isinstance(each, dict) for x in each.values()]
    return [x.numpy() for x in (model.weight, *states)]


def test_draws_the_courses_weight_and_reads_rows() -> None:
    model = table("float32")
    np.random.seed(0)
    assert np.array_equal(model.weight.numpy(), ndl.init.randn(9, 4).numpy())
    ids = np.array([[3, 0, 8], [3, 3, 1]])
    assert np.array_equal(model(ndl.Tensor(ids)).numpy(), model.weight.numpy()[ids])
    assert np.array_equal(model(ids.astype("float32")).numpy(), model.weight.numpy()[ids])
    assert model(ndl.Tensor(5)).shape == (4,)
    assert model(np.zeros((2, 0), int)).shape == (2, 0, 4)


@pytest.mark.parametrize("bad", [9, -1])
def test_refuses_unknown_ids(bad: int) -> None:
    model, ids = table(), ndl.Tensor(np.array([0, bad]))
    for run in (model, ndl.jit(model)):
        with pytest.raises(
            IndexError, match=f"embedding: expected ids from 0 to 8; received {bad}"
        ):
            run(ids)
    with pytest.raises(TypeError, match="embedding: expected integer indices; received float32"):
        model(np.array([0.5], np.float32))
    with pytest.raises(ValueError, match="expected padding_idx to be an id; received 9 of 9 ids"):
        nn.Embedding(9, 4, padding_idx=9)


def test_a_row_of_padding_stays_zero() -> None:
    model = table(padding_idx=-7)
    assert model.padding_idx == 2
    assert not model.weight.numpy()[2].any()
    model(np.array([2, 2, 3])).sum().backward()
    expected = np.zeros((9, 4))
    expected[3] = 1
    assert np.array_equal(model.weight.grad.numpy(), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_by_rows_have_the_same_bits_in_all_modes(name: str) -> None:
    found = [train(OPTIMIZERS[name], mode) for mode in ("eager", "lazy", "jit")]
    found.append(train(OPTIMIZERS[name], "eager", clip=True))  # of the whole gradient
    for other in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("name", ["SGD", "Adagrad", "Adam"])
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_steps_by_rows_agree_with_torch(name: str, torch: Any) -> None:
    makers = {
        "SGD": lambda p: torch.optim.SGD(p, 0.05),
        "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05),
        "Adam": lambda p: torch.optim.SparseAdam(p, 0.05, eps=1e-18),  # eps stands elsewhere
    }
    peer = torch.nn.Embedding(9, 4, 2, sparse=True, dtype=torch.float64)
    peer.weight.data[:] = torch.tensor(table(padding_idx=2).weight.numpy())
    opt, w = makers[name](peer.parameters()), torch.linspace(-1, 1, 4, dtype=torch.float64)
    for ids in BATCHES:
        opt.zero_grad()
        loss_of(peer(torch.tensor(ids)), w).backward()
        opt.step()
    assert np.allclose(train(OPTIMIZERS[name], "jit")[0], peer.weight.detach(), 0, 1e-10)


def test_a_jitted_step_by_rows_touches_no_others() -> None:
    model = nn.Embedding(4096, 8, sparse=True)
    opt = optim.Adam(model.parameters(), 0.1)

    @ndl.jit
    def step(ids: Any) -> Any:
        loss = model(ids).sum()
        loss.backward()
        opt.step()
        opt.reset_grad()
        return loss

    step(ndl.Tensor(np.array([5, 7, 5])))
    ((_, (program,)),) = step.programs()
    assert len(program.recipe.in_place) == 4  # the count of steps, the table, m and v
    assert program.recipe.arena < 4096 * 8 * 4


def test_states_of_another_shape_are_refused() -> None:
    model = table(sparse=True)
    opt = optim.Adafactor(model.parameters())
    model(np.array([1])).sum().backward()
    with pytest.raises(ValueError, match=r"expected states of shape \(9, 4\) for rows; received"):
        opt.step()


# index_copy


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "int32", "bool"])
def test_index_copy_in_every_mode(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, source = (
        ndl.Tensor(rng.integers(0, 9, shape)).astype(dtype) for shape in ((2, 5, 3), (2, 3, 3))
    )
    index = np.array([1, -1, 1])
    expected = x.numpy().copy()
    expected[:, 1], expected[:, 4] = source.numpy()[:, 2], source.numpy()[:, 1]
    with ndl.lazy():
        later = ops.index_copy(x, 1, index, source)
    jitted = ndl.jit(lambda x, i, source: ops.index_copy(x, 1, i, source))
    turned = ops.permute(ops.permute(x, (2, 0, 1)) + ops.permute(x, (2, 0, 1)) * 0, (1, 2, 0))
    for found in (
        ops.index_copy(x, 1, index, source), later, jitted(x, ndl.Tensor(index), source),
        ops.index_copy(turned.astype(dtype), 1, index, source),
    ):  # fmt: skip
        assert np.array_equal(found.numpy(), expected)


def test_index_copy_overwrites_captured_memory_only_if_its_indices_are_right() -> None:
    held, place = ndl.init.zeros(2, 5, 3), ndl.Tensor(np.array([3]))

    @ndl.jit
    def write(source: Any) -> Any:
        held.data = ops.index_copy(held, 1, place, source)
        place.data = place + 1
        return held.sum()

    source = ndl.init.ones(2, 1, 3)
    for count in (1, 2):
        assert write(source).item() == 6 * count
    assert write.programs()[0][1][0].recipe.in_place
    before = held.numpy().copy()
    with pytest.raises(IndexError, match="index_copy: expected indices below 5; received 5"):
        write(source)
    assert np.array_equal(held.numpy(), before)
    assert place.tolist() == [5]


def test_index_copy_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="index_copy: expected a list of indices and a source"):
        ops.index_copy(np.zeros((3, 4)), 0, [1], np.zeros((2, 4)))
