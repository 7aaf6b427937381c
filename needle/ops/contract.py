"""Contractions: matmul, and einsum, tensordot and outer made of it. Next: conv.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from needle.array.spec import Spec, as_axis, broadcast_shapes
from needle.autograd import MODE, OPS, Tensor, TensorOp, primitive
from needle.dtype import bfloat16, float32, promote
from needle.errors import expect
from needle.ops.composite import Composite
from needle.ops.elementwise import Operand, as_tensor, astype, first_tensor, rule
from needle.ops.movement import flatten, permute, reshape, squeeze, transpose, unsqueeze, widen
from needle.ops.reduce import summation


def as_tensors(operands: Sequence[Operand]) -> list[Tensor]:
    """Operands as Tensors on one device."""
    like = first_tensor(operands)
    return [as_tensor(x, like) for x in operands]


@primitive
class MatMul(TensorOp):
    """y[..., m, n] = sum over k of a[..., m, k] * b[..., k, n];
    da = dy b^T, db = a^T dy. Batch axes are equal. dot: of operands rounded to bfloat16, by the
    processor's dot product where it has one; so are the gradients."""

    name = "matmul"
    dot: bool = False

    def infer(self, a: Spec, b: Spec) -> Spec:
        fits = a.ndim > 1 and b.ndim > 1 and a.shape[:-2] == b.shape[:-2] and a.dtype == b.dtype
        expect(fits, f"matmul: expected matrices of one batch and dtype; received {a} @ {b}")
        shapes = f"{a.shape} @ {b.shape}"
        expect(a.shape[-1] == b.shape[-2], f"matmul: inner dimensions differ: {shapes}")
        return a.with_shape((*a.shape[:-1], b.shape[-1]))

    def compute(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if self.dot and a.dtype == float32:
            a, b = (x.astype(bfloat16).astype(float32) for x in (a, b))
        return np.matmul(a, b)

    gradient = rule(
        lambda dy, y, a, b: y.op.multiply(dy, transpose(b)),
        lambda dy, y, a, b: y.op.multiply(transpose(a), dy),
    )

    def __call__(self, *inputs: Operand) -> Tensor:
        a, b = inputs
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            a, b = as_tensors(inputs)
        if MODE.autocast is not None:
            a, b = OPS.cast_operands(self, (a, b))
        return (DOT if Precision.dot else self).multiply(a, b)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b by this op, whatever the precision is set to."""
        left, right = a.shape, b.shape
        if len(left) == len(right) >= 2 and left[:-2] == right[:-2] and a.dtype == b.dtype:
            return Tensor.make_from_op(self, (a, b))
        return BroadcastMatMul(self.dot)(a, b)


@primitive
class BroadcastMatMul(Composite):
    """y = a @ b by NumPy's rules, as one node: vectors get an axis and lose it again, batch axes
    broadcast, dtypes are promoted."""

    name = "matmul"
    rounds = True  # so that weights of low precision are read where they lie
    dot: bool = False

    def expand(self, a: Tensor, b: Tensor) -> Tensor:
        shapes = f"{a.shape} @ {b.shape}"
        expect(a.ndim and b.ndim, f"matmul: expected axes; received {shapes}; use * with scalars")
        dtype, multiply = promote("matmul", a.dtype, b.dtype), MatMul(self.dot).multiply
        left = astype(a if a.ndim > 1 else unsqueeze(a, 0), dtype)
        right = astype(b if b.ndim > 1 else unsqueeze(b, 1), dtype)
        expect(left.shape[-1] == right.shape[-2], f"matmul: inner dimensions differ: {shapes}")
        if right.ndim == 2 and left.ndim > 2:
            # One contraction over all rows, so that db is one too and not a sum over batches.
            y = multiply(flatten(left, 0, -2), right)
            y = reshape(y, (*left.shape[:-1], right.shape[-1]))
        else:
            batch = broadcast_shapes("matmul", left.shape[:-2], right.shape[:-2])
            y = multiply(*(widen(x, (*batch, *x.shape[-2:])) for x in (left, right)))
        y = y if a.ndim > 1 else squeeze(y, -2)
        return y if b.ndim > 1 else squeeze(y, -1)


matmul, DOT = MatMul(), MatMul(True)


class Precision:
    """Of contractions: whether float32 and bfloat16 operands meet in bfloat16 dot products."""

    dot = False


def set_matmul_precision(precision: str) -> None:
    """How contractions of float32 and bfloat16 are computed from now on, and their gradients.

    "highest" (at first): float32 fused multiply-adds, the same bits on every processor. "medium":
    operands are rounded to bfloat16 and multiplied by the processor's dot product (AVX512_BF16),
    which adds two products at once: twice as fast on some processors. Where there is none, or a
    side has 8 rows or columns or fewer, it is as "highest". ValueError for anything else.
    """
    known = ("highest", "medium")
    received = f"received {precision!r}"
    expect(precision in known, f"set_matmul_precision: expected 'highest' or 'medium'; {received}")
    Precision.dot = precision == "medium"


def get_matmul_precision() -> str:
    """What `set_matmul_precision` has set."""
    return "medium" if Precision.dot else "highest"


def outer(a: Operand, b: Operand) -> Tensor:
    """y[i, j] = a[i] * b[j], of a and b flattened."""
    a, b = as_tensors((a, b))
    return reshape(a, (a.size, 1)) * reshape(b, (1, b.size))


HIDDEN = "".join(chr(0x100 + axis) for axis in range(128))  # letters of axes that have none


def tensordot(a: Operand, b: Operand, axes: int | tuple[Any, Any] = 2) -> Tensor:
    """Sum of products over axes: an int n pairs a's last n with b's first n; a pair of sequences
    names them."""
    a, b = as_tensors((a, b))
    if isinstance(axes, int):
        most = min(a.ndim, b.ndim)
        expect(0 <= axes <= most, f"tensordot: expected at most {most} axes; received {axes}")
        axes = (range(a.ndim - axes, a.ndim), range(axes))
    first, second = ([each] if isinstance(each, int) else each for each in axes)
    left = [as_axis("tensordot", axis, a.ndim) for axis in first]
    right = [as_axis("tensordot", axis, b.ndim) for axis in second]
    equal = [a.shape[axis] for axis in left] == [b.shape[axis] for axis in right]
    fits = equal and len({*left}) == len({*right}) == len(left)
    shapes = f"{left} and {right} of {a.shape} and {b.shape}"
    expect(fits, f"tensordot: expected axes of equal sizes, none twice; received {shapes}")
    term, other = HIDDEN[: a.ndim], list(HIDDEN[64 : 64 + b.ndim])
    for i, j in zip(left, right, strict=True):
        other[j] = term[i]
    sizes = dict(zip([*term, *other], a.shape + b.shape, strict=True))
    return contract_pair(a, term, b, "".join(other), set(term) ^ set(other), sizes)[0]


# einsum


def einsum(equation: str, *operands: Operand) -> Tensor:
    """Einstein's summation convention, as numpy.einsum: "bij,bjk->bik". Operands are contracted
    from left to right.

    Repeated letters in one operand take its diagonal; "..." stands for axes that broadcast; without
    "->" the letters that occur once are kept in alphabetical order.
    """
    tensors = as_tensors(operands)
    if MODE.autocast is not None and len(tensors) > 1:
        tensors = OPS.cast_operands(matmul, tensors)
    terms, output = parse_equation(equation, tensors)
    sizes: dict[str, int] = {}
    for term, x in zip(terms, tensors, strict=True):
        for letter, size in zip(term, x.shape, strict=True):
            known = sizes.get(letter, 1)
            fits = 1 in (known, size) or known == size
            expect(fits, f"einsum: expected one size for {letter!r}; received {known} and {size}")
            sizes[letter] = size if known == 1 else known
    pending = [take_diagonal(x, term) for term, x in zip(terms, tensors, strict=True)]
    x, term = pending[0]
    for index, (y, other) in enumerate(pending[1:], 2):
        later = set(output).union(*(each for _, each in pending[index:]))
        x, term = contract_pair(x, term, y, other, later, sizes)
    x, term = sum_letters(x, term, set(output))
    x = permute(x, [term.index(letter) for letter in output])
    return astype(x, promote("einsum", *(each.dtype for each in tensors)))


def parse_equation(equation: str, tensors: Sequence[Tensor]) -> tuple[list[str], str]:
    """One letter per axis, for each operand and for the output; "..." becomes hidden letters,
    aligned at the right."""
    left, arrow, output = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    letters = "".join(term.replace("...", "", 1) for term in (*terms, output))
    plain = not letters or (letters.isascii() and letters.isalpha())
    expect(plain, f"einsum: expected letters, commas, '...' and '->'; received {equation!r}")
    named, count = len(terms), len(tensors)
    expect(named == count, f"einsum: expected {named} operands for {equation!r}; received {count}")
    extra = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, tensors, strict=True)]
    for index, (term, x, more) in enumerate(zip(terms, tensors, extra, strict=True)):
        fits = more == 0 or (more > 0 and "..." in term)
        expect(fits, f"einsum: expected axes {term!r} for {equation!r}; received shape {x.shape}")
        terms[index] = term.replace("...", HIDDEN[64 - more : 64])
    if not arrow:
        output = "..." + "".join(sorted(each for each in letters if letters.count(each) == 1))
    output = output.replace("...", HIDDEN[64 - max(extra) : 64])
    fits = len(set(output)) == len(output) and set(output) <= set().union(*terms)
    expect(fits, f"einsum: expected each output letter once in an operand; received {equation!r}")
    return terms, output


def take_diagonal(x: Tensor, term: str) -> tuple[Tensor, str]:
    """x[i, i] -> y[i] for every letter that its term repeats."""
    for letter in dict.fromkeys(term):
        axes = [axis for axis, each in enumerate(term) if each == letter]
        if len(axes) > 1:
            fits = len({x.shape[axis] for axis in axes}) == 1
            expect(
                fits, f"einsum: expected one size for {letter!r} of {term!r}; received {x.shape}"
            )
            rest = [axis for axis in range(x.ndim) if axis not in axes]
            x = permute(x, axes + rest)[(np.arange(x.shape[axes[0]]),) * len(axes)]
            term = letter + term.replace(letter, "")
    return x, term


def contract_pair(
    x: Tensor, term: str, y: Tensor, other: str, later: set[str], sizes: dict[str, int]
) -> tuple[Tensor, str]:
    """Sum of products over the letters that nobody needs later: a batched matmul."""
    x, term = sum_letters(x, term, set(other) | later)
    y, other = sum_letters(y, other, set(term) | later)
    batch = "".join(letter for letter in term if letter in other and letter in later)
    inner = "".join(letter for letter in term if letter in other and letter not in later)
    rows = "".join(letter for letter in term if letter not in other)
    columns = "".join(letter for letter in other if letter not in term)
    a = arrange(x, term, [*batch, rows, inner], sizes)
    b = arrange(y, other, [*batch, inner, columns], sizes)
    found = batch + rows + columns
    return reshape(a @ b, [sizes[letter] for letter in found]), found


def arrange(x: Tensor, term: str, groups: Sequence[str], sizes: dict[str, int]) -> Tensor:
    """x broadcast to its letters' sizes, with an axis for each group of letters."""
    order = "".join(groups)
    x = permute(x, [term.index(letter) for letter in order])
    x = widen(x, tuple(sizes[letter] for letter in order))
    return reshape(x, [math.prod(sizes[letter] for letter in group) for group in groups])


def sum_letters(x: Tensor, term: str, needed: set[str]) -> tuple[Tensor, str]:
    """x summed over the letters that are not needed."""
    axes = tuple(axis for axis, letter in enumerate(term) if letter not in needed)
    kept = "".join(letter for letter in term if letter in needed)
    return (summation(x, axes) if axes else x), kept
