"""Loss scaling, without which gradients that pass through float16 vanish. Next: schedules.py.

The scale and all that decides on it are Tensors, so that one code runs in eager and in a jitted
step, where nothing can branch on a value: what a bad step has written is put back by `where`.
"""

from __future__ import annotations

from typing import Any

from needle.autograd import Holder, Tensor, mode
from needle.backend.device import Device, default_device
from needle.dtype import float16
from needle.ops import astype, logical_or, where
from needle.ops.update import ScaleUpdate, Unscaled, working_dtype
from needle.optim.clipping import with_gradient
from needle.optim.optimizer import Optimizer, check_form, number
from needle.optim.options import as_option

OPTIONS = ("growth_factor", "backoff_factor", "growth_interval")


class GradScaler(Holder):
    """Multiplies the loss by a number, so that small gradients survive float16; divides gradients
    by it before the step, and leaves a step out whose gradients are not finite.

        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)  # where gradients are clipped
        scaler.step(optimizer)
        scaler.update()

    The scale shrinks by backoff_factor after a step that was left out, and grows by growth_factor
    after growth_interval steps in a row that were not. A step that is left out changes neither
    parameters nor the optimizer's Tensors; a state that it began is zeros. Works inside of a jitted
    function. bfloat16 has float32's range and needs no scaling. ValueError, TypeError for bad
    numbers, RuntimeError where calls come in another order. (Micikevicius et al., 2018.)
    """

    def __init__(
        self, init_scale: float = 2.0**16, growth_factor: float = 2.0, backoff_factor: float = 0.5,
        growth_interval: int = 2000, device: Device | None = None,
    ) -> None:  # fmt: skip
        device = default_device() if device is None else device
        self._scale = number(as_option("GradScaler", "init_scale", init_scale), device)
        self._growth_tracker = number(0.0, device)
        given = zip(OPTIONS, (growth_factor, backoff_factor, growth_interval), strict=True)
        self._options = {key: as_option("GradScaler", key, value) for key, value in given}
        self._unscaled: dict[Optimizer, Tensor] = {}  # whether gradients are bad, before step()
        self._stepped: dict[Optimizer, Tensor] = {}  # and after it, before update()

    def scale(self, loss: Tensor) -> Tensor:
        """loss * scale, in float32 where loss is of low precision."""
        loss = astype(loss, working_dtype(loss.dtype))
        return loss * astype(self._scale, loss.dtype)

    def unscale_(self, optimizer: Optimizer) -> None:
        """Divide the gradients of an optimizer's parameters by the scale, once per step."""
        known = optimizer in self._unscaled or optimizer in self._stepped
        self._expect(not known, "unscale_", "one call", "another; call update() after step()")
        params = with_gradient("unscale_", optimizer.params)
        if any(p.dtype == float16 for p in params):
            cure = "keep parameters in float32, and compute under ndl.autocast(ndl.float16)"
            raise TypeError(f"unscale_: expected float32 gradients; received float16; {cure}")
        with mode(grad=False, autocast=None):
            found, *grads = Unscaled()(self._scale, *(p.grad for p in params))
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        self._unscaled[optimizer] = found

    def step(self, optimizer: Optimizer) -> None:
        """optimizer.step() on unscaled gradients, if all of them are finite."""
        self._expect(optimizer not in self._stepped, "step", "one call", "another; call update()")
        if optimizer not in self._unscaled:
            self.unscale_(optimizer)
        before = {key: x.detach() for key, x in tensors_of(optimizer).items()}
        optimizer.step()
        found = self._stepped[optimizer] = self._unscaled.pop(optimizer)
        with mode(grad=False, autocast=None):
            for key, x in tensors_of(optimizer).items():
                x.data = where(found, before.get(key, 0.0), x)

    def update(self) -> None:
        """Adjust the scale, at the end of every step."""
        flags = [*self._unscaled.values(), *self._stepped.values()]
        self._expect(bool(flags), "update", "step() before it", "none")
        found, growth = flags[0], tuple(self._options.values())
        with mode(grad=False, autocast=None):
            for each in flags[1:]:
                found = logical_or(found, each)
            moved = ScaleUpdate(*growth)(self._scale, self._growth_tracker, found)
            self._scale.data, self._growth_tracker.data = moved
        self._unscaled.clear()
        self._stepped.clear()

    def get_scale(self) -> float:
        """The scale now."""
        return float(self._scale.item())

    def state_dict(self) -> dict[str, Any]:
        """The scale, the options, and the count of steps since the scale changed, as floats."""
        tracker = float(self._growth_tracker.item())
        return {"scale": self.get_scale(), **self._options, "_growth_tracker": tracker}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a `state_dict()`; on a ValueError or TypeError nothing is loaded."""
        name = "GradScaler.load_state_dict"
        check_form(name, self.state_dict(), state_dict)
        found = {key: as_option(name, key, value) for key, value in state_dict.items()}
        self._scale.data = number(found["scale"], self._scale.device)
        self._growth_tracker.data = number(found["_growth_tracker"], self._scale.device)
        self._options = {key: found[key] for key in OPTIONS}

    def __repr__(self) -> str:
        return f"GradScaler(scale={self.get_scale()}, {self._options})"

    def _expect(self, holds: bool, name: str, expected: str, received: str) -> None:
        if not holds:
            text = f"{name}: expected {expected} per optimizer and step; received {received}"
            raise RuntimeError(text)


def tensors_of(optimizer: Optimizer) -> dict[Any, Tensor]:
    """All that a step changes: parameters by their place, the optimizer's Tensors by their name."""
    return {**dict(enumerate(optimizer.params)), **optimizer._tensors()}
