"""The passes in order, and what they leave: a Program that one native call runs.

    trace     Values of autograd   -> Graph            graph.py; simplify.py as nodes are made
    fuse      Graph                -> Groups           fuse.py
    build     Groups               -> nests            nests.py, lower.py, index.py
    share     nests                -> nests            share.py
    schedule  nests                -> kernels          schedule.py
    plan      kernels              -> offsets          schedule.py
    emit      nests                -> LLVM IR          emit.py, contract.py, math.py
    compile   LLVM IR              -> machine code     engine.py, cache.py
Verifiers run between them. The result of all but the last is a Recipe: plain data that the disk
cache keeps under the hash of the graph, so that a known program skips every pass.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from math import ceil, prod
from typing import Any

import numpy as np

from needle.array.form import Form, compact_form
from needle.array.ndarray import NDArray, empty
from needle.array.spec import Spec
from needle.autograd import Hooks, Op, Value
from needle.backend.device import DEVICES
from needle.backend.numpy import compute
from needle.compiler import (
    OFF,
    cache,
    contract,
    emit,
    engine,
    graph,
    loops,
    nests,
    runtime,
    schedule,
)
from needle.compiler.fuse import Fuser
from needle.compiler.graph import Builder, Constant, Graph, Input, Node
from needle.compiler.loops import AnyNest, Buffer, Contraction, HostCall, Repeat
from needle.compiler.lower import LOWERED
from needle.compiler.schedule import Plan, Schedule
from needle.compiler.share import share
from needle.compiler.target import vector_bits
from needle.dtype import FLOATS, DType, as_dtype
from needle.errors import expect
from needle.ops.elementwise import StopGradient

WORTH = 4000.0  # ns of work for which another thread is called in


@dataclass
class Lowered:
    """A graph after all passes but emission."""

    graph: Graph
    fuser: Fuser
    layout: nests.Layout
    schedule: Schedule
    plan: Plan
    outputs: list[Buffer]


def lower(
    source: Graph,
    donated: Mapping[int, int] | None = None,
    strides: Mapping[Node, Sequence[int]] | None = None,
    checks: list[nests.Failure] | None = None,
) -> Lowered:
    """All passes over a graph. donated: output -> input whose memory it may take; strides: those of
    inputs that are not compact; checks: of the program around, for the body of a loop."""
    source = with_own_outputs(source)
    graph.verify(source)
    fuser = Fuser(source, strides or {})
    fuser.run()
    built, layout = nests.build(fuser, strides or {}, lower, [] if checks is None else checks)
    built = share(built, layout.waits)
    for nest in built:
        loops.verify(nest)
    outputs = [layout.buffer(node) for node in source.outputs]
    pairs = {
        outputs[output]: layout.buffer(source.inputs[number])
        for output, number in (donated or {}).items()
    }
    found = schedule.schedule(built, pairs, layout.waits)
    return Lowered(source, fuser, layout, found, schedule.plan(found.kernels, outputs), outputs)


def with_own_outputs(source: Graph) -> Graph:
    """The graph with a copy where an output is an input, a constant, or another output too."""
    outputs: list[Node] = []
    for node in source.outputs:
        if node.is_leaf or node in outputs:
            node = Node(StopGradient(), (node,), node.spec, node.place)
        outputs.append(node)
    return Graph(source.inputs, outputs)


# Recipes


@dataclass
class Launch:
    """One nest of a program: which kernel, on which memory, with which numbers."""

    key: str
    slots: list[tuple[str, int, int]]  # (external | constant | core, number, byte offset)
    values: list[int]
    units: int
    grain: int
    work: int  # in WORTHs
    scratch: int
    kernel: int  # the number of the kernel that it belongs to
    nest: int  # of the nest, among all
    step: int  # how many barriers come before it
    checks: bool
    turns: int = 0  # of a loop, which `values[0]` launches before this one begin
    moves: list[tuple[int, int, int, bool]] = field(default_factory=list)  # runtime.Move


@dataclass
class Recipe:
    """A program as data."""

    launches: list[Launch]
    inputs: int
    outputs: list[tuple[list[int], str]]  # shape and dtype
    in_place: dict[int, int]  # output -> input
    arena: int  # bytes
    checks: list[nests.Failure]
    cores: list[tuple[str, int, bool, bool]]  # what contractions call: the fields of Core
    tables: list[tuple[Any, int]]  # of windows: the fields of Table

    def dumps(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def loads(data: bytes) -> Recipe:
        fields = json.loads(data)
        fields["launches"] = [Launch(**each) for each in fields["launches"]]
        fields["in_place"] = {int(key): each for key, each in fields["in_place"].items()}
        return Recipe(**fields)


def structure(nest: AnyNest) -> Any:
    if isinstance(nest, Contraction):
        return contract.structure(nest)
    assert not isinstance(nest, (HostCall, Repeat))
    return emit.structure(nest)


def text_of(nest: AnyNest) -> Callable[[str], str]:
    """What writes a nest's kernel under a name."""
    write: Any = contract.emit if isinstance(nest, Contraction) else emit.emit
    return lambda name: write(nest, vector_bits(), name)


class Recipes:
    """Makes a Recipe of what the passes left, and notes how its kernels are written."""

    def __init__(self, lowered: Lowered) -> None:
        self.lowered = lowered
        self.texts: dict[str, Callable[[str], str]] = {}
        self.numbers = {id(op): n for n, op in enumerate(constants_of(lowered.graph))}
        self.hosts: list[HostCall] = []
        self.places: dict[Buffer, tuple[str, int, int]] = {}
        self.cores: list[tuple[str, int, bool, bool]] = []
        self.tables: list[tuple[Any, int]] = []
        self.launches: list[Launch] = []
        self.step = 0
        self.moving: dict[Buffer, list[tuple[Repeat, int, bool]]] = {}
        self.moves: dict[Repeat, list[tuple[int, int, int, bool]]] = {}
        count = len(lowered.graph.inputs)
        for place, buffer in enumerate(lowered.outputs):
            self.places.setdefault(buffer, ("external", count + place, 0))
        self.arena = count + len(lowered.outputs)

    def make(self) -> Recipe:
        lowered, number = self.lowered, 0
        for place, kernel in enumerate(lowered.schedule.kernels):
            for nest in kernel:
                self.add(nest, place, number)
                number += 1
            self.step += 1
        outputs = [(list(node.shape), str(node.spec.dtype)) for node in lowered.graph.outputs]
        found = lowered.schedule.in_place
        inputs = {lowered.layout.buffer(x): n for n, x in enumerate(lowered.graph.inputs)}
        in_place = {
            place: inputs[found[buffer]]
            for place, buffer in enumerate(lowered.outputs)
            if buffer in found
        }
        count = len(lowered.graph.inputs)
        return Recipe(
            self.launches, count, outputs, in_place, lowered.plan.size, lowered.layout.checks,
            self.cores, self.tables,
        )  # fmt: skip

    def add(self, nest: AnyNest, kernel: int, number: int) -> None:
        """The launches of a nest: one, or those of a loop and one that ends it."""
        if isinstance(nest, Repeat):
            self.add_loop(nest, kernel, number)
            return
        place = kernel, number, self.step
        if isinstance(nest, HostCall):
            self.hosts.append(nest)
            buffers: Sequence[Any] = [x for x, _ in (*nest.inputs, *nest.outputs)]
            slots = [self.slot(x) for x in buffers]
            made = Launch("host", slots, [len(self.hosts) - 1], 1, 1, 0, 0, *place, True)
        else:
            found = structure(nest)
            self.texts[found.key] = text_of(nest)
            buffers = found.buffers
            slots = [self.slot(buffer) for buffer in buffers]
            grain = max(1, ceil(WORTH / max(found.cost, 0.001)))
            work = int(found.units * found.cost / WORTH)
            checks = schedule.has_checks(nest)
            made = Launch(
                found.key, slots, list(found.values), found.units, grain, work, found.scratch,
                *place, checks,
            )  # fmt: skip
        for slot, buffer in enumerate(buffers):
            for loop, stride, flips in self.moving.get(buffer, ()):
                self.moves[loop].append((len(self.launches), slot, stride, flips))
        self.launches.append(made)

    def add_loop(self, nest: Repeat, kernel: int, number: int) -> None:
        for inner, move in nest.moves.items():
            kind, source, offset = self.slot(move.buffer)
            size = inner.dtype.itemsize
            self.places[inner] = kind, source, offset + move.offset * size
            self.moving[inner] = list(self.moving.get(move.buffer, ()))
            if move.step:
                self.moving[inner].append((nest, move.step * size, move.flips))
        if nest.offsets:
            kind, source, offset = self.slot(nest.scratch)
            for inner, start in nest.offsets.items():
                self.places[inner] = kind, source, offset + start
        first, self.moves[nest] = len(self.launches), []
        for each in nest.kernels:
            for inner_nest in each:
                self.add(inner_nest, kernel, number)
            self.step += 1
        last = len(self.launches)
        moves = [(last - place, slot, step, flips) for place, slot, step, flips in self.moves[nest]]
        self.launches.append(
            Launch("loop", [], [last - first], 1, 1, 0, 0, kernel, number, self.step, False,
                   nest.turns, moves)
        )  # fmt: skip

    def slot(self, buffer: Buffer | contract.Core | contract.Table) -> tuple[str, int, int]:
        """Where a buffer's address, or that of a contraction's core or table, comes from."""
        if isinstance(buffer, contract.Core):
            core = (str(buffer.dtype), buffer.bits, buffer.dot, buffer.windows)
            return ("core", number_in(self.cores, core), 0)
        if isinstance(buffer, contract.Table):
            return ("table", number_in(self.tables, (buffer.digits, buffer.width)), 0)
        found = self.places.get(buffer)
        if found is None:
            source = buffer.source
            if isinstance(source, Input):
                found = ("external", source.number, 0)
            elif isinstance(source, Constant):
                found = ("constant", self.numbers[id(source)], 0)
            else:
                found = ("external", self.arena, self.lowered.plan.offsets[buffer])
            self.places[buffer] = found
        return found


def number_in(listed: list[Any], item: Any) -> int:
    """Where an item is listed, from now on."""
    if item not in listed:
        listed.append(item)
    return listed.index(item)


def constants_of(source: Graph) -> list[Constant]:
    """The constants of a graph, in an order that the graph decides."""
    return [node.op for node in graph.nodes_of(source) if isinstance(node.op, Constant)]


# Programs


class Program:
    """A compiled program: arrays in, arrays out, one native call.

    `lowered` is what the passes left, None where the recipe came from the disk cache.
    """

    def __init__(
        self,
        recipe: Recipe,
        texts: Mapping[str, Callable[[str], str]],
        source: Graph,
        donated: Mapping[int, int] | None = None,
        hosts: Sequence[HostCall] = (),
        lowered: Lowered | None = None,
    ) -> None:
        self.recipe = recipe
        self.source = source
        self.donated = donated or {}
        self.lowered = lowered
        self.arena = recipe.arena
        self.constants = [np.ascontiguousarray(op.array) for op in constants_of(source)]
        self.specs = [Spec(tuple(shape), as_dtype(dtype)) for shape, dtype in recipe.outputs]
        device = DEVICES["cpu"]
        self.forms = [compact_form(device, spec.shape, spec.dtype) for spec in self.specs]
        self.memory = compact_form(device, (self.arena,), UINT8) if self.arena else None
        self.hosts = [Host(each) for each in hosts]
        cores = [
            contract.Core(as_dtype(dtype), bits, dot, windows)
            for dtype, bits, dot, windows in recipe.cores
        ]
        kernels = {each.key: texts.get(each.key, missing) for each in recipe.launches}
        kernels |= {core.key: core.emit for core in cores}
        for each in ("host", "loop"):
            kernels.pop(each, None)
        self.addresses = dict(zip(kernels, engine.kernels(list(kernels.items())), strict=True))
        self.cores = [self.addresses[core.key] for core in cores]
        self.tables = [contract.Table(*each).bytes for each in recipe.tables]
        count = recipe.inputs + len(recipe.outputs) + (recipe.arena > 0)
        self.native = runtime.Program([self.launch(each) for each in recipe.launches], count)

    def launch(self, each: Launch) -> runtime.Launch:
        """One row of the native table."""
        if each.key == "host":
            host = self.hosts[each.values[0]]
            slots = [self.slot(*slot) for slot in each.slots]
            return runtime.Launch(host.run, slots, 1, 1, 0, each.step, True)
        if each.key == "loop":
            moves = [runtime.Move(*move) for move in each.moves]
            loop = runtime.Loop(each.values[0], each.turns, moves)
            return runtime.Launch(loop, [], step=each.step)
        slots = [*(self.slot(*slot) for slot in each.slots), *each.values]
        address, grain = self.addresses[each.key], each.grain
        return runtime.Launch(
            address, slots, each.units, grain, each.scratch, each.step, each.checks, each.work
        )

    def slot(self, kind: str, number: int, offset: int) -> Any:
        """A slot of an args block: a number, or which external it will be taken from."""
        if kind == "constant":
            return self.constants[number].ctypes.data
        if kind == "core":
            return self.cores[number]
        if kind == "table":
            return self.tables[number].ctypes.data
        return runtime.External(number, offset)

    def __call__(self, arrays: Sequence[NDArray], reuse: Sequence[bool] = ()) -> list[NDArray]:
        """The outputs for inputs of the specs that the program was made for, compact ones.

        reuse: for each output that may take an input's place, whether it shall, now.
        IndexError or ValueError, with nothing overwritten, where a check fails.
        """
        given = [arrays[number] for number in self.recipe.in_place.values()] if any(reuse) else ()
        outputs = self.outputs(given, reuse)
        pointers = [x.ptr for x in arrays]
        pointers += [x.ptr for x in outputs]
        if self.memory is not None:
            memory = empty(self.memory)  # held until the program has run
            pointers.append(memory.ptr)
        if flags := self.native.run(*pointers):
            self.refuse(*flags)
        return outputs

    def watch(
        self, arrays: Sequence[NDArray], spare: Sequence[NDArray], free: Sequence[bool]
    ) -> tuple[list[NDArray], int]:
        """The outputs, none in an input's memory, and what the program made: see runtime.made.
        spare: arrays for outputs that may take an input's place, which of them are free."""
        outputs = self.outputs(spare, free)
        memory = [] if self.memory is None else [empty(self.memory)]
        found = self.native.watch(*[x.ptr for x in (*arrays, *outputs, *memory)])
        if type(found) is tuple:
            self.refuse(*found)
        return outputs, self.odd | runtime.made(found)

    @cached_property
    def odd(self) -> int:
        """NAN where the program has a NaN, or adds or multiplies by an infinite number: neither
        raises an exception."""
        arrays = [x for x in self.constants if x.dtype in FLOATS]
        numbers = [getattr(node.op, "scalar", 0) for node in graph.nodes_of(self.source)]
        odd = any(np.isnan(x).any() for x in arrays) or not np.isfinite(numbers).all()
        return runtime.NAN if odd else 0

    def outputs(self, given: Sequence[NDArray], reuse: Sequence[bool]) -> list[NDArray]:
        """Arrays for the outputs: of those that may take an input's place the given ones where they
        are reused, else new ones."""
        found: list[Any] = [None] * len(self.forms)
        for output, array, yes in zip(self.recipe.in_place, given, reuse, strict=False):
            if yes:
                found[output] = array
        return [empty(form) if x is None else x for x, form in zip(found, self.forms, strict=True)]

    def refuse(self, number: int, index: int) -> None:
        text, shift, is_value = self.recipe.checks[number]
        error = ValueError if is_value else IndexError
        raise error(f"{text}; received {index + shift if index < 0 else index}")


UINT8: DType = np.dtype(np.uint8)


def missing(name: str) -> str:
    """Stands for the text of a kernel of a cached program."""
    raise LookupError(name)


class Host:
    """A call from a program into an op's own `compute`."""

    def __init__(self, nest: HostCall) -> None:
        self.nest = nest

    def run(self, *pointers: int) -> bool:
        """Compute on arrays at addresses, and write to the outputs' addresses. Whether they hold a
        NaN or an infinity, where somebody wants to know."""
        places = (*self.nest.inputs, *self.nest.outputs)
        views = [as_view(p, b, shape) for p, (b, shape) in zip(pointers, places, strict=True)]
        inputs = views[: len(self.nest.inputs)]
        specs = tuple(Spec(shape, buffer.dtype) for buffer, shape in self.nest.outputs)
        found = compute(self.nest.op, inputs, specs if len(specs) > 1 else specs[0])
        results = found if isinstance(found, tuple) else (found,)
        for view, result in zip(views[len(inputs) :], results, strict=True):
            np.copyto(view, result, casting="same_kind")
        written = [x for x in views[len(inputs) :] if x.dtype in FLOATS]
        return Hooks.judge is not None and not all(np.isfinite(x).all() for x in written)


def as_view(pointer: int, buffer: Buffer, shape: tuple[int, ...]) -> np.ndarray:
    """The NumPy array at an address."""
    size = max(prod(shape), 1) * buffer.dtype.itemsize
    memory: Any = (ctypes.c_char * size).from_address(pointer)
    return np.ndarray(shape, buffer.dtype, memory)


def fingerprint(source: Graph, donated: Mapping[int, int]) -> str:
    """The hash of a graph, constants included: equal ones make equal programs."""
    settings = len(source.inputs), sorted(donated.items()), vector_bits(), sorted(OFF)
    digest = hashlib.sha256("\n".join([str(source), repr(settings)]).encode())
    for op in constants_of(source):
        digest.update(np.ascontiguousarray(op.array).tobytes())
    return digest.hexdigest()


def build(
    inputs: Sequence[Any],
    outputs: Sequence[Value],
    donated: Mapping[int, int] | None = None,
    places: Mapping[Value, str] | None = None,
) -> Program:
    """The program of traced Values: from the disk cache where it is known there.

    inputs: the Values or NDArrays that become arguments; outputs: what is returned; donated: output
    -> input whose memory it may take; places: where in the user's code Values were made.
    """
    source = graph.trace(inputs, outputs, places)
    donated = donated or {}
    key = fingerprint(source, donated)
    own = [x for x in graph.nodes_of(source) if isinstance(x.op, Op) and not x.op.is_builtin]
    kept = None if own else cache.get("program", key)
    if kept is not None:
        try:
            return Program(Recipe.loads(kept), {}, source, donated)
        except LookupError:
            pass  # one of its kernels was removed
    lowered = lower(source, donated)
    expect_memory(lowered.plan.size, [node.spec for node in source.outputs])
    found = make_program(lowered, donated)
    if not found.hosts:
        cache.put("program", key, found.recipe.dumps())
    return found


def expect_memory(arena: int, outputs: Sequence[Spec]) -> None:
    """MemoryError, before anything is allocated, where a program cannot fit the machine."""
    size = arena + sum(prod(spec.shape) * spec.dtype.itemsize for spec in outputs)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    expected = f"expected a program that fits in {format_bytes(memory)} of memory"
    needs = f"{format_bytes(size)} for outputs and temporaries; use smaller batches"
    message = f"jit: {expected}; received one that needs {needs}"
    expect(size <= memory, message, MemoryError)


def format_bytes(count: int) -> str:
    """1,536 -> 1.5 KiB"""
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):  # noqa: B007
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def make_program(lowered: Lowered, donated: Mapping[int, int] | None = None) -> Program:
    recipes = Recipes(lowered)
    recipe = recipes.make()
    return Program(recipe, recipes.texts, lowered.graph, donated, recipes.hosts, lowered)


def eager_plan(op: Op, forms: Sequence[Form]) -> Program | None:
    """The program of one op on operands of given forms; None for an op that the host computes."""
    builder = Builder()
    nodes = [Node(Input(number), (), form.spec) for number, form in enumerate(forms)]
    found = graph.apply(builder, op, nodes, None)
    source = Graph(nodes, list(found) if isinstance(found, tuple) else [found])
    loops = (graph.Repeat, graph.Item)
    if not all(x.is_leaf or type(x.op) in LOWERED or isinstance(x.op, loops) for x in source.nodes):
        return None
    strides = {
        node: form.strides for node, form in zip(nodes, forms, strict=True) if not form.is_compact
    }
    return make_program(lower(source, None, strides))
