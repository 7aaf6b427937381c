"""The loop level: what a kernel computes, as nests of loops over typed scalar expressions.

Comes from fuse.py; emit.py turns each nest into a native function, interpret.py says what it
means. The grammar:

    nest     = Nest(outer, inner, order, stores)        elementwise, movement, reduction, scan
             | Contraction(batch, m, n, k, a, b, epilogue)   sum over k of a[..m, k] * b[..k, n]
             | Scatter(...)                              rows added or put where indices say
             | HostCall(op, inputs, outputs)             an op without a kernel, run by Python
             | Repeat(turns, kernels, moves, ...)        kernels of nests, run several times
    store    = Store(access, value)                      memory[access] = value
    access   = Access(buffer, offset, strides, dynamic)  offset + sum of stride * axis
                                                         + sum of stride * expr, in elements
    expr     = const | param | axis                      a literal, a number passed in, a coordinate
             | load(access) [if mask]                    0 where the mask is false
             | arithmetic: ARITHMETIC on equal dtypes    IEEE 754, integers wrap around
             | compare: lt le eq ne                      -> bool
             | select(c, a, b) | cast(x) | bitcast(x)
             | rare(c, a, b)                       select; a is computed where some lane needs it,
                                                   from arithmetic on what c and b read
             | reduce[kind](x)                           over the inner axis; kind of REDUCTIONS:
                                                         sum by `order`, fold by halving,
                                                         argmax the first index, the first NaN's
             | scan(x)                                   running sum along the inner axis
             | acc                                       a contraction's element (epilogues)
             | check[size](i)                            i within [-size, size), wrapped; else flags

A Nest has outer axes 0 .. k-1 of sizes `outer` and one inner axis k of size `inner`. An expression
that depends on the axis k, and is not inside a reduce, is of *inner* level: computed once per
element; the others once per outer point. `order` says how reductions over the inner axis are added
(needle/ops/order.py), and with it which axis the vectors lie along:

    rows      element i goes to lane i mod LANES, in chunks of CHUNK; vectors along the inner axis
    columns   a chain over ROWS rows, then the chains folded; vectors along the last outer axis

Arithmetic is in the dtype of its arguments, never float16 or bfloat16: a lowering casts those to
float32 and the result back, so that each op rounds once. Expressions are interned: equal ones are
one object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any
from weakref import WeakValueDictionary

import numpy as np

from needle.dtype import LOW_PRECISION, DType, bool_, float32, int64
from needle.ops.order import SEGMENT

ARITHMETIC = {  # how many arguments each takes
    "add": 2, "sub": 2, "mul": 2, "div": 2, "fma": 3, "neg": 1, "abs": 1, "sqrt": 1,
    "floor": 1, "ceil": 1, "rint": 1, "trunc": 1, "max": 2, "min": 2,
    "frem": 2,  # exact: C's fmod
    "sdiv": 2, "srem": 2, "udiv": 2, "urem": 2,  # integers, divisor not 0, nothing overflows
    "and": 2, "or": 2, "xor": 2, "not": 1, "shl": 2, "lshr": 2, "ashr": 2,
}  # fmt: skip
COMPARE = frozenset({"lt", "le", "eq", "ne"})
REDUCTIONS = frozenset({"sum", "fold", "max", "min", "argmax", "argmin"})
ROWS, COLUMNS = "rows", "columns"


def unop(op: str) -> Callable[[Expr], Expr]:
    """A function of one expression."""
    return lambda x: unary(op, x)


def operator(op: str) -> Callable[[Expr, Any], Expr]:
    """A method of an expression and another one, or a number."""
    return lambda a, b: binary(op, a, b)


def turned(op: str) -> Callable[[Expr, Any], Expr]:
    """The same with the two sides exchanged."""
    return lambda b, a: binary(op, literal(a, b.dtype), b)


class Expr:
    """A typed scalar expression; `attr` is what its op needs besides arguments."""

    __slots__ = ("__weakref__", "args", "attr", "axes", "dtype", "op")

    op: str
    args: tuple[Expr, ...]
    dtype: DType
    attr: Any
    axes: frozenset[int]  # the axes that the value depends on; a reduce keeps those it had

    def __reduce__(self) -> tuple[Any, ...]:
        return expr, (self.op, self.args, self.dtype, self.attr)

    def __repr__(self) -> str:
        return f"Expr({self.op}, {self.dtype})"

    # Arithmetic, for lowerings: the other side may be a number, a literal of the same dtype

    __add__, __radd__ = operator("add"), turned("add")
    __sub__, __rsub__ = operator("sub"), turned("sub")
    __mul__, __rmul__ = operator("mul"), turned("mul")
    __truediv__, __rtruediv__ = operator("div"), turned("div")
    __lt__, __gt__ = operator("lt"), turned("lt")
    __le__, __ge__ = operator("le"), turned("le")
    __neg__, __invert__ = unop("neg"), unop("not")
    __and__, __or__, __xor__ = operator("and"), operator("or"), operator("xor")
    __lshift__, equals, differs = operator("shl"), operator("eq"), operator("ne")

    def __rshift__(self, other: Any) -> Expr:
        """Logical for unsigned dtypes, arithmetic for signed ones."""
        return binary("lshr" if self.dtype.kind == "u" else "ashr", self, other)


INTERNED: WeakValueDictionary[tuple[Any, ...], Expr] = WeakValueDictionary()


def expr(op: str, args: tuple[Expr, ...], dtype: DType, attr: Any = None) -> Expr:
    """The expression of an op on arguments: the same object for the same parts."""
    if op in ("const", "param"):
        key: Any = (op, dtype, attr.tobytes())
    else:
        key = (op, tuple(map(id, args)), dtype, attr)
    found = INTERNED.get(key)
    if found is None:
        found = object.__new__(Expr)
        found.op, found.args, found.dtype, found.attr = op, args, dtype, attr
        found.axes = axes_of(op, args, attr)
        INTERNED[key] = found
    return found


def axes_of(op: str, args: tuple[Expr, ...], attr: Any) -> frozenset[int]:
    if op == "axis":
        return frozenset({attr})
    if op == "load":
        return attr.axes.union(*(x.axes for x in args))
    return frozenset().union(*(x.axes for x in args))


def literal(value: Any, dtype: DType) -> Expr:
    """A number that is part of a formula; an expression as it is."""
    if isinstance(value, Expr):
        return value
    with np.errstate(all="ignore"):
        return expr("const", (), dtype, np.asarray(value, dtype))


def param(value: Any, dtype: DType) -> Expr:
    """A number that a user chose: passed to the kernel, which is the same for all numbers."""
    with np.errstate(all="ignore"):
        return expr("param", (), dtype, np.asarray(value, dtype))


def axis(number: int) -> Expr:
    """The coordinate along an axis, int64."""
    return expr("axis", (), int64, number)


def unary(op: str, x: Expr) -> Expr:
    return expr(op, (x,), x.dtype)


def binary(op: str, a: Expr, b: Any) -> Expr:
    b = literal(b, a.dtype)
    return expr(op, (a, b), bool_ if op in COMPARE else a.dtype)


def fma(a: Any, b: Any, c: Any) -> Expr:
    """a * b + c, rounded once."""
    like = next(x for x in (a, b, c) if isinstance(x, Expr))
    return expr("fma", tuple(literal(x, like.dtype) for x in (a, b, c)), like.dtype)


def select(condition: Expr, a: Any, b: Any) -> Expr:
    like = a if isinstance(a, Expr) else b
    a, b = literal(a, like.dtype), literal(b, like.dtype)
    return a if a is b else expr("select", (condition, a, b), a.dtype)


def rare(condition: Expr, a: Any, b: Any) -> Expr:
    """select(condition, a, b) by a branch around a."""
    return expr("rare", (condition, literal(a, b.dtype), b), b.dtype)


def cast(x: Expr, dtype: DType) -> Expr:
    """x in another dtype: rounded to nearest even; floats to integers truncate and saturate, NaN
    gives 0; to bool: whether x is not 0."""
    return x if x.dtype == dtype else expr("cast", (x,), dtype)


def bitcast(x: Expr, dtype: Any) -> Expr:
    """The same bits as another dtype of the same size."""
    return expr("bitcast", (x,), np.dtype(dtype))


def maximum(a: Expr, b: Any) -> Expr:
    """IEEE 754-2019 maximum: NaN wins, -0 < +0."""
    return binary("max", a, b)


def minimum(a: Expr, b: Any) -> Expr:
    return binary("min", a, b)


sqrt, floor, ceil, rint, trunc = map(unop, ("sqrt", "floor", "ceil", "rint", "trunc"))
absolute = unop("abs")


def wide(x: Expr) -> Expr:
    """x as what arithmetic takes: float32 for the low-precision dtypes."""
    return cast(x, float32) if x.dtype in LOW_PRECISION else x


# Memory


@dataclass(frozen=True, eq=False)
class Buffer:
    """An array in memory, by identity. `source` says whose: an input or output of the program by
    number, a constant's array, or a temporary (None)."""

    name: str
    dtype: DType
    size: int  # in elements
    source: Any = None

    def __repr__(self) -> str:
        return f"{self.name}:{self.dtype}[{self.size}]"


@dataclass(frozen=True)
class Access:
    """A place in a buffer: offset + sum of stride * axis + sum of stride * expression, in
    elements."""

    buffer: Buffer
    offset: int = 0
    strides: tuple[tuple[int, int], ...] = ()  # (axis, stride), by axis, strides not 0
    dynamic: tuple[tuple[Expr, int], ...] = ()  # (int64 expression, stride)

    @property
    def axes(self) -> frozenset[int]:
        places = frozenset(number for number, _ in self.strides)
        return places.union(*(each.axes for each, _ in self.dynamic))

    def stride(self, number: int) -> int:
        return dict(self.strides).get(number, 0)


def load(access: Access, mask: Expr | None = None) -> Expr:
    """The element at a place; 0 where the mask is false."""
    return expr("load", () if mask is None else (mask,), access.buffer.dtype, access)


@dataclass(frozen=True)
class Store:
    """memory[access] = value"""

    access: Access
    value: Expr


# Nests


@dataclass(eq=False)
class Nest:
    """Loops over outer axes and one inner axis; see the grammar above."""

    outer: tuple[int, ...]
    inner: int
    order: str
    stores: tuple[Store, ...]
    ops: tuple[Any, ...] = ()  # the graph's nodes computed here, for people

    @property
    def inner_axis(self) -> int:
        return len(self.outer)

    @property
    def values(self) -> list[Expr]:
        """What is stored, in order."""
        return [store.value for store in self.stores]

    def reads(self) -> set[Buffer]:
        return {each.attr.buffer for each in self.expressions() if each.op == "load"}

    def writes(self) -> set[Buffer]:
        return {store.access.buffer for store in self.stores}

    def expressions(self, *read: Callable[[Expr], Iterable[Expr]]) -> list[Expr]:
        """Every expression of the nest, each after its arguments."""
        roots = [*self.values, *(e for s in self.stores for e, _ in s.access.dynamic)]
        return ordered(roots, *read)


Digits = tuple[tuple[int, int], ...]  # of a coordinate: (size, stride), most significant first


def offsets(digits: Digits) -> np.ndarray:
    """Where the elements of a coordinate lie whose digits have strides."""
    found = np.zeros(1, np.int64)
    for size, stride in digits:
        found = (found[:, None] + np.arange(size) * stride).ravel()
    return found


@dataclass(frozen=True)
class Operand:
    """A contraction's operand: a strided view with batch, outer (m or n) and inner (k) strides.

    digits: of windows, whose outer and inner coordinates have no strides (they are 0) but digits
    that have, outer's and inner's.
    """

    buffer: Buffer
    offset: int
    batch: tuple[int, ...]
    outer: int
    inner: int
    digits: tuple[Digits, Digits] | None = None


@dataclass(eq=False)
class Contraction:
    """acc[b, m, n] = sum over k of a[b, m, k] * b[b, k, n]; k in segments of SEGMENT from 0, each a
    chain of fma from zero, added in order. Then the epilogue's stores, whose `acc` is the element:
    a Nest of outer axes (*batch, m) and the inner axis n, without reductions.

    float16 and bfloat16 operands are widened to float32, in which `acc` comes. dot: operands are
    rounded to bfloat16, and the processor's dot product may add two terms at once. sums: of each
    segment and column what b's terms add up to, in the same order (segments, n); without a batch.
    """

    batch: tuple[int, ...]
    m: int
    n: int
    k: int
    a: Operand
    b: Operand
    epilogue: Nest
    ops: tuple[Any, ...] = ()
    dot: bool = False
    sums: Buffer | None = None

    @property
    def segments(self) -> int:
        return max(-(-self.k // SEGMENT), 1)

    @property
    def dtype(self) -> DType:
        """What is added in."""
        found = self.a.buffer.dtype
        return float32 if found in LOW_PRECISION else found

    def reads(self) -> set[Buffer]:
        return {self.a.buffer, self.b.buffer} | self.epilogue.reads()

    def writes(self) -> set[Buffer]:
        return self.epilogue.writes() | ({self.sums} if self.sums else set())


@dataclass(eq=False)
class Scatter:
    """out[l, r, t] = sum of value over the places p, in order, whose `row` is r; with a base, the
    last such value, and base[l, r, t] where there is none.

    `row` (int64, wrapped and checked) depends on axis 1 (p); `value` on axes 0 (l), 1 (p), 2 (t).
    The base's memory may be that of out.
    """

    lead: int
    places: int
    rows: int
    trail: int
    row: Expr
    value: Expr
    out: Buffer
    ops: tuple[Any, ...] = ()
    base: Buffer | None = None

    def loads(self) -> set[Buffer]:
        found = ordered([self.row, self.value])
        return {each.attr.buffer for each in found if each.op == "load"}

    def reads(self) -> set[Buffer]:
        return self.loads() if self.base is None else self.loads() | {self.base}

    def writes(self) -> set[Buffer]:
        return {self.out}


@dataclass(eq=False)
class HostCall:
    """outputs = op.compute(inputs), compact arrays, run by Python between two barriers."""

    op: Any
    inputs: tuple[tuple[Buffer, tuple[int, ...]], ...]  # with shapes
    outputs: tuple[tuple[Buffer, tuple[int, ...]], ...]
    ops: tuple[Any, ...] = ()

    def reads(self) -> set[Buffer]:
        return {buffer for buffer, _ in self.inputs}

    def writes(self) -> set[Buffer]:
        return {buffer for buffer, _ in self.outputs}


@dataclass(frozen=True)
class Move:
    """Where a buffer of a loop's body lies in one outside, in elements: at first at an offset,
    which grows by a step from turn to turn, and, where it flips, shrinks at every other turn."""

    buffer: Buffer
    offset: int
    step: int
    flips: bool = False

    def at(self, turn: int) -> int:
        return self.offset + self.step * (turn % 2 if self.flips else turn)


@dataclass(eq=False)
class Repeat:
    """`turns` times the kernels of a body. moves: where its inputs and outputs lie; the rest is at
    offsets, in bytes, in a scratch buffer."""

    turns: int
    kernels: list[list[AnyNest]]
    moves: dict[Buffer, Move]
    offsets: dict[Buffer, int]
    scratch: Buffer
    ops: tuple[Any, ...] = ()

    @property
    def nests(self) -> list[AnyNest]:
        return [nest for kernel in self.kernels for nest in kernel]

    def reads(self) -> set[Buffer]:
        return {move.buffer for x, move in self.moves.items() if x.source is not None}

    def writes(self) -> set[Buffer]:
        found = {move.buffer for x, move in self.moves.items() if x.source is None}
        return found | ({self.scratch} if self.scratch.size else set())


AnyNest = Nest | Contraction | Scatter | HostCall | Repeat


def arguments(x: Expr) -> Iterator[Expr]:
    """All expressions that x reads, those in its address included."""
    yield from x.args
    if x.op == "load":
        for each, _ in x.attr.dynamic:
            yield each


def usual(x: Expr) -> Iterable[Expr]:
    """What x reads whether its rare case arises or not."""
    return (x.args[0], x.args[2]) if x.op == "rare" else arguments(x)


def ordered(
    roots: Iterable[Expr], read: Callable[[Expr], Iterable[Expr]] = arguments
) -> list[Expr]:
    """The roots and all below, each once and after what it reads; without recursion."""
    found: dict[Expr, None] = {}
    entered: set[Expr] = set()
    stack = list(roots)[::-1]
    while stack:
        each = stack[-1]
        if each in found:
            stack.pop()
        elif each in entered:
            found[each] = None
            stack.pop()
        else:
            entered.add(each)
            stack.extend(x for x in read(each) if x not in found)
    return list(found)


def rebuilt(x: Expr, known: dict[Expr, Expr], by: int = 0) -> Expr:
    """An expression of what is known in place of others, every axis numbered `by` higher."""
    if x not in known:
        attr = x.attr + by if x.op == "axis" else x.attr
        attr = moved(attr, known, by) if x.op == "load" else attr
        known[x] = expr(x.op, tuple(rebuilt(each, known, by) for each in x.args), x.dtype, attr)
    return known[x]


def moved(place: Access, known: dict[Expr, Expr], by: int = 0) -> Access:
    """A place among the axes of `rebuilt`."""
    strides = tuple((axis + by, step) for axis, step in place.strides)
    dynamic = tuple((rebuilt(each, known, by), step) for each, step in place.dynamic)
    return Access(place.buffer, place.offset, strides, dynamic)


def passes_of(nest: Nest) -> dict[Expr, int]:
    """In which of the nest's loops over the inner axis a value is known.

    A value of inner level is computed in loop p; a reduction over loop p is known before loop
    p + 1; what is of outer level is known before the loop it is mapped to.
    """
    found: dict[Expr, int] = {}
    for each in nest.expressions():
        depth = max((found[x] for x in arguments(each)), default=0)
        found[each] = depth + (each.op == "reduce")
    return found


def is_inner(nest: Nest, found: dict[Expr, bool], each: Expr) -> bool:
    """Whether a value differs between elements of the inner axis; `found` holds its arguments'."""
    if each.op == "reduce":
        return False
    if each.op == "axis":
        return bool(each.attr == nest.inner_axis)
    if each.op in ("acc", "scan"):
        return True
    here = each.op == "load" and nest.inner_axis in dict(each.attr.strides)
    return here or any(found[x] for x in arguments(each))


def inner_level(nest: Nest) -> dict[Expr, bool]:
    """For every expression of a nest, whether it is of inner level."""
    found: dict[Expr, bool] = {}
    for each in nest.expressions():
        found[each] = is_inner(nest, found, each)
    return found


# Printing


def show(nest: AnyNest) -> str:
    """A nest as text, for people and golden tests."""
    if isinstance(nest, Nest):
        return "\n".join(show_nest(nest))
    if isinstance(nest, Contraction):
        sizes = " ".join(map(str, (*nest.batch, nest.m, nest.n, nest.k)))
        operands = [
            f"  {name} = {x.buffer}+{x.offset} batch {x.batch} outer {x.outer} inner {x.inner}"
            + (f" digits {x.digits}" if x.digits else "")
            for name, x in (("a", nest.a), ("b", nest.b))
        ]
        head = f"contraction [{sizes}] {nest.dtype}" + (f" sums {nest.sums}" if nest.sums else "")
        return "\n".join([head, *operands, *(f"  {each}" for each in show_nest(nest.epilogue))])
    if isinstance(nest, Scatter):
        head = f"scatter [{nest.lead} {nest.places} {nest.rows} {nest.trail}] -> {nest.out}"
        names: dict[Expr, str] = {}
        body = show_exprs(ordered([nest.row, nest.value]), names)
        verb = "add" if nest.base is None else f"copy {nest.base}, then write"
        return "\n".join([head, *body, f"  {verb} {names[nest.value]} at row {names[nest.row]}"])
    if isinstance(nest, Repeat):
        lines = [f"repeat {nest.turns} scratch {nest.scratch}"]
        for x, each in nest.moves.items():
            step = f"{'+-' if each.flips else '+'}{each.step}" if each.step else ""
            lines.append(f"  {x} = {each.buffer}+{each.offset} {step}".rstrip())
        for kernel in nest.kernels:
            text = "\n".join(map(show, kernel)).replace("\n", "\n    ")
            lines.append(f"  kernel\n    {text}")
        return "\n".join(lines)
    inputs, outputs = (", ".join(str(x) for x, _ in each) for each in (nest.inputs, nest.outputs))
    return f"host {nest.op}({inputs}) -> {outputs}"


def show_nest(nest: Nest) -> list[str]:
    names: dict[Expr, str] = {}
    lines = [f"{nest.order} [{' '.join(map(str, nest.outer))} | {nest.inner}]"]
    lines += show_exprs(nest.expressions(), names)
    for store in nest.stores:
        lines.append(f"  {show_access(store.access, names)} = {names[store.value]}")
    return lines


def show_exprs(found: Sequence[Expr], names: dict[Expr, str]) -> list[str]:
    lines: list[str] = []
    for each in found:
        if each.op in ("const", "param"):
            names[each] = str(each.attr.item()) + ("" if each.op == "const" else "'")
            continue
        if each.op == "axis":
            names[each] = f"i{each.attr}"
            continue
        names[each] = f"%{len(lines)}"
        parts = [names[x] for x in each.args]
        if each.op == "load":
            parts = [show_access(each.attr, names), *(f"if {x}" for x in parts)]
        elif each.attr is not None:
            parts.append(f"[{each.attr}]")
        lines.append(f"  {names[each]} = {each.op} {' '.join(parts)} : {each.dtype}")
    return lines


def show_access(access: Access, names: dict[Expr, str]) -> str:
    terms = [f"i{number}*{stride}" for number, stride in access.strides]
    terms += [f"{names[each]}*{stride}" for each, stride in access.dynamic]
    terms += [str(access.offset)] if access.offset or not terms else []
    return f"{access.buffer.name}[{' + '.join(terms)}]"


# Verification


def verify(nest: AnyNest) -> None:
    """AssertionError where a nest breaks the grammar: a fault of ours, never a user's."""
    if isinstance(nest, Contraction):
        verify_nest(nest.epilogue)
        shape = (*nest.epilogue.outer, nest.epilogue.inner)
        assert shape == (*nest.batch, nest.m, nest.n), f"epilogue {shape} of {show(nest)}"
        assert nest.a.buffer.dtype == nest.b.buffer.dtype, "operands of two dtypes"
        assert len(nest.a.batch) == len(nest.b.batch) == len(nest.batch)
        for x, outer in ((nest.a, nest.m), (nest.b, nest.n)):
            sizes = [prod(size for size, _ in each) for each in x.digits or ()]
            assert sizes in ([], [outer, nest.k]), f"digits {x.digits} of {show(nest)}"
        assert not any(x.op in ("reduce", "scan") for x in nest.epilogue.expressions())
        if nest.sums:
            assert not nest.batch, f"sums of a batch: {show(nest)}"
            assert nest.sums.dtype == nest.dtype, f"sums in {nest.sums.dtype}"
            assert nest.sums.size == nest.segments * nest.n, f"sums of {nest.sums.size}"
    elif isinstance(nest, Scatter):
        for each in ordered([nest.row, nest.value]):
            verify_expr(each)
        assert nest.row.axes <= {1}, "a scatter's row depends on its place alone"
        assert nest.value.axes <= {0, 1, 2}
        assert nest.out.size == nest.lead * nest.rows * nest.trail
        assert nest.base is None or nest.base.size == nest.out.size
    elif isinstance(nest, Nest):
        verify_nest(nest)


def verify_nest(nest: Nest) -> None:
    axes = set(range(len(nest.outer) + 1))
    assert nest.order in (ROWS, COLUMNS), nest.order
    assert nest.order == ROWS or nest.outer, "columns lie along an outer axis"
    for each in nest.expressions():
        verify_expr(each)
        assert each.axes <= axes, f"{each} depends on axes {set(each.axes)} of {axes}"
        assert each.op != "scan" or nest.order == COLUMNS, "a scan runs along a serial axis"
    for store in nest.stores:
        assert store.value.dtype == store.access.buffer.dtype, f"{store} stores another dtype"


def verify_expr(each: Expr) -> None:
    kinds = {x.dtype for x in each.args}
    if each.op in ARITHMETIC:
        assert len(each.args) == ARITHMETIC[each.op], f"{each.op} of {len(each.args)}"
        assert kinds == {each.dtype}, f"{each.op} of {kinds} gives {each.dtype}"
        assert each.dtype not in LOW_PRECISION, f"{each.op} in {each.dtype}"
    elif each.op in COMPARE:
        assert len(kinds) == 1, f"{each.op} of {kinds}"
        assert each.dtype == bool_
        assert not kinds & LOW_PRECISION, f"{each.op} in {kinds}"
    elif each.op in ("select", "rare"):
        condition, a, b = each.args
        assert condition.dtype == bool_
        assert a.dtype == b.dtype == each.dtype
    elif each.op == "reduce":
        assert each.attr in REDUCTIONS, each.attr
    else:
        known = ("const", "param", "axis", "load", "cast", "bitcast", "scan", "acc", "check")
        assert each.op in known, f"unknown op {each.op}"
