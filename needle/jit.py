"""`jit`: a function of Tensors as one compiled program.

    step = ndl.jit(step)        step(x, y) then runs as one native call

The function, a whole training step if you like, runs once on placeholders in lazy mode; what it
returns and writes becomes a program, replayed at each call. Arguments, captured tensors and
mutations are found by tracing. Each signature (structure, shapes, dtypes, devices, static values,
`training` of Modules, gradient mode, autocast) is a *variant* with a program of its own. How it is
done stands in capture/.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from functools import update_wrapper
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

import numpy as np

from needle import autograd
from needle.autograd import MODE, Hooks, Tensor
from needle.backend.device import Device
from needle.capture.capture import Capture
from needle.capture.replay import watched
from needle.capture.structure import Call, Unfit, in_words, walk
from needle.capture.variant import Variant
from needle.compiler.reference import ReferenceProgram
from needle.errors import expect
from needle.init.random import Generator, Source
from needle.ops.contract import Precision, get_matmul_precision

MOST_VARIANTS = 64  # of one function; the one unused for longest goes
PATIENCE = 8  # variants made by the same argument, after which a warning names it

MISS: Any = object()


class RetraceWarning(UserWarning):
    """A jitted function is compiled again and again."""


class JittedFunction:
    """What `jit` returns: called as the function is."""

    def __init__(self, function: Any, static_argnames: Sequence[str] = ()) -> None:
        if not callable(function):
            kind = type(function).__name__
            raise TypeError(f"jit: expected a function; received a {kind}")
        update_wrapper(self, function)
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        named = (static_argnames,) if isinstance(static_argnames, str) else static_argnames
        self.parameters, self.open = parameters_of(function)
        self.static = frozenset(named)
        if unknown := [] if self.open else sorted(self.static.difference(self.parameters)):
            names = f"{', '.join(self.parameters)}; received {', '.join(unknown)}"
            raise TypeError(f"jit: expected static_argnames among {self.name}'s arguments {names}")
        self.forget()

    def forget(self) -> None:
        """Drop all variants."""
        self.lock = threading.RLock()
        self.known: dict[tuple[Any, ...], list[Variant]] = {}
        self.made: list[tuple[str, dict[str, str]]] = []  # (reason, arguments in words)
        self.clock = 0
        self.causes: Counter[str] = Counter()
        self.bound: dict[int, tuple[Any, JittedFunction]] = {}
        self.generators: dict[Device, Generator] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        inside = MODE.trace is not None or MODE.tracing  # a part of the outer program
        if inside or MODE.record is not None or MODE.draw_from is not None:  # or of its replay
            return self.function(*args, **kwargs)
        if kwargs:
            args, kwargs = self.in_order(args, kwargs)
        call = Call(MODE.grad, MODE.autocast, Precision.dot)
        try:
            for name, x in zip(self.parameters, args, strict=False):
                (call.add_static if name in self.static else call.add)(x)
            for x in args[len(self.parameters) :]:
                call.add(x)
            for name, x in kwargs.items():
                call.key.append(name)
                (call.add_static if name in self.static else call.add)(x)
        except Unfit as unfit:
            self.refuse(unfit.args[0], args, kwargs)
        call.given = args, kwargs
        key = call.close()
        found = self.replay(key, call)
        if found is MISS:
            with self.lock:
                found = self.replay(key, call)
                if found is MISS:
                    new = self.capture(key, call, args, kwargs)
                    found = self.replay(key, call, new)
            assert found is not MISS, "a new variant does not fit the call that it was made for"
        return found

    def replay(self, key: tuple[Any, ...], call: Call, new: Variant | None = None) -> Any:
        """Run the variant that fits a call; MISS where there is none. new: one just traced for
        it."""
        for variant in self.known.get(key, ()):
            if variant.writes:
                with self.lock:
                    arrays = variant.read(call, variant is new)
                    if arrays is not None:
                        return self.run(variant, call, arrays)
            else:
                arrays = variant.read(call, variant is new)
                if arrays is not None:
                    return self.run(variant, call, arrays)
        return MISS

    def run(self, variant: Variant, call: Call, arrays: Any) -> Any:
        self.clock = variant.used = self.clock + 1
        if Hooks.judge is None:
            return variant.run(call, arrays)
        return watched(self.function, self.generator, variant, call, arrays)

    def in_order(self, args: Any, kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments given by name, in their places where that is possible."""
        given = list(args)
        for name in self.parameters[len(args) :]:
            if name not in kwargs:
                break
            given.append(kwargs[name])
        moved = self.parameters[len(args) : len(given)]
        return tuple(given), {name: kwargs[name] for name in sorted(kwargs) if name not in moved}

    def refuse(self, x: Any, args: Any, kwargs: Any) -> None:
        name = next((path for path, each in self.leaves(args, kwargs) if each is x), "an argument")
        kind = type(x).__name__
        if hasattr(x, "__array__"):
            wanted, cure = "a Tensor", "write ndl.Tensor(x)"
        else:
            wanted, cure = "Tensors, Modules or hashable values", "pass a tuple of them"
        raise TypeError(
            f"jit: expected {name} of {self.name} to be {wanted}; received a {kind}; {cure}"
        )

    def leaves(self, args: Any, kwargs: Any) -> list[tuple[str, Any]]:
        """(path, leaf) of all arguments."""
        more = range(len(self.parameters), len(args))
        names = [*self.parameters, *map("argument {}".format, more)]
        pairs = [*zip(names, args, strict=False), *kwargs.items()]
        found: list[tuple[str, Any]] = []
        for name, x in pairs:
            found += [(name, x)] if name in self.static else walk(x, name)
        return found

    # New variants

    def capture(self, key: tuple[Any, ...], call: Call, args: Any, kwargs: Any) -> Variant:
        """Trace the function for a call."""
        words = {path: in_words(x) for path, x in self.leaves(args, kwargs)}
        words["gradient mode"] = "on" if MODE.grad else "off"
        words["autocast"] = str(MODE.autocast or "off")
        words["matmul precision"] = get_matmul_precision()
        cause, reason = self.reason(key, call, words)
        pins: dict[int, Tensor] = {}
        while True:
            tracer = Capture(self.name, self.function, call, self.generator)
            variant = tracer.run(args, kwargs, pins)
            known = {n: x for n, x in enumerate(call.tensors) if x in variant.aliases}
            if known == pins:
                break
            tracer.snapshot.restore()
            pins = known
        variant.reason = reason
        self.made.append((reason, words))
        self.known.setdefault(key, []).insert(0, variant)
        self.evict()
        self.causes[cause] += 1
        if self.causes[cause] == PATIENCE and cause:
            cure = "pass numbers as Tensors, or pad to a few shapes"
            text = f"jit: {self.name} was compiled {PATIENCE} times because of {cause}; {cure}"
            warnings.warn(f"{text} (last: {reason})", RetraceWarning, stacklevel=3)
        return variant

    def reason(self, key: Any, call: Call, words: dict[str, str]) -> tuple[str, str]:
        """Which argument or state a new variant is due to, and in words."""
        if not self.made:
            return "", "first call"
        if key in self.known:
            difference = self.known[key][0].difference()
            return difference.split(":")[0], difference
        before = self.made[-1][1]
        for path in {**before, **words}:
            old, new = before.get(path, "absent"), words.get(path, "absent")
            if old != new:
                return path.split("[")[0].split(".")[0], f"{path}: {old} -> {new}"
        return "structure", "structure of the arguments, or a Module, or which arguments are one"

    def evict(self) -> None:
        """Keep at most MOST_VARIANTS."""
        found = [(each.used, key, each) for key, some in self.known.items() for each in some]
        if len(found) > MOST_VARIANTS:
            _, key, oldest = min(found[:], key=lambda x: x[0] if x[2].used else self.clock + 1)
            self.known[key].remove(oldest)
            if not self.known[key]:
                del self.known[key]

    def generator(self, device: Device) -> Generator:
        """Where a trace draws from: what `ndl.seed` began, else a generator of the function's own,
        seeded by one draw of NumPy's."""
        if Source.generator is not None:
            return Source.generator
        found = self.generators.get(device)
        if found is None:
            seed = int(np.random.randint(np.iinfo(np.int64).max))
            with autograd.mode(trace=None, lazy=False):
                found = self.generators[device] = Generator(seed, device)
        return found

    def variants(self) -> list[str]:
        """Why each variant was made, in order."""
        return [reason for reason, _ in self.made]

    def kept(self) -> list[Variant]:
        return [each for some in self.known.values() for each in some]

    def programs(self) -> list[tuple[str, list[Any]]]:
        """Of each variant that is kept: why it was made, and its programs, forward and backward."""
        return [(each.reason, each.programs()) for each in self.kept()]

    def explain(self, level: str = "summary", kernel: int | None = None, time: bool = False) -> str:
        """What was compiled, why, and how: of every variant that is kept, one stage.

        level: "summary" (kernels, memory, why fusions were refused), "graph", "loops", "llvm" or
        "asm"; kernel: its number, None for all. time: the summary with how long each kernel and
        each of its nests takes, and its share of what this machine can do, measured now: on copies
        of what the function reads from outside, and on arguments of ones. ValueError for what there
        is not.
        """
        fits = level == "summary" or not time
        expect(fits, f"explain: expected times of a summary; received {level!r}")
        explain = import_module("needle.compiler.explain").explain  # with the whole compiler
        parts = [f"{self.name}: {len(self.made)} variants"]
        for number, variant in enumerate(self.kept()):
            parts.append(f"variant {number}, {variant.reason}")
            for program in variant.programs():
                given = variant.known(program) if time else None
                runs_ops = isinstance(program, ReferenceProgram)
                parts.append(f"{program}" if runs_ops else explain(program, level, kernel, given))
        return "\n".join(parts)

    def __str__(self) -> str:
        return self.explain()

    # Methods

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        """A method: variants of its own for each object, which it does not keep alive."""
        if instance is None:
            return self
        found = self.bound.get(id(instance))
        if found is not None and found[0]() is instance:
            return found[1]
        key, bound = id(instance), self.bound
        reference = weakref.ref(instance, lambda _: bound.pop(key, None))
        method = JittedFunction(weak_method(self.function, reference), tuple(self.static))
        self.bound[key] = reference, method
        return method

    def __deepcopy__(self, memo: Any) -> JittedFunction:
        return self

    def __repr__(self) -> str:
        return f"jit({self.name}, {sum(map(len, self.known.values()))} variants)"


def weak_method(function: Callable[..., Any], reference: Any) -> Callable[..., Any]:
    """A bound method that holds its object weakly."""

    def method(*args: Any, **kwargs: Any) -> Any:
        return function(reference(), *args, **kwargs)

    update_wrapper(method, function)
    names = list(signature(function).parameters.values())[1:]
    method.__signature__ = signature(function).replace(parameters=names)  # type: ignore[attr-defined]
    return method


def parameters_of(function: Callable[..., Any]) -> tuple[tuple[str, ...], bool]:
    """The names of positional arguments, and whether there may be others."""
    try:
        found = list(signature(function).parameters.values())
    except (TypeError, ValueError):
        return (), True
    several = {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD, Parameter.KEYWORD_ONLY}
    names = tuple(x.name for x in found if x.kind not in several)
    return names, any(x.kind in several for x in found)


def jit(function: Any = None, *, static_argnames: Sequence[str] = ()) -> Any:
    """A function or method of Tensors, compiled as one program for each signature.

    Arguments and results: Tensors in nested tuples, lists, dicts and dataclasses; Modules, numbers
    and other hashable values are static (those of `static_argnames` as a whole). Tensors that the
    function knows from outside are read anew at each call; what it writes (`t.data = ...`,
    attributes of Modules and Optimizers, `.grad`) is written. Python's own side effects happen
    once, when the function is traced. Under autograd a call is one node.

    TraceError: the function needs a value while it is traced (`float(x)`, `if x > 0`), or leaves a
    traced Tensor where nobody would update it. All is then as before the call.
    """
    if function is None:
        return lambda found: JittedFunction(found, static_argnames)
    return JittedFunction(function, static_argnames)
