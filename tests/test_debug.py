"""needle.debug: the first op that makes a NaN or an infinity, and graphs that grow."""

from __future__ import annotations

import gc
import warnings

import numpy as np
import pytest

import needle as ndl
from needle import debug, nn
from needle.debug import AnomalyError, MemoryGrowthWarning


def line_of(text: str) -> int:
    """The number of this file's first line that holds a text."""
    with open(__file__) as file:
        return next(number for number, line in enumerate(file, 1) if text in line)


# Anomalies


def test_forward_nan_is_named_with_op_line_and_range() -> None:
    x = ndl.Tensor([4.0, -1.0])
    with pytest.raises(AnomalyError) as caught, debug.detect_anomaly():
        ndl.sqrt(x)  # the guilty forward
    message = str(caught.value)
    assert "sqrt made NaN" in message
    assert f"test_debug.py:{line_of('# the guilty forward')}" in message
    assert "float32[2] from -1 to 4" in message


def test_infinity_is_named_and_can_be_allowed() -> None:
    x = ndl.Tensor([0.0, 1.0])
    with pytest.raises(AnomalyError, match="log made infinity"), debug.detect_anomaly():
        ndl.log(x)
    with debug.detect_anomaly(infinities=False):
        assert ndl.log(x).numpy()[0] == -np.inf


def test_backward_nan_names_the_forward_op_and_its_line() -> None:
    x = ndl.Tensor([0.0, 1.0])

    def differentiate() -> None:
        y = ndl.sqrt(x)  # differentiated at 0
        (y * 0.0).sum().backward()

    with pytest.raises(AnomalyError) as caught, debug.detect_anomaly(infinities=False):
        differentiate()
    message = str(caught.value)
    assert "in the gradient of sqrt" in message
    assert f":{line_of('# differentiated at 0')}" in message


def test_module_path_is_named() -> None:
    class Logarithm(nn.Module):
        def forward(self, x: ndl.Tensor) -> ndl.Tensor:
            return ndl.log(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = [Logarithm(), Logarithm()]

        def forward(self, x: ndl.Tensor) -> ndl.Tensor:
            return self.layers[1](self.layers[0](x) - 1.0)

    with (
        pytest.raises(AnomalyError, match=r"log made NaN .*\(in layers\.1\)"),
        debug.detect_anomaly(),
    ):
        Model()(ndl.Tensor([1.0]))


def test_masks_of_infinity_and_leaves_with_nan() -> None:
    masked = ndl.Tensor([0.0, -np.inf])
    with debug.detect_anomaly():
        np.testing.assert_allclose(ndl.softmax(masked + 1.0).numpy(), [1, 0])
    with (
        pytest.raises(AnomalyError, match="add_scalar read NaN from its input 0"),
        debug.detect_anomaly(),
    ):
        ndl.Tensor([np.nan]) + 1.0


def test_lazy_values_are_checked_when_computed() -> None:
    with debug.detect_anomaly(), ndl.lazy():
        y = ndl.log(ndl.Tensor([-1.0]))
        with pytest.raises(AnomalyError, match="log made NaN"):
            y.numpy()


def test_detector_leaves_no_trace() -> None:
    before = ndl.autograd.Hooks.node, ndl.autograd.Hooks.create
    with pytest.raises(AnomalyError), debug.detect_anomaly():
        ndl.log(ndl.Tensor([-1.0]))
    assert (ndl.autograd.Hooks.node, ndl.autograd.Hooks.create) == before
    assert np.isnan(ndl.log(ndl.Tensor([-1.0])).numpy()).all()


# Growth


@pytest.fixture
def detector():
    """The growth detector in its first state, before and after."""
    gc.collect()
    debug.DETECTOR.patience = debug.PATIENCE
    debug.enable_growth_detector()
    yield debug.DETECTOR
    debug.DETECTOR.patience = debug.PATIENCE
    debug.enable_growth_detector()


def regression() -> tuple[ndl.Tensor, ndl.Tensor, ndl.Tensor]:
    rng = np.random.default_rng(0)
    x = ndl.Tensor(rng.standard_normal((8, 3)), requires_grad=False)
    y = ndl.Tensor(rng.standard_normal((8, 1)), requires_grad=False)
    return x, y, ndl.Tensor(np.zeros((3, 1)))


def loss_of(x: ndl.Tensor, y: ndl.Tensor, w: ndl.Tensor) -> ndl.Tensor:
    return ((x @ w - y) ** 2).mean()


def test_the_memory_bug_is_named_by_its_line(detector) -> None:
    x, y, w = regression()

    def train() -> None:
        nonlocal w
        for _ in range(200):
            loss_of(x, y, w).backward()
            w = w + (-0.01) * w.grad  # the leak

    with pytest.warns(MemoryGrowthWarning) as caught:
        train()
    message = str(caught[0].message)
    assert f"test_debug.py:{line_of('# the leak')}" in message
    assert "w.detach()" in message
    assert len(caught) == 1
    assert caught[0].lineno == line_of("# the leak")


def test_a_running_total_of_losses_is_named(detector) -> None:
    x, y, w = regression()
    total = ndl.Tensor(0.0, requires_grad=False)

    def train() -> None:
        nonlocal total
        for _ in range(200):
            loss = loss_of(x, y, w)
            loss.backward()
            total = total + loss  # the running total
            w.data = w.data - 0.01 * w.grad.data

    with pytest.warns(MemoryGrowthWarning, match="float\\(loss\\)") as caught:
        train()
    assert f":{line_of('# the running total')}" in str(caught[0].message)


def test_a_list_of_losses_is_named(detector) -> None:
    x, y, w = regression()
    losses = []

    def train() -> None:
        for _ in range(200):
            loss = loss_of(x, y, w)  # kept in a list
            loss.backward()
            losses.append(loss)

    with pytest.warns(MemoryGrowthWarning, match="holds the graph") as caught:
        train()
    assert f":{line_of('return ((x @ w - y) ** 2).mean()')}" in str(caught[0].message)


def test_growth_without_backward_is_noticed(detector, monkeypatch) -> None:
    monkeypatch.setattr(debug, "STEP_VALUES", 50)
    detector.forget()
    state = ndl.Tensor([1.0])

    def train() -> None:
        nonlocal state
        for _ in range(2000):
            state = state * 0.5  # never detached

    with pytest.warns(MemoryGrowthWarning) as caught:
        train()
    assert f":{line_of('# never detached')}" in str(caught[0].message)


def test_right_training_and_growing_data_are_quiet(detector) -> None:
    x, y, w = regression()
    kept = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(200):
            loss = loss_of(x, y, w)
            loss.backward()
            w.data = w.data - 0.01 * w.grad.data
            kept.append(loss.detach())
    assert len(kept) == 200


def test_cycles_that_python_will_free_are_quiet(detector) -> None:
    _, y, w = regression()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(200):
            x = ndl.Tensor(
                np.random.default_rng(seed).standard_normal((8, 3))
            )  # x.grad -> ... -> x
            loss_of(x, y, w).backward()
            w.data = w.data - 0.01 * w.grad.data


def test_memory_reports_bytes_and_values() -> None:
    gc.collect()
    before = ndl.memory.report()
    x = ndl.Tensor(np.zeros((256, 1024), np.float32))
    y = x.reshape((1024, 256))
    assert ndl.memory.live() - before.live == 2**20
    assert ndl.memory.live_values() - before.live_values == 2
    assert ndl.memory.peak() >= ndl.memory.live()
    assert "live values" in str(ndl.memory.report())
    del x, y
    assert ndl.memory.live() == before.live
    ndl.memory.reset_peak()
    assert ndl.memory.peak() == ndl.memory.live()
