"""capture: one run of a function on placeholders becomes a Variant. Next: ../jit.py."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

from needle import autograd
from needle.autograd import Holder, Tensor, TensorTuple, Value, refuse_devices
from needle.backend.device import Device, default_device
from needle.capture.gradient import Adjoint
from needle.capture.holders import Slot, Snapshot, is_structure, named_values
from needle.capture.leaks import name_holder, outliving
from needle.capture.part import Part
from needle.capture.structure import PLAIN, Call, rebuild, walk
from needle.capture.trace import Trace
from needle.capture.variant import Position, Result, Variant
from needle.errors import TraceError
from needle.init.random import Source


class Capture:
    """One trace: what the function was given, what was there before, what came out."""

    def __init__(self, name: str, function: Callable[..., Any], call: Call, draw_from: Any) -> None:
        self.name = name
        self.function = function
        self.call = call
        self.snapshot = Snapshot()
        self.trace = Trace(name, draw_from)
        self.results: list[Tensor] = []

    def run(self, args: Any, kwargs: Any, pins: dict[int, Tensor]) -> Variant:
        """The Variant; where the function fails, all is set back to what it was."""
        try:
            variant = Variant(pins)
            variant.template = self.call_function(*self.placeholders(args, kwargs, variant))
            self.finish(variant)
            return variant
        except BaseException:
            self.trace.restore_gradients()
            self.snapshot.restore()
            raise

    def placeholders(self, args: Any, kwargs: Any, variant: Variant) -> tuple[Any, Any]:
        """The arguments with a placeholder for each Tensor; the same one for the same Tensor."""
        known: dict[Tensor, Tensor] = {}
        self.given: dict[Value, int] = {}
        for number, (x, array) in enumerate(zip(self.call.tensors, self.call.arrays, strict=True)):
            if number in variant.pins:
                known[x] = x
            elif x not in known:
                known[x] = self.trace.argument(array, x.requires_grad)
                self.given[known[x]] = number
        variant.arguments = list(self.given.values())
        return rebuild((args, kwargs), lambda x: known[x] if isinstance(x, Tensor) else x)

    def call_function(self, args: Any, kwargs: Any) -> Any:
        """What the function returns, with Positions for Tensors, which go to `results`."""
        before = list(walk((args, kwargs), ""))
        with autograd.mode(trace=self.trace, lazy=True):
            found = self.function(*args, **kwargs)
            template = rebuild(found, self.result)
        after = list(walk((args, kwargs), ""))
        changed = [a for (a, x), (b, y) in zip(before, after, strict=False) if a != b or x is not y]
        if changed or len(before) != len(after):
            reason = f"{self.name} changes a container that it was given"
            raise TraceError(
                f"jit: expected arguments to stay; received: {reason}; return the new one"
            )
        return template

    def result(self, x: Any) -> Any:
        if isinstance(x, Tensor):
            self.results.append(x)
            return Position(len(self.results) - 1)
        if not isinstance(x, PLAIN):
            kinds = "Tensors, numbers, strings, None, and containers of them"
            cure = "return tuple(it)" if isinstance(x, TensorTuple) else "return its Tensors"
            received = f"received a {type(x).__name__}; {cure}"
            raise TypeError(f"jit: expected {self.name} to return {kinds}; {received}")
        return x

    # After the run

    def finish(self, variant: Variant) -> None:
        trace = self.trace
        slots = self.snapshot.slots(trace.created)
        grads = {
            x: x._grad
            for x, before in trace.gradients.items()
            if x not in trace.created and x._grad is not before
        }
        trace.restore_gradients()
        self.check_leaks(slots, grads)
        for slot in slots:
            slot.put(slot.before)
        values = [*self.results, *trace.written.values(), *grads.values()]
        for x in (*values, *(slot.value for slot in slots)):
            if x is not None:
                trace.current(x)
        self.find_inputs(variant, slots)
        device = self.device()
        part = variant.part = Part([*self.given, *self.captured_values(variant)])
        trace.inputs = part.inputs
        self.place_outputs(variant, slots, grads, part)
        differentiable = [
            x
            for x, result in zip(self.results, variant.results, strict=True)
            if result.known is None and x.requires_grad and x.cached_data is None
        ]
        if differentiable and not trace.ran_backward:
            variant.adjoint = Adjoint(trace, part, list(dict.fromkeys(differentiable)), device)
        part.build(device, self.donations(variant, part), trace.created)
        self.watch(variant, slots)

    def check_leaks(self, slots: Sequence[Slot], grads: Mapping[Value, Any]) -> None:
        """TraceError where somebody else holds a value of the trace."""
        trace = self.trace
        own = [
            self.results, trace.gradients, trace.gradients.values(), trace.reads, trace.written,
            trace.written.values(), grads.values(), self.given,
        ]  # fmt: skip
        for attempt in range(2):
            held = chain(*own, (each.value for each in slots), (each.value for each in slots))
            found = [x for x in outliving(trace.created, held) if x.cached_data is None]
            if not found:
                return
            if not attempt:
                found.clear()
                gc.collect()
        value = found[-1]
        del found
        graph = [y for x in trace.created for y in (x.inputs, getattr(x, "operands", None))]
        holder = name_holder(value, [*graph, graph, *own, own, trace.created, grads])
        op = "an argument" if value.op is None else f"the result of {autograd.op_name(value.op)}"
        made = f", made at {trace.created[value]}," if trace.created[value] else ""
        cure = "return the Tensor, or keep it in an attribute of a Module or an Optimizer"
        raise TraceError(
            f"jit: expected no traced Tensor to outlive the call of {self.name}; received {op}"
            f"{made} held by {holder}; {cure}"
        )

    def find_inputs(self, variant: Variant, slots: Sequence[Slot]) -> None:
        """Which tensors from outside are read, and where the next call will find them."""
        trace = self.trace
        in_slots = {slot.before: slot for slot in slots if isinstance(slot.before, Tensor)}
        of_gradient = {trace.gradients[x]: x for x in trace.reads if x not in trace.created}
        for x in trace.captured:
            if x in in_slots:
                continue
            if x in of_gradient:
                variant.gradients.append(of_gradient[x])
            else:
                variant.direct.append(x)
        variant.slots = list(in_slots.values())
        variant.has_gradient = [
            (x, trace.gradients[x] is not None) for x in trace.reads if x not in trace.created
        ]
        if trace.generator_used:
            variant.generator = Source.generator

    def captured_values(self, variant: Variant) -> list[Any]:
        found: list[Any] = [*variant.direct, *[slot.before for slot in variant.slots]]
        found += [self.trace.gradients[x] for x in variant.gradients]
        variant.forms = [x.cached_data.form.compact for x in found]
        variant.needs = [x.requires_grad for x in found]
        return found

    def device(self) -> Device:
        """The one device of all inputs and constants."""
        arrays = list(self.call.arrays)
        for x in (*self.trace.captured, *self.trace.created):
            data = x.cached_data
            if data is not None:
                arrays += data if type(data) is tuple else [data]
        if len({id(x.device) for x in arrays}) > 1:
            refuse_devices(self, arrays)  # type: ignore[arg-type]
        return arrays[0].device if arrays else default_device()

    def place_outputs(
        self, variant: Variant, slots: Sequence[Slot], grads: Mapping[Value, Any], part: Part
    ) -> None:
        trace = self.trace
        for x in self.results:
            known: Any = self.given.get(x, None if x in trace.created else x)
            place = part.place(trace.current(x)) if known is None else 0
            variant.results.append(Result(place, known))
        for tensor, value in trace.written.items():
            if tensor in self.given:
                variant.given.append((self.given[tensor], part.place(value)))
            elif tensor not in trace.created:
                variant.data.append((tensor, part.place(value)))
        for slot in slots:
            variant.stores.append((slot.bare(), part.place(trace.current(slot.value))))
        for leaf, grad in grads.items():
            variant.grads.append((leaf, None if grad is None else part.place(trace.current(grad))))
        written = [x for x, _ in (*variant.data, *variant.grads)]
        variant.aliases = {*written, *variant.pins.values()}

    def donations(self, variant: Variant, part: Part) -> dict[int, int]:
        """Outputs that may take the memory of the inputs that they replace."""
        found: dict[int, int] = {}
        stores = [(slot.before, place) for slot, place in variant.stores]
        for x, place in (*variant.data, *stores):
            number = part.numbers.get(x)
            if number is None or place < 0 or place in found or number in found.values():
                continue
            if autograd.spec_of(part.outputs[place]) == x.cached_data.spec:
                found[place] = number
        return found

    def watch(self, variant: Variant, slots: Sequence[Slot]) -> None:
        """What must be the same at the next call."""
        trace, watch = self.trace, variant.watch
        touched = {*trace.captured, *trace.written}
        called = list(trace.modules.values())
        changing = {(id(slot.container), slot.key) for slot in slots}
        for holder in self.snapshot.relevant(called, touched, slots).values():
            watch.holder(holder, self.snapshot, changing)
        function: Any = self.function
        while function is not None:
            function = getattr(function, "__func__", function)
            self.watch_names(variant, function)
            function = getattr(function, "__wrapped__", None)  # below a decorator

    def watch_names(self, variant: Variant, function: Any) -> None:
        """What a function's global and enclosing variables must be at the next call."""
        for name, x in named_values(function).items():
            if isinstance(x, (Value, Holder)):
                variant.watch.item(function.__globals__, name, x, name)
        for cell in getattr(function, "__closure__", None) or ():
            try:
                content = cell.cell_contents
            except ValueError:  # nothing yet
                continue
            if is_structure(content):
                variant.cells.append(cell)
                variant.contents.append(content)
