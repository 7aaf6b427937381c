"""The reference program: a traced graph evaluated node by node, by each op's own kernel.

What `compile.build` makes of the same arguments computes the same bits; this one needs no compiler,
and is what jit runs for functions on devices that have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from needle import autograd
from needle.array.ndarray import NDArray
from needle.autograd import Value


class ReferenceProgram:
    """Steps over a list of slots: inputs first, then constants, then each node's value.

    in_place: output -> input whose memory it may take.
    """

    def __init__(
        self, inputs: Sequence[Value], outputs: Sequence[Value], in_place: Mapping[int, int]
    ) -> None:
        self.in_place = dict(in_place)
        self.size = len(inputs)
        slots = {x: number for number, x in enumerate(inputs)}
        order = autograd.post_order(outputs, autograd.pending_inputs, inputs)
        self.constants = [x.cached_data for x in order if x.cached_data is not None]
        order = sorted(order, key=lambda x: x.cached_data is None)  # stable: constants first
        slots |= {x: self.size + number for number, x in enumerate(order)}
        nodes = order[len(self.constants) :]
        self.results = [slots[x] for x in outputs]
        self.steps = [(x.op, [slots[y] for y in x.operands], x.spec) for x in nodes]
        last = {place: number for number, step in enumerate(self.steps) for place in step[1]}
        self.dying: list[list[int]] = [[] for _ in nodes]
        for place, number in last.items():
            if place not in self.results and place >= self.size + len(self.constants):
                self.dying[number].append(place)

    def __call__(self, arrays: Sequence[NDArray], reuse: Sequence[bool] = ()) -> list[NDArray]:
        """The outputs; those that reuse an input's memory are the input, overwritten at the end."""
        slots: list[Any] = [*arrays, *self.constants]
        for (op, places, spec), dying in zip(self.steps, self.dying, strict=True):
            parts = autograd.flattened([slots[place] for place in places])
            slots.append(autograd.evaluate(op, parts, spec))
            for place in dying:
                slots[place] = None
        outputs = [slots[place] for place in self.results]
        chosen = [pair for pair, yes in zip(self.in_place.items(), reuse, strict=False) if yes]
        overwritten = [arrays[number] for _, number in chosen]
        for place, output in enumerate(outputs):
            if any(np.may_share_memory(output.view, x.view) for x in overwritten):
                outputs[place] = output.copy()
        for place, number in chosen:
            arrays[number].view[...] = outputs[place].view
            outputs[place] = arrays[number]
        return outputs

    def watch(self, arrays: Sequence[NDArray], *spare: Any) -> tuple[list[NDArray], int]:
        """The outputs, and that anything may have been made: nothing watches NumPy."""
        return self(arrays), -1

    def __repr__(self) -> str:
        return f"{len(self.steps)} ops, run one by one by the reference device"


def build(
    inputs: Sequence[Any],
    outputs: Sequence[Value],
    donated: Mapping[int, int] | None = None,
    places: Mapping[Value, str] | None = None,
) -> ReferenceProgram:
    """The arguments of `compile.build`."""
    return ReferenceProgram(inputs, outputs, donated or {})
