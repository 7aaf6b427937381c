"""Structures: Tensors in nested tuples, lists, dicts and dataclasses. Next: trace.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import ref

import numpy as np

from needle.array.ndarray import NDArray
from needle.autograd import Holder, Tensor, TensorTuple, identity
from needle.nn.module import Module

PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)


class Unfit(Exception):
    """A part of an argument that is neither a Tensor nor hashable."""


def is_record(x: Any) -> bool:
    """Whether x is a dataclass's instance, of which the fields count."""
    return is_dataclass(x) and not isinstance(x, (type, Module))


def items_of(x: Any) -> Iterator[tuple[str, Any]] | None:
    """(path, part) of a container; None for anything else."""
    if isinstance(x, (tuple, list)):
        return ((f"[{index}]", each) for index, each in enumerate(x))
    if isinstance(x, dict):
        return ((f"[{key!r}]", each) for key, each in x.items())
    if is_record(x):
        return ((f".{field.name}", getattr(x, field.name)) for field in fields(x))
    return None


def walk(x: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of all that is no container, in order."""
    items = items_of(x)
    if items is None:
        yield path, x
    else:
        for name, each in items:
            yield from walk(each, path + name)


def rebuild(x: Any, leaf: Callable[[Any], Any]) -> Any:
    """The structure with leaf(each) in the place of each leaf."""
    if isinstance(x, tuple):
        parts = [rebuild(each, leaf) for each in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if isinstance(x, list):
        return [rebuild(each, leaf) for each in x]
    if isinstance(x, dict):
        found = copy(x)
        for key, each in x.items():
            found[key] = rebuild(each, leaf)
        return found
    if is_record(x):
        found = copy(x)
        for field in fields(x):
            object.__setattr__(found, field.name, rebuild(getattr(x, field.name), leaf))
        return found
    return leaf(x)


def tensors_in(x: Any) -> list[Any]:
    """The Tensors of a structure."""
    return [leaf for _, leaf in walk(x, "") if isinstance(leaf, Tensor)]


def replace_tensors(x: Any, function: Callable[[Tensor], Any]) -> Any:
    """The structure with function(each) in the place of each Tensor."""
    return rebuild(x, lambda leaf: function(leaf) if isinstance(leaf, Tensor) else leaf)


class Call:
    """The arguments of one call: Tensors, their arrays (compact), and the key that says which
    program fits them."""

    __slots__ = ("arrays", "given", "key", "tensors")
    given: tuple[Any, Any]  # args and kwargs

    def __init__(self, *mode: Any) -> None:
        self.tensors: list[Tensor] = []
        self.arrays: list[NDArray] = []
        self.key: list[Any] = [*mode]

    def add(self, x: Any) -> None:
        if isinstance(x, Tensor):
            array = x.cached_data
            if array is None or not array.form.is_compact:
                array = x.realize_cached_data().compact()
            self.tensors.append(x)
            self.arrays.append(array)
            self.key += (array.form, x.requires_grad)
        elif isinstance(x, (tuple, list)):
            self.key += (type(x), len(x))
            for each in x:
                self.add(each)
        elif isinstance(x, dict):
            self.key += (type(x), tuple(x))
            for each in x.values():
                self.add(each)
        elif is_record(x):
            self.key.append(type(x))
            for field in fields(x):
                self.add(getattr(x, field.name))
        else:
            self.add_static(x)

    def add_static(self, x: Any) -> None:
        """A value that is part of the program: compared by type and bits, a Holder by identity."""
        if isinstance(x, (np.ndarray, NDArray, TensorTuple)):
            raise Unfit(x)
        if isinstance(x, Holder):
            self.key.append(ref(x))
            return
        try:
            hash(x)
        except TypeError:
            raise Unfit(x) from None
        self.key += (type(x), identity(x))

    def close(self) -> tuple[Any, ...]:
        """The key, with the places of Tensors that occur twice."""
        tensors = self.tensors
        if len(tensors) > 1 and len(set(tensors)) < len(tensors):
            self.key.append(tuple([tensors.index(x) for x in tensors]))
        return tuple(self.key)


def in_words(x: Any) -> str:
    """A leaf as reasons name it."""
    if not isinstance(x, Tensor):
        return f"{x!r:.60}" if isinstance(x, PLAIN) else type(x).__name__
    grad = ", requires_grad" if x.requires_grad else ""
    return f"{x.dtype}{list(x.shape)} on {x.device}{grad}"
