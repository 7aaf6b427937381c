"""Functions of floats as expressions: exp, log, sin, ... of float32 and float64, without branches
but for rare cases.

Each reduces its argument to a short interval, exactly where that matters, and evaluates a minimax
polynomial there (Remez's algorithm, coefficients rounded one by one and the rest fitted again). The
numbers behind a table are bounds of the polynomial's relative error. Kernels inline these and
nothing optimises them: the number of operations is the cost. Errors are below 2 ULP; NaN,
infinities, signed zeros and subnormals follow C99's annex F. The processor's flags for invalid
operations, division by zero and overflow are raised where finite arguments give infinity or NaN:
`select` does not hide what the side not taken raises, so arguments are cleaned before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf, pi
from typing import Any, NamedTuple

import numpy as np

from needle.compiler import loops
from needle.compiler.loops import Expr, absolute, bitcast, cast, floor, fma, literal, rare, select
from needle.dtype import DType, float32, float64, int32, int64

uint32, uint64 = np.dtype(np.uint32), np.dtype(np.uint64)


class Format(NamedTuple):
    """A binary format of IEEE 754, and what exp, log and erf need to know in it."""

    bits: DType
    signed: DType
    fraction: int  # bits of the significand that are stored
    bias: int
    log2e: float
    ln2: tuple[float, float]  # a number of few bits, and the rest
    largest: float  # e^x is infinite from here on
    smallest: float  # e^x rounds to 0 from here on
    tiny: float  # x^2 vanishes beside x
    far: float  # angles from here on are reduced by many digits of pi

    @property
    def sign(self) -> int:
        return 1 << (8 * self.bits.itemsize - 1)


FORMATS = {
    float32: Format(
        uint32, int32, 23, 127, 1.442695, (0.693145751953125, 1.4286068e-06), 89, -104, 1e-9, 1e5
    ),
    float64: Format(
        uint64, int64, 52, 1023, 1.4426950408889634,
        (0.6931471805601177, -1.7239444525614835e-13), 710, -746, 1e-18, 1e9,
    ),
}  # fmt: skip

# (e^r - 1 - r) / r^2 for |r| < 0.70, of e^r: 2^-25.9, 2^-56.2
EXP = {
    float32: (0.50000036, 0.16666611, 0.041661114, 0.008336245, 0.0014107875, 0.00019602293),
    float64: (
        0.4999999999999992, 0.16666666666666988, 0.04166666666670451, 0.008333333333260723,
        0.0013888888883262776, 0.00019841269898556918, 2.4801590995145358e-05,
        2.7557299069156765e-06, 2.755612052553481e-07, 2.5055216179578196e-08,
        2.1065398102937304e-09, 1.592933966714701e-10,
    ),
}  # fmt: skip
# The same for |r| < 0.35, of e^r - 1: 2^-26.0, 2^-61.4
EXPM1 = {
    float32: (0.49999997, 0.16666542, 0.04166743, 0.008366877, 0.0013871893),
    float64: (
        0.5, 0.16666666666666677, 0.04166666666666658, 0.008333333333321213,
        0.0013888888888941406, 0.00019841269887616668, 2.480158720114167e-05,
        2.7557242337822416e-06, 2.7557383324670635e-07, 2.510980258600948e-08,
        2.088060460908591e-09,
    ),
}  # fmt: skip
# (log(1 + f) - f) / f^2 for |f| < 1/3, of log(1 + f): 2^-25.2, 2^-56.5
LOG = {
    float32: (
        -0.49999937, 0.333332, -0.25007746, 0.20011085, -0.16417106, 0.13996892, -0.15383153,
        0.14021829,
    ),
    float64: (
        -0.49999999999999956, 0.33333333333333176, -0.2500000000003066, 0.20000000000067228,
        -0.16666666660651377, 0.14285714275584438, -0.12500000534609623, 0.11111111871784668,
        -0.09999974062898773, 0.09090876222273156, -0.08334085263753985, 0.07693184778192236,
        -0.07129291183135766, 0.06651777624666774, -0.0640286861938569, 0.06042624298953772,
        -0.045209320438836485, 0.04216061456465161, -0.08722710882690053, 0.08423707947898319,
    ),
}  # fmt: skip
# -log(erfc(a)) / a - 1 for 0 <= a < 3.93, 5.93, of erf(a): 2^-27.8, 2^-55.2
ERF = {
    float32: (
        0.12837917, 0.63661957, 0.1027763, -0.019147819, -0.00016951893, 0.0016756976,
        -0.0006373776, 0.00011886572, -9.3884746e-06,
    ),
    float64: (
        0.12837916709551256, 0.6366197723675898, 0.10277260330135317, -0.019128446993637815,
        -0.0002091948497471907, 0.0016962076511779461, -0.000590132381663383,
        2.5904443932889325e-05, 6.442039967685793e-05, -2.9575223264989274e-05,
        3.1686889009533345e-06, 3.1343551771432853e-06, -2.0386031234611585e-06,
        5.717067886151231e-07, -1.2330117091953329e-08, -6.545714520399888e-08,
        3.449065641082988e-08, -1.0748964177436646e-08, 2.3558085417803723e-09,
        -3.754161727363253e-10, 4.295582727057195e-11, -3.360776358913303e-12,
        1.6139281950456254e-13, -3.5922057885131865e-15,
    ),
}  # fmt: skip
# (sin(r) - r) / r^3 of z = r^2 for |r| < pi/4, of sin(r): 2^-27.9, 2^-57.9
SIN = {
    float32: (-0.16666655, 0.008332188, -0.00019518101),
    float64: (
        -0.1666666666666663, 0.00833333333332184, -0.00019841269829358593,
        2.755731353856098e-06, -2.5050734396011178e-08, 1.589543340453912e-10,
    ),
}  # fmt: skip
# (cos(r) - 1 + z / 2) / z^2 of z = r^2 for |r| < pi/4, of cos(r): 2^-33.0, 2^-63.9
COS = {
    float32: (0.041666646, -0.001388731, 2.4432355e-05),
    float64: (
        0.041666666666666595, -0.0013888888888873325, 2.4801587288983848e-05,
        -2.7557314210176734e-07, 2.0875704291130052e-09, -1.135868463816139e-11,
    ),
}  # fmt: skip
QUARTERS = {  # pi / 2 as sums of truncated numbers
    float32: (1.570796251296997, 7.549789415861596e-08, 5.390302529957765e-15),
    float64: (1.5707963267948966, 6.123233995736765e-17, 1.0828566739219139e-32),
}
# As EXP and LOG, for pow in float32, which computes in float64: 2^-34.0, 2^-38.4
EXP_SHORT = (
    0.5000000071600974, 0.1666666582003101, 0.041666280493465935, 0.008333503764785918,
    0.0013945742919653193, 0.00019789254746596798,
)  # fmt: skip
LOG_SHORT = (
    -0.5000000000108644, 0.33333333182157354, -0.24999999535728598, 0.20000026137898272,
    -0.16666716020225822, 0.14284213606042365, -0.12497797153065612, 0.11150463620648564,
    -0.1004913209287663, 0.0857630323547176, -0.07761032128356606, 0.10888875494882616,
    -0.10393356226648046,
)  # fmt: skip
# (atanh(s) / s - 1 - z / 3) / z^2 * 2 of z = s^2 for |s| < 0.172, of 2 atanh(s): 2^-66.3
ATANH = (
    0.4000000000000227, 0.2857142857009122, 0.22222222521470567, 0.1818178422750462,
    0.15386763938583192, 0.13256660053803032, 0.1319782610158234,
)  # fmt: skip
TWO_THIRDS = (0.6666666666666666, 3.700743415417188e-17)
TWO_OVER_PI = (  # its binary digits
    "A2F9836E4E441529FC2757D1F534DDC0DB6295993C439041FE5163ABDEBBC561B7246E3A424DD2E00649"
    "2EEA09D1921CFE1DEB1CB129A73EE88235F52EBB4484E99C7026B45F7E413991D639835339F49C845F8B"
    "BDF9283B1FF897FFDE05980FEF2F118B5A0A6D1F6D367ECF27CB09B74F463F669E5FEA2D7527BAC7EBE5"
    "F17B3D0739F78A5292EA6BFB5FB11F8D5D08560"
)
LN2 = 0.6931471805599453
HUGE = 2.0**70  # |b log(a)| for any a but 1 is then beyond what exp takes; an even integer


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """c[0] + c[1] x + c[2] x^2 + ... by Horner's rule."""
    found = literal(coefficients[-1], x.dtype)
    for each in coefficients[-2::-1]:
        found = fma(x, found, each)
    return found


def at_most(x: Expr, bound: Any) -> Expr:
    """min(x, bound), in one instruction; NaN stays."""
    limit = literal(bound, x.dtype)
    return select(limit < x, limit, x)


def at_least(x: Expr, bound: Any) -> Expr:
    limit = literal(bound, x.dtype)
    return select(x < limit, limit, x)


def flip_sign(x: Expr, bits: Expr) -> Expr:
    return bitcast(bitcast(x, bits.dtype) ^ bits, x.dtype)


def sign_of(x: Expr) -> Expr:
    """The sign bit, in its place."""
    form = FORMATS[x.dtype]
    return bitcast(x, form.bits) & form.sign


# Exponentials


def nearest(x: Expr, factor: float, shift: int = 0) -> tuple[Expr, Expr]:
    """(n, 2^(n + shift)) for the integer n nearest to x * factor.

    Adding 1.5 * 2^fraction leaves an integer in the low bits, which move to the exponent's place.
    """
    form = FORMATS[x.dtype]
    magic = 1.5 * 2.0**form.fraction + form.bias + shift
    total = fma(x, factor, magic)
    return total - magic, bitcast(bitcast(total, form.bits) << form.fraction, x.dtype)


def reduced(x: Expr, n: Expr, scale: int = 1) -> Expr:
    """x - n * scale * ln(2)"""
    high, low = FORMATS[x.dtype].ln2
    return fma(n, -low * scale, fma(n, -high * scale, x))


def clamped(x: Expr) -> Expr:
    form = FORMATS[x.dtype]
    return at_least(at_most(x, form.largest), form.smallest)


def exp(x: Expr) -> Expr:
    """e^x = e^r 2^m 2^m with x = r + 2 m ln(2): two steps, so that one of them may overflow or
    round to a subnormal."""
    x = clamped(x)
    m, scale = nearest(x, FORMATS[x.dtype].log2e / 2)
    return polynomial(reduced(x, m, 2), (1, 1, *EXP[x.dtype])) * scale * scale


def growth(x: Expr, shift: int = 0, near: bool = False) -> tuple[Expr, Expr]:
    """(s 2^shift, q) with e^x = s (1 + q), s a power of 2 and |q| < 1/2.

    In float64 the rounding of r = x - n ln(2) is put right: where e^x - 1 = 2 q + 1 cancels, near
    x = 0.35, it would cost 0.7 ULP.
    """
    n, scale = nearest(x, FORMATS[x.dtype].log2e, shift)
    if x.dtype == float32:
        r = fma(n, -LN2, x) if near else reduced(x, n)
        return scale, fma(r * r, polynomial(r, EXPM1[x.dtype]), r)
    high, low = FORMATS[x.dtype].ln2
    first, rest = fma(n, -high, x), n * -low
    r = first + rest
    return scale, fma(r * r, polynomial(r, EXPM1[x.dtype]), rest) + first


def expm1(x: Expr) -> Expr:
    """e^x - 1; computed by halves, as 2^n may overflow where e^x does not."""
    form = FORMATS[x.dtype]
    scale, q = growth(at_least(at_most(x, form.largest), -60), -1)
    half = fma(scale, q, scale - 0.5)
    return select(absolute(x) < form.tiny, x, half + half)


def tanh(x: Expr) -> Expr:
    """y = t / (t + 1) with t = (e^(2 |x|) - 1) / 2, and one step of Newton's for what rounding took
    from it: y + (t - y - y t) / (t + 1), where 1 / (t + 1) = 1 - y; 1 where 1 is the last bit of
    t."""
    limit, whole = 8.66 if x.dtype == float32 else 18.71, absolute(x)
    a = at_most(whole, limit)
    scale, q = growth(a + a, -1)
    t = fma(scale, q, scale - 0.5)
    y = t / (t + 1)
    y = fma(fma(-y, t, t - y), 1 - y, y)
    return flip_sign(select(whole > limit, literal(1, x.dtype), y), sign_of(x))


def erf(x: Expr) -> Expr:
    """1 - e^(-t) with t = -log(erfc(|x|)), which is |x| times a polynomial."""
    a = at_most(absolute(x), 3.93 if x.dtype == float32 else 5.93)
    scale, q = growth(-fma(a, polynomial(a, ERF[x.dtype]), a), near=True)
    return flip_sign(fma(-scale, q, 1 - scale), sign_of(x))


# Roots


def rsqrt(x: Expr) -> Expr:
    """1 / sqrt(x): a guess that halves the exponent (Lomont, 2003), and two steps of Householder's,
    y + y e / 2 + 3 y e^2 / 8 + ... with e = 1 - x y^2."""
    form, single = FORMATS[x.dtype], x.dtype == float32
    usual = within(x, 1 << form.fraction)
    a = select(usual, x, literal(1, x.dtype))
    start = literal(0x5F3759DF if single else 0x5FE6EB50C7B537A9, form.bits)
    y = bitcast(start - (bitcast(a, form.bits) >> 1), x.dtype)
    for terms in (3, 1 if single else 3):
        e = fma(-(a * y), y, 1)
        y = fma(y * e, polynomial(e, (0.5, 0.375, 0.3125)[:terms]), y)
    return rare(~usual, 1 / loops.sqrt(x), y)


# Logarithms


def split(x: Expr, least: float) -> tuple[Expr, Expr]:
    """(k, bits of 2^k in their place) with least <= x / 2^k < 2 least, for a positive normal x."""
    form = FORMATS[x.dtype]
    start = literal(least, x.dtype).attr.view(form.signed).item()
    k = (bitcast(x, form.signed) - start) >> form.fraction
    return cast(k, x.dtype), k << form.fraction


def scaled(x: Expr, exponent: Expr) -> Expr:
    """x / 2^k"""
    return bitcast(bitcast(x, exponent.dtype) - exponent, x.dtype)


def normal(x: Expr) -> tuple[Expr, Expr]:
    """(x 2^n, -n) with n not 0 for subnormal x."""
    form = FORMATS[x.dtype]
    small = x < 2.0 ** (1 - form.bias)
    shift = form.fraction + 1
    factor = select(small, literal(2.0**shift, x.dtype), 1)
    return x * factor, select(small, literal(-shift, x.dtype), 0)


def within(x: Expr, lowest: int) -> Expr:
    """Whether x lies between the float of these bits and infinity."""
    form = FORMATS[x.dtype]
    above = (1 << form.fraction) * (2 * form.bias + 1)
    return bitcast(x, form.bits) - lowest < above - lowest


def domain(y: Expr, x: Expr, pole: float) -> Expr:
    """y where x lies between a logarithm's pole and infinity, else -1 / 0, 0 / 0, infinity or NaN:
    a quotient, as the processor's flags tell what became infinite or NaN here."""
    y = select(x < inf, y, x)
    y = select(x.equals(pole), literal(-1, x.dtype), select(x < pole, literal(0, x.dtype), y))
    return y / select(x <= pole, literal(0, x.dtype), 1)


def log_near_one(f: Expr, coefficients: Sequence[float]) -> Expr:
    """log(1 + f)"""
    return fma(f * f, polynomial(f, coefficients), f)


def log_normal(x: Expr, less: Expr | int = 0) -> Expr:
    """log(m) + k ln(2) with x = m 2^k, for k + less; ln(2) is by chance so near a float that no
    rest is added."""
    k, exponent = split(x, 2 / 3)
    k = k + less if isinstance(less, Expr) else k
    return fma(k, LN2, log_near_one(scaled(x, exponent) - 1, LOG[x.dtype]))


def log(x: Expr) -> Expr:
    special = ~within(x, 1 << FORMATS[x.dtype].fraction)
    return rare(special, domain(log_normal(*normal(x)), x, 0), log_normal(x))


def log1p(x: Expr) -> Expr:
    """log(1 + f) + k ln(2) with 1 + x = (1 + f) 2^k, f from x itself: f = x 2^-k + (2^-k - 1).

    2^(2 - k) stands for 2^-k, which may be subnormal.
    """
    form, total = FORMATS[x.dtype], 1 + x
    k, exponent = split(total, 2 / 3)
    scale = bitcast((form.bias + 2 << form.fraction) - exponent, x.dtype)
    f = fma(scale, x * 0.25, fma(scale, 0.25, -1))
    y = fma(k, LN2, log_near_one(f, LOG[x.dtype]))
    y = select(absolute(x) < form.tiny, x, y)
    return rare(~within(total, 1), domain(y, x, -1), y)


# Trigonometric functions (Payne and Hanek, ACM SIGNUM Newsletter 18(1), 1983)
#
# |x| is a significand M times 2^e. Of its product with the binary digits of 2/pi those count that
# stand for less than 4 quarter turns. What small |x| give is not used, their shifts included.


def digits(start: int) -> Expr:
    """64 binary digits of 2/pi; digit 1 stands for 1/2."""
    size = 4 * len(TWO_OVER_PI)
    return literal(int(TWO_OVER_PI, 16) << 64 >> size + 1 - start & (1 << 64) - 1, uint64)


def funnel(a: Expr, b: Expr, count: Expr) -> Expr:
    """The upper half of a, b shifted left by less than 64."""
    return (a << count) | ((b >> 1) >> (63 - count))


def turns(angle: Expr) -> tuple[Expr, Expr]:
    """An angle in units of 2^-62 quarter turns as (quarter turns, the rest, signed)."""
    quarters = (angle + (1 << 61)) >> 62
    return quarters, bitcast(angle - (quarters << 62), int64)


def upper_product(a: Expr, b: Expr) -> Expr:
    """The upper half of a * b for a < 2^54."""
    low = literal((1 << 32) - 1, uint64)
    a0, a1, b0, b1 = a & low, a >> 32, b & low, b >> 32
    cross = a0 * b1
    middle = a1 * b0 + (a0 * b0 >> 32) + (cross & low)
    return a1 * b1 + (cross >> 32) + (middle >> 32)


def reduce_large(a: Expr) -> tuple[Expr, Expr]:
    """(quarter turns, the rest in radians) of a float >= 0, by 192 digits."""
    bits = bitcast(cast(a, float64), uint64)
    significand = (bits & (1 << 52) - 1) << 1 | 1 << 53
    place = (bits >> 52) - 1023
    steps = (1,) if a.dtype == float32 else (8, 4, 2, 1)
    words = [digits(64 * i - 54) for i in range(2 * steps[0] + 3)]
    for n in steps:
        beyond = (place & 64 * n).differs(0)
        words = [select(beyond, words[i + n], words[i]) for i in range(n + 3)]
    first, second, third = (funnel(words[i], words[i + 1], place & 63) for i in range(3))
    middle = significand * second
    low = middle + upper_product(significand, third)
    carry = select(low < middle, literal(1, uint64), 0)
    high = significand * first + upper_product(significand, second) + carry
    quarters, rest = turns(high)
    return cast(quarters, FORMATS[a.dtype].bits), cast(radians(rest, low), a.dtype)


def radians(high: Expr, low: Expr) -> Expr:
    """high + low 2^-64, in units of 2^-62 quarter turns, in radians; |high| <= 2^61."""
    total = cast(high >> 10, float64)
    rest = (bitcast(high, uint64) & 1023) << 53 | (low >> 11)
    rest = cast(bitcast(rest, int64), float64) * 2.0**-63
    first, second = (x * 2.0**-52 for x in QUARTERS[float64][:2])
    return fma(total, first, fma(total, second, rest * first))


def reduce_small(a: Expr) -> tuple[Expr, Expr]:
    """(quarter turns, the rest in radians) of a float >= 0 far below 2^fraction.

    The first product leaves no rounding, and the second one that counts only where the third does
    not.
    """
    form = FORMATS[a.dtype]
    magic = 1.5 * 2.0**form.fraction
    total = fma(a, 2 / pi, magic)
    for part in QUARTERS[a.dtype]:
        a = fma(total - magic, -part, a)
    return bitcast(total, form.bits), a


def sine(x: Expr, more: int, sign: Expr | int) -> Expr:
    """The sine of |x| and `more` quarter turns; `sign` flips it."""

    def of(quarters: Expr, r: Expr) -> Expr:
        quarters, z = quarters + more, r * r
        sin = fma(r * z, polynomial(z, SIN[a.dtype]), r)
        cos = fma(z, polynomial(z, (-0.5, *COS[a.dtype])), 1)
        y = select((quarters & 1).differs(0), cos, sin)
        return flip_sign(y, (quarters & 2) << 8 * a.dtype.itemsize - 2 ^ sign)

    a = absolute(x)
    small = a < FORMATS[a.dtype].far
    quarters, r = reduce_large(a)
    near = of(*reduce_small(select(small, a, literal(0, a.dtype))))
    return rare(~small, of(quarters, r + (a - a)), near)  # infinity - infinity is NaN


def sin(x: Expr) -> Expr:
    return sine(x, 0, sign_of(x))


def cos(x: Expr) -> Expr:
    return sine(x, 1, 0)


# Powers


def fast_sum(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """(a + b, what its rounding took away) for |a| >= |b| (Dekker)."""
    total = a + b
    return total, b - (total - a)


def product(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """(a * b, what its rounding took away)"""
    found = a * b
    return found, fma(a, b, -found)


def precise_log(x: Expr) -> tuple[Expr, Expr]:
    """log(x) as a sum of two float64: k ln(2) + 2 atanh(s) with x = m 2^k, s = (m - 1) / (m + 1).

    2 atanh(s) = s (2 + z (2/3 + z p(z))), z = s^2; all but p in double precision twice over.
    """
    large, less = normal(x)
    k, exponent = split(large, 0.7071067811865476)
    k, m = k + less, scaled(large, exponent)
    below, above = m - 1, m + 1
    inverse = 1 / above
    s = below * inverse
    lacking = m - (above - 1)  # of m + 1
    s_rest = fma(-s, lacking, fma(-s, above, below)) * inverse
    z, z_rest = product(s, s)
    z_rest = fma(s + s, s_rest, z_rest)
    u, u_rest = fast_sum(literal(TWO_THIRDS[0], float64), z * polynomial(z, ATANH))
    v, v_rest = product(z, u)
    v_rest = v_rest + fma(z, u_rest + TWO_THIRDS[1], z_rest * u)
    w, w_rest = fast_sum(literal(2, float64), v)
    y, y_rest = product(s, w)
    y_rest = y_rest + fma(s, w_rest + v_rest, s_rest * w)
    high, low = FORMATS[float64].ln2
    # k high is exact, and 0 or larger than y
    total, rest = fast_sum(k * high, y)
    return total, rest + fma(k, low, y_rest)


def power_single(a: Expr, b: Expr) -> Expr:
    """a^b of float32 for a > 0, in float64."""
    a, b = cast(a, float64), cast(b, float64)
    k, exponent = split(a, 2 / 3)
    y = log_near_one(scaled(a, exponent) - 1, LOG_SHORT)
    product = at_least(at_most(b * fma(k, LN2, y), 200), -200)
    n, scale = nearest(product, FORMATS[float64].log2e)
    return cast(polynomial(reduced(product, n), (1, 1, *EXP_SHORT)) * scale, float32)


def power_double(a: Expr, b: Expr) -> Expr:
    """a^b of float64 for a > 0."""
    log, log_rest = precise_log(a)
    x, rest = product(b, log)
    rest = select(absolute(x) < 1000, fma(b, log_rest, rest), 0)
    x = clamped(x)
    m, scale = nearest(x, FORMATS[float64].log2e / 2)
    high, low = FORMATS[float64].ln2
    r, rest = fast_sum(fma(m, -2 * high, x), fma(m, -2 * low, rest))
    growth = fma(r * r, polynomial(r, EXP[float64]), rest) + r
    return (growth + 1) * scale * scale


def pow(a: Expr, b: Expr) -> Expr:  # noqa: A001
    """a^b: |a|^b where both are of use, and the rest as a rare case."""
    one, size = literal(1, a.dtype), absolute(a)
    usual = (size > 0) & (size < inf) & (absolute(b) < HUGE)
    power = power_single if a.dtype == float32 else power_double
    y = power(select(usual, size, one), select(usual, b, one))
    return rare(~(usual & (a > 0)), special_power(a, b, y, usual), y)


def special_power(a: Expr, b: Expr, y: Expr, usual: Expr) -> Expr:
    """a^b from y, which is |a|^b where that is usual. What finite numbers make infinite is a
    quotient by 0, a root of a negative number 0 / 0."""
    size, one, zero = absolute(a), literal(1, a.dtype), literal(0, a.dtype)
    grows = (size > 1).equals(b > 0)
    finite = (size < inf) & (absolute(b) < inf)
    trivial = usual | size.equals(1) | b.equals(0)
    end = select(grows, select(finite, one, inf), zero)
    y = select(usual, y, select(trivial, one, end))
    whole, half = loops.trunc(b).equals(b), b * 0.5
    odd = whole & floor(half).differs(half)
    root = (a < 0) & (a > -inf) & ~whole
    y = flip_sign(select(root, zero, y), select(odd, sign_of(a), 0))
    y = y / select(root | (grows & finite & ~trivial), zero, one)
    y = select(a.equals(a), select(b.equals(b), y, b), a)
    return select(b.equals(0) | a.equals(1), one, y)


def integer_power(a: Expr, b: Expr) -> Expr:
    """a^b of integers by squaring, wrapped around; b < 0 gives the truncated quotient 1 / a^-b, 0
    where a is 0."""
    signed = a.dtype.kind == "i"
    y, one = literal(1, a.dtype), literal(1, a.dtype)
    factor = a
    for bit in range(8 * a.dtype.itemsize - signed):
        taken = (b & 1 << bit).differs(0)
        y = y * select(taken, factor, one)
        factor = factor * factor
    if not signed:
        return y
    unit = select(a.equals(-1), select((b & 1).differs(0), a, one), literal(0, a.dtype))
    return select(b < 0, select(a.equals(1), one, unit), y)


def fmod(a: Expr, b: Expr) -> Expr:
    """a - trunc(a / b) b, exact. A quotient below 2^fraction is rounded up at most to the next
    integer."""
    x, y = absolute(a), absolute(b)
    near = (x * 2.0 ** -FORMATS[a.dtype].fraction < y) & (y < inf)
    y = select(near, y, literal(1, a.dtype))
    rest = fma(-loops.trunc(x / y), y, x)
    rest = flip_sign(rest + select(rest < 0, y, literal(0, a.dtype)), sign_of(a))
    return rare(~near, loops.binary("frem", a, b), rest)


MATH: dict[str, Callable[..., Expr]] = {
    "exp": exp, "expm1": expm1, "log": log, "log1p": log1p, "tanh": tanh, "sin": sin, "cos": cos,
    "erf": erf, "rsqrt": rsqrt, "pow": pow, "integer_power": integer_power,
}  # fmt: skip
