"""One pass over memory for a product and a sum. Before: nests. After: nests, of which contractions
add up what they read anyway. Next: schedule.py.

    dw = x^T @ dy;  db = sum of dy's rows  ->  dw = x^T @ dy and, by the way, the sums of each
                                               segment of dy's rows, which db folds

Relies on: a row of ones times dy, by fused multiply-adds, is the chain that a sum over other axes
begins with, and segments are as long as these chains (needle/ops/order.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from needle.autograd import post_order
from needle.compiler import OFF
from needle.compiler.contract import FEW
from needle.compiler.loops import (
    COLUMNS,
    ROWS,
    Access,
    AnyNest,
    Buffer,
    Contraction,
    Expr,
    Nest,
    Store,
    expr,
    load,
    rebuilt,
)
from needle.compiler.schedule import Levels
from needle.dtype import float32, float64
from needle.ops.order import SEGMENT

MUCH = 1 << 18  # bytes that are worth it: more than a core's own cache keeps by the way


def share(nests: Sequence[AnyNest], waits: dict[AnyNest, list[AnyNest]]) -> list[AnyNest]:
    """The nests, each after what it reads and waits for."""
    products: dict[Buffer, list[Contraction]] = {}
    for nest in nests:
        if isinstance(nest, Contraction) and is_worth(nest):
            products.setdefault(nest.b.buffer, []).append(nest)
    if not products or "fuse" in OFF:
        return list(nests)
    levels = Levels(nests, waits)
    before = {nest: sorted(levels.before(nest), key=levels.places.__getitem__) for nest in nests}
    for nest in [each for each in nests if isinstance(each, Nest) and each.order == COLUMNS]:
        sums = sums_of(nest, products)
        if not sums or nest in post_order(sums.values(), before.__getitem__):
            continue
        if moves(nest, sums):
            (c,) = sums.values()
            before[c] += before.pop(nest)
            for each in (*before.values(), *waits.values()):
                each[:] = [c if x is nest else x for x in each]
            waits[c] = [*waits.get(c, []), *waits.pop(nest, [])]
        else:
            read(nest, sums)
            before[nest] += sums.values()
    return post_order(before, before.__getitem__)


def is_worth(c: Contraction) -> bool:
    """Whether a contraction can add up its b's terms, and they are many."""
    size = c.n * c.k * c.b.buffer.dtype.itemsize
    fits = c.dtype in (float32, float64) and not (c.dot or c.batch or c.b.digits)
    return fits and size >= MUCH and min(c.m, c.n) > max(FEW)


def sums_of(nest: Nest, products: dict[Buffer, list[Contraction]]) -> dict[Expr, Contraction]:
    """For each reduction of a nest the contraction that can do it; nothing where one has none, or
    where what is reduced is gone through once more, for a store."""
    last, found = nest.inner_axis, {}
    for each in nest.expressions():
        if each.op == "reduce":
            fitting = [c for c in candidates(each, products) if adds(c, nest, each)]
            if not fitting:
                return {}
            found[each] = fitting[0]
    return {} if any(last in store.access.axes for store in nest.stores) else found


def term(each: Expr) -> Expr:
    """What a reduction reduces, before it was widened."""
    (x,) = each.args
    return x.args[0] if x.op == "cast" else x


def candidates(each: Expr, products: dict[Buffer, list[Contraction]]) -> list[Contraction]:
    """The contractions whose b lies where a reduction's terms do."""
    x = term(each)
    return products.get(x.attr.buffer, []) if x.op == "load" and not x.args else []


def adds(c: Contraction, nest: Nest, each: Expr) -> bool:
    """Whether a reduction adds the terms of a contraction's b: all of them, or each segment's."""
    place, last = term(each).attr, nest.inner_axis
    steps = {last - 1: c.b.outer, last: c.b.inner}
    sizes: tuple[int, ...] = (c.n, c.k)
    if len(nest.outer) == 2 and c.k % SEGMENT == 0:
        steps[0], sizes = SEGMENT * c.b.inner, (c.segments, c.n, SEGMENT)
    same = (place.offset, dict(place.strides), place.dynamic) == (c.b.offset, steps, ())
    fits = (*nest.outer, nest.inner) == sizes and each.dtype == c.dtype
    return fits and same and each.attr == "sum"


def moves(nest: Nest, sums: dict[Expr, Contraction]) -> bool:
    """Let a contraction write what a nest would only have stored: True if that was all."""
    (store, *more), ((each, c), *others) = nest.stores, sums.items()
    place, whole = store.access, len(nest.outer) == 2 or c.segments == 1
    steps = {0: c.n, 1: 1} if len(nest.outer) == 2 else {0: 1}
    compact = (place.offset, dict(place.strides), place.buffer.size) == (0, steps, c.segments * c.n)
    own = store.value is each and place.buffer.source is None
    fits = own and whole and compact and not (more or others or c.sums)
    if fits:
        c.sums, c.ops = place.buffer, (*c.ops, *nest.ops)
    return fits


def read(nest: Nest, sums: dict[Expr, Contraction]) -> None:
    """Let a nest read what contractions add up."""
    known: dict[Expr, Expr] = {}
    for each, c in sums.items():
        folds = len(nest.outer) == 1 and c.segments > 1
        steps = ((0, c.n), (1, 1)) if len(nest.outer) == 2 else ((0, 1), (1, c.n))
        c.sums = c.sums or Buffer(f"{c.b.buffer.name}.{c.b.offset}.sums", c.dtype, c.segments * c.n)
        x = load(Access(c.sums, 0, steps if c.segments > 1 else ((0, 1),)))
        known[each] = expr("reduce", (x,), c.dtype, "fold") if folds else x
    nest.stores = tuple(Store(s.access, rebuilt(s.value, known)) for s in nest.stores)
    if folds:
        nest.inner = c.segments
    else:
        *outer, nest.inner = nest.outer
        nest.outer, nest.order = tuple(outer), ROWS
