"""Module: a function of tensors that holds parameters. Next: functional.py.

A module's state lies in plain attributes and is found by a walk of them: `walk` visits what the
attributes hold, and what lists, tuples and dicts in them hold, in order and each thing once, so
that shared parameters count once and cycles end. A Parameter is trained, any other Tensor is a
buffer. A path says where something was found: `layers.3.weight` is `model.layers[3].weight`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, starmap
from traceback import walk_stack
from typing import Any, NamedTuple, Self, dataclass_transform

from needle.array.ndarray import NDArray
from needle.autograd import MODE, Holder, Tensor
from needle.backend.device import Device
from needle.dtype import FLOATS, INTEGERS, DType, as_dtype


class Parameter(Tensor):
    """A Tensor that a Module trains; `Parameter(tensor)` shares the tensor's memory."""

    __slots__ = ()


class RowParameter(Parameter):
    """A Parameter of whose rows an optimizer's step changes those alone that have a gradient."""

    __slots__ = ()
    by_rows = True


# Hooks


@dataclass(eq=False)
class Handle:
    """A hook of a module, called before or after forward; `remove()` ends it."""

    module: Module
    function: Callable[..., Any]
    before: bool

    def __post_init__(self) -> None:
        self.module._hooks += (self,)

    def remove(self) -> None:
        self.module._hooks = tuple(each for each in self.module._hooks if each is not self)


def run_hooked(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """forward between the hooks, which may replace the inputs and the output."""
    hooks = module._hooks
    for hook in hooks:
        if hook.before and (found := hook.function(module, args)) is not None:
            args = found if isinstance(found, tuple) else (found,)
    output = module.forward(*args, **kwargs)
    for hook in hooks:
        if not hook.before and (found := hook.function(module, args, output)) is not None:
            output = found
    return output


# Paths


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def items_of(holder: Any) -> Iterable[tuple[Any, Any]]:
    """What a module, dict, list or tuple holds, by name; anything else holds nothing."""
    if isinstance(holder, Module):
        return [("" if n == holder.unnamed else n, each) for n, each in vars(holder).items()]
    if isinstance(holder, dict):
        return holder.items()
    return enumerate(holder) if isinstance(holder, (list, tuple)) else ()


def walk(root: Module, deep: bool = True) -> Iterator[tuple[str, Any]]:
    """(path, value) of a module and of the Modules and Tensors below, in the order of attributes.

    Not deep: the modules below are not entered.
    """
    seen: set[int] = set()
    stack: list[tuple[str, Any]] = [("", root)]
    while stack:
        path, holder = stack.pop()
        if id(holder) in seen:
            continue
        seen.add(id(holder))
        if isinstance(holder, (Module, Tensor)):
            yield path, holder
        if deep or holder is root or not isinstance(holder, Module):
            stack.extend([(join(path, str(n)), each) for n, each in items_of(holder)][::-1])


def path_within(parent: Module, child: Module) -> str:
    """The child's path seen from the parent; its class where no attribute leads to it."""
    return next((path for path, x in walk(parent) if x is child), type(child).__name__)


def running_path() -> str:
    """The path, seen from the outermost one, of the module whose call runs in this thread.

    It is read off the stack, so that calls need not note it; empty for the outermost module.
    """
    frames, code = walk_stack(sys._getframe()), Module.__call__.__code__
    running = [frame.f_locals["self"] for frame, _ in frames if frame.f_code is code]
    return ".".join(filter(None, starmap(path_within, pairwise(reversed(running)))))


def locate(error: Any, module: Module) -> None:
    """Name the module that raised in the error's message, as seen from `module`.

    Every module that the error passes on its way out replaces the path by its own, longer one, so
    that in the end it is the outermost's: nothing has to be noted before an error.
    """
    if len(error.args) != 1 or not isinstance(error.args[0], str):
        return
    message, child, path = getattr(error, "raised_in", (error.args[0], module, ""))
    if child is not module:
        path = join(path_within(module, child), path)
        error.args = (f"{message} (in {path})",)
    error.raised_in = message, module, path


# The class


class Mismatch(NamedTuple):
    """What `load_state_dict(..., strict=False)` passed over."""

    missing: list[str]
    unexpected: list[str]


class Module(Holder):
    """A function of tensors with parameters: write `__init__` and `forward`, call the module.

    There is nothing to initialise: `super().__init__()` may be called or left out.
    `training` tells layers that behave differently in training (Dropout, BatchNorm1d) which it is.
    """

    training: bool = True
    unnamed: str = ""  # the attribute whose items are named by their index alone
    _hooks: tuple[Handle, ...] = ()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output for inputs."""
        raise NotImplementedError(f"{type(self).__name__}: forward is not written")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """forward; an error's message names the module below that raised it."""
        if MODE.trace is not None:
            MODE.trace.enter(self)
        try:
            if self._hooks:
                return run_hooked(self, args, kwargs)
            return self.forward(*args, **kwargs)
        except (ValueError, TypeError, IndexError) as error:
            locate(error, self)
            raise

    # What it holds

    def named_modules(self) -> list[tuple[str, Module]]:
        """(path, module) of this module, whose path is empty, and of all below."""
        return [(path, each) for path, each in walk(self) if isinstance(each, Module)]

    def modules(self) -> list[Module]:
        """This module and all below."""
        return [each for _, each in self.named_modules()]

    def named_children(self) -> list[tuple[str, Module]]:
        """(path, module) of the modules directly below."""
        below = walk(self, deep=False)
        return [(path, x) for path, x in below if isinstance(x, Module) and x is not self]

    def children(self) -> list[Module]:
        """The modules directly below."""
        return [each for _, each in self.named_children()]

    def named_parameters(self) -> list[tuple[str, Parameter]]:
        """(path, parameter) of every parameter, shared ones once."""
        return [(path, each) for path, each in walk(self) if isinstance(each, Parameter)]

    def parameters(self) -> list[Parameter]:
        """Every parameter, shared ones once."""
        return [each for _, each in self.named_parameters()]

    def named_buffers(self) -> list[tuple[str, Tensor]]:
        """(path, tensor) of every Tensor that is no Parameter: state that is not trained."""
        return [(path, x) for path, x in named_tensors(self) if not isinstance(x, Parameter)]

    def buffers(self) -> list[Tensor]:
        """Every Tensor that is no Parameter."""
        return [each for _, each in self.named_buffers()]

    # Saving and loading

    def state_dict(self) -> dict[str, Tensor]:
        """Every parameter and buffer by its path, without history, sharing memory."""
        return {path: each.detach() for path, each in state_of(self).items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> Mismatch:
        """Copy tensors or arrays into the parameters and buffers of the same paths.

        Values are cast to the dtype and copied to the device of what they replace. Raises one
        ValueError that lists everything wrong, and then loads nothing: paths that are missing or
        unexpected (allowed and returned where not strict), other shapes, casts that lose kind.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"load_state_dict: expected a dict; received {type(state).__name__}")
        own = state_of(self)
        loaded = {p: Tensor.make_const(NDArray(x)) for p, x in state.items() if p in own}
        found = Mismatch([p for p in own if p not in state], [p for p in state if p not in own])
        problems = [refusal(path, own[path], x) for path, x in loaded.items()]
        if strict:
            problems += [f"{name} {', '.join(p)}" for name, p in found._asdict().items() if p]
        if any(problems):
            raise ValueError(f"load_state_dict: {'; '.join(filter(None, problems))}")
        for path, x in loaded.items():
            own[path].cached_data = x.to(own[path].dtype).to(own[path].device).realize_cached_data()
        return found

    # Changing all of it

    def train(self, mode: bool = True) -> Self:
        """Set `training` here and in all modules below."""
        return self.apply(lambda module: setattr(module, "training", mode))

    def eval(self) -> Self:
        """`train(False)`."""
        return self.train(False)

    def zero_grad(self) -> None:
        """Forget the gradients of all parameters."""
        for parameter in self.parameters():
            parameter.grad = None

    def requires_grad_(self, flag: bool = True) -> Self:
        """Set whether the parameters get gradients; frozen ones are no longer trained."""
        for parameter in self.parameters():
            parameter.requires_grad = flag and parameter.dtype in FLOATS
        return self

    def to(self, target: Device | Any) -> Self:
        """Move parameters and buffers to a device, or cast those of floats to a float dtype.

        In place: the tensors stay the same objects, which optimizers hold. Gradients follow.
        """
        if not isinstance(target, Device):
            target = as_dtype(target)
            if target not in FLOATS:
                raise TypeError(f"to: expected a device or a float dtype; received {target}")
        tensors = [each for _, each in named_tensors(self)]
        moved = [(x, converted(x, target), converted(x.grad, target)) for x in tensors]
        for x, data, grad in moved:
            x.cached_data, x.grad = data.realize_cached_data(), grad
        return self

    def apply(self, function: Callable[[Module], Any]) -> Self:
        """Call a function on this module and all below, in the order of `named_modules`."""
        for _, module in self.named_modules():
            function(module)
        return self

    # Hooks

    def register_forward_pre_hook(self, function: Callable[[Module, Any], Any]) -> Handle:
        """Call function(module, inputs) before forward; what it returns replaces the inputs."""
        return Handle(self, function, before=True)

    def register_forward_hook(self, function: Callable[[Module, Any, Any], Any]) -> Handle:
        """Call function(module, inputs, output) after forward; what it returns replaces the output.

        Neither hook runs where `forward` is called and not the module.
        """
        return Handle(self, function, before=False)

    def __repr__(self) -> str:
        return "\n".join(describe(self, "", ()))


@dataclass_transform(eq_default=False)
class Function(Module):
    """y = function(*inputs, **settings): every subclass is a dataclass, its fields the settings."""

    function: Callable[..., Any]
    __dataclass_fields__: dict[str, Any]

    def __init_subclass__(cls) -> None:
        dataclass(eq=False, repr=False, match_args=False)(cls)

    def forward(self, *inputs: Any) -> Any:
        settings = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return self.function(*inputs, **settings)


def named_tensors(module: Module) -> list[tuple[str, Tensor]]:
    return [(path, each) for path, each in walk(module) if isinstance(each, Tensor)]


def state_of(module: Module) -> dict[str, Tensor]:
    tensors = named_tensors(module)
    found = dict(tensors)
    if len(found) < len(tensors):
        raise ValueError("state_dict: expected distinct paths; received two tensors of one path")
    return found


def refusal(path: str, own: Tensor, x: Tensor) -> str:
    """Why x cannot replace a tensor's value, or the empty string."""
    if x.shape != own.shape:
        return f"{path}: expected shape {own.shape}, received {x.shape}"
    loses = kind(x.dtype) > kind(own.dtype)
    return f"{path}: expected {own.dtype}, received {x.dtype}" if loses else ""


def kind(dtype: DType) -> int:
    """bool, integer, float: each holds the kinds before it."""
    return 2 if dtype in FLOATS else 1 if dtype in INTEGERS else 0


def converted(x: Any, target: Device | DType) -> Any:
    """x without history on a device, or in a dtype if its own is one of floats; None stays None."""
    stays = x is None or (x.dtype not in FLOATS and not isinstance(target, Device))
    return x if stays else x.detach().to(target)


def describe(module: Module, name: str, above: tuple[Module, ...]) -> list[str]:
    """The lines of a module's tree: name, class, settings and number of parameters."""
    count = sum(each.size for each in module.parameters())
    head = f"{'  ' * len(above)}{name}{': ' if name else ''}"
    tail = f", {count:,} parameters" if count else ""
    lines = [f"{head}{type(module).__name__}({settings(module)}){tail}"]
    for path, child in module.named_children():
        if child not in above:
            lines += describe(child, path, (*above, module))
    return lines


def settings(module: Module) -> str:
    """The public attributes that are numbers, strings or tuples of those."""
    return ", ".join(f"{name}={x!r}" for name, x in vars(module).items() if is_setting(name, x))


def is_setting(name: str, value: Any) -> bool:
    values = value if isinstance(value, tuple) and value else (value,)
    is_plain = all(isinstance(x, (int, float, str)) for x in values)
    return is_plain and name != "training" and not name.startswith("_")
