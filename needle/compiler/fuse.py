"""Which nodes share a nest. Before: a graph of array ops. After: groups, each of which becomes a
nest. Next: nests.py.

    t = exp(x); y = t * w               ->  one nest; t stays in registers
    m = max(x); e = exp(x - m); s = sum(e); e / s  ->  one nest of rows, several loops over a row
    relu(x @ w + b)                     ->  the contraction's epilogue

A node is *placed* in a group, or *inlined*: computed again wherever it is read. Views, random
numbers and cheap or once-read elementwise nodes are inlined. A placed node joins the group of one
that it reads if its element at the group's coordinates reads that node's element at the same
coordinates; which is checked by following index maps, so that what fuses is right by construction.
The op After is a view, whose readers come after what it waits for.

Relies on: nodes are pure, in topological order. `Group.ancestors` keeps the order of groups a
partial one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import needle.ops as ops
from needle.array.spec import as_axes
from needle.compiler import OFF
from needle.compiler.graph import Graph, Item, Node, Repeat
from needle.compiler.index import Index, coordinate, delinearize, digits, fixed, linearize
from needle.compiler.loops import COLUMNS, ROWS, Digits, Expr
from needle.compiler.lower import ELEMENTWISE, MOVEMENT, REDUCTION, VIEWS, push
from needle.ops.elementwise import Comparison, Subtract
from needle.ops.index import Checked, Gather, IndexCopy, ScatterAdd
from needle.ops.movement import After
from needle.ops.order import split_axes
from needle.ops.reduce import CumSum

MOST_NODES = 128  # in one group, so that a nest stays small enough for the code generator
MOST_INLINED = 48
FEW_OPS = 8  # behind a truth value that is computed again rather than stored
DRAWN = 64  # operations that a random number takes: a dropout's mask is stored
LIGHT = 2  # operations behind any other value that several nodes compute again
FEW_PARTS = 4  # a concatenation of more is written part by part
SHARED = 16  # elements that read one and the same
CHEAP = (Comparison, ops.Cast, ops.LogicalNot, ops.StopGradient, ops.Negate, ops.MulScalar)
MOVES = (ops.Pad, ops.Reshape, ops.Permute)
SHIFTS = (Subtract, ops.EWiseAdd, ops.EWiseMul)

Indices = tuple[Index, ...]


@dataclass(frozen=True)
class Piece:
    """y = x, kept where it lies in a concatenation."""

    whole: Node
    ranges: tuple[tuple[int, int], ...]  # per axis of the whole: start, size
    axis: int | None  # of a stack: the axis that x lacks


@dataclass(eq=False)
class Group:
    """Nodes that one nest computes.

    `shape` is what its loops run over; `index` says which element of each member belongs to the
    loops' coordinates. `inner` are the axes that are reduced, None while there are none.
    """

    number: int
    kind: str  # loop, contraction, scatter, repeat or host
    shape: tuple[int, ...]
    index: dict[Node, Indices] = field(default_factory=dict)
    inner: tuple[int, ...] | None = None
    order: str = ROWS
    inlined: set[Node] = field(default_factory=set)
    reads: set[Node] = field(default_factory=set)  # placed in other groups, and leaves
    waits: set[Node] = field(default_factory=set)  # that are computed before, wherever that is
    ancestors: int = 0  # bit n: the group of number n comes before
    is_read: bool = False  # by another group
    level: int = 0  # the longest chain of groups before this one
    refusals: list[str] = field(default_factory=list)

    @property
    def nodes(self) -> list[Node]:
        return list(self.index)

    @property
    def bit(self) -> int:
        return 1 << self.number

    @property
    def outer(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(len(self.shape)) if axis not in (self.inner or ()))


def coordinates(shape: Sequence[int]) -> Indices:
    """Each axis's coordinate; an axis of size 1 has none, as where a reshape made it."""
    return tuple(fixed(0) if n == 1 else coordinate(axis) for axis, n in enumerate(shape))


def rank(group: Group) -> tuple[int, bool, int]:
    """In which order groups are asked to take a node in."""
    return -group.level, group.kind != "contraction", -group.number


def is_spread(x: Node) -> bool:
    return type(x.op) is ops.BroadcastTo and prod(x.inputs[0].shape) * SHARED <= prod(x.shape)


def is_elementwise(node: Node) -> bool:
    return type(node.op) in ELEMENTWISE or type(node.op) in (ops.Cast, Piece, Checked)


class Fuser:
    """The state of the pass: groups so far, and in which one a node is placed."""

    def __init__(self, graph: Graph, strided: Collection[Node] = ()) -> None:
        self.graph = graph
        self.strided = strided  # inputs that are not compact
        self.groups: list[Group] = []
        self.group_of: dict[Node, Group] = {}
        self.pieces: dict[Node, list[Node]] = {}  # of concatenations that are written in parts
        self.items: dict[Node, list[Node]] = {}  # of loops
        self.users: dict[Node, list[Node]] = {node: [] for node in graph.nodes}
        self.weight: dict[Node, int] = {}
        self.outputs = set(graph.outputs)
        for node in graph.nodes:
            for x in dict.fromkeys(node.inputs):
                self.users[x].append(node)

    def run(self) -> list[Group]:
        for node in self.graph.nodes:
            self.visit(node)
        for node in self.graph.outputs:
            self.place(node)
        return self.groups

    def visit(self, node: Node) -> None:
        kind = type(node.op)
        if kind in REDUCTION:
            self.place_reduction(node)
        elif kind is ops.MatMul:
            self.place_contraction(node)
        elif kind is CumSum:
            self.place_scan(node)
        elif kind in (ScatterAdd, IndexCopy):
            self.place_scatter(node)
        elif kind is Gather:
            self.ground(node.inputs[0])
            self.inline_or_place(node)
        elif kind in (ops.Concatenate, ops.Stack) and len(node.inputs) > FEW_PARTS:
            self.place_parts(node)
        elif is_elementwise(node):
            self.inline_or_place(node)
        elif kind in INLINED:
            self.weigh(node, DRAWN if kind is ops.RandomUniform else 0)
        elif not node.is_leaf and node not in self.group_of:
            (self.place_repeat if kind is Repeat else self.place_host)(node)

    # Inlined or placed

    def inline_or_place(self, node: Node) -> None:
        self.weigh(node, 1)
        if self.is_inlined(node) or (self.may_repeat(node) and not self.join_any(node)):
            return
        self.place(node)

    def weigh(self, node: Node, own: int) -> None:
        """Note how many operations stand between a node and memory."""
        below = (self.weight.get(x, 0) for x in node.inputs if x not in self.group_of)
        self.weight[node] = own + sum(below)

    def is_inlined(self, node: Node) -> bool:
        users = self.users[node]
        if "fuse" in OFF or node in self.outputs or self.weight[node] > MOST_INLINED:
            return False
        if isinstance(node.op, Comparison) and self.weight[node] <= FEW_OPS:
            return True
        light = isinstance(node.op, CHEAP) and self.weight[node] <= LIGHT
        if len(users) != 1:
            return light and len(set(node.inputs)) == 1 and len(users) > 1
        widens = type(users[0].op) is ops.BroadcastTo and prod(users[0].shape) > prod(node.shape)
        return light or not widens

    def may_repeat(self, node: Node) -> bool:
        """Whether computing an element again costs no more than keeping it.

        It reads one input's, others being the same for many, as in x - mean; or what is the same
        for many alone, as labels compared with classes; or all readers but one, as relu's
        gradient, ask only for its sign.
        """
        if "fuse" in OFF or node in self.outputs:
            return False
        if self.weight[node] <= FEW_OPS and all(map(self.is_little, node.inputs)):
            return True
        if isinstance(node.op, SHIFTS) and self.weight[node] <= LIGHT:
            return sum(not is_spread(x) for x in node.inputs) == 1
        users = [type(x.op) for x in self.users[node] if not isinstance(x.op, Comparison)]
        return len(users) == 1 and users[0] in MOVES and self.weight[node] <= FEW_OPS

    def is_little(self, x: Node) -> bool:
        """Whether an element is made of what many elements share."""
        if x in self.group_of or x.is_leaf:
            return x.spec.size == 1
        inner = is_elementwise(x) and len(x.inputs) > 0
        return is_spread(x) or (inner and all(map(self.is_little, x.inputs)))

    def place(self, node: Node) -> None:
        """Give a node memory of its own or a group to stay in: a member of some group."""
        if node in self.group_of or node in self.pieces or node.is_leaf:
            return
        if type(node.op) in (ops.Concatenate, ops.Stack):
            self.place_parts(node)
        elif not self.join_any(node):
            self.join(self.begin("loop", node.shape), node, coordinates(node.shape))

    def join_any(self, node: Node) -> bool:
        """Place a node in the group of something that it reads, if one takes it in."""
        return any(
            self.join(group, node, index)
            for group in self.candidates(node)
            for index in self.indices_in(group, node)
        )

    def begin(self, kind: str, shape: tuple[int, ...]) -> Group:
        group = Group(len(self.groups), kind, shape)
        self.groups.append(group)
        return group

    def candidates(self, node: Node) -> list[Group]:
        """The groups of what a node reads, the latest and contractions first, that could take it
        in."""
        if "fuse" in OFF:
            return []
        found = self.groups_below(node)
        self.merge_all(found)
        found = self.groups_below(node)
        return [
            group
            for group in sorted(found, key=rank)
            if group.kind in ("loop", "contraction")
            and len(group.index) + len(group.inlined) < MOST_NODES
            and not any(other.ancestors & group.bit for other in found)
        ]

    def merge_all(self, groups: set[Group]) -> None:
        """Make one group of those that run over the same loops at the same time."""
        loops = sorted((g for g in groups if g.kind == "loop"), key=lambda each: each.number)
        for place, group in enumerate(loops):
            for other in loops[place + 1 : place + MOST_NODES]:
                if other.index and group.index and self.are_siblings(group, other):
                    self.merge(group, other)

    def are_siblings(self, a: Group, b: Group) -> bool:
        independent = not (a.ancestors & b.bit or b.ancestors & a.bit)
        alike = a.inner is None or b.inner is None or (a.inner, a.order) == (b.inner, b.order)
        size = sum(len(each.index) + len(each.inlined) for each in (a, b))
        same = a.shape == b.shape and a.level == b.level
        return same and independent and alike and size < MOST_NODES

    def merge(self, group: Group, other: Group) -> None:
        """Move all of another group into a group."""
        if group.inner is None:
            group.inner, group.order = other.inner, other.order
        for node in other.index:
            self.group_of[node] = group
        group.index |= other.index
        group.refusals += other.refusals
        self.read(group, other.reads, other.inlined, other.waits)
        before = group.ancestors | group.bit
        for each in self.after(other):
            each.ancestors |= before
        group.is_read |= other.is_read
        other.index = {}
        other.reads = set()

    def groups_below(self, node: Node) -> set[Group]:
        """The groups that a node reads from, through inlined nodes."""
        return self.groups_of(self.placed(node.inputs))

    def placed(self, nodes: Sequence[Node]) -> set[Node]:
        """Those of the nodes that are placed, and of the others what they read, through inlined
        nodes."""
        found: set[Node] = set()
        seen: set[Node] = set()
        stack = list(nodes)
        while stack:
            x = stack.pop()
            if x in self.group_of or x in self.pieces:
                found.add(x)
            elif x not in seen:
                seen.add(x)
                stack.extend(x.inputs)
        return found

    # Where a node's elements lie among a group's coordinates

    def indices_in(self, group: Group, node: Node) -> list[Indices]:
        """Guesses of the element of a node that belongs to a group's coordinates."""
        sizes, size = group.shape, prod(node.shape)
        found = [self.pushed(group, node)]
        if size == prod(sizes):
            place = linearize(coordinates(sizes), sizes)
            found.append(delinearize(place, node.shape, sizes))
        if group.inner and size == prod(sizes[axis] for axis in group.outer):
            outer = [coordinate(axis) for axis in group.outer]
            place = linearize(outer, [sizes[axis] for axis in group.outer])
            found.append(delinearize(place, node.shape, sizes))
        return list(dict.fromkeys(each for each in found if each is not None))

    def pushed(self, group: Group, node: Node) -> Indices | None:
        """The index that follows from a member's by the movements between it and the node."""
        for x in node.inputs:
            base = group.index.get(x)
            if base is None and x not in self.group_of and x not in self.pieces:
                base = self.pushed(group, x)
            if base is None:
                continue
            if is_elementwise(node) and x.shape == node.shape:
                return base
            if (found := push(node.op, base, x.shape, group.shape)) is not None:
                return found
        return None

    def join(self, group: Group, node: Node, index: Indices) -> bool:
        """Place a node in a group if all that it reads of the group is at the group's
        coordinates."""
        walk = Walk(self, group)
        if group.kind == "contraction" and not is_plain(index, len(group.shape) - 1):
            return False
        if walk.follow(node, index) and walk.run() and self.comes_after(group, walk):
            self.add(group, node, index, walk)
            return True
        return False

    def comes_after(self, group: Group, walk: Walk) -> bool:
        """Whether nothing that is read or waited for comes after the group."""
        found = self.groups_of(walk.reads | walk.waits) - {group}
        return not any(other.ancestors & group.bit for other in found)

    def groups_of(self, nodes: Set[Node]) -> set[Group]:
        parts = [each for node in nodes for each in self.pieces.get(node, (node,))]
        return {self.group_of[each] for each in parts if each in self.group_of}

    def add(self, group: Group, node: Node, index: Indices, walk: Walk) -> None:
        group.index[node] = index
        self.group_of[node] = group
        self.read(group, walk.reads, walk.inlined, walk.waits)

    def read(
        self, group: Group, reads: set[Node], inlined: set[Node], waits: Set[Node] = frozenset()
    ) -> None:
        """Note what a group reads and waits for, and that all of it comes before the group."""
        group.reads |= reads
        group.inlined |= inlined
        group.waits |= waits
        before = level = 0
        for other in self.groups_of(reads) | (self.groups_of(waits) - {group}):
            before |= other.ancestors | other.bit
            level = max(level, other.level + 1)
            other.is_read = other.is_read or other is not group
        if before & ~group.ancestors or level > group.level:
            later = max(level - group.level, 0)
            for each in [group, *self.after(group)]:
                each.ancestors |= before
                each.level += later

    def after(self, group: Group) -> list[Group]:
        """The groups that have this one among their ancestors."""
        bit = group.bit
        return [each for each in self.groups if each.ancestors & bit] if group.is_read else []

    # Kinds of nodes

    def place_reduction(self, node: Node) -> None:
        x = node.inputs[0]
        axes = reduced_axes(node)
        trailing, _ = split_axes(x.shape, axes)
        order = ROWS if trailing else COLUMNS
        for group in self.candidates(node):
            if group.kind != "loop":
                group.refusals.append(f"{node}: a contraction's epilogue does not reduce")
                continue
            found = group.index.get(x)
            guesses = [found] if found else self.indices_in(group, x)
            if any(self.reduce_in(group, node, index, axes, order) for index in guesses):
                return
        group = self.begin("loop", x.shape)
        fits = self.reduce_in(group, node, coordinates(x.shape), axes, order)
        assert fits, f"{node} does not fit a group of its own"

    def reduce_in(
        self, group: Group, node: Node, index: Indices, axes: Sequence[int], order: str
    ) -> bool:
        """Place a reduction in a group that runs over all of its input."""
        chosen = [index[axis] for axis in axes if node.inputs[0].shape[axis] != 1]
        found = tuple(next(iter(each.terms), -1) for each in chosen)
        pairs = zip(chosen, found, strict=True)
        plain = all(isinstance(a, int) and each == coordinate(a) for each, a in pairs)
        if not plain or len(set(found)) != len(found):
            return False
        if group.inner is not None and (found != group.inner or order != group.order):
            group.refusals.append(f"{node}: reduces other axes than the group's")
            return False
        if prod(node.inputs[0].shape) != prod(group.shape) or list(found) != sorted(found):
            return False
        if group.inner is None and order == COLUMNS and len(found) == len(group.shape):
            return False
        before = group.inner, group.order
        group.inner, group.order = found, order
        kept = tuple(each for axis, each in enumerate(index) if axis not in axes)
        walk = Walk(self, group)
        if walk.enter(node.inputs[0], index) and walk.run() and self.comes_after(group, walk):
            self.add(group, node, kept, walk)
            return True
        group.inner, group.order = before
        return False

    def place_contraction(self, node: Node) -> None:
        windows = any(self.has_windows(x) for x in node.inputs)
        for x in node.inputs:
            self.ground(x, views_only=True, windows=windows)
        group = self.begin("contraction", node.shape)
        group.index[node] = coordinates(node.shape)
        self.group_of[node] = group
        self.read(group, *self.below(node.inputs))

    def place_scan(self, node: Node) -> None:
        group = self.begin("loop", node.shape)
        group.inner, group.order = (node.op.axis % len(node.shape),), COLUMNS
        walk = Walk(self, group)
        index = coordinates(node.shape)
        assert walk.enter(node.inputs[0], index)
        assert walk.run()
        self.add(group, node, index, walk)

    def place_scatter(self, node: Node) -> None:
        if type(node.op) is IndexCopy:
            base, source, index = node.inputs
            base = self.copy(base) if base in self.strided else base
            for x in (base, index):
                self.place(x)
            node.inputs = base, source, index
        group = self.begin("scatter", ())
        for x in node.inputs:
            if type(x.op) in (ops.Concatenate, ops.Stack):
                self.place(x)
        self.group_of[node] = group
        self.read(group, *self.below(node.inputs))

    def place_host(self, node: Node) -> None:
        inputs = []
        for x in node.inputs:
            copy = x if x in self.group_of else self.copy(x)
            self.place(copy)
            inputs.append(copy)
        node.inputs = tuple(inputs)
        group = self.begin("host", ())
        self.group_of[node] = group
        for user in self.users[node]:
            if isinstance(user.op, Item):
                self.group_of[user] = group
        self.read(group, set(inputs), set())

    def place_repeat(self, node: Node) -> None:
        """What a carry begins with is written to its place among the carry's values by whoever
        makes it; a y that nobody reads is not computed."""
        known = {user.op.number: user for user in self.users[node]}
        items = self.items[node] = [
            known.get(n) or Node(Item(n), (node,), spec, node.place)
            for n, spec in enumerate(node.spec)
        ]
        parts = []
        for n, x in enumerate(node.inputs[: node.op.carries]):
            ranges = ((node.op.ends(n)[0], 1), *((0, size) for size in x.shape))
            parts.append(self.place_piece(Piece(items[n], ranges, 0), x, node))
        rest = node.inputs[node.op.carries :]
        for x in rest:
            self.ground(x, views_only=True)
        group = self.begin("repeat", ())
        self.group_of[node] = group
        self.group_of |= {x: group for n, x in enumerate(items) if n < len(parts) or n in known}
        self.read(group, *self.below([*parts, *rest]))

    def place_piece(self, op: Piece, x: Node, node: Node) -> Node:
        part = Node(op, (x,), x.spec, node.place)
        self.users[part] = []
        self.place(part)
        return part

    def copy(self, x: Node) -> Node:
        found = Node(ops.StopGradient(), (x,), x.spec, x.place)
        self.users[found] = []
        return found

    def place_parts(self, node: Node) -> None:
        """Every part of a concatenation is written to its place in the whole by whoever makes
        it."""
        axis, start, parts = node.op.axis % len(node.shape), 0, []
        stacks = type(node.op) is ops.Stack
        for x in node.inputs:
            size = 1 if stacks else x.shape[axis]
            ranges = [(0, n) for n in node.shape]
            ranges[axis] = (start, size)
            op = Piece(node, tuple(ranges), axis if stacks else None)
            parts.append(self.place_piece(op, x, node))
            start += size
        self.pieces[node] = parts

    # Reading from memory

    def has_windows(self, x: Node) -> bool:
        """Whether windows are among the views that lead to an operand."""
        while type(x.op) in VIEWS and x not in self.group_of and type(x.op) is not ops.Windows:
            x = x.inputs[0]
        return type(x.op) is ops.Windows

    def ground(self, x: Node, views_only: bool = False, windows: bool = False) -> None:
        """See to it that x is a view of memory: place what is computed below its movements.
        windows: matrices whose rows and columns are numbers with strided digits are views too."""
        stack = [x]
        while stack:
            node = stack.pop()
            if node in self.group_of or node in self.pieces or node.is_leaf:
                continue
            kind = type(node.op)
            movable = kind in VIEWS if views_only else kind in MOVEMENT
            if not movable or (views_only and not self.is_affine(x, node, windows)):
                self.place(node)
            else:
                stack.extend(node.inputs[:1] if kind is After else node.inputs)

    def is_affine(self, x: Node, node: Node, windows: bool) -> bool:
        """Whether the path of views from x down to a node's input has strides, or digits that
        have, if that is compact."""
        index, sizes = coordinates(x.shape), x.shape
        while True:
            number, index, _ = MOVEMENT[type(x.op)](
                x.op, index, [each.shape for each in x.inputs], sizes
            )[0]
            found = lay_of([linearize(index, x.inputs[number].shape)], sizes)
            if found is None or any(len(each) > 1 for each in found[: -2 if windows else None]):
                return False
            if x is node:
                return True
            x = x.inputs[number]

    def below(self, nodes: Sequence[Node]) -> tuple[set[Node], set[Node], set[Node]]:
        """Of what is read: (placed nodes and leaves, inlined nodes), and nodes to wait for."""
        placed: set[Node] = set()
        inlined: set[Node] = set()
        waits: set[Node] = set()
        stack = list(nodes)
        while stack:
            x = stack.pop()
            if x in self.group_of or x in self.pieces or x.is_leaf:
                placed.add(x)
            elif x not in inlined:
                inlined.add(x)
                waits |= self.waited_for(x)
                stack.extend(x.inputs[:1] if type(x.op) is After else x.inputs)
        return placed, inlined, waits

    def waited_for(self, node: Node) -> set[Node]:
        """What a reader of a node comes after: placed nodes."""
        return self.placed(node.inputs[1:]) if type(node.op) is After else set()


def reduced_axes(node: Node) -> tuple[int, ...]:
    op, ndim = node.op, len(node.inputs[0].shape)
    return as_axes(node.name, op.axes if hasattr(op, "axes") else op.axis, ndim)


def is_plain(index: Indices, axis: int) -> bool:
    """Whether an index has a stride along an axis, which no reshape cuts."""
    return all(
        isinstance(atom, int) or axis not in atom.axes for each in index for atom in each.terms
    )


def lay_of(indices: Indices | Sequence[Index], sizes: Sequence[int]) -> list[Digits] | None:
    """How each axis goes through indices: one digit where it has a stride; None where axes mix."""
    terms: list[list[tuple[Any, int]]] = [[] for _ in sizes]
    for index in indices:
        for atom, factor in index.terms.items():
            axes = (atom,) if isinstance(atom, int) else tuple(atom.axes)
            if len(axes) != 1:
                return None
            terms[axes[0]].append((atom, factor))
    found = [digits(each, size) for each, size in zip(terms, sizes, strict=True)]
    return None if None in found else cast(list[Digits], found)


INLINED = frozenset({*MOVEMENT, ops.RandomUniform})


def sources(node: Node, index: Indices, sizes: Sequence[int]) -> list[tuple[Node, Indices]]:
    """What a node's element at an index reads: inputs and the indices in them."""
    kind = type(node.op)
    if kind in MOVEMENT:
        found = MOVEMENT[kind](node.op, index, [x.shape for x in node.inputs], sizes)
        return [(node.inputs[number], i) for number, i, _ in found]
    if kind is ops.RandomUniform:
        return [(node.inputs[0], (fixed(0),))]
    return gather_sources(node, index) if kind is Gather else [(x, index) for x in node.inputs]


UNKNOWN = Index(0, {Expr: 1})  # an index that no group's coordinates equal


def gather_sources(node: Node, index: Indices) -> list[tuple[Node, Indices]]:
    x, *indices = node.inputs
    axis, ndim = node.op.axis, len(indices[0].shape)
    inside = index[axis : axis + ndim]
    place = (*index[:axis], *[UNKNOWN for _ in indices], *index[axis + ndim :])
    return [(x, place), *((each, inside) for each in indices)]


class Walk:
    """Follows what a node reads down to memory, and refuses a member of the group that is not read
    at the group's coordinates."""

    def __init__(self, fuser: Fuser, group: Group) -> None:
        self.fuser = fuser
        self.group = group
        self.reads: set[Node] = set()
        self.inlined: set[Node] = set()
        self.waits: set[Node] = set()
        self.seen: set[tuple[Node, Indices]] = set()
        self.stack: list[tuple[Node, Indices]] = []

    def enter(self, node: Node, index: Indices) -> bool:
        """Note one read; False if the group cannot have it."""
        if node in self.fuser.pieces:
            self.reads.add(node)
            return all(self.fuser.group_of[x] is not self.group for x in self.fuser.pieces[node])
        if self.fuser.group_of.get(node) is self.group:
            return self.group.index.get(node) == index
        if node in self.fuser.group_of or node.is_leaf:
            self.reads.add(node)
        elif (node, index) not in self.seen:
            self.seen.add((node, index))
            self.inlined.add(node)
            self.stack.append((node, index))
        return True

    def run(self) -> bool:
        """Follow all that was entered; False if anything is refused."""
        while self.stack:
            node, index = self.stack.pop()
            if not self.follow(node, index):
                return False
        return True

    def follow(self, node: Node, index: Indices) -> bool:
        """Note all that an element reads."""
        self.waits |= self.fuser.waited_for(node)
        return all(self.enter(x, i) for x, i in sources(node, index, self.group.shape))
