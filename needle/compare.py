"""`compare`: a function in two settings, op by op, and the first op whose values differ.

A setting is a mode, "eager", "lazy" or "jit", or a device, on which every op of the eager run is
computed once more. All settings begin with the same state and random numbers, and leave no trace.
Ops are paired by name, shape, place in the code and how often they have occurred there. The body of
a scan is run op by op besides, the first TURNS turns of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from types import CellType
from typing import Any

import numpy as np
from ml_dtypes import finfo

from needle import autograd
from needle.array.ndarray import NDArray
from needle.autograd import MODE, Hooks, TensorTuple, op_name
from needle.backend.device import Device
from needle.capture.capture import Capture
from needle.capture.holders import named_values
from needle.capture.part import Part
from needle.capture.replay import State
from needle.capture.structure import Call, tensors_in
from needle.capture.variant import Variant
from needle.dtype import FLOATS
from needle.errors import expect
from needle.init.random import Generator, Source
from needle.jit import JittedFunction
from needle.ops.scan import ORIGINS, Origin, Scan, turns_of
from needle.scan import origin_of

MODES = ("eager", "lazy", "jit")
TURNS = 16  # of a scan, whose ops are compared one by one
ROUNDINGS = 64  # by which an op may differ between devices, of its largest value


@dataclass(eq=False)
class Step:
    """An op that ran, and its results."""

    key: tuple[str, tuple[Any, ...], Any]  # name, specs, place: a Site, or in words
    value: Any
    op: Any = None
    inputs: list[NDArray] = field(default_factory=list)
    arrays: Any = None  # what it gave in this run
    alone: Any = None  # what it gives for the inputs of the eager run


@dataclass(frozen=True)
class Difference:
    """Where two values of one op differ most, and by how much."""

    op: str
    site: Any  # a Site, in the gradient of a scan in words; None of a result
    dtype: Any
    shape: tuple[int, ...]
    place: tuple[int, ...]  # of the largest difference
    a: float
    b: float
    absolute: float
    ulp: float  # units in the last place; NaN of what is no float
    count: int  # elements that differ

    @property
    def relative(self) -> float:
        largest = max(abs(self.a), abs(self.b))
        return self.absolute / largest if largest else 0.0

    def __str__(self) -> str:
        at = f" {Origin(self.site)}" if self.site else ""
        return (
            f"{self.op} {self.dtype}{list(self.shape)}{at}\n"
            f"  at {list(self.place)}: {self.a:.9g} and {self.b:.9g}; difference "
            f"{self.absolute:.3g}, relative {self.relative:.3g}, {self.ulp:g} ULP; "
            f"{self.count:,} of {prod(self.shape):,} elements differ"
        )


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: true if it found no difference."""

    name: str
    ops: int  # that were compared
    first: Difference | None  # the first op whose values differ; between devices on equal inputs
    drift: Difference | None  # between devices: with what the ops before it made of theirs

    @property
    def same(self) -> bool:
        return self.first is None

    def __bool__(self) -> bool:
        return self.same

    def __repr__(self) -> str:
        found = f"{self.name}: {self.ops} ops, "
        found += "all the same" if self.first is None else f"first to differ: {self.first}"
        if self.drift is not None:
            found += f"\nwith the rounding of all ops before it, first to differ: {self.drift}"
        return found


class Runs:
    """Runs of a function in several settings, from one state."""

    def __init__(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.function = function.function if isinstance(function, JittedFunction) else function
        self.args, self.kwargs = args, kwargs
        cells = getattr(self.function, "__closure__", None) or ()
        around = [each.cell_contents for each in cells if each != CellType()]
        self.state = State(tensors_in((args, kwargs, around, named_values(self.function))))

    def run(self, setting: Any) -> tuple[list[Step], list[NDArray]]:
        """The steps, and the arrays that the function returned."""
        if isinstance(setting, Device):
            return self.on_device(setting), []
        return self.eager if setting == "eager" else self.jit() if setting == "jit" else self.ops()

    def draw_from(self) -> Callable[[Device], Generator]:
        """The same random numbers in each run."""
        found: dict[Device, Generator] = {}
        return lambda device: Source.generator or found.setdefault(device, Generator(0, device))

    def recorded(self, call: Callable[[], Any], **settings: Any) -> tuple[list[Step], Any]:
        """The steps of a call, and what it returns."""
        steps: dict[Any, Step] = {}
        turns = [""]  # of scans, the inner one last

        def created(node: Any) -> None:
            place = origin_of(node).place
            if isinstance(node.op, Scan):
                enter(node, node.op)
            name, specs = op_name(node.op), autograd.flattened([autograd.spec_of(node)])
            if not node.op.moves and name != "stop_gradient":  # those are views, and not always ops
                steps[node] = Step((name + turns[-1], tuple(specs), place), node)

        def enter(node: Any, op: Scan) -> None:
            turns.append(before := turns[-1])
            for number, turn in enumerate(turns_of(op, node.inputs, ORIGINS.get(node, ()))):
                if number == TURNS:
                    break
                turns[-1] = f"{before} in turn {turn} of {op.length}"
            turns.pop()

        def computed(node: Any) -> None:
            if node in steps:
                arrays = [x.realize_cached_data() for x in node.inputs]
                steps[node].inputs = autograd.flattened(arrays)
                steps[node].op = node.op

        before = Hooks.create, Hooks.node, Hooks.judge
        Hooks.create, Hooks.node, Hooks.judge = created, computed, None
        try:
            with autograd.mode(**settings):
                found = call()
            return list(steps.values()), found
        finally:
            Hooks.create, Hooks.node, Hooks.judge = before

    @cached_property
    def eager(self) -> tuple[list[Step], list[NDArray]]:
        return self.ops(lazy=False)

    def ops(self, lazy: bool = True) -> tuple[list[Step], list[NDArray]]:
        with self.state.kept():
            steps, found = self.recorded(self.call, lazy=lazy, draw_from=self.draw_from())
            for step in steps:
                step.arrays = step.alone = step.value.realize_cached_data()
            return steps, arrays_of(found)

    def call(self) -> Any:
        return self.function(*self.args, **self.kwargs)

    def jit(self) -> tuple[list[Step], list[NDArray]]:
        """A program that gives the value of every op of the trace; and what jit returns."""
        call = Call(MODE.grad)
        call.add((self.args, self.kwargs))
        with self.state.kept():
            capture = Capture("compare", self.function, call, self.draw_from())
            given = capture.placeholders(self.args, self.kwargs, Variant({}))
            steps, _ = self.recorded(lambda: capture.call_function(*given))
            capture.trace.restore_gradients()
            steps = [x for x in steps if x.value.cached_data is None]
            with autograd.mode(trace=capture.trace, lazy=True):  # for the items of tuples
                values = [x.value for x in steps]
                items = [tuple(x) if isinstance(x, TensorTuple) else (x,) for x in values]
            captured = list(capture.trace.captured)
            part, device = Part([*capture.given, *captured]), capture.device()
            places = [tuple(map(part.place, each)) for each in items]
            part.build(device, {}, {})
        arrays = [call.arrays[number] for number in capture.given.values()]
        found = part.run([*arrays, *(x.cached_data.compact() for x in captured)])
        for step, numbers in zip(steps, places, strict=True):
            step.arrays = step.alone = tuple([found[number] for number in numbers])
        jitted = JittedFunction(self.function)
        jitted.generators[device] = self.draw_from()(device)
        with self.state.kept():
            return steps, arrays_of(jitted(*self.args, **self.kwargs))

    def on_device(self, device: Device) -> list[Step]:
        """Every op of the eager run, on its inputs and on what went before on this device."""
        found, known = [], dict[int, NDArray]()
        for step in self.eager[0]:
            alone = [x.to(device) for x in step.inputs]
            drifted = [known.get(id(x), y) for x, y in zip(step.inputs, alone, strict=True)]
            results = [autograd.evaluate(step.op, arrays, None) for arrays in (drifted, alone)]
            found.append(Step(step.key, step.value, None, [], *results))
            pairs = (autograd.flattened([x]) for x in (step.arrays, results[0]))
            known |= {id(x): y for x, y in zip(*pairs, strict=True)}
        return found


def arrays_of(found: Any) -> list[NDArray]:
    """The arrays of the Tensors that a function returned."""
    return [x.realize_cached_data() for x in tensors_in(found)]


def compare(
    function: Any,
    *args: Any,
    a: Any = "eager",
    b: Any = "jit",
    rtol: float | None = None,
    atol: float = 0.0,
    **kwargs: Any,
) -> Comparison:
    """Run function(*args, **kwargs) in two settings; the result names the first op whose values
    differ: its module path and source line, where, by how much.

    a, b: "eager", "lazy", "jit", or a device, on which each op of the eager run is computed again:
    on the same inputs, and on the results of the ops before it there. Values x and y are the same
    if |x - y| <= atol + rtol * max|x|; rtol is 0 between modes, some roundings of the dtype between
    devices. State and random generators are set back between the runs and afterwards; tensors are
    found among the arguments, in Modules, Optimizers, and the variables that the function names.
    ValueError: an unknown setting.
    """
    for setting in (a, b):
        known = isinstance(setting, Device) or setting in MODES
        listed = f"{', '.join(map(repr, MODES))} or a device; received {setting!r}"
        expect(known, f"compare: expected a setting of {listed}")
    runs = Runs(function, args, kwargs)
    (steps, results), (others, other_results) = runs.run(a), runs.run(b)
    devices = isinstance(a, Device) or isinstance(b, Device)
    limits = ROUNDINGS if devices and rtol is None else 0, rtol or 0.0, atol
    pairs = paired(steps, others)
    last = [(("the result", (), None), x, y) for x, y in zip(results, other_results, strict=False)]
    alone = first_of([*((x.key, x.alone, y.alone) for x, y in pairs), *last], limits)
    drift = first_of([(x.key, x.arrays, y.arrays) for x, y in pairs], limits) if devices else None
    name = f"compare({getattr(function, '__name__', function)}, {a}, {b})"
    return Comparison(name, len(pairs), alone, drift)


def paired(steps: Sequence[Step], others: Sequence[Step]) -> list[tuple[Step, Step]]:
    """Steps with one key, which occurs as often in both runs."""
    known: dict[Any, list[Step]] = {}
    for each in others:
        known.setdefault(each.key, []).append(each)
    counts = Counter(each.key for each in steps)
    rest = {key: iter(some) for key, some in known.items() if len(some) == counts[key]}
    return [(x, next(rest[x.key])) for x in steps if x.key in rest]


def first_of(triples: Sequence[tuple[Any, Any, Any]], limits: Any) -> Difference | None:
    """The first difference beyond the limits among (key, value, value)."""
    for (name, _, site), *values in triples:
        for a, b in zip(*(autograd.flattened([x]) for x in values), strict=True):
            found = difference_of(a.view, b.view, *limits)
            if found is not None:
                return Difference(name, site, a.dtype, a.shape, *found)
    return None


def difference_of(
    a: np.ndarray, b: np.ndarray, roundings: float, rtol: float, atol: float
) -> tuple[Any, ...] | None:
    """(place, its values, their distance, the same in ULP, how many elements differ)"""
    eps = float(finfo(a.dtype).eps) if a.dtype in FLOATS else 0.0
    x, y = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(all="ignore"):
        gap, largest = np.abs(x - y), np.abs(x[np.isfinite(x)]).max(initial=0.0)
        same = (a == b) & (np.signbit(x) == np.signbit(y)) | np.isnan(x) & np.isnan(y)
        if roundings or rtol or atol:
            same |= (a == b) | (gap <= atol + max(rtol, roundings * eps) * largest)
    if same.all():
        return None
    gap = np.where(same, -1.0, np.where(np.isnan(gap), np.inf, gap))
    place = tuple(map(int, np.unravel_index(int(gap.argmax()), gap.shape)))
    ulp = float(abs(ordered(a[place]) - ordered(b[place]))) if eps else np.nan
    return place, float(x[place]), float(y[place]), float(gap[place]), ulp, int((~same).sum())


def ordered(x: Any) -> int:
    """A float's bits as an integer that grows with it by 1 per representable number."""
    bits = int(np.asarray(x).view(f"i{x.dtype.itemsize}"))
    return bits if bits >= 0 else -(bits & ((1 << 8 * x.dtype.itemsize - 1) - 1))
