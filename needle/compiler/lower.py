"""What each primitive is at the loop level: one table from op class to lowering. Next: fuse.py.

ELEMENTWISE  op, *x -> expression of y's element from those of the inputs
MOVEMENT     op, index, shapes, sizes -> (which input, where in it, under which condition)
REDUCTION    op class -> kind of reduce
Others are kinds of nests of their own: SPECIAL names them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

import needle.ops as ops
from needle.compiler import math
from needle.compiler.index import (
    Index,
    Loops,
    Sizes,
    as_expr,
    divide,
    fixed,
    linearize,
    reshape_index,
    within,
)  # fmt: skip
from needle.compiler.loops import (
    Expr,
    absolute,
    binary,
    bitcast,
    cast,
    ceil,
    floor,
    literal,
    maximum,
    minimum,
    param,
    rint,
    select,
    sqrt,
    wide,
)  # fmt: skip
from needle.compiler.simplify import Fold
from needle.dtype import FLOATS, DType, bfloat16, bool_, float32, float64
from needle.ops.device import ToDevice
from needle.ops.elementwise import Subtract
from needle.ops.index import ArgSort, Checked, Gather, IndexCopy, ScatterAdd
from needle.ops.movement import After, Unslice
from needle.ops.random import BITS, MULTIPLIERS, ROUNDS, WEYL

uint32, uint64 = np.dtype(np.uint32), np.dtype(np.uint64)


# Arithmetic


def add(op: Any, a: Expr, b: Expr) -> Expr:
    return a | b if a.dtype == bool_ else a + b


def multiply(op: Any, a: Expr, b: Expr) -> Expr:
    return a & b if a.dtype == bool_ else a * b


def scalar(op: Any, x: Expr) -> Expr:
    return param(op.scalar, x.dtype)


def power_scalar(op: Any, x: Expr) -> Expr:
    return x * x if op.scalar == 2 else power(op, x, scalar(op, x))


def power(op: Any, a: Expr, b: Expr) -> Expr:
    return math.pow(a, b) if a.dtype in FLOATS else math.integer_power(a, b)


def sign(op: Any, x: Expr) -> Expr:
    if x.dtype.kind == "u":
        return select(x > 0, literal(1, x.dtype), 0)
    found = select(x > 0, literal(1, x.dtype), select(x < 0, literal(-1, x.dtype), 0))
    return select(x.equals(x), found, x) if x.dtype in FLOATS else found


def relu(op: Any, x: Expr) -> Expr:
    return math.at_least(x, 0) + 0 if x.dtype in FLOATS else maximum(x, 0)


def rounding(function: Callable[[Expr], Expr]) -> Callable[..., Expr]:
    return lambda op, x: function(x) if x.dtype in FLOATS else x


def safe_divisor(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """(the divisor with 0 and, where the quotient would overflow, -1 made 1; whether it was 0)."""
    zero = b.equals(0)
    bad = zero
    if a.dtype.kind == "i":
        bad = zero | (b.equals(-1) & a.equals(np.iinfo(a.dtype).min))
    return select(bad, literal(1, a.dtype), b), zero


def integer_divide(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """(floor(a / b), a - floor(a / b) * b) of integers; both 0 where b is 0."""
    safe, zero = safe_divisor(a, b)
    if a.dtype.kind == "u":
        quotient, rest = binary("udiv", a, safe), binary("urem", a, safe)
    else:
        quotient, rest = binary("sdiv", a, safe), binary("srem", a, safe)
        lower = rest.differs(0) & ((rest < 0) ^ (safe < 0))
        quotient, rest = select(lower, quotient - 1, quotient), select(lower, rest + safe, rest)
    nothing = literal(0, a.dtype)
    return select(zero, nothing, quotient), select(zero, nothing, rest)


def float_remainder(a: Expr, b: Expr) -> Expr:
    """a - floor(a / b) * b, exact, with b's sign."""
    rest = math.fmod(a, b)
    moved = rest + select((b < 0) ^ (rest < 0), b, literal(0, a.dtype))
    return select(rest.differs(0), moved, copysign(rest, b))


def copysign(x: Expr, y: Expr) -> Expr:
    bits = uint32 if x.dtype == float32 else uint64
    top = literal(1 << (31 if bits == uint32 else 63), bits)
    return bitcast((bitcast(x, bits) & ~top) | (bitcast(y, bits) & top), x.dtype)


def remainder(op: Any, a: Expr, b: Expr) -> Expr:
    return float_remainder(a, b) if a.dtype in FLOATS else integer_divide(a, b)[1]


def floor_divide(op: Any, a: Expr, b: Expr) -> Expr:
    if a.dtype not in FLOATS:
        return integer_divide(a, b)[0]
    rest = math.fmod(a, b)
    quotient = (a - rest) / b
    lower = rest.differs(0) & ((b < 0) ^ (rest < 0))
    quotient = select(lower, quotient - 1, quotient)
    whole = floor(quotient)
    whole = select(quotient - whole > 0.5, whole + 1, whole)
    whole = select(quotient.differs(0), whole, copysign(literal(0, a.dtype), a / b))
    return select(b.equals(0), a / b, whole)


def clip(op: Any, x: Expr) -> Expr:
    x = x if op.low is None else bounded(x, op.low, maximum, math.at_least)
    return x if op.high is None else bounded(x, op.high, minimum, math.at_most)


def bounded(x: Expr, bound: Any, function: Callable[..., Expr], quick: Callable[..., Expr]) -> Expr:
    """By the quick one where the bound is neither 0, whose sign would count, nor NaN."""
    plain = x.dtype in FLOATS and bound == bound and bound != 0
    return (quick if plain else function)(x, param(bound, x.dtype))


def compare(name: str) -> Callable[..., Expr]:
    return lambda op, a, b: binary(name, a, b)


def ordered_compare(name: str) -> Callable[..., Expr]:
    """a < b; of bools as integers."""

    def lowered(op: Any, a: Expr, b: Expr) -> Expr:
        if a.dtype == bool_:
            a, b = cast(a, np.dtype(np.uint8)), cast(b, np.dtype(np.uint8))
        return binary(name, a, b)

    return lowered


def extreme(name: str) -> Callable[..., Expr]:
    logical = "or" if name == "max" else "and"
    return lambda op, a, b: binary(logical if a.dtype == bool_ else name, a, b)


ELEMENTWISE: dict[type, Callable[..., Expr]] = {
    ops.EWiseAdd: add,
    Subtract: lambda op, a, b: a - b,
    ops.AddScalar: lambda op, x: add(op, x, scalar(op, x)),
    ops.EWiseMul: multiply,
    ops.MulScalar: lambda op, x: multiply(op, x, scalar(op, x)),
    ops.EWiseDiv: lambda op, a, b: a / b,
    ops.DivScalar: lambda op, x: x / scalar(op, x),
    ops.EWisePow: power,
    ops.PowerScalar: power_scalar,
    ops.Negate: lambda op, x: literal(0, x.dtype) - x if x.dtype not in FLOATS else -x,
    ops.Abs: lambda op, x: x if x.dtype.kind == "u" else absolute(x),
    ops.Sign: sign,
    **dict.fromkeys(
        (ops.Exp, ops.Expm1, ops.Log, ops.Log1p, ops.Rsqrt, ops.Sin, ops.Cos, ops.Tanh, ops.Erf),
        lambda op, x: math.MATH[op.name](x),
    ),
    ops.Sqrt: lambda op, x: sqrt(x),
    ops.ReLU: relu,
    ops.Floor: rounding(floor),
    ops.Ceil: rounding(ceil),
    ops.Round: rounding(rint),
    ops.Remainder: remainder,
    ops.FloorDivide: floor_divide,
    ops.Maximum: extreme("max"),
    ops.Minimum: extreme("min"),
    ops.Equal: compare("eq"),
    ops.NotEqual: compare("ne"),
    ops.Less: ordered_compare("lt"),
    ops.LessEqual: ordered_compare("le"),
    ops.LogicalAnd: lambda op, a, b: a & b,
    ops.LogicalOr: lambda op, a, b: a | b,
    ops.LogicalNot: lambda op, x: ~x,
    ops.Where: lambda op, condition, a, b: select(condition, a, b),
    ops.Clip: clip,
    ops.StopGradient: lambda op, x: x,
    ToDevice: lambda op, x: x,
}


def elementwise(op: Any, dtype: DType, args: Sequence[Expr]) -> Expr:
    """An op's expression; low precision is computed in float32 and rounded once."""
    if type(op) is ops.Cast:
        return convert(args[0], dtype)
    if type(op) in (ops.Where, ops.StopGradient, ToDevice):
        return ELEMENTWISE[type(op)](op, *args)  # moves elements, which need no rounding
    return cast(ELEMENTWISE[type(op)](op, *map(wide, args)), dtype)


def convert(x: Expr, dtype: DType) -> Expr:
    """x in another dtype; what becomes bfloat16 is float32 first."""
    if dtype == bfloat16 and x.dtype not in (float32, bfloat16):
        return cast(cast(x, float32), dtype)
    return cast(wide(x), dtype)


# Random bits


def random_uniform(op: Any, key: Expr, counter: Expr, index: Index, sizes: Sizes) -> Expr:
    """Element `index` of the draw: a word of Philox's block counter + index // 4, as a fraction."""
    double = op.dtype == float64
    block, place = divide(index, 2 if double else 4, sizes)
    words = philox(cast_bits(key), cast_bits(counter + as_expr(block, sizes)))
    which = as_expr(place, sizes)
    if double:
        first, second = (select(which.equals(0), words[n], words[n + 2]) for n in (0, 1))
        whole = cast(first, uint64) << 21 | (cast(second, uint64) >> 11)
        return cast(whole, float64) * (2.0 ** -BITS[float64])
    pairs = [select((which & 1).equals(0), words[n], words[n + 1]) for n in (0, 2)]
    word = select((which & 2).equals(0), *pairs) >> (32 - BITS[op.dtype])
    fraction = cast(cast(word, np.dtype(np.int32)), float32) * (2.0 ** -BITS[op.dtype])
    return cast(fraction, op.dtype)


def cast_bits(x: Expr) -> Expr:
    return bitcast(x, uint64)


def philox(key: Expr, counter: Expr) -> list[Expr]:
    """Four words of a block (needle/ops/random.py), uint32; the counter's upper half is 0."""
    low = literal(0xFFFFFFFF, uint64)
    words = [counter & low, counter >> 32] + [literal(0, uint64)] * 2  # 32 bits each, in 64
    k0, k1 = key & low, key >> 32
    first, second = (literal(int(each), uint64) for each in MULTIPLIERS)
    for _ in range(ROUNDS):
        p0, p1 = words[0] * first, words[2] * second
        words = [(p1 >> 32) ^ words[1] ^ k0, p1 & low, (p0 >> 32) ^ words[3] ^ k1, p0 & low]
        k0, k1 = (k0 + int(WEYL[0])) & low, (k1 + int(WEYL[1])) & low
    return [cast(word, uint32) for word in words]


# Movement: (number of the input, index in it, mask) for an index of the output

Source = tuple[int, tuple[Index, ...], Expr | None]


def reshape(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    return [(0, reshape_index(index, op.shape, shapes[0], sizes), None)]


def broadcast(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    shape = shapes[0]
    kept = index[len(index) - len(shape) :]
    return [(0, tuple(fixed(0) if n == 1 else i for i, n in zip(kept, shape, strict=True)), None)]


def after(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    return [(0, index, None)]


def permute(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    return [(0, tuple(index[op.order.index(axis)] for axis in range(len(index))), None)]


def slice_(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    pairs = zip(index, op.ranges, strict=True)
    return [(0, tuple(i * step + start for i, (start, _, step) in pairs), None)]


def flip(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    shape = shapes[0]
    ndim = len(shape)
    axes = range(ndim) if op.axes is None else op.axes
    chosen = {axis % ndim for axis in ((axes,) if isinstance(axes, int) else axes)}
    found = [
        i * -1 + (n - 1) if axis in chosen else i
        for axis, (i, n) in enumerate(zip(index, shape, strict=True))
    ]
    return [(0, tuple(found), None)]


def windows(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    first, *middle, last = index
    count = len(op.size)
    pairs = zip(middle[:count], op.stride, middle[count:], op.dilation, strict=True)
    return [(0, (first, *(o * s + t * d for o, s, t, d in pairs), last), None)]


def both(a: Expr | None, b: Expr | None) -> Expr | None:
    return b if a is None else a if b is None else a & b


def pad(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    found, mask, shape = [], None, shapes[0]
    last = max((axis for axis, pair in enumerate(op.widths) if any(pair)), default=0)
    for axis, (i, n, (before, _)) in enumerate(zip(index, shape, op.widths, strict=True)):
        place, rest = i, 1
        # Of the whole rest, with which the axis can then be one, unless it has stayed apart.
        apart = isinstance(sizes, Loops) and sizes.settled and {*map(type, i.terms)} <= {int}
        if axis == last and not apart:
            place, rest = linearize(index[axis:], shape[axis:]), prod(shape[axis + 1 :])
        mask = both(mask, within(place, before * rest, (before + n) * rest, sizes))
        found.append(i + -before)
    return [(0, tuple(found), mask)]


def unslice(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    found, mask = [], None
    for i, (start, n, step) in zip(index, op.ranges, strict=True):
        stop = start + (n - 1) * step
        low, high = (start, stop) if step > 0 else (stop, start)
        mask = both(mask, within(i, low, high + 1, sizes) if n else literal(False, bool_))
        offset = i + -start if step > 0 else i * -1 + start
        if abs(step) > 1:
            # Outside of the range the quotient is not used; the shift keeps what divides >= 0.
            shift = abs(step) * (abs(start) + 1)
            offset, rest = divide(offset + shift, abs(step), sizes)
            offset = offset + -(shift // abs(step))
            mask = both(mask, as_expr(rest, sizes).equals(0) if rest != fixed(0) else None)
        found.append(offset)
    return [(0, tuple(found), mask)]


def join(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    """Of concatenate: every input, where the coordinate lies in its part."""
    found: list[Source] = []
    start, axis = 0, op.axis % len(index)
    for number, shape in enumerate(shapes):
        mask = within(index[axis], start, start + shape[axis], sizes)
        place = (*index[:axis], index[axis] + -start, *index[axis + 1 :])
        found.append((number, place, mask))
        start += shape[axis]
    return found


def stack(op: Any, index: tuple[Index, ...], shapes: Any, sizes: Sizes) -> list[Source]:
    axis = op.axis % len(index)
    rest = (*index[:axis], *index[axis + 1 :])
    return [
        (number, rest, within(index[axis], number, number + 1, sizes))
        for number in range(len(shapes))
    ]


MOVEMENT: dict[type, Callable[..., list[Source]]] = {
    ops.Reshape: reshape, ops.BroadcastTo: broadcast, ops.Permute: permute, ops.Slice: slice_,
    ops.Flip: flip, ops.Pad: pad, Unslice: unslice, ops.Concatenate: join, ops.Stack: stack,
    After: after, ops.Windows: windows,
}  # fmt: skip
VIEWS = (ops.Reshape, ops.BroadcastTo, ops.Permute, ops.Slice, ops.Flip, ops.Windows, After)


def filler(op: Any, dtype: DType) -> Expr:
    """What stands where no input does."""
    return param(op.value, dtype) if isinstance(op, ops.Pad) else literal(0, dtype)


def push(op: Any, index: tuple[Index, ...], shape: Any, sizes: Sizes) -> Any:
    """The output's index of the element at an index of the input, where each has one; else None."""
    if type(op) is ops.Reshape:
        return reshape_index(index, shape, op.shape, sizes)
    if type(op) is ops.Permute:
        return tuple(index[axis] for axis in op.order)
    return flip(op, index, (shape,), sizes)[0][1] if type(op) is ops.Flip else None


# The rest

REDUCTION: dict[type, str] = {
    ops.Summation: "sum", ops.Max: "max", ops.Min: "min", ops.ArgMax: "argmax",
    ops.ArgMin: "argmin", Fold: "fold",
}  # fmt: skip
SPECIAL: frozenset[type] = frozenset(
    {ops.MatMul, ops.CumSum, ops.RandomUniform, Gather, ScatterAdd, IndexCopy, Checked}
)
HOST: frozenset[type] = frozenset({ArgSort})  # no sensible kernel: called on the host
LOWERED = frozenset({*ELEMENTWISE, ops.Cast, *MOVEMENT, *REDUCTION, *SPECIAL})
