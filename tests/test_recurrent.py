"""Recurrent layers against PyTorch's, in every mode, as the course uses them; a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checks import assert_close, assert_same_bits, draw

import needle as ndl
from needle import models, nn, optim
from needle.autograd import Tensor
from needle.compiler.loops import Contraction, Repeat

T, B, D, H = 6, 4, 3, 5
LENGTHS = [6, 2, 5, 1]
KINDS = ("RNN", "LSTM", "GRU")
PARTS = (
    ("W_ih", "weight_ih"),
    ("W_hh", "weight_hh"),
    ("bias_ih", "bias_ih"),
    ("bias_hh", "bias_hh"),
)
each_kind = pytest.mark.parametrize("kind", KINDS)


def constant(x: Any) -> Tensor:
    return Tensor(x, requires_grad=False)


def pairs(mine: Any, theirs: Any) -> Iterator[tuple[Tensor, Any]]:
    """Our parameters beside PyTorch's, which are transposed."""
    directions = 1 + mine.bidirectional
    for n, cell in enumerate(mine.cells):
        name = f"_l{n // directions}" + "_reverse" * (n % directions)
        for ours, other in PARTS:
            if getattr(cell, ours) is not None:
                yield getattr(cell, ours), getattr(theirs, other + name)


def both(torch: ModuleType, kind: str, dtype: str = "float64", **options: Any) -> tuple[Any, Any]:
    """Our layer and PyTorch's, with the same weights."""
    mine = getattr(nn, kind)(D, H, dtype=dtype, **options)
    theirs = getattr(torch.nn, kind)(D, H, **options).double()
    with torch.no_grad():
        for ours, other in pairs(mine, theirs):
            other.copy_(torch.tensor(ours.numpy().T.copy()))
    return mine, theirs


def run_theirs(torch: ModuleType, layer: Any, x: Any, state: Any, lengths: Any) -> Any:
    pack = torch.nn.utils.rnn
    if lengths is None:
        return layer(x, state)
    first = layer.batch_first
    given = pack.pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
    out, last = layer(given, state)
    return pack.pad_packed_sequence(out, batch_first=first, total_length=T)[0], last


OPTIONS: list[tuple[dict[str, Any], Any]] = [
    ({}, None),
    ({"num_layers": 2, "bidirectional": True}, LENGTHS),
    ({"num_layers": 2, "batch_first": True, "bias": False}, None),
    ({"bidirectional": True, "batch_first": True}, LENGTHS),
]


@each_kind
@pytest.mark.parametrize(("options", "lengths"), OPTIONS, ids=str)
def test_forward_and_backward_are_pytorchs(
    torch: ModuleType, kind: str, options: dict[str, Any], lengths: Any
) -> None:
    mine, theirs = both(torch, kind, **options)
    count, shape = len(mine.cells), (B, T, D) if mine.batch_first else (T, B, D)
    arrays = [draw(*shape), draw(count, B, H, seed=1), draw(count, B, H, seed=2)]
    x, h, c = map(Tensor, arrays)
    others = [torch.tensor(each, requires_grad=True) for each in arrays]
    pair = kind == "LSTM"
    out, last = mine(x, (h, c) if pair else h, lengths)
    expected, end = run_theirs(
        torch, theirs, others[0], tuple(others[1:]) if pair else others[1], lengths
    )
    found, wanted = [out, *(last if pair else [last])], [expected, *(end if pair else [end])]
    weights = [draw(*y.shape, seed=3) for y in found]
    loss = sum((y * y * constant(w)).sum() for y, w in zip(found, weights, strict=True))
    loss.backward()  # type: ignore[union-attr]
    sum((y * y * torch.tensor(w)).sum() for y, w in zip(wanted, weights, strict=True)).backward()
    grads = [*zip((x, h, c) if pair else (x, h), others, strict=False), *pairs(mine, theirs)]
    for y, right in zip(found, wanted, strict=True):
        np.testing.assert_allclose(y.numpy(), right.detach().numpy(), atol=1e-13)
    for ours, other in grads:
        grad = other.grad.numpy() if other.ndim != 2 else other.grad.numpy().T
        np.testing.assert_allclose(ours.grad.numpy(), grad, atol=1e-12)  # type: ignore[union-attr]
    if lengths is not None:
        steps = np.arange(T)[:, None] >= np.array(lengths)
        values = out.numpy().swapaxes(0, 1) if mine.batch_first else out.numpy()
        assert (values[steps] == 0).all()


@each_kind
def test_twenty_steps_are_pytorchs(torch: ModuleType, kind: str) -> None:
    """In float64, compiled, with Adam."""
    mine, theirs = both(torch, kind, num_layers=1 + (kind == "LSTM"), bidirectional=True)
    ours = optim.Adam(mine.parameters(), lr=0.01)
    adam = torch.optim.Adam(theirs.parameters(), lr=0.01)

    @ndl.jit
    def step(x: Tensor, lengths: Tensor) -> Tensor:
        out, _ = mine(x, lengths=lengths)
        loss = ((out - 0.3) * (out - 0.3)).sum()
        loss.backward()
        ours.step()
        ours.reset_grad()
        return loss.detach()

    for n in range(20):
        array = draw(T, B, D, seed=n)
        found = step(constant(array), constant(np.array(LENGTHS)))
        out, _ = run_theirs(torch, theirs, torch.tensor(array), None, LENGTHS)
        loss = ((out - 0.3) ** 2).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert abs(found.item() - loss.item()) < 1e-10
    for weight, other in pairs(mine, theirs):
        wanted = other.detach().numpy()
        np.testing.assert_allclose(
            weight.numpy(), wanted.T if wanted.ndim == 2 else wanted, atol=1e-10
        )


@each_kind
def test_a_cell_is_pytorchs(torch: ModuleType, kind: str) -> None:
    mine = getattr(nn, f"{kind}Cell")(D, H, dtype="float64")
    theirs = getattr(torch.nn, f"{kind}Cell")(D, H).double()
    with torch.no_grad():
        for ours, other in PARTS:
            getattr(theirs, other).copy_(torch.tensor(getattr(mine, ours).numpy().T.copy()))
    x, h, c = draw(B, D), draw(B, H, seed=1), draw(B, H, seed=2)
    for state in (None, (h, c)[: mine.states]):
        tensors = None if state is None else tuple(map(constant, state))
        given = None if state is None else tuple(map(torch.tensor, state))
        pick = (lambda s: s) if kind == "LSTM" else (lambda s: s and s[0])
        found = mine(constant(x), pick(tensors))
        wanted = theirs(torch.tensor(x), pick(given))
        found, wanted = (each if kind == "LSTM" else (each,) for each in (found, wanted))
        for y, right in zip(found, wanted, strict=True):
            np.testing.assert_allclose(y.numpy(), right.detach().numpy(), atol=1e-14)


# The course's names


def test_weights_are_drawn_in_the_courses_order() -> None:
    np.random.seed(0)
    model = nn.LSTM(D, H, 2)
    np.random.seed(0)
    bound = 1 / math.sqrt(H)
    for cell, size in zip(model.lstm_cells, (D, H), strict=True):
        for name, shape in zip(
            ("W_ih", "W_hh", "bias_ih", "bias_hh"), ((size, 4 * H), (H, 4 * H), (4 * H,), (4 * H,)),
            strict=True,
        ):  # fmt: skip
            drawn = np.random.rand(*shape) * 2 * bound - bound
            np.testing.assert_allclose(getattr(cell, name).numpy(), drawn, atol=1e-6)
    assert nn.nn_sequence.LSTM is nn.LSTM
    assert len(model.parameters()) == 8
    relu = nn.RNN(D, H, 1, False, "relu").rnn_cells[0]
    assert relu.bias_ih is relu.bias_hh is None
    x = constant(draw(B, D, dtype="float32"))
    assert_close(relu(x), np.maximum(x.numpy().astype("d") @ relu.W_ih.numpy(), 0), length=D)


def test_weights_may_be_plain_tensors() -> None:
    """The course's tests set them, and ask them for gradients."""
    model = nn.RNN(D, H)
    cell = model.rnn_cells[0]
    for name, _ in PARTS:
        setattr(cell, name, Tensor(draw(*getattr(cell, name).shape, dtype="float32") * 0.3))
    out, h = model(Tensor(draw(T, B, D, dtype="float32")))
    out.sum().backward()
    assert (out.shape, h.shape) == ((T, B, H), (1, B, H))
    assert_same_bits(out[-1], h[0])
    state = np.zeros((B, H))
    for x in draw(T, B, D):
        state = np.tanh(x @ cell.W_ih.numpy() + cell.bias_ih.numpy()
                        + state @ cell.W_hh.numpy() + cell.bias_hh.numpy())  # fmt: skip
    np.testing.assert_allclose(h[0].numpy(), state, atol=1e-5)
    for name, _ in PARTS:
        assert getattr(cell, name).grad.shape == getattr(cell, name).shape


# The same bits


@each_kind
def test_modes_agree(kind: str) -> None:
    """With dropout between layers, lengths, both directions, and for LSTM checkpoints."""
    options = {"num_layers": 2, "bidirectional": True, "dropout": 0.3}
    np.random.seed(0)
    layers = [getattr(nn, kind)(D, H, **options, checkpoint_every=k) for k in (None, 3)]
    layers = layers if kind == "LSTM" else layers[:1]
    layers[-1].load_state_dict(layers[0].state_dict())
    results: list[list[np.ndarray]] = []
    x = draw(T, B, D, dtype="float32")

    def step(layer: Any, x: Tensor, lengths: Tensor) -> Tensor:
        out, last = layer(x, lengths=lengths)
        loss = (out * out).sum() + (last[0] * last[-1]).sum()
        loss.backward()
        return loss

    for layer in layers:
        jitted = ndl.jit(lambda x, lengths, layer=layer: step(layer, x, lengths))
        for threads, run in (
            (2, lambda *given, layer=layer: step(layer, *given)),
            (1, jitted),
            (2, jitted),
        ):
            before = ndl.get_num_threads()
            ndl.set_num_threads(threads)
            ndl.seed(7)
            loss = run(constant(x), constant(np.array(LENGTHS)))
            results.append([loss.numpy(), *(p.grad.numpy() for p in layer.parameters())])
            ndl.set_num_threads(before)
    for found in results[1:]:
        for y, wanted in zip(found, results[0], strict=True):
            assert_same_bits(y, wanted)


def test_the_reference_device_agrees() -> None:
    outs = []
    for device in (ndl.cpu(), ndl.cpu_numpy()):
        np.random.seed(0)
        layer = nn.GRU(D, H, 2, device=device, dtype="float64", bidirectional=True)
        out, h = layer(Tensor(draw(T, B, D), device=device), lengths=LENGTHS)
        (out * out).sum().backward()
        outs.append([y.numpy() for y in (out, h, *(p.grad for p in layer.parameters()))])
    for y, wanted in zip(*outs, strict=True):
        assert_close(y, wanted, length=T)


def test_kernels_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The input's share is one product over all steps; a step is two kernels, in backward too."""
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    layer = nn.LSTM(24, 16)

    @ndl.jit
    def step(x: Tensor) -> Tensor:
        loss = layer(x)[0].sum()
        loss.backward()
        return loss

    step(constant(draw(10, 8, 24, dtype="float32")))
    [(_, [program, *_])] = step.programs()
    nests = [nest for kernel in program.lowered.schedule.kernels for nest in kernel]
    loops = [nest for nest in nests if isinstance(nest, Repeat)]
    assert [(each.turns, len(each.kernels), len(each.nests)) for each in loops] == [(10, 2, 2)] * 2
    sizes = {(each.m, each.n, each.k) for each in nests if isinstance(each, Contraction)}
    assert sizes == {(80, 64, 24), (24, 64, 80), (16, 64, 80)}, "x W_ih, and the weights' gradients"


# The language model


def test_the_language_model_learns_to_count() -> None:
    np.random.seed(0)
    model = models.LSTMLanguageModel(8, 12, 32, dropout=0.1)
    optimizer = optim.Adam(model.parameters(), lr=0.02)
    tokens = (np.arange(13)[:, None] + np.arange(4)) % 8

    @ndl.jit
    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(model(x)[0], y)
        loss.backward()
        optimizer.step()
        optimizer.reset_grad()
        return loss.detach()

    x, y = constant(tokens[:-1]), constant(tokens[1:].reshape(-1))
    losses = [step(x, y).item() for _ in range(40)]
    assert losses[0] > 1.5
    assert losses[-1] < 0.1
    model.eval()
    with ndl.no_grad():
        logits, state = model(constant(tokens[:5]))
        more, _ = model(constant(tokens[5:7]), state)
        whole, (h, c) = model(constant(tokens[:7]))
    assert (logits.shape, h.shape, c.shape) == ((20, 8), (1, 4, 32), (1, 4, 32))
    assert_same_bits(more, whole[20:])
    assert (more.numpy()[-4:].argmax(1) == tokens[7]).all()


# Errors


def test_errors_say_what_was_expected() -> None:
    layer, gru, model = nn.LSTM(D, H), nn.GRUCell(D, H), models.LSTMLanguageModel(3)
    x = constant(draw(T, B, D, dtype="float32"))
    cases: list[tuple[str, Any]] = [
        (r"LSTM: expected x of shape \(seq, batch, 3\)", lambda: layer(x[0])),
        (r"a state of shape \(1, 4, 5\); received \(4, 3\)", lambda: layer(x, (x[0],) * 2)),
        (r"expected lengths of 4 integers from 1 to 6; received \[6, 0, 1, 1\]",
         lambda: layer(x, lengths=[6, 0, 1, 1])),
        (r"integers from 1 to 6; received int64\[2\]", lambda: layer(x, lengths=[1, 2])),
        ("expected 'tanh' or 'relu'; received 'sin'", lambda: nn.RNN(D, H, nonlinearity="sin")),
        ("num_layers of at least 1; received 0", lambda: nn.GRU(D, H, 0)),
        ("LSTMCell: expected sizes of at least 1; received 0", lambda: nn.LSTMCell(0, H)),
        (r"GRUCell: expected x of shape \(batch, 3\); received \(6, 4, 3\)", lambda: gru(x)),
        ("dropout: expected p between 0 and 1", lambda: nn.GRU(D, H, dropout=2.0)),
        (r"expected tokens \(seq, batch\)", lambda: model(constant(np.arange(3)))),
    ]  # fmt: skip
    for message, run in cases:
        with pytest.raises(ValueError, match=message):
            run()
