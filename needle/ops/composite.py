"""Composites: ops that are subgraphs of primitives. One node in the graph, one program to run.
Next: activation.py.

A composite writes `expand`, in terms of ops on Tensors; `infer` and `compute` follow from it. It is
traced once per shapes and dtypes of its inputs to a Program, a flat list of primitive steps, which
`compute` runs on NumPy arrays. Its gradient is again a composite, CompositeGradient: what
`expand_gradient` writes where a rule of its own is stabler or shorter, else reverse mode through
`expand`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from needle import autograd
from needle.array.spec import Spec
from needle.autograd import Op, Tensor, TensorOp, TensorTuple, TensorTupleOp, Value, primitive
from needle.ops.elementwise import SUBTRACT, BroadcastTo, EWiseAdd, Negate, astype
from needle.ops.tuples import make_tuple


def tracing() -> AbstractContextManager[None]:
    """Within the block ops on placeholders describe a program: nothing is computed or watched."""
    return autograd.mode(lazy=True, tracing=True, grad=True, trace=None, record=None, autocast=None)


def placeholder(spec: Spec, requires_grad: bool = False) -> Tensor:
    """A leaf without a value."""
    found = Tensor._new(None, (), None, requires_grad and spec.is_float)
    found.spec, found.operands = spec, None
    return found


class Program:
    """A traced expansion: steps (compute, where its arguments lie, where its result goes) over a
    list of slots."""

    def __init__(self, inputs: Sequence[Tensor], output: Value) -> None:
        self.spec = autograd.spec_of(output)
        slots: dict[Value, int] = {x: index for index, x in enumerate(inputs)}
        self.constants: list[np.ndarray] = []
        self.steps: list[tuple[Callable[..., Any], tuple[int, ...]]] = []
        order = autograd.post_order([output], lambda node: reading(node)[1], inputs)
        for node in order:
            if node.cached_data is not None:
                slots[node] = len(slots)
                self.constants.append(node.cached_data.view)
        for node in order:
            if node.cached_data is None:
                op, sources = reading(node)
                several = any(type(autograd.spec_of(x)) is tuple for x in sources)
                compute = flattening(op.compute) if several else op.compute
                self.steps.append((compute, tuple(slots[x] for x in sources)))
                slots[node] = len(slots)
        self.result = slots[output]

    def __call__(self, arrays: Sequence[np.ndarray]) -> Any:
        slots = [*arrays, *self.constants]
        for compute, places in self.steps:
            slots.append(compute(*[slots[place] for place in places]))
        return slots[self.result]


def flattening(compute: Callable[..., Any]) -> Callable[..., Any]:
    """`compute` for arguments of which tuples count as their items."""
    return lambda *values: compute(*autograd.flattened(values))


def reading(node: Value) -> tuple[Op, tuple[Value, ...]]:
    """What computes a node from what: NumPy broadcasts and subtracts by itself."""
    op: Any = node.op
    if op is None or node.cached_data is not None:
        return op, ()
    sources = tuple(node.inputs)
    if type(op) is EWiseAdd and type(sources[1].op) is Negate and sources[1].cached_data is None:
        op, sources = SUBTRACT, (sources[0], sources[1].inputs[0])
    if getattr(op, "is_elementwise", False):
        bare = tuple(x.inputs[0] if type(x.op) is BroadcastTo else x for x in sources)
        if np.broadcast_shapes(*(autograd.spec_of(x).shape for x in bare)) == node.spec.shape:
            sources = bare
    return op, sources


class CompositeMethods(Op):
    """What composites with one result and with several have in common."""

    rounds = False  # whether its expansion rounds low precision but once, as it is
    reads_output = False  # whether `expand_gradient` takes y, between dy and x
    # expand_gradient(dy..., [y,] x...) -> a gradient per input
    expand_gradient: Callable[..., Any] | None = None

    def expand(self, *inputs: Any) -> Any:
        """The op's meaning in terms of other ops."""
        raise NotImplementedError(f"{type(self).__name__}: expand is not written")

    def check(self, *specs: Spec) -> None:
        """Raise every user error."""

    def program(self, key: tuple[tuple[Any, ...], ...]) -> Program:
        """The op for inputs of given (shape, dtype) each."""
        known: dict[tuple[Any, ...], Program] = self.__dict__.setdefault("programs", {})
        found = known.get(key)
        if found is None:
            if len(known) >= 64:
                known.clear()
            with tracing():
                inputs = [placeholder(Spec(*each)) for each in key]
                found = known[key] = Program(inputs, as_value(self.expand(*inputs)))
        return found

    def infer(self, *specs: Spec) -> Any:
        self.check(*specs)
        return self.program(tuple([(spec.shape, spec.dtype) for spec in specs])).spec

    def compute(self, *arrays: np.ndarray) -> Any:
        return self.program(tuple([(array.shape, array.dtype) for array in arrays]))(arrays)

    def gradient(self, out_grad: Any, node: Any) -> tuple[Tensor | None, ...]:
        wanted = tuple(x.requires_grad for x in node.inputs)
        grads = list(as_sequence(out_grad))
        found = CompositeGradient(self, wanted, len(grads))(
            *grads, *([node] if self.reads_output else []), *node.inputs
        )
        parts = iter(as_sequence(found))
        return tuple(next(parts) if each else None for each in wanted)


class Composite(CompositeMethods, TensorOp):
    """A composite with one result."""


class CompositeTuple(CompositeMethods, TensorTupleOp):
    """A composite with several results; `expand` returns a tuple."""


def as_value(found: Any) -> Value:
    return found if isinstance(found, Value) else make_tuple(*found)


def as_sequence(found: Any) -> Sequence[Tensor]:
    return tuple(found) if isinstance(found, (TensorTuple, tuple, list)) else (found,)


@primitive
class CompositeGradient(CompositeMethods):
    """dx of a composite's wanted inputs, from (dy..., [y,] x...): one program"""

    of: Any
    wanted: tuple[bool, ...]
    outputs: int

    @property
    def name(self) -> str:
        return f"{autograd.op_name(self.of)}_gradient"

    def __call__(self, *inputs: Any) -> Any:
        kind: Any = Tensor if sum(self.wanted) == 1 else TensorTuple
        return kind.make_from_op(self, inputs)

    def expand(self, *inputs: Tensor) -> Any:
        values = inputs[-len(self.wanted) :]
        if self.of.expand_gradient is not None:
            found = as_sequence(self.of.expand_gradient(*inputs))
            grads = [each for each, wanted in zip(found, self.wanted, strict=True) if wanted]
        else:
            grads = differentiate(self.of, inputs[: self.outputs], values, self.wanted)
        of_wanted = [x for x, wanted in zip(values, self.wanted, strict=True) if wanted]
        grads = [astype(each, x.dtype) for each, x in zip(grads, of_wanted, strict=True)]
        return grads[0] if len(grads) == 1 else tuple(grads)


def differentiate(
    op: Any, out_grads: Sequence[Tensor], inputs: Sequence[Tensor], wanted: Sequence[bool]
) -> list[Tensor]:
    """Reverse mode through an op's expansion: the gradients of the wanted inputs."""
    pairs = list(zip(inputs, wanted, strict=True))
    leaves = [placeholder(x.spec, True) if each else x for x, each in pairs]
    with autograd.enable_grad():
        output = as_value(op.expand(*leaves))
        if output.requires_grad:
            grad = out_grads[0] if isinstance(output, Tensor) else make_tuple(*out_grads)
            autograd.compute_gradient_of_variables(output, grad)
    back: dict[Any, Any] = dict(zip(leaves, inputs, strict=True))
    found = [(leaf.grad, x) for leaf, x in back.items() if leaf is not x]
    return [x * 0.0 if grad is None else substitute(grad, back) for grad, x in found]


def substitute(root: Tensor, back: dict[Any, Any]) -> Any:
    """The same graph over other leaves, in place: nodes are fresh from a trace and nobody
    else's."""
    for node in autograd.find_topo_sort([root]):
        if node.inputs:
            node.inputs = tuple(back.get(x, x) for x in node.inputs)
            node.operands = tuple(back.get(x, x) for x in node.operands or ())
    return back.get(root, root)
