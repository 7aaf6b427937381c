"""Replay: a call of a jitted function again, op by op, while somebody judges what programs make.

In a `detect_anomaly` block (Hooks.judge) a program runs without overwriting its inputs, and nothing
that it found is written before it is judged. Where a NaN or an infinity may have been made, the
Python function runs eagerly on the same arguments, state and random numbers, watched by the judge's
hooks: the first op that made one raises. Afterwards all is as before. Next: ../debug.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy as np

from needle import autograd
from needle.array.ndarray import NDArray
from needle.autograd import MODE, Hooks, Tensor
from needle.capture.gradient import Adjoint
from needle.capture.holders import Snapshot, entries
from needle.capture.structure import Call, tensors_in
from needle.capture.variant import DATA, Variant
from needle.init.random import Source
from needle.ops.contract import Precision
from needle.ops.tuples import make_tuple

SMALL = 4096  # elements of a result that is looked at
FIELDS = attrgetter("cached_data", "_grad", "requires_grad", "op", "inputs")


class State:
    """Tensors, what Modules and Optimizers hold, random generators and the precision of
    contractions: to be set back."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        self.snapshot = Snapshot()
        items = (x for _, _, copy in self.snapshot.before.values() for _, x in entries(copy))
        found = [*tensors, *(x for x in items if isinstance(x, Tensor))]
        found += [] if Source.generator is None else [Source.generator.state]
        self.tensors = [(x, FIELDS(x)) for x in dict.fromkeys(found)]
        self.numpy, self.dot = np.random.get_state(), Precision.dot

    def restore(self) -> None:
        self.snapshot.restore()
        for x, before in self.tensors:
            x.cached_data, x._grad, x.requires_grad, x.op, x.inputs = before
        np.random.set_state(self.numpy)
        Precision.dot = self.dot

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Within the block all may change; after it, it is as before."""
        try:
            yield
        finally:
            self.restore()


class Replay:
    """One call of a variant, to be run again: at once, or when its gradient is computed."""

    def __init__(self, function: Any, draw_from: Any, variant: Variant, call: Call) -> None:
        self.function, self.variant = function, variant
        self.args, self.kwargs = call.given
        self.settings = {"draw_from": draw_from, "autocast": MODE.autocast, "lazy": False}
        self.inputs = [call.tensors[number] for number in variant.arguments]
        self.inputs += variant.captured() or []
        self.arrays, self.dot = list(map(DATA, self.inputs)), Precision.dot

    def state(self) -> State:
        """All that running it again may change."""
        written = [x for x, _ in (*self.variant.data, *self.variant.grads)]
        return State([*self.inputs, *self.variant.gradients, *written])

    def rewind(self) -> None:
        """Let the function find what the call found; history from before it is not followed."""
        variant, Precision.dot = self.variant, self.dot
        for x, array in zip(self.inputs, self.arrays, strict=True):
            x.cached_data, x.op, x.inputs = array, None, ()
        held = iter(self.inputs[len(variant.arguments) + len(variant.direct) :])
        for slot in variant.slots:
            slot.put(next(held))
        for leaf in variant.gradients:
            leaf._grad = next(held)

    def compute(self) -> list[Tensor]:
        """The Tensors that the function returns, computed op by op."""
        self.rewind()
        with autograd.mode(**self.settings, backward_of=None):
            tensors = tensors_in(self.function(*self.args, **self.kwargs))
            for x in tensors:
                x.realize_cached_data()
        return tensors

    def forward(self) -> None:
        with self.state().kept():
            self.compute()

    def backward(self, adjoint: Adjoint, out_grads: Sequence[Tensor]) -> None:
        """Differentiate it, from what the call read."""
        with autograd.enable_grad(), self.state().kept():
            found = self.compute()
            places = [each.place if each.known is None else None for each in self.variant.results]
            root = make_tuple(*(found[places.index(place)] for place in adjoint.results))
            if root.requires_grad:
                autograd.compute_gradient_of_variables(root, make_tuple(*out_grads))


def watched(
    function: Any, draw_from: Any, variant: Variant, call: Call, arrays: list[NDArray]
) -> Any:
    """What Variant.run does, judged before anything is written."""
    judge, count = Hooks.judge, len(variant.arguments)
    found, made = variant.part.watch(arrays, judge.spare.pop(variant, []))
    read, clean = arrays, judge.clean.get(variant, [])
    if list(map(id, arrays[count:])) == list(map(id, clean)):
        read = arrays[:count]
    small = [found[x.place] for x in variant.results if x.known is None]
    suspect = judge.suspects(made, read, [x for x in small if x.form.size <= SMALL])
    replay = None
    if suspect or variant.adjoint is not None:
        replay = Replay(function, draw_from, variant, call)
        if suspect:
            replay.forward()
    result = variant.finish(call, found, replay)
    judge.spare[variant] = [arrays[number] for number in variant.part.reused]
    # What a clean run wrote is clean
    judge.clean = {variant: list(map(DATA, variant.captured() or ()))}
    return result
