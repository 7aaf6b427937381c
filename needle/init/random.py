"""Random tensors, and the two sources that they are drawn from.

Until `seed` is called, draws come from NumPy's global generator, in the order of the calls. After
`seed(n)` they come from a counter-based generator: its state (key, counter) is a Tensor,
`generator().state`, each draw reads it and moves the counter by a number that its shape alone
decides. Next: initializers.py.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.array.spec import as_shape
from needle.autograd import MODE, Tensor, no_grad
from needle.backend.device import Device, default_device
from needle.dtype import FLOATS, DType, as_dtype, float32, float64, int64
from needle.errors import expect
from needle.ops import argsort, astype, cos, floor, less_equal, log, sqrt
from needle.ops.random import RandomUniform


class Generator:
    """Draws from Philox at (key, counter); the state is a Tensor and part of a checkpoint."""

    def __init__(self, seed: int, device: Device | None = None) -> None:
        start = np.array([seed, 0], np.int64)
        self.state = Tensor(start, device=device, requires_grad=False)
        self.lock = threading.Lock()  # two threads shall not draw the same numbers

    def uniform(self, shape: tuple[int, ...], dtype: Any, device: Device) -> Tensor:
        """Numbers in [0, 1)."""
        op = RandomUniform(shape, dtype)
        with no_grad(), self.lock:
            state = self.state if device is self.state.device else self.state.to(device)
            drawn = op(state.detach())
            self.state.data = self.state.detach() + np.array([0, op.blocks], np.int64)
        return drawn

    def normal(self, shape: tuple[int, ...], dtype: Any, device: Device) -> Tensor:
        """Standard normal numbers, by the transform of Box and Muller (1958)."""
        with no_grad():
            wide = dtype if dtype.itemsize >= 4 else float32
            u = self.uniform((2, *shape), wide, device)
            return astype(sqrt(log(1.0 - u[0]) * -2.0) * cos(u[1] * (2 * math.pi)), dtype)

    def __repr__(self) -> str:
        key, counter = self.state.tolist()
        return f"Generator(seed={key}, counter={counter})"


class Source:
    """Where draws come from: a Generator, or NumPy's global state while it is None."""

    generator: Generator | None = None


def seed(n: int) -> None:
    """Draw from a generator of our own from now on, beginning with seed n; equal seeds give equal
    numbers."""
    is_integer = isinstance(n, (int, np.integer)) and not isinstance(n, bool)
    expect(is_integer, f"seed: expected an integer; received {n!r}", TypeError)
    expect(-(2**63) <= n < 2**63, f"seed: expected an integer of 64 bits; received {n}")
    if Source.generator is None:
        Source.generator = Generator(int(n))
    else:
        Source.generator.state.data = np.array([int(n), 0], np.int64)


def generator() -> Generator | None:
    """The generator that `seed` began, or None where NumPy's global state is used."""
    return Source.generator


def drawing(device: Device) -> Generator | None:
    """Where the next draw comes from; a jitted function's own generator where NumPy's global one
    would bake its numbers in."""
    if MODE.trace is not None:
        return MODE.trace.generator(device)
    return Source.generator if MODE.draw_from is None else MODE.draw_from(device)


@dataclass
class Placement:
    """What all functions here take by name: device=None (the default one), dtype, requires_grad.

    A device that this machine lacks is refused before anything is drawn.
    """

    device: Any = None
    dtype: Any = "float32"
    requires_grad: bool = False

    def __post_init__(self) -> None:
        self.device = self.device or default_device()
        self.dtype = as_dtype(self.dtype)
        usable = isinstance(self.device, Device) and self.device.enabled()
        received = f"received {self.device}; use ndl.cpu()"
        expect(usable, f"init: expected a device that this machine has; {received}")

    def float(self, name: str) -> DType:
        is_float = self.dtype in FLOATS
        expect(is_float, f"{name}: expected a float dtype; received {self.dtype}", TypeError)
        return self.dtype

    def tensor(self, array: Any) -> Tensor:
        """A leaf here, of an array's values."""
        if isinstance(array, Tensor):
            array = astype(array, self.dtype)
            array.requires_grad = self.requires_grad and self.dtype in FLOATS
            return array
        return Tensor.make_const(NDArray(array, self.device, self.dtype), self.requires_grad)


def as_sizes(name: str, shape: tuple[Any, ...]) -> tuple[int, ...]:
    """The shape of `rand(2, 3)` and of `rand((2, 3))`."""
    sizes = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else shape
    return as_shape(name, sizes)


def rand(*shape: Any, low: float = 0.0, high: float = 1.0, **placement: Any) -> Tensor:
    """Uniform numbers in [low, high); device, dtype and requires_grad by name."""
    place, sizes = Placement(**placement), as_sizes("rand", shape)
    dtype = place.float("rand")
    source = drawing(place.device)
    if source is None:
        return place.tensor(place.device.rand(*sizes) * (high - low) + low)
    return place.tensor(source.uniform(sizes, dtype, place.device) * (high - low) + low)


def randn(*shape: Any, mean: float = 0.0, std: float = 1.0, **placement: Any) -> Tensor:
    """Numbers from a normal distribution; device, dtype and requires_grad by name."""
    place, sizes = Placement(**placement), as_sizes("randn", shape)
    dtype = place.float("randn")
    source = drawing(place.device)
    if source is None:
        return place.tensor(place.device.randn(*sizes) * std + mean)
    return place.tensor(source.normal(sizes, dtype, place.device) * std + mean)


def randb(*shape: Any, p: float = 0.5, dtype: Any = "bool", **placement: Any) -> Tensor:
    """True with probability p: where a uniform number is at most p."""
    place, sizes = Placement(dtype=dtype, **placement), as_sizes("randb", shape)
    source = drawing(place.device)
    if source is None:
        return place.tensor(place.device.randb(*sizes, p=p))
    return place.tensor(less_equal(source.uniform(sizes, float32, place.device), p))


def randint(
    low: int, high: int, shape: Any = (), *, device: Any = None, dtype: Any = int64
) -> Tensor:
    """Integers from low to high - 1, all equally likely."""
    expect(low < high, f"randint: expected low < high; received {low} and {high}")
    place, sizes = Placement(device, dtype), as_shape("randint", shape)
    source = drawing(place.device)
    if source is None:
        return place.tensor(np.random.randint(low, high, sizes))
    drawn = source.uniform(sizes, float64, place.device)
    return place.tensor(floor(drawn * (high - low)) + low)


def permutation(n: int, *, device: Any = None) -> Tensor:
    """The integers below n in random order."""
    place = Placement(device, int64)
    source = drawing(place.device)
    if source is None:
        return place.tensor(np.random.permutation(n))
    return argsort(source.uniform((n,), float64, place.device))
