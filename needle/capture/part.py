"""Part: a program and the outputs that need none. Next: gradient.py."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np

from needle.array.ndarray import NDArray
from needle.autograd import Tensor, Value
from needle.backend.compiled import CompiledDevice, compiler
from needle.backend.device import Device
from needle.compiler import reference


class Part:
    """A program over given inputs; outputs may be inputs, passed through, and constants."""

    def __init__(self, inputs: Sequence[Value]) -> None:
        self.inputs = list(inputs)
        self.numbers = {x: number for number, x in enumerate(inputs)}
        self.places: dict[Value, int] = {}
        self.outputs: list[Value] = []
        self.extras: list[Any] = []  # numbers of inputs, and arrays

    def place(self, value: Value) -> int:
        """The number of a value among what `run` will return; extras count from the end."""
        if value not in self.places:
            if value in self.numbers or value.cached_data is not None:
                self.extras.append(self.numbers.get(value, value.cached_data))
                self.places[value] = -len(self.extras)
            else:
                self.outputs.append(value)
                self.places[value] = len(self.outputs) - 1
        return self.places[value]

    def build(self, device: Device, donated: Mapping[int, int], lines: Mapping[Value, str]) -> None:
        """Make the program. donated: output -> input whose memory it may take."""
        passed = {x for x in self.extras if type(x) is int}
        pairs = {out: x for out, x in donated.items() if out >= 0 and x not in passed}
        make = compiler().build if isinstance(device, CompiledDevice) else reference.build
        self.program = make(self.inputs, self.outputs, pairs, lines) if self.outputs else None
        recipe = getattr(self.program, "recipe", self.program)
        self.reused = [] if recipe is None else list(recipe.in_place.values())
        self.rest = self.extras[::-1]
        self.inputs, self.numbers, self.places, self.outputs = [], {}, {}, []  # the trace may go

    def run(self, arrays: list[NDArray], shared: Collection[int] = ()) -> list[NDArray]:
        """The outputs for compact inputs; memory that only a captured tensor holds is reused.
        shared: inputs whose tensor itself is held elsewhere."""
        found: list[NDArray] = []
        if self.program is not None:
            reuse = exclusive(arrays, self.reused)
            if shared:
                reuse = [x and n not in shared for n, x in zip(self.reused, reuse, strict=True)]
            found = self.program(arrays, reuse)
        return self.with_rest(found, arrays)

    def watch(self, arrays: list[NDArray], spare: list[NDArray]) -> tuple[list[NDArray], int]:
        """The outputs, no input overwritten, and what the program made: see runtime.made. spare:
        what the last run replaced; memory of it that nobody holds is reused."""
        found, made = [], 0
        if self.program is not None:
            free = exclusive(spare, range(len(spare)), HELD[0] - 1)
            found, made = self.program.watch(arrays, spare, free)
        return self.with_rest(found, arrays), made

    def with_rest(self, found: list[NDArray], arrays: list[NDArray]) -> list[NDArray]:
        rest = [arrays[x] if type(x) is int else x for x in self.rest]
        return [*found, *rest] if rest else found


def exclusive(arrays: list[NDArray], numbers: Sequence[int], held: int = 0) -> list[bool]:
    """Of some arrays, whether only one tensor and this list can see their memory. held: how many
    references there are if so, by default HELD's."""
    held = held or HELD[0]
    chosen = [arrays[number] for number in numbers]
    counts, storages = list(map(sys.getrefcount, chosen)), list(map(STORAGE, chosen))
    owned, own = list(map(sys.getrefcount, storages)), list(map(BLOCK, storages))
    size = len(chosen)
    if counts == [held] * size and owned == [HELD[1]] * size and all(own):
        return [True] * size
    storages.clear()  # an export that nobody reads any more is dropped by is_alone
    return [n == held and x.is_alone() for n, x in zip(counts, chosen, strict=True)]


STORAGE, BLOCK = attrgetter("storage"), attrgetter("block.ptr")  # 0 of other libraries' memory
HELD = [0, 0, 0]  # references to an array, and to its Storage, that one tensor and one list hold;
# and to a tensor that one container holds


def count_references() -> None:
    """Find HELD, which differs between versions of Python."""
    tensor = Tensor.make_const(NDArray(np.zeros(1)))
    arrays = [tensor.cached_data]
    assert arrays[0].is_alone()  # drops the view that filled it
    chosen = [arrays[number] for number in (0,)]
    storages = list(map(STORAGE, chosen))
    HELD[:2] = [*map(sys.getrefcount, chosen), *map(sys.getrefcount, storages)]
    held = {"x": Tensor.make_const(NDArray(np.zeros(1)))}
    HELD[2] = references(held.get("x"))


def references(x: Any) -> int:
    return sys.getrefcount(x)


def is_shared(x: Tensor) -> bool:
    """Whether a tensor, fresh from the container that holds it, is held elsewhere too."""
    return sys.getrefcount(x) > HELD[2]


count_references()
