"""Trace: what a function does while it runs on placeholders. Next: holders.py.

autograd, Modules and random draws tell it (`MODE.trace`). Tensors are not touched: what is written
to one is kept here, and whatever reads it later in the trace reads that. Only `.grad` is set for
real, and set back. A leaf that the function made itself is a constant of the program; any other is
*captured*, an input that each call reads anew.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from needle.array.ndarray import NDArray
from needle.array.spec import Spec
from needle.autograd import Tensor, Value, op_name, spec_of
from needle.backend.device import Device
from needle.errors import TraceError
from needle.init.random import Generator
from needle.nn.module import Module, running_path
from needle.ops.composite import placeholder
from needle.site import current_site, is_inside

CURES = {  # by the function that wanted the value
    "__bool__": "choose with ndl.where(condition, a, b), or branch on Python values",
    "getitem": "a mask's count is not known before the call: use ndl.where(mask, x, 0)",
    "lr": "use optimizer.param_groups[0].rate, a Tensor",
    "to": "move it before the call",
    "to_device": "move it before the call",
    "__init__": "use the Tensor itself, .detach() or ndl.stack([...])",
    "__deepcopy__": "copy it outside of the jitted function",
}
RETURN = "return the Tensor and read it after the call"
NAMES = {"__bool__": "`if` or bool()", "getitem": "indexing by a boolean mask"}


class Trace:
    """What a run of a function on placeholders created, read and wrote."""

    def __init__(self, name: str, draw_from: Callable[[Device], Generator]) -> None:
        self.name = name
        self.draw_from = draw_from
        self.created: dict[Value, str] = {}  # placeholders, nodes, constants -> file and line
        self.captured: dict[Value, None] = {}  # leaves from before that were read
        self.written: dict[Value, Value] = {}  # what was set as a tensor's data
        self.gradients: dict[Value, Any] = {}  # tensors whose `.grad` was met -> what it was
        self.reads: dict[Value, None] = {}  # those whose old `.grad` was read
        self.modules: dict[int, Module] = {}  # that were called
        self.inputs: list[Any] = []  # of the program, when they are known
        self.ran_backward = False
        self.generator_used = False

    def argument(self, array: NDArray, requires_grad: bool) -> Tensor:
        """A placeholder for an argument."""
        found = placeholder(array.spec, requires_grad)
        found.operands = (array,)  # tells the device
        self.created[found] = ""
        return found

    def stand_in(self, spec: Spec) -> Tensor:
        """A placeholder for the gradient of a result."""
        found = placeholder(spec)
        found.operands = next(
            (x.operands if x.cached_data is None else (x.cached_data,) for x in self.inputs), None
        )
        return found

    # Called by autograd, Modules, and random draws

    def note(self, value: Value, inputs: Sequence[Value]) -> tuple[Value, ...]:
        """A node was made; returns what it reads."""
        operands = tuple([self.current(x) for x in inputs])
        self.created[value] = place()
        return operands

    def make(self, leaf: Tensor) -> None:
        """The function made a leaf of an array: a constant."""
        self.created[leaf] = ""

    def current(self, x: Value) -> Value:
        """What reading a tensor means now."""
        x = self.written.get(x, x)
        if x.cached_data is not None and x not in self.created:
            if type(x.cached_data) is tuple:
                self.refuse("a TensorTuple from outside is read", "pass or keep its items")
            self.captured[x] = None
        return x

    def write(self, x: Tensor, value: Tensor) -> None:
        """x.data = value"""
        if value.shape != x.shape:
            shapes = f"{x.shape} became {value.shape}"
            self.refuse(f"the shape of a tensor is changed: {shapes}", "keep it fixed")
        self.written[x] = self.current(value)

    def meet_gradient(self, x: Value, reads: bool = False) -> None:
        """x.grad is about to be set, or was read."""
        if x not in self.gradients:
            self.gradients[x] = x._grad
            if reads:
                self.reads[x] = None

    def enter(self, module: Module) -> None:
        """A Module is called."""
        self.modules[id(module)] = module

    def generator(self, device: Device) -> Generator:
        """Where random numbers come from."""
        self.generator_used = True
        return self.draw_from(device)

    def check_read(self, x: Value) -> None:
        """A value is needed now: fine for what depends on constants alone, else a TraceError."""
        if not self.varies(x):
            return
        frame: Any = sys._getframe(1)
        reader = ""
        while frame is not None and is_inside(frame.f_code.co_filename):
            reader, frame = frame.f_code.co_name, frame.f_back
        what = NAMES.get(reader, f"{reader.strip('_')}()")
        op = op_name(x.op) if x.op is not None else self.kind(x)
        spec = spec_of(x)
        found = f"the result of {op}" if x.op is not None else op
        cure = CURES.get(reader, RETURN)
        self.refuse(f"{what} reads {found}, {spec.dtype}{list(spec.shape)}", cure)

    def kind(self, x: Value) -> str:
        return "an argument" if x in self.created else "a tensor from outside"

    def varies(self, x: Value) -> bool:
        """Whether a value may differ from call to call."""
        seen, stack = {x}, [x]
        while stack:
            each = stack.pop()
            if each in self.written or (each.cached_data is not None and each not in self.created):
                return True
            if each.cached_data is None:
                if each.op is None:
                    return True
                new = [y for y in each.operands or () if y not in seen]
                seen.update(new)
                stack += new
        return False

    def refuse(self, what: str, cure: str) -> NoReturn:
        site = current_site(running_path())
        expected = f"expected code whose values are not needed while `{self.name}` is traced"
        raise TraceError(f"jit: {expected}; received: {what}, at {site}; {cure}")

    # Afterwards

    def restore_gradients(self) -> None:
        for x, grad in self.gradients.items():
            x._grad = grad


def place() -> str:
    """The user's file and line."""
    frame: Any = sys._getframe(3)
    while frame.f_back is not None and is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
