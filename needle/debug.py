"""Two watchers over the graph.

`detect_anomaly()` names the first op that makes a NaN or an infinity, forward or backward: op,
module, source line, and the range of its inputs. The growth detector, on by default, notices that
live values keep growing from step to step (the old graph is held by something that should have been
detached) and warns once, naming the line. It costs one comparison per value until growth has gone
on for PATIENCE steps; only then does it record where values are made.
"""

from __future__ import annotations

import gc
import linecache
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from needle import autograd
from needle.autograd import MODE, Hooks, Value, op_name
from needle.dtype import FLOATS
from needle.nn.module import running_path

PACKAGE = str(Path(__file__).parent)
APPLICATIONS = tuple(str(Path(PACKAGE, room)) for room in ("train", "cli"))


class Site(NamedTuple):
    """Where a value was made: the line of the user's code, and the module that ran."""

    file: str
    line: int
    path: str
    backward: bool

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.line).strip()
        place = f"{self.file}:{self.line}" + (f" `{code}`" if code else "")
        return f"{place} (in {self.path})" if self.path else place


def current_site(path: str = "") -> Site:
    """The innermost line of the stack that is not needle's own; path is the module's."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    in_backward = MODE.backward_of is not None
    return Site(frame.f_code.co_filename, frame.f_lineno, path, in_backward)


def is_inside(file: str) -> bool:
    """Whether a file is part of the library (the applications in it count as users)."""
    return file.startswith(PACKAGE) and not file.startswith(APPLICATIONS)


# Anomalies


class AnomalyError(FloatingPointError):
    """An op made a NaN or an infinity."""


class AnomalyDetector:
    """Looks at every computed value; raises at the first that is not finite though its op's inputs
    were."""

    def __init__(self, infinities: bool) -> None:
        self.infinities = infinities
        self.sites: WeakKeyDictionary[Value, Site] = WeakKeyDictionary()

    def made(self, node: Value) -> None:
        self.sites[node] = current_site(running_path())

    def computed(self, node: Value) -> None:
        """Check one node; its inputs are still at hand."""
        nan, infinite = state_of(arrays_of(node))
        if node.op is None or not (nan or (infinite and self.infinities)):
            return
        name, site = op_name(node.op), self.sites.get(node) or current_site(running_path())
        inputs = [array for x in node.inputs for array in arrays_of(x)]
        nan_before, infinite_before = state_of(inputs)
        if nan_before:
            self.blame_leaf(node, name, site)
        elif nan or not infinite_before:
            ranges = "; ".join(map(range_of, inputs)) or "no inputs"
            what = "NaN" if nan else "infinity"
            raise AnomalyError(f"{name} made {what} {self.place(site)}; its inputs: {ranges}")

    def place(self, site: Site) -> str:
        """Where an op ran: its line, or the forward op whose gradient it is part of."""
        forward = MODE.backward_of
        if forward is None or forward.op is None:
            return f"at {site}"
        origin = self.sites.get(forward)
        computed = f" computed at {origin}" if origin else ""
        return f"in the gradient of {op_name(forward.op)}{computed}"

    def blame_leaf(self, node: Value, name: str, site: Site) -> None:
        """A NaN that no op made came in with a leaf: name the op that read it first."""
        for index, x in enumerate(node.inputs):
            if x.op is None and state_of(arrays_of(x))[0]:
                leaf = f"NaN from its input {index}, which no op made"
                raise AnomalyError(f"{name} read {leaf}, at {site}")


def arrays_of(node: Value) -> list[np.ndarray]:
    """The float arrays that a node holds."""
    data = node.realize_cached_data()
    views = [each.view for each in (data if type(data) is tuple else (data,))]
    return [view for view in views if view.dtype in FLOATS]


def state_of(arrays: list[np.ndarray]) -> tuple[bool, bool]:
    """Whether arrays hold a NaN, and whether they hold an infinity."""
    odd = [array for array in arrays if not np.isfinite(array).all()]
    return any(np.isnan(x).any() for x in odd), any(np.isinf(x).any() for x in odd)


def range_of(array: np.ndarray) -> str:
    """Shape, dtype, and the smallest and largest number."""
    numbers = array[~np.isnan(array)].astype(np.float64)
    span = f"from {numbers.min():g} to {numbers.max():g}" if numbers.size else "without numbers"
    return f"{array.dtype}{list(array.shape)} {span}"


@contextmanager
def detect_anomaly(infinities: bool = True) -> Iterator[None]:
    """Within the block, the first op that makes a NaN (or an infinity, unless infinities=False)
    raises AnomalyError.

    Slow: every value is looked at. Infinities that come in with the data (a mask of -inf) are
    nobody's fault.
    """
    detector = AnomalyDetector(infinities)
    before = Hooks.node, Hooks.create
    Hooks.node, Hooks.create = detector.computed, detector.made
    try:
        yield
    finally:
        Hooks.node, Hooks.create = before


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
