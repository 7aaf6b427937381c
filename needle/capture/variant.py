"""Variant: a program for one signature, and where its inputs and outputs live. Next: ../jit.py.

Inputs: arrays of arguments, then of tensors from outside: *direct* ones, always the same objects;
those in slots, which each call replaces; and gradients. Outputs: results, and what is written.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any, NamedTuple

from needle.array.ndarray import NDArray
from needle.autograd import Tensor, Value
from needle.capture.gradient import Adjoint, call_with_history
from needle.capture.holders import Slot, Watch
from needle.capture.part import Part, is_shared
from needle.capture.structure import Call, rebuild
from needle.init.random import Source

FORM, DATA = attrgetter("form"), attrgetter("cached_data")
NEEDS, CONTENTS = attrgetter("requires_grad"), attrgetter("cell_contents")
ANY: Any = object()


class Position(int):
    """Stands for a Tensor in what a function returns: the number of the result."""


class Result(NamedTuple):
    """A Tensor that is returned: an output, or an object that was there: an argument, by number,
    or a tensor from outside."""

    place: int
    known: int | Value | None


class Variant:
    """One traced form of a function: `read` says whether it fits a call, `run` runs it."""

    part: Part
    reason = ""
    used = 0

    def __init__(self, pins: dict[int, Tensor]) -> None:
        # What is read
        self.pins = pins  # arguments that are tensors which the function also knows from outside
        self.arguments: list[int] = []
        self.direct: list[Any] = []
        self.slots: list[Slot] = []
        self.gradients: list[Value] = []  # whose `.grad` is read
        self.forms: list[Any] = []
        self.needs: list[bool] = []
        # What must be as it was
        self.watch = Watch()
        self.cells: list[Any] = []
        self.contents: list[Any] = []
        self.has_gradient: list[tuple[Value, bool]] = []
        self.generator: Any = ANY
        self.aliases: set[Value] = set()  # tensors that no argument may be, but for the pins
        # What is written
        self.template: Any = None
        self.results: list[Result] = []
        self.given: list[tuple[int, int]] = []  # (number of an argument whose data is set, place)
        self.data: list[tuple[Any, int]] = []  # (tensor whose data is set, place)
        self.stores: list[tuple[Slot, int]] = []
        self.grads: list[tuple[Value, int | None]] = []
        self.adjoint: Adjoint | None = None

    def programs(self) -> list[Any]:
        """The compiled programs: forward, and backward where there is one."""
        parts = [self.part] if self.adjoint is None else [self.part, self.adjoint.part]
        return [each.program for each in parts if each.program is not None]

    def known(self, program: Any) -> dict[int, NDArray]:
        """The arrays that are inputs of a program between calls, by number."""
        found = self.captured() if program is self.part.program else None
        return dict(enumerate(map(DATA, found or ()), len(self.arguments)))

    @property
    def writes(self) -> bool:
        return bool(self.given or self.data or self.stores or self.grads)

    def read(self, call: Call, is_new: bool = False) -> list[NDArray] | None:
        """The program's inputs; None where something is not as it was when it was traced. Of a
        variant that was traced for this very call, attributes may be: as the function set them."""
        if self.pins or not self.aliases.isdisjoint(call.tensors):
            known = {number: x for number, x in enumerate(call.tensors) if x in self.aliases}
            if known != self.pins:  # other arguments than at the trace are known from outside
                return None
        if self.generator is not ANY and Source.generator is not self.generator:
            return None
        if not is_new:
            if not self.watch.holds() or list(map(CONTENTS, self.cells)) != self.contents:
                return None
        captured = self.captured()
        if captured is None or list(map(NEEDS, captured)) != self.needs:
            return None
        arrays = list(map(DATA, captured))
        if list(map(FORM, arrays)) != self.forms:
            arrays = [array.compact() for array in arrays]
            if list(map(FORM, arrays)) != self.forms:
                return None
        given = call.arrays
        return [given[number] for number in self.arguments] + arrays

    def captured(self) -> list[Any] | None:
        """The tensors from outside that are read now."""
        for x, has in self.has_gradient:
            if (x._grad is not None) is not has:
                return None
        if not self.slots and not self.gradients:
            return self.direct
        found: list[Any] = [slot.get() for slot in self.slots]
        found += [x.grad for x in self.gradients]  # type: ignore[attr-defined]
        return [*self.direct, *found] if all(isinstance(x, Tensor) for x in found) else None

    def run(self, call: Call, arrays: list[NDArray]) -> Any:
        """Run the program, which may overwrite what it replaces."""
        first = len(self.arguments) + len(self.direct)
        shared = {n for n, slot in enumerate(self.slots, first) if is_shared(slot.get())}
        return self.finish(call, self.part.run(arrays, shared))

    def finish(self, call: Call, found: list[NDArray], replay: Any = None) -> Any:
        """Write what a run found, and return what is returned. replay: of this very call."""
        history: dict[int, Tensor] = {}
        if self.adjoint is not None:
            inputs = [call.tensors[number] for number in self.arguments] + (self.captured() or [])
            history = call_with_history(self.adjoint, inputs, found, replay)
        for number, place in self.given:
            call.tensors[number].cached_data = found[place]
        for tensor, place in self.data:
            tensor.cached_data = found[place]
        for slot, place in self.stores:
            slot.put(Tensor._new(None, (), found[place], False))
        for x, at in self.grads:
            x._grad = None if at is None else Tensor._new(None, (), found[at], False)
        values = []
        for place, known in self.results:
            if known is not None:
                values.append(call.tensors[known] if type(known) is int else known)
            elif place in history:
                values.append(history[place])
            else:
                values.append(Tensor._new(None, (), found[place], False))
        if type(self.template) is Position:
            return values[self.template]
        return rebuild(self.template, lambda x: values[x] if type(x) is Position else x)

    def difference(self) -> str:
        """What is not as it was, in words."""
        return self.watch.difference() or self.other_difference()

    def other_difference(self) -> str:
        captured = self.captured()
        if captured is None:
            return "a gradient from before the call: there or not"
        for x, form, needs in zip(captured, self.forms, self.needs, strict=True):
            now = x.cached_data.form.compact
            if now is not form:
                return f"a captured tensor: {words(form)} -> {words(now)}"
            if x.requires_grad is not needs:
                return f"requires_grad of a captured tensor: {needs} -> {x.requires_grad}"
        if self.generator is not ANY and Source.generator is not self.generator:
            return "ndl.seed: another generator"
        if list(map(CONTENTS, self.cells)) != self.contents:
            return "an enclosing variable: another object"
        return "an argument is a tensor that the function writes, or no longer"


def words(form: Any) -> str:
    return f"{form.dtype}{list(form.shape)} on {form.device}"
