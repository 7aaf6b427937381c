"""State dicts of PyTorch's order of axes, as `load_state_dict` takes them. Next: fold.py.

model.load_state_dict(nn.from_torch(model, load_tensors("model.safetensors")[0]))
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from needle.autograd import Tensor
from needle.nn.module import Module, join, state_of

COUNTER = "num_batches_tracked"  # of PyTorch's batch norm, which no forward pass reads


def from_torch(model: Module, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors or arrays of a state dict, or of a safetensors file, in the model's own order.

    Weights of convolutions (out, in / groups, *kernel) become (*kernel, in / groups, out), those of
    their transposes (in, out / groups, *kernel) become (*kernel, out / groups, in), those of linear
    layers (out, in) become (in, out), and biases (out,) take the model's shape. Paths that the
    model lacks stay, so that `load_state_dict` reports them; counters of batches go.
    """
    own, turned = state_of(model), outputs_first(model)
    found = {}
    for path, value in state.items():
        x = np.asarray(value.numpy() if isinstance(value, Tensor) else value)
        if path in turned and x.ndim > 1:
            x = x.transpose(*range(2, x.ndim), 1, 0)
        if path in own and x.shape == tuple(n for n in own[path].shape if n != 1):
            x = x.reshape(own[path].shape)
        if path in own or path.rpartition(".")[2] != COUNTER:
            found[path] = x
    return found


def outputs_first(model: Module) -> set[str]:
    """The paths of the tensors that PyTorch keeps with their outputs first."""
    modules = model.named_modules()
    return {join(path, name) for path, each in modules for name in each.outputs_first}
