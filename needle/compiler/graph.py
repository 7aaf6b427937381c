"""The graph level: primitive ops on whole arrays, in topological order. Next: simplify.py.

    graph = Graph(inputs, outputs)
    node  = Node(op, inputs, spec)          op: a primitive, or a user's own
          | Node(Repeat(body, ...), ...)    a loop, whose body is a graph; its results are Items
          | Node(Input(number), (), spec)   an argument of the program
          | Node(Constant(array), (), spec) an array that the trace baked in

Comes from autograd's Values: composites are replaced by their expansions, tuples by their items.
Nodes are made by `Builder.make`, which interns them: equal ops on equal inputs are one node. What a
node means is its op's `compute` (interpret, below).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from needle import autograd
from needle.array.spec import Spec
from needle.autograd import Op, Value, flattened, pending_inputs, post_order
from needle.backend.numpy import compute
from needle.compiler import OFF
from needle.compiler.simplify import rewrite
from needle.dtype import LOW_PRECISION, float32, float64
from needle.ops.composite import CompositeMethods, placeholder, tracing
from needle.ops.contract import MatMul
from needle.ops.elementwise import AddScalar, BroadcastTo, Cast, StopGradient
from needle.ops.movement import Permute, Reshape, Slice, Split
from needle.ops.scan import Scan
from needle.ops.tuples import FusedAddScalars, Together


@dataclass(frozen=True, eq=False)
class Input:
    """An argument of the program, by number."""

    number: int


@dataclass(frozen=True, eq=False)
class Constant:
    """An array of the trace."""

    array: np.ndarray


@dataclass(frozen=True)
class Item:
    """One result of an op with several."""

    number: int


@dataclass(frozen=True, eq=False, repr=False)
class Repeat:
    """`turns` turns of a body, from (carries, elements of xs, captured) to (carries, elements of
    ys). Its items: the values of each carry, then ys. A carry whose values are kept has turns + 1
    places, from where it begins to where it ends; any other has 2, used in turn, and ends in the
    first one."""

    body: Graph
    carries: int
    xs: int
    turns: int
    reverse: bool
    keeps: tuple[bool, ...]  # whether a carry's values are kept

    def ends(self, carry: int) -> tuple[int, int]:
        """The place where a carry begins, and that where it ends."""
        if not self.keeps[carry]:
            return self.turns % 2, 0
        return (self.turns, 0) if self.reverse else (0, self.turns)

    @property
    def places(self) -> range:
        """Places along xs and ys, in the order of turns."""
        return range(self.turns)[:: -1 if self.reverse else 1]

    def __repr__(self) -> str:
        body = str(self.body).replace("\n", "\n  ")
        kind = f"{self.turns}, {self.carries}, {self.xs}, {self.reverse}, {self.keeps}"
        return f"Repeat[{kind}]{{\n  {body}\n}}"


class Node:
    """An op on nodes; by identity."""

    __slots__ = ("inputs", "op", "place", "spec")

    def __init__(self, op: Any, inputs: tuple[Node, ...], spec: Any, place: str = "") -> None:
        self.op = op
        self.inputs = inputs
        self.spec = spec
        self.place = place  # the user's file and line

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def is_leaf(self) -> bool:
        return isinstance(self.op, (Input, Constant))

    @property
    def name(self) -> str:
        return autograd.op_name(self.op)

    def __repr__(self) -> str:
        return f"{self.name}{list(getattr(self.spec, 'shape', ()))}"


class Graph:
    """A program: its inputs, and its outputs in terms of them."""

    def __init__(self, inputs: Sequence[Node], outputs: Sequence[Node]) -> None:
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.nodes: list[Node] = post_order(self.outputs, lambda node: node.inputs)

    def __str__(self) -> str:
        names = {node: f"%{number}" for number, node in enumerate(self.nodes)}
        lines = [
            f"{names[x]} = {describe(x)}({', '.join(names[y] for y in x.inputs)}) : {x.spec}"
            for x in self.nodes
        ]
        return "\n".join([*lines, f"return {', '.join(names[x] for x in self.outputs)}"])


def describe(node: Node) -> str:
    """A node's op and static parameters, without addresses."""
    if isinstance(node.op, Input):
        return f"input[{node.op.number}]"
    if isinstance(node.op, Constant):
        size = node.op.array.size
        return f"constant[{node.op.array.item()}]" if size == 1 else f"constant[{size} elements]"
    return repr(node.op)


def nodes_of(graph: Graph) -> Iterator[Node]:
    """All nodes, those in bodies of loops among them."""
    for node in graph.nodes:
        yield node
        if isinstance(node.op, Repeat):
            yield from nodes_of(node.op.body)


def verify(graph: Graph) -> None:
    """AssertionError where a node's spec is not what its op infers: a fault of ours."""
    for node in nodes_of(graph):
        if isinstance(node.op, Op) and node.op.is_builtin:
            found = node.op.infer(*(x.spec for x in node.inputs))
            assert found == node.spec, f"{node}: {found} instead of {node.spec}"


def interpret(graph: Graph, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs' values by each op's own definition in NumPy."""
    values: dict[Node, Any] = {}
    for node in graph.nodes:
        if isinstance(node.op, Input):
            values[node] = arrays[node.op.number]
        elif isinstance(node.op, Constant):
            values[node] = node.op.array
        elif isinstance(node.op, Item):
            values[node] = values[node.inputs[0]][node.op.number]
        elif isinstance(node.op, Repeat):
            values[node] = interpret_loop(node, [values[x] for x in node.inputs])
        else:
            values[node] = compute(node.op, [values[x] for x in node.inputs], node.spec)
    return [values[node] for node in graph.outputs]


def interpret_loop(node: Node, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The items of a loop."""
    op, count = node.op, node.op.carries + node.op.xs
    found = [np.zeros(spec.shape, spec.dtype) for spec in node.spec]
    places = [op.ends(n)[0] for n in range(op.carries)]
    for n, place in enumerate(places):
        found[n][place] = arrays[n]
    for turn in op.places:
        carried = [found[n][place] for n, place in enumerate(places)]
        elements = [x[turn] for x in arrays[op.carries : count]]
        results = interpret(op.body, [*carried, *elements, *arrays[count:]])
        for n, keeps in enumerate(op.keeps):
            places[n] = (turn + (not op.reverse)) if keeps else 1 - places[n]
            found[n][places[n]] = results[n]
        for stack, y in zip(found[op.carries :], results[op.carries :], strict=True):
            stack[turn] = y
    return found


class Builder:
    """Makes nodes, each once."""

    def __init__(self) -> None:
        self.known: dict[tuple[Any, ...], Node] = {}
        self.place = ""

    def make(self, op: Any, *inputs: Node) -> Node:
        """The simplest node that has this op's value on these inputs, to the bit."""
        found = rewrite(self, op, inputs)
        if found is not None:
            return found
        key = (op, *map(id, inputs))
        known = None if "simplify" in OFF else self.known.get(key)
        if known is None:
            spec = op.infer(*(x.spec for x in inputs)) if isinstance(op, Op) else None
            known = self.known[key] = Node(op, inputs, spec, self.place)
        return known

    def constant(self, array: np.ndarray) -> Node:
        """Small constants by value, so that equal ones are one node."""
        key = (array.tobytes(), array.shape, array.dtype) if array.size <= 16 else (id(array),)
        known = self.known.get(key)
        if known is None:
            known = Node(Constant(array), (), Spec(array.shape, array.dtype))
            self.known[key] = known
        return known


WIDE = 256  # bytes: how wide a block of columns is
TURNS = 4  # of a loop, for which it is worth it
SOME = range(9, 129)  # rows that read a matrix as it lies, and that do not wait for memory


class Body(Builder):
    """Makes the nodes of a loop's body. A matrix that few rows meet in every turn is laid out once
    before the loop: blocks of columns, each in one piece, which a contraction reads as they lie."""

    def __init__(
        self, outside: Builder, op: Scan, inputs: Sequence[Node], specs: Sequence[Any]
    ) -> None:
        super().__init__()
        self.outside, self.place, self.turns = outside, outside.place, op.length
        self.inputs = list(inputs)
        self.leaves = [Node(Input(n), (), x) for n, x in enumerate(specs[: len(inputs)])]
        given = op.carries + op.xs
        self.captured = dict(zip(self.leaves[given:], inputs[given:], strict=True))
        self.blocks: dict[Node, Node] = {}  # of a matrix -> the leaf

    def make(self, op: Any, *inputs: Node) -> Node:
        blocks = self.blocks_of(*inputs) if type(op) is MatMul else None
        if blocks is None:
            return super().make(op, *inputs)
        a, (count, _, wide) = inputs[0], blocks.shape
        rows = self.make(BroadcastTo((count, *a.shape)), self.make(Reshape((1, *a.shape)), a))
        y = self.make(Permute((1, 0, 2)), super().make(op, rows, blocks))
        return self.make(Reshape((a.shape[0], count * wide)), y)

    def blocks_of(self, a: Node, b: Node) -> Node | None:
        """The blocks (n / wide, k, wide) of a matrix (k, n), if it is worth it."""
        source = b.inputs[0] if type(b.op) is Permute else b
        k, n = b.shape[-2:]
        wide = WIDE // b.spec.dtype.itemsize
        fits = source in self.captured and len(b.shape) == 2 and len(a.shape) == 2
        fits = fits and b.spec.dtype in (float32, float64) and n > wide and n % wide == 0
        if "simplify" in OFF or not fits or a.shape[0] not in SOME or self.turns < TURNS:
            return None
        if b not in self.blocks:
            make, x = self.outside.make, self.captured[source]
            x = x if b is source else make(b.op, x)
            x = make(Permute((1, 0, 2)), make(Reshape((k, n // wide, wide)), x))
            copy = Node(StopGradient(), (x,), x.spec, self.place)
            self.blocks[b] = Node(Input(len(self.leaves)), (), x.spec)
            self.leaves.append(self.blocks[b])
            self.inputs.append(copy)
        return self.blocks[b]


def trace(
    inputs: Sequence[Any], outputs: Sequence[Value], places: Mapping[Value, str] | None = None
) -> Graph:
    """The graph of Values that were made lazily from `inputs`: Values, or the NDArrays they hold.

    Other leaves become constants. `places` says where in the user's code a Value was made.
    """
    builder = Builder()
    found: dict[int, Any] = {}
    nodes = []
    for number, x in enumerate(inputs):
        spec = autograd.spec_of(x) if isinstance(x, Value) else x.spec
        nodes.append(Node(Input(number), (), spec))
        found[id(x)] = nodes[-1]
    translate(builder, outputs, found, places or {})
    return Graph(nodes, [found[id(x)] for x in outputs])


def translate(
    builder: Builder, outputs: Sequence[Any], found: dict[int, Any], places: Mapping[Value, str]
) -> None:
    """Add to `found` the node (or tuple of nodes) of every Value below the outputs, by its id."""

    def reads(value: Any) -> Sequence[Any]:
        return () if id(value) in found else pending_inputs(value)

    for value in post_order(outputs, reads):
        if id(value) not in found:
            if isinstance(value, Value):
                builder.place = places.get(value, builder.place)
            found[id(value)] = as_node(builder, value, [found[id(x)] for x in reads(value)])


def as_node(builder: Builder, value: Any, inputs: list[Any]) -> Any:
    """The node of one Value on the nodes of what it reads; a tuple of nodes for several results."""
    if not isinstance(value, Value) or value.cached_data is not None:
        data = value.cached_data if isinstance(value, Value) else value
        if type(data) is tuple:
            return tuple(builder.constant(each.view) for each in data)
        return builder.constant(data.view)
    return apply(builder, value.op, flattened(inputs), value.spec)


def apply(builder: Builder, op: Any, inputs: list[Node], spec: Any) -> Any:
    """An op of the autograd graph in terms of the nodes that a program is made of."""
    if isinstance(op, CompositeMethods):
        return expand(builder, op, inputs)
    if isinstance(op, Together):
        return tuple(inputs)
    if op.item is not None:
        return inputs[op.item]
    if isinstance(op, Split):
        return split(builder, op, inputs[0])
    if isinstance(op, Scan):
        return repeat(builder, op, inputs)
    if isinstance(op, FusedAddScalars):
        return tuple(builder.make(AddScalar(each), *inputs) for each in (op.c0, op.c1))
    if op.is_builtin:
        return builder.make(op, *inputs)
    node = Node(op, tuple(inputs), spec, builder.place)  # a user's own: called as often as written
    if type(spec) is not tuple:
        return node
    return tuple(Node(Item(i), (node,), each, node.place) for i, each in enumerate(spec))


def split(builder: Builder, op: Split, x: Node) -> tuple[Node, ...]:
    """split(x) -> a slice for each part, which are views."""
    parts, start = [], 0
    sizes = (1,) * x.shape[op.axis] if op.sizes is None else op.sizes
    for size in sizes:
        ranges = [(0, each, 1) for each in x.shape]
        ranges[op.axis] = (start, size, 1)
        part = builder.make(Slice(tuple(ranges)), x)
        if op.sizes is None:
            shape = (*x.shape[: op.axis], *x.shape[op.axis + 1 :])
            part = builder.make(Reshape(shape), part)
        parts.append(part)
        start += size
    return tuple(parts)


def repeat(builder: Builder, op: Scan, inputs: Sequence[Node]) -> tuple[Node, ...]:
    """scan(...) -> a loop; the values of a carry that are also a y, before or after each turn, are
    one array, of which y is a view."""
    specs = op.inner([x.spec for x in inputs])
    inside = Body(builder, op, inputs, specs)
    values: list[Any] = [*inside.leaves]
    for step, spec in zip(op.body.steps, specs[len(inputs) :], strict=True):
        values.append(apply(inside, step.op, flattened([values[n] for n in step.sources]), spec))
    leaves, found = inside.leaves, [values[n] for n in op.body.outputs]
    after, ys = found[: op.carries], found[op.carries :]
    if not op.length:
        empty = [np.zeros((0, *y.shape), y.spec.dtype) for y in ys]
        return (*inputs[: op.carries], *map(builder.constant, empty))
    kept = {y: (n, 0) for n, y in enumerate(leaves[: op.carries])}  # carry, and the first place
    kept |= {y: (n, 1) for n, y in reversed([*enumerate(after)]) if y not in kept}
    used = {kept[y][0] for y in ys if y in kept}
    keeps = tuple([n in used for n in range(op.carries)])
    rest = [y for y in dict.fromkeys(ys) if y not in kept]
    body = Graph(leaves, [*after, *rest])
    sizes = [op.length + 1 if each else 2 for each in keeps] + [op.length] * len(rest)
    shapes = [(n, *y.shape) for n, y in zip(sizes, body.outputs, strict=True)]
    specs = [y.spec.with_shape(shape) for y, shape in zip(body.outputs, shapes, strict=True)]
    loop = Repeat(body, op.carries, op.xs, op.length, op.reverse, keeps)
    node = Node(loop, tuple(inside.inputs), tuple(specs), builder.place)
    items = [Node(Item(n), (node,), spec, builder.place) for n, spec in enumerate(specs)]
    stacks = dict(zip(rest, items[op.carries :], strict=True))

    def cut(item: Node, start: int, size: int) -> Node:
        ranges = ((start, size, 1), *((0, n, 1) for n in item.shape[1:]))
        return builder.make(Slice(ranges), item)

    for y, (n, first) in kept.items():
        if n in used:
            stacks[y] = cut(items[n], first ^ op.reverse, op.length)
    last = [cut(items[n], loop.ends(n)[1], 1) for n in range(op.carries)]
    ends = [builder.make(Reshape(x.shape[1:]), x) for x in last]
    return (*ends, *(stacks[y] for y in ys))


def expand(builder: Builder, op: Any, inputs: list[Node]) -> Any:
    """A composite's expansion, on nodes, traced once per specs. Low precision is computed in
    float32 and rounded once, as by a primitive."""
    if not (op.moves or op.rounds) and any(x.spec.dtype in LOW_PRECISION for x in inputs):
        specs = op.infer(*(x.spec for x in inputs))
        wide = [
            builder.make(Cast(float32), x) if x.spec.dtype in LOW_PRECISION else x for x in inputs
        ]
        found = expand(builder, op, wide)
        if type(specs) is not tuple:
            return builder.make(Cast(specs.dtype), found)
        pairs = zip(found, specs, strict=True)
        return tuple(builder.make(Cast(spec.dtype), x) for x, spec in pairs)
    key = tuple((x.spec.shape, x.spec.dtype) for x in inputs)
    known: dict[tuple[Any, ...], Any] = op.__dict__.setdefault("expansions", {})
    if key not in known:
        if len(known) >= 64:
            known.clear()
        with tracing():
            leaves = [placeholder(Spec(*each)) for each in key]
            found = op.expand(*leaves)
            outputs = tuple(found) if isinstance(found, (tuple, list)) else (found,)
        known[key] = leaves, outputs, isinstance(found, Value)
    leaves, outputs, is_value = known[key]
    nodes = {id(leaf): node for leaf, node in zip(leaves, inputs, strict=True)}
    translate(builder, outputs, nodes, {})
    parts = tuple(nodes[id(each)] for each in outputs)
    return parts[0] if is_value else parts
