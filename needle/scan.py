"""ndl.scan: a loop whose body is traced once. What it becomes is in ops/scan.py.

The body runs on placeholders, under a Trace. Tensors from outside that it reads are *captured*;
those whose data it sets, the state of a random generator among them, are carried from turn to turn
like the carry itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from needle import autograd
from needle.autograd import MODE, Hooks, Tensor, TensorTuple, Value, spec_of
from needle.backend.device import Device
from needle.capture.structure import rebuild, walk
from needle.capture.trace import Trace
from needle.errors import expect
from needle.init.random import Generator, drawing
from needle.nn.module import Module, running_path
from needle.ops import concatenate, reshape
from needle.ops.composite import placeholder
from needle.ops.scan import ORIGINS, Origin, loop, segment_of
from needle.site import current_site


class BodyTrace(Trace):
    """The trace of a body, inside of whatever runs."""

    def __init__(self, name: str) -> None:
        super().__init__(name, self.source)
        self.outer = MODE.trace
        self.own: Generator | None = None
        self.origins: dict[Value, Origin] = {}  # while somebody watches

    def note(self, value: Value, inputs: Sequence[Value]) -> tuple[Value, ...]:
        if Hooks.create is not None:
            self.origins[value] = origin_of(value)
        return super().note(value, inputs)

    def source(self, device: Device) -> Generator:
        """Where draws outside of the body come from, else a generator seeded by a draw of
        NumPy's."""
        with autograd.mode(trace=self.outer, lazy=False, tracing=False):
            found = drawing(device) or self.own
            if found is None:
                seed = int(np.random.randint(np.iinfo(np.int64).max))
                found = self.own = Generator(seed, device)
        return found

    def enter(self, module: Module) -> None:
        if self.outer is not None:
            self.outer.enter(module)

    def read(self, x: Any) -> Sequence[Any]:
        """What a node of the body is made of; nothing for what is there before a turn."""
        if x not in self.created or x.cached_data is not None or x.op is None:
            if isinstance(x, TensorTuple):
                self.refuse("a TensorTuple from outside is read", "read its items before")
            return ()
        return x.operands


def origin_of(value: Value) -> Origin:
    """Where a value is made; the origins of a Scan's steps are noted."""
    found = MODE.origin or Origin()
    if found.inside:
        ORIGINS[value] = found.inside
    return found if found.is_known else Origin(current_site(running_path()), found.inside)


class Body:
    """A function's body as a Segment, for given carries and elements of xs."""

    def __init__(self, function: Callable[..., Any], init: Any, carry: Any, x: Any) -> None:
        name = getattr(function, "__name__", "body")
        trace = self.trace = BodyTrace(name)
        inputs: list[Any] = [x for _, x in walk((carry, x), "") if isinstance(x, Tensor)]
        trace.created.update(dict.fromkeys(inputs, ""))
        settings: Any = {"trace": trace, "lazy": True, "tracing": True, "record": None}
        with autograd.mode(**settings):
            found = function(carry, x)
            pair = isinstance(found, (tuple, list)) and len(found) == 2
            received = f"received {type(found).__name__}"
            expect(pair, f"scan: expected a body that returns (carry, y); {received}", TypeError)
            after, self.y = found
            self.state: list[Any] = [each for each in trace.written if each not in trace.created]
            check_carry(init, after)
            ys = tensors("y", self.y)
            outputs = [*tensors("carry", after), *(trace.written[each] for each in self.state), *ys]
            outputs = [trace.current(each) for each in outputs]
        trace.restore_gradients()
        count = len(tensors("carry", carry))
        inputs[count:count] = self.state
        self.segment, self.captured, made = segment_of(outputs, inputs, trace.read)
        self.origins = [trace.origins.get(x, Origin()) for x in made] if trace.origins else []
        for each in self.state:
            wrong = f"received {name}, which sets data of a Tensor that requires a gradient"
            expect(not each.requires_grad, f"scan: expected carries to be returned; {wrong}")


def tensors(name: str, found: Any) -> list[Any]:
    """The Tensors of a structure, which holds nothing else but None."""
    leaves = [(path, x) for path, x in walk(found, name) if x is not None]
    for path, x in leaves:
        received = f"received a {type(x).__name__} at {path}"
        cure = "write ndl.Tensor(x), or let the body know it from outside"
        expect(isinstance(x, Tensor), f"scan: expected Tensors; {received}; {cure}", TypeError)
    return [x for _, x in leaves]


def check_carry(before: Any, after: Any) -> None:
    """The carry keeps its structure, shapes and dtypes."""
    old, new = list(walk(before, "carry")), list(walk(after, "carry"))
    paths = [", ".join(path for path, _ in each) for each in (old, new)]
    wanted = "scan: expected a body that returns the carry as it came"
    expect(paths[0] == paths[1], f"{wanted}: {paths[0]}; received {paths[1]}", TypeError)
    tensors("carry", after)
    for (path, x), (_, y) in zip(old, new, strict=True):
        one, other = (None if each is None else spec_of(each) for each in (x, y))
        received = f"{path} {one}; received {other}; convert with .astype or broadcast_to"
        expect(one == other, f"{wanted}: {received}", ValueError)


def length_of(xs: Any, length: int | None) -> int:
    found = {path: x.shape[0] if x.ndim else -1 for path, x in walk(xs, "xs") if x is not None}
    sizes = {*found.values()} | ({length} if length is not None else set())
    given = ", ".join(f"{path} of {size}" for path, size in found.items())
    fits = len(sizes) == 1 and all(isinstance(size, int) and size >= 0 for size in sizes)
    received = f"received {given or 'none'} and length={length}"
    expect(fits, f"scan: expected xs along a first axis of one length; {received}")
    return sizes.pop()


def scan(
    body: Callable[..., Any], init: Any, xs: Any = None, length: int | None = None,
    reverse: bool = False, checkpoint_every: int | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """carry, y[t] = body(carry, x[t]) for t = 0, 1, ...: gives (the last carry, all y stacked).

    init, xs, and what the body returns: Tensors in nested tuples, lists and dicts; xs and y lie
    along a first axis. The carry keeps its structure, shapes and dtypes. length: how many turns,
    where there are no xs; reverse: from the last t to 0.

    The body is called once, on placeholders, and compiled once whatever the length; it may know
    Tensors from outside, of which the gradients are computed too. Random draws differ from turn to
    turn. checkpoint_every: k keeps the carry of every k-th turn for backward and computes the rest
    again. As jax.lax.scan (Frostig, Johnson and Leary, 2018). TypeError and ValueError for other
    structures, shapes and dtypes; TraceError where the body needs a value.
    """
    expect(
        callable(body), f"scan: expected a function; received a {type(body).__name__}", TypeError
    )
    tensors("init", init)
    tensors("xs", xs)
    count, k = length_of(xs, length), checkpoint_every
    if k is None or k >= count:
        return turn(body, init, xs, count, reverse, "all")
    received = f"received {k!r}"
    fits = isinstance(k, int) and k > 0
    expect(fits, f"scan: expected checkpoint_every of at least 1; {received}")
    rest = count % k
    first = slice(rest, None) if reverse else slice(0, count - rest)
    parts = mapped(xs, lambda x: reshape(x[first], (count // k, k, *x.shape[1:])))

    def several(carry: Any, x: Any) -> Any:
        return turn(body, carry, x, k, reverse, "all")

    carry, y = turn(several, init, parts, count // k, reverse, "carries")
    y = mapped(y, lambda each: reshape(each, (count - rest, *each.shape[2:])))
    if rest:
        last = slice(0, rest) if reverse else slice(count - rest, None)
        carry, more = turn(body, carry, mapped(xs, lambda x: x[last]), rest, reverse, "all")
        pairs = iter([*zip(tensors("y", more), tensors("y", y), strict=True)])
        y = mapped(y, lambda _: concatenate(next(pairs)[:: 1 if reverse else -1]))
    return carry, y


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    return rebuild(x, lambda each: function(each) if isinstance(each, Tensor) else each)


def turn(
    body: Callable[..., Any], init: Any, xs: Any, length: int, reverse: bool, save: str
) -> tuple[Any, Any]:
    """The loop as one op."""

    def stand_in(x: Any, shape: Any, requires_grad: bool) -> Any:
        found = placeholder(spec_of(x).with_shape(shape), requires_grad)
        found.operands = (x,)  # tells the device
        return found

    carry = mapped(init, lambda x: stand_in(x, x.shape, MODE.grad))
    element = mapped(xs, lambda x: stand_in(x, x.shape[1:], x.requires_grad and MODE.grad))
    traced = Body(body, init, carry, element)
    begin = [*tensors("init", init), *(x.detach() for x in traced.state)]
    inputs = begin, tensors("xs", xs), traced.captured
    found = loop(traced.segment, *inputs, length, reverse, save, traced.origins)
    results = iter(found)
    last = mapped(init, lambda _: next(results))
    for x in traced.state:
        x.data = next(results)
    return last, mapped(traced.y, lambda _: next(results))
