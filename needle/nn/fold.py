"""fold_batchnorm: a model for inference without the batch norms that follow its contractions.

z = x @ w + b;  y = (z - mean) / sqrt(var + eps) * weight + bias
-> y = x @ (w s) + ((b - mean) s + bias),  s = weight / sqrt(var + eps)
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import numpy as np

from needle.autograd import Tensor, enable_grad, find_topo_sort, lazy
from needle.errors import expect
from needle.nn.activation import Identity
from needle.nn.container import Sequential
from needle.nn.conv import Convolution, ConvTranspose
from needle.nn.linear import Linear
from needle.nn.module import Module, Parameter
from needle.nn.normalization import BatchNorm, BatchNorm1d
from needle.ops.elementwise import as_tensor


def fold_batchnorm(model: Module, *inputs: Any) -> Module:
    """A copy of a model in evaluation mode, whose batch norms are folded into the convolutions or
    linear layers (of x (n, features)) that they follow.

    Pairs are neighbours in a Sequential and, given example inputs, all that the model's graph on
    them shows; nothing is computed on them. `folded` of the copy names the pairs; the batch norms
    become Identity. Results agree within rounding. ValueError for a model, or part of one, in
    training mode, and where there is nothing to fold.
    """
    names = {module: path or type(module).__name__ for path, module in model.named_modules()}
    training = [name for module, name in names.items() if module.training]
    wanted = "fold_batchnorm: expected a model in evaluation mode (model.eval())"
    expect(not training, f"{wanted}; received {', '.join(training[:3])} in training mode")
    pairs = neighbours(model) | (followers(model, inputs) if inputs else {})
    hint = "a batch norm after a convolution or linear layer in a Sequential, or example inputs"
    expect(pairs, f"fold_batchnorm: expected {hint} that show the order; received neither")
    twins: dict[int, Any] = {id(norm): Identity().eval() for norm in pairs}  # of what is copied
    found = copy.deepcopy(model, twins)
    for norm, layer in pairs.items():
        fold(twins[id(layer)], norm)
    found.folded = tuple(f"{names[layer]} + {names[norm]}" for norm, layer in pairs.items())  # type: ignore[attr-defined]
    return found


def can_fold(layer: Any, norm: Any) -> bool:
    if isinstance(layer, Convolution) and isinstance(norm, BatchNorm):
        return (layer.out_channels, layer.channels_last) == (norm.dim, norm.channels_last)
    return isinstance(layer, Linear) and isinstance(norm, BatchNorm1d)


def neighbours(model: Module) -> dict[Module, Module]:
    """Batch norms, with what they follow in a Sequential and nowhere else."""
    rows = [list(each) for each in model.modules() if isinstance(each, Sequential)]
    times = Counter(id(module) for row in rows for module in row)
    return {
        norm: layer
        for row in rows
        for layer, norm in zip(row, row[1:], strict=False)
        if can_fold(layer, norm) and times[id(layer)] == times[id(norm)] == 1
    }


def followers(model: Module, inputs: Any) -> dict[Module, Module]:
    """Batch norms, with the layer whose output is their input and nobody else's."""
    calls: list[tuple[Module, Any, Any]] = []

    def note(module: Module, args: Any, y: Any) -> None:
        calls.append((module, args[0], y))

    layers = [
        each for each in model.modules() if isinstance(each, (Convolution, Linear, BatchNorm))
    ]
    hooks = [each.register_forward_hook(note) for each in layers]
    try:
        with lazy(), enable_grad():
            result = model(*map(as_tensor, inputs))
    finally:
        for hook in hooks:
            hook.remove()
    outputs = result if isinstance(result, (tuple, list)) else [result]
    readers = Counter(map(id, outputs))
    for y in find_topo_sort(list(outputs)):
        readers.update({id(x) for x in y.inputs or ()})
    times = Counter(id(module) for module, _, _ in calls)
    made = {id(y): module for module, _, y in calls}
    found = {norm: made[id(x)] for norm, x, _ in calls if id(x) in made and readers[id(x)] == 1}
    return {
        norm: layer
        for norm, layer in found.items()
        if can_fold(layer, norm) and times[id(layer)] == times[id(norm)] == 1
    }


def fold(layer: Any, norm: Any) -> None:
    """Give a layer the weight and the bias that make the batch norm after it needless."""
    mean, var = norm.running_mean.numpy(), norm.running_var.numpy()
    scale = norm.weight.numpy() / np.sqrt(var + norm.eps)
    weight = layer.weight.numpy()
    if isinstance(layer, ConvTranspose):  # (*kernel, out / groups, in): a group's in for its out
        groups, (out, inputs) = layer.groups, weight.shape[-2:]
        by_group = np.repeat(scale.reshape(groups, out).T, inputs // groups, axis=1)
        weight = weight * by_group
    else:
        weight = weight * scale
    bias = np.zeros_like(mean) if layer.bias is None else layer.bias.numpy()
    shifted = (bias - mean) * scale + norm.bias.numpy()
    place = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    layer.weight.data = Tensor(weight, **place)
    layer.bias = Parameter(Tensor(shifted, **place))
