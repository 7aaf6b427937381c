"""Constants and the initialisers of weights. Fans are read off a shape: (fan in, fan out) of a
Linear weight (in, out)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.array.spec import as_shape
from needle.autograd import Tensor
from needle.errors import expect
from needle.init.random import Placement, as_sizes, rand, randn
from needle.ops import one_hot as one_hot_rows


def constant(*shape: Any, c: float = 1.0, **placement: Any) -> Tensor:
    """A tensor filled with c; device, dtype and requires_grad by name."""
    place = Placement(**placement)
    array = np.full(as_sizes("constant", shape), c, place.dtype)
    return Tensor.make_const(NDArray.wrap(array, place.device), place.requires_grad)


def ones(*shape: Any, **placement: Any) -> Tensor:
    """A tensor of ones; device, dtype and requires_grad by name."""
    return constant(*shape, c=1, **placement)


def zeros(*shape: Any, **placement: Any) -> Tensor:
    """A tensor of zeros; device, dtype and requires_grad by name."""
    return constant(*shape, c=0, **placement)


def zeros_like(x: Tensor, *, device: Any = None, **placement: Any) -> Tensor:
    """Zeros of x's shape and dtype, on x's device unless told otherwise."""
    return zeros(*x.shape, device=device or x.device, dtype=x.dtype, **placement)


def ones_like(x: Tensor, *, device: Any = None, **placement: Any) -> Tensor:
    """Ones of x's shape and dtype, on x's device unless told otherwise."""
    return ones(*x.shape, device=device or x.device, dtype=x.dtype, **placement)


def one_hot(
    n: int, i: Any, device: Any = None, dtype: Any = "float32", requires_grad: bool = False
) -> Tensor:
    """Rows i of the n x n identity matrix."""
    found = one_hot_rows(i, n, dtype)
    found = found if device is None else found.to(device)
    found.requires_grad = requires_grad
    return found


GAINS = {"linear": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2.0), "selu": 3 / 4}


def calculate_gain(nonlinearity: str, param: float | None = None) -> float:
    """The factor that keeps variance through a nonlinearity: linear 1, relu sqrt(2), tanh 5/3,
    leaky_relu sqrt(2 / (1 + param^2)) with param its slope (0.01)."""
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + (0.01 if param is None else param) ** 2))
    if nonlinearity not in GAINS:
        names = ", ".join([*GAINS, "leaky_relu"])
        raise ValueError(f"calculate_gain: expected one of {names}; received {nonlinearity!r}")
    return GAINS[nonlinearity]


def fans(shape: Any) -> tuple[int, int]:
    """Fan in and fan out of a weight: (in, out) for two axes, (k..., in, out) for kernels, (n, 1)
    for a vector."""
    sizes = as_shape("fans", shape)
    expect(sizes, "fans: expected a shape with axes; received ()")
    if len(sizes) == 1:
        return sizes[0], 1
    window = math.prod(sizes[:-2])
    return sizes[-2] * window, sizes[-1] * window


def check_fan(name: str, fan: float) -> None:
    expect(fan > 0, f"{name}: expected fans above 0; received {fan}")


def kaiming_uniform(
    fan_in: int, fan_out: int, shape: Any = None, nonlinearity: str = "relu", **kwargs: Any
) -> Tensor:
    """Uniform in [-b, b], b = gain * sqrt(3 / fan_in) (He et al., 2015); of shape (fan_in, fan_out)
    by default."""
    check_fan("kaiming_uniform", fan_in)
    bound = calculate_gain(nonlinearity) * math.sqrt(3 / fan_in)
    return rand(*(shape or (fan_in, fan_out)), low=-bound, high=bound, **kwargs)


def kaiming_normal(
    fan_in: int, fan_out: int, shape: Any = None, nonlinearity: str = "relu", **kwargs: Any
) -> Tensor:
    """Normal with deviation gain / sqrt(fan_in) (He et al., 2015)."""
    check_fan("kaiming_normal", fan_in)
    std = calculate_gain(nonlinearity) / math.sqrt(fan_in)
    return randn(*(shape or (fan_in, fan_out)), std=std, **kwargs)


def xavier_uniform(
    fan_in: int, fan_out: int, gain: float = 1.0, shape: Any = None, **kwargs: Any
) -> Tensor:
    """Uniform in [-b, b], b = gain * sqrt(6 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    check_fan("xavier_uniform", fan_in + fan_out)
    bound = gain * math.sqrt(6 / (fan_in + fan_out))
    return rand(*(shape or (fan_in, fan_out)), low=-bound, high=bound, **kwargs)


def xavier_normal(
    fan_in: int, fan_out: int, gain: float = 1.0, shape: Any = None, **kwargs: Any
) -> Tensor:
    """Normal with deviation gain * sqrt(2 / (fan_in + fan_out)) (Glorot and Bengio, 2010)."""
    check_fan("xavier_normal", fan_in + fan_out)
    std = gain * math.sqrt(2 / (fan_in + fan_out))
    return randn(*(shape or (fan_in, fan_out)), std=std, **kwargs)


def lecun_uniform(fan_in: int, fan_out: int, shape: Any = None, **kwargs: Any) -> Tensor:
    """Uniform in [-b, b], b = sqrt(3 / fan_in) (LeCun et al., 1998)."""
    return kaiming_uniform(fan_in, fan_out, shape, "linear", **kwargs)


def lecun_normal(fan_in: int, fan_out: int, shape: Any = None, **kwargs: Any) -> Tensor:
    """Normal with deviation 1 / sqrt(fan_in) (LeCun et al., 1998)."""
    return kaiming_normal(fan_in, fan_out, shape, "linear", **kwargs)


def orthogonal(*shape: Any, gain: float = 1.0, **placement: Any) -> Tensor:
    """A matrix with orthonormal rows or columns, whichever are fewer, times gain (Saxe et al.,
    2014).

    Of more than two axes, all but the last are taken as one.
    """
    place, sizes = Placement(**placement), as_sizes("orthogonal", shape)
    expect(len(sizes) >= 2, f"orthogonal: expected at least 2 axes; received shape {sizes}")
    rows, columns = math.prod(sizes[:-1]), sizes[-1]
    normal = randn(max(rows, columns), min(rows, columns), dtype="float64").numpy()
    q, r = np.linalg.qr(normal)
    q = q * np.where(np.diagonal(r) < 0, -1.0, 1.0)
    q = q if rows >= columns else q.T
    return place.tensor(gain * q.reshape(sizes))


def truncated_normal(
    *shape: Any,
    mean: float = 0.0,
    std: float = 1.0,
    low: float = -2.0,
    high: float = 2.0,
    **placement: Any,
) -> Tensor:
    """Normal numbers, those outside [mean + low * std, mean + high * std] drawn again."""
    expect(low < high, f"truncated_normal: expected low < high; received {low} and {high}")
    place, sizes = Placement(**placement), as_sizes("truncated_normal", shape)
    found = randn(*sizes, dtype="float64").numpy().copy()
    outside = (found < low) | (found > high)
    while outside.any():
        found[outside] = randn(int(outside.sum()), dtype="float64").numpy()
        outside = (found < low) | (found > high)
    return place.tensor(found * std + mean)
