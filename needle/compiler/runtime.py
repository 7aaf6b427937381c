"""Runs kernels on all cores: worker threads, and a native runner that walks a table of launches.

In: addresses of kernels (engine.py), their arguments, and how many parallel units each has. Every
thread runs the whole table, each launch on its own share of the units (SPMD), and meets the others
at barriers.

    launcher()(kernel, units, grain, *slots)    one kernel at once: eager mode
    Program(launches, externals).run(*pointers)  a compiled program: jit

Both are functions of Python's C interface, written in LLVM IR (runner.ll): a call costs 0.1 us
where ctypes takes 0.5. They give 0, or (number, index) of a failed check, that with the lowest
number; `Program.watch` gives in place of 0 which floating-point exceptions were raised. Work that
is small runs on the calling thread, which keeps Python's lock; other work is done by the pool for
one caller at a time, without Python's lock. Workers wait in a loop for some microseconds, then
asleep.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np

from needle.compiler import engine
from needle.compiler.target import host
from needle.errors import expect

TABLES = {  # the runner's memory, by number of an 8-byte word
    "state": {  # of the pool; what threads write at once has a cache line of its own
        "ticket": 0,  # a run's number, times 65536, plus how many threads run it
        "count": 8, "phase": 16, "sleepers": 24,  # of a barrier; workers asleep
        "job": 32, "threads": 33, "present": 34,  # wanted, and there: the caller and workers
        "start": 35, "own": 36, "table": 37,  # a Python function; scratch memory of callers, of all
        "owner": 38, "processor": 39,  # the caller's
        "mutex": 40, "condition": 48, "lock": 56,  # lock: held by owner during a run
    },
    "job": {  # one run of a program
        "program": 0, "table": 1, "n": 2, "stop": 3, "failed": 4, "python": 5, "flag": 6,
        "index": 7, "raised": 8,
    },
    "program": {
        "launches": 0, "small": 1, "useful": 2, "state": 3, "externals": 4, "patches": 5,
        "first_patch": 6, "amount": 7, "first": 8,
    },
    "launch": {  # one that ends a loop: rows to go back, moves, turns, how many moves
        "kernel": 0, "args": 1, "units": 2, "grain": 3, "rotation": 4, "flags": 5, "turn": 6,
        "again": 7,
    },
    "patch": {"slot": 0, "external": 1, "offset": 2},  # external: -1 for an address as it is
    "move": {"slot": 0, "stride": 1, "flips": 2, "reset": 3},
}  # fmt: skip
STATE = TABLES["state"]
BARRIER, CHECK, HOST, LOOP = 1, 2, 4, 8  # flags of a launch: what is before it, and what it is
STOP = 65535  # as a ticket's number of threads: the workers end
CONSTANTS = {
    "BARRIER": BARRIER, "CHECK": CHECK, "HOST": HOST, "LOOP": LOOP, "STOP": STOP,
    "SPINS": 4000,  # pauses, of 20 to 40 ns each, before a worker sleeps: waking it takes 40 us
    "PATIENCE": 200,  # pauses at a barrier before a thread lets others run
    "LITTLE": 16,  # shares of work, of some microseconds each, for which no sleeper is awaited
}  # fmt: skip
MANY = 16  # launches in a row that are not small, even if each one is
FLAGS = 64  # bytes of a thread's scratch memory that tell of checks
SCRATCH = 1 << 18  # bytes of it that are there from the start

MODES = {  # IEEE 754's rounding and subnormals, whatever a thread had set, and no exception raised:
    # pause, read, write, what to write, forget exceptions, read exceptions
    "x86": (
        "call void @llvm.x86.sse2.pause()", "call void @llvm.x86.sse.stmxcsr(ptr %slot)",
        "call void @llvm.x86.sse.ldmxcsr(ptr %slot)", 0x1F80, "",
        "call void @llvm.x86.sse.stmxcsr(ptr %slot)",
    ),
    "arm": (
        "call void @llvm.aarch64.hint(i32 1)",
        "%now = call i64 @llvm.aarch64.get.fpcr()\n  store i64 %now, ptr %slot",
        "call void @llvm.aarch64.set.fpcr(i64 %mode)", 0,
        "call void @llvm.aarch64.set.fpsr(i64 0)",
        "%now = call i64 @llvm.aarch64.get.fpsr()\n  store i64 %now, ptr %slot",
    ),
}  # fmt: skip
MODE = """
define internal void @pause() {{
  {0}
  ret void
}}
define internal i64 @enter_mode() {{
  %slot = alloca i64
  store i64 0, ptr %slot
  {1}
  %old = load i64, ptr %slot
  call void @leave_mode(i64 {3})
  {4}
  ret i64 %old
}}
define internal i64 @raised() {{
  %slot = alloca i64
  store i64 0, ptr %slot
  {5}
  %all = load i64, ptr %slot
  ret i64 %all
}}
define internal void @leave_mode(i64 %mode) {{
  %slot = alloca i64
  store i64 %mode, ptr %slot
  {2}
  ret void
}}
"""

PLACES = {  # on which processor a thread runs, and how it moves to another one
    True: """
declare i32 @sched_getcpu()
declare i32 @sched_getaffinity(i32, i64, ptr)
declare i32 @sched_setaffinity(i32, i64, ptr)
define internal i64 @processor() {
  %found = call i32 @sched_getcpu()
  %number = sext i32 %found to i64
  ret i64 %number
}
define internal void @step_aside(i64 %number) {
entry:
  %allowed = alloca [16 x i64]
  %got = call i32 @sched_getaffinity(i32 0, i64 128, ptr %allowed)
  %known = icmp eq i32 %got, 0
  %fits = icmp ult i64 %number, 1024
  %can = and i1 %known, %fits
  br i1 %can, label %move, label %out
move:
  %place = lshr i64 %number, 6
  %at = getelementptr i64, ptr %allowed, i64 %place
  %before = load i64, ptr %at
  %rest = and i64 %number, 63
  %bit = shl i64 1, %rest
  %mask = xor i64 %bit, -1
  %others = and i64 %before, %mask
  store i64 %others, ptr %at
  call i32 @sched_setaffinity(i32 0, i64 128, ptr %allowed)
  store i64 %before, ptr %at
  call i32 @sched_setaffinity(i32 0, i64 128, ptr %allowed)
  br label %out
out:
  ret void
}
""",
    False: """
define internal i64 @processor() {
  ret i64 -1
}
define internal void @step_aside(i64 %number) {
  ret void
}
""",
}


# The runner


def runner() -> str:
    """The runner's LLVM IR."""
    mode = MODES.get("x86" if host().is_x86 else "arm" if host().is_arm else "")
    message = f"needle: expected an x86-64 or ARM64 processor; received {host().triple}"
    expect(mode, message + "; use needle.cpu_numpy()", NotImplementedError)
    text = Path(__file__).with_name("runner.ll").read_text("utf-8") + MODE.format(*mode or ())
    text += PLACES[sys.platform == "linux"]
    for name, value in CONSTANTS.items():
        text = re.sub(rf"\b{name}\b", str(value), text)
    return fall_through(re.sub(MACRO, expand, text, flags=re.MULTILINE).splitlines())


MACRO = r"""(?x)  # see the head of runner.ll
    ^\ \ (?:(%\w+)\ =\ )?(word|pointer|address|set)\ (\w+)\.(\w+)(?:\ =\ (.*))?$
    | ^\ \ if\ (.*)\ then\ (\w+)\ else\ (\w+)$"""


def expand(match: re.Match[str]) -> str:
    name, verb, table, field, value, compare, yes, no = match.groups()
    if compare:
        result = f"%is.{match.start()}"
        return f"  {result} = icmp {compare}\n  br i1 {result}, label %{yes}, label %{no}"
    where = f"getelementptr i64, ptr %{table}, i64 {TABLES[table][field]}"
    if verb == "address":
        return f"  {name} = {where}"
    place = f"{name}.at" if name else f"%set.{match.start()}"
    kind = "i64" if verb == "word" else "ptr"
    then = f"store {value}, ptr {place}" if value else f"{name} = load {kind}, ptr {place}"
    return f"  {place} = {where}\n  {then}"


def fall_through(text: Sequence[str]) -> str:
    """A block that has no end branches to the next one."""
    lines: list[str] = []
    for line in text:
        ended = lines and lines[-1].startswith(("  br ", "  ret ", "define "))
        if re.fullmatch(r"\w+:", line) and not ended:
            lines.append(f"  br label %{line[:-1]}")
        lines.append(line)
    return "\n".join(lines)


class Method(ctypes.Structure):
    """PyMethodDef of Python's C interface."""

    _fields_ = (
        ("name", ctypes.c_char_p), ("function", ctypes.c_void_p), ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )  # fmt: skip


METH_FASTCALL = 0x80
METHODS: dict[int, Method] = {}  # which the functions refer to


def bind(address: int, pointer: int, owner: object) -> Callable[..., Any]:
    """A native function, with a pointer as its first argument, as a function for Python, which
    keeps the pointer's owner alive."""
    if address not in METHODS:
        METHODS[address] = Method(b"run", address, METH_FASTCALL, None)
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.restype = ctypes.py_object
    make.argtypes = [ctypes.c_void_p, ctypes.py_object, ctypes.py_object]
    function: Callable[..., Any] = make(ctypes.addressof(METHODS[address]), pointer, owner)
    return function


# The pool


class Pool:
    """Worker threads, which are started when they are first needed."""

    def __init__(self, threads: int) -> None:
        names = ["worker", "launch", "run", "watch"]
        worker, *found = engine.library("runner", runner(), names)
        self.launch_at, self.run_at, self.watch_at = found
        self.work = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(worker)
        self.c = ctypes.CDLL(None)
        self.c.pthread_self.restype = ctypes.c_uint64
        self.state = aligned(64)
        self.address = self.state.ctypes.data
        self.workers: list[Thread] = []
        self.kept: list[np.ndarray] = []  # scratch memory, which a run may still be using
        self.capacity = FLAGS + SCRATCH
        self.starter = self.start  # the state refers to it
        self.state[STATE["start"]] = id(self.starter)
        self.forget_workers()
        self.set_threads(threads)

    def forget_workers(self) -> None:
        """No thread but this one is there, and no run: at first, and in a forked process."""
        self.workers = []
        for name in ("ticket", "count", "phase", "sleepers", "owner"):
            self.state[STATE[name]] = 0
        self.state[STATE["present"]] = 1
        self.c.pthread_cond_init(self.at("condition"), None)
        for name in ("mutex", "lock"):
            self.c.pthread_mutex_init(self.at(name), None)

    def at(self, name: str) -> ctypes.c_void_p:
        return ctypes.c_void_p(self.address + 8 * STATE[name])

    @contextmanager
    def locked(self, name: str) -> Iterator[None]:
        self.c.pthread_mutex_lock(self.at(name))
        try:
            yield
        finally:
            self.c.pthread_mutex_unlock(self.at(name))

    @contextmanager
    def between_runs(self) -> Iterator[None]:
        own = self.c.pthread_self() == int(self.state[STATE["owner"]].view(np.uint64))
        message = "threads: expected a change between programs; received one from within a program"
        expect(not own, message, RuntimeError)
        with self.locked("lock"):
            yield

    def start(self) -> None:
        """Start the workers that are missing."""
        with self.between_runs():
            for number in range(len(self.workers) + 1, int(self.state[STATE["threads"]])):
                ticket = int(self.state[STATE["ticket"]])
                args = (self.address, number, ticket)
                thread = Thread(target=self.work, args=args, name=f"needle-{number}", daemon=True)
                thread.start()
                self.workers.append(thread)
                self.state[STATE["present"]] = number + 1

    def set_threads(self, threads: int) -> None:
        """End the workers; as many as are wanted now start when they are needed."""
        with self.between_runs():
            if self.workers:
                with self.locked("mutex"):
                    number = int(self.state[STATE["ticket"]]) >> 16
                    self.state[STATE["ticket"]] = (number + 1) << 16 | STOP
                    self.c.pthread_cond_broadcast(self.at("condition"))
                for thread in self.workers:
                    thread.join()
            self.workers = []
            self.state[STATE["present"]] = 1
            self.state[STATE["threads"]] = threads
            self.make_scratch()

    def reserve(self, size: int) -> None:
        """Make room for kernels that need so many bytes of scratch memory, beside the flags."""
        if FLAGS + size > self.capacity:
            self.capacity = -(-(FLAGS + size) // 4096) * 4096
            self.make_scratch()

    def make_scratch(self) -> None:
        threads = int(self.state[STATE["threads"]])
        words = self.capacity // 8
        memory = aligned((threads + 1) * words)
        pointers = memory.ctypes.data + np.arange(threads + 1) * self.capacity
        self.kept += [memory, pointers]
        self.state[STATE["own"]] = pointers[threads]
        self.state[STATE["table"]] = pointers.ctypes.data


def aligned(words: int) -> np.ndarray:
    """Words of zero that begin at a cache line."""
    memory = np.zeros(words + 8, np.int64)
    begin = -memory.ctypes.data % 64 // 8
    return memory[begin : begin + words]


@cache
def pool() -> Pool:
    made = Pool(get_num_threads())
    atexit.register(made.set_threads, 1)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=made.forget_workers)
    return made


class Settings:
    threads: int | None = None


def set_num_threads(threads: int) -> None:
    """Let programs run on so many threads, from now on. Results do not depend on it."""
    expected = f"expected an int from 1 to {STOP - 1}"
    message = f"set_num_threads: {expected}; received {threads!r}"
    expect(isinstance(threads, int) and 0 < threads < STOP, message)
    if pool.cache_info().currsize:
        pool().set_threads(threads)
    Settings.threads = threads


def get_num_threads() -> int:
    """How many threads programs run on: set_num_threads, NEEDLE_NUM_THREADS, or those there are."""
    if Settings.threads is None:
        given = os.environ.get("NEEDLE_NUM_THREADS") or str(available_threads())
        message = f"NEEDLE_NUM_THREADS: expected an int from 1 to {STOP - 1}; received {given}"
        expect(given.isdecimal() and 0 < int(given) < STOP, message + "; unset it for all")
        Settings.threads = int(given)
    return Settings.threads


def available_threads() -> int:
    """The processors that this process may use: its affinity, and its control groups' quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    found = len(affinity(0)) if affinity else os.cpu_count() or 1
    root = Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().partition("0::")[2].strip().lstrip("/")
        for folder in (root / group, *(root / group).parents):
            if folder.is_relative_to(root) and (folder / "cpu.max").exists():
                quota, period = (folder / "cpu.max").read_text().split()
                if quota != "max":
                    found = min(found, ceil(int(quota) / int(period)))
    return max(found, 1)


def reserve(size: int) -> None:
    """Make room for kernels that need so many bytes of scratch memory."""
    pool().reserve(size)


@cache
def launcher() -> Callable[..., Any]:
    """The function (kernel, units, grain, *slots) that runs one kernel on its slots.

    One thread has at least `grain` units. Returns 0, or (number, index) of a failed check.
    """
    return bind(pool().launch_at, pool().address, pool())


# Programs

NAN, INFINITY = 1, 2  # what `made` tells of


def made(raised: int) -> int:
    """Whether finite numbers made a NaN (an invalid operation), and infinities (a division by zero,
    an overflow), from the exceptions that `Program.watch` gives."""
    infinite = raised & (0b1100 if host().is_x86 else 0b110)
    return (NAN if raised & 1 else 0) | (INFINITY if infinite else 0)


@dataclass(frozen=True)
class External:
    """An argument that a call brings: pointer `number`, plus bytes."""

    number: int
    offset: int = 0


@dataclass(frozen=True)
class Move:
    """A slot that moves from turn to turn of a loop: of the launch so many rows before the loop's
    end, by so many bytes, and, where it flips, back at the next turn."""

    before: int
    slot: int
    stride: int
    flips: bool


@dataclass(frozen=True)
class Loop:
    """What ends a loop: the rows before it are run `turns` times, at least once, in all."""

    rows: int
    turns: int
    moves: Sequence[Move]


@dataclass
class Launch:
    """One row of a program: a native kernel, a Python function of the slots, which returns whether
    it made a NaN or an infinity, or the end of a loop.

    `step` grows where a barrier is needed before the launch. Where `checks` is true, the program
    ends at the next barrier if a check has failed.
    """

    kernel: int | Callable[..., Any] | Loop
    slots: Sequence[int | External]
    units: int = 1
    grain: int = 1  # units that are worth a thread
    scratch: int = 0  # bytes of a thread's own memory, beside the flags
    step: int = 0
    checks: bool = False
    work: int = 0  # how many threads' worth it is, where units are worth more than one


class Program:
    """A table of launches in native memory; run(*pointers) runs it."""

    def __init__(self, launches: Sequence[Launch], externals: int) -> None:
        shares = [max(1, each.units // each.grain) for each in launches]
        hosts = [each for each in launches if callable(each.kernel)]
        turns = turns_of(launches)
        small = max(shares, default=1) == 1 and not hosts and sum(turns) <= MANY
        self.blocks = aligned(sum(len(each.slots) for each in launches))
        self.functions: list[Any] = []  # what Python runs, which the table refers to
        self.moves: list[np.ndarray] = []
        self.memory = aligned(8 + 8 * len(launches))
        rows = self.memory[8:].reshape(-1, 8)
        places, patches = [], []
        begin, share, checked = 0, 0, False
        for place, each in enumerate(launches):
            block = self.blocks[begin : begin + len(each.slots)]
            address = block.ctypes.data
            places.append(address)
            for number, slot in enumerate(each.slots):
                if isinstance(slot, External):
                    patches.append((address + 8 * number, slot.number, slot.offset))
                else:
                    block[number] = np.uint64(slot % 2**64).view(np.int64)
            flags = flags_of(launches, place, checked)
            if isinstance(each.kernel, Loop):
                row = self.loop(each.kernel, places, patches)
                turn = rows[place].ctypes.data + 8 * TABLES["launch"]["turn"]
                patches.append((turn, -1, 0))
            else:
                kernel = self.function(each.kernel, block) if callable(each.kernel) else each.kernel
                row = (kernel, address, each.units, each.grain)
            rows[place, :6] = (*row, share, flags)
            share += shares[place]
            checked = checked or each.checks
            begin += len(each.slots)
            pool().reserve(each.scratch)
        self.patches = np.array(patches, np.int64).reshape(-1, 3)
        amounts = (max(s, each.work) for s, each in zip(shares, launches, strict=True))
        self.memory[:8] = (
            len(launches), small, max(shares, default=1), pool().address, externals, len(patches),
            self.patches.ctypes.data, sum(n * turn for n, turn in zip(amounts, turns, strict=True)),
        )  # fmt: skip
        owner = (self.memory, self.blocks, self.patches, self.functions, self.moves)
        address = self.memory.ctypes.data
        self.run = bind(pool().run_at, address, owner)
        self.watch = bind(pool().watch_at, address, owner)

    def loop(
        self, loop: Loop, places: Sequence[int], patches: list[tuple[int, int, int]]
    ) -> tuple[int, int, int, int]:
        """The words of a row that ends a loop. A run begins with each slot as it is now."""
        moves = np.zeros((len(loop.moves), 4), np.int64)
        known = {slot for slot, _, _ in patches}
        for row, move in zip(moves, loop.moves, strict=True):
            slot = places[-1 - move.before] + 8 * move.slot
            steps = (loop.turns - 1) % 2 if move.flips else loop.turns - 1
            row[:] = slot, move.stride, move.flips, -steps * move.stride
            if slot not in known:
                known.add(slot)
                patches.append((slot, -1, ctypes.c_int64.from_address(slot).value))
        self.moves.append(moves)
        return loop.rows + 1, moves.ctypes.data, loop.turns, len(moves)

    def function(self, call: Callable[..., Any], block: np.ndarray) -> int:
        """The address of a Python function without arguments, which takes the slots' values."""
        self.functions.append(lambda: call(*block.tolist()))
        return id(self.functions[-1])


def turns_of(launches: Sequence[Launch]) -> list[int]:
    """How often each launch is run."""
    found = [1] * len(launches)
    for place, each in enumerate(launches):
        if isinstance(each.kernel, Loop):
            for row in range(place - each.kernel.rows, place + 1):
                found[row] *= each.kernel.turns
    return found


def flags_of(launches: Sequence[Launch], place: int, checked: bool) -> int:
    """What a launch is, and what the barrier before it does: there is one at each step, at the end
    of a loop's turn, and around Python's."""
    this = launches[place]
    kind = HOST if callable(this.kernel) else LOOP if isinstance(this.kernel, Loop) else 0
    before = launches[place - 1] if place else this
    if before.step == this.step and not kind and not callable(before.kernel):
        return 0
    if place == 0:
        return kind
    return kind | BARRIER | (CHECK if checked else 0)
