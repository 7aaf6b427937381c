"""The interpreter against loops written by hand, exact arithmetic and NumPy."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from needle.compiler import interpret
from needle.compiler.interpret import fma, run
from needle.compiler.loops import (
    Access,
    Buffer,
    Contraction,
    HostCall,
    Nest,
    Operand,
    Scatter,
    Store,
    axis,
    binary,
    bitcast,
    cast,
    expr,
    literal,
    load,
    param,
    select,
    unary,
)  # fmt: skip
from needle.dtype import (
    DTYPES,
    LOW_PRECISION,
    bfloat16,
    bool_,
    float16,
    float32,
    float64,
    int8,
    int32,
    int64,
    uint8,
)
from needle.ops.index import ArgSort
from needle.ops.order import sum_columns, sum_rows

EDGES = [0.0, -0.0, 1.0, -1.0, 1.5, 3e-45, -1e-40, 1e-38, 3.4e38, np.inf, -np.inf, np.nan, 2.0**24]


def random_floats(rng, dtype, size):
    """Floats of all magnitudes: random bits, and edges."""
    bits = rng.integers(0, 256, size * dtype.itemsize, np.uint8).view(dtype).copy()
    edges = rng.choice(np.array(EDGES, dtype), size)
    return np.where(rng.random(size) < 0.2, edges, bits)


def line(name, x):
    """A flat buffer that holds an array, and its memory."""
    x = np.asarray(x)
    return Buffer(name, x.dtype, x.size), x.ravel().copy()


def apply(function, *arrays):
    """function(*loads) over flat arrays by a nest."""
    memory = dict(line(f"x{i}", x) for i, x in enumerate(arrays))
    value = function(*(load(Access(x, 0, ((0, 1),))) for x in memory))
    out = Buffer("y", value.dtype, arrays[0].size)
    memory[out] = np.zeros(out.size, out.dtype)
    run(Nest((), out.size, "rows", (Store(Access(out, 0, ((0, 1),)), value),)), memory)
    return memory[out]


def same(a, b):
    """Equal bits, all NaNs as one value."""
    a, b = np.asarray(a), np.asarray(b)
    bits = np.dtype(f"u{a.itemsize}")
    equal = (a.view(bits) == b.view(bits)) | ((a != a) & (b != b))
    return a.dtype == b.dtype and a.shape == b.shape and bool(equal.all())


# Fused multiply-add


def rounded(x: Fraction, dtype) -> np.ndarray:
    """A number rounded to nearest even by its definition; a zero is +0."""
    bits, least = (24, -149) if dtype == float32 else (53, -1074)
    if not x:
        return dtype.type(0)
    top = x.numerator.bit_length() - x.denominator.bit_length()
    top -= abs(x) < Fraction(2) ** top
    unit = max(top - bits + 1, least)
    whole = round(abs(x) / Fraction(2) ** unit)  # Python rounds halves to even
    limit = 128 if dtype == float32 else 1024
    found = np.inf if whole >= 2 ** (limit - unit) else float(whole * Fraction(2) ** unit)
    return dtype.type(-found if x < 0 else found)


@pytest.mark.parametrize("dtype", [float32, float64])
def test_fma_is_rounded_once(dtype):
    rng = np.random.default_rng(1)
    count = 4000
    a, b, c = (random_floats(rng, dtype, count) for _ in range(3))
    with np.errstate(all="ignore"):
        near = -(a * b)  # cancels the product, so that its rounding error is what is left
        c = np.where(rng.random(count) < 0.3, near, c)
        c = np.where(rng.random(count) < 0.3, near * dtype.type(0.5), c)
        found = fma(a, b, c)
        plain = a * b + c
    for x, y, z, got, rough in zip(a, b, c, found, plain, strict=True):
        exact = np.isfinite([x, y, z]).all() and x and y
        want = z if np.isfinite([x, y]).all() and np.isinf(z) else rough
        if exact:
            value = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            want = rounded(value, dtype)
            if value and not want:
                want = np.copysign(want, -1 if value < 0 else 1)
        assert same(got, want), (x, y, z)


def test_fma_in_float32_is_not_rounded_twice():
    # 1 + 2^-23 + 2^-24 - 2^-70: float64 rounds it to a tie of float32
    a, b, c = (np.float32([x]) for x in (1 + 2**-23, 2**-24 - 2**-47, 1 + 2**-23))
    assert fma(a, b, c)[0] == c[0]


# Elements


def test_arithmetic_follows_ieee():
    rng = np.random.default_rng(2)
    x, y = (random_floats(rng, float32, 2000) for _ in range(2))
    with np.errstate(all="ignore"):
        assert same(apply(lambda a, b: a + b * 2, x, y), x + y * np.float32(2))
        assert same(apply(lambda a, b: a / b, x, y), x / y)
        assert same(apply(lambda a, b: binary("frem", a, b), x, y), np.fmod(x, y))
        assert same(apply(lambda a: unary("rint", a), x), np.rint(x))
        assert same(apply(lambda a: unary("sqrt", a), x), np.sqrt(x))
    assert same(apply(lambda a, b: a < b, x, y), x < y)
    assert same(apply(lambda a, b: a.differs(b), x, y), x != y)


def test_maximum_and_minimum_order_zeros_and_keep_nan():
    x = np.float32([0.0, -0.0, -0.0, np.nan, 1, 2])
    y = np.float32([-0.0, 0.0, -0.0, 1, np.nan, 3])
    assert same(
        apply(lambda a, b: binary("max", a, b), x, y), np.float32([0, 0, -0.0, *2 * [np.nan], 3])
    )
    assert same(
        apply(lambda a, b: binary("min", a, b), x, y),
        np.float32([-0.0, -0.0, -0.0, *2 * [np.nan], 2]),
    )


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("dtype", [int8, int32, int64, uint8], ids=str)
def test_integers_wrap_around_and_divide_like_c(dtype):
    rng = np.random.default_rng(3)
    bounds, width = np.iinfo(dtype), 8 * dtype.itemsize
    a = rng.integers(bounds.min, bounds.max, 500, dtype, endpoint=True)
    b = rng.integers(max(bounds.min, -9), 9, 500, dtype)
    b[b == 0] = 3
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]

    def exact(values):
        mask = (1 << width) - 1
        return np.array([v & mask for v in values], f"u{dtype.itemsize}").view(dtype)

    big = 1 << width
    for op, function in {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y,
        "xor": lambda x, y: x ^ y, "udiv": lambda x, y: (x % big) // (y % big),
        "urem": lambda x, y: (x % big) % (y % big),
        "sdiv": truncated, "srem": lambda x, y: x - truncated(x, y) * y,
        "max": max, "min": min,
    }.items():  # fmt: skip
        if dtype == uint8 and op[0] == "s" and op != "sub":
            continue
        found = apply(lambda p, q, op=op: binary(op, p, q), a, b)
        assert same(found, exact(function(*pair) for pair in pairs)), op
    for op, function in {
        "shl": lambda x: x << 3, "lshr": lambda x: (x % big) >> 3, "ashr": lambda x: x >> 3,
    }.items():  # fmt: skip
        if (dtype, op) != (uint8, "ashr"):
            found = apply(lambda p, op=op: binary(op, p, 3), a)
            assert same(found, exact(function(x) for x, _ in pairs)), op


def test_casts_saturate_and_round_to_even():
    x = np.float32([1.9, -1.9, 300, -300, np.nan, np.inf, -np.inf, 3e9])
    assert same(apply(lambda a: cast(a, int8), x), np.int8([1, -1, 127, -128, 0, 127, -128, 127]))
    want = np.int32([1, -1, 300, -300, 0, 2**31 - 1, -(2**31), 2**31 - 1])
    assert same(apply(lambda a: cast(a, int32), x), want)
    unsigned = np.dtype(np.uint32)
    assert apply(lambda a: cast(a, unsigned), x).tolist()[-2:] == [0, 3_000_000_000]
    assert apply(lambda a: cast(a, bool_), np.float32([0, -0.0, np.nan, 1e-45])).tolist() == [
        False, False, True, True,
    ]  # fmt: skip
    assert same(apply(lambda a: cast(a, int8), np.int64([300, -129])), np.int8([44, 127]))


def test_bfloat16_is_float32_rounded_to_even():
    rng = np.random.default_rng(4)
    x = rng.integers(0, 2**32, 5000, np.uint32)
    x[:1000] = (x[:1000] & 0xFFFF0000) | 0x8000  # ties
    x = x.view(np.float32)
    bits = x.view(np.uint32).astype(np.uint64)
    kept = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).view(bfloat16)
    want = np.where(np.isnan(x), bfloat16.type(np.nan), kept)
    assert same(apply(lambda a: cast(a, bfloat16), x), want)
    back = apply(lambda a: cast(a, float32), want)
    assert same(back, (want.view(np.uint16).astype(np.uint32) << 16).view(np.float32))


def test_bits_and_choices():
    x = np.float32([1.0, -0.0, np.nan])
    assert apply(lambda a: bitcast(a, np.uint32) >> 31, x).tolist() == [0, 1, 0]
    found = apply(lambda a: select(a.equals(a), a + 1, -1), x)
    assert same(found, np.float32([2, 1, -1]))


# Loops


def filled(shape, dtype=float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def test_strides_offsets_and_broadcasting():
    x, row = filled((3, 5)), filled(4)
    a, b, y = Buffer("a", float32, 15), Buffer("b", float32, 4), Buffer("y", float32, 20)
    memory = {a: x.ravel(), b: row, y: np.zeros(20, np.float32)}
    # y[i, j] = a[2 - i, j + 1] + b[j]
    value = load(Access(a, 11, ((0, -5), (1, 1)))) + load(Access(b, 0, ((1, 1),)))
    run(Nest((3,), 4, "rows", (Store(Access(y, 2, ((0, 6), (1, 1))), value),)), memory)
    found = memory[y][2:].reshape(3, 6)[:, :4]
    assert same(found, x[::-1, 1:] + row)
    assert memory[y][:2].tolist() == [0, 0]


def test_in_place_and_two_stores():
    a, y = Buffer("a", float64, 6), Buffer("y", float64, 6)
    x = filled(6, float64)
    memory = {a: x.copy(), y: np.zeros(6)}
    here = Access(a, 0, ((0, 1),))
    value = load(here) * 2
    swap = load(Access(a, 5, ((0, -1),)))
    run(Nest((), 6, "rows", (Store(here, value), Store(Access(y, 0, ((0, 1),)), swap))), memory)
    assert same(memory[a], x * 2)
    assert same(memory[y], x[::-1])


def test_a_masked_load_reads_nothing():
    a, y = Buffer("a", float32, 3), Buffer("y", float32, 7)
    memory = {a: np.float32([1, 2, 3]), y: np.zeros(7, np.float32)}
    i = axis(0)
    inside = (i >= param(2, int64)) & (i < param(5, int64))
    out = Access(y, 0, ((0, 1),))
    run(Nest((), 7, "rows", (Store(out, load(Access(a, -2, ((0, 1),)), inside)),)), memory)
    assert memory[y].tolist() == [0, 0, 1, 2, 3, 0, 0]
    outside = Nest((), 7, "rows", (Store(out, load(Access(a, -2, ((0, 1),)))),))
    with pytest.raises(AssertionError, match="read at"):
        run(outside, memory)


def test_a_gather_checks_its_indices():
    a, index, y = Buffer("a", float32, 4), Buffer("i", int64, 3), Buffer("y", float32, 3)
    memory = {a: np.float32([1, 2, 3, 4]), index: np.array([0, -1, 2]), y: np.zeros(3, np.float32)}
    place = expr("check", (load(Access(index, 0, ((0, 1),))),), int64, (4, 7))
    value = load(Access(a, 0, (), ((place, 1),)))
    nest = Nest((), 3, "rows", (Store(Access(y, 0, ((0, 1),)), value),))
    run(nest, memory)
    assert memory[y].tolist() == [1, 4, 3]
    memory[index][1] = -5
    with pytest.raises(IndexError, match=r"check 7: expected an index within \[-4, 4\).* -5"):
        run(nest, memory)


def test_empty_loops_store_nothing():
    y = Buffer("y", float32, 2)
    memory = {y: np.float32([7, 7])}
    run(Nest((0,), 2, "rows", (Store(Access(y, 0, ((1, 1),)), literal(1, float32)),)), memory)
    run(Nest((2,), 0, "rows", (Store(Access(y, 0, ((0, 1),)), cast(axis(1), float32)),)), memory)
    assert memory[y].tolist() == [7, 7]
    total = expr("reduce", (cast(axis(1), float32),), float32, "sum")
    run(Nest((2,), 0, "rows", (Store(Access(y, 0, ((0, 1),)), total),)), memory)
    assert memory[y].tolist() == [0, 0]


# Reductions


def reduced(kind, x, order, dtype=None):
    """x reduced over its last (rows) or first (columns) axis."""
    outer, inner = x.shape if order == "rows" else x.shape[::-1]
    strides = ((0, inner), (1, 1)) if order == "rows" else ((0, 1), (1, outer))
    a = Buffer("a", x.dtype, x.size)
    dtype = dtype or x.dtype
    y = Buffer("y", dtype, outer)
    memory = {a: x.ravel(), y: np.zeros(outer, dtype)}
    value = expr("reduce", (load(Access(a, 0, strides)),), dtype, kind)
    run(Nest((outer,), inner, order, (Store(Access(y, 0, ((0, 1),)), value),)), memory)
    return memory[y]


def halved(parts):
    parts = list(parts)
    while len(parts) > 1:
        half = (len(parts) + 1) // 2
        parts = [
            parts[i] + parts[i + half] if i + half < len(parts) else parts[i] for i in range(half)
        ]
    return parts[0]


@pytest.mark.parametrize("size", [1, 31, 33, 4096, 4100, 9000])
def test_sums_follow_the_order(size):
    x = filled((2, size))
    want = []
    for row in x:
        chunks = []
        for start in range(0, size, 4096):
            lanes = [np.float32(0)] * 32
            for i, each in enumerate(row[start : start + 4096]):
                lanes[i % 32] = lanes[i % 32] + each
            chunks.append(halved(lanes))
        want.append(halved(chunks))
    assert same(reduced("sum", x, "rows"), np.float32(want))
    assert same(sum_rows(x), np.float32(want))
    columns = []
    for column in x:
        parts = []
        for start in range(0, size, 256):
            total = np.float32(0)
            for each in column[start : start + 256]:
                total = total + each
            parts.append(total)
        columns.append(halved(parts))
    assert same(reduced("sum", np.ascontiguousarray(x.T), "columns"), np.float32(columns))
    assert same(sum_columns(x.T), np.float32(columns))
    assert same(reduced("fold", x, "rows"), np.float32([halved(row) for row in x]))


def test_extremes():
    x = np.float32(
        [[1, 5, 5, 2], [-0.0, 0.0, -0.0, -0.0], [3, np.nan, 9, np.nan], [0.0, -0.0, 0, 0]]
    )
    nan = np.nan
    for order, rows in (("rows", x), ("columns", np.ascontiguousarray(x.T))):
        assert same(reduced("max", rows, order), np.float32([5, 0.0, nan, 0]))
        assert same(reduced("min", rows, order), np.float32([1, -0.0, nan, -0.0]))
        assert reduced("argmax", rows, order, int64).tolist() == [1, 0, 1, 0]
        assert reduced("argmin", rows, order, int64).tolist() == [0, 0, 1, 0]


def test_a_reduction_feeds_the_loop_after_it():
    x = filled((3, 50), float64)
    a, y = Buffer("a", float64, 150), Buffer("y", float64, 150)
    memory = {a: x.ravel(), y: np.zeros(150)}
    here = ((0, 50), (1, 1))
    value = load(Access(a, 0, here))
    centred = value - expr("reduce", (value,), float64, "sum") * (1 / 50)
    energy = expr("reduce", (centred * centred,), float64, "sum")
    run(
        Nest((3,), 50, "rows", (Store(Access(y, 0, here), centred / unary("sqrt", energy)),)),
        memory,
    )
    want = x - x.mean(1, keepdims=True)
    want /= np.linalg.norm(want, axis=1, keepdims=True)
    np.testing.assert_allclose(memory[y].reshape(3, 50), want, rtol=0, atol=1e-14)


def test_scan_is_a_running_sum():
    x = filled((5, 3))
    x[0, 0] = -0.0
    a, y = Buffer("a", float32, 15), Buffer("y", float32, 15)
    memory = {a: x.ravel(), y: np.zeros(15, np.float32)}
    here = ((0, 1), (1, 3))
    value = load(Access(a, 0, here))
    run(
        Nest((3,), 5, "columns", (Store(Access(y, 0, here), expr("scan", (value,), float32)),)),
        memory,
    )
    total, want = x[0].copy(), [x[0].copy()]
    for row in x[1:]:
        total = total + row
        want.append(total)
    assert same(memory[y].reshape(5, 3), np.stack(want))


# Contractions and scatters


@pytest.mark.parametrize("dtype", [float32, float64, bfloat16, float16, int32], ids=str)
def test_contraction(dtype):
    batch, m, n, k = 2, 3, 4, 300
    x, w, bias = filled((batch, m, k)), filled((k, n), seed=1), filled(n, seed=2)
    x, w = ((each * (9 if dtype == int32 else 1)).astype(dtype) for each in (x, w))
    wide = float32 if dtype in LOW_PRECISION else dtype
    a, b = Buffer("a", dtype, x.size), Buffer("b", dtype, w.size)
    c, y = Buffer("c", wide, n), Buffer("y", dtype, batch * m * n)
    bias = bias.astype(wide)
    memory = {a: x.ravel(), b: w.ravel(), c: bias, y: np.zeros(y.size, dtype)}
    value = cast(expr("acc", (), wide) + load(Access(c, 0, ((2, 1),))), dtype)
    place = Access(y, 0, ((0, m * n), (1, n), (2, 1)))
    epilogue = Nest((batch, m), n, "rows", (Store(place, value),))
    run(Contraction((batch,), m, n, k, Operand(a, 0, (m * k,), k, 1),
                    Operand(b, 0, (0,), 1, n), epilogue), memory)  # fmt: skip
    found = memory[y].reshape(batch, m, n)
    x, w = x.astype(wide), w.astype(wide)
    if dtype == int32:
        assert same(found, x @ w + bias)
        return
    want = np.zeros((batch, m, n), wide)
    for place in np.ndindex(batch, m, n):
        total = None
        for start in (0, 256):
            part = wide.type(0)
            for i in range(start, min(start + 256, k)):
                p, q = Fraction(float(x[(*place[:2], i)])), Fraction(float(w[i, place[2]]))
                part = rounded(p * q + Fraction(float(part)), wide)
            total = part if total is None else total + part
        want[place] = total
    assert same(found, (want + bias).astype(dtype))


def test_a_contraction_over_nothing_is_zero():
    a, b, y = Buffer("a", float32, 0), Buffer("b", float32, 0), Buffer("y", float32, 6)
    memory = {a: np.zeros(0, np.float32), b: np.zeros(0, np.float32), y: np.ones(6, np.float32)}
    store = Store(Access(y, 0, ((0, 3), (1, 1))), expr("acc", (), float32))
    nest = Contraction((), 2, 3, 0, Operand(a, 0, (), 0, 1), Operand(b, 0, (), 0, 1),
                       Nest((2,), 3, "rows", (store,)))  # fmt: skip
    run(nest, memory)
    assert memory[y].tolist() == [0] * 6


def test_scatter_adds_in_order():
    lead, places, rows, trail = 2, 7, 3, 2
    x = filled((lead, places, trail))
    index = np.array([0, 2, 0, -1, 0, 2, 0])
    a, i, y = Buffer("a", float32, x.size), Buffer("i", int64, 7), Buffer("y", float32, 12)
    memory = {a: x.ravel(), i: index, y: np.full(12, 9, np.float32)}
    row = expr("check", (load(Access(i, 0, ((1, 1),))),), int64, (rows, 0))
    value = load(Access(a, 0, ((0, places * trail), (1, trail), (2, 1))))
    run(Scatter(lead, places, rows, trail, row, value, y), memory)
    want = np.zeros((lead, rows, trail), np.float32)
    for at, target in enumerate(index):
        want[:, target] += x[:, at]
    assert same(memory[y].reshape(want.shape), want)
    memory[i][3] = 3
    with pytest.raises(IndexError, match="check 0"):
        run(Scatter(lead, places, rows, trail, row, value, y), memory)


def test_scatter_with_a_base_writes_the_last():
    lead, places, rows, trail = 2, 4, 3, 2
    x, base, index = filled((lead, places, trail)), filled((lead, rows, trail)), [0, 2, 0, 2]
    a, b = Buffer("a", float32, x.size), Buffer("b", float32, base.size)
    i, y = Buffer("i", int64, places), Buffer("y", float32, base.size)
    memory = {a: x.ravel(), b: base.ravel(), i: np.array(index), y: np.full(12, 9, np.float32)}
    row = load(Access(i, 0, ((1, 1),)))
    value = load(Access(a, 0, ((0, places * trail), (1, trail), (2, 1))))
    run(Scatter(lead, places, rows, trail, row, value, y, (), b), memory)
    want = np.stack([x[:, 2], base[:, 1], x[:, 3]], 1)
    assert same(memory[y].reshape(want.shape), want)


def test_a_host_call_gives_arrays_to_an_op():
    x, y = Buffer("x", float32, 6), Buffer("y", int64, 6)
    memory = {x: np.float32([3, 1, 2, 4, 6, 5]), y: np.zeros(6, np.int64)}
    run(HostCall(ArgSort(1), ((x, (2, 3)),), ((y, (2, 3)),)), memory)
    assert memory[y].tolist() == [1, 2, 0, 0, 2, 1]


def test_every_dtype_loads_and_stores():
    for dtype in sorted(DTYPES, key=str):
        x = np.arange(5).astype(dtype)
        assert same(apply(lambda a: a, x), x)


def test_a_wrong_rounding_is_seen(monkeypatch):
    monkeypatch.setattr(interpret, "odd_sum", lambda a, b: a + b)
    with pytest.raises(AssertionError):
        test_fma_in_float32_is_not_rounded_twice()
