"""Index maps: where in a source array the element of a nest at given coordinates lies.

    index = Index(constant, terms)     constant + sum of coefficient * atom
    atom  = int                        the coordinate along a loop axis
          | Quotient(index, n)         index // n   (index >= 0)
          | Residue(index, n)          index % n
          | Expr                       an int64 expression (a gathered index)

Movement ops map an output's index to their input's (lower.py). Arithmetic simplifies as it goes:
terms that n divides leave a quotient, ranges decide what is left, n * (i // n) + i % n is i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from needle.compiler.loops import Access, Buffer, Digits, Expr, axis, binary, expr, param
from needle.dtype import int64

Sizes = Sequence[int]  # of the loop axes
UNKNOWN = 1 << 62


class Loops(list[int]):
    """The sizes of a nest's axes, and what its index maps ask of them: `splits`, an axis cut so
    that a quotient becomes a coordinate; `used`, every index that code is made for."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__(sizes)
        self.splits: dict[int, int] = {}
        self.used: dict[Index, None] = {}
        self.settled = False  # whether the axes are final


class Index:
    """constant + sum of coefficient * atom; hashable."""

    __slots__ = ("constant", "hash", "terms")

    def __init__(self, constant: int, terms: Mapping[Any, int]) -> None:
        self.constant = constant
        self.terms = {atom: n for atom, n in terms.items() if n}
        self.hash = hash((constant, frozenset(self.terms.items())))

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Index)
            and self.hash == other.hash
            and self.constant == other.constant
            and self.terms == other.terms
        )

    def __repr__(self) -> str:
        return " + ".join([*(f"{n}*{atom}" for atom, n in self.terms.items()), str(self.constant)])

    def __add__(self, other: Index | int) -> Index:
        if isinstance(other, int):
            return Index(self.constant + other, self.terms) if other else self
        terms = dict(self.terms)
        for atom, n in other.terms.items():
            terms[atom] = terms.get(atom, 0) + n
        return recombine(Index(self.constant + other.constant, terms))

    def __mul__(self, n: int) -> Index:
        if n == 1:
            return self
        return Index(self.constant * n, {atom: each * n for atom, each in self.terms.items()})

    @property
    def axes(self) -> frozenset[int]:
        parts = [{atom} if isinstance(atom, int) else atom.axes for atom in self.terms]
        return frozenset().union(*parts)


@dataclass(frozen=True)
class Division:
    """What an index that is divided leaves."""

    index: Index
    divisor: int

    @property
    def axes(self) -> frozenset[int]:
        return self.index.axes


class Quotient(Division):
    """index // divisor"""


class Residue(Division):
    """index % divisor"""


def recombine(index: Index) -> Index:
    """n * (i // n) + i % n -> i"""
    for atom, factor in index.terms.items():
        if isinstance(atom, Residue):
            other = Quotient(atom.index, atom.divisor)
            if index.terms.get(other) == factor * atom.divisor:
                terms = dict(index.terms)
                del terms[atom], terms[other]
                return Index(index.constant, terms) + atom.index * factor
    return index


def coordinate(number: int) -> Index:
    return Index(0, {number: 1})


def fixed(value: int) -> Index:
    return Index(value, {})


def bounds(index: Index, sizes: Sizes) -> tuple[int, int]:
    """The least and the greatest value."""
    low = high = index.constant
    for atom, n in index.terms.items():
        if isinstance(atom, int):
            last = max(sizes[atom] - 1, 0)
        elif isinstance(atom, Residue):
            last = atom.divisor - 1
        elif isinstance(atom, Quotient):
            last = bounds(atom.index, sizes)[1] // atom.divisor
        else:
            last = UNKNOWN
        low, high = low + min(n * last, 0), high + max(n * last, 0)
    return low, high


def divide(index: Index, n: int, sizes: Sizes) -> tuple[Index, Index]:
    """(index // n, index % n) of an index >= 0."""
    if n == 1:
        return index, fixed(0)
    whole = {atom: each // n for atom, each in index.terms.items() if each % n == 0}
    rest = {atom: each for atom, each in index.terms.items() if each % n}
    quotient = Index(index.constant // n, whole)
    part = Index(index.constant % n, rest)
    low, high = bounds(part, sizes)
    if low >= 0 and high < n:
        return quotient, part
    if low < 0:  # part of a difference: divide it whole
        quotient, part = fixed(0), index
    elif isinstance(sizes, Loops) and not part.constant and len(part.terms) == 1:
        ask_split(part, n, sizes)
    return quotient + Index(0, {Quotient(part, n): 1}), Index(0, {Residue(part, n): 1})


def ask_split(part: Index, n: int, sizes: Loops) -> None:
    """Note that (stride * axis) // n would be a coordinate if the axis were cut at n / stride."""
    [(atom, stride)] = part.terms.items()
    if isinstance(atom, int) and n % stride == 0:
        least = n // stride
        if sizes[atom] % least == 0 and 1 < least < sizes[atom]:
            sizes.splits.setdefault(atom, least)


def place_of(atom: Any, size: int) -> tuple[int, int] | None:
    """(w, m) of an atom that is a coordinate below size // w % m; None of any other."""
    if isinstance(atom, int):
        return 1, size
    if not isinstance(atom, Division) or atom.index.constant:
        return None
    terms = list(atom.index.terms.items())
    found = place_of(terms[0][0], size) if len(terms) == 1 and terms[0][1] == 1 else None
    if found is None or found[1] % atom.divisor:
        return None
    w, m = found
    return (w, atom.divisor) if isinstance(atom, Residue) else (w * atom.divisor, m // atom.divisor)


def digits(terms: Sequence[tuple[Any, int]], size: int) -> Digits | None:
    """What a coordinate below `size` adds to an index by these terms (atoms of it alone, factors),
    as digits of a mixed radix: (size, stride) each, the most significant first."""
    if all(isinstance(atom, int) for atom, _ in terms):
        return ((size, sum(factor for _, factor in terms)),)
    places = [place_of(atom, size) for atom, _ in terms]
    bounds = sorted({1, size}.union(*({x[0], x[0] * x[1]} for x in places if x)))
    if None in places or any(b % a for a, b in pairwise(bounds)):
        return None
    found: list[tuple[int, int]] = []
    for low, high in pairwise(bounds):
        stride = sum(
            factor * low // place[0]
            for place, (_, factor) in zip(places, terms, strict=True)
            if place and place[0] <= low < place[0] * place[1]
        )
        if found and found[-1][1] * found[-1][0] == stride:  # one long digit
            found[-1] = found[-1][0] * (high // low), found[-1][1]
        else:
            found.append((high // low, stride))
    return tuple(found[::-1])


def substitute(index: Index, table: Mapping[int, Index], sizes: Sizes) -> Index:
    """The index with loop axes replaced."""
    found = fixed(index.constant)
    for atom, n in index.terms.items():
        if isinstance(atom, int):
            each = table[atom]
        elif isinstance(atom, Division):
            parts = divide(substitute(atom.index, table, sizes), atom.divisor, sizes)
            each = parts[isinstance(atom, Residue)]
        else:
            each = Index(0, {atom: 1})
        found = found + each * n
    return found


def linearize(indices: Sequence[Index], shape: Sequence[int]) -> Index:
    """The row-major place of an element."""
    found, stride = fixed(0), 1
    for each, size in zip(reversed(indices), reversed(shape), strict=True):
        found = found + each * stride
        stride *= size
    return found


def delinearize(index: Index, shape: Sequence[int], sizes: Sizes) -> tuple[Index, ...]:
    """The coordinates of a row-major place."""
    found = []
    for place, size in enumerate(reversed(shape)):
        if place == len(shape) - 1:
            found.append(fixed(0) if size == 1 else index)
        elif size == 1:
            found.append(fixed(0))
        else:
            index, rest = divide(index, max(size, 1), sizes)
            found.append(rest)
    return tuple(found[::-1])


def reshape_index(
    indices: Sequence[Index], shape: Sequence[int], target: Sequence[int], sizes: Sizes
) -> tuple[Index, ...]:
    """The place of the same element in another shape."""
    if tuple(shape) == tuple(target):
        return tuple(indices)
    bare = [(i, n) for i, n in zip(indices, shape, strict=True) if n != 1]
    if [n for _, n in bare] == [n for n in target if n != 1]:
        kept = iter(bare)
        return tuple(fixed(0) if n == 1 else next(kept)[0] for n in target)
    return delinearize(linearize(indices, shape), target, sizes)


def as_expr(index: Index, sizes: Sizes = ()) -> Expr:
    """The index as an int64 expression; sizes in it are passed as arguments."""
    if isinstance(sizes, Loops):
        sizes.used[index] = None
    found: Expr | None = None
    for atom, n in index.terms.items():
        each = atom_expr(atom)
        each = each if n == 1 else each * param(n, int64)
        found = each if found is None else found + each
    if found is None:
        return param(index.constant, int64)
    return found + param(index.constant, int64) if index.constant else found


def atom_expr(atom: Any) -> Expr:
    if isinstance(atom, int):
        return axis(atom)
    if isinstance(atom, Expr):
        return atom
    op = "udiv" if isinstance(atom, Quotient) else "urem"
    return binary(op, as_expr(atom.index), param(atom.divisor, int64))


def access(buffer: Buffer, index: Index, sizes: Sizes) -> Access:
    """The access at a linear index of a buffer."""
    if isinstance(sizes, Loops):
        sizes.used[index] = None
    strides = sorted((atom, n) for atom, n in index.terms.items() if isinstance(atom, int))
    dynamic = [(atom_expr(x), n) for x, n in index.terms.items() if not isinstance(x, int)]
    return Access(buffer, index.constant, tuple(strides), tuple(dynamic))


def within(index: Index, low: int, high: int, sizes: Sizes) -> Expr | None:
    """Whether low <= index < high as an expression; None where it always holds."""
    least, most = bounds(index, sizes)
    found: Expr | None = None
    if least < low:
        found = as_expr(index, sizes) >= param(low, int64)
    if most >= high:
        below = as_expr(index, sizes) < param(high, int64)
        found = below if found is None else found & below
    return found


def check(index: Expr, size: int, identifier: int) -> Expr:
    """The index wrapped into [0, size); outside [-size, size) it flags an error and is 0."""
    return expr("check", (index,), int64, (size, identifier))
