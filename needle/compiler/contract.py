"""Contractions as machine code: packed and register tiled (BLIS: Van Zee and van de Geijn, 2015).

Two functions do the work. The *core* of a dtype computes one block of accumulators:

    for each segment of k:                       256 terms, one chain of fused multiply-adds each
        pack b's panels (two vectors wide)       where they cannot be read as they lie
        for each strip of rows:
            pack a's strip                       likewise
            for each panel: micro-kernel         a tile of accumulators, in registers
            after the last segment: epilogue     on the strip, while it is in the L1 cache

The *kernel* of a structure holds the epilogue and walks over units, which are blocks. It calls the
core by an address among its arguments, so that a new epilogue compiles a small function only. Block
sizes and what is packed are arguments too: they never change a bit, since each accumulator is a
chain of its own (needle/ops/order.py). A column vector (n = 1) is computed as a row, with a and b
in each other's place.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from typing import Any, cast

import numpy as np

from needle.compiler.emit import Slots, Structure, emit_tile
from needle.compiler.loops import Contraction, Operand
from needle.compiler.target import vector_bits
from needle.compiler.vectors import Writer, typed
from needle.dtype import LOW_PRECISION, DType, bool_, float32, int64, uint8
from needle.ops.order import SEGMENT

SMALL = 4  # rows of the micro-kernel for what is left of a strip
BLOCK = 1024  # bytes: how wide a block of accumulators is
TALL = 512  # how many rows it has at most where sums wait for the next segment
PITCH = BLOCK + 64  # bytes between its rows: not a power of two, which would share cache sets
SKEW = SEGMENT + 16  # elements between a packed strip's rows, likewise
STRIP = 16 * SEGMENT + 64  # elements of a packed strip, with the rest of its last vector
GRAIN = 5e5  # operations that are worth a unit
UNITS = 8  # how many units a contraction is cut into if it is worth them
SPEED = 100.0  # operations per ns, for the cost of a unit


class Function(Writer):
    """A function that returns nothing; addresses in bytes, loops as `with` statements."""

    def __init__(self, name: str, head: str, scope: str = "internal ") -> None:
        super().__init__()
        self.head = f"define {scope}void @{name}{head} nounwind {{"

    @property
    def text(self) -> str:
        return "\n".join([self.head, "entry:", *self.lines, "  ret void", "}"])

    def byte(self, pointer: str, offset: object, step: object = 1) -> str:
        """The address offset * step bytes on."""
        return self.at(pointer, self.whole("mul", offset, step), "i8")

    def argument(self, slots: str, number: int, kind: str = "i64") -> str:
        """An element of an array of 64-bit slots."""
        return self.let(f"load {kind}, ptr {self.byte(slots, 8 * number)}, align 8")

    def choose(self, condition: str, a: object, b: object, kind: str = "i64") -> str:
        return self.let(f"select i1 {condition}, {kind} {a}, {kind} {b}")

    def run(self, target: str, head: str, *given: object) -> None:
        """Call a function whose parameters are `head`."""
        kinds = [each.split()[0] for each in head.strip("()").split(", ")]
        found = ", ".join(f"{kind} {x}" for kind, x in zip(kinds, given, strict=True))
        self.do(f"call void {target}({found})")

    @contextmanager
    def span(self, stop: object, step: int = 1, start: object = 0) -> Iterator[str]:
        """for i in range(start, stop, step)"""
        number, before = self.fresh(), self.block
        i, head, after = f"%i{number}", f"head{number}", f"after{number}"
        self.do(f"br label %{head}")
        self.begin(head)
        self.do(f"{i} = phi i64 [{start}, %{before}], [{i}.next, %next{number}]")
        self.do(f"br i1 {self.test('slt', i, stop)}, label %body{number}, label %{after}")
        self.begin(f"body{number}")
        yield i
        self.do(f"br label %next{number}")
        self.begin(f"next{number}")
        self.do(f"{i}.next = add i64 {i}, {step}")
        self.do(f"br label %{head}")
        self.begin(after)

    @contextmanager
    def under(self, condition: str) -> Iterator[None]:
        number = self.fresh()
        self.do(f"br i1 {condition}, label %then{number}, label %after{number}")
        self.begin(f"then{number}")
        yield
        self.do(f"br label %after{number}")
        self.begin(f"after{number}")


# The core


@dataclass(frozen=True)
class Core:
    """The function that computes a block, of a dtype and vector width; engine.py loads it."""

    dtype: DType
    bits: int

    @property
    def key(self) -> str:
        return f"contract {self.dtype} {self.bits}"

    @property
    def memory(self) -> DType:
        """What the operands are; bool is bytes here."""
        return uint8 if self.dtype == bool_ else self.dtype

    @property
    def value(self) -> DType:
        """What is computed in."""
        return float32 if self.dtype in LOW_PRECISION else self.memory

    @property
    def width(self) -> int:
        return self.memory.itemsize

    @property
    def size(self) -> int:
        return self.value.itemsize

    @property
    def lanes(self) -> int:
        return self.bits // (8 * self.size)

    @property
    def columns(self) -> int:
        """Columns of a tile."""
        return 2 * self.lanes

    @property
    def rows(self) -> int:
        """Rows of a tile, and of a strip: what the registers hold."""
        return 14 if self.bits == 512 else 6

    @property
    def masks(self) -> bool:
        """Whether part of a vector can be loaded by an instruction: with AVX2 and AVX-512."""
        return self.bits > 128 and self.width >= 4

    @property
    def scratch(self) -> int:
        return STRIP * self.size + SEGMENT * BLOCK + (TALL + 16) * PITCH

    @property
    def sides(self) -> list[int]:
        """The sides of the squares that are transposed, ascending."""
        return sorted({min(self.lanes, 4), min(self.lanes, 16)})

    def emit(self, name: str) -> str:
        """The module that defines the core under a name."""
        micros = [emit_micro(self, rows, n) for rows in (self.rows, SMALL) for n in (2, 1)]
        turns = [emit_transpose(self, side) for side in self.sides]
        packers = [emit_copy(self), *turns, emit_gather(self), emit_pack(self)]
        return "\n\n".join([*micros, *packers, Block(self, name).f.text])

    def add(self, f: Function, x: str, y: str) -> str:
        return f.arithmetic("or" if self.dtype == bool_ else "add", self.value, self.lanes, [x, y])

    def multiply_add(self, f: Function, x: str, y: str, total: str) -> str:
        """total + x * y, rounded once; integers wrap around, bools are or-ed."""
        if self.value.kind == "f":
            return f.arithmetic("fma", self.value, self.lanes, [x, y, total])
        op = "and" if self.dtype == bool_ else "mul"
        return self.add(f, f.arithmetic(op, self.value, self.lanes, [x, y]), total)

    def mask(self, f: Function, count: str) -> str:
        """The first `count` lanes."""
        kind, lanes = np.dtype(f"i{self.width}"), self.lanes
        count = f.splat(f.cast(count, int64, kind, 0), kind, lanes)
        return f.compare("lt", kind, lanes, f.count_up(0, lanes, kind), count)

    def fetch(self, f: Function, place: str, lanes: int, mask: str | None = None) -> str:
        """Elements of an operand as what is computed in: exact."""
        x = f.load(place, self.memory, lanes, mask)
        return f.widen(x, self.dtype, lanes) if self.dtype in LOW_PRECISION else x


MICRO = (
    "(i64 %count, ptr %a, i64 %row, i64 %depth, i64 %last, ptr %b, i64 %step, i64 %lanes, "
    "ptr %c, i1 %more)"
)


def emit_micro(core: Core, rows: int, vectors: int) -> str:
    """A tile of chains over `count` terms, in registers: c = tile, or c += tile where `more`.

    Row r of a lies at a + min(r, last) * row: in place of rows that are missing, the last again.
    Of b's last vector `lanes` lanes are columns.
    """
    value, lanes = core.value, core.lanes
    f = Function(f"micro{rows}.{vectors}", MICRO)
    mask = core.mask(f, "%lanes") if core.masks else None

    def turn(values: list[str]) -> list[str]:
        left, b, *rest = values
        starts, sums = rest[:rows], iter(rest[rows:])
        places = [f.byte(b, v * core.bits // 8) for v in range(vectors)]
        columns = [f.load(each, value, lanes) for each in places[:-1]]
        columns.append(f.load(places[-1], value, lanes, mask))
        following = []
        for start in starts:
            x = f.splat(f.load(start, value, 0), value, lanes)
            following += [core.multiply_add(f, x, column, next(sums)) for column in columns]
        starts = [f.byte(start, "%depth") for start in starts]
        return [f.whole("sub", left, 1), f.byte(b, "%step"), *starts, *following]

    starts = [("ptr", f.byte("%a", f.least_of(r, "%last"), "%row")) for r in range(rows)]
    zeros = [(typed(value, lanes), "zeroinitializer")] * (rows * vectors)
    carried = [("i64", "%count"), ("ptr", "%b"), *starts, *zeros]
    found = f.repeat(carried, lambda values: f.test("ne", values[0], 0), turn)[2 + rows :]
    places = [
        f.byte("%c", r * PITCH + v * core.bits // 8) for r in range(rows) for v in range(vectors)
    ]
    with f.under("%more"):
        for x, place in zip(found, places, strict=True):
            f.store(core.add(f, f.load(place, value, lanes), x), place, value, lanes)
        f.do("ret void")
        f.begin("first")
    for x, place in zip(found, places, strict=True):
        f.store(x, place, value, lanes)
    return f.text


# Packing: to[i * pitch + j * size] = from[i * outer + j * inner], widened; all steps in bytes

PACK = "(ptr %to, i64 %pitch, ptr %from, i64 %outer, i64 %inner, i64 %rows, i64 %length)"


def emit_copy(core: Core) -> str:
    """Where the elements of a row are neighbours; the rest of its last vector becomes 0."""
    lanes = core.lanes
    f = Function("copy", PACK)
    left = f.whole("srem", "%length", lanes)
    whole, some, mask = f.whole("sub", "%length", left), f.test("sgt", left, 0), core.mask(f, left)

    def move(source: str, target: str, j: str, mask: str | None) -> None:
        x = core.fetch(f, f.byte(source, j, core.width), lanes, mask)
        f.store(x, f.byte(target, j, core.size), core.value, lanes)

    with f.span("%rows") as i:
        source, target = f.byte("%from", i, "%outer"), f.byte("%to", i, "%pitch")
        with f.span(whole, lanes) as j:
            move(source, target, j, None)
        with f.under(some):
            move(source, target, whole, mask)
    return f.text


def emit_transpose(core: Core, side: int) -> str:
    """Where the elements of a column are neighbours: square by square, at least one of them.

    At the end the last square moves back, and its last column stands in for those beyond it.
    """
    f = Function(f"transpose{side}", PACK)
    last, lowest = f.whole("sub", "%length", 1), f.whole("sub", "%rows", side)
    with f.span("%length", side) as j:
        columns = [f.least_of(f.whole("add", j, each), last) for each in range(side)]
        sources = [f.byte("%from", each, "%inner") for each in columns]
        target = f.byte("%to", j, core.size)
        with f.span("%rows", side) as i:
            row = f.least_of(i, lowest)
            place = f.byte(target, row, "%pitch")
            found = [core.fetch(f, f.byte(each, row, core.width), side) for each in sources]
            for x in turned(f, found, typed(core.value, side)):
                f.store(x, place, core.value, side)
                place = f.byte(place, "%pitch")
    return f.text


def turned(f: Function, rows: Sequence[str], kind: str) -> list[str]:
    """The columns of a square of vectors: its halves interleaved, log2(side) times."""
    side, half = len(rows), len(rows) // 2
    orders = [
        ", ".join(f"i32 {start + n // 2 + n % 2 * side}" for n in range(side))
        for start in (0, half)
    ]
    for _ in range(half.bit_length()):
        rows = [
            f.let(f"shufflevector {kind} {a}, {kind} {b}, <{side} x i32> <{order}>")
            for a, b in zip(rows[:half], rows[half:], strict=True)
            for order in orders
        ]
    return [*rows]


def emit_gather(core: Core) -> str:
    """Any strides: one element at a time."""
    f = Function("gather", PACK)
    with f.span("%rows") as i:
        source, target = f.byte("%from", i, "%outer"), f.byte("%to", i, "%pitch")
        with f.span("%length") as j:
            x = core.fetch(f, f.byte(source, j, "%inner"), 1)
            f.store(x, f.byte(target, j, core.size), core.value, 1)
    return f.text


def emit_pack(core: Core) -> str:
    """By the way that the strides allow."""
    f = Function("pack", PACK)
    along, across = (f.test("eq", each, core.width) for each in ("%inner", "%outer"))
    way = "@gather"
    for side in core.sides:
        fits = f.let(f"and i1 {across}, {f.test('sge', '%rows', side)}")
        way = f.choose(fits, f"@transpose{side}", way, "ptr")
    given = ("%to", "%pitch", "%from", "%outer", "%inner", "%rows", "%length")
    f.run(f.choose(along, "@copy", way, "ptr"), PACK, *given)
    return f.text


# A block

STEPS = ("a_outer", "a_inner", "b_outer", "b_inner")  # strides, in elements
FLAGS = ("pack_a", "pack_b", "turn")
FIELDS = ("k", *STEPS, *FLAGS)  # the arguments that the core reads, in this order
BLOCKED = (
    "(ptr %fields, ptr %a, ptr %b, i64 %m, i64 %rows, i64 %n, i64 %columns, ptr %scratch, "
    "ptr %epilogue, ptr %args, i64 %batch)"
)
EPILOGUE = (
    "(ptr %args, ptr %tile, i64 %ld, i64 %batch, i64 %m0, i64 %rows, i64 %n0, i64 %columns, "
    "ptr %scratch)"
)


class Block:
    """The core's function: rows m .. m + rows - 1 and columns n .. n + columns - 1."""

    def __init__(self, core: Core, name: str) -> None:
        self.core, self.size = core, core.size
        self.f = f = Function(name, BLOCKED, "")
        given = {field: f.argument("%fields", place) for place, field in enumerate(FIELDS)}
        steps = [f.whole("mul", given[field], core.width) for field in STEPS]
        self.a_outer, self.a_inner, self.b_outer, self.b_inner = steps
        self.pack_a, self.pack_b, self.turn = (f.test("ne", given[field], 0) for field in FLAGS)
        # Whether a strip is packed as rows along k, or as columns
        self.flat = f.test("eq", self.a_inner, core.width)
        self.strip = f.byte("%scratch", 64)
        self.panels = f.byte(self.strip, STRIP * self.size)
        self.sums = f.byte(self.panels, SEGMENT * BLOCK)
        self.a = f.byte("%a", "%m", self.a_outer)
        self.b = f.byte("%b", "%n", self.b_outer)
        self.segments(given["k"])

    def segments(self, depth: str) -> None:
        f = self.f
        # Where there is one segment, each strip is done before the next begins
        pitch = f.choose(f.test("sgt", depth, SEGMENT), PITCH, 0)
        # k = 0 has one segment, which is empty
        with f.span(f.let(f"call i64 @llvm.smax.i64(i64 {depth}, i64 1)"), SEGMENT) as k:
            left = f.whole("sub", depth, k)
            self.count, self.final = f.least_of(left, SEGMENT), f.test("sle", left, SEGMENT)
            self.more = f.test("sgt", k, 0)
            b = f.byte(self.b, k, self.b_inner)
            self.pack_panels(b)
            with f.span("%rows", self.core.rows) as i:
                a = f.byte(f.byte(self.a, k, self.a_inner), i, self.a_outer)
                self.tiles(i, a, b, f.byte(self.sums, i, pitch))

    def pack_panels(self, b: str) -> None:
        f, pitch = self.f, self.core.columns * self.size
        with f.span("%columns", self.core.columns) as j:
            width, direct = self.width(j)
            with f.under(f.choose(direct, "false", "true", "i1")):
                to, source = self.panel(j), f.byte(b, j, self.b_outer)
                steps = (self.b_inner, self.b_outer, self.count, width)
                f.run("@pack", PACK, to, pitch, source, *steps)

    def panel(self, j: str) -> str:
        """Where the panel that begins at column j is packed."""
        return self.f.byte(self.panels, j, SEGMENT * self.size)

    def width(self, j: str) -> tuple[str, str]:
        """How wide a panel is, and whether it is read where it lies."""
        f, core = self.f, self.core
        width = f.least_of(f.whole("sub", "%columns", j), core.columns)
        whole = f.test("eq", f.whole("srem", width, core.lanes), 0)
        return width, f.choose(self.pack_b, "false", "true" if core.masks else whole, "i1")

    def tiles(self, i: str, a: str, b: str, sums: str) -> None:
        """The tiles of a strip, and what becomes of them after the last segment."""
        f, core = self.f, self.core
        rows = f.least_of(f.whole("sub", "%rows", i), core.rows)
        place, row, depth = self.pack_strip(a, rows)
        large = f.test("sgt", rows, core.rows // 2 + 1)
        heights = ((core.rows, large), (SMALL, f.choose(large, "false", "true", "i1")))
        with f.span("%columns", core.columns) as j:
            width, direct = self.width(j)
            source = f.choose(direct, f.byte(b, j, self.b_outer), self.panel(j), "ptr")
            step = f.choose(direct, self.b_inner, core.columns * self.size)
            double = f.test("sgt", width, core.lanes)
            lanes = f.choose(double, f.whole("sub", width, core.lanes), width)
            target = f.byte(sums, j, self.size)
            for height, fits in heights:
                micro = f.choose(double, f"@micro{height}.2", f"@micro{height}.1", "ptr")
                with f.under(fits), f.span(rows, height) as r:
                    last = f.whole("sub", f.whole("sub", rows, r), 1)
                    left = (f.byte(place, r, row), row, depth, last)
                    right = (source, step, lanes)
                    to = f.byte(target, r, PITCH)
                    f.run(micro, MICRO, self.count, *left, *right, to, self.more)
        with f.under(self.final):
            self.finish(i, rows, sums)

    def pack_strip(self, a: str, rows: str) -> tuple[str, str, str]:
        """Where a strip of a is read, and the steps between its rows and along k."""
        f, size = self.f, self.size
        pitch = f.choose(self.flat, SKEW * size, 16 * size)
        with f.under(self.pack_a):
            pairs = ((self.a_outer, self.a_inner), (self.a_inner, self.a_outer))
            lengths = ((rows, self.count), (self.count, rows))
            choices = [*zip(*pairs, strict=True), *zip(*lengths, strict=True)]
            given = [f.choose(self.flat, *each) for each in choices]
            f.run("@pack", PACK, self.strip, pitch, a, *given)
        row = f.choose(self.pack_a, f.choose(self.flat, pitch, size), self.a_outer)
        depth = f.choose(self.pack_a, f.choose(self.flat, size, pitch), self.a_inner)
        return f.choose(self.pack_a, self.strip, a, "ptr"), row, depth

    def finish(self, i: str, rows: str, sums: str) -> None:
        """The epilogue of a strip; of a turned one, whose only row is the column n = 0."""
        f = self.f
        first = f.whole("add", "%m", i)
        plain = (PITCH // self.size, first, rows, "%n", "%columns")
        swapped = (1, "%n", "%columns", first, rows)
        pairs = zip(swapped, plain, strict=True)
        ld, *place = (f.choose(self.turn, *pair) for pair in pairs)
        f.run("%epilogue", EPILOGUE, "%args", sums, ld, "%batch", *place, "%scratch")


# Kernels

CUT = ("m", "n", "down", "across", "tall", "wide")
AXIS = ("size", "a_step", "b_step")  # of a batch axis


@dataclass(frozen=True)
class Tiling:
    """How a contraction is cut into units, and what is packed."""

    down: int
    across: int
    tall: int
    wide: int
    pack_a: bool
    pack_b: bool


def roles(c: Contraction) -> tuple[int, int, Operand, Operand]:
    """m, n, a and b: a column vector's in each other's place."""
    return (c.n, c.m, c.b, c.a) if c.n == 1 else (c.m, c.n, c.a, c.b)


def tiling(c: Contraction, core: Core) -> Tiling:
    m, n, a, b = roles(c)
    batch, size = prod(c.batch), core.size
    wanted = min(2 * batch * m * n * c.k / GRAIN, UNITS)
    down, across = ceil(m / TALL) if c.k > SEGMENT else 1, ceil(n * size / BLOCK)
    while 0 < batch * down * across < wanted:
        if m >= 2 * core.rows * down:
            down *= 2
        elif n > core.columns * across:
            across *= 2
        else:
            break
    tall, wide = ceil(m / down) if m else 1, ceil(n / max(across, 1) / core.columns) * core.columns
    left = tall % core.rows  # rows that cost nothing more
    tall += -left % (core.rows if left > core.rows // 2 + 1 else SMALL)
    # What lies in far places is copied together where it is read again and again
    far_a, far_b = abs(a.inner) * size, abs(b.inner) * size
    pack_a = a.inner != 1 and wide >= 4 * core.columns and far_a >= 2048
    pack_b = b.outer != 1 or tall >= 256 or (tall >= 64 and far_b >= 4096)
    low = core.dtype in LOW_PRECISION
    return Tiling(
        ceil(m / tall), ceil(n / max(wide, 1)), tall, wide, low or pack_a, low or pack_b
    )  # fmt: skip


def structure(c: Contraction, bits: int | None = None) -> Structure:
    """What to compile and pass: see emit.py. The core is among the buffers, as a function."""
    core = Core(c.a.buffer.dtype, bits or vector_bits())
    cut = tiling(c, core)
    units = prod(c.batch) * cut.down * cut.across
    cost = 10 + 2 * prod(c.batch) * c.m * c.n * c.k / (SPEED * max(units, 1))
    return walk(c, core, cut).structure(units, cost, core.scratch)


def walk(c: Contraction, core: Core, cut: Tiling) -> Slots:
    """The slots of a contraction's arguments: the same for equal structures."""
    slots, entry = Slots(), cast(Any, core)
    m, n, a, b = roles(c)
    pointers = [slots.buffer(each) for each in (entry, a.buffer, b.buffer)]
    slots.write("contraction", core.key, len(c.batch), *pointers)
    numbers = (
        c.k, a.outer, a.inner, b.outer, b.inner, cut.pack_a, cut.pack_b, c.n == 1,
        m, n, cut.down, cut.across, cut.tall, cut.wide, a.offset, b.offset,
    )  # fmt: skip
    for field, number in zip((*FIELDS, *CUT, "a", "b"), numbers, strict=True):
        slots.value(int(number), field)
    for axis, found in enumerate(zip(c.batch, a.batch, b.batch, strict=True)):
        for field, number in zip(AXIS, found, strict=True):
            slots.value(number, (field, axis))
    slots.nest(c.epilogue)
    return slots


def emit(c: Contraction, bits: int, name: str) -> str:
    """The module of a contraction's kernel: the walk over its units, and its epilogue."""
    core = Core(c.a.buffer.dtype, bits)
    slots = walk(c, core, tiling(c, core))
    f = Function(name, "(ptr %args, i64 %begin, i64 %end, ptr %scratch)", "")
    operands = [slots.buffer(x.buffer) for x in roles(c)[2:]]
    entry, a, b = (f.argument("%args", place, "ptr") for place in (0, *operands))
    fields = f.byte("%args", 8 * slots.slot(FIELDS[0]))
    m, n, down, across, tall, wide, *starts = (
        f.argument("%args", slots.slot(field)) for field in (*CUT, "a", "b")
    )
    axes = [
        [f.argument("%args", slots.slot((field, axis))) for field in AXIS]
        for axis in range(len(c.batch))
    ]
    with f.span("%end", 1, "%begin") as unit:
        column = f.whole("mul", f.whole("urem", unit, across), wide)
        unit = f.whole("udiv", unit, across)
        row = f.whole("mul", f.whole("urem", unit, down), tall)
        batch = rest = f.whole("udiv", unit, down)
        places = starts
        for size, *steps in reversed(axes):
            i, rest = f.whole("urem", rest, size), f.whole("udiv", rest, size)
            moves = [f.whole("mul", i, step) for step in steps]
            places = [f.whole("add", *each) for each in zip(places, moves, strict=True)]
        left, right = (f.byte(x, at, core.width) for x, at in zip((a, b), places, strict=True))
        height = f.least_of(f.whole("sub", m, row), tall)
        width = f.least_of(f.whole("sub", n, column), wide)
        block = (fields, left, right, row, height, column, width)
        f.run(entry, BLOCKED, *block, "%scratch", f"@{name}.epilogue", "%args", batch)
    return "\n".join([emit_tile(slots, c.epilogue, bits, f"{name}.epilogue"), f.text])
