"""Layers and models of images against PyTorch, in both channel orders and every mode."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from checks import assert_same_bits, draw

import needle as ndl
from needle import models, nn, optim
from needle.files import FileError, save_tensors
from needle.models.resnet import BasicBlock, Bottleneck, ResNet
from needle.nn import functional as F
from needle.nn import nn_basic, nn_conv

CLOSE = 1e-10
Layer = Callable[[dict[str, Any]], nn.Module]


def assert_near(found: Any, expected: Any, name: str = "") -> None:
    """Float64 results that agree to 1e-10 of the largest element."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, f"{name}: {found.shape}, expected {expected.shape}"
    scale = max(float(np.abs(expected).max(initial=0)), 1.0)
    off = float(np.abs(found - expected).max(initial=0))
    assert off <= CLOSE * scale, f"{name}: off by {off:.3g} of {scale:.3g}"


# Layers

D: dict[str, Any] = {"dtype": "float64"}
IMAGE = (2, 4, 7, 6)
LAYERS: dict[str, tuple[Callable[..., nn.Module], Callable[[Any], Any], tuple[int, ...]]] = {
    "conv1d": (
        lambda **k: nn.Conv1d(4, 6, 3, 2, 1, **D, **k),
        lambda t: t.Conv1d(4, 6, 3, 2, 1),
        (2, 4, 9),
    ),
    "conv2d same": (
        lambda **k: nn.Conv2d(4, 5, (3, 5), padding="same", **D, **k),
        lambda t: t.Conv2d(4, 5, (3, 5), padding="same"),
        IMAGE,
    ),
    "conv2d valid, without bias": (
        lambda **k: nn.Conv2d(4, 5, 3, (2, 1), "valid", bias=False, **D, **k),
        lambda t: t.Conv2d(4, 5, 3, (2, 1), "valid", bias=False),
        IMAGE,
    ),
    "conv2d dilation, groups": (
        lambda **k: nn.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2, **D, **k),
        lambda t: t.Conv2d(4, 6, 3, padding=2, dilation=2, groups=2),
        IMAGE,
    ),
    "conv2d depthwise": (
        lambda **k: nn.Conv2d(4, 8, 3, 2, 1, groups=4, **D, **k),
        lambda t: t.Conv2d(4, 8, 3, 2, 1, groups=4),
        IMAGE,
    ),
    "conv1d reflect": (
        lambda **k: nn.Conv1d(4, 6, 3, 2, 3, padding_mode="reflect", **D, **k),
        lambda t: t.Conv1d(4, 6, 3, 2, 3, padding_mode="reflect"),
        (2, 4, 9),
    ),
    "conv2d circular, same, dilation": (
        lambda **k: nn.Conv2d(
            4, 6, (4, 3), padding="same", dilation=2, groups=2, padding_mode="circular", **D, **k
        ),
        lambda t: t.Conv2d(
            4, 6, (4, 3), padding="same", dilation=2, groups=2, padding_mode="circular"
        ),
        IMAGE,
    ),
    "conv3d replicate": (
        lambda **k: nn.Conv3d(2, 3, 3, (1, 2, 1), (1, 4, 0), padding_mode="replicate", **D, **k),
        lambda t: t.Conv3d(2, 3, 3, (1, 2, 1), (1, 4, 0), padding_mode="replicate"),
        (2, 2, 3, 4, 3),
    ),
    "conv3d": (
        lambda **k: nn.Conv3d(2, 3, (2, 3, 1), (1, 2, 1), (1, 0, 0), **D, **k),
        lambda t: t.Conv3d(2, 3, (2, 3, 1), (1, 2, 1), (1, 0, 0)),
        (2, 2, 3, 5, 2),
    ),
    "course's conv": (
        lambda **k: nn.Conv(4, 5, 3, 2, **D),
        lambda t: t.Conv2d(4, 5, 3, 2, 1),
        IMAGE,
    ),
    "conv transpose 1d": (
        lambda **k: nn.ConvTranspose1d(4, 6, 3, 2, groups=2, **D, **k),
        lambda t: t.ConvTranspose1d(4, 6, 3, 2, groups=2),
        (2, 4, 5),
    ),
    "conv transpose 2d": (
        lambda **k: nn.ConvTranspose2d(4, 3, 3, 2, 1, 1, dilation=2, **D, **k),
        lambda t: t.ConvTranspose2d(4, 3, 3, 2, 1, 1, dilation=2),
        (2, 4, 3, 4),
    ),
    "conv transpose 3d": (
        lambda **k: nn.ConvTranspose3d(2, 3, 2, 2, bias=False, **D, **k),
        lambda t: t.ConvTranspose3d(2, 3, 2, 2, bias=False),
        (1, 2, 2, 3, 2),
    ),
    "batch norm 2d": (
        lambda **k: nn.BatchNorm2d(4, 1e-3, **D, **k),
        lambda t: t.BatchNorm2d(4, 1e-3),
        IMAGE,
    ),
    "batch norm 3d": (
        lambda **k: nn.BatchNorm3d(2, **D, **k),
        lambda t: t.BatchNorm3d(2),
        (2, 2, 3, 4, 2),
    ),
    "batch norm 2d, evaluation": (
        lambda **k: nn.BatchNorm2d(4, **D, **k).eval(),
        lambda t: t.BatchNorm2d(4).eval(),
        IMAGE,
    ),
    "instance norm 1d": (
        lambda **k: nn.InstanceNorm1d(4, **D, **k),
        lambda t: t.InstanceNorm1d(4),
        (2, 4, 9),
    ),
    "instance norm 2d": (
        lambda **k: nn.InstanceNorm2d(4, 1e-3, affine=True, **D, **k),
        lambda t: t.InstanceNorm2d(4, 1e-3, affine=True),
        IMAGE,
    ),
    "instance norm 3d": (
        lambda **k: nn.InstanceNorm3d(2, affine=True, **D, **k),
        lambda t: t.InstanceNorm3d(2, affine=True),
        (2, 2, 3, 4, 2),
    ),
    "instance norm 2d, running statistics": (
        lambda **k: nn.InstanceNorm2d(4, 1e-3, 0.3, True, True, **D, **k),
        lambda t: t.InstanceNorm2d(4, 1e-3, 0.3, True, True),
        IMAGE,
    ),
    "instance norm 1d, running statistics, evaluation": (
        lambda **k: nn.InstanceNorm1d(4, track_running_stats=True, **D, **k).eval(),
        lambda t: t.InstanceNorm1d(4, track_running_stats=True).eval(),
        (2, 4, 9),
    ),
    "max pool 1d": (
        lambda **k: nn.MaxPool1d(3, 2, 1, ceil_mode=True, **k),
        lambda t: t.MaxPool1d(3, 2, 1, ceil_mode=True),
        (2, 4, 10),
    ),
    "max pool 2d": (lambda **k: nn.MaxPool2d(2, **k), lambda t: t.MaxPool2d(2), IMAGE),
    "max pool 2d, dilation": (
        lambda **k: nn.MaxPool2d((3, 2), 2, 1, 2, **k),
        lambda t: t.MaxPool2d((3, 2), 2, 1, 2),
        IMAGE,
    ),
    "max pool 3d": (
        lambda **k: nn.MaxPool3d(2, 1, **k),
        lambda t: t.MaxPool3d(2, 1),
        (2, 2, 3, 4, 2),
    ),
    "avg pool 1d": (
        lambda **k: nn.AvgPool1d(3, 2, 1, True, **k),
        lambda t: t.AvgPool1d(3, 2, 1, True),
        (2, 4, 10),
    ),
    "avg pool 2d": (
        lambda **k: nn.AvgPool2d(3, 2, 1, True, False, **k),
        lambda t: t.AvgPool2d(3, 2, 1, True, False),
        IMAGE,
    ),
    "avg pool 2d, divisor": (
        lambda **k: nn.AvgPool2d((2, 3), divisor_override=5, **k),
        lambda t: t.AvgPool2d((2, 3), divisor_override=5),
        IMAGE,
    ),
    "avg pool 2d, large": (
        lambda **k: nn.AvgPool2d(6, 1, 2, count_include_pad=False, **k),
        lambda t: t.AvgPool2d(6, 1, 2, count_include_pad=False),
        IMAGE,
    ),
    "avg pool 3d": (lambda **k: nn.AvgPool3d(2, **k), lambda t: t.AvgPool3d(2), (2, 2, 3, 4, 2)),
    "adaptive max pool 2d": (
        lambda **k: nn.AdaptiveMaxPool2d((3, 4), **k),
        lambda t: t.AdaptiveMaxPool2d((3, 4)),
        IMAGE,
    ),
    "global max pool": (
        lambda **k: nn.AdaptiveMaxPool3d(1, **k),
        lambda t: t.AdaptiveMaxPool3d(1),
        (2, 2, 3, 4, 2),
    ),
    "adaptive avg pool 1d": (
        lambda **k: nn.AdaptiveAvgPool1d(5, **k),
        lambda t: t.AdaptiveAvgPool1d(5),
        (2, 4, 9),
    ),
    "adaptive avg pool 2d": (
        lambda **k: nn.AdaptiveAvgPool2d((None, 4), **k),
        lambda t: t.AdaptiveAvgPool2d((None, 4)),
        IMAGE,
    ),
    "global avg pool": (
        lambda **k: nn.AdaptiveAvgPool2d(1, **k),
        lambda t: t.AdaptiveAvgPool2d(1),
        IMAGE,
    ),
    "upsample": (
        lambda **k: nn.Upsample(scale_factor=(2, 1.5), **k),
        lambda t: t.Upsample(scale_factor=(2, 1.5)),
        IMAGE,
    ),
    "upsample bilinear": (
        lambda **k: nn.Upsample((9, 4), mode="bilinear", **k),
        lambda t: t.Upsample((9, 4), mode="bilinear"),
        IMAGE,
    ),
    "upsample bilinear, corners": (
        lambda **k: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True, **k),
        lambda t: t.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        IMAGE,
    ),
    "upsample trilinear": (
        lambda **k: nn.Upsample(scale_factor=1.6, mode="trilinear", **k),
        lambda t: t.Upsample(scale_factor=1.6, mode="trilinear"),
        (1, 2, 3, 4, 2),
    ),
    "pixel shuffle": (
        lambda **k: nn.PixelShuffle(2, **k),
        lambda t: t.PixelShuffle(2),
        (2, 8, 3, 4),
    ),
    "pixel unshuffle": (
        lambda **k: nn.PixelUnshuffle(2, **k),
        lambda t: t.PixelUnshuffle(2),
        (2, 2, 4, 6),
    ),
}


def tied(*shape: int) -> np.ndarray:
    """Small whole numbers, so that windows have several largest elements."""
    return np.random.default_rng(3).integers(-2, 3, shape).astype(np.float64)


def randomize(module: nn.Module) -> None:
    for index, x in enumerate([*module.parameters(), *module.buffers()]):
        value = np.abs(draw(*x.shape, seed=index + 7)) + 0.5
        x.data = ndl.Tensor(value.astype(x.dtype))


def from_here(module: nn.Module, other: Any, torch: Any) -> None:
    """Give PyTorch's module the values of ours, by their definition: outputs first."""
    ours, found = module.state_dict(), {}
    for path, x in other.state_dict().items():
        if path.endswith("num_batches_tracked"):
            found[path] = x
            continue
        value = ours[path].numpy()
        if value.ndim > 2 or (value.ndim == 2 and x.ndim == 2):
            value = np.moveaxis(np.swapaxes(value, -1, -2), (-2, -1), (0, 1))
        found[path] = torch.tensor(np.ascontiguousarray(value).reshape(tuple(x.shape)))
    other.load_state_dict(found)


def as_ours(path: str, grad: Any, like: Any) -> np.ndarray:
    """A gradient of PyTorch's in our order of axes."""
    value = grad.numpy()
    if value.ndim > 1:
        value = np.swapaxes(np.moveaxis(value, (0, 1), (-2, -1)), -1, -2)
    return value.reshape(like.shape)


@pytest.mark.parametrize("name", LAYERS)
def test_layers_agree_with_pytorch(name: str, torch: ModuleType) -> None:
    make, make_other, shape = LAYERS[name]
    layer, other = make(), make_other(torch.nn).double()
    randomize(layer)
    from_here(layer, other, torch)
    data = tied(*shape) if "max" in name else draw(*shape)
    x, z = ndl.Tensor(data), torch.tensor(data, requires_grad=True)
    y, w = layer(x), other(z)
    assert_near(y.numpy(), w.detach(), "y")
    out_grad = draw(*y.shape, seed=1)
    y.backward(ndl.Tensor(out_grad))
    w.backward(torch.tensor(out_grad))
    assert x.grad is not None
    assert_near(x.grad.numpy(), z.grad, "dx")
    for (path, p), q in zip(layer.named_parameters(), other.parameters(), strict=True):
        assert p.grad is not None
        assert_near(p.grad.numpy(), as_ours(path, q.grad, p), path)


@pytest.mark.parametrize("name", [name for name in LAYERS if "course" not in name])
def test_channels_last_gives_the_same_bits(name: str) -> None:
    make, _, shape = LAYERS[name]
    first, last = make(), make(channels_last=True)
    for layer in (first, last):
        randomize(layer)
    data = draw(*shape)
    x, z = ndl.Tensor(data), ndl.Tensor(np.moveaxis(data, 1, -1).copy())
    y, w = first(x), last(z)
    assert_same_bits(np.moveaxis(w.numpy(), -1, 1), y)
    out_grad = draw(*y.shape, seed=1)
    y.backward(ndl.Tensor(out_grad))
    w.backward(ndl.Tensor(np.moveaxis(out_grad, 1, -1).copy()))
    assert_same_bits(np.moveaxis(z.grad.numpy(), -1, 1), x.grad)  # type: ignore[union-attr]


def test_max_pool_at_nan_and_infinity(torch: ModuleType) -> None:
    data = np.array([[[np.nan, 1.0, -np.inf, -np.inf, 2.0, np.inf, 5.0, np.nan]]])
    x, z = ndl.Tensor(data), torch.tensor(data, requires_grad=True)
    y, w = nn.MaxPool1d(2)(x), torch.nn.MaxPool1d(2)(z)
    np.testing.assert_array_equal(y.numpy(), w.detach().numpy())
    y.backward(ndl.Tensor(np.arange(1.0, 5.0).reshape(1, 1, 4)))
    w.backward(torch.arange(1.0, 5.0, dtype=torch.float64).reshape(1, 1, 4))
    np.testing.assert_array_equal(x.grad.numpy(), z.grad.numpy())  # type: ignore[union-attr]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_dropout_drops_whole_channels(count: int) -> None:
    layer = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[count - 1]
    x = ndl.ones(20, 10, *range(2, 2 + count))
    y = layer(0.25)(x).numpy().reshape(20, 10, -1)
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y == y[:, :, :1]).all()
    assert 0.6 < (y[:, :, 0] > 0).mean() < 0.9
    assert layer(0.25).eval()(x) is not None
    assert_same_bits(layer(0.25).eval()(x), x)
    last = layer(0.25, channels_last=True)(x).numpy()
    assert (last == last[(slice(None), *[slice(1)] * count)]).all()


def test_the_courses_conv_draws_weight_then_bias() -> None:
    np.random.seed(4)
    layer = nn.Conv(3, 8, 5)
    np.random.seed(4)
    bound = np.sqrt(2.0) * np.sqrt(3 / 75)
    weight = (np.random.rand(5, 5, 3, 8) * 2 * bound - bound).astype(np.float32)
    bias = np.random.rand(8) * 2 / np.sqrt(75) - 1 / np.sqrt(75)
    np.testing.assert_allclose(layer.weight.numpy(), weight, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(layer.bias.numpy(), bias, rtol=1e-5, atol=1e-6)  # type: ignore
    assert layer(ndl.ones(1, 3, 6, 7)).shape == (1, 8, 6, 7)
    assert nn_conv.Conv is nn.Conv
    assert nn_conv.BatchNorm2d is nn_basic.BatchNorm2d is nn.BatchNorm2d


def test_running_statistics_of_images_are_biased() -> None:
    layer, x = nn.BatchNorm2d(3, momentum=0.2, **D), draw(4, 3, 5, 2) * 3 + 1
    layer(ndl.Tensor(x))
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.2 * x.mean((0, 2, 3)), rtol=1e-12)
    expected = 0.8 + 0.2 * x.var((0, 2, 3))
    np.testing.assert_allclose(layer.running_var.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_running_statistics_of_instances(channels_last: bool, torch: ModuleType) -> None:
    order = {"channels_last": channels_last}
    layer = nn.InstanceNorm2d(3, momentum=0.2, track_running_stats=True, **D, **order)
    other = torch.nn.InstanceNorm2d(3, momentum=0.2, track_running_stats=True).double()
    twin = copy.deepcopy(layer)
    compiled = ndl.jit(lambda x: twin(x))
    mean, var = np.zeros(3), np.ones(3)
    for seed in range(2):
        x = draw(4, 3, 5, 2, seed=seed) * 3 + 1
        z = ndl.Tensor(np.moveaxis(x, 1, -1).copy() if channels_last else x)
        assert_same_bits(compiled(z), layer(z))
        for a, b in zip(twin.buffers(), layer.buffers(), strict=True):
            assert_same_bits(a, b)
        other(torch.tensor(x))
        mean = 0.8 * mean + 0.2 * x.mean((2, 3)).mean(0)
        var = 0.8 * var + 0.2 * x.var((2, 3)).mean(0)
        assert_near(layer.running_mean.numpy(), other.running_mean)  # type: ignore[union-attr]
        assert_near(layer.running_mean.numpy(), mean)  # type: ignore[union-attr]
        assert_near(layer.running_var.numpy(), var)  # type: ignore[union-attr]
    assert [path for path, _ in layer.named_buffers()] == ["running_mean", "running_var"]
    assert not nn.InstanceNorm2d(3).buffers()


@pytest.mark.parametrize("axis", [1, 2, 3])
def test_padding_of_turned_images(axis: int) -> None:
    """Few channels, so that the nest's last axes change places."""
    data, widths = draw(2, 2, 3, 5, 2), [(0, 0)] * 5
    widths[axis] = (1, 2)
    turned = ndl.permute(ndl.Tensor(data), (0, 2, 3, 4, 1))
    expected = np.pad(np.moveaxis(data, 1, -1), widths)
    assert_same_bits(ndl.pad(turned, widths), expected)


# Errors

ERRORS: list[tuple[Callable[[], Any], str]] = [
    (
        lambda: nn.Conv2d(3, 4, 3)(ndl.ones(2, 4, 8, 8)),
        r"Conv2d: expected 3 channels; received 4 of shape \(2, 4, 8, 8\)",
    ),
    (
        lambda: nn.Conv2d(3, 4, 3)(ndl.ones(3, 8, 8)),
        r"conv2d: expected images of shape \(n, channels, height, width\); received \(3, 8, 8\)",
    ),
    (
        lambda: nn.Conv2d(3, 4, 3, channels_last=True)(ndl.ones(2, 3, 8, 8)),
        "Conv2d: expected 3 channels; received 8",
    ),
    (lambda: nn.Conv2d(3, 4, 9)(ndl.ones(1, 3, 8, 8)), "conv: expected padded sizes of at least"),
    (lambda: nn.Conv2d(3, 4, 3, groups=2), "Conv2d: expected channels that groups divide"),
    (
        lambda: nn.Conv2d(3, 4, 3, padding_mode="mirror"),
        "Conv2d: expected padding_mode to be one of zeros, reflect, replicate, circular; "
        "received 'mirror'",
    ),
    (
        lambda: nn.ConvTranspose2d(3, 4, 3, padding_mode="reflect"),
        "ConvTranspose2d: expected padding_mode to be one of zeros; received 'reflect'",
    ),
    (
        lambda: nn.Conv2d(3, 4, 3, padding=3, padding_mode="reflect")(ndl.ones(1, 3, 4, 3)),
        r"pad: expected 'reflect' widths of at most 2 for size 3; received \(3, 3\)",
    ),
    (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")(ndl.ones(3, 8, 8)),
        r"conv2d: expected images of shape \(n, channels, height, width\); received \(3, 8, 8\)",
    ),
    (lambda: nn.Conv2d(3, 4, (3, 3, 3)), "Conv2d: expected kernel_size to be one integer or 2"),
    (lambda: nn.Conv3d(3, 4, 0), "Conv3d: expected kernel_size"),
    (
        lambda: F.conv2d(ndl.ones(1, 2, 4, 4), ndl.ones(3, 3, 2, 5), ndl.ones(4)),
        r"conv: expected bias of shape \(5,\); received \(4,\)",
    ),
    (
        lambda: nn.BatchNorm2d(3)(ndl.ones(2, 4, 5, 5)),
        r"batch_norm: expected x of shape \(n, 3, height, width\); received \(2, 4, 5, 5\)",
    ),
    (
        lambda: nn.BatchNorm1d(3)(ndl.ones(2, 4)),
        r"batch_norm: expected x of shape \(n, 3\) or \(n, 3, length\); received \(2, 4\)",
    ),
    (
        lambda: nn.InstanceNorm3d(3)(ndl.ones(2, 3, 5, 5)),
        r"instance_norm: expected x of shape \(n, 3, depth, height, width\)",
    ),
    (
        lambda: nn.InstanceNorm2d(3, momentum=1.5),
        "instance_norm: expected 0 <= momentum <= 1; received 1.5",
    ),
    (
        lambda: F.instance_norm(ndl.ones(2, 3, 5), use_input_stats=False),
        "instance_norm: expected running_mean and running_var in evaluation",
    ),
    (
        lambda: F.instance_norm(ndl.ones(2, 3, 5), ndl.ones(2)),
        r"instance_norm: expected running_mean of shape \(3,\); received \(2,\)",
    ),
    (lambda: nn.MaxPool2d(5)(ndl.ones(1, 1, 4, 4)), r"max_pool: expected padded sizes of at least"),
    (lambda: nn.MaxPool2d(3, padding=2)(ndl.ones(1, 1, 4, 4)), "at most half the window's"),
    (lambda: nn.AvgPool2d((2, 2, 2))(ndl.ones(1, 1, 4, 4)), "avg_pool: expected kernel_size"),
    (lambda: nn.AvgPool2d(2, divisor_override=0)(ndl.ones(1, 1, 4, 4)), "divisor_override other"),
    (lambda: nn.AdaptiveAvgPool2d(0)(ndl.ones(1, 1, 4, 4)), "adaptive_avg_pool"),
    (lambda: nn.AdaptiveAvgPool2d((1, 1, 1))(ndl.ones(1, 1, 4, 4)), "output_size for 2 axes"),
    (lambda: nn.Upsample()(ndl.ones(1, 1, 4, 4)), "either size or scale_factor"),
    (lambda: nn.Upsample(2, mode="linear")(ndl.ones(1, 1, 4, 4)), "the linear one of 2 axes"),
    (lambda: nn.PixelShuffle(2)(ndl.ones(1, 6, 4, 4)), "channels divisible by 4"),
    (lambda: nn.PixelUnshuffle(3)(ndl.ones(1, 6, 4, 4)), "sizes divisible by 3"),
    (lambda: nn.Dropout2d(1.5), "dropout: expected p between 0 and 1"),
    (lambda: nn.Dropout2d()(ndl.ones(2, 3)), "dropout2d: expected images of shape"),
    (lambda: models.resnet18(stem="imagnet"), "expected stem 'imagenet' or 'cifar'"),
]


@pytest.mark.parametrize("wrong", ERRORS, ids=lambda each: each[1][:40])
def test_errors(wrong: tuple[Callable[[], Any], str]) -> None:
    with pytest.raises((ValueError, TypeError), match=wrong[1]):
        wrong[0]()


def test_images_of_mixed_sizes_are_refused() -> None:
    images = [draw(3, 8, 8), draw(3, 8, 9)]
    with pytest.raises(ValueError, match=r"stack: expected equal shapes; received \[\(3, 8, 8\)"):
        ndl.stack([ndl.Tensor(x) for x in images])
    with pytest.raises((ValueError, TypeError), match="Tensor: expected"):
        ndl.Tensor(images)


# Models


def torch_block(t: Any, inputs: int, width: int, stride: int, wide: bool) -> Any:
    """torchvision's BasicBlock and Bottleneck."""

    class Block(t.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]
            if not wide:
                sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
            for i, (a, b, k, s) in enumerate(sizes, 1):
                setattr(self, f"conv{i}", t.Conv2d(a, b, k, s, k // 2, bias=False))
                setattr(self, f"bn{i}", t.BatchNorm2d(b))
            self.count, outputs = len(sizes), sizes[-1][1]
            self.downsample = None
            if stride > 1 or inputs != outputs:
                first = t.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = t.Sequential(first, t.BatchNorm2d(outputs))

        def forward(self, x: Any) -> Any:
            y = x
            for i in range(1, self.count + 1):
                y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
                y = y.relu() if i < self.count else y
            return (y + (x if self.downsample is None else self.downsample(x))).relu()

    return Block()


def torch_resnet(t: Any, wide: bool, depths: Sequence[int], stem: str, first: int = 8) -> Any:
    """torchvision's ResNet, with fewer channels."""

    class Net(t.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            k, s = (7, 2) if stem == "imagenet" else (3, 1)
            self.conv1 = t.Conv2d(3, first, k, s, k // 2, bias=False)
            self.bn1 = t.BatchNorm2d(first)
            inputs = first
            for stage, depth in enumerate(depths):
                blocks = []
                for i in range(depth):
                    width, stride = first << stage, 2 if stage and i == 0 else 1
                    blocks.append(torch_block(t, inputs, width, stride, wide))
                    inputs = width * (4 if wide else 1)
                setattr(self, f"layer{stage + 1}", t.Sequential(*blocks))
            self.fc = t.Linear(inputs, 5)

        def forward(self, x: Any) -> Any:
            x = self.bn1(self.conv1(x)).relu()
            x = t.functional.max_pool2d(x, 3, 2, 1) if stem == "imagenet" else x
            for stage in (1, 2, 3, 4):
                x = getattr(self, f"layer{stage}")(x)
            return self.fc(x.mean((2, 3)))

    return Net()


def torch_resnet9(t: Any) -> Any:
    def part(i: int, o: int, k: int, s: int) -> Any:
        return t.Sequential(t.Conv2d(i, o, k, s, k // 2), t.BatchNorm2d(o), t.ReLU())

    class Residual(t.Module):  # type: ignore[misc, name-defined]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fn = t.Sequential(part(width, width, 3, 1), part(width, width, 3, 1))

        def forward(self, x: Any) -> Any:
            return self.fn(x) + x

    class Net(t.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layers = t.Sequential(
                part(3, 16, 7, 4), part(16, 32, 3, 2), Residual(32), part(32, 64, 3, 2),
                part(64, 128, 3, 2), Residual(128), t.Flatten(), t.Linear(128, 128), t.ReLU(),
                t.Linear(128, 10),
            )  # fmt: skip

        def forward(self, x: Any) -> Any:
            return self.layers(x)

    return Net()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], tuple[int, ...]]] = {
    "resnet9": (lambda: models.ResNet9(**D), torch_resnet9, (8, 3, 32, 32)),
    "basic blocks": (
        lambda: ResNet(BasicBlock, (1, 1, 1, 1), 5, "cifar", width=8, **D),
        lambda t: torch_resnet(t, False, (1, 1, 1, 1), "cifar"),
        (3, 3, 16, 16),
    ),
    "bottlenecks": (
        lambda: ResNet(Bottleneck, (1, 1, 1, 1), 5, "imagenet", width=8, **D),
        lambda t: torch_resnet(t, True, (1, 1, 1, 1), "imagenet"),
        (2, 3, 33, 32),
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_pytorch_over_20_steps(name: str, torch: ModuleType) -> None:
    make, make_other, shape = NETWORKS[name]
    np.random.seed(1)
    model, other = make(), make_other(torch.nn).double()
    from_here(model, other, torch)
    x, y = draw(*shape), np.arange(shape[0]) % 5
    images, labels = ndl.Tensor(x, requires_grad=False), ndl.Tensor(y, requires_grad=False)
    optimizer = optim.SGD(model.parameters(), lr=0.02)
    theirs = torch.optim.SGD(other.parameters(), lr=0.02)

    @ndl.jit
    def step(x: ndl.Tensor, y: ndl.Tensor) -> ndl.Tensor:
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.reset_grad()
        return loss.detach()

    for number in range(20):
        theirs.zero_grad()
        loss = torch.nn.functional.cross_entropy(other(torch.tensor(x)), torch.tensor(y))
        loss.backward()
        theirs.step()
        assert_near(step(images, labels).numpy(), loss.detach(), f"loss of step {number}")
    expected = nn.from_torch(model, {p: v.numpy() for p, v in other.state_dict().items()})
    for path, found in model.state_dict().items():
        if not path.endswith("running_var"):
            assert_near(found.numpy(), expected[path], path)


def small_network() -> nn.Module:
    """One of each kind of layer."""
    np.random.seed(2)

    def part(inputs: int, outputs: int, **settings: Any) -> nn.Module:
        first = nn.Conv2d(inputs, outputs, 3, padding=1, **settings)
        return nn.Sequential(first, nn.BatchNorm2d(outputs), nn.ReLU())

    tracking = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    return nn.Sequential(
        part(3, 8, stride=2), nn.Residual(part(8, 8, groups=2, padding_mode="reflect")),
        nn.MaxPool2d(3, 2, 1), nn.ConvTranspose2d(8, 6, 3, 2), tracking, nn.AvgPool2d(2),
        nn.Upsample(scale_factor=2), nn.Upsample((5, 6), mode="bilinear"), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip


def run_small(x: ndl.Tensor) -> tuple[ndl.Tensor, ...]:
    model = small_network()
    y = model(x)
    (y * y).sum().backward()
    found = [y.detach(), *[p.grad.detach() for p in model.parameters()]]  # type: ignore[union-attr]
    found += [each.detach() for each in model.buffers()]
    model.zero_grad()
    return tuple(found)


def test_every_mode_and_number_of_threads_gives_the_same_bits() -> None:
    data = draw(6, 3, 18, 15, dtype="float32")
    x = ndl.Tensor(data, requires_grad=False)
    expected = [each.numpy() for each in run_small(x)]
    assert all(np.isfinite(each).all() for each in expected)
    with ndl.lazy():
        lazily = [each.numpy() for each in run_small(x)]
    model = small_network()

    @ndl.jit
    def step(x: ndl.Tensor) -> tuple[ndl.Tensor, ...]:
        y = model(x)
        (y * y).sum().backward()
        grads = [p.grad.detach() for p in model.parameters()]  # type: ignore[union-attr]
        model.zero_grad()
        return (y.detach(), *grads)

    before = ndl.get_num_threads()
    compiled = []
    try:
        for threads in (1, 2, 3):
            ndl.set_num_threads(threads)
            compiled.append([each.numpy() for each in step(x)])
    finally:
        ndl.set_num_threads(before)
    for found in (lazily, *compiled):
        for a, b in zip(found, expected, strict=False):
            assert_same_bits(a, b)
    assert len(compiled[0]) == 1 + len(model.parameters())


def test_channels_first_layers_pay_no_permutation_when_compiled() -> None:
    def nests(channels_last: bool) -> list[str]:
        settings = {"channels_last": channels_last}

        def part() -> nn.Module:
            first = nn.Conv2d(8, 8, 3, padding=1, **settings)
            return nn.Sequential(first, nn.BatchNorm2d(8, **settings), nn.ReLU())

        last = nn.MaxPool2d(2, **settings), nn.AdaptiveAvgPool2d(1, **settings), nn.Flatten()
        model = nn.Sequential(part(), nn.Residual(part()), *last)
        shape = (4, 6, 6, 8) if channels_last else (4, 8, 6, 6)

        @ndl.jit
        def step(x: ndl.Tensor) -> ndl.Tensor:
            loss = (model(x) ** 2).sum()
            loss.backward()
            return loss.detach()

        step(ndl.Tensor(draw(*shape, dtype="float32"), requires_grad=False))
        lines = step.explain().split("memory:")[0].splitlines()
        return [line for line in lines if re.match("kernel |  (rows|columns|contraction) ", line)]

    first, last = nests(False), nests(True)
    assert "rows 4 x 8 x 8, loop 8" in first[1]  # the input alone is turned, as it is padded
    assert first[2:] == last[2:]


# Files


def test_resnet_from_a_file_of_pytorchs_layout(tmp_path: Any, torch: ModuleType) -> None:
    other = torch_resnet(torch.nn, True, (1, 2, 1, 1), "imagenet").double()
    with torch.no_grad():
        for x in [*other.parameters(), *other.buffers()]:
            if x.dtype == torch.float64:
                x.copy_(torch.tensor(np.abs(draw(*x.shape, seed=x.numel())) * 0.1 + 0.05))
    other.eval()
    save_tensors(
        tmp_path / "model.safetensors", {p: x.numpy() for p, x in other.state_dict().items()}
    )
    model = ResNet.from_pretrained(tmp_path, dtype="float64").eval()
    assert len(model.layer2) == 2
    x = draw(2, 3, 40, 36)
    assert_near(model(ndl.Tensor(x)).numpy(), other(torch.tensor(x)).detach())


def test_files_of_another_network_are_refused(tmp_path: Any) -> None:
    path = tmp_path / "other.safetensors"
    save_tensors(path, {"conv1.weight": np.zeros((4, 3, 3, 3), np.float32)})
    with pytest.raises(FileError, match=r"other.safetensors: expected a ResNet .* without 'fc.w"):
        ResNet.from_pretrained(path)
    state = {"conv1.weight": np.zeros((4, 3, 3, 3)), "fc.weight": np.zeros((5, 9))}
    save_tensors(path, state)
    with pytest.raises(
        FileError, match=r"fc.weight: expected shape \(4, 5\), received \(9, 5\); missing"
    ):
        ResNet.from_pretrained(path)


def test_from_torch_leaves_what_it_does_not_know() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    state = {"0.weight": np.arange(6.0).reshape(3, 2), "0.bias": ndl.ones(3), "x": np.ones((2, 3))}
    found = nn.from_torch(model, state | {"1.num_batches_tracked": np.array(3)})
    assert found.keys() == {"0.weight", "0.bias", "x"}
    np.testing.assert_array_equal(found["0.weight"], [[0, 2, 4], [1, 3, 5]])
    assert found["0.bias"].shape == (1, 3)
    assert found["x"].shape == (2, 3)


# Folding


def assert_folds(model: nn.Module, x: np.ndarray, count: int, *inputs: Any) -> nn.Module:
    randomize(model)
    model.eval()
    before = {path: value.numpy().copy() for path, value in model.state_dict().items()}
    found = nn.fold_batchnorm(model, *inputs)
    norms = [each for each in found.modules() if isinstance(each, nn.BatchNorm2d | nn.BatchNorm1d)]
    assert len(found.folded) == count
    assert not norms
    assert not any(each.training for each in found.modules())
    assert_near(found(ndl.Tensor(x)).numpy(), model(ndl.Tensor(x)).numpy())
    for path, value in model.state_dict().items():
        assert_same_bits(value, before[path])
    return found


def test_batch_norms_fold_into_what_they_follow() -> None:
    found = assert_folds(models.ResNet9(**D), draw(2, 3, 32, 32), 8)
    assert "folded=('layers.0.0 + layers.0.1', " in repr(found)
    x = draw(2, 3, 9, 8)
    resnet = ResNet(BasicBlock, (1, 1, 1, 1), 5, "cifar", width=8, **D)
    assert_folds(resnet, x, 12, ndl.Tensor(x))
    transposed = nn.ConvTranspose2d(3, 6, 3, 2, groups=3, bias=False, **D)
    assert_folds(nn.Sequential(transposed, nn.BatchNorm2d(6, **D)), x, 1)
    grouped = nn.Conv2d(3, 6, 3, groups=3, **D)
    assert_folds(nn.Sequential(grouped, nn.BatchNorm2d(6, **D)), x, 1, ndl.Tensor(x))
    assert_folds(nn.Sequential(nn.Linear(4, 3, **D), nn.BatchNorm1d(3, **D)), draw(5, 4), 1)


class Shared(nn.Module):
    """A convolution whose output also goes elsewhere, and one that runs twice."""

    def __init__(self) -> None:
        self.a, self.b = (nn.Conv2d(2, 2, 1, **D) for _ in range(2))
        self.bn1, self.bn2 = (nn.BatchNorm2d(2, **D) for _ in range(2))

    def forward(self, x: ndl.Tensor) -> ndl.Tensor:
        y = self.a(x)
        return self.bn1(y) + y + self.bn2(self.b(self.b(x)))


def test_what_cannot_fold_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    with pytest.raises(ValueError, match=r"expected a model in evaluation mode .* received Seq"):
        nn.fold_batchnorm(model)
    model.eval()
    model.layers[1].train()
    with pytest.raises(ValueError, match="received 1 in training mode"):
        nn.fold_batchnorm(model)
    nothing = "fold_batchnorm: expected a batch norm after a convolution"
    with pytest.raises(ValueError, match=nothing):
        nn.fold_batchnorm(Shared().eval(), ndl.ones(1, 2, 3, 3, **D))
    mixed = nn.Sequential(nn.Conv2d(2, 2, 1, channels_last=True), nn.BatchNorm2d(2)).eval()
    with pytest.raises(ValueError, match=nothing):
        nn.fold_batchnorm(mixed)
