"""A call of a jitted function under autograd: one node. Next: variant.py.

The forward program also returns what the backward program reads (the *residuals*); that one maps
residuals and the gradients of the results to those of the inputs. Where a gradient is itself
differentiated, or asked for in lazy mode, the traced graph is replayed as ops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from needle import autograd
from needle.array.ndarray import NDArray
from needle.autograd import MODE, Hooks, Tensor, TensorTuple, TensorTupleOp, Value, spec_of
from needle.backend.device import Device
from needle.capture.part import Part
from needle.capture.trace import Trace
from needle.errors import TraceError
from needle.ops.elementwise import StopGradient
from needle.ops.movement import Reshape
from needle.ops.tuples import MakeTensorTuple, Together, TupleGetItem


class Adjoint:
    """The gradients of a traced function's inputs, from those of some of its results."""

    def __init__(
        self, trace: Trace, forward: Part, results: Sequence[Tensor], device: Device
    ) -> None:
        self.inputs: list[Any] = list(forward.inputs)
        self.results = [forward.place(x) for x in results]
        self.out_grads = [trace.stand_in(spec_of(x)) for x in results]
        known = set(trace.created)
        with autograd.mode(trace=trace, lazy=True, grad=True):
            self.grads = gradients(results, self.out_grads, self.inputs)
        wanted = [x for x in self.grads if x is not None]
        cut = residuals(wanted, set(forward.numbers), known, set(self.out_grads))
        self.sources = [
            (True, forward.numbers[x]) if x in forward.numbers else (False, forward.place(x))
            for x in cut
        ]
        self.part = Part([*cut, *self.out_grads])
        self.places = [None if x is None else self.part.place(x) for x in self.grads]
        self.part.build(device, {}, {})

    def replay(self, inputs: Sequence[Any], out_grads: Sequence[Any]) -> list[Any]:
        """The gradients as nodes of the graph above inputs and out_grads."""
        known: dict[Value, Any] = dict(zip(self.inputs, inputs, strict=True))
        known |= zip(self.out_grads, out_grads, strict=True)
        roots = [x for x in self.grads if x is not None]
        for node in autograd.post_order(roots, autograd.pending_inputs, known):
            if node.cached_data is None:
                sources = [known[x] for x in node.operands]
                op = MakeTensorTuple() if isinstance(node.op, Together) else node.op
                known[node] = type(node).make_from_op(op, sources)
            else:
                known[node] = node
        return [None if x is None else known[x] for x in self.grads]


def gradients(
    outputs: Sequence[Value], out_grads: Sequence[Value], inputs: Sequence[Value]
) -> list[Any]:
    """The gradients of inputs, None where there are none."""
    parts = autograd.parts_below(outputs, out_grads, set(inputs))
    return [autograd.add_partials(parts[x]) if x in parts else None for x in inputs]


def residuals(
    grads: Sequence[Value], inputs: set[Value], known: set[Value], out_grads: set[Value]
) -> list[Any]:
    """The values of the forward trace that gradients read; tuples and copies are made again."""
    found: dict[Any, None] = {}
    seen = set(out_grads)
    stack: list[Any] = list(grads)
    while stack:
        x = stack.pop()
        if x in seen:
            continue
        seen.add(x)
        if x in inputs:
            found[x] = None
        elif x.cached_data is None and x in known and is_kept(x):
            found[x] = None
        elif x.cached_data is None:
            stack += x.operands
    return list(found)


def is_kept(x: Value) -> bool:
    """Whether a value is kept, not followed to what it is made of, which costs nothing."""
    return isinstance(x, Tensor) and not isinstance(x.op, StopGradient)


class JittedCall(TensorTupleOp):
    """y = f(x), f jitted, with what backward reads; dx by f's backward program"""

    name = "jit"

    def __init__(self, adjoint: Adjoint, saved: dict[int, NDArray], replay: Any = None) -> None:
        self.adjoint = adjoint
        self.saved = saved
        self.replay = replay  # of the call, if it was watched

    def gradient(self, out_grad: Any, node: Any) -> tuple[Any, ...]:
        adjoint, out_grads = self.adjoint, list(out_grad)
        if autograd.is_lazy():
            return tuple(adjoint.replay(node.inputs, out_grads))
        arrays = [
            node.inputs[place].cached_data if is_input else self.saved[place]
            for is_input, place in adjoint.sources
        ]
        arrays = [x.compact() for x in (*arrays, *(dy.realize_cached_data() for dy in out_grads))]
        if Hooks.judge is None:
            found = adjoint.part.run(arrays)
        else:
            found = self.watched(arrays, node, out_grads)
        values = [found[place] for place in adjoint.places if place is not None]
        grads = iter(items(JittedGradient(adjoint), (*node.inputs, *out_grads), values))
        return tuple(None if place is None else next(grads) for place in adjoint.places)

    def watched(self, arrays: list[NDArray], node: Any, out_grads: list[Any]) -> list[NDArray]:
        """The gradients; where they may be what the judge looks for, they are computed op by op
        first: of the function itself if its call was watched too, else of the traced graph."""
        found, made = self.adjoint.part.watch(arrays, [])
        if Hooks.judge.suspects(made, arrays[-len(out_grads) :], ()):
            if self.replay is None:
                self.adjoint.replay(node.inputs, out_grads)
            else:
                self.replay.backward(self.adjoint, out_grads)
        return found


class JittedGradient(TensorTupleOp):
    """dx of a jitted function, from (x..., dy...)"""

    name = "jit_gradient"

    def __init__(self, adjoint: Adjoint) -> None:
        self.adjoint = adjoint

    def gradient(self, out_grad: Any, node: Any) -> tuple[Any, ...]:
        if MODE.trace is not None:
            cure = (
                "call the function that is differentiated twice inside of the jitted function too"
            )
            raise TraceError(f"jit: expected first derivatives of calls from outside; {cure}")
        with autograd.mode(lazy=True):
            with autograd.enable_grad():
                leaves = [Reshape(x.shape)(x) for x in node.inputs]
                count = len(self.adjoint.inputs)
                grads = self.adjoint.replay(leaves[:count], leaves[count:])
            outputs = [x for x in grads if x is not None]
            found = gradients(outputs, tuple(out_grad), leaves)
        for each in found:
            if each is not None and not autograd.is_lazy():
                each.realize_cached_data()
        return tuple(found)


def items(op: TensorTupleOp, inputs: tuple[Any, ...], arrays: Sequence[NDArray]) -> list[Tensor]:
    """The results of a node that is computed already, as Tensors with history where it is kept."""
    if not MODE.grad or not any(x.requires_grad for x in inputs):
        return [Tensor._new(None, (), array, False) for array in arrays]
    node = TensorTuple._new(op, inputs, tuple(arrays), True)
    return [
        Tensor._new(TupleGetItem(number), (node,), array, array.form.is_float)
        for number, array in enumerate(arrays)
    ]


def call_with_history(
    adjoint: Adjoint, inputs: Sequence[Any], found: Sequence[NDArray], replay: Any
) -> dict[int, Tensor]:
    """The differentiable results of a call, by their place."""
    saved = {place: found[place] for is_input, place in adjoint.sources if not is_input}
    arrays = [found[place] for place in adjoint.results]
    results = items(JittedCall(adjoint, saved, replay), tuple(inputs), arrays)
    return dict(zip(adjoint.results, results, strict=True))
