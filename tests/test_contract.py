"""Contractions as machine code, against the interpreter, bit by bit."""

from __future__ import annotations

import ctypes
import math
import mmap
import platform
import re
import sys
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from needle.compiler import contract, engine, interpret, loops
from needle.compiler.loops import ROWS, Access, Buffer, Contraction, Expr, Nest, Operand, Store
from needle.compiler.target import WIDTHS, vector_bits
from needle.dtype import LOW_PRECISION, bool_, float32

KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
BITS = [bits for bits in WIDTHS if bits <= vector_bits()]
DTYPES = [
    "float32",
    "float64",
    "float16",
    "bfloat16",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "bool",
]
rng = np.random.default_rng(0)
addresses: dict[str, int] = {}


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def draw(size: int, dtype: np.dtype[Any]) -> np.ndarray:
    """Numbers of which sums are inexact, or wrap around."""
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        return rng.integers(bounds.min, bounds.max, size, dtype, endpoint=True)
    if dtype == bool_:
        return rng.random(size) < 0.2
    return (rng.standard_normal(size) * 2.0 ** rng.integers(-3, 3, size)).astype(dtype)


# Building


def operand(memory: dict[Buffer, np.ndarray], data: np.ndarray, *place: Any) -> Operand:
    buffer = next((each for each, array in memory.items() if array is data), None)
    buffer = buffer or Buffer(f"b{len(memory)}", data.dtype, data.size)
    memory[buffer] = data
    return Operand(buffer, *place)


def lay_out(sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """The strides of a compact array whose axes lie in this order, from far to near."""
    strides, step = [0] * len(sizes), 1
    for axis in reversed(order):
        strides[axis] = step
        step *= max(sizes[axis], 1)
    return strides


def strided(
    memory: dict[Buffer, np.ndarray],
    dtype: np.dtype[Any],
    sizes: Sequence[int],
    strides: Sequence[int],
) -> Operand:
    """Fresh numbers that an operand of any strides lies in exactly."""
    spans = [(max(size, 1) - 1) * step for size, step in zip(sizes, strides, strict=True)]
    offset = -sum(min(span, 0) for span in spans)
    data = draw(offset + sum(max(span, 0) for span in spans) + 1, dtype)
    return operand(memory, data, offset, tuple(strides[:-2]), strides[-2], strides[-1])


def store(memory: dict[Buffer, np.ndarray], value: Expr, shape: Sequence[int]) -> Store:
    """Into fresh memory, compact."""
    out = Buffer(f"b{len(memory)}", value.dtype, int(np.prod(shape)))
    memory[out] = draw(out.size, value.dtype)
    strides = enumerate(lay_out(shape, range(len(shape))))
    return Store(Access(out, 0, tuple((axis, step) for axis, step in strides)), value)


def accumulator(dtype: np.dtype[Any]) -> Expr:
    return loops.expr("acc", (), float32 if dtype in LOW_PRECISION else dtype)


def matmul(
    dtype: np.dtype[Any],
    sizes: tuple[int, int, int],
    batch: tuple[int, ...] = (),
    orders: tuple[str, str] = ("mk", "kn"),
    strides: Sequence[Sequence[int]] | None = None,
) -> tuple[Contraction, dict[Buffer, np.ndarray]]:
    """out = a @ b: with axes in these orders, or of these strides."""
    m, n, k = sizes
    memory: dict[Buffer, np.ndarray] = {}
    count = len(batch)
    found = []
    for number, (outer, letter) in enumerate(((m, "m"), (n, "n"))):
        shape, order = (*batch, outer, k), orders[number]
        axes = [*range(count), *(count + (each != letter) for each in order)]
        steps = strides[number] if strides else lay_out(shape, axes)
        found.append(strided(memory, dtype, shape, steps))
    value = loops.cast(accumulator(dtype), dtype)
    epilogue = Nest((*batch, m), n, ROWS, (store(memory, value, (*batch, m, n)),))
    return Contraction(batch, m, n, k, *found, epilogue), memory


# Running


def scratch(size: int) -> tuple[np.ndarray, int]:
    """Memory for a kernel, aligned; beyond it all bytes are 0xAB."""
    memory = np.full(size + 256, 0xAB, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start + size :], memory.ctypes.data + start


def load(key: str, make_text: Callable[[str], str]) -> int:
    if key not in addresses:
        name = f"function{len(addresses)}"
        (addresses[key],) = engine.load([engine.compile_ir(make_text(name))], [name])
    return addresses[key]


def run(
    c: Contraction,
    memory: dict[Buffer, np.ndarray],
    bits: int,
    ranges: Callable[[int], Sequence[tuple[int, int]]] = lambda units: [(0, units)],
) -> None:
    """The kernel, on these ranges of units."""
    loops.verify(c)
    found = contract.structure(c, bits)
    kernel = load(f"{bits} {found.key}", lambda name: contract.emit(c, bits, name))
    slots = []
    for buffer in found.buffers:
        each: Any = buffer
        if isinstance(each, contract.Core):
            slots.append(load(each.key, each.emit))
        elif isinstance(each, contract.Table):
            slots.append(each.bytes.ctypes.data)
        else:
            slots.append(memory[buffer].ctypes.data)
    args = np.array([*slots, *found.values], np.int64)
    beyond, place = scratch(64 + found.scratch)
    for begin, end in ranges(found.units):
        KERNEL(kernel)(args.ctypes.data, begin, end, place)
    assert (beyond == 0xAB).all(), "wrote past its scratch"


def check(c: Contraction, memory: dict[Buffer, np.ndarray], **ranges: Any) -> None:
    """At every width the kernel leaves what the interpreter leaves."""
    expected = {buffer: data.copy() for buffer, data in memory.items()}
    interpret.run(c, expected)
    for bits in BITS:
        found = {buffer: data.copy() for buffer, data in memory.items()}
        run(c, found, bits, **ranges)
        for buffer in memory:
            same = as_bits(found[buffer]) == as_bits(expected[buffer])
            assert same.all(), f"{bits} bits: {buffer} differs at {np.flatnonzero(~same)[:8]}"


def as_bits(x: np.ndarray) -> np.ndarray:
    """Bits, with all NaNs as one."""
    if x.dtype.kind not in "biu":
        x = np.where(np.isnan(x), np.asarray(np.nan, x.dtype), x)
    return x.view(f"u{x.itemsize}")


# Tests

EDGES = [(1, 1, 1), (3, 5, 7), (14, 32, 16), (15, 33, 17), (29, 70, 5), (8, 64, 12), (13, 9, 40)]
ORDERS = [*product(("mk", "km"), ("kn", "nk"))]


@pytest.mark.parametrize("name", DTYPES)
def test_tiles_and_their_edges(name: str) -> None:
    for sizes, orders in product(EDGES, ORDERS):
        check(*matmul(dtype_of(name), sizes, orders=orders))


@pytest.mark.parametrize("depth", [0, 1, 255, 256, 257, 513])
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "int32", "bool"])
def test_segments(name: str, depth: int) -> None:
    for sizes, orders in product([(5, 9, depth), (17, 40, depth)], ORDERS[::3]):
        check(*matmul(dtype_of(name), sizes, orders=orders))


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_blocks(name: str) -> None:
    check(*matmul(dtype_of(name), (530, 20, 260)))
    check(*matmul(dtype_of(name), (20, 530, 260), orders=("km", "nk")))
    check(*matmul(dtype_of(name), (3000, 4, 10)))
    check(*matmul(dtype_of(name), (260, 300, 24)))
    check(*matmul(dtype_of(name), (300, 260, 24), orders=("km", "nk")))


@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16", "int16", "bool"])
def test_strips_that_are_packed_by_the_way(name: str, orders: tuple[str, str]) -> None:
    """Many panels, and every number of rows in the last strip."""
    dtype = dtype_of(name)
    panels = 7 * contract.Core(dtype, BITS[-1]).columns
    for m in range(29, 44):
        check(*matmul(dtype, (m, panels + m, 9), orders=orders))
    for sizes in [(60, panels, 513), (59, panels + 40, 300)]:
        check(*matmul(dtype, sizes, orders=orders))


@pytest.mark.skipif(not re.search("x86|i386|AMD64", platform.machine()), reason="x86's registers")
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16", "int32"])
def test_tiles_stay_in_registers(name: str, bits: int) -> None:
    core = contract.Core(dtype_of(name), bits)
    text = engine.assembly(core.emit("core"))
    for kind in ("micro", "first", *["weave"] * core.is_roomy):
        start = text.index(f"\n{kind}{core.rows}.2:")
        body = text[start : text.index(".Lfunc_end", start)]
        assert body.count("mm") > 4 * core.rows
        assert not re.search(r"mm\d+, [^,\n]*\(%[er]sp\)", body)


@pytest.mark.parametrize("orders", ORDERS)
def test_vectors(orders: tuple[str, str]) -> None:
    for sizes in [(1, 1, 300), (1, 70, 270), (70, 1, 270), (600, 1, 20), (1, 600, 20), (2, 1, 3)]:
        check(*matmul(np.dtype(float32), sizes, orders=orders))


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "int32"])
def test_thin_blocks(name: str) -> None:
    """Few rows, or few columns, which are computed as rows."""
    for sizes, orders in product([(1, 4500, 9), (3, 1100, 20), (7, 530, 300)], ORDERS):
        m, n, k = sizes
        check(*matmul(dtype_of(name), (m, n, k), orders=orders))
        check(*matmul(dtype_of(name), (n, m, k), orders=orders))


def test_segment_sums_are_added_in_order() -> None:
    c, memory = matmul(np.dtype(float32), (1, 1, 768))
    a, b, out = memory.values()
    b[:] = 1
    a[:] = 0
    a[[0, 256, 512]] = 2.0**24, 1, 1  # (2^24 + 1) + 1 is 2^24; the other order gives 2^24 + 2
    run(c, memory, BITS[-1])
    assert out.tolist() == [2.0**24]


def test_fused_multiply_adds_from_plus_zero() -> None:
    c, memory = matmul(np.dtype(float32), (1, 3, 2))
    a, b, out = memory.values()
    tiny = np.float32(2.0**-12)
    a[:] = -1, 1 + tiny
    # -(1 + 2t) + (1 + t)^2 is t^2 when rounded once; products that are -0 add up to +0
    b[:] = [1 + 2 * tiny, 0.0, -0.0, 1 + tiny, -0.0, 0.0]
    run(c, memory, BITS[-1])
    assert out[0] == tiny * tiny
    assert not np.signbit(out).any()


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_special_values(name: str) -> None:
    dtype = dtype_of(name)
    for orders in ORDERS:
        c, memory = matmul(dtype, (20, 40, 30), orders=orders)
        tiny = ml_dtypes.finfo(dtype).smallest_subnormal
        special = np.array([np.inf, -np.inf, np.nan, -0.0, tiny, -3 * tiny], dtype)
        for data in memory.values():
            places = rng.integers(0, data.size, data.size // 60)
            data[places] = rng.choice(special, len(places))
        check(c, memory)


def test_batches_that_broadcast() -> None:
    dtype = np.dtype(float32)
    for a, b in [((0, 60), (48, 0)), ((0, 0), (0, 0)), ((180, 60), (144, 48))]:
        check(*matmul(dtype, (10, 8, 6), (2, 3), strides=[(*a, 6, 1), (*b, 1, 8)]))
    check(*matmul(dtype, (64, 64, 32), (5,)))
    check(*matmul(dtype, (6, 1, 33), (4, 2)))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (0, 0, 0), (0, 1, 5), (3, 4, 0)])
def test_empty(sizes: tuple[int, int, int]) -> None:
    check(*matmul(np.dtype(float32), sizes))
    check(*matmul(np.dtype(float32), sizes, (0,)))
    check(*matmul(np.dtype(float32), sizes, (2,)))


STEPS = st.sampled_from([-40, -3, -1, 0, 1, 2, 5, 17, 64])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.tuples(*[st.integers(1, 40)] * 3),
    st.lists(st.integers(1, 3), max_size=2),
    st.data(),
    st.sampled_from(["float32", "float64", "bfloat16", "int16"]),
)
def test_any_strides(
    sizes: tuple[int, int, int], batch: list[int], data: st.DataObject, name: str
) -> None:
    count = len(batch) + 2
    steps = [data.draw(st.lists(STEPS, min_size=count, max_size=count)) for _ in range(2)]
    check(*matmul(dtype_of(name), sizes, tuple(batch), strides=steps))


# Windows

Lay = tuple[loops.Digits, loops.Digits]


def windows(dtype: np.dtype[Any], a: Lay | None, b: Lay | None, sizes: Sequence[int]) -> Any:
    """out = a @ b of operands that lie by digits, in memory that just holds them."""
    m, n, k = sizes
    c, memory = matmul(dtype, (m, n, k))
    found = []
    for number, lay in enumerate((a, b)):
        if lay is None:
            found.append((c.a, c.b)[number])
            continue
        places = np.add.outer(*map(loops.offsets, lay))
        data = draw(int(places.max() - places.min()) + 1, dtype)
        found.append(operand(memory, data, -int(places.min()), (), 0, 0, lay))
    return Contraction((), m, n, k, *found, c.epilogue), memory


IMAGE: Lay = (((2, 600), (6, 60), (8, 5)), ((3, 60), (3, 5), (5, 1)))  # 3 x 3 windows, 5 channels
DEPTH: Lay = (((3, 1000), (13, 40)), ((3, 1000), (4, 40), (24, 1)))  # runs of 24 terms
TURNED: Lay = ((((3, 1000), (4, 40), (24, 1))), ((3, 1000), (13, 40)))
FLIPPED: Lay = (((24, 1),), ((3, -240), (3, -72), (7, 24)))
POINTS: Lay = (((5, 40), (4, 3)), ((3, 20), (2, 2)))


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16", "int8"])
def test_windows(name: str) -> None:
    for first, second in product([IMAGE, DEPTH, TURNED, FLIPPED, POINTS, None], repeat=2):
        sizes = [math.prod(n for n, _ in (first or IMAGE)[0]), 40, 63]
        if first:
            sizes[2] = math.prod(n for n, _ in first[1])
        if second and math.prod(n for n, _ in second[1]) == sizes[2]:
            sizes[1] = math.prod(n for n, _ in second[0])
            check(*windows(dtype_of(name), first, second, sizes))
        elif first and second is None:
            check(*windows(dtype_of(name), first, None, sizes))
            check(*windows(dtype_of(name), None, first, (9, sizes[0], sizes[2])))
            check(*windows(dtype_of(name), None, first, (59, sizes[0], sizes[2])))
            check(*windows(dtype_of(name), None, first, (3, sizes[0], sizes[2])))


DIGIT = st.tuples(st.integers(1, 9), st.sampled_from([-31, -1, 1, 1, 1, 2, 7, 90]))
DIGITS = st.lists(DIGIT, min_size=1, max_size=3).map(tuple)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(DIGITS, DIGITS, DIGITS, st.booleans())
def test_any_windows(m: Any, n: Any, k: Any, swapped: bool) -> None:
    sizes = [math.prod(size for size, _ in each) for each in (m, n, k)]
    first: Lay | None = (m, k)
    second: Lay | None = (n, k)
    if swapped:
        first, second, sizes = None, first, [sizes[1], sizes[0], sizes[2]]
    check(*windows(np.dtype(float32), first, second, sizes))


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("lay", [IMAGE, DEPTH, TURNED, FLIPPED, POINTS])
def test_nothing_beyond_windows_is_read(lay: Lay) -> None:
    m, k = (math.prod(size for size, _ in each) for each in lay)
    for at_end, sides in product((False, True), ((lay, None), (None, lay))):
        sizes = (m, 20, k) if sides[0] else (20, m, k)
        c, memory = windows(np.dtype(float32), *sides, sizes)
        check_between_walls(c, memory, at_end)


@pytest.mark.parametrize("sizes", [(100, 100, 60), (300, 70, 300), (512, 1, 600)])
def test_units_in_any_order(sizes: tuple[int, int, int]) -> None:
    c, memory = matmul(np.dtype(float32), sizes, (2,))
    counts = []

    def alone(units: int) -> list[tuple[int, int]]:
        counts.append(units)
        return [(i, i + 1) for i in rng.permutation(units)]

    check(c, memory, ranges=alone)
    check(c, memory, ranges=lambda units: [(units // 3, units), (0, units // 3)])
    assert min(counts) > 3


def test_packing_and_blocks_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    c, memory = matmul(np.dtype(float32), (45, 75, 300), orders=("km", "kn"))
    for tall, wide, most, pack_b in product((8, 45), (32, 96), (1, 2, 6), (False, True)):
        cut = contract.Tiling(-(-45 // tall), -(-75 // wide), tall, wide, most, pack_b, False)
        monkeypatch.setattr(contract, "tiling", lambda c, core, cut=cut: cut)
        check(c, memory)


def between_walls(data: np.ndarray, at_end: bool) -> np.ndarray:
    """A copy next to a page that cannot be read: any access beyond it ends the process."""
    page = mmap.PAGESIZE
    room = -(-data.nbytes // page) * page
    region = mmap.mmap(-1, room + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for wall in (start, start + page + room):
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), page, 0) == 0
    offset = page + (room - data.nbytes if at_end else 0)
    found = np.frombuffer(region, data.dtype, data.size, offset)
    found[:] = data
    return found


def check_between_walls(c: Contraction, memory: dict[Buffer, np.ndarray], at_end: bool) -> None:
    """The interpreter's bits, from operands that lie next to pages that cannot be read."""
    walled = {buffer: between_walls(data, at_end) for buffer, data in memory.items()}
    expected = {buffer: data.copy() for buffer, data in memory.items()}
    interpret.run(c, expected)
    for bits in BITS:
        run(c, walled, bits)
    out = c.epilogue.stores[0].access.buffer
    assert (as_bits(walled[out]) == as_bits(expected[out])).all()


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX")
@pytest.mark.parametrize("orders", ORDERS)
@pytest.mark.parametrize("name", ["float32", "bfloat16", "int64"])
def test_nothing_beyond_the_operands_is_read(name: str, orders: tuple[str, str]) -> None:
    more = [(20, 1, 9), (17, 43, 258), (270, 43, 258), (59, 230, 258)]
    for sizes, at_end in product([*EDGES, *more], (False, True)):
        c, memory = matmul(dtype_of(name), sizes, orders=orders)
        check_between_walls(c, memory, at_end)


def test_epilogue_reads_and_stores() -> None:
    """relu(acc + bias + residual) over the residual's memory, and acc transposed."""
    m, n, dtype = 37, 50, np.dtype(float32)
    c, memory = matmul(dtype, (m, n, 300))
    bias, residual = Buffer("bias", dtype, n), Buffer("residual", dtype, m * n)
    memory |= {bias: draw(n, dtype), residual: draw(m * n, dtype)}
    place = Access(residual, 0, ((0, n), (1, 1)))
    acc = accumulator(dtype)
    total = acc + loops.load(Access(bias, 0, ((1, 1),))) + loops.load(place)
    turned = store(memory, acc, (n, m))
    turned = Store(Access(turned.access.buffer, 0, ((0, 1), (1, m))), acc)
    stores = (Store(place, loops.maximum(total, 0.0)), turned)
    c.epilogue = Nest((m,), n, ROWS, stores)
    check(c, memory)


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "int32"])
def test_sums_that_are_only_stored(name: str) -> None:
    """Into a part of something larger, whose rest stays; at every edge of tiles and segments."""
    dtype = np.dtype(name)
    for (m, n, k), batch in product([*EDGES, (31, 70, 600), (150, 64, 20)], ((), (2,))):
        c, memory = matmul(dtype, (m, n, k), batch)
        value, pitch = c.epilogue.stores[0].value, n + 3
        out = Buffer("out", dtype, 5 + math.prod(batch) * (m + 2) * pitch)
        memory[out] = draw(out.size, dtype)
        steps = [((m + 2) * pitch) for _ in batch] + [pitch, 1]
        c.epilogue.stores = (Store(Access(out, 5, tuple(enumerate(steps))), value),)
        check(c, memory)


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
def test_sums_of_terms(name: str) -> None:
    """One more row of ones: at every edge of strips, groups, blocks and segments."""
    dtype = dtype_of(name)
    for m, n, k in [
        (9, 33, 300),
        (14, 70, 256),
        (112, 40, 20),
        (113, 9, 520),
        (513, 40, 257),
        (56, 230, 300),
        (59, 230, 300),
    ]:
        for orders in ORDERS[:: 3 if m > 112 else 1]:
            c, memory = matmul(dtype, (m, n, k), orders=orders)
            c.sums = Buffer("sums", c.dtype, c.segments * n)
            memory[c.sums] = draw(c.sums.size, c.dtype)
            check(c, memory)
            halves = {"ranges": lambda units: [(units // 2, units), (0, units // 2)]}
            check(c, memory, **halves)


def test_sizes_and_strides_are_arguments() -> None:
    dtype = np.dtype(float32)
    first = contract.structure(matmul(dtype, (5, 6, 7), (2,))[0])
    other = contract.structure(matmul(dtype, (80, 1, 700), (3,), ("km", "nk"))[0])
    assert first.key == other.key
    assert len(first.values) == len(other.values)
    assert first.key != contract.structure(matmul(np.dtype(np.float64), (5, 6, 7), (2,))[0]).key
