"""Math functions against long doubles, exact arithmetic and C99's special values."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction
from functools import cache
from itertools import count as count_up

import numpy as np
import pytest

from needle.compiler import engine
from needle.compiler.emit import emit, structure
from needle.compiler.interpret import run
from needle.compiler.loops import Access, Buffer, Nest, Store, cast, load, sqrt
from needle.compiler.lower import float_remainder
from needle.compiler.math import MATH, TWO_OVER_PI, fmod, integer_power
from needle.compiler.target import host
from needle.dtype import float32, float64, int8, int32, int64, uint8
from needle.ops.elementwise import integer_power as numpy_power

UNARY = ("exp", "expm1", "log", "log1p", "tanh", "sin", "cos", "erf", "rsqrt")
RANGES = {  # where a function is neither trivial nor constant
    "exp": (-104, 89), "expm1": (-17, 89), "log": (0.3, 3), "log1p": (-0.99, 2), "tanh": (-9, 9),
    "sin": (-100, 100), "cos": (-100, 100), "erf": (-4, 4), "sqrt": (-1, 10), "rsqrt": (-1, 10),
    "cast": (-1e10, 1e10),
}  # fmt: skip
EDGES = [
    0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 1.5, 2.5, 1e-5, 1e-30, -1e-30, 1e30,
    -1e30, 2.0**24 + 2, 2.0**53, 88.72, 88.73, -103.9, -104.1, 709.7, 709.8, -745.1, -745.2,
    math.pi / 4, math.pi, math.inf, -math.inf, math.nan,
]  # fmt: skip
precise = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="no long doubles here")


def place(name, dtype, size):
    return Access(Buffer(name, dtype, size), 0, ((0, 1),))


def elementwise(function, *arrays):
    """The nest y[i] = function(x[i], ...), and its memory."""
    arrays = [np.ascontiguousarray(x) for x in arrays]
    sources = [place(f"x{i}", x.dtype, x.size) for i, x in enumerate(arrays)]
    value = function(*map(load, sources))
    out = place("y", value.dtype, arrays[0].size)
    nest = Nest((), arrays[0].size, "rows", (Store(out, value),))
    memory = {x.buffer: array for x, array in zip(sources, arrays, strict=True)}
    memory[out.buffer] = np.zeros(arrays[0].size, value.dtype)
    return nest, memory, out.buffer


def interpreted(function, *arrays):
    nest, memory, out = elementwise(function, *arrays)
    run(nest, memory)
    return memory[out]


def ulps(found, exact):
    """Errors in units of the last place of `exact`, a wider dtype; infinity counts as the number
    after the largest."""
    largest = np.nextafter(np.finfo(found.dtype).max, found.dtype.type(0))
    with np.errstate(all="ignore"):
        beyond = exact.dtype.type(largest) + 2 * np.spacing(largest)
        size = np.minimum(np.abs(exact), largest).astype(found.dtype)
        error = np.clip(found.astype(exact.dtype), -beyond, beyond)
        error = np.abs(error - np.clip(exact, -beyond, beyond)) / np.spacing(size)
    error = np.where(np.isnan(found) & np.isnan(exact), 0, error)
    wrong_sign = (found == 0) & (exact == 0) & (np.signbit(found) != np.signbit(exact))
    return np.where(wrong_sign | np.isnan(error), np.inf, error).astype(float64)


def worst(found, exact, bound, *inputs):
    error = ulps(found, exact)
    at = int(np.argmax(error))
    told = [x[at] for x in inputs]
    assert error[at] <= bound, f"{error[at]} ULP at {told}: {found[at]}, expected {exact[at]}"
    return error[at]


def edges(dtype):
    with np.errstate(all="ignore"):
        limits = np.finfo(dtype)
        more = [limits.max, -limits.max, limits.tiny, limits.smallest_subnormal, -limits.tiny]
        found = np.array([*EDGES, *more], dtype)
        up, down = (np.nextafter(found, dtype.type(way)) for way in (math.inf, -math.inf))
        found = np.concatenate([found, up, down])
    return np.concatenate([found, [-limits.smallest_subnormal]]).astype(dtype)


def samples(name, dtype, count=1 << 16, seed=0):
    """Edges, random bits, and the range that matters."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 256, (count // 2) * dtype.itemsize, np.uint8).view(dtype)
    uniform = rng.uniform(*RANGES[name], count // 4)
    small = np.exp(rng.uniform(-20, 2, count // 4)) * rng.choice([-1, 1], count // 4)
    return np.concatenate([edges(dtype), bits, uniform.astype(dtype), small.astype(dtype)])


def double_erf(x):
    return np.array([math.erf(each) for each in x.tolist()])


def exact_of(name, x):
    """By NumPy, in the wider dtype of x."""
    if name == "rsqrt":
        return 1 / np.sqrt(x)
    return double_erf(x) if name == "erf" else getattr(np, name)(x)


@pytest.mark.parametrize("name", UNARY)
def test_float32_is_within_2_ulp(name):
    x = samples(name, float32)
    with np.errstate(all="ignore"):
        wide = x.astype(np.longdouble if name in ("sin", "cos") else float64)
        exact = exact_of(name, wide)
    worst(interpreted(MATH[name], x), exact, 2, x)


@pytest.mark.parametrize("name", UNARY)
def test_every_4099th_float32_in_machine_code(name):
    """benchmarks/math_error.py takes every one."""
    x = np.arange(0, 1 << 32, 4099, np.int64).astype(np.uint32).view(float32)
    found = compiled(MATH[name], host().vector_bits, x)
    with np.errstate(all="ignore"):
        worst(found, exact_of(name, x.astype(float64)), 2, x)
    if name in ("tanh", "sin", "cos", "erf"):
        assert np.nanmax(np.abs(found)) <= 1


@precise
@pytest.mark.parametrize("name", [name for name in UNARY if name != "erf"])
def test_float64_is_within_2_ulp(name):
    x = samples(name, float64, 1 << 14)
    with np.errstate(all="ignore"):
        exact = exact_of(name, x.astype(np.longdouble))
    worst(interpreted(MATH[name], x), exact, 2, x)


def exact_erf(x):
    """erf(x) to 40 digits: 2 / sqrt(pi) e^(-x^2) (x + 2 x^3 / 3 + 4 x^5 / 15 + ...)."""
    one = 10**60
    z = Fraction(float(x))
    term, total, n = int(z * one), int(z * one), 0
    square = int(2 * z * z * one)
    while term:
        n += 1
        term = term * square // (one * (2 * n + 1))
        total += term
    decay, power, k = one, one, 0
    half = square // 2
    while power:  # e^(x^2)
        k += 1
        power = power * half // (one * k)
        decay += power
    root = math.isqrt(int(pi_digits(60)) * one)
    return Fraction(2 * total * one, decay) / root


def pi_digits(count):
    """pi * 10^count by Machin's formula."""
    one = 10 ** (count + 10)

    def arctan(n):
        total = term = one // n
        k, square = 1, n * n
        while term:
            term //= -square
            k += 2
            total += term // k
        return total

    return (16 * arctan(5) - 4 * arctan(239)) // 10**10


def test_erf_in_float64_is_within_2_ulp():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(0.01, 6, 300), rng.uniform(0.05, 0.4, 300)])
    found = interpreted(MATH["erf"], x)
    for each, y in zip(x, found, strict=True):
        exact = exact_erf(each)
        error = abs(Fraction(float(y)) - exact) / Fraction(float(np.spacing(float(exact))))
        assert error <= 2, (each, float(error))
    dense = samples("erf", float64, 1 << 14)
    assert np.nanmax(ulps(interpreted(MATH["erf"], dense), double_erf(dense))) <= 3  # glibc's is 1


# Large angles


def exact_quarters(x):
    """(quarter turns, the rest in radians as a fraction) of a float's absolute value."""
    digits = 420
    pi = Fraction(pi_digits(digits), 10**digits)
    size = abs(Fraction(float(x)))
    quarters = round(size * 2 / pi)
    return quarters, size - quarters * pi / 2


def series(r, start):
    """The sine (start 1) or cosine (start 0) of a small fraction, to 60 digits."""
    one = 10**70
    z = int(r * one)
    square = z * z // one
    term, total, n = (z, z, 1) if start else (one, one, 0)
    while term:
        term = -term * square // (one * (n + 1) * (n + 2))
        n += 2
        total += term
        if abs(term) <= 1:
            break
    return Fraction(total, one)


def exact_sine(x, more):
    quarters, r = exact_quarters(x)
    quarters += more
    found = series(r, 1 - quarters % 2) * (-1 if quarters & 2 else 1)
    return -found if x < 0 and not more else found


HARD = [
    6381956970095103 * 2.0**797, 5.319372648326541416707296656673541083813475031793921822e255,
    2.0**1023, np.finfo(float64).max, 6411027962775774 * 2.0**-47, 1e22, 1e300, -1e15, 355.0,
    103993.0, math.pi, math.pi / 2, 0.8, 0.99, 1.0, 1.57, 2.0**53 + 2,
]  # fmt: skip


@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
def test_angles_are_reduced_exactly(dtype):
    rng = np.random.default_rng(0)
    with np.errstate(over="ignore"):
        x = np.array(HARD + list(np.exp(rng.uniform(0, 80 if dtype == float32 else 700, 100))))
        x = x.astype(dtype)
    x = x[np.isfinite(x)]
    for name, more in (("sin", 0), ("cos", 1)):
        found = interpreted(MATH[name], x)
        for each, y in zip(x, found, strict=True):
            exact = exact_sine(each, more)
            unit = Fraction(float(np.spacing(dtype.type(abs(float(exact))))))
            error = abs(Fraction(float(y)) - exact) / unit
            assert error <= 2, (name, each, float(error))


def test_the_digits_of_two_over_pi():
    size = 4 * len(TWO_OVER_PI)
    count = 400
    exact = 2 * 10**count * 2**size // pi_digits(count)
    assert int(TWO_OVER_PI, 16) == exact


# Powers


def powers(dtype, count=1 << 12):
    rng = np.random.default_rng(0)
    grid = np.meshgrid(edges(dtype), edges(dtype))
    bits = rng.integers(0, 256, (2, count * dtype.itemsize), np.uint8).view(dtype)
    base = np.exp(rng.uniform(-30, 30, count))
    reach = 700 if dtype == float64 else 90
    near = 1 + rng.standard_normal(count) * 10.0 ** rng.uniform(-8, -1, count)
    pairs = [
        (x.ravel() for x in grid), bits, (base, reach * rng.uniform(-1, 1, count) / np.log(base)),
        (near, reach * rng.uniform(-1, 1, count) / np.log(np.abs(near))),
        (rng.uniform(-20, 20, count), rng.integers(-30, 30, count)),
    ]  # fmt: skip
    found = zip(*pairs, strict=True)
    return [np.concatenate([x.astype(dtype) for x in each]) for each in found]


def test_pow_in_float32():
    a, b = powers(float32)
    with np.errstate(all="ignore"):
        exact = np.power(a.astype(float64), b.astype(float64))
    worst(interpreted(MATH["pow"], a, b), exact, 2, a, b)


@precise
def test_pow_in_float64():
    a, b = powers(float64)
    with np.errstate(all="ignore"):
        exact = np.power(a.astype(np.longdouble), b.astype(np.longdouble))
    worst(interpreted(MATH["pow"], a, b), exact, 2, a, b)


@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
def test_pow_of_small_integers_is_exact(dtype):
    limit = 2 ** (np.finfo(dtype).nmant + 1)
    pairs = [(a, b) for a in range(-50, 50) for b in range(30) if abs(a**b) <= limit]
    a, b = (np.array(each, dtype) for each in zip(*pairs, strict=True))
    found = interpreted(MATH["pow"], a, b)
    assert found.tolist() == [x**y for x, y in pairs]
    exponents = np.arange(np.log2(np.finfo(dtype).smallest_subnormal), np.finfo(dtype).maxexp)
    twos = interpreted(MATH["pow"], np.full(exponents.size, 2, dtype), exponents.astype(dtype))
    assert twos.tolist() == [2.0**each for each in exponents]


@pytest.mark.parametrize("dtype", [int8, int32, int64, uint8], ids=str)
def test_integer_power_wraps_around(dtype):
    rng = np.random.default_rng(0)
    bounds = np.iinfo(dtype)
    bases = [*range(max(-12, bounds.min), 13), bounds.min, bounds.max]
    exponents = [*range(max(-5, bounds.min), 70), bounds.max, bounds.max - 1]
    exponents += rng.integers(0, bounds.max, 50).tolist()
    a, b = (np.array(x.ravel(), dtype) for x in np.meshgrid(bases, exponents))
    found = interpreted(integer_power, a, b)
    size = 8 * dtype.itemsize
    for x, y, z in zip(a.tolist(), b.tolist(), found.tolist(), strict=True):
        want = pow(x, y, 1 << size) if y >= 0 else 0 if abs(x) != 1 else x ** (y % 2)
        assert (z - want) % (1 << size) == 0, (x, y)
    assert np.array_equal(found, numpy_power(a, b))


def test_remainders_are_exact():
    """fmod and Python's %, over all magnitudes of the quotient."""
    for dtype in (float32, float64):
        a, b = powers(dtype, 1 << 10)
        with np.errstate(all="ignore"):
            a, b = np.concatenate([a, b, b * dtype.type(7)]), np.concatenate([b, a, b])
            rest, want = np.fmod(a, b), np.remainder(a, b)
        for function, exact in ((fmod, rest), (float_remainder, want)):
            found = compiled(function, host().vector_bits, a, b)
            np.testing.assert_array_equal(found, exact)
            assert np.array_equal(np.signbit(found[found == 0]), np.signbit(exact[found == 0]))


# The same in machine code


def compiled(function, width, *arrays):
    nest, memory, out = elementwise(function, *arrays)
    name = f"math{width}"
    code = engine.compile_ir(emit(nest, width, name))
    kernel = ctypes.CFUNCTYPE(
        None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p
    )(engine.load([code], [name])[0])
    found = structure(nest)
    pointers = [memory[x].ctypes.data for x in found.buffers]
    args, scratch = np.array([*pointers, *found.values], np.int64), np.zeros(64, np.int64)
    kernel(args.ctypes.data, 0, found.units, scratch.ctypes.data)
    return memory[out]


@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("name", [*UNARY, "pow"])
def test_kernels_compute_the_same_bits(name, dtype):
    count = 1 << 16 if dtype == float32 else 1 << 13
    arrays = powers(dtype, 1 << 11) if name == "pow" else [samples(name, dtype, count, 1)]
    want = interpreted(MATH[name], *arrays)
    bits = np.dtype(f"u{dtype.itemsize}")
    for width in (128, 256, 512):
        found = compiled(MATH[name], width, *arrays)
        same = (found.view(bits) == want.view(bits)) | (np.isnan(found) & np.isnan(want))
        assert same.all(), [x[~same][:3] for x in (*arrays, found, want)]


@pytest.mark.parametrize("dtype", [int8, int64], ids=str)
def test_integer_powers_are_the_same_in_kernels(dtype):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-5, 6, 500, dtype), rng.integers(-3, 100, 500, dtype)
    want = interpreted(integer_power, a, b)
    assert np.array_equal(compiled(integer_power, 256, a, b), want)


# The processor's flags

WATCH = """
declare void @llvm.x86.sse.ldmxcsr(ptr)
declare void @llvm.x86.sse.stmxcsr(ptr)
define i32 @watch(ptr %kernel, ptr %args, i64 %end, ptr %scratch) {
  %mode = alloca i32
  store i32 8064, ptr %mode
  call void @llvm.x86.sse.ldmxcsr(ptr %mode)
  call void %kernel(ptr %args, i64 0, i64 %end, ptr %scratch)
  call void @llvm.x86.sse.stmxcsr(ptr %mode)
  %after = load i32, ptr %mode
  store i32 8064, ptr %mode
  call void @llvm.x86.sse.ldmxcsr(ptr %mode)
  ret i32 %after
}
"""
NUMBERS = count_up()
RAISED = 1 | 4 | 8  # invalid, divide by zero, overflow
FLAGGED = {
    **{name: MATH[name] for name in UNARY},
    "sqrt": sqrt, "pow": MATH["pow"], "fmod": fmod,
    "remainder": float_remainder, "cast": lambda x: cast(cast(x, int32), x.dtype),
}  # fmt: skip


@cache
def watch():
    code = engine.compile_ir(f'target triple = "{host().triple}"' + WATCH)
    return ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 2, ctypes.c_int64, ctypes.c_void_p)(
        engine.load([code], ["watch"])[0]
    )


def watcher(function, width, dtype, count):
    """arrays of 64 elements -> (y, which flags the kernel raised)"""
    arrays = [np.ones(64, dtype) for _ in range(count)]
    nest, memory, out = elementwise(function, *arrays)
    name = f"flagged{next(NUMBERS)}"
    kernel = engine.load([engine.compile_ir(emit(nest, width, name))], [name])[0]
    found = structure(nest)
    pointers = [memory[x].ctypes.data for x in found.buffers]
    args, scratch = np.array([*pointers, *found.values], np.int64), np.zeros(64, np.int64)

    def run(*values):
        for array, value in zip(arrays, values, strict=True):
            array[:] = value
        flags = watch()(kernel, args.ctypes.data, found.units, scratch.ctypes.data)
        return memory[out], flags & RAISED

    return run


@pytest.mark.skipif(not host().is_x86, reason="reads the flags of x86-64 processors")
@pytest.mark.parametrize("width", [128, host().vector_bits])
@pytest.mark.parametrize("dtype", [float32, float64], ids=str)
@pytest.mark.parametrize("name", FLAGGED)
def test_flags_tell_what_became_infinite_or_nan(name, dtype, width):
    """A flag is raised where finite arguments give infinity or NaN. Elsewhere none is, except where
    infinity gives NaN, as IEEE 754 wants it, and by exp(infinity), which clamps it."""
    function = FLAGGED[name]
    if name in ("pow", "fmod", "remainder"):
        arrays = [x[:: 1 if len(x) < 3000 else 5] for x in powers(dtype, 256)]
    else:
        arrays = [np.concatenate([edges(dtype), samples(name, dtype, 2048)])]
    arrays = [x[~np.any([np.isnan(each) for each in arrays], 0)] for x in arrays]
    run = watcher(function, width, dtype, len(arrays))
    finite, quiet = np.all([np.isfinite(x) for x in arrays], 0), []
    wrong = []
    for n, values in enumerate(zip(*arrays, strict=True)):
        y, flags = run(*values)
        became = bool(finite[n]) and not np.isfinite(y[0])
        if not became and (np.isnan(y[0]) or (y[0] == math.inf and name in ("exp", "expm1"))):
            continue
        if (flags != 0) != became:
            wrong.append((*values, y[0], flags))
        if not became:
            quiet.append(n)
    assert not wrong, (len(wrong), wrong[:5])
    rng = np.random.default_rng(0)
    for _ in range(200):  # unlike neighbours
        chosen = rng.choice(quiet, 64)
        assert run(*(x[chosen] for x in arrays))[1] == 0


def test_an_error_of_a_few_ulp_is_seen():
    x = samples("exp", float32, 1 << 10)
    with np.errstate(all="ignore"):
        exact = np.exp(x.astype(float64))
        off = np.nextafter(exact.astype(float32), float32.type(0))
        off = np.nextafter(np.nextafter(off, float32.type(0)), float32.type(0))
    with pytest.raises(AssertionError, match="ULP at"):
        worst(off, exact, 2, x)
