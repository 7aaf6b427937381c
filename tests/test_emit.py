"""Native nests against NumPy on whole grids: the same bits for every vector width and division of
units."""

from __future__ import annotations

import ctypes
import re

import numpy as np
import pytest

from needle.compiler import engine, loops
from needle.compiler.emit import Slots, emit, emit_tile, structure
from needle.compiler.loops import (
    COLUMNS,
    ROWS,
    Access,
    Buffer,
    Nest,
    Scatter,
    Store,
    axis,
    binary,
    bitcast,
    cast,
    expr,
    fma,
    literal,
    load,
    maximum,
    minimum,
    param,
    rare,
    select,
    sqrt,
    unary,
)  # fmt: skip
from needle.dtype import (
    FLOATS,
    INTEGERS,
    bfloat16,
    bool_,
    float16,
    float32,
    float64,
    int8,
    int16,
    int32,
    int64,
    uint8,
)  # fmt: skip
from needle.dtype import cast as cast_array
from needle.ops.order import fold, sum_columns, sum_rows

WIDTHS = (128, 256, 512)
KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
NUMERIC = (float32, float64, int8, int16, int32, int64, uint8)
ALL = (*NUMERIC, float16, bfloat16, bool_)
WIDE = (bool_, int8, bfloat16, float32, float64)  # one for each way to lie in memory
LOADED: dict[tuple[str, int], int] = {}
uint32, uint64 = np.dtype(np.uint32), np.dtype(np.uint64)


def compiled(nest, bits):
    key = structure(nest).key, bits
    if key not in LOADED:
        name = f"kernel{len(LOADED)}"
        LOADED[key] = engine.load([engine.compile_ir(emit(nest, bits, name))], [name])[0]
    return KERNEL(LOADED[key])


def arguments(found, arrays):
    values = [each - (1 << 64) if each >> 63 == 1 else each for each in found.values]
    return np.array([*(arrays[x].ctypes.data for x in found.buffers), *values], np.int64)


def launch(nest, arrays, bits, cuts=()):
    """Run the units, cut in pieces, the last piece first; the flags."""
    found = structure(nest)
    args = arguments(found, arrays)
    memory = np.full(found.scratch + 192, 0xAB, np.uint8)
    start = -memory.ctypes.data % 64
    memory[start : start + 64] = 0
    edges = sorted({0, found.units, *(cut for cut in cuts if cut < found.units)})
    for first, last in list(zip(edges, edges[1:], strict=False))[::-1]:
        compiled(nest, bits)(args.ctypes.data, first, last, memory.ctypes.data + start)
    assert np.all(memory[start + 64 + found.scratch :] == 0xAB), "wrote past its scratch"
    return tuple(memory[start : start + 16].view(np.int64))


def outputs(nest, arrays, flags=(0, 0)):
    """What all widths and divisions of the units leave in memory, the same bits."""
    loops.verify(nest)
    first = None
    for bits in WIDTHS:
        for cuts in ((), (1, 2, 5), (3,)) if bits == 256 else ((1,),):
            fresh = {b: x.copy() if b in nest.writes() else x for b, x in arrays.items()}
            assert launch(nest, fresh, bits, cuts) == flags
            found = {b: fresh[b] for b in nest.writes()}
            first = first or found
            for buffer, x in found.items():
                np.testing.assert_array_equal(bare(x), bare(first[buffer]), f"{bits} {cuts}")
    return first


def bare(x):
    """Bits, all NaNs alike."""
    x = np.where(np.isnan(x), np.asarray(np.nan, x.dtype), x) if x.dtype in FLOATS else x
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def same(x, y):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(bare(x), bare(y))


class Memory:
    """Arrays and the buffers that stand for them."""

    def __init__(self):
        self.arrays = {}

    def read(self, x):
        """A compact array's load, over the axes that it has; size 1 is broadcast."""
        return load(self.access(x))

    def access(self, x):
        """x may be a view: the buffer is its base's memory."""
        whole = x
        while isinstance(whole.base, np.ndarray):
            whole = whole.base
        found = next((b for b, y in self.arrays.items() if y is whole), None)
        if found is None:
            found = Buffer(f"b{len(self.arrays)}", whole.dtype, whole.size)
            self.arrays[found] = whole
        offset = (x.ctypes.data - whole.ctypes.data) // x.itemsize
        strides = tuple(
            (a, s // x.itemsize)
            for a, (s, n) in enumerate(zip(x.strides, x.shape, strict=True))
            if n != 1 and s
        )
        return Access(found, offset, strides)

    def write(self, shape, dtype):
        """A fresh output, one element longer, and its access."""
        x = np.full(int(np.prod(shape)) + 1, 77).astype(dtype)
        return x, self.access(x[: np.prod(shape, dtype=int)].reshape(shape))


def data(rng, shape, dtype):
    if dtype == bool_:
        return rng.random(shape) < 0.5
    if dtype in INTEGERS:
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype, endpoint=True)
    return (rng.standard_normal(shape) * 3).astype(dtype)


def run(shape, order, memory, *stores):
    """The outputs of a nest over (*outer, inner), each as written: (array, access), value."""
    found = tuple(Store(access, value) for (_, access), value in stores)
    nest = Nest(tuple(shape[:-1]), shape[-1], order, found)
    after = outputs(nest, memory.arrays)
    results = []
    for (whole, access), _ in stores:
        assert whole[-1] == np.asarray(77).astype(whole.dtype)
        x = after[access.buffer]
        same(x[-1:], whole[-1:])
        results.append(x[:-1])
    return results


# Maps


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_copy(dtype):
    rng = np.random.default_rng(1)
    for size in [*range(71), 200]:
        memory, x = Memory(), data(rng, (size,), dtype)
        (found,) = run((size,), ROWS, memory, (memory.write((size,), dtype), memory.read(x)))
        same(found, x)


@pytest.mark.parametrize("op", ["add", "sub", "mul", "max", "min"])
@pytest.mark.parametrize("dtype", NUMERIC, ids=str)
def test_arithmetic(dtype, op):
    rng, memory = np.random.default_rng(2), Memory()
    x, y = data(rng, (75,), dtype), data(rng, (75,), dtype)
    value = binary(op, memory.read(x), memory.read(y))
    (found,) = run((75,), ROWS, memory, (memory.write((75,), dtype), value))
    table = {"sub": "subtract", "mul": "multiply", "max": "maximum", "min": "minimum"}
    same(found, getattr(np, table.get(op, op))(x, y))


def test_special_floats():
    memory = Memory()
    special = np.array([0.0, -0.0, 1.5, -2.5, np.inf, -np.inf, np.nan, 1e-45, 0.5], np.float32)
    x, y = (np.ascontiguousarray(each.ravel()) for each in np.meshgrid(special, special))
    a, b, n = memory.read(x), memory.read(y), x.size
    values = {
        "div": a / b, "sqrt": sqrt(a), "neg": -a, "abs": abs_(a), "rint": unary("rint", a),
        "floor": unary("floor", a), "ceil": unary("ceil", a), "trunc": unary("trunc", a),
        "max": maximum(a, b), "min": minimum(a, b),
    }  # fmt: skip
    tests = {"lt": a < b, "le": a <= b, "eq": a.equals(b), "ne": a.differs(b)}
    stores = [(memory.write((n,), v.dtype), v) for v in (*values.values(), *tests.values())]
    found = dict(zip((*values, *tests), run((n,), ROWS, memory, *stores), strict=True))
    with np.errstate(all="ignore"):
        expected = {
            "div": x / y, "sqrt": np.sqrt(x), "neg": -x, "abs": np.abs(x), "rint": np.rint(x),
            "floor": np.floor(x), "ceil": np.ceil(x), "trunc": np.trunc(x),
            "lt": x < y, "le": x <= y, "eq": x == y, "ne": x != y,
        }  # fmt: skip
    for name, each in expected.items():
        same(found[name], each)
    same(found["max"], np.where((x == 0) & (y == 0) & ~np.signbit(x), x, np.maximum(x, y)))
    same(found["min"], np.where((x == 0) & (y == 0) & np.signbit(x), x, np.minimum(x, y)))


def abs_(x):
    return unary("abs", x)


def test_fma_rounds_once():
    memory, rng = Memory(), np.random.default_rng(3)
    x, y, z = (rng.standard_normal(100).astype(np.float32) for _ in range(3))
    a, b, c = map(memory.read, (x, y, z))
    once, twice = run((100,), ROWS, memory, (memory.write((100,), float32), fma(a, b, c)),
                      (memory.write((100,), float32), a * b + c))  # fmt: skip
    exact = x.astype(np.longdouble) * y + z
    same(once, exact.astype(np.float32))
    same(twice, x * y + z)
    assert np.any(once != twice)


def test_integer_operations():
    rng, memory = np.random.default_rng(4), Memory()
    x = data(rng, (77,), int32)
    y = rng.integers(1, 31, 77, np.int32)
    a, b = memory.read(x), memory.read(y)
    wide_a, wide_b = bitcast(a, uint32), bitcast(b, uint32)
    values = [
        binary("sdiv", a, b), binary("srem", a, b), binary("udiv", wide_a, wide_b),
        binary("urem", wide_a, wide_b), a << b, a >> b, wide_a >> wide_b, a & b, a | b, a ^ b, ~a,
        -a, abs_(a), maximum(wide_a, wide_b), wide_b < wide_a, cast(wide_a, uint64) * 5_000_000_000,
    ]  # fmt: skip
    values = [bitcast(v, int32) if v.dtype == uint32 else v for v in values]
    values = [bitcast(v, int64) if v.dtype == uint64 else v for v in values]
    stores = [(memory.write((77,), v.dtype), v) for v in values]
    u, w = x.view(np.uint32), y.view(np.uint32)
    with np.errstate(all="ignore"):
        expected = [
            (x.astype(np.float64) / y).astype(np.int32), np.fmod(x, y), (u // w).view(np.int32),
            (u % w).view(np.int32), x << y, x >> y, (u >> w).view(np.int32), x & y, x | y, x ^ y,
            ~x, -x, np.abs(x), np.maximum(u, w).view(np.int32), w < u,
            (u.astype(np.uint64) * np.uint64(5_000_000_000)).view(np.int64),
        ]  # fmt: skip
    for found, each in zip(run((77,), ROWS, memory, *stores), expected, strict=True):
        same(found, each)


@pytest.mark.parametrize("source", ALL, ids=str)
def test_casts(source):
    rng, memory = np.random.default_rng(5), Memory()
    x = data(rng, (300,), source)
    if source in FLOATS:
        x[:9] = [0, -0.0, np.nan, np.inf, -np.inf, 6e4, -6e4, 200.7, 1e-7]
        x[9:90] *= np.asarray(1e3, source)
        x[90:150] *= np.asarray(1e-5, source)
    if source in (float32, float64):
        x[150:152] = [1e19, -1e19]
        x[180:190] = [2.0**31, -(2.0**31), 2.0**63, -(2.0**63), 128, -129, 256, 255.9, -0.9, -1]
    if source == float64:  # ties of float16 and beyond: rounded once, not twice
        x[152:170] = 1 + 2.0**-11 + rng.choice([0, 2.0**-40, -(2.0**-40)], 18)
        x[170:180] = [65519.999999, 65520, 2.0**-25, 2.0**-25 * 1.0000001, 3e38, 4e38, 1e308,
                      5e-324, 2.0**-14 * (1 - 2.0**-12), 1e39]  # fmt: skip
    targets = [each for each in ALL if each != source]
    stores = [(memory.write((300,), t), cast(memory.read(x), t)) for t in targets]
    with np.errstate(all="ignore"):
        for found, target in zip(run((300,), ROWS, memory, *stores), targets, strict=True):
            narrow = target == bfloat16 and source != float32
            expected = cast_array(x.astype(np.float32) if narrow else x, target)
            same(found, expected)


def test_constants_params_and_select():
    rng, memory = np.random.default_rng(6), Memory()
    x = data(rng, (40,), float32)
    a = memory.read(x)
    value = select((a < 0) & param(True, bool_), a * param(-0.1, float32), literal(1.1, float32))
    low = select(a < 1, param(2.5, bfloat16), literal(-1.5, bfloat16))
    half = select(a < 1, param(2.5, float16), literal(-1.5, float16))
    double = cast(a, float64) * param(0.1, float64) + 1e-300
    values = [value, low, half, double, cast(axis(0), float32) * a, param(-7, int64) + axis(0)]
    stores = [(memory.write((40,), v.dtype), v) for v in values]
    found = run((40,), ROWS, memory, *stores)
    same(found[0], np.where(x < 0, x * np.float32(-0.1), np.float32(1.1)))
    same(found[1], np.where(x < 1, 2.5, -1.5).astype(bfloat16))
    same(found[2], np.where(x < 1, 2.5, -1.5).astype(np.float16))
    same(found[3], x.astype(np.float64) * 0.1 + 1e-300)
    same(found[4], np.arange(40, dtype=np.float32) * x)
    same(found[5], np.arange(40) - 7)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_strides(order, dtype):
    """Views of every kind as inputs, and a store into a strided view."""
    rng, memory = np.random.default_rng(7), Memory()
    shape = (3, 37, 5) if order == COLUMNS else (3, 5, 37)
    base = data(rng, (2, *shape[::-1]), dtype)[1]
    views = [
        base.transpose(2, 1, 0), data(rng, shape, dtype)[::-1, ::-1, ::-1],
        np.broadcast_to(data(rng, shape[1:], dtype), shape),
        np.broadcast_to(data(rng, (shape[0], 1, 1), dtype), shape),
        np.broadcast_to(data(rng, (1, shape[1], 1), dtype), shape),
        data(rng, (3, 80, 80), dtype)[:, 1 : 2 * shape[1] : 2, 3 : 3 + shape[2]],
    ]  # fmt: skip
    for view in views:
        out = np.full((2, shape[2], shape[0], shape[1]), 77).astype(dtype)
        target = memory.access(out[1].transpose(1, 2, 0))
        stores = (Store(target, memory.read(view)),)
        found = outputs(Nest(shape[:-1], shape[-1], order, stores), memory.arrays)[target.buffer]
        expected = np.full((2, shape[2], shape[0], shape[1]), 77).astype(dtype)
        expected[1] = view.transpose(2, 0, 1)
        same(found, expected)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_masked_loads_and_gathers(order, dtype):
    """Padding, whose mask guards against addresses outside; and indices from memory."""
    rng, memory = np.random.default_rng(8), Memory()
    rows, columns = 6, 45
    x = data(rng, (rows, columns), dtype)
    place = memory.access(x)
    i, j = axis(0), axis(1)
    if order == COLUMNS:
        i, j = j, i
    shape = (rows + 3, columns + 5)
    shape, strides = (shape, (columns, 1)) if order == ROWS else (shape[::-1], (1, columns))
    strides = tuple(enumerate(strides))
    inside = (i >= 1) & (i < rows + 1) & (j >= 2) & (j < columns + 2)
    padded = load(Access(place.buffer, -columns - 2, strides), inside)
    rows_only = (i >= 1) & (i < rows + 1) & (j < columns)
    whole_rows = load(Access(place.buffer, -columns, strides), rows_only)
    index = rng.integers(0, x.size, shape)
    gathered = load(Access(place.buffer, 0, (), ((memory.read(index), 1),)))
    found = run(shape, order, memory, (memory.write(shape, dtype), padded),
                (memory.write(shape, dtype), whole_rows),
                (memory.write(shape, dtype), gathered))  # fmt: skip
    expected = [np.pad(x, ((1, 2), (2, 3))), np.pad(x, ((1, 2), (0, 5)))]
    for each, result in zip(expected, found, strict=False):
        same(result.reshape(shape), np.ascontiguousarray(each if order == ROWS else each.T))
    same(found[2].reshape(shape), x.ravel()[index])


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_scalar_loads_behind_masks(order):
    """A mask that is the same for all lanes guards a scalar load."""
    rng, memory = np.random.default_rng(9), Memory()
    x, y = data(rng, (4,), float32), data(rng, (9, 40), float32)
    i = axis(0) if order == ROWS else axis(1)
    place = memory.access(x)
    far = load(Access(place.buffer, -(1 << 40), ((i.attr, 1 << 50),)), i < 0)
    near = load(Access(place.buffer, -2, ((i.attr, 1),)), (i >= 2) & (i < 6))
    view = y if order == ROWS else y.T
    (found,) = run(view.shape, order, memory, (memory.write(view.shape, float32),
                                               memory.read(view) + far + near))  # fmt: skip
    expected = y + np.pad(x, (2, 3))[:, None]
    same(found.reshape(view.shape), np.ascontiguousarray(expected if order == ROWS else expected.T))


def test_in_place():
    rng, memory = np.random.default_rng(10), Memory()
    x, y = data(rng, (7, 70), float32), data(rng, (7, 70), float32)
    place = memory.access(x)
    value = load(place) * param(0.5, float32) + memory.read(y)
    nest = Nest((7,), 70, ROWS, (Store(place, value),))
    same(outputs(nest, memory.arrays)[place.buffer], x * np.float32(0.5) + y)
    alias = Buffer("alias", float32, 490)  # two buffers on the same memory
    nest = Nest((7,), 70, ROWS, (Store(Access(alias, 0, place.strides), value),))
    for bits in WIDTHS:
        arrays = {**memory.arrays, place.buffer: x.copy()}
        launch(nest, {**arrays, alias: arrays[place.buffer]}, bits)
        same(arrays[place.buffer], x * np.float32(0.5) + y)


def test_empty_and_single():
    memory, x = Memory(), np.array([3.0], np.float32)
    for shape in ((0,), (0, 5), (5, 0), (2, 0, 3)):
        a = memory.write(shape, float32)
        (found,) = run(shape, ROWS, memory, (a, literal(2, float32)))
        assert found.size == 0
    for order, outer in ((ROWS, ()), (ROWS, (1, 1)), (COLUMNS, (1,))):
        value = memory.read(x.reshape(1)) + 1
        (found,) = run((*outer, 1), order, memory, (memory.write((1,), float32), value))
        same(found, x + 1)


# Reductions


def reduce(kind, x):
    return expr("reduce", (x,), int64 if kind.startswith("arg") else x.dtype, kind)


def reduced(kind, x, order):
    """x reduced over its last axis."""
    if kind == "sum":
        return sum_rows(x) if order == ROWS else sum_columns(np.moveaxis(x, -1, 0))
    if kind == "fold":
        return fold(np.moveaxis(x, -1, 0))
    return getattr(np, kind)(x, axis=-1)


@pytest.mark.parametrize("dtype", [float32, float64, int8, int64, uint8], ids=str)
@pytest.mark.parametrize("order", [ROWS, COLUMNS])
@pytest.mark.parametrize("kinds", [("sum",), ("max", "min"), ("argmax", "fold", "argmin", "sum")])
def test_reductions(kinds, order, dtype):
    rng = np.random.default_rng(11)
    rows = [(3, n) for n in (1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 70)] + [(2, 4100), (1, 13000)]
    columns = [(n, 7) for n in (1, 15, 16, 17, 33, 63, 64, 65, 130)] + [(2, 700), (5, 256)]
    for shape in rows if order == ROWS else columns:
        memory = Memory()
        x = data(rng, shape, dtype)
        if dtype == float32 and shape[1] > 5:
            x[0, 3] = np.nan
        view = x if order == ROWS else np.ascontiguousarray(x.T).T
        values = [reduce(kind, memory.read(view)) for kind in kinds]
        stores = [(memory.write(shape[:1], each.dtype), each) for each in values]
        for found, kind in zip(run(shape, order, memory, *stores), kinds, strict=True):
            same(found, np.asarray(reduced(kind, x, order), found.dtype))


def test_identities():
    """What reductions of nothing give: +0 and the least and greatest."""
    for order in (ROWS, COLUMNS):
        memory = Memory()
        x = memory.read(np.empty((3, 0), np.float32).reshape(3, 0))
        x = load(Access(x.attr.buffer, 0, ((0, 1), (1, 1))))
        stores = [
            (memory.write((3,), float32), reduce(kind, x)) for kind in ("sum", "fold", "max", "min")
        ]
        found = run((3, 0), order, memory, *stores)
        for result, value in zip(found, (0.0, 0.0, -np.inf, np.inf), strict=True):
            same(result, np.full(3, value, np.float32))


def test_ties():
    """argmax takes the first of equal ones, zeros of both signs and infinities included."""
    rng = np.random.default_rng(12)
    for values in ([-np.inf], [0.0, -0.0], [np.nan, np.inf], [-1.0, 1.0, np.nan]):
        x = rng.choice(np.array(values, np.float32), (9, 75))
        memory = Memory()
        kinds = ("argmax", "argmin")
        stores = [(memory.write((9,), int64), reduce(k, memory.read(x))) for k in kinds]
        same(np.stack(run((9, 75), ROWS, memory, *stores)), np.stack([x.argmax(1), x.argmin(1)]))
        memory = Memory()
        stores = [(memory.write((75,), int64), reduce(k, memory.read(x.T))) for k in kinds]
        same(np.stack(run((75, 9), COLUMNS, memory, *stores)), np.stack([x.argmax(0), x.argmin(0)]))


def heavy(x):
    """A value that takes more operations than it is worth to compute again."""
    for number in range(15):
        x = fma(x, literal(0.9, float32), literal(0.01 * number, float32))
    return x


def heavy_array(x):
    for number in range(15):
        x = (x.astype(np.float64) * np.float64(np.float32(0.9))
             + np.float64(np.float32(0.01 * number))).astype(np.float32)  # fmt: skip
    return x


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
@pytest.mark.parametrize("make", [lambda x: x * x, heavy], ids=["light", "heavy"])
def test_several_loops(order, make):
    """Two reductions one after the other, then values and a result per outer point."""
    rng = np.random.default_rng(13)
    model = heavy_array if make is heavy else lambda x: x * x
    for shape in ((4, 10), (3, 77), (2, 4200), (1, 300), (70, 9), (150, 600), (3, 1)):
        x = data(rng, shape, float32)
        weight = data(rng, shape[1:], float32)
        memory = Memory()
        view = x if order == ROWS else np.ascontiguousarray(x.T).T
        y = make(memory.read(view))
        top = reduce("max", y)
        shifted = y - top
        w = memory.read(np.broadcast_to(weight, shape))
        total = reduce("sum", shifted * w)
        wide_out = np.full((2, *view.T.shape), 77, np.float32)
        target = memory.access(wide_out[1].T if order == COLUMNS else wide_out[1].reshape(shape))
        stores = [Store(target, shifted / total), Store(memory.write(shape, bool_)[1], y < top)]
        stores.append(Store(memory.write(shape[:1], float32)[1], total * 2))
        found = outputs(Nest(shape[:1], shape[1], order, tuple(stores)), memory.arrays)
        model_y = model(x)
        model_shift = model_y - model_y.max(1, keepdims=True)
        model_total = reduced("sum", model_shift * weight, order)
        with np.errstate(all="ignore"):
            divided = model_shift / model_total[:, None]
        result = found[target.buffer][1]
        same(result.T if order == COLUMNS else result.reshape(shape), divided)
        below = found[stores[1].access.buffer][:-1].reshape(shape)
        same(below, model_y < model_y.max(1, keepdims=True))
        same(found[stores[2].access.buffer][:-1], model_total * 2)


def test_whole_sum_without_outer_axes():
    rng, memory = np.random.default_rng(14), Memory()
    x = data(rng, (10_000,), float32)
    total = reduce("sum", memory.read(x))
    centred = memory.read(x) - total / param(10_000, float32)
    found = run((10_000,), ROWS, memory, (memory.write((), float32), total),
                (memory.write((10_000,), float32), centred))  # fmt: skip
    same(found[0], sum_rows(x)[None])
    same(found[1], x - sum_rows(x) / np.float32(10_000))


def test_reductions_of_what_does_not_vary():
    for order in (ROWS, COLUMNS):
        rng, memory = np.random.default_rng(15), Memory()
        x = data(rng, (5,), float32)
        a = memory.read(np.broadcast_to(x[:, None], (5, 50)))
        ones = reduce("sum", literal(1, float32))
        found = run((5, 50), order, memory, (memory.write((5,), float32), reduce("sum", a) + ones),
                    (memory.write((5,), int64), reduce("sum", axis(1))))  # fmt: skip
        same(found[0], reduced("sum", np.broadcast_to(x[:, None], (5, 50)), order) + 50)
        same(found[1], np.full(5, 49 * 25))


def steep(x):
    """Rare cases, one inside the other, and their shared work."""
    work = heavy(x)
    return rare(x > 1, rare(x > 2, x * x - work, x * work), work + x)


def steep_array(x):
    work = heavy_array(x)
    return np.where(x > 1, np.where(x > 2, x * x - work, x * work), work + x)


@pytest.mark.parametrize("reach", [0.5, 3, 1.02])
@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_rare_cases(order, reach):
    """Computed for elements, for rows, for a parameter; kept for a second loop or not."""
    rng, memory, shape = np.random.default_rng(3), Memory(), (2, 37, 75)
    x = rng.integers(-64, int(64 * reach), shape).astype(np.float32) / 64
    y = rng.integers(-64, int(64 * reach), shape[:-1]).astype(np.float32)[..., None] / 64
    a, b, c = memory.read(x), memory.read(np.broadcast_to(y, shape)), param(1.25, float32)
    first, row, number = steep(a), steep(b), steep(c)
    total = reduce("max", first)
    values = [first - total, row * a, number + a, steep(total) + 1, steep(a - total)]
    found = run(shape, order, memory, *((memory.write(shape, float32), each) for each in values))
    one = steep_array(x)
    top = one.max(-1, keepdims=True)
    expected = [one - top, steep_array(y) * x, steep_array(np.float32(1.25)) + x,
                steep_array(top) + 1 + 0 * x, steep_array(x - top)]  # fmt: skip
    for each, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(each, want.ravel(), 1e-5, 1e-5)
    plain = [strict(each) for each in values]
    again = run(shape, order, memory, *((memory.write(shape, float32), each) for each in plain))
    for each, other in zip(found, again, strict=True):
        same(each, other)


def strict(x):
    """The expression with selects for rare cases."""
    args = tuple(map(strict, x.args))
    return expr("select" if x.op == "rare" else x.op, args, x.dtype, x.attr)


def test_a_rare_case_stands_behind_a_branch():
    memory, x = Memory(), np.ones(64, np.float32)
    a = memory.read(x)
    store = Store(memory.write((64,), float32)[1], rare(a > 2, sqrt(a), a + 1))
    text = emit(Nest((), 64, ROWS, (store,)))
    before, after = text.split("sqrt", 1)
    assert re.search(r"then\d+:\n[^:]*$", before), "the square root is not behind the branch"
    assert re.search(r"= phi <16 x float> \[", after)


def test_scan():
    rng = np.random.default_rng(16)
    for shape in ((3, 5, 40), (2, 300, 70), (1, 0, 9), (1, 1, 1)):
        for dtype in (float32, int32):
            memory, x = Memory(), data(rng, shape, dtype)
            running = expr("scan", (memory.read(np.swapaxes(x, 1, 2)),), dtype)
            out = np.zeros(shape, dtype)
            nest = Nest((shape[0], shape[2]), shape[1], COLUMNS,
                        (Store(memory.access(np.swapaxes(out, 1, 2)), running * 2),))  # fmt: skip
            (found,) = outputs(nest, memory.arrays).values()
            same(found, np.cumsum(x, axis=1, dtype=dtype) * dtype.type(2))


# Checks, scatters, tiles


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_checked_indices(order):
    rng, memory = np.random.default_rng(17), Memory()
    table = data(rng, (11, 33), float32)
    index = rng.integers(-11, 11, 20)
    place = memory.access(table)
    row, column = (0, 1) if order == ROWS else (1, 0)
    shape = (20, 33) if order == ROWS else (33, 20)
    out = np.zeros((20, 33), np.float32)
    target = memory.access(out if order == ROWS else out.T)

    def nest(index):
        source = memory.access(index)
        i = load(Access(source.buffer, 0, ((row, 1),)))
        taken = load(Access(place.buffer, 0, ((column, 1),), ((checked(i, 11, 4), 33),)))
        return Nest(shape[:1], shape[1], order, (Store(target, taken),)), {**memory.arrays}

    same(outputs(*nest(index))[target.buffer], table[index])
    wrong = index.copy()
    wrong[7] = -12
    found = outputs(*nest(wrong), flags=(5, -12))[target.buffer]
    same(found, table[np.where(wrong == -12, 0, wrong)])


def checked(i, size, identifier):
    return expr("check", (i,), int64, (size, identifier))


@pytest.mark.parametrize("order", [ROWS, COLUMNS])
def test_checks_of_lanes(order):
    """The first index out of range is reported; lanes beyond the end are not looked at."""
    rng, memory = np.random.default_rng(18), Memory()
    table = data(rng, (50,), float32)
    for size in (1, 13, 40, 70):
        index = rng.integers(-50, 50, (1, size))
        for wrong in (None, size - 1, size // 2):
            used = index.copy()
            if wrong is not None:
                used[0, wrong] = 50
            view = used if order == ROWS else used.T
            source = memory.access(view)
            i = load(Access(source.buffer, 0, ((1 if order == ROWS else 0, 1),)))
            taken = load(Access(memory.access(table).buffer, 0, (), ((checked(i, 50, 0), 1),)))
            out = memory.write((size,), float32)
            target = Access(out[1].buffer, 0, ((1 if order == ROWS else 0, 1),))
            nest = Nest(view.shape[:1], view.shape[1], order, (Store(target, taken),))
            flags = (0, 0) if wrong is None else (1, 50)
            found = outputs(nest, memory.arrays, flags)[target.buffer][:-1]
            same(found, table[np.where(used[0] == 50, 0, used[0])])


@pytest.mark.parametrize("trail", [1, 5, 16, 77])
@pytest.mark.parametrize("in_place", [True, False])
def test_scatter_with_a_base(trail, in_place):
    rng, memory = np.random.default_rng(23), Memory()
    lead, places, rows = 2, 9, 13
    index = rng.integers(0, rows, places)
    x, base = (data(rng, (lead, n, trail), float32) for n in (places, rows))
    access, start = memory.access(index), memory.access(base)
    target = start.buffer if in_place else memory.access(np.zeros_like(base)).buffer
    row, value = load(Access(access.buffer, 0, ((1, 1),))), memory.read(x)
    nest = Scatter(lead, places, rows, trail, row, value, target, (), start.buffer)
    expected = base.copy()
    for p in range(places):
        expected[:, index[p]] = x[:, p]
    same(outputs(nest, memory.arrays)[target], expected)


@pytest.mark.parametrize("dtype", [float32, int64, float64, int8], ids=str)
@pytest.mark.parametrize("trail", [1, 5, 16, 77])
def test_scatter(dtype, trail):
    rng, memory = np.random.default_rng(19), Memory()
    lead, places, rows = 2, 90, 13
    index = rng.integers(-rows, rows, places)
    x = data(rng, (lead, places, trail), dtype)
    scale = data(rng, (places,), dtype)
    out = np.full((lead, rows, trail), 77).astype(dtype)
    access = memory.access(index)
    row = checked(load(Access(access.buffer, 0, ((1, 1),))), rows, 2)
    value = memory.read(x) * load(Access(memory.access(scale).buffer, 0, ((1, 1),)))
    target = memory.access(out).buffer
    nest = Scatter(lead, places, rows, trail, row, value, target)
    expected = np.zeros_like(out)
    for p in range(places):
        expected[:, index[p]] += x[:, p] * scale[p]
    same(outputs(nest, memory.arrays)[target], expected)
    index[3] = rows
    outputs(nest, memory.arrays, flags=(3, rows))
    empty = Scatter(lead, 0, rows, trail, row, value, target)
    assert not outputs(empty, memory.arrays)[target].any()


def test_tile():
    """An epilogue on parts of a contraction's accumulators."""
    rng, memory = np.random.default_rng(20), Memory()
    batch, m, n = (2, 3), 9, 50
    acc = expr("acc", (), float32)
    bias = memory.read(np.broadcast_to(data(rng, (n,), float32), (*batch, m, n)))
    x = data(rng, (*batch, m, n), float32)
    scale = data(rng, (m,), float32)
    value = maximum((acc + bias) * memory.read(np.broadcast_to(scale[:, None], x.shape)), 0)
    out = np.zeros((*batch, m, n), np.float32)
    turned = np.zeros((*batch, n, m), np.float16)
    stores = (
        Store(memory.access(out), value + memory.read(x)),
        Store(memory.access(np.swapaxes(turned, -1, -2)), cast(value, float16)),
    )
    nest = Nest((*batch, m), n, ROWS, stores)
    arrays = memory.arrays
    bias_array = arrays[bias.attr.buffer]
    whole = data(rng, (*batch, m, n), float32)
    for bits in WIDTHS:
        slots = Slots()
        slots.nest(nest)
        found = slots.structure(0, 0, 0)
        name = f"tile{bits}"
        text = emit_tile(slots, nest, bits, name)
        function = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 6,
                                    ctypes.c_void_p)  # fmt: skip
        call = function(engine.load([engine.compile_ir(text)], [name])[0])
        args = arguments(found, arrays)
        out[:], turned[:] = 0, 0
        for place in range(6):
            for m0, rows in ((0, 4), (4, 5)):
                for n0, columns in ((0, 33), (33, 17)):
                    tile = np.zeros((rows, 70), np.float32)
                    part = whole.reshape(6, m, n)[place, m0 : m0 + rows, n0 : n0 + columns]
                    tile[:, :columns] = part
                    call(args.ctypes.data, tile.ctypes.data, 70, place, m0, rows, n0, columns,
                         args.ctypes.data)  # fmt: skip
        y = np.maximum((whole + bias_array) * scale[:, None], 0)
        same(out, np.where(y == 0, np.float32(0), y) + x)
        same(turned, np.ascontiguousarray(np.swapaxes(y.astype(np.float16), -1, -2)))


# Structure


def add_nest(n, offset=0, stride=1, number=1.5, names="xy", outer=()):
    x, y = (Buffer(each, float32, 1000) for each in names)
    place = Access(x, offset, ((len(outer), stride),))
    value = load(place) + param(number, float32)
    return Nest(outer, n, ROWS, (Store(Access(y, 0, ((len(outer), 1),)), value),))


def test_equal_structures_have_equal_keys():
    first = structure(add_nest(10))
    assert structure(add_nest(99, number=-3, names="ab")).key == first.key
    assert structure(add_nest(10, 7, 2)).key == structure(add_nest(10, 8, 3)).key
    others = [add_nest(10, offset=1), add_nest(10, stride=2), add_nest(10, outer=(3,))]
    keys = {structure(each).key for each in others} | {first.key}
    assert len(keys) == 4
    assert structure(add_nest(130)).units == 3
    in_place = add_nest(10)
    shared = Nest((), 10, ROWS, (Store(in_place.stores[0].value.args[0].attr,
                                       in_place.stores[0].value),))  # fmt: skip
    assert len(structure(shared).buffers) == 1
    assert structure(shared).key != first.key


def test_texts_of_equal_structures_are_equal():
    for bits in WIDTHS:
        assert emit(add_nest(10), bits) == emit(add_nest(99, number=-3, names="ab"), bits)
    text = emit(add_nest(10), 256)
    assert "<8 x float>" in text
    assert not re.search(r"\bfast\b|contract|reassoc", text)


def random_value(rng, memory, shape, depth):
    """A random expression, and its array."""
    if depth == 0 or rng.random() < 0.15:
        x = data(rng, [n if rng.random() < 0.7 else 1 for n in shape], float32)
        return memory.read(np.broadcast_to(x, shape)), x
    a, x = random_value(rng, memory, shape, depth - 1)
    b, y = random_value(rng, memory, shape, depth - 1)
    match rng.integers(8):
        case 0:
            return a + b, x + y
        case 1:
            return a * b, x * y
        case 2:
            return maximum(a, b), np.maximum(x, y)
        case 3:
            return select(a < b, a - b, b), np.where(x < y, x - y, y)
        case 4:
            return cast(cast(a, float16), float32) - b, x.astype(np.float16).astype(np.float32) - y
        case 5:
            return rare(a < b, (a - b) * a, b + a), np.where(x < y, (x - y) * x, y + x)
        case 6:
            total = reduced("sum", np.broadcast_to(x, shape), memory.order)
            return reduce("sum", a) * b, total[..., None] * y
        case _:
            top = np.broadcast_to(x, shape).max(-1, keepdims=True)
            return a - reduce("max", a), x - top


@pytest.mark.parametrize("seed", range(20))
def test_random_nests(seed):
    rng, memory = np.random.default_rng(seed), Memory()
    memory.order = ROWS if seed % 2 else COLUMNS
    shape = tuple(int(rng.choice([1, 2, 3, 17, 40, 70])) for _ in range(rng.integers(2, 4)))
    expected, stores = [], []
    with np.errstate(all="ignore"):
        for _ in range(2):
            value, x = random_value(rng, memory, shape, 4)
            stores.append((memory.write(shape, float32), value))
            expected.append(np.broadcast_to(x, shape))
    for found, x in zip(run(shape, memory.order, memory, *stores), expected, strict=True):
        same(found, x.ravel())
