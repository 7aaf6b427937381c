"""Optimizer: parameters in groups, numbers that change from step to step, states. Next: rules.py.

Parameters come in with a gradient in `.grad`, which is read only; `step()` rebinds their data. A
subclass writes its states' beginning and which update of needle/ops/update.py takes one step. All
that changes lives in Tensors whose data is rebound: the learning rate and the count of steps (0-d,
float64) and the states, so that a traced step reads them anew and bakes none of them in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from numbers import Real
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.autograd import Holder, Tensor, mode
from needle.backend.device import Device
from needle.init import zeros
from needle.ops.update import update_rows, working_dtype
from needle.optim.clipping import clip_grad_norm, with_gradient
from needle.optim.options import as_option, listed

Params = Iterable[Any]  # Tensors, or dicts of groups of them
State = dict[Tensor, Tensor]  # one kind of state: parameter -> its tensor
Update = tuple[Callable[..., Any], Sequence[Tensor], Sequence[State]]


def number(value: float, device: Device) -> Tensor:
    """A number that changes from step to step: 0-d, float64."""
    return Tensor.make_const(NDArray.wrap(np.array(value, np.float64), device))


class ParameterGroup:
    """Parameters that share options: `group["lr"]`, `group["weight_decay"]`, ... read and write.

    params: the Tensors. options: all but the learning rate, which is held by `rate`, a 0-d float64
    Tensor, and read and written as a float by `lr`. What is written is checked.
    """

    def __init__(self, name: str, defaults: dict[str, Any], params: list[Any], **own: Any) -> None:
        if unknown := own.keys() - defaults.keys():
            raise TypeError(f"{name}: expected {listed(defaults)}; received {listed(unknown)}")
        self.name = name
        self.params = params
        self.options = {key: as_option(name, key, each) for key, each in (defaults | own).items()}
        self.rate = number(self.options.pop("lr"), params[0].device)

    @property
    def lr(self) -> float:
        return float(self.rate.item())

    @lr.setter
    def lr(self, value: float) -> None:
        self.rate.data = number(as_option(self.name, "lr", value), self.rate.device)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key) if key in ("lr", "params") else self.options[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "lr":
            self.lr = value
        elif key in self.options:
            self.options[key] = as_option(self.name, key, value)
        else:
            raise KeyError(f"{self.name}: expected {listed(self.options)}; received {key!r}")

    def __repr__(self) -> str:
        return f"ParameterGroup({len(self.params)} parameters, lr={self.lr}, {self.options})"


class Optimizer(Holder):
    """The base: `step()` applies the subclass's update to every parameter that has a gradient.

    params: Tensors, or dicts {"params": Tensors, "lr": ..., ...} of groups with options of their
    own. A subclass makes its states, attributes that map parameters to Tensors, and writes
    `update`:

        class Momentum(Optimizer):
            def __init__(self, params, lr=0.01, momentum=0.9):
                super().__init__(params, lr, momentum=momentum)
                self.u = self.zeros()

            def update(self, group):
                def step(p, grad, lr, u):
                    u = u * group["momentum"] + grad
                    return p - lr.astype(p.dtype) * u, u

                return step, (group.rate,), (self.u,)

    ValueError, TypeError: parameters that are missing, given twice, not leaves, on several devices
    or need no gradient; options out of range.
    """

    def __init__(self, params: Params, lr: float = 0.01, **options: Any) -> None:
        self.name = type(self).__name__
        defaults = {"lr": lr, **options}
        groups = as_groups(self.name, params)
        self.param_groups = [ParameterGroup(self.name, defaults, **group) for group in groups]
        self.params = [p for group in self.param_groups for p in group.params]
        check_parameters(self.name, self.params)
        self.t = number(0.0, self.params[0].device)

    # What a subclass uses and writes

    def zeros(self, option: str | None = None) -> State:
        """A state that begins as zeros, for the groups in which `option` is set (all if None)."""
        groups = [group for group in self.param_groups if option is None or group[option]]
        return {p: self.zeros_for(p, p.shape) for group in groups for p in group.params}

    def zeros_for(self, p: Tensor, shape: Sequence[int]) -> Tensor:
        """A state of one parameter: in its dtype, in float32 for float16 and bfloat16."""
        return zeros(*shape, device=p.device, dtype=working_dtype(p.dtype))

    def update(self, group: ParameterGroup) -> Update:
        """How this step changes the group's parameters: (function, numbers, states).

        p, *states = function(p, grad, *numbers, *states), for each p the states that hold it. The
        count of this step is `self.t`, from 1. Called under `no_grad()`, once per group and step.
        """
        raise NotImplementedError(f"{self.name}: update is not written")

    # What a user calls

    def step(self) -> None:
        """Update every parameter that has a gradient, once.

        ValueError, before anything is changed, where none has one or a gradient's shape is wrong.
        """
        for p in with_gradient("step", self.params):
            if p.grad is not None and p.grad.shape != p.shape:
                shapes = f"{p.shape}; received {p.grad.shape}"
                raise ValueError(f"step: expected a gradient of the parameter's shape {shapes}")
        with mode(grad=False, autocast=None):
            self.t.data = self.t + 1.0
            for group in self.param_groups:
                function, numbers, states = self.update(group)
                for p in group.params:
                    if p.grad is not None:
                        own = [state[p] for state in states if p in state]
                        if p.by_rows:
                            found = update_rows(function, p, p.grad, numbers, *own)
                        else:
                            found = function(p, p.grad, *numbers, *own)
                        for old, new in zip((p, *own), found, strict=True):
                            old.data = new

    def reset_grad(self) -> None:
        """Drop all gradients."""
        for p in self.params:
            p.grad = None

    zero_grad = reset_grad

    def clip_grad_norm(self, max_norm: float = 0.25, norm_type: float = 2.0) -> Tensor:
        """Limit the norm of all gradients together; returns it (see `optim.clip_grad_norm`)."""
        return clip_grad_norm(self.params, max_norm, norm_type)

    @property
    def lr(self) -> float:
        """The learning rate: that of the first group; assigning sets it for all groups."""
        return self.param_groups[0].lr

    @lr.setter
    def lr(self, value: float) -> None:
        for group in self.param_groups:
            group.lr = value

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(map(repr, self.param_groups))})"

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """All that a later step depends on, parameters apart.

            {"optimizer": "Adam",
             "groups": [{"params": [0, 1], "lr": 0.01, "beta1": 0.9, ...}, ...],
             "state": {"t": Tensor, "0.m": Tensor, "0.v": Tensor, "1.m": Tensor, ...}}

        "state" is flat and holds all Tensors (0.m is m of the first parameter), fit for
        safetensors; the rest is fit for JSON. The Tensors keep their values when steps follow.
        """
        place = {p: index for index, p in enumerate(self.params)}
        groups = [
            {"params": [place[p] for p in group.params], "lr": group.lr, **group.options}
            for group in self.param_groups
        ]
        state = {key: held.detach() for key, held in self._tensors().items()}
        return {"optimizer": self.name, "groups": groups, "state": state}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`: with the same gradients, to the same bits.

        Tensors may come as NumPy arrays. One ValueError lists all that is missing, unexpected or
        misshapen; then, and on an option out of range, nothing is loaded.
        """
        name = f"{self.name}.load_state_dict"
        check_form(name, self.state_dict(), state_dict)
        groups = [
            {key: as_option(name, key, group[key]) for key in group.keys() - {"params"}}
            for group in state_dict["groups"]
        ]
        for key, held in self._tensors().items():
            held.data = Tensor(state_dict["state"][key], device=held.device, requires_grad=False)
        for group, options in zip(self.param_groups, groups, strict=True):
            for key, value in options.items():
                group[key] = value

    def _tensors(self) -> dict[str, Tensor]:
        """The count of steps and all states, by position: t, 0.m, 0.v, 1.m, ..."""
        states = {key: held for key, held in vars(self).items() if isinstance(held, dict)}
        places = [(index, p, key) for index, p in enumerate(self.params) for key in states]
        found = {f"{index}.{key}": states[key][p] for index, p, key in places if p in states[key]}
        return {"t": self.t, **found}


def as_groups(name: str, params: Any) -> list[dict[str, Any]]:
    """Parameters or groups of them as dicts, each with a list of parameters at "params"."""
    if isinstance(params, (Tensor, dict, str)) or not isinstance(params, Iterable):
        kind = type(params).__name__
        raise TypeError(f"{name}: expected a list of Tensors or of dicts; received a {kind}")
    found = list(params)
    if not any(isinstance(each, dict) for each in found):
        found = [{"params": found}]
    for index, group in enumerate(found):
        if not isinstance(group, dict) or "params" not in group:
            raise TypeError(f"{name}: expected dicts with 'params'; received {group!r:.80}")
        own = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if not own:
            raise ValueError(f"{name}: expected at least one parameter; received none")
        if kinds := {type(p).__name__ for p in own if not isinstance(p, Tensor)}:
            raise TypeError(f"{name}: expected parameters to be Tensors; received {listed(kinds)}")
        found[index] = {**group, "params": own}
    return found


def check_parameters(name: str, params: list[Tensor]) -> None:
    """Raise on what cannot be trained, or not together."""
    for index, p in enumerate(params):
        if not p.requires_grad or p.op is not None:
            reason = "to be leaves" if p.requires_grad else "to require a gradient"
            found = f"one at {index} of {p.dtype} and shape {p.shape} that does not"
            raise ValueError(f"{name}: expected parameters {reason}; received {found}")
    if len(set(params)) != len(params):
        raise ValueError(f"{name}: expected every parameter once; received one twice")
    if len(devices := {str(p.device) for p in params}) > 1:
        raise ValueError(f"{name}: expected parameters on one device; received {listed(devices)}")


def check_form(name: str, kept: Any, given: Any) -> None:
    """Raise one ValueError on all in which a saved state differs in form from the one kept."""
    wants, has = form_of(kept, ""), form_of(given, "")
    keys = [*wants, *(key for key in has if key not in wants)]
    pairs = [(key, wants.get(key, "nothing"), has.get(key, "nothing")) for key in keys]
    if found := [f"{key[1:]}: {b} for {a}" for key, a, b in pairs if a != b]:
        raise ValueError(f"{name}: expected a state like its own; received {'; '.join(found)}")


def form_of(state: Any, path: str) -> dict[str, str]:
    """The leaves of a nested state in words, by path: arrays as dtype and shape."""
    if isinstance(state, (dict, list)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, each in items for k, v in form_of(each, f"{path}.{key}").items()}
    if hasattr(state, "shape") and hasattr(state, "dtype"):
        return {path: f"{state.dtype} {state.shape}"}
    plain = state is None or (isinstance(state, Real) and isfinite(state))
    return {path: "a number or None" if plain else repr(state)}
