"""What every test starts from: fixed seeds, eager mode, gradients on, no clock in hypothesis."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from needle import autograd
from needle.autograd import MODE
from needle.debug import DETECTOR
from needle.init.random import Source

settings.register_profile(
    "needle",
    deadline=None,
    derandomize=True,
    max_examples=100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("needle")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew")


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """NumPy's generator seeded before each test; needle's switches as they were after it."""
    np.random.seed(0)
    Source.generator = None
    DETECTOR.forget()  # what other tests left is not this one's growth
    yield
    Source.generator = None
    switches = autograd.LAZY_MODE, MODE.lazy, MODE.tracing, MODE.grad, MODE.autocast
    autograd.LAZY_MODE = False
    autograd.change_mode({"lazy": False, "tracing": False, "grad": True, "autocast": None})
    assert switches == (False, False, False, True, None), "the test left a mode switched on"


@pytest.fixture
def rng() -> np.random.Generator:
    """A generator of the test's own."""
    return np.random.default_rng(0)


@pytest.fixture
def torch() -> ModuleType:
    """PyTorch, to compare with; tests that ask for it are skipped where it is missing."""
    return pytest.importorskip("torch")
