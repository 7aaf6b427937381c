"""Gradients as functions: grad, value_and_grad, vjp, jvp, hvp, hessian.

Each runs a function with fresh leaves in the place of some arguments (Point), and reverse mode from
its value down to those leaves. Nobody's `.grad` is touched, `requires_grad` of the arguments does
not matter, and it works under no_grad(). What is returned has history where something from outside
requires a gradient, so that transformations nest, and `backward()` goes through them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any
from weakref import WeakSet

from needle import autograd
from needle.autograd import MODE, Tensor, add_partials, inputs_with_gradient, parts_below
from needle.capture.structure import rebuild, replace_tensors, tensors_in, walk
from needle.dtype import FLOATS
from needle.errors import expect
from needle.init import ones_like, zeros_like
from needle.nn.module import Module
from needle.ops import astype, eye, reshape, stack
from needle.ops.movement import Reshape

Function = Callable[..., Any]

SPENT: WeakSet[Any] = WeakSet()  # leaves of functions that have returned: nobody else's


class Point:
    """A function's value at a point, and the leaves by which it is differentiated."""

    def __init__(
        self, name: str, function: Any, args: Iterable[Any], argnums: Iterable[int],
        kwargs: Any = None, has_aux: bool = False,
    ) -> None:  # fmt: skip
        if not callable(function):
            kind = type(function).__name__
            raise TypeError(f"{name}: expected a function of Tensors; received a {kind}")
        given, fresh = list(args), set[Tensor]()
        for n in argnums:
            for path, x in walk(given[n], f"argument {n}"):
                check_argument(name, path, x)
            given[n] = replace_tensors(given[n], lambda x: leaf_of(x, fresh))
        self.primals = [rebuild(given[n], parameters_of) for n in argnums]
        self.leaves = dict.fromkeys(tensors_in(self.primals))
        with autograd.enable_grad():
            found: Any = function(*given, **kwargs or {})
        SPENT.update(fresh)
        if has_aux and not (isinstance(found, tuple) and len(found) == 2):
            wanted = f"{name}: expected a function that returns (value, aux)"
            raise TypeError(f"{wanted}; received a {type(found).__name__}")
        self.value: Any = found[0] if has_aux else found
        self.aux: Any = found[1] if has_aux else None
        self.outside = self.depends_on_others()

    def depends_on_others(self) -> bool:
        """Whether something but the fresh leaves, which requires a gradient, is below the value."""
        roots = [y for y in tensors_in((self.value, self.aux)) if y.requires_grad]
        order = autograd.post_order(roots, self.below)
        return any(x not in SPENT and not self.below(x) for x in order)

    def below(self, x: Any) -> Sequence[Any]:
        return () if x in self.leaves else inputs_with_gradient(x)

    def pull(self, out_grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        """The gradients, of the arguments' structure, for those of the value's Tensors."""
        found = zip(tensors_in(self.value), out_grads, strict=True)
        pairs = [(y, dy) for y, dy in found if dy is not None and y.requires_grad]
        keeps = MODE.grad and (self.outside or any(dy.requires_grad for _, dy in pairs))
        with autograd.mode(grad=keeps):
            parts = parts_below([y for y, _ in pairs], [dy for _, dy in pairs], self.leaves)
            grads = {
                x: add_partials(parts[x]) if x in parts else zeros_like(x) for x in self.leaves
            }
        return tuple([replace_tensors(x, grads.__getitem__) for x in self.primals])

    def results(self) -> tuple[Any, Any]:
        """The value and what came with it, with history if something outside is below."""
        found = self.value, self.aux
        if MODE.grad and self.outside:
            return found
        return replace_tensors(found, lambda x: x.detach() if x.requires_grad else x)


def leaf_of(x: Tensor, fresh: set[Tensor]) -> Tensor:
    """A leaf with x's value, above x where x has history, else fresh."""
    found = Reshape(x.shape)(x)
    if not found.requires_grad:
        found.requires_grad = True
        fresh.add(found)
    return found


def parameters_of(x: Any) -> Any:
    """What stands for a Module: its parameters by name, frozen ones left out."""
    if not isinstance(x, Module):
        return x
    return {name: each for name, each in x.named_parameters() if each.requires_grad}


def kind_of(x: Any) -> str:
    return str(x.dtype) if isinstance(x, Tensor) else f"a {type(x).__name__}"


def check_argument(name: str, path: str, x: Any) -> None:
    fits = x is None or isinstance(x, Module) or (isinstance(x, Tensor) and x.dtype in FLOATS)
    wanted = f"{name}: expected {path} to be Tensors of floats, or Modules"
    cure = "convert it with ndl.Tensor or .astype, or leave it out of argnums"
    expect(fits, f"{wanted}; received {kind_of(x)}; {cure}", TypeError)


def places(argnums: int | Sequence[int], count: int) -> list[int]:
    """Argument numbers counted from 0, each once."""
    listed = [argnums] if isinstance(argnums, int) else argnums
    found = [n % count for n in listed if -count <= n < count]
    fits = len(set(found)) == len(listed)
    received = f"received {argnums} for {count} arguments by place"
    expect(fits, f"grad: expected argnums that name arguments, each once; {received}")
    return found


# Gradients of a number


def value_and_grad(function: Function, argnums: Any = 0, has_aux: bool = False) -> Function:
    """A function that gives (y, dy/dx) of y = function(x, ...), a number.

    argnums: the argument x by its place, or a tuple of places, for which the gradients are a tuple.
    x: a Tensor, or Tensors in nested tuples, lists, dicts and dataclasses, of which the gradients
    have the structure; of a Module, they are a dict by its parameters' names. What y does not
    depend on has zeros. has_aux: the function gives (y, aux), then y becomes (y, aux).
    TypeError for integers, ValueError where y is no number.
    """
    expect(
        callable(function), f"grad: expected a function; received {kind_of(function)}", TypeError
    )

    @wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        point = Point("grad", function, args, places(argnums, len(args)), kwargs, has_aux)
        y, wanted = point.value, "grad: expected a function that returns one number"
        is_float = isinstance(y, Tensor) and y.dtype in FLOATS
        expect(is_float, f"{wanted}, a Tensor of floats; received {kind_of(y)}", TypeError)
        cure = f"received shape {y.shape}; add it up with .sum(), or use ndl.vjp"
        expect(y.size == 1, f"{wanted}; {cure}")
        grads = point.pull([ones_like(y)])
        value, aux = point.results()
        return (value, aux) if has_aux else value, grads[0] if isinstance(argnums, int) else grads

    return run


def grad(function: Function, argnums: Any = 0, has_aux: bool = False) -> Function:
    """A function that gives dy/dx of y = function(x, ...), a number; with has_aux (dy/dx, aux).
    Otherwise as `value_and_grad`."""
    value_and_gradients = value_and_grad(function, argnums, has_aux)

    @wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        value, grads = value_and_gradients(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return run


# Products with Jacobians and Hessians


def vjp(function: Function, *primals: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """(y, pullback) of y = function(*primals), with has_aux (y, pullback, aux).

    y: Tensors in any structure; pullback(dy), dy of y's structure, gives the gradients of
    (y * dy).sum(), dy^T J, as a tuple. None stands for zeros. It may be called many times.
    """
    point = Point("vjp", function, primals, range(len(primals)), has_aux=has_aux)
    y, aux = point.results()
    for path, x in walk(y, "y"):
        fits = x is None or isinstance(x, Tensor)
        received = f"received {kind_of(x)} at {path}"
        expect(fits, f"vjp: expected a function that returns Tensors; {received}", TypeError)

    def pullback(cotangents: Any) -> tuple[Any, ...]:
        return point.pull(matching("vjp", "cotangent", cotangents, y))

    return (y, pullback, aux) if has_aux else (y, pullback)


def matching(name: str, noun: str, given: Any, like: Any) -> list[Tensor | None]:
    """The Tensors of a structure that must be another's, in its dtypes."""
    pairs, wanted = list(walk(given, noun)), list(walk(like, noun))
    paths, expected = [path for path, _ in pairs], [path for path, _ in wanted]
    received = f"{', '.join(expected)}; received {', '.join(paths)}"
    expect(paths == expected, f"{name}: expected {noun}s at {received}")
    found: list[Tensor | None] = []
    for (path, x), (_, y) in zip(pairs, wanted, strict=True):
        if x is not None:
            can = isinstance(y, Tensor) and y.dtype in FLOATS
            fits = can and isinstance(x, Tensor) and x.shape == y.shape
            what = f"None or a Tensor of shape {y.shape}" if can else f"None, as of {kind_of(y)}"
            shape = f" of shape {x.shape}" if isinstance(x, Tensor) else ""
            expect(fits, f"{name}: expected {path} to be {what}; received {kind_of(x)}{shape}")
        if isinstance(y, Tensor):
            found.append(x if x is None else astype(x, y.dtype))
    return found


def jvp(function: Function, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """(y, dy) of y = function(*primals): dy = J dx, the derivative in the direction of the tangents
    dx, of y's structure; None for what is no float.

    By reverse mode twice: dy^T J is linear in dy, and its gradient by dy is J. In eager mode that
    costs about three times the function's gradient; jit computes only what J dx reads.
    """
    check_tuples("jvp", primals, tangents)
    y, pullback = vjp(function, *primals)
    zeros = replace_tensors(y, lambda x: zeros_like(x) if x.dtype in FLOATS else None)
    point = Point("jvp", pullback, [zeros], [0])
    return y, point.pull(matching("jvp", "tangent", tuple(tangents), point.value))[0]


def hvp(function: Function, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, ...]:
    """H v of y = function(*primals), a number: the Hessian times the tangents v, a tuple of the
    primals' structure. By reverse mode over reverse mode; H itself is not formed (Pearlmutter,
    "Fast exact multiplication by the Hessian", 1994)."""
    check_tuples("hvp", primals, tangents)
    argnums = tuple(range(len(primals)))
    point = Point("hvp", grad(function, argnums), primals, argnums)
    return point.pull(matching("hvp", "tangent", tuple(tangents), point.value))


def check_tuples(name: str, *found: Any) -> None:
    fits = all(isinstance(each, (tuple, list)) for each in found)
    received = " and ".join(f"a {type(each).__name__}" for each in found)
    wanted = f"{name}: expected tuples of primals and of tangents"
    expect(fits, f"{wanted}; received {received}; write (x,), (v,)", TypeError)


def hessian(function: Function, argnums: int = 0) -> Function:
    """A function that gives the second derivatives of y = function(x, ...), a number, by a Tensor
    x: of shape (*x.shape, *x.shape), one product with the Hessian for each element."""

    @wraps(function, updated=())
    def run(*args: Any, **kwargs: Any) -> Tensor:
        x = args[argnums]
        expect(
            isinstance(x, Tensor), f"hessian: expected a Tensor; received {kind_of(x)}", TypeError
        )
        point = Point("hessian", grad(function, argnums), args, places(argnums, len(args)), kwargs)
        units = eye(x.size, dtype=x.dtype, device=x.device)
        rows = [point.pull([reshape(unit, x.shape)])[0] for unit in units]
        return reshape(stack(rows), (*x.shape, *x.shape))

    return run
