"""Recomputation: what a function computed on the way is not kept for backward, but computed again.

While the function runs, its ops are noted (Record). Those that lead to its results become a
Segment, a list of steps, and the results the items of one node, Recomputed, that holds nothing but
the segment and what it reads. Its gradient runs the steps again, on inputs that in a program wait
for the gradient of the results (the op After). The function itself is not called again: random
draws and whatever else it did, running statistics included, happen once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, NamedTuple

from needle import autograd
from needle.autograd import MODE, Op, Tensor, TensorTuple, Value, parts_below, spec_of
from needle.capture.structure import replace_tensors, tensors_in
from needle.errors import expect
from needle.ops.movement import After
from needle.ops.tuples import Together, make_tuple, tuple_get_item


class Step(NamedTuple):
    """An op on values of a segment, by number."""

    op: Op
    sources: list[int]
    keeps: bool  # whether the result has history


class Segment(NamedTuple):
    """Values that follow from inputs: those come first, then the result of each step."""

    steps: list[Step]
    outputs: list[int]

    def run(self, inputs: Sequence[Value]) -> list[Any]:
        """The outputs, with history where they had it."""
        values = list(inputs)
        with autograd.enable_grad():
            for op, sources, keeps in self.steps:
                MODE.grad = keeps
                values.append(op(*[values[place] for place in sources]))
        return [values[place] for place in self.outputs]


class Record:
    """The ops that run, in this thread, until a function returns."""

    def __init__(self, is_lazy: bool) -> None:
        self.is_lazy = is_lazy  # whether nodes wait, else they are computed as they are made
        self.made: dict[Value, tuple[Op, list[Value], bool]] = {}

    def note(self, value: Value, op: Op, inputs: Sequence[Value]) -> None:
        """A node was made. One that reads a tuple from outside counts as from outside, too."""
        if not any(isinstance(x, TensorTuple) and x not in self.made for x in inputs):
            self.made[value] = op, [self.fixed(x) for x in inputs], value.requires_grad
        if not self.is_lazy:
            value.realize_cached_data()

    def fixed(self, x: Value) -> Value:
        """x as it is now: data of a leaf, such as the state of a generator, may be set anew."""
        if x in self.made or x.requires_grad or x.op is not None:
            return x
        with autograd.mode(record=None):
            return x.detach()  # type: ignore[attr-defined]

    def segment(self, outputs: Sequence[Value]) -> tuple[Segment, tuple[Value, ...]]:
        """What the outputs follow from: a segment and its inputs. Those with history come first, in
        the order in which reverse mode would meet them."""
        order = self.order(outputs, lambda x: True)
        ahead = self.order(outputs, lambda x: x.requires_grad)
        inputs = [x for x in dict.fromkeys((*ahead, *order)) if x not in self.made]
        places = {x: number for number, x in enumerate(inputs)}
        steps = []
        for x in order:
            if x in self.made:
                op, sources, keeps = self.made[x]
                steps.append(Step(op, [places[y] for y in sources], keeps))
                places[x] = len(places)
        known = set(ahead)
        given = [x if x in known or not x.requires_grad else x.detach() for x in inputs]
        return Segment(steps, [places[y] for y in outputs]), tuple(given)

    def order(self, outputs: Sequence[Value], counts: Callable[[Value], bool]) -> list[Any]:
        """What the outputs follow from, each after what it reads."""
        nothing: Any = (None, ())
        return autograd.post_order(
            outputs, lambda x: list(filter(counts, self.made.get(x, nothing)[1]))
        )

    def contract(self, found: Any) -> Any:
        """What the function returned, Tensors with history as items of one node."""
        leaves = dict.fromkeys(tensors_in(found))
        outputs = tuple([x for x in leaves if x in self.made and x.requires_grad])
        if not outputs:
            return found
        segment, inputs = self.segment(outputs)
        node = combine(Recomputed(segment), inputs, outputs)
        items = {y: tuple_get_item(node, number) for number, y in enumerate(outputs)}
        return replace_tensors(found, lambda x: items.get(x, x))


def combine(op: Op, inputs: tuple[Value, ...], outputs: tuple[Tensor, ...]) -> TensorTuple:
    """A node above inputs whose value is that of the outputs."""
    node: TensorTuple = TensorTuple._new(op, inputs, None, True)
    if all(y.cached_data is not None for y in outputs):
        node.cached_data = tuple([y.cached_data for y in outputs])
    else:
        node.spec = tuple(map(spec_of, outputs))
        node.operands = outputs if MODE.trace is None else MODE.trace.note(node, outputs)
    if MODE.record is not None:
        MODE.record.note(node, op, inputs)
    return node


def recorded(function: Callable[[], Any]) -> Any:
    """What a function returns, without what it computed on the way."""
    if not MODE.grad:
        return function()
    record = Record(autograd.is_lazy() if MODE.record is None else MODE.record.is_lazy)
    with autograd.mode(record=record, lazy=True):
        found = function()
    return record.contract(found)


class Recomputed(Together):
    """y = the outputs of a segment;  dx by reverse mode through the segment, run again"""

    name = "checkpoint"
    sees_missing = True

    def __init__(self, segment: Segment) -> None:
        self.segment = segment

    def __call__(self, *inputs: Any) -> TensorTuple:
        return make_tuple(*recorded(lambda: self.segment.run(inputs)))

    def gradient(self, out_grad: Any, node: Any) -> tuple[Any, ...]:
        return tuple(recorded(lambda: self.partials(node.inputs, out_grad)))

    def partials(self, inputs: Sequence[Any], out_grad: Sequence[Any]) -> list[Any]:
        """Of each input, the parts of its gradient: added one by one to those from elsewhere, their
        sum has the bits that it has without recomputation."""
        out_grads = [dy for dy in out_grad if dy is not None]
        with autograd.enable_grad():
            leaves = [After()(x, *out_grads) for x in inputs]
            outputs = self.segment.run(leaves)
        read = [y for y, dy in zip(outputs, out_grad, strict=True) if dy is not None]
        found = parts_below(read, out_grads, set(leaves))
        return [found.get(x) for x in leaves]


def checkpoint(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, its inner values dropped after the call and computed again in backward: memory
    of one segment instead of all, for one more forward (Chen et al., "Training deep nets with
    sublinear memory cost", 2016).

    function: a function of whatever arguments, or a Module; `@ndl.checkpoint` works, too. Values,
    gradients of any order and random draws are those of the function itself. Under jit the
    recomputation waits for the gradient that it serves.
    """
    received = f"received a {type(function).__name__}"
    wanted = f"checkpoint: expected a function or a Module; {received}"
    expect(callable(function), wanted, TypeError)

    @wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        return recorded(lambda: function(*args, **kwargs))

    return run
