"""From groups of nodes to nests of loops. Before: a Group. After: a Nest, Contraction, Scatter or
HostCall on buffers. Next: schedule.py.

Every stored node is evaluated at the group's coordinates: an expression whose loads follow from the
index maps of the views between. The loops are then refined, until nothing changes: an axis is cut
where a reshape needs it, and neighbours merge where every index runs through both in one stride.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import gcd, prod
from typing import Any

import numpy as np

import needle.ops as ops
from needle.compiler.fuse import (
    Fuser,
    Group,
    Indices,
    Piece,
    coordinates,
    lay_of,
    reduced_axes,
)  # fmt: skip
from needle.compiler.graph import Constant, Graph, Item, Node
from needle.compiler.index import (
    Index,
    Loops,
    Quotient,
    Residue,
    access,
    as_expr,
    check,
    coordinate,
    delinearize,
    fixed,
    linearize,
    substitute,
)  # fmt: skip
from needle.compiler.loops import (
    COLUMNS,
    ROWS,
    AnyNest,
    Buffer,
    Contraction,
    Digits,
    Expr,
    HostCall,
    Move,
    Nest,
    Operand,
    Repeat,
    Scatter,
    Store,
    cast,
    expr,
    load,
    moved,
    ordered,
    param,
    rebuilt,
    select,
    wide,
)  # fmt: skip
from needle.compiler.lower import (
    MOVEMENT,
    REDUCTION,
    both,
    elementwise,
    filler,
    random_uniform,
)  # fmt: skip
from needle.dtype import LOW_PRECISION, bfloat16, bool_, float32, int64
from needle.ops.index import Checked, Gather, IndexCopy, words
from needle.ops.reduce import CumSum

uint8 = np.dtype(np.uint8)
SHORT = 8  # elements that are no row
WOVEN = (64, 16)  # rows and elements of a block of what is read across
PERIOD, WAYS = 4096, 8  # bytes after which the nearest cache has the same place, for so many lines
Failure = tuple[str, int, bool]  # of a check: words, what negatives lack, whether a ValueError


class Layout:
    """Where nodes lie in memory: buffers, and the strides of program inputs."""

    def __init__(
        self, fuser: Fuser, strides: Mapping[Node, Sequence[int]], lower: Callable[..., Any],
        checks: list[Failure],
    ) -> None:  # fmt: skip
        self.fuser = fuser
        self.strides = strides
        self.lower = lower  # all passes, for the bodies of loops
        self.buffers: dict[Node, Buffer] = {}
        self.checks = checks
        self.waits: dict[AnyNest, list[AnyNest]] = {}  # nests that others come after

    def buffer(self, node: Node) -> Buffer:
        found = self.buffers.get(node)
        if found is None:
            size = prod(node.shape)
            if size and node in self.strides:
                pairs = zip(node.shape, self.strides[node], strict=True)
                size = 1 + sum((n - 1) * abs(stride) for n, stride in pairs)
            source = node.op if node.is_leaf else None
            found = Buffer(f"b{len(self.buffers)}", node.spec.dtype, size, source)
            self.buffers[node] = found
        return found

    def place(self, node: Node, index: Indices) -> tuple[Buffer, Index]:
        """The buffer and the linear index of a node's element."""
        if isinstance(node.op, Piece):
            return self.piece(node.op, index)
        strides = self.strides.get(node)
        if strides is None:
            return self.buffer(node), linearize(index, node.shape)
        found = fixed(0)
        for each, stride in zip(index, strides, strict=True):
            found = found + each * stride
        return self.buffer(node), found

    def piece(self, op: Piece, index: Indices) -> tuple[Buffer, Index]:
        rest = list(index)
        if op.axis is not None:
            rest.insert(op.axis, fixed(0))
        moved = [each + start for each, (start, _) in zip(rest, op.ranges, strict=True)]
        return self.buffer(op.whole), linearize(moved, op.whole.shape)


class Evaluator:
    """The expressions of a group's nodes, over loops of given sizes."""

    def __init__(self, layout: Layout, group: Group, loops: Loops) -> None:
        self.layout = layout
        self.fuser = layout.fuser
        self.group = group
        self.loops = loops
        self.known: dict[tuple[Any, ...], Expr] = {}
        self.table: dict[int, Index] = {}

    def at(self, node: Node) -> Indices:
        """Where a member lies at the loops' coordinates."""
        return tuple(substitute(each, self.table, self.loops) for each in self.group.index[node])

    def value(self, node: Node, index: Indices, mask: Expr | None = None) -> Expr:
        """A node's element; anything where the mask is false."""
        key = node, index, mask
        found = self.known.get(key)
        if found is None:
            found = self.known[key] = self.make(node, index, mask)
        return found

    def make(self, node: Node, index: Indices, mask: Expr | None) -> Expr:
        op, kind = node.op, type(node.op)
        member = node in self.group.index
        if kind is Constant and op.array.size == 1:
            return param(op.array.reshape(()), node.spec.dtype)
        if not member and node not in self.group.inlined and self.is_placed(node):
            return self.load(node, index, mask)
        if member and kind in REDUCTION:
            return self.reduce(node)
        if member and kind is ops.MatMul:
            dtype = node.spec.dtype
            return cast(expr("acc", (), float32 if dtype in LOW_PRECISION else dtype), dtype)
        if member and kind is CumSum:
            x = self.value(node.inputs[0], self.at(node))
            x = wide(x) if x.dtype in LOW_PRECISION else cast(x, node.spec.dtype)
            return cast(expr("scan", (x,), x.dtype), node.spec.dtype)
        return self.compute(node, index, mask)

    def is_placed(self, node: Node) -> bool:
        return node in self.fuser.group_of or node in self.fuser.pieces or node.is_leaf

    def load(self, node: Node, index: Indices, mask: Expr | None) -> Expr:
        buffer, place = self.layout.place(node, index)
        return load(access(buffer, place, self.loops), mask)

    def compute(self, node: Node, index: Indices, mask: Expr | None) -> Expr:
        op, kind = node.op, type(node.op)
        if kind in MOVEMENT:
            return self.move(node, index, mask)
        if kind is ops.RandomUniform:
            key, counter = (self.value(node.inputs[0], (fixed(i),)) for i in (0, 1))
            return random_uniform(op, key, counter, linearize(index, node.shape), self.loops)
        if kind is Gather:
            return self.gather(node, index, mask)
        if kind is Checked:
            return self.checked_value(op, cast(self.value(node.inputs[0], index, mask), int64))
        args = [self.value(x, index, mask) for x in node.inputs]
        return args[0] if kind is Piece else elementwise(op, node.spec.dtype, args)

    def move(self, node: Node, index: Indices, mask: Expr | None) -> Expr:
        """Of several inputs, the one in whose part the element lies."""
        op, shapes = node.op, [x.shape for x in node.inputs]
        found = MOVEMENT[type(op)](op, index, shapes, self.loops)
        y: Expr | None = None
        for number, place, inside in found[::-1]:
            x = self.value(node.inputs[number], place, both(mask, inside))
            if inside is None:
                y = x
            else:
                y = select(inside, x, filler(op, node.spec.dtype) if y is None else y)
        assert y is not None
        return y

    def indices(
        self, node: Node, index: Indices, axis: int, sizes: Sequence[int], mask: Expr | None = None
    ) -> list[Index]:
        """The checked indices that a node's index inputs hold at a place; 0 where it is masked."""
        found = []
        for x, size in zip(node.inputs[1:], sizes[axis:], strict=False):
            i = cast(self.value(x, index, mask), int64)
            i = i if mask is None else select(mask, i, 0)
            if 0 in self.loops:  # no element: what is computed before the loops reads none
                found.append(fixed(0))
                continue
            found.append(Index(0, {self.checked((words(node.name, size), 0, False), i, size): 1}))
        return found

    def checked_value(self, op: Checked, x: Expr) -> Expr:
        i = x if op.wraps else select(x < 0, x - op.size, x)
        words = op.words, 0 if op.wraps else op.size, op.is_value
        if op.ignored is None:
            return self.checked(words, i, op.size)
        passes = x.equals(op.ignored)
        return select(passes, x, self.checked(words, select(passes, 0, i), op.size))

    def checked(self, words: Failure, i: Expr, size: int) -> Expr:
        self.layout.checks.append(words)
        return check(i, size, len(self.layout.checks) - 1)

    def gather(self, node: Node, index: Indices, mask: Expr | None) -> Expr:
        x, first = node.inputs[0], node.inputs[1]
        axis, ndim = node.op.axis, len(first.shape)
        chosen = self.indices(node, index[axis : axis + ndim], axis, x.shape, mask)
        return self.value(x, (*index[:axis], *chosen, *index[axis + ndim :]), mask)

    def reduce(self, node: Node) -> Expr:
        kind, x = REDUCTION[type(node.op)], node.inputs[0]
        axes, kept = reduced_axes(node), iter(self.at(node))
        inner = iter(
            substitute(coordinate(a), self.table, self.loops) for a in self.group.inner or ()
        )
        index = tuple(
            (fixed(0) if n == 1 else next(inner)) if axis in axes else next(kept)
            for axis, n in enumerate(x.shape)
        )
        value = wide(self.value(x, index))
        value = cast(value, uint8) if value.dtype == bool_ else value
        if kind in ("argmax", "argmin"):
            return expr("reduce", (value,), int64, kind)
        return cast(expr("reduce", (value,), value.dtype, kind), node.spec.dtype)

    def stores(self, stored: Sequence[Node]) -> list[Store]:
        found = []
        for node in stored:
            index = self.at(node)
            buffer, place = self.layout.place(node, index)
            value = self.value(node, index)
            found.append(Store(access(buffer, place, self.loops), value))
        return found


# Loops


class Shaper:
    """The loops of a group: which axes there are, and where the group's coordinates lie in
    them."""

    def __init__(self, group: Group) -> None:
        self.group = group
        axes = [axis for axis in (*group.outer, *(group.inner or ())) if group.shape[axis] != 1]
        self.sizes = [group.shape[axis] for axis in axes]
        self.table = {axis: fixed(0) for axis in range(len(group.shape))}
        self.table |= {axis: coordinate(place) for place, axis in enumerate(axes)}
        inner = group.inner or ()
        self.outer = sum(axis not in inner for axis in axes) if group.inner is not None else None

    def replace(self, parts: Sequence[tuple[int, ...]], indices: Sequence[Index]) -> None:
        """Loop axis a becomes axes of sizes parts[a], at indices[a] in terms of the new ones."""
        sizes = [n for part in parts for n in part]
        if self.outer is not None:
            self.outer = sum(map(len, parts[: self.outer]))
        table = dict(enumerate(indices))
        self.table = {a: substitute(each, table, sizes) for a, each in self.table.items()}
        self.sizes = sizes

    def split(self, splits: Mapping[int, int]) -> None:
        parts: list[tuple[int, ...]] = []
        indices, place = [], 0
        for axis, n in enumerate(self.sizes):
            least = splits.get(axis)
            if least is None:
                parts.append((n,))
                indices.append(coordinate(place))
            else:
                parts.append((n // least, least))
                indices.append(coordinate(place) * least + coordinate(place + 1))
            place += len(parts[-1])
        self.replace(parts, indices)

    def merge(self, runs: Sequence[Sequence[int]]) -> None:
        """Each run of neighbouring axes becomes one axis."""
        sizes = [prod(self.sizes[axis] for axis in run) for run in runs]
        parts: list[tuple[int, ...]] = [()] * len(self.sizes)
        indices: list[Index] = [fixed(0)] * len(self.sizes)
        for place, run in enumerate(runs):
            shape = [self.sizes[axis] for axis in run]
            parts[run[0]] = (sizes[place],)
            for axis, each in zip(run, delinearize(coordinate(place), shape, sizes), strict=True):
                indices[axis] = each
        self.replace(parts, indices)

    def is_short(self) -> bool:
        """Whether the last axis, which vectors lie along, is shorter than the one before it."""
        short = len(self.sizes) > 1 and self.sizes[-1] < min(SHORT, self.sizes[-2])
        return self.outer is None and short

    def turn(self) -> None:
        """The last two axes in the other order."""
        *rest, m, n = range(len(self.sizes))
        self.permute([*rest, n, m])

    def permute(self, order: Sequence[int]) -> None:
        """The axes in another order."""
        table = {axis: coordinate(place) for place, axis in enumerate(order)}
        self.sizes = [self.sizes[axis] for axis in order]  # what substitute asks for
        self.table = {a: substitute(x, table, self.sizes) for a, x in self.table.items()}

    def weave(self, axis: int) -> bool:
        """Blocks of places along an axis and few along the last one, where both have many."""
        last = len(self.sizes) - 1
        splits = {
            each: gcd(self.sizes[each], n) for each, n in zip((axis, last), WOVEN, strict=True)
        }
        if min(splits.values()) < WOVEN[1] // 2 or splits[last] == self.sizes[last]:
            return False
        if splits[axis] == self.sizes[axis]:
            del splits[axis]
        self.split(splits)
        axis, last = axis + len(splits) - 1, len(self.sizes) - 1
        rest = [each for each in range(last) if each != axis]
        self.permute([*rest, axis, last])
        return True

    def runs(self, loops: Loops) -> list[list[int]]:
        """Neighbouring axes that every used index runs through in one stride."""
        found: list[list[int]] = []
        for axis in range(len(self.sizes)):
            joins = found and axis != self.outer
            if joins and all(in_one_stride(index, axis, self.sizes) for index in loops.used):
                found[-1].append(axis)
            else:
                found.append([axis])
        return found


def in_one_stride(index: Index, axis: int, sizes: Sequence[int]) -> bool:
    """Whether an index does not tell axes axis - 1 and axis from one long axis."""
    terms = index.terms
    if terms.get(axis - 1, 0) != terms.get(axis, 0) * sizes[axis]:
        return False
    return all(
        in_one_stride(atom.index, axis, sizes)
        if isinstance(atom, (Quotient, Residue))
        else isinstance(atom, int) or not {axis - 1, axis} & atom.axes
        for atom in terms
    )


def evaluate(
    layout: Layout, group: Group, stored: Sequence[Node], shaper: Shaper, settled: bool
) -> Any:
    loops = Loops(shaper.sizes)
    loops.settled = settled
    evaluator = Evaluator(layout, group, loops)
    evaluator.table = shaper.table
    count = len(layout.checks)
    return loops, evaluator.stores(stored), count


def build_loop(layout: Layout, group: Group, stored: Sequence[Node]) -> Nest:
    """The nest of a group, over the fewest axes that its index maps allow."""
    shaper, merged = Shaper(group), False
    settled = not any(type(x.op) is ops.Pad for x in (*group.index, *group.inlined))
    while True:
        loops, stores, count = evaluate(layout, group, stored, shaper, settled)
        # Once axes have merged, quotients that are left on the way recombine at its end.
        if loops.splits and not merged:
            shaper.split(loops.splits)
            del layout.checks[count:]
            continue
        merged = True
        if len(runs := shaper.runs(loops)) < len(shaper.sizes):
            shaper.merge(runs)
        elif shaper.outer is not None and len(shaper.sizes) > shaper.outer + 1:
            last = range(shaper.outer, len(shaper.sizes))
            shaper.merge([*([axis] for axis in range(shaper.outer)), last])
        elif shaper.is_short():
            shaper.turn()
        elif settled:
            break
        else:
            settled = True
        del layout.checks[count:]
    across = crossing(stores, shaper.sizes) if shaper.outer is None else None
    if across is not None and shaper.weave(across):
        del layout.checks[count:]
        _, stores, _ = evaluate(layout, group, stored, shaper, settled)
    return as_nest(group, shaper, stores)


def crossing(stores: Sequence[Store], sizes: Sequence[int]) -> int | None:
    """The axis along which something lies side by side that is so far apart along the last axis,
    as the stores are not, that its cache lines drive each other out before the next row."""
    last = len(sizes) - 1
    if any(store.access.stride(last) != 1 for store in stores):
        return None
    for each in ordered([store.value for store in stores]):
        if each.op == "load":
            near = [axis for axis, step in each.attr.strides if step == 1 and axis != last]
            far = each.attr.stride(last) * each.dtype.itemsize
            apart = gcd(far, PERIOD) if far else 1
            if near and apart >= PERIOD // 4 and sizes[last] > WAYS * PERIOD // apart:
                return near[0]
    return None


def as_nest(group: Group, shaper: Shaper, stores: Sequence[Store]) -> Nest:
    sizes, outer = shaper.sizes, shaper.outer
    if outer is None:
        outer = max(len(sizes) - 1, 0)
    inner = sizes[outer] if len(sizes) > outer else 1
    shape = tuple(sizes[:outer])
    if group.order == COLUMNS and not shape:
        # A scan along the only axis: the axis of the vectors has size 1.
        stores = [Store(moved(s.access, {}, 1), rebuilt(s.value, {}, 1)) for s in stores]
        shape = (1,)
    return Nest(shape, inner, group.order, tuple(stores), tuple(group.nodes))


# The other kinds


def build_contraction(layout: Layout, group: Group, stored: Sequence[Node]) -> Contraction:
    node = next(iter(group.index))
    a, b = node.inputs
    batch, m, n, k = node.shape[:-2], node.shape[-2], node.shape[-1], a.shape[-1]
    count = len(batch)
    axes = tuple(coordinate(axis) for axis in range(count + 2))
    left = operand(layout, group, a, axes, (*batch, m, k))
    swapped = (*axes[:count], axes[count + 1], axes[count])
    right = operand(layout, group, b, swapped, (*batch, n, k))
    evaluator = Evaluator(layout, group, Loops(group.shape))
    evaluator.table = {axis: coordinate(axis) for axis in range(count + 2)}
    epilogue = Nest((*batch, m), n, ROWS, tuple(evaluator.stores(stored)), tuple(group.nodes))
    dot = node.op.dot and left.buffer.dtype in (float32, bfloat16)
    return Contraction(batch, m, n, k, left, right, epilogue, tuple(group.nodes), dot)


def operand(layout: Layout, group: Group, x: Node, index: Indices, sizes: Sequence[int]) -> Operand:
    """A contraction's input as a strided view, of axes (*batch, outer, inner)."""
    buffer, start, ways = locate(layout, group, x, index, sizes)
    batch, (outer, inner) = ways[:-2], ways[-2:]
    assert all(len(each) == 1 for each in batch), "windows of batch axes"
    steps = tuple(stride for ((_, stride),) in batch)
    if len(outer) == len(inner) == 1:
        return Operand(buffer, start, steps, outer[0][1], inner[0][1])
    return Operand(buffer, start, steps, 0, 0, (outer, inner))


def locate(
    layout: Layout, group: Group, x: Node, index: Indices, sizes: Sequence[int]
) -> tuple[Buffer, int, list[Digits]]:
    """Where a view of memory lies: buffer, offset, and for each axis digits that have strides."""
    while x in group.inlined:
        found = MOVEMENT[type(x.op)](x.op, index, [each.shape for each in x.inputs], sizes)
        number, index, _ = found[0]
        x = x.inputs[number]
    buffer, place = layout.place(x, index)
    ways = lay_of([place], sizes)
    assert ways is not None, "an operand without strides"
    return buffer, place.constant, ways


def build_scatter(layout: Layout, group: Group, node: Node) -> Scatter:
    base, (x, first, *_) = None, node.inputs
    if type(node.op) is IndexCopy:
        base, x, first = node.inputs
    axis, count = node.op.axis, 1 if base is not None else len(node.inputs) - 1
    shape = node.shape
    lead, rows, trail = shape[:axis], shape[axis : axis + count], shape[axis + count :]
    sizes = [prod(lead), prod(first.shape), prod(trail)]
    loops = Loops(sizes)
    evaluator = Evaluator(layout, group, loops)
    places = delinearize(coordinate(1), first.shape, loops)
    leading, trailing = (delinearize(coordinate(a), s, loops) for a, s in ((0, lead), (2, trail)))
    value = evaluator.value(x, (*leading, *places, *trailing))
    out = layout.buffer(node)
    parts = sizes[0], sizes[1], prod(rows), sizes[2]
    if base is not None:  # its indices are checked already
        place = evaluator.value(first, places)
        return Scatter(*parts, place, value, out, (node,), layout.buffer(base))
    row = linearize(evaluator.indices(node, places, axis, shape), rows) if sizes[1] else fixed(0)
    return Scatter(*parts, as_expr(row), cast(wide(value), node.spec.dtype), out, (node,))


def build_host(layout: Layout, node: Node, items: Mapping[Node, Sequence[Node]]) -> HostCall:
    inputs = tuple((layout.buffer(x), x.shape) for x in node.inputs)
    outputs = tuple((layout.buffer(x), x.shape) for x in items.get(node, [node]))
    return HostCall(node.op, inputs, outputs, (node,))


def build_repeat(layout: Layout, group: Group, node: Node) -> Repeat:
    """A loop: its body after all passes, and how the body's inputs and outputs move."""
    op, items, known = node.op, layout.fuser.items[node], layout.fuser.group_of
    used = [n for n, item in enumerate(items) if item in known]
    leaves, strides, moves = op.body.inputs, {}, {}
    way = -1 if op.reverse else 1
    for n, x in enumerate(node.inputs[op.carries :], op.carries):
        buffer, start, ways = locate(layout, group, x, coordinates(x.shape), x.shape)
        found = [stride for ((_, stride),) in ways]
        step = 0
        if n < op.carries + op.xs:
            step, *found = found
            start += op.places[0] * step
        strides[leaves[n]] = found
        moves[leaves[n]] = Move(buffer, start, step * way)
    source = Graph(leaves, [op.body.outputs[n] for n in used])
    lowered = layout.lower(source, None, strides, layout.checks)
    body: dict[Buffer, Move] = {lowered.layout.buffer(x): move for x, move in moves.items()}
    for n, out in zip(used, lowered.outputs, strict=True):
        whole = layout.buffer(items[n])
        if n >= op.carries:
            body[out] = Move(whole, op.places[0] * out.size, out.size * way)
            continue
        first, flips = op.ends(n)[0], not op.keeps[n]
        step = (1 - 2 * first if flips else way) * out.size
        body[lowered.layout.buffer(leaves[n])] = Move(whole, first * out.size, step, flips)
        body[out] = Move(whole, first * out.size + step, -step if flips else step, flips)
    scratch = Buffer(f"{layout.buffer(items[0]).name}.scratch", uint8, lowered.plan.size)
    return Repeat(op.turns, lowered.schedule.kernels, body, lowered.plan.offsets, scratch, (node,))


WHOLE: dict[str, Callable[..., AnyNest]] = {"scatter": build_scatter, "repeat": build_repeat}


def build(
    fuser: Fuser, strides: Mapping[Node, Sequence[int]], lower: Callable[..., Any],
    checks: list[Failure],
) -> tuple[list[AnyNest], Layout]:  # fmt: skip
    """The nests of all groups, each after those it reads from. lower: all passes, for bodies of
    loops; checks: what run-time checks say, to be added to."""
    layout = Layout(fuser, strides, lower, checks)
    stored: set[Node] = set(fuser.graph.outputs)
    for group in fuser.groups:
        stored |= group.reads
    hosts = {node: group for node, group in fuser.group_of.items() if group.kind == "host"}
    items: dict[Node, list[Node]] = {}
    for node in hosts:
        if isinstance(node.op, Item):
            items.setdefault(node.inputs[0], []).append(node)
    owner = {
        group.number: node
        for node, group in fuser.group_of.items()
        if group.kind in ("host", "scatter", "repeat") and not isinstance(node.op, Item)
    }
    made: dict[Group, AnyNest] = {}
    for group in in_order(fuser.groups):
        kept = [x for x in group.index if x in stored or isinstance(x.op, Piece)]
        if group.kind == "loop":
            if kept:
                made[group] = build_loop(layout, group, kept)
        elif group.kind == "contraction":
            made[group] = build_contraction(layout, group, kept)
        elif group.kind in WHOLE:
            made[group] = WHOLE[group.kind](layout, group, owner[group.number])
        else:
            made[group] = build_host(layout, owner[group.number], items)
    for group, nest in made.items():
        before = fuser.groups_of(group.waits).intersection(made)
        layout.waits[nest] = [made[each] for each in before if each is not group]
    return list(made.values()), layout


def in_order(groups: Sequence[Group]) -> list[Group]:
    """Groups after their ancestors."""
    return sorted(groups, key=lambda group: (group.ancestors.bit_count(), group.number))
