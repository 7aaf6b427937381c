"""Two watchers over the graph.

`detect_anomaly()` names the first op that makes a NaN or an infinity, forward or backward: op,
module, source line, and the range of its inputs. The growth detector, on by default, notices that
live values keep growing from step to step (the old graph is held by something that should have been
detached) and warns once, naming the line. It costs one comparison per value until growth has gone
on for PATIENCE steps; only then does it record where values are made.
"""

from __future__ import annotations

import gc
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import isfinite, isnan
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from needle import autograd
from needle.array.ndarray import NDArray
from needle.autograd import MODE, Hooks, Tensor, Value, op_name
from needle.compare import compare as compare
from needle.dtype import FLOATS
from needle.ops.scan import ORIGINS, Origin, Scan, turns_of
from needle.scan import origin_of
from needle.site import Site, current_site

# Anomalies


class AnomalyError(FloatingPointError):
    """An op made a NaN or an infinity."""


class AnomalyDetector:
    """Looks at every computed value; raises at the first that is not finite though its op's inputs
    were."""

    replays = 0  # runs of jitted functions after which they were run again, op by op

    def __init__(self, infinities: bool) -> None:
        self.infinities = infinities
        self.kinds = 3 if infinities else 1  # of runtime.made
        self.origins: WeakKeyDictionary[Value, Origin] = WeakKeyDictionary()
        self.turns = ""  # of scans whose bodies run, in words
        # By variant of a jitted function: what it will read from outside, which holds no NaN, and
        # what its last run replaced, whose memory the next one may take
        self.clean: dict[Any, list[NDArray]] = {}
        self.spare: dict[Any, list[NDArray]] = {}

    def suspects(self, made: int, read: Iterable[NDArray], found: Iterable[NDArray]) -> bool:
        """Whether what a program made, read or returned calls for a run op by op."""
        odd = bool(made & self.kinds) or any(map(has_nan, read))
        odd = odd or any(self.is_odd(*state_of([x.view])) for x in found if is_odd(x))
        self.replays += odd
        return odd

    def is_odd(self, nan: bool, infinite: bool) -> bool:
        return nan or (infinite and self.infinities)

    def made(self, node: Value) -> None:
        if MODE.trace is None:
            self.origins[node] = origin_of(node)

    def computed(self, node: Value) -> None:
        """Check one node; its inputs are still at hand."""
        if isinstance(node.op, Scan):
            self.enter(node, node.op)
        nan, infinite = state_of(arrays_of(node))
        if node.op is None or not self.is_odd(nan, infinite):
            return
        name, place = op_name(node.op), self.place(node)
        inputs = [array for x in node.inputs for array in arrays_of(x)]
        nan_before, infinite_before = state_of(inputs)
        if nan_before:
            self.blame_leaf(node, name, f"{place}{self.turns}")
        elif nan or not infinite_before:
            ranges = "; ".join(map(range_of, inputs)) or "no inputs"
            what = "NaN" if nan else "infinity"
            raise AnomalyError(f"{name} made {what} {place}{self.turns}; its inputs: {ranges}")

    def place(self, node: Value) -> str:
        """Where an op ran: its line, or the forward op whose gradient it is part of."""
        forward, origin = MODE.backward_of, self.origins.get(node) or origin_of(node)
        if forward is None or forward.op is None or isinstance(origin.place, str):
            return str(origin)
        before = self.origins.get(forward)
        computed = f" computed {before}" if before else ""
        return f"in the gradient of {op_name(forward.op)}{computed}"

    def enter(self, node: Value, op: Scan) -> None:
        """Run a scan's body once more, turn by turn and op by op: each is looked at."""
        inputs = [Tensor.make_const(x.realize_cached_data()) for x in node.inputs]
        before, here = self.turns, self.place(node)
        known = ORIGINS.get(node) or [Origin()] * len(op.body.steps)
        origins = [x if x.is_known else Origin(here, x.inside) for x in known]
        try:
            for turn in turns_of(op, inputs, origins):
                self.turns = f"{before}, in turn {turn} of {op.length}"
        finally:
            self.turns = before

    def blame_leaf(self, node: Value, name: str, place: str) -> None:
        """A NaN that no op made came in with a leaf: name the op that read it first."""
        for index, x in enumerate(node.inputs):
            if x.op is None and state_of(arrays_of(x))[0]:
                leaf = f"NaN from its input {index}, which no op made"
                raise AnomalyError(f"{name} read {leaf}, {place}")


def arrays_of(node: Value) -> list[np.ndarray]:
    """The float arrays that a node holds."""
    data = node.realize_cached_data()
    views = [each.view for each in (data if type(data) is tuple else (data,))]
    return [view for view in views if view.dtype in FLOATS]


def state_of(arrays: list[np.ndarray]) -> tuple[bool, bool]:
    """Whether arrays hold a NaN, and whether they hold an infinity."""
    odd = [array for array in arrays if not np.isfinite(array).all()]
    return any(np.isnan(x).any() for x in odd), any(np.isinf(x).any() for x in odd)


def has_nan(array: NDArray) -> bool:
    form = array.form
    return form.is_float and form.size > 0 and isnan(np.maximum.reduce(array.view, axis=None))


def is_odd(array: NDArray) -> bool:
    """Whether an array may hold a NaN or an infinity."""
    if array.form.size == 1:
        return not isfinite(array.view.item())
    return array.form.is_float


def range_of(array: np.ndarray) -> str:
    """Shape, dtype, and the smallest and largest number."""
    numbers = array[~np.isnan(array)].astype(np.float64)
    span = f"from {numbers.min():g} to {numbers.max():g}" if numbers.size else "without numbers"
    return f"{array.dtype}{list(array.shape)} {span}"


@contextmanager
def detect_anomaly(infinities: bool = True) -> Iterator[AnomalyDetector]:
    """Within the block, the first op that makes a NaN (or an infinity, unless infinities=False)
    raises AnomalyError.

    In eager and lazy mode every value is looked at, which is slow. A jitted function runs as ever;
    the processor notes what makes a NaN or an infinity (IEEE 754's exceptions), and then the
    function runs once more, op by op, from the same state: all is as before the call when the error
    is raised. `replays` of what the block gives counts such runs, those included that find nothing.
    Infinities that come in with the data (a mask of -inf) are nobody's fault.
    """
    detector = AnomalyDetector(infinities)
    before = Hooks.node, Hooks.create, Hooks.judge
    Hooks.node, Hooks.create, Hooks.judge = detector.computed, detector.made, detector
    try:
        yield detector
    finally:
        Hooks.node, Hooks.create, Hooks.judge = before
        detector.clean, detector.spare = {}, {}


# Growth

PATIENCE = 5  # steps of growth before lines are recorded; four times as many before they are read
GROWTH = 200  # and so many values more than at the first of them
STEP_VALUES = 25_000  # new values that count as a step where there is no backward()
LULL = 4  # steps without growth that end a streak


class MemoryGrowthWarning(UserWarning):
    """Live values keep growing from step to step."""


class GrowthDetector:
    """Counts steps at which more values live than ever before; records lines when that goes on;
    warns once."""

    def __init__(self) -> None:
        self.patience = PATIENCE
        self.forget()

    def forget(self) -> None:
        """Begin anew at the present number of live values."""
        self.high = self.first = autograd.TENSOR_COUNTER
        self.streak = self.quiet = self.step = 0
        self.made_at: WeakKeyDictionary[Value, tuple[int, Site]] = WeakKeyDictionary()
        if Hooks.create == self.record:
            Hooks.create = None
        Hooks.growth_at = self.high + STEP_VALUES

    def step_ended(self) -> None:
        """A backward() is done, or STEP_VALUES more values live."""
        live = autograd.TENSOR_COUNTER
        Hooks.growth_at = max(live, self.high) + STEP_VALUES
        if MODE.trace is not None:
            return  # a trace grows to its end, and is dropped
        self.step += 1
        if live <= self.high:
            self.quiet += 1
            if self.quiet >= LULL and self.streak:
                self.forget()
            return
        self.high, self.quiet = live, 0
        self.streak += 1
        if self.streak == self.patience and Hooks.create is None:
            Hooks.create = self.record
        elif self.grown() and Hooks.create == self.record:
            self.conclude()

    def grown(self) -> bool:
        return self.streak >= 4 * self.patience and self.high - self.first >= GROWTH

    def record(self, node: Value) -> None:
        if not MODE.tracing:
            self.made_at[node] = (self.step, current_site())

    def conclude(self) -> None:
        """Warn if values of steps long ago still hold a graph; else it was garbage or data, so wait
        longer next time."""
        gc.collect()
        remains = autograd.TENSOR_COUNTER - self.first >= GROWTH  # and was not cycles of garbage
        made = self.made_at.items()
        old = {
            x: site for x, (step, site) in made if step < self.step - PATIENCE and x.op is not None
        }
        holder = self.find_holder(old) if remains else None
        growth = f"in each of {self.streak} steps, from {self.first} to {self.high}"
        self.patience *= 2
        self.forget()
        if holder is not None:
            enable_growth_detector(False)
            cure = "keep w.data, w.detach() or float(loss), or compute under ndl.no_grad()"
            message = f"live values grew {growth}: {holder} holds the graph of past steps; {cure}"
            warnings.warn_explicit(message, MemoryGrowthWarning, holder.file, holder.line)

    def find_holder(self, old: dict[Value, Site]) -> Site | None:
        """The line that keeps old graphs: first one whose value is made of its own value a step
        before, then one whose value any later step reads, then one whose value nothing reads."""
        again, read = Counter[Site](), Counter[Site]()
        inner: set[Value] = set()
        for node, (step, site) in self.made_at.items():
            for x in node.inputs:
                inner.add(x)
                origin = self.made_at.get(x)
                if x in old and origin is not None and origin[0] < step and not origin[1].backward:
                    read[origin[1]] += 1
                    again[origin[1]] += origin[1] == site
        roots = Counter(site for x, site in old.items() if x not in inner and not site.backward)
        found = (+again or read or roots).most_common(1)
        # A value of every step is a graph that grows; fewer are what somebody keeps on purpose.
        return found[0][0] if found and found[0][1] >= PATIENCE else None


DETECTOR = GrowthDetector()


def enable_growth_detector(enabled: bool = True) -> None:
    """Turn the warning about growing graphs on (as it is at the start) or off."""
    Hooks.backward = Hooks.growth = DETECTOR.step_ended if enabled else None
    DETECTOR.forget()


enable_growth_detector()
