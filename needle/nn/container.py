"""Modules made of modules. Next: conv.py.

Plain lists and dicts of modules in an attribute need no container: a Module's walk finds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from needle.autograd import Tensor
from needle.nn.module import Module


class Modules(tuple[Any, ...]):
    """A Sequential's modules: a tuple, as in the course, that as a call is `Module.modules`."""

    owner: Module

    def __call__(self) -> list[Module]:
        return Module.modules(self.owner)


class Sequential(Module):
    """y = modules[-1](... modules[1](modules[0](x))); their paths are their indices."""

    unnamed = "layers"

    def __init__(self, *modules: Callable[..., Any]) -> None:
        self.modules = modules

    @property
    def modules(self) -> Modules:
        """The modules as a tuple; `modules()` lists them with this one and with all below."""
        found = Modules(self.layers)
        found.owner = self
        return found

    @modules.setter
    def modules(self, modules: Iterable[Callable[..., Any]]) -> None:
        layers = tuple(modules)
        for each in layers:
            if not callable(each):
                raise TypeError(f"sequential: expected modules; received a {type(each).__name__}")
        self.layers = layers

    def forward(self, x: Any) -> Any:
        for module in self.layers:
            x = module(x)
        return x

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.layers)

    def __getitem__(self, index: int | slice) -> Any:
        """A module, or the Sequential of a slice, which shares its modules."""
        return Sequential(*self.layers[index]) if isinstance(index, slice) else self.layers[index]


class Residual(Module):
    """y = fn(x) + x (He et al., 2016)"""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x) + x
