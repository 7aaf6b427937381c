"""`compare`: a function in two settings, op by op, and the first op whose values differ.

A setting is a mode, "eager", "lazy" or "jit", or a device, on which every op of the eager run is
computed once more. All settings begin with the same state and random numbers, and leave no trace.
Ops are paired by name, shape, place in the code and how often they have occurred there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ml_dtypes import finfo

from needle import autograd
from needle.array.ndarray import NDArray
from needle.autograd import MODE, Hooks, Tensor, Value, op_name
from needle.backend.device import Device
from needle.capture.capture import Capture
from needle.capture.holders import named_values
from needle.capture.part import Part
from needle.capture.replay import State
from needle.capture.structure import Call, walk
from needle.capture.variant import Variant
from needle.dtype import FLOATS
from needle.errors import expect
from needle.init.random import Generator, Source
from needle.jit import JittedFunction
from needle.nn.module import running_path
from needle.site import Site, current_site

MODES = ("eager", "lazy", "jit")
ROUNDINGS = 64  # by which an op may differ between devices, of its largest value


@dataclass(eq=False)
class Step:
    """An op that ran, and its value."""

    op: Any
    site: Site
    value: Value
    inputs: list[NDArray] = field(default_factory=list)
    result: Any = None  # what it gave in this run
    alone: Any = None  # what it gives for the inputs of the eager run

    @property
    def key(self) -> tuple[Any, ...]:
        return op_name(self.op), self.op.item, autograd.spec_of(self.value), self.site


@dataclass(frozen=True)
class Difference:
    """Where two values of one op differ most, and by how much."""

    op: str
    site: Site | None
    dtype: Any
    shape: tuple[int, ...]
    index: tuple[int, ...]  # of the largest difference
    a: float
    b: float
    absolute: float
    relative: float
    ulp: float  # units in the last place; NaN of what is no float
    count: int  # elements that differ

    def __str__(self) -> str:
        name = f"{self.op} {self.dtype}{list(self.shape)}" + (
            f" at {self.site}" if self.site else ""
        )
        size = int(np.prod(self.shape))
        return (
            f"{name}\n  at {list(self.index)}: {self.a:.9g} and {self.b:.9g}; "
            f"difference {self.absolute:.3g}, relative {self.relative:.3g}, {self.ulp:g} ULP; "
            f"{self.count:,} of {size:,} elements differ"
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

    def __str__(self) -> str:
        found = "all the same" if self.first is None else f"first to differ: {self.first}"
        lines = [f"{self.name}: {self.ops} ops, {found}"]
        if self.drift is not None:
            lines.append(f"with the rounding of all ops before it, first to differ: {self.drift}")
        return "\n".join(lines)

    __repr__ = __str__


class Runs:
    """Runs of a function in several settings, from one state."""

    def __init__(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self.function = function.function if isinstance(function, JittedFunction) else function
        self.args, self.kwargs = args, kwargs
        cells = getattr(self.function, "__closure__", None) or ()
        around = [*named_values(self.function).values(), *(x.cell_contents for x in cells)]
        tensors = [x for _, x in walk((args, kwargs, around), "") if isinstance(x, Tensor)]
        self.state = State(tensors)
        self.base: list[Step] = []  # the eager run's
        self.base = self.eager("eager")[0]

    def draw_from(self) -> Callable[[Device], Generator]:
        """The same random numbers in each run."""
        found: dict[Device, Generator] = {}
        return lambda device: Source.generator or found.setdefault(device, Generator(0, device))

    def run(self, setting: Any) -> tuple[list[Step], list[Any]]:
        """The steps, and the arrays that the function returned."""
        if isinstance(setting, Device):
            return self.on_device(setting), []
        return self.jit() if setting == "jit" else self.eager(setting)

    def recorded(self, call: Callable[[], Any], **settings: Any) -> tuple[list[Step], Any]:
        """The steps of a call, and what it returns."""
        steps: list[Step] = []
        at: dict[Value, Step] = {}

        def created(node: Value) -> None:
            op: Any = node.op
            if op.item is not None or not (op.moves or op_name(op) == "stop_gradient"):
                steps.append(Step(op, current_site(running_path()), node))
                at[node] = steps[-1]

        def computed(node: Value) -> None:
            if node in at:
                arrays = [x.realize_cached_data() for x in node.inputs]
                at[node].inputs = autograd.flattened(arrays)

        before = Hooks.create, Hooks.node, Hooks.judge
        Hooks.create, Hooks.node, Hooks.judge = created, computed, None
        try:
            with autograd.mode(**settings):
                return steps, call()
        finally:
            Hooks.create, Hooks.node, Hooks.judge = before

    def eager(self, mode: str) -> tuple[list[Step], list[Any]]:
        settings = {"lazy": mode == "lazy", "draw_from": self.draw_from()}
        with self.state.kept():
            steps, found = self.recorded(
                lambda: self.function(*self.args, **self.kwargs), **settings
            )
            results = arrays_of(found)
            for step in steps:
                step.result = step.alone = step.value.realize_cached_data()
        return steps, results

    def jit(self) -> tuple[list[Step], list[Any]]:
        """A program that gives the value of every op of the trace; and what jit returns."""
        call = Call(MODE.grad)
        call.add((self.args, self.kwargs))
        with self.state.kept():
            capture = Capture("compare", self.function, call, self.draw_from())
            given = capture.placeholders(self.args, self.kwargs, Variant({}))
            steps, _ = self.recorded(lambda: capture.call_function(*given))
            capture.trace.restore_gradients()
            captured = list(capture.trace.captured)
            part = Part([*capture.given, *captured])
            pending = [x for x in steps if x.value.cached_data is None]
            steps = [x for x in pending if isinstance(x.value, Tensor)]
            places = [part.place(x.value) for x in steps]
            device = capture.device()
            part.build(device, {}, {})
        arrays = [call.arrays[number] for number in capture.given.values()]
        found = part.run([*arrays, *(x.cached_data.compact() for x in captured)])
        for step, place in zip(steps, places, strict=True):
            step.result = step.alone = found[place]
        jitted = JittedFunction(self.function)
        jitted.generators[device] = self.draw_from()(device)
        with self.state.kept():
            return steps, arrays_of(jitted(*self.args, **self.kwargs))

    def on_device(self, device: Device) -> list[Step]:
        """Every op of the eager run, on its inputs and on what went before on this device."""
        found, known = [], dict[int, NDArray]()
        for step in self.base:
            alone = [x.to(device) for x in step.inputs]
            drifted = [known.get(id(x), y) for x, y in zip(step.inputs, alone, strict=True)]
            results = [autograd.evaluate(step.op, arrays, None) for arrays in (drifted, alone)]
            found.append(Step(step.op, step.site, step.value, [], *results))
            pairs = zip(*(autograd.flattened([x]) for x in (step.result, results[0])), strict=True)
            known |= {id(x): y for x, y in pairs}
        return found


def arrays_of(found: Any) -> list[NDArray]:
    """The arrays of the Tensors that a function returned."""
    return [x.realize_cached_data() for _, x in walk(found, "") if isinstance(x, Tensor)]


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
    last = [(None, x, y) for x, y in zip(results, other_results, strict=False)]
    alone = first_of([*((x, x.alone, y.alone) for x, y in pairs), *last], limits)
    drift = first_of([(x, x.result, y.result) for x, y in pairs], limits) if devices else None
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


def first_of(pairs: Sequence[tuple[Any, Any, Any]], limits: Any) -> Difference | None:
    """The first difference among (step, value, value)."""
    found = (difference(step, x, y, limits) for step, x, y in pairs)
    return next((each for each in found if each is not None), None)


def difference(
    step: Step | None, x: Any, y: Any, limits: tuple[float, float, float]
) -> Difference | None:
    """The largest difference of two values beyond the limits, None where there is none."""
    for a, b in zip(autograd.flattened([x]), autograd.flattened([y]), strict=True):
        found = difference_of(a.view, b.view, *limits)
        if found is not None:
            name, site = (op_name(step.op), step.site) if step else ("the result", None)
            return Difference(name, site, a.dtype, a.shape, *found)
    return None


def difference_of(
    a: np.ndarray, b: np.ndarray, roundings: float, rtol: float, atol: float
) -> tuple[Any, ...] | None:
    is_float = a.dtype in FLOATS
    wide = [x.astype(np.float64) for x in (a, b)]
    with np.errstate(all="ignore"):
        gap = np.abs(wide[0] - wide[1])
        sizes = np.abs(wide[0])
        largest = sizes[np.isfinite(sizes)].max(initial=0.0)
        eps = float(finfo(a.dtype).eps) if is_float else 0.0
        close = gap <= atol + max(rtol, roundings * eps) * largest
        signs = (
            np.signbit(wide[0]) == np.signbit(wide[1]) if not (roundings or rtol or atol) else True
        )
        same = (close & signs) | (np.isnan(wide[0]) & np.isnan(wide[1]))
        same |= (wide[0] == wide[1]) & signs
    if same.all():
        return None
    gap = np.where(same, -1.0, np.where(np.isnan(gap), np.inf, gap))
    index = np.unravel_index(int(gap.argmax()), gap.shape)
    x, y, size = float(wide[0][index]), float(wide[1][index]), float(gap[index])
    relative = size / max(abs(x), abs(y)) if max(abs(x), abs(y)) > 0 else 0.0
    ulp = float(abs(int(ordered(a[index])) - int(ordered(b[index])))) if is_float else np.nan
    return tuple(map(int, index)), x, y, size, relative, ulp, int((~same).sum())


def ordered(x: Any) -> int:
    """A float's bits as an integer that grows with it by 1 per representable number."""
    bits = int(np.asarray(x).view(f"i{x.dtype.itemsize}"))
    return bits if bits >= 0 else -(bits & ((1 << 8 * x.dtype.itemsize - 1) - 1))
