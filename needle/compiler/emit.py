"""Nest or Scatter -> native code's text. `structure` says what to compile and what to pass;
`emit` writes LLVM IR. Before: schedule.py. Next: engine.py. contract.py adds contractions.

    void kernel(i64 *args, i64 begin, i64 end, i8 *scratch)

computes the units begin .. end - 1. `args` holds a pointer per buffer, then sizes, strides, offsets
and params: nests of one structure are one kernel. `scratch` begins with the flags of checks.

    rows      unit = an outer point; without outer axes and reductions, UNIT elements
    columns   unit = UNIT columns (of the last outer axis) at a point of the other outer axes
    scatter   unit = a destination row

Values are computed where they change: *uniform* ones once per call, *outer* ones once per point (in
columns, those that vary along the last outer axis once per block of columns, as vectors), *inner*
ones in each of the loops over the inner axis that need them. Sums follow needle/ops/order.py.

For contract.py, `emit_tile` writes a contraction's epilogue as the function

    void epilogue(ptr %args, ptr %tile, i64 %ld, i64 %batch, i64 %m0, i64 %rows, i64 %n0,
                  i64 %columns, ptr %scratch)

It stores at (batch, m0 + r, n0 + c) for r < rows, c < columns; `acc` is tile[r * ld + c], and batch
the linear index of the outer axes but the last. Slots.nest(epilogue) adds to the kernel's own args.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil, prod
from typing import Any

from needle.compiler.loops import (
    COLUMNS,
    COMPARE,
    ROWS,
    Access,
    Buffer,
    Expr,
    Nest,
    Scatter,
    Store,
    arguments,
    axis,
    inner_level,
    ordered,
    passes_of,
    usual,
)
from needle.compiler.vectors import (
    Carried,
    Writer,
    constant,
    least,
    literal,
    memory,
    most,
    register,
    typed,
)
from needle.dtype import DType, bool_, int32, int64
from needle.ops import order

UNIT = 64  # elements or columns
HEAVY = 12  # operations from which on a value is kept rather than computed again
LIGHT = 24  # operations up to which a loop is unrolled
FLAGS = 64  # bytes of scratch before the kernel's own
NANOSECONDS = {  # of an operation on one element; on what is not here, 0.02
    "load": 0.06, "store": 0.06, "div": 0.15, "sqrt": 0.2, "sdiv": 2.0, "srem": 2.0, "udiv": 2.0,
    "urem": 2.0, "const": 0.0, "param": 0.0, "axis": 0.0,
}  # fmt: skip
FREE = frozenset({"const", "param", "axis", "load", "acc", "bitcast"})


@dataclass(frozen=True)
class Structure:
    """What a kernel is compiled for (`key`), and what one nest passes to it."""

    key: str
    buffers: tuple[Buffer, ...]  # of the pointers in args, in order
    values: tuple[int, ...]  # the slots after them
    units: int
    cost: float  # ns per unit on one thread, roughly
    scratch: int  # bytes after the flags


class Slots:
    """The arguments of a kernel in order, and its key, as a walk over nests meets them."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.buffers: dict[Buffer, int] = {}
        self.values: list[int] = []
        self.names: dict[Hashable, int] = {}

    def buffer(self, buffer: Buffer) -> int:
        """The slot of a buffer's pointer."""
        return self.buffers.setdefault(buffer, len(self.buffers))

    def value(self, value: int, name: Hashable) -> None:
        self.names[name] = len(self.values)
        self.values.append(value)

    def slot(self, name: Hashable) -> int:
        """The slot of a value, once the walk is over."""
        return len(self.buffers) + self.names[name]

    def write(self, *parts: object) -> None:
        self.parts += map(str, parts)

    def nest(self, nest: Nest) -> None:
        """Sizes, then what the nest's expressions and stores take."""
        vector = vector_axis(nest)
        self.write(nest.order, len(nest.outer))
        for place, size in enumerate((*nest.outer, nest.inner)):
            self.value(size, ("size", place))
        numbers: dict[Expr, int] = {}
        for place, each in enumerate(nest.expressions()):
            numbers[each] = place
            self.expression(each, numbers, vector)
        for store in nest.stores:
            self.parts.append(f"={numbers[store.value]}")
            self.access(store.access, numbers, vector)

    def expression(self, each: Expr, numbers: dict[Expr, int], vector: int) -> None:
        op, attr = each.op, each.attr
        self.parts.append(f"{op}.{each.dtype.char}{[numbers[x] for x in each.args]}")
        if op == "load":
            self.access(attr, numbers, vector)
        elif op == "const":
            self.parts.append(attr.tobytes().hex())
        elif op == "param":
            self.value(int.from_bytes(attr.tobytes(), "little"), each)
        elif op == "check":
            self.value(attr[0], (each, "size"))
            self.value(attr[1] + 1, (each, "flag"))
        elif attr is not None:
            self.parts.append(str(attr))

    def access(self, access: Access, numbers: dict[Expr, int], vector: int) -> None:
        """Whether there is an offset, which axes have strides, and whether vectors lie compactly
        are structure; the numbers are not."""
        text = f"@{self.buffer(access.buffer)}{access.buffer.dtype.char}"
        if access.offset:
            text += "+"
            self.value(access.offset, (id(access), "offset"))
        for place, (number, stride) in enumerate(access.strides):
            compact = number == vector and stride == 1
            text += ",v" if compact else f",{number}"
            if not compact:
                self.value(stride, (id(access), place))
        for place, (each, stride) in enumerate(access.dynamic, len(access.strides)):
            text += f";{numbers[each]}"
            self.value(stride, (id(access), place))
        self.parts.append(text)

    def structure(self, units: int, cost: float, scratch: int) -> Structure:
        key, values = " ".join(self.parts), tuple(self.values)
        return Structure(key, tuple(self.buffers), values, units, cost, scratch)


def vector_axis(nest: Nest) -> int:
    """The axis that vectors lie along."""
    return len(nest.outer) - (nest.order == COLUMNS)


def structure(nest: Nest | Scatter) -> Structure:
    """What to compile for a nest, and what to pass."""
    slots, body, scratch = walk(nest)
    each = price(body) * body.inner
    if isinstance(nest, Scatter):
        cost = nest.places * (2 + each * nest.lead)
        return slots.structure(nest.rows, cost / max(nest.rows, 1), 0)
    if is_flat(body):
        return slots.structure(ceil(body.inner / UNIT), price(body) * UNIT, 0)
    if body.order == ROWS:
        return slots.structure(prod(body.outer), 4 + each, scratch)
    units = prod(body.outer[:-1]) * ceil(body.outer[-1] / UNIT)
    return slots.structure(units, 4 + each * min(UNIT, body.outer[-1]), scratch)


def walk(nest: Nest | Scatter) -> tuple[Slots, Nest, int]:
    """A kernel's arguments, its loops and its bytes of scratch."""
    slots = Slots()
    if isinstance(nest, Scatter):
        slots.write("scatter" if nest.base is None else "copy")
        slots.value(nest.rows, "rows")
        if nest.base is not None:
            slots.buffer(nest.base)
        nest = rows_of(nest)
    slots.nest(nest)
    reduces = any(each.op == "reduce" for each in nest.expressions())
    return slots, nest, lay_out(slots, Plan(nest)) if reduces else 0


def is_flat(nest: Nest) -> bool:
    """Whether units are parts of the inner axis."""
    return not nest.outer and all(each.op != "reduce" for each in nest.expressions())


def price(nest: Nest) -> float:
    """Nanoseconds per element, roughly, as if all were of inner level and in one loop."""
    found = NANOSECONDS["store"] * len(nest.stores)
    for each in nest.expressions(usual):
        found += NANOSECONDS.get(each.op, 0.02) * max(each.dtype.itemsize, 4) / 4
    return found


def rows_of(scatter: Scatter) -> Nest:
    """The nest over (lead, places | trail) whose stores a scatter adds."""
    trail = scatter.trail
    strides = ((0, scatter.rows * trail), (2, 1))
    place = Access(scatter.out, 0, strides, ((scatter.row, trail),))
    return Nest((scatter.lead, scatter.places), trail, ROWS, (Store(place, scatter.value),))


class Plan:
    """What is computed in which loop over the inner axis."""

    def __init__(self, nest: Nest) -> None:
        self.nest = nest
        self.exprs = nest.expressions()
        self.usual = set(nest.expressions(usual))  # what is computed in all cases
        self.inner = inner_level(nest)
        self.passes = passes_of(nest)
        self.saved: dict[Expr, int] = {}  # values kept for later loops -> the loop that makes them
        self.stores: dict[Store, int] = {}  # of inner level -> the loop that they are in
        roots: dict[int, list[Expr]] = {}
        self.reduces = [each for each in self.exprs if each.op == "reduce"]
        for each in self.reduces:
            roots.setdefault(self.passes[each] - 1, []).append(each.args[0])
        for store in nest.stores:
            read = [store.value, *(x for x, _ in store.access.dynamic)]
            if any(self.inner[x] for x in read) or store.access.stride(nest.inner_axis):
                self.stores[store] = max(self.passes[x] for x in read)
                roots.setdefault(self.stores[store], []).extend(read)
        self.loops = max(roots, default=-1) + 1
        done: dict[Expr, int] = {}
        self.bodies = [self.body(p, roots.get(p, []), done) for p in range(self.loops)]

    def body(self, p: int, roots: Sequence[Expr], done: dict[Expr, int]) -> list[Expr]:
        """The inner values of a loop, each after its arguments. What is kept needs no others."""

        def is_kept(each: Expr) -> bool:
            early = self.nest.order == ROWS and done.get(each, p) < p
            return early and self.weight([each]) > HEAVY

        found = self.below(roots, is_kept)
        self.saved |= {each: done[each] for each in found if is_kept(each)}
        done.update({each: p for each in found if each not in done})
        return [each for each in self.exprs if each in found]

    def below(self, roots: Sequence[Expr], stops: Callable[[Expr], bool]) -> set[Expr]:
        """The inner values that some are computed from, themselves included."""
        found: set[Expr] = set()
        stack = list(roots)
        while stack:
            each = stack.pop()
            if self.inner[each] and each not in found:
                found.add(each)
                if not stops(each):
                    stack += usual(each)
        return found

    def weight(self, roots: Sequence[Expr]) -> int:
        """How many operations on inner values it takes, from loads on."""
        return sum(each.op not in FREE for each in self.below(roots, lambda _: False))


def lay_out(slots: Slots, plan: Plan) -> int:
    """Pass where each reduction's parts and each kept row lie in scratch; how many bytes in all."""
    place, inner, columns = FLAGS, plan.nest.inner, plan.nest.order == COLUMNS
    parts = [each for each in plan.reduces if each.attr in ("sum", "fold")]
    for each in [*parts, *plan.saved]:
        count = ceil(inner / order.LANES) * order.LANES
        if each.op == "reduce" and each.attr == "sum":
            count = ceil(inner / (order.ROWS if columns else order.CHUNK))
        slots.value(place, (each, "scratch"))
        size = max(count, 1) * each.dtype.itemsize * (UNIT if columns else 1)
        place += ceil(size / FLAGS) * FLAGS
    return place - FLAGS


def components(each: Expr) -> list[tuple[DType, float]]:
    """What the state of a reduction or scan consists of, and its beginnings."""
    dtype = each.args[0].dtype
    if each.op == "scan" or each.attr == "sum":
        return [(dtype, 0)]
    first = least(dtype) if each.attr in ("max", "argmax") else most(dtype)
    return [(dtype, first)] if each.attr in ("max", "min") else [(dtype, first), (int64, 0)]


# Emission


class Kernel(Writer):
    """The text of one nest's loops.

    `known` maps what is computed to its register: an expression (a scalar), (expression, u) (the
    u-th vector of a block), (expression, "splat"), and addresses.
    """

    def __init__(self, slots: Slots, nest: Nest, bits: int) -> None:
        super().__init__()
        self.slots, self.nest, self.plan = slots, nest, Plan(nest)
        self.lanes = bits // 32
        self.vector = vector_axis(nest)
        self.columns = nest.order == COLUMNS
        self.chunk = order.ROWS if self.columns else order.CHUNK
        self.width = self.lanes if self.columns else 0  # of what a reduction leaves
        self.varying = self.vary()
        vectors = [x for each in self.plan.exprs if self.varying[each] for x in each.args]
        vectors += [x.args[0] for x in self.plan.reduces]
        self.splatted = {*vectors, *(store.value for store in self.plan.stores)}
        self.known: dict[Any, str] = {}
        self.coordinates: dict[int, str] = {}
        self.group = 1  # vectors in a block
        self.starts: list[str] = []  # where they start along the vector axis
        self.masks: list[str] = []  # their active lanes, where not all are
        self.low, self.high = "0", ""  # the range of the inner axis
        self.adds = False  # stores add to what is there
        self.tile = ""

    def vary(self) -> dict[Expr, bool]:
        """Whether a value differs between lanes."""
        found: dict[Expr, bool] = {}
        for each in self.plan.exprs:
            own = each.op in ("reduce", "scan") or (each.op == "axis" and each.attr == self.vector)
            own = own or (each.op == "load" and each.attr.stride(self.vector) != 0)
            found[each] = own or any(found[x] for x in arguments(each))
        return found if self.columns else self.plan.inner

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is computed inside is not known after it."""
        known = self.known
        self.known = dict(known)
        yield
        self.known = known

    def argument(self, name: Hashable) -> str:
        return f"%a{self.slots.slot(name)}"

    def size(self, number: int) -> str:
        return self.argument(("size", number))

    def text(self, name: str, parameters: str, work: Callable[[], None], nonempty: str) -> str:
        """The function: nothing is read where there is nothing to do."""

        def body() -> None:
            self.begin_arguments()
            work()

        self.do("%sink = alloca [16 x i8], align 16")
        self.when(self.let(nonempty), body)
        bits = self.lanes * 32
        wide = f'"prefer-vector-width"="{bits}" "min-legal-vector-width"="{bits}"'
        head = f"define void @{name}({parameters}) nounwind {wide} {{"
        return "\n".join([head, "entry:", *self.lines, "  ret void", "}", ""])

    def begin_arguments(self) -> None:
        """Read the arguments; compute what is the same everywhere."""
        count = len(self.slots.buffers)
        for slot in range(count + len(self.slots.values)):
            kind, name = ("ptr", "p") if slot < count else ("i64", "a")
            self.do(f"%s{slot} = getelementptr i64, ptr %args, i64 {slot}")
            self.do(f"%{name}{slot} = load {kind}, ptr %s{slot}, align 8")
        self.high = self.size(self.nest.inner_axis)
        for each in self.plan.exprs:
            if self.is_uniform(each) and each in self.plan.usual:
                self.compute(each)

    def is_uniform(self, each: Expr) -> bool:
        return not (each.axes or self.plan.inner[each] or self.plan.passes[each])

    # Units

    def units(self) -> None:
        if is_flat(self.nest):
            self.low = self.whole("mul", "%begin", UNIT)
            self.high = self.least_of(self.whole("mul", "%end", UNIT), self.high)
            return self.point()
        sizes = [self.size(number) for number in range(len(self.nest.outer))]
        if self.columns:
            sizes[-1] = self.whole("udiv", self.whole("add", sizes[-1], UNIT - 1), UNIT)

        def unit(_: str, place: list[str]) -> list[str]:
            with self.scope():
                self.coordinates = dict(enumerate(place))
                self.column_unit() if self.columns else self.point()
            return self.advance(place, sizes)

        first = self.delinearize("%begin", sizes)
        self.loop("%begin", "%end", 1, [("i64", each) for each in first], unit)
        return None

    def delinearize(self, index: str, sizes: Sequence[str]) -> list[str]:
        """The coordinates of a linear index, the last one fastest."""
        found = []
        for size in sizes[:0:-1]:
            found.append(self.whole("urem", index, size))
            index = self.whole("udiv", index, size)
        return [index, *found[::-1]] if sizes else []

    def advance(self, place: Sequence[str], sizes: Sequence[str]) -> list[str]:
        """The coordinates of the next unit."""
        found, carry = [], "1"
        for each, size in zip(place[:0:-1], sizes[:0:-1], strict=True):
            more = self.whole("add", each, carry)
            full = self.test("eq", more, size)
            found.append(self.select(full, "0", more, int64, 0))
            carry = self.let(f"zext i1 {full} to i64")
        return [self.whole("add", place[0], carry), *found[::-1]] if place else []

    def column_unit(self) -> None:
        """Blocks of several vectors, then masked ones."""
        first = self.whole("mul", self.coordinates.pop(self.vector), UNIT)
        last = self.least_of(self.whole("add", first, UNIT), self.size(self.vector))
        weight = max(map(len, self.plan.bodies), default=0)
        several = 4 if weight <= HEAVY else 2 if weight <= LIGHT else 1
        for group, end in ((several, None), (1, last)):
            step = group * self.lanes
            stop = end or self.multiple(first, last, step)

            def block(i: str, _: list[str], group: int = group, end: str | None = end) -> list[str]:
                with self.scope():
                    self.place(i, group, end)
                    self.point()
                return []

            self.loop(first, stop, step, [], block)
            first = stop

    def multiple(self, first: str, last: str, step: int) -> str:
        """Where the last whole step from `first` ends."""
        span = self.whole("and", self.whole("sub", last, first), -step)
        return self.whole("add", first, span)

    def place(self, first: str, group: int, end: str | None) -> None:
        """The block's vectors begin at `first`; lanes from `end` on are inactive."""
        self.group, self.masks = group, []
        self.starts = [self.whole("add", first, u * self.lanes) for u in range(group)]
        if end is not None:
            rest = self.let(f"trunc i64 {self.whole('sub', end, first)} to i32")
            bound = self.splat(rest, int32, self.lanes)
            for u in range(group):
                places = self.count_up(u * self.lanes, self.lanes, int32)
                self.masks.append(self.compare("lt", int32, self.lanes, places, bound))

    def active(self, u: int) -> str | None:
        return self.masks[u] if self.masks else None

    def point(self) -> None:
        """All loops of one outer point (or block of columns)."""
        self.outer(0)
        for p in range(self.plan.loops):
            self.run(p)
            self.outer(p + 1)
        for store in self.nest.stores:
            if store not in self.plan.stores:
                for u in range(self.group if self.columns else 1):
                    self.write(store, u)

    def outer(self, p: int) -> None:
        """What is known before loop p; first of all addresses."""
        plan = self.plan
        for each in plan.exprs:
            here = plan.passes[each] == p and not plan.inner[each] and each.op != "reduce"
            if here and each in plan.usual and not self.is_uniform(each):
                self.compute(each)
        if p == 0:
            accesses = [each.attr for each in plan.exprs if each.op == "load"]
            for access in [*accesses, *(store.access for store in self.nest.stores)]:
                if all(plan.passes[x] == 0 for x, _ in access.dynamic):
                    self.base(access)

    # Loops over the inner axis

    def run(self, p: int) -> None:
        """Loop p, and the reductions that it computes."""
        plan = self.plan
        reduces = [each for each in plan.reduces if plan.passes[each] == p + 1]
        parts = [each for each in reduces if each.attr in ("sum", "fold")]
        sums = [each for each in parts if each.attr == "sum"]
        states = [each for each in plan.bodies[p] if each.op == "scan"]
        states += [each for each in reduces if each not in parts]
        if not self.columns:
            several = sums or plan.weight(plan.bodies[p]) <= LIGHT
            self.group = order.LANES // self.lanes if several else 1
        for each in parts:
            zero = constant(0, each.dtype, self.width)
            for u in range(len(self.results(each))):
                self.store(zero, self.part(each, u, "0"), each.dtype, self.width)
        if sums:
            after = self.chunks(p, states, sums)
        else:
            after = self.sweep(p, states, self.low, self.high, self.identities(states))
        for each, found in self.unpack(states, after).items():
            if each.op == "reduce":
                finished = [state[-1] for state in self.collapse(each, found)]
                self.known.update(zip(self.results(each), finished, strict=True))
        for each in parts:
            for u, key in enumerate(self.results(each)):
                self.known[key] = self.halve(each, u)

    def results(self, each: Expr) -> list[Any]:
        """The names of a reduction's results: in columns one per vector of a block."""
        return [(each, u) for u in range(self.group)] if self.columns else [each]

    def chunks(self, p: int, states: Sequence[Expr], sums: Sequence[Expr]) -> list[str]:
        """The loop in chunks, whose sums go to scratch one by one."""
        start = self.identities(states)

        def chunk(first: str, values: list[str]) -> list[str]:
            stop = self.least_of(self.whole("add", first, self.chunk), self.high)
            carried = [(kind, x) for (kind, _), x in zip(start, values, strict=True)]
            every = [*states, *sums]
            after = self.sweep(p, every, first, stop, carried + self.identities(sums))
            place, found = self.whole("udiv", first, self.chunk), self.unpack(every, after)
            for each in sums:
                for u, (x,) in enumerate(self.collapse(each, found[each])):
                    self.store(x, self.part(each, u, place), each.dtype, self.width)
            return after[: len(start)]

        return self.loop(self.low, self.high, self.chunk, start, chunk)

    def part_count(self, each: Expr) -> str:
        if each.attr == "fold":
            return self.high
        return self.whole("udiv", self.whole("add", self.high, self.chunk - 1), self.chunk)

    def part(self, each: Expr, u: int, place: str) -> str:
        """The address of a part of a sum (of its chunk) or a fold (of its element)."""
        if self.columns:
            before = self.whole("mul", self.part_count(each), u)
            place = self.whole("mul", self.whole("add", before, place), self.lanes)
        return self.at(self.scratch(each), place, memory(each.dtype))

    def scratch(self, each: Expr) -> str:
        return self.at("%scratch", self.argument((each, "scratch")), "i8")

    def sweep(
        self, p: int, states: Sequence[Expr], low: str, high: str, carried: Carried
    ) -> list[str]:
        """The loop's body over a range of the inner axis."""

        def turn(end: str | None) -> Callable[[str, list[str]], list[str]]:
            return lambda i, values: self.body(p, states, i, end, values)

        if self.columns:
            return self.loop(low, high, 1, carried, turn(None))
        step = self.group * self.lanes
        middle = self.multiple(low, high, step)
        values = self.loop(low, middle, step, carried, turn(None))
        if not states and self.group > 1:
            # What is left is one vector after the other
            group, self.group, step = self.group, 1, self.lanes
            low, middle = middle, self.multiple(middle, high, step)
            self.loop(low, middle, step, [], turn(None))
            self.loop(middle, high, step, [], turn(high))
            self.group = group
            return []
        carried = [(kind, value) for (kind, _), value in zip(carried, values, strict=True)]
        return self.loop(middle, high, step, carried, turn(high))

    def body(
        self, p: int, states: Sequence[Expr], i: str, end: str | None, values: list[str]
    ) -> list[str]:
        """The inner values at i (of a block of vectors from i on), and the states after them."""
        body, carried = self.plan.bodies[p], self.unpack(states, values)
        with self.scope():
            if self.columns:
                self.coordinates[self.nest.inner_axis] = i
            else:
                self.place(i, self.group, end)
            for each in body:
                if not self.varying[each]:
                    self.compute(each)
            for u in range(self.group):
                self.known |= {("carry", each): found[u][0] for each, found in carried.items()}
                for each in body:
                    if self.varying[each]:
                        self.known[each, u] = self.make_inner(each, u, p)
                self.leave(p, u, i)
            after = [
                self.step(x, u, s) for x, found in carried.items() for u, s in enumerate(found)
            ]
        return [x for state in after for x in state]

    def make_inner(self, each: Expr, u: int, p: int) -> str:
        """A vector, computed or reloaded from the loop that kept it."""
        made = self.plan.saved.get(each)
        if made is None:
            return self.evaluate(each, u)
        pointer = self.at(self.scratch(each), self.starts[u], memory(each.dtype))
        if made < p:
            return self.load(pointer, each.dtype, self.lanes)
        x = self.evaluate(each, u)
        self.store(x, pointer, each.dtype, self.lanes)
        return x

    def leave(self, p: int, u: int, i: str) -> None:
        """What goes to memory of a vector."""
        for store, here in self.plan.stores.items():
            if here == p:
                self.write(store, u)
        for each in self.plan.reduces:
            if each.attr == "fold" and self.plan.passes[each] == p + 1:
                pointer = (
                    self.part(each, u, i) if self.columns else self.part(each, 0, self.starts[u])
                )
                self.store(self.get(each.args[0], u), pointer, each.dtype, self.lanes)

    # Reductions

    def identities(self, states: Sequence[Expr]) -> Carried:
        """What each vector of each reduction begins with."""
        parts = [x for each in states for x in components(each) * self.group]
        return [(typed(dtype, self.lanes), constant(x, dtype, self.lanes)) for dtype, x in parts]

    def unpack(self, states: Sequence[Expr], values: Sequence[str]) -> dict[Expr, list[list[str]]]:
        """The states of each reduction's vectors, from what a loop carries."""
        left = iter(values)
        return {x: [[next(left) for _ in components(x)] for _ in range(self.group)] for x in states}

    def step(self, each: Expr, u: int, state: list[str]) -> list[str]:
        """A reduction's state after one more vector."""
        if each.op == "scan":
            return [self.known[each, u]]
        x, dtype = self.get(each.args[0], u), each.args[0].dtype
        if self.masks and not self.columns:
            neutral = constant(components(each)[0][1], dtype, self.lanes)
            x = self.select(self.masks[u], x, neutral, dtype, self.lanes)
        if len(state) == 1:
            return self.merge(each, self.lanes, state, [x])
        if self.columns:
            index = self.splat(self.coordinates[self.nest.inner_axis], int64, self.lanes)
        else:
            index = self.count_up(self.starts[u], self.lanes)
        return self.merge(each, self.lanes, state, [x, index])

    def merge(self, each: Expr, lanes: int, a: list[str], b: list[str]) -> list[str]:
        dtype = each.args[0].dtype
        if len(a) == 1:
            op = "add" if each.attr == "sum" else each.attr
            return [self.arithmetic(op, dtype, lanes, [a[0], b[0]])]
        take = self.is_better(each.attr == "argmax", dtype, lanes, a, b)
        kinds = zip(a, b, (dtype, int64), strict=True)
        return [self.select(take, y, x, kind, lanes) for x, y, kind in kinds]

    def is_better(self, up: bool, dtype: DType, lanes: int, a: list[str], b: list[str]) -> str:
        """Whether b's value comes before a's, or is as good and earlier; NaN is best."""

        def logic(op: str, x: str, y: str) -> str:
            return self.arithmetic(op, bool_, lanes, [x, y])

        better = self.compare("lt", dtype, lanes, *((a[0], b[0]) if up else (b[0], a[0])))
        tie = self.compare("eq", dtype, lanes, a[0], b[0])
        if dtype.kind == "f":
            nan_a, nan_b = (self.compare("ne", dtype, lanes, x[0], x[0]) for x in (a, b))
            known = self.arithmetic("not", bool_, lanes, [nan_a])
            better = logic("or", better, logic("and", known, nan_b))
            tie = logic("or", tie, logic("and", nan_a, nan_b))
        earlier = self.compare("lt", int64, lanes, b[1], a[1])
        return logic("or", better, logic("and", tie, earlier))

    def collapse(self, each: Expr, states: list[list[str]]) -> list[list[str]]:
        """In rows, one state of all lanes of a block: vectors and then lanes folded by halving."""
        if self.columns:
            return states
        while len(states) > 1:
            half = len(states) // 2
            pairs = zip(states[:half], states[half:], strict=True)
            states = [self.merge(each, self.lanes, a, b) for a, b in pairs]
        state, lanes = states[0], self.lanes
        kinds = [dtype for dtype, _ in components(each)]
        while lanes > 1:
            low, high = (
                [self.half(x, kind, lanes, start) for x, kind in zip(state, kinds, strict=True)]
                for start in (0, lanes // 2)
            )
            lanes //= 2
            state = self.merge(each, lanes, low, high)
        return [[self.lane(x, kind, 1) for x, kind in zip(state, kinds, strict=True)]]

    def halve(self, each: Expr, u: int) -> str:
        """The parts of a sum or fold, folded by halving in place."""
        pointer, dtype, width = self.part(each, u, "0"), each.dtype, self.width
        kind = typed(dtype, width)

        def fold(values: list[str]) -> list[str]:
            half = self.whole("lshr", self.whole("add", values[0], 1), 1)

            def add(i: str) -> None:
                target = self.at(pointer, i, kind)
                parts = [self.load(x, dtype, width) for x in (target, self.at(target, half, kind))]
                self.store(self.arithmetic("add", dtype, width, parts), target, dtype, width)

            self.each("0", self.whole("sub", values[0], half), add)
            return [half]

        more = [("i64", self.part_count(each))]
        self.repeat(more, lambda values: self.test("sgt", values[0], 1), fold)
        return self.load(pointer, dtype, width)

    # Expressions

    def compute(self, each: Expr) -> None:
        """A value, in all vectors of the block where it varies, and once where not."""
        if self.varying[each]:
            for u in range(self.group):
                self.known[each, u] = self.evaluate(each, u)
        elif each.op != "const":
            self.known[each] = self.evaluate(each, None)
            if each in self.splatted:
                self.get(each, 0)

    def get(self, x: Expr, u: int | None) -> str:
        """A value as a scalar, or as the u-th vector of the block."""
        if x.op == "const":
            return literal(x.attr, 0 if u is None else self.lanes)
        if x.op == "axis":
            return self.emit_axis(x, u)
        if u is None:
            return self.known[x]
        if self.varying[x]:
            return self.known[x, u]
        if (x, "splat") not in self.known:
            self.known[x, "splat"] = self.splat(self.known[x], x.dtype, self.lanes)
        return self.known[x, "splat"]

    def evaluate(self, each: Expr, u: int | None) -> str:
        special = getattr(self, f"emit_{each.op}", None)
        if special is not None:
            return str(special(each, u))
        lanes, dtype = (0 if u is None else self.lanes), each.dtype
        args = [self.get(x, u) for x in each.args]
        source = each.args[0].dtype
        if each.op == "cast":
            return self.cast(args[0], source, dtype, lanes)
        if each.op == "bitcast":
            return self.convert("bitcast", args[0], register(source), register(dtype), lanes)
        if each.op == "select":
            return self.select(args[0], args[1], args[2], dtype, lanes)
        if each.op in COMPARE:
            return self.compare(each.op, source, lanes, args[0], args[1])
        return self.arithmetic(each.op, dtype, lanes, args)

    def emit_param(self, each: Expr, _: int | None) -> str:
        bits = f"i{8 * each.dtype.itemsize}"
        found = self.convert("trunc", self.argument(each), "i64", bits, 0)
        if each.dtype == bool_:
            return self.let(f"icmp ne i8 {found}, 0")
        return self.convert("bitcast", found, bits, register(each.dtype), 0)

    def emit_axis(self, each: Expr, u: int | None) -> str:
        if u is None:
            return self.coordinates[each.attr]
        if each.attr == self.vector:
            return self.fill(each, u, self.count_up(self.starts[u], self.lanes))
        return self.splat(self.coordinates[each.attr], int64, self.lanes)

    def emit_scan(self, each: Expr, u: int) -> str:
        args = [self.known["carry", each], self.get(each.args[0], u)]
        return self.arithmetic("add", each.dtype, self.lanes, args)

    def emit_acc(self, each: Expr, u: int) -> str:
        pointer = self.at(self.tile, self.starts[u], memory(each.dtype))
        return self.fill(each, u, self.load(pointer, each.dtype, self.lanes, self.active(u)))

    def emit_rare(self, each: Expr, u: int | None) -> str:
        lanes, other = (0 if u is None else self.lanes), self.get(each.args[2], u)
        here = condition = self.get(each.args[0], u)
        if u is not None:
            if self.masks:
                here = self.arithmetic("and", bool_, lanes, [here, self.masks[u]])
            here, _ = self.any_lane(here, lanes)
        ends = [other, self.block]

        def key(x: Expr) -> Any:
            return (x, u) if self.varying[x] else x

        def then() -> None:
            with self.scope():
                for x in ordered(
                    each.args[1:2], lambda x: [] if key(x) in self.known else usual(x)
                ):
                    if key(x) not in self.known and x.op not in ("const", "axis"):
                        self.known[key(x)] = self.evaluate(x, u if self.varying[x] else None)
                found = self.get(each.args[1], u)
                ends.append(self.select(condition, found, other, each.dtype, lanes))
            ends.append(self.block)

        self.when(here, then)
        parts = f"[{ends[0]}, %{ends[1]}], [{ends[2]}, %{ends[3]}]"
        return self.let(f"phi {typed(each.dtype, lanes)} {parts}")

    def emit_check(self, each: Expr, u: int | None) -> str:
        """An index, wrapped; out of range it is 0 and sets the flags, unless others are set."""
        lanes, x = (0 if u is None else self.lanes), self.get(each.args[0], u)
        size, zero = self.argument((each, "size")), constant(0, int64, lanes)
        size = self.splat(size, int64, lanes) if lanes else size
        below = self.compare("lt", int64, lanes, x, zero)
        more = self.arithmetic("add", int64, lanes, [x, size])
        wrapped = self.select(below, more, x, int64, lanes)
        outside = self.let(f"icmp uge {typed(int64, lanes)} {wrapped}, {size}")
        bad = outside
        if u is not None:
            if self.masks:
                bad = self.arithmetic("and", bool_, lanes, [bad, self.masks[u]])
            bad, bits = self.any_lane(bad, lanes)
        clear = self.test("eq", self.load("%scratch", int64, 0), 0)

        def flag() -> None:
            index = x
            if u is not None:
                lane = self.let(f"call i{lanes} @llvm.cttz.i{lanes}(i{lanes} {bits}, i1 true)")
                index = self.lane(x, int64, lanes, f"i{lanes} {lane}")
            self.store(self.argument((each, "flag")), "%scratch", int64, 0)
            self.store(index, self.at("%scratch", 1, "i64"), int64, 0)

        self.when(self.arithmetic("and", bool_, 0, [bad, clear]), flag)
        return self.select(outside, zero, wrapped, int64, lanes)

    # Memory

    def terms(self, access: Access) -> list[tuple[Expr, Hashable, bool, bool]]:
        """What an address adds up, but for the offset: a coordinate or an expression, the name of
        its stride, whether it is of inner level, whether it varies."""
        found: list[tuple[Expr, Hashable, bool, bool]] = []
        for place, (number, _) in enumerate(access.strides):
            inner, varies = number == self.nest.inner_axis, number == self.vector
            found.append((axis(number), (id(access), place), inner, varies))
        for place, (each, _) in enumerate(access.dynamic, len(access.strides)):
            inner, varies = self.plan.inner[each], self.varying[each]
            found.append((each, (id(access), place), inner, varies))
        return found

    def base(self, access: Access) -> str:
        """The address but for what changes inside an outer point."""
        key = "base", id(access)
        if key not in self.known:
            offset = self.argument((id(access), "offset")) if access.offset else "0"
            pointer = f"%p{self.slots.buffers[access.buffer]}"
            self.known[key] = self.shift(access, pointer, offset, False)
        return self.known[key]

    def shift(self, access: Access, pointer: str, index: str, level: bool) -> str:
        """An address plus an index and the scalar terms of one level."""
        for each, name, inner, varies in self.terms(access):
            if inner == level and not varies:
                term = self.whole("mul", self.get(each, None), self.argument(name))
                index = self.whole("add", index, term)
        return self.at(pointer, index, memory(access.buffer.dtype))

    def scalar_address(self, access: Access) -> str:
        """The address but for what varies along the vector."""
        return self.shift(access, self.base(access), "0", True)

    def spread(self, access: Access) -> bool | None:
        """Whether lanes lie apart; None where they read one place."""
        if any(self.varying[x] for x, _ in access.dynamic):
            return True
        stride = access.stride(self.vector)
        return None if stride == 0 else stride != 1

    def indices(self, access: Access, u: int) -> str:
        """Where lanes lie, from the scalar address on."""
        index, lanes = constant(0, int64, self.lanes), self.lanes
        for each, name, _, varies in self.terms(access):
            if varies:
                x = self.get(each, u)
                if name in self.slots.names:  # else its stride is 1
                    stride = self.splat(self.argument(name), int64, lanes)
                    x = self.arithmetic("mul", int64, lanes, [x, stride])
                index = self.arithmetic("add", int64, lanes, [index, x])
        return index

    def emit_load(self, each: Expr, u: int | None) -> str:
        access, dtype, lanes = each.attr, each.dtype, self.lanes
        pointer = self.scalar_address(access)
        mask = self.get(each.args[0], u) if each.args else None
        if u is None:
            if mask is None:
                return self.load(pointer, dtype, 0)
            pointer = self.let(f"select i1 {mask}, ptr {pointer}, ptr %sink")
            return self.select(mask, self.load(pointer, dtype, 0), constant(0, dtype, 0), dtype, 0)
        active = self.active(u)
        if mask and active:
            mask = self.arithmetic("and", bool_, lanes, [mask, active])
        mask = mask or active
        if self.spread(access) is False:
            found = self.load(self.at(pointer, self.starts[u], memory(dtype)), dtype, lanes, mask)
        else:
            found = self.gather(pointer, self.indices(access, u), dtype, lanes, mask)
        return self.fill(each, u, found)

    def fill(self, each: Expr, u: int, x: str) -> str:
        """x with the block's first element in all inactive lanes, so that they trap and raise
        floating-point exceptions where that one does, and nowhere else."""
        if not self.masks:
            return x
        if u == 0:
            first = self.lane(x, each.dtype, self.lanes)
            self.known[each, "first"] = self.splat(first, each.dtype, self.lanes)
        return self.select(self.masks[u], x, self.known[each, "first"], each.dtype, self.lanes)

    def write(self, store: Store, u: int) -> None:
        """A store of the u-th vector. A place that does not move with the lanes has one lane."""
        access, value, lanes, mask = store.access, store.value, self.lanes, self.active(u)
        pointer, spread, dtype = self.scalar_address(access), self.spread(access), value.dtype
        if spread:
            indices = self.indices(access, u)
            return self.scatter(self.get(value, u), pointer, indices, dtype, lanes, mask)
        if spread is None:
            if u > 0:
                return None
            varies = self.varying[value]
            x = self.lane(self.get(value, 0), dtype, lanes) if varies else self.get(value, None)
            lanes, mask = 0, None
        else:
            x, pointer = self.get(value, u), self.at(pointer, self.starts[u], memory(dtype))
        if self.adds:
            x = self.arithmetic("add", dtype, lanes, [self.load(pointer, dtype, lanes, mask), x])
        return self.store(x, pointer, dtype, lanes, mask)

    # Scatter

    def scatter_rows(self, copies: bool) -> None:
        """For every lead: rows begin .. end - 1 from zero or, in other memory, from the base, which
        is slot 0; and the places that they are at."""
        lead, places, trail = (self.size(number) for number in range(3))
        (store,) = self.nest.stores
        target, dtype = f"%p{self.slots.buffers[store.access.buffer]}", store.value.dtype
        row = store.access.dynamic[0][0]
        self.adds = not copies
        starts = self.let(f"icmp ne ptr %p0, {target}") if copies else "true"

        def begin(i: str, end: str | None) -> list[str]:
            self.place(i, 1, end)
            x = constant(0, dtype, self.lanes)
            if copies:
                source = self.at("%p0", i, memory(dtype))
                x = self.load(source, dtype, self.lanes, self.active(0))
            pointer = self.at(target, i, memory(dtype))
            self.store(x, pointer, dtype, self.lanes, self.active(0))
            return []

        def begin_all(first: str, last: str) -> None:
            middle = self.multiple(first, last, self.lanes)
            self.loop(first, middle, self.lanes, [], lambda j, _: begin(j, None))
            self.loop(middle, last, self.lanes, [], lambda j, _: begin(j, last))

        def add(i: str, p: str) -> None:
            self.coordinates = {0: i, 1: p}
            with self.scope():
                self.outer(0)
                place = self.whole("sub", self.get(row, None), "%begin")
                inside = self.test("ult", place, self.whole("sub", "%end", "%begin"))
                self.high = self.select(inside, trail, "0", int64, 0)
                self.run(0)

        def each_lead(i: str) -> None:
            start = self.whole("mul", i, self.argument("rows"))
            rows = [self.whole("add", start, each) for each in ("%begin", "%end")]
            first, last = (self.whole("mul", each, trail) for each in rows)
            self.when(starts, partial(begin_all, first, last))
            self.each("0", places, lambda p: add(i, p))

        self.each("0", lead, each_lead)

    # The epilogue of a contraction's tile

    def tile_rows(self) -> None:
        sizes = [self.size(number) for number in range(len(self.nest.outer) - 1)]
        batch = self.delinearize("%batch", sizes)
        self.low, self.high = "%n0", self.whole("add", "%n0", "%columns")
        dtype = next((x.dtype for x in self.plan.exprs if x.op == "acc"), int64)

        def row(r: str) -> None:
            self.coordinates = dict(enumerate([*batch, self.whole("add", "%m0", r)]))
            start = self.whole("sub", self.whole("mul", r, "%ld"), "%n0")
            self.tile = self.at("%tile", start, memory(dtype))
            with self.scope():
                self.point()

        self.each("0", "%rows", row)


def emit(nest: Nest | Scatter, bits: int = 512, name: str = "kernel") -> str:
    """The kernel of all nests of this structure, for vectors of `bits`."""
    slots, body, _ = walk(nest)
    kernel = Kernel(slots, body, bits)
    work = kernel.units
    if isinstance(nest, Scatter):
        work = partial(kernel.scatter_rows, nest.base is not None)
    parameters = "ptr %args, i64 %begin, i64 %end, ptr %scratch"
    return kernel.text(name, parameters, work, "icmp slt i64 %begin, %end")


def emit_tile(slots: Slots, nest: Nest, bits: int, name: str = "epilogue") -> str:
    """A contraction's epilogue as a function; `slots` has walked over the whole contraction."""
    parameters = (
        "ptr %args, ptr %tile, i64 %ld, i64 %batch, i64 %m0, i64 %rows, i64 %n0, i64 %columns, "
        "ptr %scratch"
    )
    kernel = Kernel(slots, nest, bits)
    return kernel.text(name, parameters, kernel.tile_rows, "icmp sgt i64 %rows, 0")
