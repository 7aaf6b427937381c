"""Scan: a loop over time as one op, its body a list of steps. Next: precision.py; needle/scan.py is
what users call.

    carry, y = body(carry, x, captured)    for each x of xs

Backward is a scan in the other direction whose body is the gradient of the body: it reads stacks of
what the body computed (*saved*), which the forward scan returns after its own results. Where those
are missing (checkpoints, higher derivatives), the body is computed again, turn by turn, from stacks
of the carries. What a captured tensor's gradient adds up over turns is, by definition, for each of
its uses:

    a product a @ b, or a sum over a first axis     one of all turns' operands side by side
    what is stacked anyway                          the stack's sum over turns
    anything else                                   a sum carried from turn to turn
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from needle import autograd
from needle.array.ndarray import NDArray
from needle.array.spec import Spec
from needle.autograd import MODE, Op, Tensor, TensorTuple, TensorTupleOp, Value, primitive, spec_of
from needle.backend.numpy import compute
from needle.ops.composite import placeholder, tracing
from needle.ops.contract import BroadcastMatMul, MatMul
from needle.ops.elementwise import StopGradient
from needle.ops.movement import Permute, Reshape, Transpose, broadcast_to, permute, reshape
from needle.ops.reduce import Summation, summation
from needle.ops.tuples import MakeTensorTuple, Together, tuple_get_item
from needle.site import Site


class Step(NamedTuple):
    """An op on values of a segment, by number."""

    op: Op
    sources: tuple[int, ...]
    keeps: bool  # whether the result has history
    several: bool  # whether it is a tuple

    def node(self, parts: Sequence[Any]) -> Any:
        """The op's node on values."""
        if type(self.op) is BroadcastMatMul:  # so that the product is seen
            return self.op.expand(*parts)
        kind: Any = TensorTuple if self.several else Tensor
        return kind.make_from_op(self.op, parts)


class Segment(NamedTuple):
    """Values that follow from inputs: those come first, then the result of each step."""

    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]

    def values(self, inputs: Iterable[Any], origins: Iterable[Any] = ()) -> list[Any]:
        """All values, as nodes above the inputs, with history where the steps keep it."""
        found, keeps = list(inputs), MODE.grad
        for step, origin in zip_longest(self.steps, origins):
            parts = [found[place] for place in step.sources]
            with autograd.mode(grad=keeps and step.keeps, origin=origin):
                found.append(step.node(parts))
        return found

    def specs(self, inputs: Iterable[Spec]) -> list[Any]:
        found: list[Any] = list(inputs)
        for op, sources, _, _ in self.steps:
            found.append(op.infer(*autograd.flattened([found[place] for place in sources])))
        return found

    def with_outputs(self, outputs: Iterable[int]) -> Segment:
        return self._replace(outputs=tuple(outputs))


def segment_of(
    outputs: Sequence[Any], inputs: Sequence[Any], reads: Callable[[Any], Sequence[Any]]
) -> tuple[Segment, list[Any], list[Any]]:
    """What makes the outputs of the inputs; the leaves that it reads besides, which follow the
    inputs; and the values of the steps. reads: what a value is made of, nothing for a leaf."""
    order = autograd.post_order(outputs, reads, inputs)
    leaves = [x for x in order if not reads(x)]
    places = {x: number for number, x in enumerate((*inputs, *leaves))}
    steps = []
    for x in order:
        if x not in places:
            op: Any = MakeTensorTuple() if isinstance(x.op, Together) else x.op
            sources = tuple([places[y] for y in reads(x)])
            steps.append(Step(op, sources, x.requires_grad, isinstance(x, TensorTuple)))
            places[x] = len(places)
    count = len(inputs) + len(leaves)
    segment = Segment(count, tuple(steps), tuple([places[y] for y in outputs]))
    return segment, leaves, list(places)[count:]


def below(x: Any) -> Sequence[Any]:
    """What a node of a composite's trace is made of."""
    return x.inputs if x.cached_data is None else ()


class Origin(NamedTuple):
    """Where a step comes from, which is no part of an op: kept apart, while somebody watches.

    place: a Site, or words; in an Adjoint the number of the forward value that it stands for, and
    whether it is part of its gradient.
    """

    place: Any = None
    inside: Sequence[Origin] = ()  # of a Scan: its body's steps

    @property
    def is_known(self) -> bool:
        return isinstance(self.place, (Site, str))

    def __str__(self) -> str:
        return self.place if isinstance(self.place, str) else f"at {self.place}"


NOWHERE = Origin((-1, False))
ORIGINS: WeakKeyDictionary[Value, Sequence[Origin]] = WeakKeyDictionary()  # of Scans' steps


def traced_back(op: Scan, known: Sequence[Origin], origins: Iterable[Origin]) -> list[Origin]:
    """The origins of an Adjoint's steps, by those of the forward scan's."""
    found = []
    for (number, is_gradient), inside in origins:
        step = number - op.body.inputs
        if step < 0:
            found.append(Origin())
        elif is_gradient:
            one, before = op.body.steps[step].op, known[step]
            nested = traced_back(one, before.inside, inside) if before.inside else ()
            words = f"in the gradient of {autograd.op_name(one)} computed {before}"
            found.append(Origin(words, nested))
        else:
            found.append(known[step])
    return found


def turns_of(op: Scan, inputs: Sequence[Any], origins: Iterable[Any]) -> Iterator[int]:
    """Each turn, whose body then runs op by op on the inputs, for those who watch nodes."""
    count, carried = op.carries + op.xs, list(inputs[: op.carries])
    for turn in op.places:
        yield turn
        with autograd.mode(grad=False, autocast=None, backward_of=None, origin=None):
            elements = [element(x, turn) for x in inputs[op.carries : count]]
            values = op.body.values([*carried, *elements, *inputs[count:]], origins)
            for x in values if MODE.trace is None else ():
                x.realize_cached_data()
            carried = [values[n] for n in op.body.outputs[: op.carries]]


def element(x: Any, turn: int) -> Any:
    known = MODE.trace is None and x.cached_data is not None
    return Tensor.make_const(x.cached_data[turn]) if known else x[turn]


@primitive
class Scan(TensorTupleOp):
    """(carries, stacks of ys) from (carries, xs, captured), by `length` turns of a body;
    backward is a scan in the other direction

    body: from (carries, an element of each of xs, captured) to (carries, ys). xs and ys lie along a
    first axis, which is run through from its end if `reverse`. saved: how many of the last ys are
    there for backward.
    """

    body: Segment
    carries: int
    xs: int
    length: int
    reverse: bool = False
    saved: int = 0
    sees_missing = True
    rounds_itself = True

    def infer(self, *specs: Spec) -> tuple[Spec, ...]:
        found = self.inner(specs)
        ys = [found[n] for n in self.body.outputs]
        stacked = [y.with_shape((self.length, *y.shape)) for y in ys[self.carries :]]
        return (*ys[: self.carries], *stacked)

    def inner(self, specs: Sequence[Spec]) -> list[Any]:
        """The specs of the body's values."""
        count = self.carries + self.xs
        xs = [x.with_shape(x.shape[1:]) for x in specs[self.carries : count]]
        return self.body.specs((*specs[: self.carries], *xs, *specs[count:]))

    @property
    def places(self) -> range:
        """Places along the first axis, in the order of turns."""
        return range(self.length)[:: -1 if self.reverse else 1]

    def compute(self, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        specs = self.inner([Spec(x.shape, x.dtype) for x in arrays])
        count, outputs = self.carries + self.xs, self.body.outputs
        carried, captured = list(arrays[: self.carries]), arrays[count:]
        ys = [specs[n] for n in outputs[self.carries :]]
        stacks = [np.empty((self.length, *y.shape), y.dtype) for y in ys]
        for place in self.places:
            values: list[Any] = [*carried, *(x[place] for x in arrays[self.carries : count])]
            values += captured
            for op, sources, _, _ in self.body.steps:
                views = autograd.flattened([values[each] for each in sources])
                values.append(compute(op, views, specs[len(values)]))
            carried = [values[n] for n in outputs[: self.carries]]
            for stack, n in zip(stacks, outputs[self.carries :], strict=True):
                stack[place] = values[n]
        return (*carried, *stacks)

    def gradient(self, out_grad: Any, node: Any) -> tuple[Any, ...]:
        count = len(self.body.outputs) - self.saved
        known = all(dy is None for dy in out_grad[count:])
        kept = self.body.outputs[count:] if known else ()
        given = tuple([dy is not None for dy in out_grad])
        found = adjoint(self, tuple(map(spec_of, node.inputs)), wanted(node.inputs), given, kept)
        return found.pull(self, node, out_grad, kept)


def wanted(inputs: Sequence[Any]) -> tuple[bool, ...]:
    return tuple([x.requires_grad for x in inputs])


def loop(
    body: Segment, carries: Sequence[Any], xs: Sequence[Any], captured: Sequence[Any], length: int,
    reverse: bool = False, save: str = "", origins: Sequence[Origin] = (),
) -> list[Any]:  # fmt: skip
    """The results of a Scan, without what does not change from turn to turn, which is computed
    before. save: what is kept for backward where there may be one: "all", "carries" (the rest is
    computed again) or nothing (all is). origins: of the steps, where somebody watches."""
    body, captured, origins = hoist(body, len(carries) + len(xs), captured, origins)
    op, inputs = Scan(body, len(carries), len(xs), length, reverse), (*carries, *xs, *captured)
    if save and MODE.grad and any(x.requires_grad for x in inputs):
        numbers = saved_by(op, tuple(map(spec_of, inputs)), wanted(inputs), save)
        more = body.with_outputs((*body.outputs, *numbers))
        op = Scan(more, len(carries), len(xs), length, reverse, len(numbers))
    with autograd.mode(origin=Origin(None, origins)):
        found = op(*inputs)
    return list(found[: len(body.outputs)])


def hoist(
    body: Segment, changing: int, captured: Sequence[Any], origins: Sequence[Origin]
) -> tuple[Segment, list[Any], Sequence[Origin]]:
    """The body without the steps that do not depend on its first inputs, and what it then reads;
    captured tensors that nobody reads are left out."""
    varies = [place < changing for place in range(body.inputs)]
    for step in body.steps:
        varies.append(any(varies[place] for place in step.sources))
    steps = list(enumerate(body.steps, body.inputs))
    fixed = {n for n, step in steps if not varies[n]}
    reads = [n for number, step in steps if varies[number] for n in step.sources]
    used = [n for n in dict.fromkeys((*reads, *body.outputs)) if not varies[n]]
    if any(body.steps[n - body.inputs].several for n in used if n in fixed):
        return body, list(captured), origins
    places = {n + changing: n for n in range(len(captured))}
    places |= {n: number for number, n in enumerate(sorted(fixed), len(captured))}
    before = [
        step._replace(sources=tuple([places[x] for x in step.sources]))
        for n, step in steps
        if n in fixed
    ]
    at = dict(enumerate(origins, body.inputs))
    known = [at[n] for n in sorted(fixed) if at]
    values = Segment(len(captured), tuple(before), ()).values(captured, known)
    inputs = [*range(changing), *used]
    new = {n: number for number, n in enumerate(inputs)}
    rest: list[Step] = []
    for n, step in steps:
        if varies[n]:
            new[n] = len(inputs) + len(rest)
            rest.append(step._replace(sources=tuple([new[x] for x in step.sources])))
    outputs = tuple([new[n] for n in body.outputs])
    body = Segment(len(inputs), tuple(rest), outputs)
    left = [origin for n, origin in at.items() if varies[n]]
    return body, [values[places[n]] for n in used], left


# The gradient


def saved_by(op: Scan, specs: Any, wanted: Any, save: str) -> list[int]:
    """The numbers of values that backward reads: of those that it may read."""
    kept = None if save == "all" else ()
    found = adjoint(op, specs, wanted, (True,) * len(op.body.outputs), kept)
    inside = range(op.carries, op.body.inputs)  # known from outside
    return [n for n in found.reads if n not in inside]


class Use(NamedTuple):
    """A value in all turns: a stack of the forward scan, by the value's number, or of the
    gradient's scan, by its place, and how its elements are moved."""

    is_forward: bool
    number: int
    moves: tuple[Op, ...] = ()


class Adjoint(NamedTuple):
    """The gradient of a Scan: a body, and of what the inputs' gradients are made: a result of its
    scan (by number), a stack of it (Use), or a sum over turns (op or None, Use, ...)."""

    body: Segment  # from (dcarries, sums | dys, stacks | captured, constants)
    carries: tuple[int, ...]  # those of floats
    sums: tuple[Spec, ...]
    ys: tuple[int, ...]  # outputs whose gradients are read
    stacks: tuple[int, ...]  # values of the forward scan that the body reads
    captured: tuple[int, ...]
    constants: tuple[Any, ...]
    parts: tuple[tuple[Any, ...], ...]  # of each input
    reads: tuple[int, ...]  # values of the forward scan that are read by whoever
    origins: tuple[Origin, ...]  # of the body's steps

    def pull(self, op: Scan, node: Any, out_grad: Any, kept: Sequence[int]) -> tuple[Any, ...]:
        """The gradients of a node's inputs."""
        sources, inputs, device = self.sources(op, node, kept), node.inputs, node.inputs[0].device
        begin = [
            zeros(spec_of(inputs[n]), device) if out_grad[n] is None else out_grad[n]
            for n in self.carries
        ]
        begin += [zeros(spec, device) for spec in self.sums]
        xs = [*(out_grad[n] for n in self.ys), *(sources[n] for n in self.stacks)]
        constants = [x if x.device is device else x.to(device) for x in self.constants]
        captured = [*(inputs[n] for n in self.captured), *constants]
        known = ORIGINS.get(node)
        origins = traced_back(op, known, self.origins) if known else self.origins
        found = loop(self.body, begin, xs, captured, op.length, not op.reverse, "", origins)
        stacks = found[len(begin) :]

        def stack_of(use: Use) -> Any:
            return moved(sources[use.number] if use.is_forward else stacks[use.number], use.moves)

        def total(part: Any) -> Any:
            if isinstance(part, int):
                return found[part]
            if isinstance(part, Use):
                return stack_of(part)
            op, *uses = part
            stacks = [*map(stack_of, uses)]
            return summation(stacks[0], (0,)) if op is None else ACROSS[type(op)](op, *stacks)

        grads = [[total(part) for part in parts] for parts in self.parts]
        return tuple([autograd.add_partials(parts) if parts else None for parts in grads])

    def sources(self, op: Scan, node: Any, kept: Sequence[int]) -> dict[int, Any]:
        """Stacks of the forward scan's values; those that are missing by another run of it."""
        first, places = len(op.body.outputs) - op.saved, range(op.carries, op.carries + op.xs)
        found = {n: node.inputs[n] for n in places}
        found |= {n: tuple_get_item(node, first + place) for place, n in enumerate(kept)}
        missing = [n for n in self.reads if n not in found]
        if missing:
            body = op.body.with_outputs((*op.body.outputs[: op.carries], *missing))
            again = Scan(body, op.carries, op.xs, op.length, op.reverse)(*node.inputs)
            found |= {n: again[op.carries + place] for place, n in enumerate(missing)}
        return found


def sum_across(op: Summation, x: Any) -> Any:
    """The sum over turns of x's sum over its first axis, as one sum."""
    return summation(reshape(x, (-1, *x.shape[2:])), (0,))


def product_across(multiply: MatMul, a: Any, b: Any) -> Any:
    """The sum over turns of a @ b, as one product."""
    *batch, m, k = a.shape[1:]
    axes = range(1, len(batch) + 1)
    a = reshape(permute(a, (*axes, a.ndim - 2, 0, a.ndim - 1)), (*batch, m, len(a) * k))
    b = reshape(permute(b, (*axes, 0, b.ndim - 2, b.ndim - 1)), (*batch, len(b) * k, b.shape[-1]))
    return multiply.multiply(a, b)


ACROSS: dict[type[Op], Callable[..., Any]] = {MatMul: product_across, Summation: sum_across}


def moved(stack: Any, moves: Sequence[Op]) -> Any:
    """A stack whose elements are moved by ops, the last one first."""
    for op in moves[::-1]:
        if isinstance(op, Reshape):
            stack = reshape(stack, (len(stack), *op.shape))
        else:
            axes = op.compute(np.empty(range(1, stack.ndim))).shape  # the axes' numbers as sizes
            stack = permute(stack, (0, *axes))
    return stack


def zeros(spec: Spec, device: Any = None) -> Tensor:
    zero = Tensor.make_const(NDArray(np.zeros((), spec.dtype), device))
    return broadcast_to(zero, spec.shape)


@lru_cache(maxsize=256)
def adjoint(
    op: Scan, specs: tuple[Spec, ...], wanted: tuple[bool, ...], given: tuple[bool, ...],
    kept: tuple[int, ...] | None,
) -> Adjoint:  # fmt: skip
    """The gradient of a Scan. wanted: of which inputs; given: which outputs have one; kept: the
    numbers of values that may be read from stacks, beside carries and xs; None: all but those that
    cost nothing to make again."""
    with tracing():
        return Derivation(op, specs, wanted, given).cut(kept)


class Derivation:
    """A body and its gradient as one graph, which is cut between the two."""

    is_lazy = True  # as a Record of ../recompute.py

    def __init__(self, op: Scan, specs: Any, wanted: Any, given: Any) -> None:
        self.op = op
        pairs = zip(op.inner(specs), wanted, strict=False)
        self.leaves = [placeholder(x, y or n < op.carries) for n, (x, y) in enumerate(pairs)]
        self.values = op.body.values(self.leaves)
        self.origins: dict[Value, Origin] = {}
        for n, x in enumerate(self.values):
            fresh = autograd.post_order([x], below, self.origins)
            self.origins |= dict.fromkeys(fresh, Origin((n, False)))
        self.numbers = {x: n for n, x in reversed([*enumerate(self.values)])}
        outputs = [self.values[n] for n in op.body.outputs]
        self.carries = [n for n in range(op.carries) if self.leaves[n].requires_grad]
        last = range(op.carries, len(outputs))
        self.ys = [n for n in last if given[n] and outputs[n].requires_grad]
        grads = {n: placeholder(outputs[n].spec) for n in (*self.carries, *self.ys)}
        self.grads = grads
        seeds = [(outputs[n], dy) for n, dy in grads.items() if outputs[n].requires_grad]
        ends = {x for x in self.leaves if x.requires_grad}
        with autograd.mode(record=self):
            self.parts = autograd.parts_below([y for y, _ in seeds], [dy for _, dy in seeds], ends)
        self.stacked: dict[Any, int] = {}  # values of the gradient that its scan stacks

    def note(self, x: Value, op: Op, inputs: Sequence[Value]) -> None:
        """A node of the gradient was made."""
        (number, _), _ = self.origins.get(MODE.backward_of, NOWHERE)  # type: ignore[arg-type]
        self.origins[x] = Origin((number, True), MODE.origin.inside if MODE.origin else ())

    def cut(self, kept: Sequence[int] | None) -> Adjoint:
        op, leaves, values = self.op, self.leaves, self.values
        count, size = op.carries + op.xs, op.body.inputs
        known = values[size:] if kept is None else [values[n] for n in kept]
        self.stops = {*leaves, *(x for x in known if kept is not None or is_kept(x))}
        parts: list[Any] = [()] * size
        for n in range(op.carries, count):
            if leaves[n] in self.parts:
                grad = autograd.add_partials(self.parts[leaves[n]])
                parts[n] = (Use(False, self.stack(grad)),)
        products = {
            part: found
            for x in leaves[count:]
            for part in self.parts.get(x, ())
            if (found := self.product(part)) is not None
        }
        added: dict[Any, Any] = {}  # sums carried from turn to turn
        for n, x in enumerate(leaves[count:], count):
            for part in self.parts.get(x, ()):
                if part not in products and part not in self.stacked and part not in added:
                    added[part] = placeholder(part.spec), len(self.carries) + len(added)
            parts[n] = tuple([self.total(each, products, added) for each in self.parts.get(x, ())])
        for place, n in enumerate(self.carries):
            parts[n] = (place,)
        first = [*(self.grads[n] for n in self.carries), *(start for start, _ in added.values())]
        results = [self.carried(n) for n in self.carries]
        results += [start + part for part, (start, _) in added.items()]
        return self.finish(parts, first, [*results, *self.stacked], len(added))

    def finish(self, parts: list[Any], first: list[Any], results: list[Any], sums: int) -> Adjoint:
        """The gradient's body, when what it returns is known."""
        count, size = self.op.carries + self.op.xs, self.op.body.inputs
        carries = len(first)
        first += [self.grads[n] for n in self.ys]
        read = [self.numbers[x] for x in reached(results, self.stops)]
        stacks = [n for n in read if n not in range(count, size)]
        captured = [n for n in read if n in range(count, size)]
        inputs = [*first, *(self.values[n] for n in (*stacks, *captured))]
        ends = {*inputs, *self.stops}
        found = segment_of(results, inputs, lambda x: () if x in ends else below(x))
        body, constants, made = found
        steps = tuple([step._replace(keeps=True) for step in body.steps])
        uses = [x for each in parts for part in each if isinstance(part, tuple) for x in
                (part if not isinstance(part, Use) else [part]) if isinstance(x, Use)]  # fmt: skip
        return Adjoint(
            body._replace(steps=steps), tuple(self.carries),
            tuple([x.spec for x in first[carries - sums : carries]]), tuple(self.ys),
            tuple(stacks), tuple(captured), tuple(constants), tuple(parts),
            tuple(sorted({*stacks, *(x.number for x in uses if x.is_forward)})),
            tuple([self.origins.get(x, NOWHERE) for x in made]),
        )  # fmt: skip

    def carried(self, n: int) -> Any:
        parts = self.parts.get(self.leaves[n])
        return autograd.add_partials(parts) if parts else zeros(self.leaves[n].spec)

    def stack(self, x: Any) -> int:
        return self.stacked.setdefault(x, len(self.stacked))

    def total(self, part: Any, products: dict[Any, Any], added: dict[Any, Any]) -> Any:
        """How a part of a captured tensor's gradient adds up."""
        if part in products:
            return products[part]
        return added[part][1] if part in added else (None, Use(False, self.stacked[part]))

    def product(self, part: Any) -> Any:
        """A part that is a product of what changes from turn to turn, or its sum, as one."""
        is_sum = isinstance(part.op, Summation) and part.op.axes == (0,)
        if not is_sum and not isinstance(part.op, MatMul):
            return None
        pairs = [self.source(x) for x in part.inputs]
        if any(x in self.leaves[self.op.carries + self.op.xs :] for x, _ in pairs):
            return None
        return (part.op, *(self.use(*pair) for pair in pairs))

    def source(self, x: Any) -> tuple[Any, tuple[Op, ...]]:
        """What a value is a movement of."""
        moves: list[Op] = []
        while x not in self.stops and type(x.op) in (Permute, Transpose, Reshape):
            moves.append(x.op)
            x = x.inputs[0]
        return x, tuple(moves)

    def use(self, x: Any, moves: tuple[Op, ...]) -> Use:
        if x in self.stops:
            return Use(True, self.numbers[x], moves)
        return Use(False, self.stack(x), moves)


def is_kept(x: Any) -> bool:
    """Whether a value is kept for backward, and not made again of what it is made of."""
    if not isinstance(x, Tensor) or x.op is None:
        return False
    made: Any = x.inputs[0].op if x.op.item is not None else x.op
    return not made.moves and not isinstance(x.op, StopGradient)


def reached(roots: Sequence[Any], stops: Collection[Any]) -> list[Any]:
    """Of the stops, those that the roots depend on."""
    order = autograd.post_order(roots, lambda x: () if x in stops else below(x))
    return [x for x in order if x in stops]
