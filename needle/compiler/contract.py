"""Contractions as machine code: packed and register tiled (BLIS: Van Zee and van de Geijn, 2015).

Two functions do the work. The *core* of a dtype computes one block of accumulators:

    for each segment of k:                       256 terms, one chain of fused multiply-adds each
        for each group of strips:
            pack a's strips                      as the registers take them: term by term
            for each strip:
                for each panel of b:             two vectors wide
                    pack it, at the first strip  where it cannot be read as it lies
                    micro-kernel                 a tile of accumulators, in registers
                after the last segment: epilogue on the strip, while it is in the cache

Arithmetic leaves a micro-kernel time for other work, a little at each term: it packs the panel that
it is the first to read, and, where vectors are wide and panels many, the next strip, so that a
group is all strips; and it fetches into the cache what is needed next. A row of ones, as one more
of a's, gives the sums of b's terms. Few rows make a *thin* block, which waits for memory: b is then
read once, as it lies. A product with few columns is computed as its transpose.

The *kernel* of a structure holds the epilogue and walks over units, which are blocks; a thread's
units that lie below each other are one block, so that b is packed once. It calls the core by an
address among its arguments, so that a new epilogue compiles a small function only. Block sizes and
what is packed are arguments too: they never change a bit, since each accumulator is a chain of its
own (needle/ops/order.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import chain
from math import ceil, prod
from typing import Any, cast

import numpy as np

from needle.compiler.emit import Slots, Structure, emit_tile
from needle.compiler.loops import Contraction, Digits, Operand, offsets
from needle.compiler.target import cache_size, host, vector_bits
from needle.compiler.vectors import Writer, constant, typed, uint32
from needle.dtype import LOW_PRECISION, DType, bfloat16, bool_, float32, int64, uint8
from needle.ops.order import SEGMENT

DOT = "llvm.x86.avx512bf16.dpbf16ps.512"
SMALL = 4  # rows of the micro-kernel for what is left of a strip, and of a unit
FEW = {1: 4096, 4: 2048, 8: 1024}  # rows of a thin block -> how many columns it is swept with
SWEPT = 32  # bytes of a column that go through a thin block's columns together
THIN_PITCH = (1 << 15) + 64  # bytes between the rows of a thin block's sums
LITTLE = 1 << 16  # elements of b that are worth a unit of thin blocks
WOVEN = 2  # rows of the next strip that are packed while a panel is met
AHEAD, FAR = 1024, 1 << 17  # bytes: what is fetched along a column, where the next are far
GROUP = 8  # strips that are packed together
BLOCK = 2048  # bytes: how wide a block of accumulators is at most
TALL = 512  # how many rows it has at most where sums wait for the next segment
PITCH = BLOCK + 64  # bytes between its rows: not a power of two, which would share cache sets
SKEW = 128  # bytes between packed panels, likewise
GRAIN = 5e5  # operations that are worth a unit
UNITS = 8  # units of columns, at most
SPEED, PACE = 100.0, 15.0  # operations and bytes of memory per ns, for the cost of a unit


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

    def prefetch(self, pointer: str, near: int = 3) -> None:
        """Fetch a line into the caches, or, with `near` 2 or 1, into all but the nearest ones."""
        self.do(f"call void @llvm.prefetch.p0(ptr {pointer}, i32 0, i32 {near}, i32 1)")

    def choose(self, condition: str, a: object, b: object, kind: str = "i64") -> str:
        return self.let(f"select i1 {condition}, {kind} {a}, {kind} {b}")

    def all(self, *conditions: str) -> str:
        """Whether all conditions hold."""
        return reduce(lambda a, b: self.let(f"and i1 {a}, {b}"), conditions)

    def run(self, target: str, head: str, *given: object) -> None:
        """Call a function whose parameters are `head`."""
        kinds = [each.split()[0] for each in head.strip("()").split(", ")]
        found = ", ".join(f"{kind} {x}" for kind, x in zip(kinds, given, strict=True))
        self.do(f"call void {target}({found})")

    @contextmanager
    def span(self, stop: object, step: object = 1, start: object = 0) -> Iterator[str]:
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
    """The function that computes a block, of a dtype and vector width; engine.py loads it.

    dot: by the processor's bfloat16 dot product: packed operands become pairs of terms, rounded.
    windows: operands may be windows, packed from where tables say that rows and terms lie.
    """

    dtype: DType
    bits: int
    dot: bool = False
    windows: bool = False

    @property
    def key(self) -> str:
        kind = " dot" * self.dot + " windows" * self.windows
        return f"contract {self.dtype} {self.bits}{kind}"

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
    def panel(self) -> int:
        """Bytes from a packed panel of b to the next."""
        return SEGMENT * self.columns * self.size + SKEW

    @property
    def strip(self) -> int:
        """Bytes from a packed strip of a to the next."""
        return SEGMENT * 16 * self.size + SKEW

    @property
    def packing(self) -> dict[str, tuple[int, int, int]]:
        """Of what is packed: how wide it is, elements from row to row, bytes to the next."""
        return {
            "panels": (self.columns, self.columns, self.panel),
            "strips": (self.rows, 16, self.strip),
        }

    @property
    def span(self) -> int:
        """Bytes of a panel's row, at least a cache line."""
        return max(self.columns * self.size, 64)

    @property
    def period(self) -> int:
        """Elements of an operand that are as long as that: as many turns fetch a square."""
        return self.span // self.width

    @property
    def rows(self) -> int:
        """Rows of a tile, and of a strip: what the registers hold."""
        return 14 if self.bits == 512 else 6

    @property
    def is_roomy(self) -> bool:
        """Whether a tile's multiply-adds leave time for other work at each term."""
        return self.bits == 512

    @property
    def soon(self) -> int:
        """How many terms ahead b is fetched while it is packed."""
        return 64 if self.is_roomy else 128

    @property
    def is_wide(self) -> bool:
        """Whether there are thin blocks: of elements that fill vectors soon."""
        return self.size >= 4 and not self.dot and not self.windows

    @property
    def masks(self) -> bool:
        """Whether part of a vector can be loaded by an instruction: with AVX2 and AVX-512."""
        return self.bits > 128 and self.width >= 4

    @property
    def scratch(self) -> int:
        panels = BLOCK // (self.columns * self.size)
        return GROUP * self.strip + panels * self.panel + (TALL + 16) * PITCH

    @property
    def sides(self) -> list[int]:
        """The sides of the squares that are transposed, ascending."""
        return sorted({min(self.lanes, 4), min(self.lanes, 16)})

    def emit(self, name: str) -> str:
        """The module that defines the core under a name."""
        micros = [Micro(self, rows, n).f.text for rows in (self.rows, SMALL) for n in (2, 1)]
        kinds = [] if self.dot else ["first", *["weave"] * self.is_roomy]
        micros += [Micro(self, self.rows, 2, kind).f.text for kind in kinds]
        turns = [emit_transpose(self, side) for side in self.sides]
        spreads = [emit_spread(self, name) for name in self.packing]
        packers = [emit_copy(self), *spreads, *turns, emit_gather(self), emit_pack(self)]
        more = [emit_pair(self)] if self.dot else []
        if self.windows:
            more += [emit_turn(self, side) for side in (1, *self.sides)] + [emit_terms(self)]
            for each in self.packing:
                more += [emit_lay(self, each), emit_rows(self, each), emit_windows(self, each)]
        if self.is_wide:
            more += [emit(self, rows) for emit in (emit_dots, emit_sweep) for rows in FEW]
        return "\n\n".join([*micros, *packers, *more, Block(self, name).f.text])

    def add(self, f: Function, x: str, y: str) -> str:
        return f.arithmetic("or" if self.dtype == bool_ else "add", self.value, self.lanes, [x, y])

    def multiply_add(self, f: Function, x: str, y: str, total: str) -> str:
        """total + x * y, rounded once; integers wrap around, bools are or-ed."""
        if self.dot:
            pair, total_type = f"<{2 * self.lanes} x bfloat>", f"<{self.lanes} x float>"
            kind = f"<{self.lanes} x i32>"
            pairs = ", ".join(
                f"{pair} {f.let(f'bitcast {kind} {each} to {pair}')}" for each in (x, y)
            )
            return f.let(f"call {total_type} @{DOT}({total_type} {total}, {pairs})")
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
    "(i64 %count, ptr %a, ptr %b, i64 %step, i64 %lanes, ptr %panel, ptr %c, i1 %more, "
    "ptr %out, i64 %pitch, ptr %ahead, i64 %stride, i64 %turn)"
)


class Micro:
    """A tile of chains over `count` terms, in registers: out = tile, or c + tile where `more`.

    a is a packed strip. Of b's last vector `lanes` lanes are columns. out's rows are `pitch` bytes
    apart. By the way, at each term, lines are fetched into the cache: a row of c and out, and from
    `ahead` on, in steps of `stride` bytes, what is packed next; after a period `turn` more.

    first: b is read as it lies, and what is read is kept as `panel`; b is fetched some terms ahead,
    and `turn` leads to the next panel. weave: two rows of a's next strip, which begin at `ahead`
    and are `turn` apart, are packed at `panel`, a term each.
    """

    def __init__(self, core: Core, rows: int, vectors: int, kind: str = "micro") -> None:
        self.core, self.rows, self.vectors, self.kind = core, rows, vectors, kind
        self.f = f = Function(f"{kind}{rows}.{vectors}", MICRO)
        self.value, self.lanes, self.size = core.value, core.lanes, core.size
        self.term = uint32 if core.dot else core.value  # of packed operands
        self.masks = [*[None] * (vectors - 1), core.mask(f, "%lanes") if core.masks else None]
        self.below = f.whole("mul", "%turn", rows)  # from a strip to the next
        self.last = f.whole("sub", "%count", rows)  # terms that are left when c's rows are fetched
        self.lines = [("c", PITCH), ("out", "%pitch")] if core.is_roomy else []
        names = ["a", "b", "panel", "ahead", *(name for name, _ in self.lines)]
        zeros = [(typed(self.value, self.lanes), "zeroinitializer")] * (rows * vectors)
        carried = [("i64", "%count"), *(("ptr", f"%{each}") for each in names), *zeros]
        for r in range(0 if core.is_roomy else rows):
            self.fetch_line(f.byte("%c", r * PITCH))
        found = f.repeat(carried, lambda values: f.test("ne", values[0], 0), self.turn)
        self.finish(found[len(names) + 1 :])

    def turn(self, values: list[str]) -> list[str]:
        f = self.f
        left, a, b, panel, ahead, *rest = values
        lines, sums = rest[: len(self.lines)], rest[len(self.lines) :]
        left = f.whole("sub", left, 1)
        # Stores come first: no load may pass them, and fourteen that wait would fill the registers
        columns, totals, found = self.columns(b, panel), iter(sums), []
        ahead = self.weave(ahead, panel) if self.kind == "weave" else self.fetch(left, ahead)
        for r in range(self.rows):
            x = f.splat(f.load(f.byte(a, r * self.size), self.term, 0), self.term, self.lanes)
            found += [self.core.multiply_add(f, x, column, next(totals)) for column in columns]
        kept = {"first": self.core.columns, "weave": 16}.get(self.kind, 0)
        places = [f.byte(a, 16 * self.size), f.byte(b, "%step"), f.byte(panel, kept * self.size)]
        more = f.test("sgt", left, self.last)
        for place in lines:
            self.fetch_line(place)
        steps = [f.choose(more, pitch, 0) for _, pitch in self.lines]
        lines = [f.byte(*each) for each in zip(lines, steps, strict=True)]
        return [left, *places, ahead, *lines, *found]

    def fetch_line(self, place: str) -> None:
        """A row of the tile."""
        for line in range(0, self.vectors * self.core.bits // 8, 64):
            self.f.prefetch(self.f.byte(place, line + 63))

    def columns(self, b: str, panel: str) -> list[str]:
        """The vectors of a term of b; the first to read it keeps them."""
        f, core, starts = self.f, self.core, range(0, self.vectors * self.lanes, self.lanes)
        width = core.width if self.kind == "first" else self.size
        pairs = zip([f.byte(b, start, width) for start in starts], self.masks, strict=True)
        if self.kind != "first":
            return [f.load(place, self.term, self.lanes, mask) for place, mask in pairs]
        found = [core.fetch(f, place, self.lanes, mask) for place, mask in pairs]
        for x, start in zip(found, starts, strict=True):
            f.store(x, f.byte(panel, start, self.size), self.value, self.lanes)
        return found

    def fetch(self, left: str, ahead: str) -> str:
        """The lines of a term; where the next one's are."""
        f, core, first = self.f, self.core, self.kind == "first"
        for line in range(0, core.span, 64):  # where rows begin within one, the panel before has it
            f.prefetch(f.byte(ahead, line + 63), 2 if first else 3)
        phase = left if first else f.whole("and", left, core.period - 1)
        turned = f.test("eq", phase, core.soon if first else 0)
        return f.byte(f.byte(ahead, "%stride"), f.choose(turned, "%turn", 0))

    def weave(self, ahead: str, panel: str) -> str:
        f = self.f
        for n in range(WOVEN):
            place = f.byte(ahead, n, "%turn")
            f.store(self.core.fetch(f, place, 0), f.byte(panel, n * self.size), self.value, 0)
            f.prefetch(f.byte(place, self.below))
        return f.byte(ahead, "%stride")

    def finish(self, sums: list[str]) -> None:
        f, value, lanes = self.f, self.value, self.lanes
        starts = [(r, v * lanes * self.size) for r in range(self.rows) for v in range(self.vectors)]
        places = [f.byte(f.byte("%out", r, "%pitch"), start) for r, start in starts]
        with f.under("%more"):
            for x, (r, start), place in zip(sums, starts, places, strict=True):
                before = f.load(f.byte("%c", r * PITCH + start), value, lanes)
                f.store(self.core.add(f, before, x), place, value, lanes)
            f.do("ret void")
            f.begin("first")
        for x, place in zip(sums, places, strict=True):
            f.store(x, place, value, lanes)


# Thin blocks: few rows, for which b is read once, as fast as memory gives it, and never packed

THIN = (
    "(i64 %count, ptr %a, i64 %last, ptr %b, i64 %outer, i64 %inner, i64 %columns, ptr %c, "
    "ptr %chains, i1 %more)"
)


class Few:
    """The rows of a thin block, copied so that none share cache sets: that of number %last stands
    in for those beyond it."""

    def __init__(self, core: Core, f: Function, rows: int) -> None:
        self.core, self.f = core, f
        self.starts = [f.byte("%a", f.least_of(r, "%last"), core.strip) for r in range(rows)]

    def numbers(self, k: str, terms: int) -> Iterator[list[str]]:
        """Of some terms from k on the rows' numbers, each in all lanes."""
        f, core = self.f, self.core
        places = [f.byte(start, k, core.size) for start in self.starts]
        for term in range(terms):
            found = [f.load(f.byte(place, term, core.size), core.value, 0) for place in places]
            yield [f.splat(x, core.value, core.lanes) for x in found]

    def add(self, sums: Sequence[str], numbers: Sequence[str], column: str) -> list[str]:
        """The chains, one for each row, with a term of a column more."""
        pairs = zip(numbers, sums, strict=True)
        return [self.core.multiply_add(self.f, x, column, y) for x, y in pairs]


def emit_dots(core: Core, rows: int) -> str:
    """Where the terms of a column are neighbours: squares of columns and terms, turned in
    registers. The last column stands in for those beyond it."""
    f, value, lanes = Function(f"dots{rows}", THIN), core.value, core.lanes
    few, kind = Few(core, f, rows), typed(value, lanes)
    last, rest = f.whole("sub", "%columns", 1), f.whole("srem", "%count", lanes)
    whole = f.whole("sub", "%count", rest)
    # What is due next lies further on in a long column, or in the next columns
    ahead = f.whole("mul", "%outer", lanes)
    ahead = f.choose(f.test("sgt", ahead, FAR), AHEAD, ahead)
    with f.span("%columns", lanes) as j:
        columns = [f.least_of(f.whole("add", j, lane), last) for lane in range(lanes)]
        starts = [f.byte("%b", each, "%outer") for each in columns]

        def square(k: str, sums: list[str]) -> list[str]:
            places = [f.byte(start, k, core.width) for start in starts]
            for place in places:
                f.prefetch(f.byte(place, ahead), 2)
                if core.width >= 4:  # else each line is asked for twice as it is
                    f.prefetch(f.byte(place, ahead, 2), 1)
            found = [core.fetch(f, place, lanes) for place in places]
            turned = Square(f, value, lanes).turned(found)
            for column, numbers in zip(turned, few.numbers(k, lanes), strict=True):
                sums = few.add(sums, numbers, column)
            return sums

        def single(k: str, sums: list[str]) -> list[str]:
            column = "poison"
            for lane, start in enumerate(starts):
                x = core.fetch(f, f.byte(start, k, core.width), 0)
                column = f.let(f"insertelement {kind} {column}, {typed(value, 0)} {x}, i64 {lane}")
            return few.add(sums, next(few.numbers(k, 1)), column)

        sums = f.loop(0, whole, lanes, [(kind, "zeroinitializer")] * rows, square)
        sums = f.loop(whole, "%count", 1, [(kind, x) for x in sums], single)
        settle(core, f, sums, rows_of(f, "%c", j, core.size, rows))
    return f.text


def rows_of(f: Function, start: str, j: str, size: int, rows: int) -> list[str]:
    """The places of column j in the rows of a thin block's sums."""
    return [f.byte(f.byte(start, j, size), r * THIN_PITCH) for r in range(rows)]


def settle(core: Core, f: Function, sums: Sequence[str], places: Sequence[str]) -> None:
    """A segment's sums to memory: those of the first are the total, others are added to it."""
    value, lanes = core.value, core.lanes
    nothing = constant(-0.0, value, lanes)  # -0 + x is x
    for x, place in zip(sums, places, strict=True):
        total = f.choose("%more", f.load(place, value, lanes), nothing, typed(value, lanes))
        f.store(core.add(f, total, x), place, value, lanes)


def emit_sweep(core: Core, rows: int) -> str:
    """Where the columns of a term are neighbours: a few terms at a time go through all columns,
    whose chains wait in the cache."""
    f, value, lanes = Function(f"sweep{rows}", THIN), core.value, core.lanes
    left = f.whole("srem", "%columns", lanes)
    whole, some, mask = f.whole("sub", "%columns", left), f.test("sgt", left, 0), core.mask(f, left)
    few = Few(core, f, rows)
    pairs = f.whole("sub", whole, f.whole("srem", whole, 2 * lanes))
    pairs = pairs if rows > 1 and lanes * core.width < 64 else "0"  # where two share a line
    swept = max(SWEPT // core.width, 1)
    ahead = f.whole("mul", "%inner", swept)  # the next rows

    def add(k: str, starts: Sequence[str], j: str, mask: str | None, vectors: int = 1) -> None:
        """To vectors side by side, which are asked for together."""
        columns = [f.whole("add", j, v * lanes) for v in range(vectors)]
        places = [rows_of(f, "%chains", each, core.size, rows) for each in columns]
        sums = [[f.load(place, value, lanes) for place in each] for each in places]
        for start, numbers in zip(starts, few.numbers(k, len(starts)), strict=True):
            f.prefetch(f.byte(f.byte(start, j, core.width), ahead), 2)
            f.prefetch(f.byte(f.byte(start, j, core.width), ahead, 2), 1)  # earlier, from memory
            for v, each in enumerate(columns):
                column = core.fetch(f, f.byte(start, each, core.width), lanes, mask)
                sums[v] = few.add(sums[v], numbers, column)
        for x, place in zip(chain(*sums), chain(*places), strict=True):
            f.store(x, place, value, lanes)

    with f.span("%columns", lanes) as j:
        for place in rows_of(f, "%chains", j, core.size, rows):
            f.store(constant(0, value, lanes), place, value, lanes)
    middle = f.whole("sub", "%count", f.whole("srem", "%count", swept))
    for several, first, stop in ((swept, 0, middle), (1, middle, "%count")):
        with f.span(stop, several, first) as k:
            starts = [f.byte("%b", f.whole("add", k, n), "%inner") for n in range(several)]
            with f.span(pairs, 2 * lanes) as j:
                add(k, starts, j, None, 2)
            with f.span(whole, lanes, pairs) as j:
                add(k, starts, j, None)
            with f.under(some):
                add(k, starts, whole, mask)
    with f.span("%columns", lanes) as j:
        found = [f.load(x, value, lanes) for x in rows_of(f, "%chains", j, core.size, rows)]
        settle(core, f, found, rows_of(f, "%c", j, core.size, rows))
    return f.text


# Packing: to[i * pitch + j * size] = from[i * outer + j * inner], widened; all steps in bytes

SPREAD = "(ptr %to, ptr %from, i64 %outer, i64 %rows, i64 %length)"
PACK = "(ptr %to, i64 %pitch, ptr %from, i64 %outer, i64 %inner, i64 %rows, i64 %length)"
PAIR = "(ptr %to, i64 %pitch, i64 %count)"


def emit_pair(core: Core) -> str:
    """Of packed float32: rows 2 i and 2 i + 1, rounded to bfloat16, in the halves of row i; where
    there is no row 2 i + 1, zeros."""
    f, lanes = Function("pair", PAIR), core.bits // 32
    last = f.whole("sub", "%count", 1)
    with f.span("%count", 2) as i:
        source, target = f.byte("%to", i, "%pitch"), f.byte("%to", f.whole("lshr", i, 1), "%pitch")
        more = f.choose(f.test("slt", i, last), -1, 0, "i32")
        with f.span("%pitch", core.bits // 8) as j:
            place, halves = f.byte(source, j), []
            for each in (place, f.byte(place, "%pitch")):
                x = f.narrow(f.load(each, float32, lanes), bfloat16, lanes)
                halves.append(f.convert("zext", x, "i16", "i32", lanes))
            high = f.arithmetic("shl", uint32, lanes, [halves[1], constant(16, uint32, lanes)])
            high = f.arithmetic("and", uint32, lanes, [high, f.splat(more, uint32, lanes)])
            x = f.arithmetic("or", uint32, lanes, [halves[0], high])
            f.store(x, f.byte(target, j), uint32, lanes)
    return f.text


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


def emit_spread(core: Core, name: str) -> str:
    """Rows of a block whose elements are neighbours, each to its place in all panels: element j of
    row i is element i * pitch + j % columns of panel j // columns."""
    f, lanes = Function(name, SPREAD), core.lanes
    columns, pitch, panel = core.packing[name]
    starts = range(0, columns, lanes)
    left = f.whole("srem", "%length", columns)
    whole, some = f.whole("sub", "%length", left), f.test("sgt", left, 0)
    full = [None if v + lanes <= columns else core.mask(f, str(columns - v)) for v in starts]
    masks = [core.mask(f, f.whole("sub", left, v)) for v in starts]

    def move(i: str, j: str, masks: Sequence[str | None]) -> None:
        source = f.byte(f.byte("%from", i, "%outer"), j, core.width)
        target = f.byte(f.byte("%to", i, pitch * core.size), f.whole("udiv", j, columns), panel)
        found = [
            core.fetch(f, f.byte(source, v, core.width), lanes, mask)
            for v, mask in zip(starts, masks, strict=True)
        ]
        for v, x in zip(starts, found, strict=True):
            f.store(x, f.byte(target, v, core.size), core.value, lanes)

    with f.span("%rows") as i:
        with f.span(whole, columns) as j:
            move(i, j, full)
        with f.under(some):
            move(i, whole, masks)
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
            for x in Square(f, core.value, side).turned(found):
                f.store(x, place, core.value, side)
                place = f.byte(place, "%pitch")
    return f.text


class Square:
    """A square of vectors, turned by shuffles that are one instruction each: first within lanes of
    128 bits, then whole lanes."""

    def __init__(self, f: Function, dtype: DType, side: int) -> None:
        self.f, self.kind, self.side = f, typed(dtype, side), side
        self.lane = min(side, 16 // dtype.itemsize)  # elements

    def turned(self, rows: Sequence[str]) -> list[str]:
        """The columns."""
        groups = [
            self.within(rows[start : start + self.lane], 1)
            for start in range(0, self.side, self.lane)
        ]
        parts = [self.across([group[q] for group in groups]) for q in range(self.lane)]
        return [part[lane] for lane in range(self.side // self.lane) for part in parts]

    def within(self, rows: Sequence[str], size: int) -> list[str]:
        """Of each lane the square that these rows have in it."""
        if len(rows) == 1:
            return [*rows]
        halves = []
        for half in (0, self.lane // 2):
            starts = range(0, self.side, self.lane)
            blocks = [
                lane + half + each for lane in starts for each in range(0, self.lane // 2, size)
            ]
            order = [x + side for x in blocks for side in (0, self.side)]
            halves.append(self.within(self.pairs(rows, order, size), 2 * size))
        return halves[0] + halves[1]

    def across(self, rows: Sequence[str]) -> list[str]:
        """Lanes as elements."""
        if len(rows) == 1:
            return [*rows]
        halves = []
        for first in (0, self.lane):
            lanes = range(first, self.side, 2 * self.lane)
            order = [x + side for side in (0, self.side) for x in lanes]
            halves.append(self.across(self.pairs(rows, order, self.lane)))
        return [x for pair in zip(*halves, strict=True) for x in pair]

    def pairs(self, rows: Sequence[str], order: Sequence[int], size: int) -> list[str]:
        """Of each pair the blocks of some size, in an order."""
        places = ", ".join(f"i32 {start + n}" for start in order for n in range(size))
        return [
            self.f.let(
                f"shufflevector {self.kind} {a}, {self.kind} {b}, <{self.side} x i32> <{places}>"
            )
            for a, b in zip(rows[::2], rows[1::2], strict=True)
        ]


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
        fits = f.all(across, f.test("sge", "%rows", side))
        way = f.choose(fits, f"@transpose{side}", way, "ptr")
    given = ("%to", "%pitch", "%from", "%outer", "%inner", "%rows", "%length")
    f.run(f.choose(along, "@copy", way, "ptr"), PACK, *given)
    return f.text


# Packing windows: term i of row j lies at from + rows[j] + terms[i], tables of bytes. A run: so
# many of them, from a multiple of it on, are neighbours.

STRIDED, SINGLE, TERMS, ROWS = range(4)  # ways to pack: by strides, one by one, or in runs of
NEAR = {TERMS: 4, ROWS: 8}  # runs that are worth it
WINDOWS = (
    "(ptr %to, ptr %from, ptr %rows, ptr %terms, i64 %way, i64 %run, i64 %row, i64 %term, "
    "i64 %count, i64 %length)"
)
RUNS = (
    "(ptr %to, i64 %pitch, ptr %from, ptr %rows, ptr %terms, i64 %run, i64 %place, i64 %count, "
    "i64 %width)"
)
TURN = "(ptr %to, i64 %pitch, ptr %from, ptr %rows, i64 %count, i64 %width)"
LAY = "(ptr %to, ptr %from, ptr %terms, i64 %count, i64 %width, i64 %room)"


@dataclass(frozen=True)
class Table:
    """Where the rows or the terms of windows lie; a buffer of the program."""

    digits: Digits
    width: int  # bytes of an element

    @cached_property
    def bytes(self) -> np.ndarray:
        """Offsets; some more can be read past the end."""
        return np.append(offsets(self.digits) * self.width, np.zeros(GROUP * 32, np.int64))


def emit_windows(core: Core, name: str) -> str:
    """All strips or panels of a group."""
    f = Function(f"{name}.windows", WINDOWS)
    columns, pitch, panel = core.packing[name]
    with f.span("%length", columns) as j:
        width = f.least_of(f.whole("sub", "%length", j), columns)
        to, rows = f.byte("%to", f.whole("udiv", j, columns), panel), f.byte("%rows", j, 8)
        row = f.whole("add", "%row", j)
        for work, place, way in ((name, row, ROWS), ("terms", "%term", TERMS)):
            given = (to, pitch * core.size, "%from", rows, "%terms", "%run", place)
            with f.under(f.test("eq", "%way", way)):
                f.run(f"@{work}.runs", RUNS, *given, "%count", width)
        with f.under(f.test("eq", "%way", SINGLE)), f.span("%count") as i:
            source = f.byte("%from", f.let(f"load i64, ptr {f.byte('%terms', i, 8)}, align 8"))
            place = f.byte(to, i, pitch * core.size)
            f.run("@turn1", TURN, place, pitch * core.size, source, rows, 1, width)
    return f.text


def emit_terms(core: Core) -> str:
    """Runs of terms that are neighbours: squares, turned."""
    f = Function("terms.runs", RUNS)

    def turn(values: list[str]) -> list[str]:
        (k,) = values
        rest = f.whole("urem", f.whole("add", "%place", k), "%run")
        count = f.least_of(f.whole("sub", "%run", rest), f.whole("sub", "%count", k))
        source = f.byte("%from", f.let(f"load i64, ptr {f.byte('%terms', k, 8)}, align 8"))
        work = "@turn1"
        for side in core.sides:
            work = f.choose(f.test("sge", count, side), f"@turn{side}", work, "ptr")
        given = (f.byte("%to", k, "%pitch"), "%pitch", source, "%rows", count, "%width")
        f.run(work, TURN, *given)
        return [f.whole("add", k, count)]

    f.repeat([("i64", "0")], lambda values: f.test("slt", values[0], "%count"), turn)
    return f.text


def emit_turn(core: Core, side: int) -> str:
    """As `transpose`, of rows that a table places."""
    f = Function(f"turn{side}", TURN)
    last, lowest = f.whole("sub", "%width", 1), f.whole("sub", "%count", side)
    with f.span("%width", side) as j:
        rows = [f.least_of(f.whole("add", j, each), last) for each in range(side)]
        places = [f.let(f"load i64, ptr {f.byte('%rows', each, 8)}, align 8") for each in rows]
        sources = [f.byte("%from", each) for each in places]
        target = f.byte("%to", j, core.size)
        with f.span("%count", side) as i:
            row = f.least_of(i, lowest)
            place = f.byte(target, row, "%pitch")
            found = [core.fetch(f, f.byte(each, row, core.width), side) for each in sources]
            for x in Square(f, core.value, side).turned(found) if side > 1 else found:
                f.store(x, place, core.value, side)
                place = f.byte(place, "%pitch")
    return f.text


def emit_rows(core: Core, name: str) -> str:
    """Runs of rows that are neighbours, side by side in a strip or panel; zeros beyond the last."""
    f = Function(f"{name}.runs", RUNS)

    def turn(values: list[str]) -> list[str]:
        (j,) = values
        rest = f.whole("urem", f.whole("add", "%place", j), "%run")
        left = f.whole("sub", "%width", j)
        width = f.least_of(f.whole("sub", "%run", rest), left)
        room = f.whole("sub", core.packing[name][0], j)
        room = f.choose(f.test("eq", width, left), room, width)
        source = f.byte("%from", f.let(f"load i64, ptr {f.byte('%rows', j, 8)}, align 8"))
        given = (f.byte("%to", j, core.size), source, "%terms", "%count", width, room)
        f.run(f"@{name}.lay", LAY, *given)
        return [f.whole("add", j, width)]

    f.repeat([("i64", "0")], lambda values: f.test("slt", values[0], "%width"), turn)
    return f.text


def emit_lay(core: Core, name: str) -> str:
    """`width` neighbours of each term, and zeros up to `room`."""
    f, lanes = Function(f"{name}.lay", LAY), core.lanes
    columns, pitch, _ = core.packing[name]
    starts = range(0, columns, lanes)
    masks = [
        [
            core.mask(f, f.least_of(f.whole("sub", size, start), lanes))
            for size in ("%width", "%room")
        ]
        for start in starts
    ]
    whole = f.test("eq", "%room", columns)  # whose vectors nothing lies behind
    for here, masked in ((whole, False), (f.choose(whole, "false", "true", "i1"), True)):
        with f.under(here), f.span("%count") as i:
            source = f.byte("%from", f.let(f"load i64, ptr {f.byte('%terms', i, 8)}, align 8"))
            target = f.byte("%to", i, pitch * core.size)
            for start, (width, room) in zip(starts, masks, strict=True):
                x = core.fetch(f, f.byte(source, start, core.width), lanes, width)
                mask = room if masked else None
                f.store(x, f.byte(target, start, core.size), core.value, lanes, mask)
    return f.text


# A block

STEPS = ("a_outer", "a_inner", "b_outer", "b_inner")  # strides, in elements
FLAGS = ("pack_b", "turn", "thin")
WAYS = ("a_way", "a_run", "b_way", "b_run")  # of windows
OUTER = ("c_outer", "s_outer")  # elements from row to row of an output, and of the segments' sums
FIELDS = ("k", *STEPS, *FLAGS, *WAYS, *OUTER)  # the arguments that the core reads, in this order
TABLES = ("a_rows", "a_terms", "b_rows", "b_terms")  # of windows, else null
BLOCKED = (
    "(ptr %fields, ptr %a, ptr %b, ptr %c, ptr %s, i64 %m, i64 %rows, i64 %n, i64 %columns, "
    "ptr %scratch, ptr %epilogue, ptr %args, i64 %batch, "
    f"{', '.join(f'ptr %{each}' for each in TABLES)})"
)
EPILOGUE = (
    "(ptr %args, ptr %tile, i64 %ld, i64 %batch, i64 %m0, i64 %rows, i64 %n0, i64 %columns, "
    "ptr %scratch)"
)


@dataclass(frozen=True)
class Source:
    """An operand from some row and term on."""

    f: Function
    start: str
    outer: str  # steps in bytes, 0 of windows
    inner: str
    way: str
    run: str
    rows: str  # tables
    terms: str
    row: object = 0
    term: object = 0

    def moved(self, rows: object, terms: object) -> Source:
        f = self.f
        return replace(
            self,
            start=f.byte(f.byte(self.start, terms, self.inner), rows, self.outer),
            rows=f.byte(self.rows, rows, 8),
            terms=f.byte(self.terms, terms, 8),
            row=f.whole("add", self.row, rows),
            term=f.whole("add", self.term, terms),
        )

    def first(self, windows: str) -> str:
        """Where the first element of windows lies."""
        f = self.f
        tables = [f.choose(windows, x, "%fields", "ptr") for x in (self.rows, self.terms)]
        row, term = (f.argument(each, 0) for each in tables)
        return f.byte(f.byte(self.start, row), term)


class Block:
    """The core's function: rows m .. m + rows - 1 and columns n .. n + columns - 1. Where s is no
    null, one more row of a is all ones, and what that gives for each segment goes to s."""

    def __init__(self, core: Core, name: str) -> None:
        self.core, self.size = core, core.size
        self.f = f = Function(name, BLOCKED, "")
        given = {field: f.argument("%fields", place) for place, field in enumerate(FIELDS)}
        self.a, self.b = (
            Source(
                f,
                f"%{x}",
                *(f.whole("mul", given[f"{x}_{each}"], core.width) for each in ("outer", "inner")),
                *(given[f"{x}_{each}"] for each in ("way", "run")),
                *(f"%{x}_{each}" for each in ("rows", "terms")),
            )
            for x in "ab"
        )
        self.pack_b, self.turn, self.thin = (f.test("ne", given[field], 0) for field in FLAGS)
        self.weaves = "false"
        if core.is_roomy and not core.dot:
            enough = f.test("sge", "%columns", core.rows // WOVEN * core.columns)
            self.weaves = f.all(enough, f.test("eq", self.a.way, STRIDED))
        self.strips = f.byte("%scratch", 64)
        self.panels = f.byte(self.strips, GROUP * core.strip)
        self.sums = f.byte(self.panels, BLOCK // (core.columns * self.size) * core.panel)
        self.turned = f.byte(self.sums, max(FEW) * THIN_PITCH)
        self.a, self.b = self.a.moved("%m", 0), self.b.moved("%n", 0)
        self.pitch = f.whole("mul", given["c_outer"], self.size)  # of an output, or 0
        self.out = f.byte(f.byte("%c", "%m", self.pitch), "%n", self.size)
        self.has_ones = f.let("icmp ne ptr %s, null")
        self.height = f.whole("add", "%rows", f.choose(self.has_ones, 1, 0))
        self.total = f.whole("mul", given["s_outer"], self.size)  # bytes from segment to segment
        self.segments(given["k"])

    def segments(self, depth: str) -> None:
        f, core = self.f, self.core
        # Where there is one segment, each strip is done before the next begins
        pitch = f.choose(f.test("sgt", depth, SEGMENT), PITCH, 0)
        # k = 0 has one segment, which is empty
        with f.span(f.let(f"call i64 @llvm.smax.i64(i64 {depth}, i64 1)"), SEGMENT) as k:
            left = f.whole("sub", depth, k)
            self.count, self.final = f.least_of(left, SEGMENT), f.test("sle", left, SEGMENT)
            self.terms, self.more = self.count, f.test("sgt", k, 0)
            if core.dot:
                self.terms = f.whole("lshr", f.whole("add", self.count, 1), 1)
            segment, b = self.a.moved(0, k), self.b.moved(0, k)
            ahead = f.whole("add", k, SEGMENT)
            if core.is_wide:
                with f.under(self.thin):
                    self.sweep(segment, b)
            tall = f.choose(self.thin, 0, self.height)
            some = f.choose(self.weaves, 2 * core.rows, GROUP * core.rows)
            group = f.choose(self.weaves, self.height, some)
            with f.span(tall, group) as g:
                height = f.least_of(f.whole("sub", self.height, g), group)
                last = f.all(self.has_ones, f.test("eq", f.whole("add", g, height), self.height))
                a, held = segment.moved(g, 0), f.whole("sub", height, f.choose(last, 1, 0))
                self.pack("strips", self.strips, a, f.least_of(held, some))
                with f.span(height, core.rows) as i:
                    rows = f.least_of(f.whole("sub", height, i), core.rows)
                    self.extra = f.all(last, f.test("eq", f.whole("add", i, rows), height))
                    strip = self.strip(i)
                    with f.under(self.extra):
                        self.lay_ones(strip, f.whole("sub", rows, 1))
                    self.first = f.test("eq", f.whole("add", g, i), 0)
                    # What is packed next lies below, or, at the end, in the next segment
                    following = f.whole("add", i, core.rows)
                    self.slot = self.strip(following)
                    following = f.choose(self.weaves, following, some)
                    below, behind = a.moved(following, 0), self.a.moved(0, ahead)
                    self.rest = f.whole("sub", f.whole("sub", "%rows", g), following)
                    more = f.test("sgt", self.rest, 0)
                    start = f.choose(more, below.start, behind.start, "ptr")
                    self.below, self.weave = replace(below, start=start), f.all(self.weaves, more)
                    enough = f.choose(self.weave, 0, some)
                    self.parts = f.whole(
                        "udiv", f.whole("add", enough, core.period - 1), core.period
                    )
                    i = f.whole("add", g, i)
                    sums = f.byte(self.sums, i, pitch)
                    self.tiles(i, rows, strip, b, sums)
                    with f.under(self.extra):
                        self.take_sums(k, f.byte(sums, f.whole("sub", rows, 1), PITCH))

    def strip(self, i: str) -> str:
        """Where the strip that begins at row i of a group is packed."""
        number = self.f.whole("udiv", i, self.core.rows)
        slot = self.f.choose(self.weaves, self.f.whole("and", number, 1), number)
        return self.f.byte(self.strips, slot, self.core.strip)

    def lay_ones(self, strip: str, row: str) -> None:
        """A row of a packed strip."""
        f, core = self.f, self.core
        place = f.byte(strip, row, self.size)
        with f.span(self.count) as t:
            f.store(constant(1, core.value, 0), f.byte(place, t, 16 * self.size), core.value, 0)

    def take_sums(self, k: str, row: str) -> None:
        """What the row of ones gave for a segment; the next one begins at 0."""
        f, value = self.f, self.core.value
        target = f.byte("%s", f.whole("udiv", k, SEGMENT), self.total)
        with f.span("%columns") as j:
            place = f.byte(row, j, self.size)
            f.store(f.load(place, value, 0), f.byte(target, j, self.size), value, 0)
            f.store(constant(0, value, 0), place, value, 0)

    def sweep(self, a: Source, b: Source) -> None:
        """A segment of a thin block."""
        f, core = self.f, self.core
        near = f.test("eq", a.inner, core.width)
        way = f.choose(near, "@copy", "@gather", "ptr")
        f.run(way, PACK, self.strips, core.strip, a.start, a.outer, a.inner, "%rows", self.count)
        work = "null"
        for name, here in (("dots", "true"), ("sweep", f.test("eq", b.outer, core.width))):
            for rows in sorted(FEW, reverse=True):
                fits = f.all(here, f.test("sle", "%rows", rows))
                work = f.choose(fits, f"@{name}{rows}", work, "ptr")
        left = (self.count, self.strips, f.whole("sub", "%rows", 1))
        right = (b.start, b.outer, b.inner, "%columns", self.sums, self.panels, self.more)
        f.run(work, THIN, *left, *right)
        with f.under(self.final):
            self.finish("0", "%rows", self.sums)

    def pack(self, name: str, to: str, x: Source, length: str) -> None:
        """An operand's segment, in panels or strips."""
        f, core = self.f, self.core
        columns, pitch, panel = core.packing[name]
        rows = f.test("eq", x.outer, core.width)
        with f.under(rows):
            f.run(f"@{name}", SPREAD, to, x.start, x.inner, self.count, length)
        if core.windows:
            with f.under(f.test("ne", x.way, STRIDED)):
                places = (to, x.start, x.rows, x.terms, x.way, x.run, x.row, x.term)
                f.run(f"@{name}.windows", WINDOWS, *places, self.count, length)
            rows = f.let(f"or i1 {rows}, {f.test('ne', x.way, STRIDED)}")
        with f.under(f.choose(rows, "false", "true", "i1")), f.span(length, columns) as j:
            width = f.least_of(f.whole("sub", length, j), columns)
            place = f.byte(to, f.whole("udiv", j, columns), panel)
            steps = (x.inner, x.outer, self.count, width)
            f.run("@pack", PACK, place, pitch * self.size, f.byte(x.start, j, x.outer), *steps)
        if core.dot:
            with f.span(length, columns) as j:
                place = f.byte(to, f.whole("udiv", j, columns), panel)
                f.run("@pair", PAIR, place, pitch * self.size, self.count)

    def panel(self, j: str) -> str:
        """Where the panel that begins at column j is packed."""
        return self.f.byte(self.panels, self.f.whole("udiv", j, self.core.columns), self.core.panel)

    def width(self, j: str) -> tuple[str, str]:
        """How wide a panel is, and whether it can be read where it lies."""
        f, core = self.f, self.core
        width = f.least_of(f.whole("sub", "%columns", j), core.columns)
        whole = f.test("eq", f.whole("srem", width, core.lanes), 0)
        return width, "true" if core.masks else whole

    def tiles(self, i: str, rows: str, strip: str, b: Source, sums: str) -> None:
        """The tiles of a strip, and what becomes of them after the last segment: whole ones go
        straight to an output that asks for nothing else."""
        f, core = self.f, self.core
        large = f.test("sgt", rows, core.rows // 2 + 1)
        flat = f.all(large, f.test("eq", b.outer, core.width))
        held = f.whole("sub", rows, f.choose(self.extra, 1, 0))
        straight = f.all(self.final, f.test("ne", self.pitch, 0), f.test("eq", held, core.rows))
        done = f.whole("sub", "%columns", f.whole("srem", "%columns", core.columns))
        done, line = f.choose(straight, done, 0), f.byte(self.out, i, self.pitch)
        heights = ((core.rows, large), (SMALL, f.choose(large, "false", "true", "i1")))
        weaves = f.choose(self.first, "false", self.weave, "i1")
        with f.span("%columns", core.columns) as j:
            part = f.whole("udiv", j, core.columns)
            width, readable = self.width(j)
            double = f.test("sgt", width, core.lanes)
            lies = f.choose(self.pack_b, "false", readable, "i1")
            packs = f.choose(lies, "false", self.first, "i1")
            by_the_way = "false" if core.dot else f.all(packs, readable, double, flat)
            with f.under(f.choose(by_the_way, "false", packs, "i1")):
                self.pack("panels", self.panel(j), b.moved(j, 0), width)
            direct = f.let(f"or i1 {lies}, {by_the_way}")
            source = f.choose(direct, f.byte(b.start, j, b.outer), self.panel(j), "ptr")
            step = f.choose(direct, b.inner, core.columns * self.size)
            weave = f.all(weaves, f.test("ult", part, core.rows // WOVEN))
            packed = f.choose(
                weave, f.byte(self.slot, part, WOVEN * self.size), self.panel(j), "ptr"
            )
            ahead = self.ahead(part, b.moved(j, 0), by_the_way, weave)
            lanes = f.choose(double, f.whole("sub", width, core.lanes), width)
            target, whole = f.byte(sums, j, self.size), f.test("slt", j, done)
            for height, fits in heights:
                micro = f.choose(double, f"@micro{height}.2", f"@micro{height}.1", "ptr")
                if height == core.rows and not core.dot:
                    micro = f.choose(by_the_way, f"@first{height}.2", micro, "ptr")
                    if core.is_roomy:
                        micro = f.choose(weave, f"@weave{height}.2", micro, "ptr")
                with f.under(fits), f.span(rows, height) as r:
                    left, to = f.byte(strip, r, self.size), f.byte(target, r, PITCH)
                    out = f.choose(whole, f.byte(line, j, self.size), to, "ptr")
                    tile = (self.terms, left, source, step, lanes, packed, to, self.more)
                    f.run(micro, MICRO, *tile, out, f.choose(whole, self.pitch, PITCH), *ahead)
        with f.under(f.all(self.final, f.test("slt", done, "%columns"))):
            self.finish(i, held, sums, done)

    def ahead(self, part: str, b: Source, by_the_way: str, weave: str) -> list[str]:
        """What is packed next, and how a tile's turns walk through it: two rows of a's next strip;
        else, in the first strip, b's next panel; else, at the first panels, a part of a's next
        group, or of the strips that a segment begins with."""
        f, core = self.f, self.core
        row = f.least_of(f.whole("mul", part, WOVEN), f.whole("sub", self.rest, 1))
        beside = f.test("slt", f.whole("add", row, 1), self.rest)
        beside = f.choose(beside, self.below.outer, 0)  # the last row stands in for the next
        woven = self.below.moved(row, 0).start, self.below.inner, beside
        panel = f.whole("sub", core.columns * core.width, f.whole("mul", self.count, b.inner))
        soon = f.byte(b.start, core.soon, b.inner), b.inner, panel
        found: list[str] = [self.strips, "0", "0"]
        for condition, other in (
            (f.test("ult", part, self.parts), self.way(self.below, part)),
            (self.first, self.way(b.moved(core.columns, 0), "0")),
            (by_the_way, soon),
            (weave, woven),
        ):
            kinds = ("ptr", "i64", "i64")
            found = [f.choose(condition, *each) for each in zip(other, found, kinds, strict=True)]
        return found

    def way(self, x: Source, part: str) -> tuple[str, str, str]:
        """A start, a stride, and a step after a period: through rows of which a turn is `span`
        bytes, or through a period of columns, so much of each and then the next; through windows
        as they lie."""
        f, span = self.f, self.core.span
        flat = f.test("eq", x.outer, self.core.width)
        round_trip = f.whole("mul", x.outer, self.core.period)
        place = f.byte(x.start, f.choose(flat, span, round_trip), part)
        back = f.whole("sub", span, round_trip)
        found = place, f.choose(flat, x.inner, x.outer), f.choose(flat, 0, back)
        if not self.core.windows:
            return found
        windows, kinds = f.test("ne", x.way, STRIDED), ("ptr", "i64", "i64")
        other = f.byte(x.first(windows), f.whole("mul", part, SEGMENT), span), span, 0
        pairs = zip(other, found, kinds, strict=True)
        first, stride, turn = (f.choose(windows, *each) for each in pairs)
        return first, stride, turn

    def finish(self, i: str, rows: str, sums: str, done: object = 0) -> None:
        """The epilogue of a strip, from a column on; one that is computed in place of its
        transpose is turned."""
        f, size = self.f, self.size
        first, ld = f.whole("add", "%m", i), 16
        pitch = f.choose(self.thin, THIN_PITCH, PITCH)
        with f.under(self.turn), f.span("%columns") as j, f.span(rows) as r:
            x = f.load(f.byte(f.byte(sums, r, pitch), j, size), self.core.value, 0)
            place = f.byte(f.byte(self.turned, j, ld * size), r, size)
            f.store(x, place, self.core.value, 0)
        left = f.whole("add", "%n", done), f.whole("sub", "%columns", done)
        plain = (f.byte(sums, done, size), f.whole("udiv", pitch, size), first, rows, *left)
        swapped = (self.turned, ld, "%n", "%columns", first, rows)
        kinds = ("ptr", *["i64"] * 5)
        pairs = zip(swapped, plain, kinds, strict=True)
        given = [f.choose(self.turn, *each) for each in pairs]
        f.run("%epilogue", EPILOGUE, "%args", *given[:2], "%batch", *given[2:], "%scratch")


# Kernels

CUT = ("m", "n", "down", "across", "tall", "wide", "most")
AXIS = ("size", "a_step", "b_step", "c_step")  # of a batch axis


@dataclass(frozen=True)
class Tiling:
    """How a contraction is cut into units, and what is packed. Of thin blocks `down` and `tall`
    count columns."""

    down: int
    across: int
    tall: int
    wide: int
    most: int  # units one below the other that are computed as one block
    pack_b: bool
    thin: bool


def roles(c: Contraction) -> tuple[int, int, Operand, Operand]:
    """m, n, a and b: in each other's place where there are few columns."""
    return (c.n, c.m, c.b, c.a) if is_turned(c) else (c.m, c.n, c.a, c.b)


def is_turned(c: Contraction) -> bool:
    return c.n <= max(FEW) and c.n < c.m


def tiling(c: Contraction, core: Core) -> Tiling:
    """Units of few rows, since those of one thread that lie below each other are one block."""
    m, n, a, b = roles(c)
    if is_thin(m, b, core):
        return thin_tiling(c, m, n, a, b)
    across, tall = ceil(n * core.size / block_width()), SMALL
    if prod(c.batch) >= 2 * UNITS:
        tall = min(max(m, 1), TALL)
    elif m < 4 * core.rows:
        # Too few rows to share: columns are, two panels at least to a unit; else strips
        several = min(2 * prod(c.batch) * m * n * c.k / GRAIN, UNITS, n / (2 * core.columns))
        across, tall = max(across, int(several)), core.rows if several < 2 else max(m, 1)
    wide = ceil(n / max(across, 1) / core.columns) * core.columns
    most = max(TALL // tall, 1) if c.k > SEGMENT else ceil(m / tall)
    # What lies in far places is copied together where it is read again and again
    height, far = min(tall * most, m) // 2, abs(b.inner) * core.size
    pack_b = b.outer != 1 or height >= 128 or (height >= 32 and far >= 4096)
    low = core.dtype in LOW_PRECISION or core.dot
    return Tiling(ceil(m / tall), ceil(n / max(wide, 1)), tall, wide, most, low or pack_b, False)


def block_width() -> int:
    """Bytes: how wide a block is whose panels, of one segment, fill half of the level 2 cache."""
    return max(min(cache_size() // 2 // SEGMENT // 256 * 256, BLOCK), 256)


def is_thin(m: int, b: Operand, core: Core) -> bool:
    """Whether blocks are thin: b is read where it lies."""
    return core.is_wide and 0 < m <= max(FEW) and 1 in (b.outer, b.inner)


def thin_tiling(c: Contraction, m: int, n: int, a: Operand, b: Operand) -> Tiling:
    """Units side by side, which go through memory in long ways, with work enough for each."""
    wide, most = min(ceil(LITTLE / max(c.k, 1) / 16) * 16, 512), 1
    if b.outer == 1:
        wide = 64  # many units share out evenly; those of one thread are one way
        most = next(most for rows, most in FEW.items() if m <= rows) // wide
    else:
        # A unit copies its rows of a
        wide = max(wide, 16 if a.inner == 1 and m <= 4 else 64)
    return Tiling(ceil(n / wide), 1, wide, n, most, False, True)


def core_of(c: Contraction, bits: int) -> Core:
    """The core of a contraction; few rows or columns wait for memory, not for arithmetic."""
    dtype = c.a.buffer.dtype
    has_dot = bits == 512 and "+avx512bf16" in host().features.split(",")
    dot = c.dot and has_dot and min(c.m, c.n) > max(FEW)
    return Core(dtype, bits, dot, bool(c.a.digits or c.b.digits))


def way_of(x: Operand) -> tuple[int, int]:
    """How windows are packed, and in which runs: the longest that are worth it."""
    if x.digits is None:
        return STRIDED, 1
    (rows, far), (terms, near) = (each[-1] for each in x.digits)
    found = [(rows, ROWS)] if far == 1 else []
    found += [(terms, TERMS)] if near == 1 else []
    run, way = max([(1, SINGLE), *((run, way) for run, way in found if run >= NEAR[way])])
    return way, run


def tables(x: Operand) -> list[Table]:
    """Where the rows and the terms of windows lie."""
    return [Table(each, x.buffer.dtype.itemsize) for each in x.digits or ()]


def structure(c: Contraction, bits: int | None = None) -> Structure:
    """What to compile and pass: see emit.py. The core is among the buffers, as a function."""
    core = core_of(c, bits or vector_bits())
    cut = tiling(c, core)
    units = prod(c.batch) * cut.down * cut.across
    work = 2 * c.m * c.n * c.k / SPEED
    if cut.thin:
        work = max(work, roles(c)[1] * c.k * core.width / PACE)
    cost = 10 + prod(c.batch) * work / max(units, 1)
    return walk(c, core, cut).structure(units, cost, core.scratch)


def stores_alone(c: Contraction, core: Core) -> bool:
    """Whether all that happens to a sum is that it is stored, beside the next column's."""
    store, *more = c.epilogue.stores
    place, last = store.access, len(c.batch) + 1
    plain = store.value.op == "acc" and store.value.dtype == core.value and not place.dynamic
    return plain and not more and not is_turned(c) and place.stride(last) == 1


def walk(c: Contraction, core: Core, cut: Tiling) -> Slots:
    """The slots of a contraction's arguments: the same for equal structures."""
    slots, entry = Slots(), cast(Any, core)
    m, n, a, b = roles(c)
    place, is_plain = c.epilogue.stores[0].access, stores_alone(c, core)
    steps = [place.stride(axis) for axis in range(len(c.batch) + 1)]
    pointers = [slots.buffer(each) for each in (entry, a.buffer, b.buffer, place.buffer)]
    pointers += [slots.buffer(cast(Any, each)) for x in (a, b) for each in tables(x)]
    pointers += [slots.buffer(c.sums)] if c.sums else []
    kinds = bool(a.digits), bool(b.digits), bool(c.sums)
    slots.write("contraction", core.key, len(c.batch), *pointers, *kinds)
    numbers = (
        c.k, a.outer, a.inner, b.outer, b.inner, cut.pack_b, is_turned(c), cut.thin,
        *way_of(a), *way_of(b), steps[-1] if is_plain else 0, n,
        m, n, cut.down, cut.across, cut.tall, cut.wide, cut.most, a.offset, b.offset, place.offset,
    )  # fmt: skip
    for field, number in zip((*FIELDS, *CUT, "a", "b", "c"), numbers, strict=True):
        slots.value(int(number), field)
    for axis, found in enumerate(zip(c.batch, a.batch, b.batch, steps[:-1], strict=True)):
        for field, number in zip(AXIS, found, strict=True):
            slots.value(number, (field, axis))
    slots.nest(c.epilogue)
    return slots


def emit(c: Contraction, bits: int, name: str) -> str:
    """The module of a contraction's kernel: the walk over its units, and its epilogue."""
    core = core_of(c, bits)
    slots = walk(c, core, tiling(c, core))
    f = Function(name, "(ptr %args, i64 %begin, i64 %end, ptr %scratch)", "")
    sides = roles(c)[2:]
    buffers = [cast(Any, core), *(x.buffer for x in sides), c.epilogue.stores[0].access.buffer]
    entry, *bases = (f.argument("%args", slots.buffer(each), "ptr") for each in buffers)
    places = [
        f.argument("%args", slots.buffer(cast(Any, each)), "ptr") if each else "null"
        for x in sides
        for each in tables(x) or (None, None)
    ]
    totals = f.argument("%args", slots.buffer(c.sums), "ptr") if c.sums else "null"
    fields = f.byte("%args", 8 * slots.slot(FIELDS[0]))
    m, n, down, across, tall, wide, most, *starts = (
        f.argument("%args", slots.slot(field)) for field in (*CUT, "a", "b", "c")
    )
    axes = [
        [f.argument("%args", slots.slot((field, axis))) for field in AXIS]
        for axis in range(len(c.batch))
    ]

    def turn(values: list[str]) -> list[str]:
        """The units from one on that lie below each other, thin ones side by side, as one block."""
        (unit,) = values
        first, rest = f.whole("urem", unit, down), f.whole("udiv", unit, down)
        count = f.least_of(f.whole("sub", "%end", unit), f.whole("sub", down, first))
        count = f.least_of(count, most)
        begin, length = f.whole("mul", first, tall), f.whole("mul", count, tall)
        thin = f.test("ne", f.argument("%args", slots.slot("thin")), 0)
        row, height = f.choose(thin, 0, begin), f.choose(thin, m, length)
        column = f.whole("mul", f.whole("urem", rest, across), wide)
        column, wider = f.choose(thin, begin, column), f.choose(thin, length, wide)
        batch = rest = f.whole("udiv", rest, across)
        moved = starts
        for size, *steps in reversed(axes):
            i, rest = f.whole("urem", rest, size), f.whole("udiv", rest, size)
            moves = [f.whole("mul", i, step) for step in steps]
            moved = [f.whole("add", *each) for each in zip(moved, moves, strict=True)]
        widths = (core.width, core.width, core.size)
        sources = [f.byte(*each) for each in zip(bases, moved, widths, strict=True)]
        height = f.least_of(f.whole("sub", m, row), height)
        width = f.least_of(f.whole("sub", n, column), wider)
        ends = f.test("eq", f.whole("add", row, height), m) if c.sums else "false"
        sources.append(f.choose(ends, f.byte(totals, column, core.size), "null", "ptr"))
        block = (fields, *sources, row, height, column, width)
        f.run(entry, BLOCKED, *block, "%scratch", f"@{name}.epilogue", "%args", batch, *places)
        return [f.whole("add", unit, count)]

    f.repeat([("i64", "%begin")], lambda values: f.test("slt", values[0], "%end"), turn)
    return "\n".join([emit_tile(slots, c.epilogue, bits, f"{name}.epilogue"), f.text])
