"""Machine code and threads: every unit runs once, barriers hold, and nothing hangs.

The kernels are written by hand; what they should give is computed by NumPy.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from needle.compiler import engine, runtime, target
from needle.compiler.runtime import (
    External,
    Launch,
    Program,
    get_num_threads,
    launcher,
    set_num_threads,
)
from needle.errors import CompileError

THREADS = [1, 2, 3, 8]  # more than there are processors, too

LOOP = """
define void @NAME(ptr %args, i64 %begin, i64 %end, ptr %scratch) {
entry:
  %x = load ptr, ptr %args
  %args1 = getelementptr i64, ptr %args, i64 1
  %y = load ptr, ptr %args1
  %args2 = getelementptr i64, ptr %args, i64 2
  %k = load i64, ptr %args2
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %done]
  BODY
  br label %done
done:
  %next = add i64 %i, 1
  %last = icmp eq i64 %next, %end
  br i1 %last, label %out, label %loop
out:
  ret void
}
"""
LOAD = "%from = getelementptr i64, ptr %x, i64 %i\n  %v = load i64, ptr %from\n"
STORE = "%to = getelementptr i64, ptr %y, i64 %i\n  store i64 %w, ptr %to\n"

BODIES = {
    # y[i] = x[i] + k
    "add": f"{LOAD}  %w = add i64 %v, %k\n  {STORE}",
    # y[i] += 1: a unit that runs twice or never shows
    "count": "%to = getelementptr i64, ptr %y, i64 %i\n  %v = load i64, ptr %to\n"
    "  %w = add i64 %v, 1\n  store i64 %w, ptr %to\n",
    # y[i] = x[k - 1 - i] + i: what another thread wrote
    "mirror": "%k1 = sub i64 %k, 1\n  %j = sub i64 %k1, %i\n"
    "  %from = getelementptr i64, ptr %x, i64 %j\n  %v = load i64, ptr %from\n"
    f"  %w = add i64 %v, %i\n  {STORE}",
    # y[i] = the address of the thread's scratch memory
    "who": f"%w = ptrtoint ptr %scratch to i64\n  {STORE}",
    # check number x[-1] that x[i] < k; the lowest number's flag stays
    "check": f"{LOAD}  %bad = icmp sge i64 %v, %k\n  br i1 %bad, label %fail, label %done\n"
    "fail:\n  %at = getelementptr i64, ptr %x, i64 -1\n  %number = load i64, ptr %at\n"
    "  %old = load i64, ptr %scratch\n  %limit = sub i64 %old, 1\n"
    "  %lower = icmp ult i64 %number, %limit\n  br i1 %lower, label %tell, label %done\ntell:\n"
    "  %flag = add i64 %number, 1\n  store i64 %flag, ptr %scratch\n"
    "  %second = getelementptr i64, ptr %scratch, i64 1\n  store i64 %v, ptr %second\n",
    # y[i] = x[i] + k, the first one after a while
    "slow": "%first = icmp eq i64 %i, 0\n  %count = select i1 %first, i64 20000, i64 1\n"
    "  br label %idle\nidle:\n  %n = phi i64 [0, %loop], [%n1, %idle]\n"
    "  %n1 = add i64 %n, 1\n  store volatile i64 %n, ptr %scratch\n"
    "  %enough = icmp eq i64 %n1, %count\n  br i1 %enough, label %go, label %idle\ngo:\n"
    f"  store i64 0, ptr %scratch\n  {LOAD}  %w = add i64 %v, %k\n  {STORE}",
    # y[i] = x[i] / k in float64, rounded as the thread rounds
    "divide": f"{LOAD}  %a = sitofp i64 %v to double\n  %b = sitofp i64 %k to double\n"
    f"  %q = fdiv double %a, %b\n  %w = bitcast double %q to i64\n  {STORE}",
}  # fmt: skip


def kernel(name: str) -> int:
    body = LOOP.replace("BODY", BODIES[name])
    return engine.kernel(f"test {name} {body}", lambda symbol: body.replace("NAME", symbol))


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    before = get_num_threads()
    yield
    set_num_threads(before)


def pointer(array: np.ndarray) -> int:
    return int(array.ctypes.data)


# One kernel


@pytest.mark.parametrize("threads", THREADS)
def test_every_unit_runs_once(threads: int) -> None:
    set_num_threads(threads)
    launch, address = launcher(), kernel("count")
    for units in [0, 1, 2, 3, 7, 8, 9, 64, 1000]:
        for grain in [1, 3, 1000]:
            y = np.zeros(1001, np.int64)
            assert launch(address, units, grain, 0, pointer(y), 0) == 0
            np.testing.assert_array_equal(y, np.arange(1001) < units)


@pytest.mark.parametrize("grain", [1, 100], ids=["pool", "direct"])
def test_slots_are_64_bits(grain: int) -> None:
    x, y = np.arange(64), np.zeros(64, np.int64)
    for k in [0, 5, -7, 2**62, -(2**63), 2**63 - 1]:
        launcher()(kernel("add"), 64, grain, pointer(x), pointer(y), k)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(y, x + np.int64(k))
    launcher()(kernel("add"), 64, grain, pointer(x), pointer(y), 2**64 - 1)  # as bits
    np.testing.assert_array_equal(y, x - 1)


def test_a_thread_has_as_many_units_as_are_worth_it() -> None:
    set_num_threads(8)
    for grain, most in [(1, 8), (10, 8), (25, 4), (30, 3), (50, 2), (51, 1), (1000, 1)]:
        y = np.zeros(100, np.int64)
        launcher()(kernel("who"), 100, grain, 0, pointer(y), 0)
        assert len(set(y.tolist())) <= most
        changes = int((np.diff(y) != 0).sum())
        assert changes < most, "a thread's units are one range"


def test_a_wrong_call_is_refused() -> None:
    with pytest.raises(TypeError):
        launcher()(kernel("add"), 64)
    with pytest.raises(TypeError):
        launcher()(kernel("add"), 64, 1, "x", 0, 0)
    run = Program([Launch(kernel("add"), [External(0), External(1), 1], 4)], 2).run
    with pytest.raises(TypeError):
        run(1)
    with pytest.raises(TypeError):
        run(1, 2, 3)
    with pytest.raises(TypeError):
        run(1, 2.0)


def test_scratch_memory_is_aligned_and_apart() -> None:
    set_num_threads(3)
    runtime.reserve(1 << 20)
    places = set()
    for _ in range(50):
        y = np.zeros(99, np.int64)
        Program([Launch(kernel("who"), [0, pointer(y), 0], 99, scratch=1 << 20)], 0).run()
        places |= set(y.tolist())
    assert len(places) <= 3
    assert all(place % 64 == 0 for place in places)
    assert (np.diff(sorted(places)) >= (1 << 20) + 64).all()
    for place in places:
        ctypes.memset(place + 64, 1, 1 << 20)


# Programs


def mirrors(size: int, count: int, step: int = 1) -> Program:
    """Launches that each read what the one before wrote elsewhere."""
    mirror = kernel("mirror")
    launches = [
        Launch(mirror, [External(i % 2), External(1 - i % 2), size], size, step=i * step)
        for i in range(count)
    ]
    return Program(launches, 2)


def mirrored(x: np.ndarray, count: int) -> np.ndarray:
    for _ in range(count):
        x = x[::-1] + np.arange(len(x))
    return x


@pytest.mark.parametrize("threads", THREADS)
def test_barriers_between_many_launches(threads: int) -> None:
    set_num_threads(threads)
    program = mirrors(97, 300)
    for _ in range(5):
        x, y = np.arange(97), np.zeros(97, np.int64)
        assert program.run(pointer(x), pointer(y)) == 0
        np.testing.assert_array_equal(x, mirrored(np.arange(97), 300))


@pytest.mark.skipif(runtime.available_threads() < 2, reason="one processor")
def test_a_dropped_barrier_is_noticed() -> None:
    """The test above can fail: a slow thread's part is read too early without the barrier."""
    set_num_threads(2)
    slow, mirror = kernel("slow"), kernel("mirror")
    for step in (0, 1):
        program = Program(
            [
                Launch(slow, [External(0), External(1), 0], 2),
                Launch(mirror, [External(1), External(2), 2], 2, step=step),
            ],
            3,
        )  # fmt: skip
        wrong = 0
        for _ in range(100 if step else 50_000):  # the threads meet seldom on a busy machine
            x, y, z = np.full(2, 7), np.zeros(2, np.int64), np.zeros(2, np.int64)
            program.run(pointer(x), pointer(y), pointer(z))
            wrong += (z != 7 + np.arange(2)).any()
            if wrong:
                break
        assert bool(wrong) == (step == 0)


def test_small_launches_spread_over_the_threads() -> None:
    set_num_threads(2)
    y = np.zeros(40, np.int64)
    who = kernel("who")
    run = Program([Launch(who, [0, pointer(y) + 8 * i, 0]) for i in range(40)], 0).run
    run()
    assert len(set(y.tolist())) == 1, "too little for two threads"
    half = [Launch(who, [0, pointer(y) + 8 * i, 0], 1) for i in range(39)]
    run = Program([*half, Launch(who, [0, pointer(np.zeros(64, np.int64)), 0], 64)], 0).run
    for _ in range(100):  # until the workers are awake
        run()
        if len(set(y[:39].tolist())) == 2:
            break
    assert y[0] != y[1]
    assert y[0] == y[2]


def test_externals_with_offsets_and_constants() -> None:
    x, y = np.arange(20), np.zeros(20, np.int64)
    slots = [External(1, 8 * 5), External(0, 8 * 3), -2]
    run = Program([Launch(kernel("add"), slots, 10)], 2).run
    run(pointer(y), pointer(x))
    np.testing.assert_array_equal(y[3:13], x[5:15] - 2)
    assert not y[:3].any()
    assert not y[13:].any()
    other = np.zeros(20, np.int64)
    run(pointer(other), pointer(x))  # each call brings its own
    np.testing.assert_array_equal(other, y)


def test_an_empty_program() -> None:
    assert Program([], 0).run() == 0


# Checks


@pytest.mark.parametrize("threads", THREADS)
def test_a_failed_check_ends_the_program(threads: int) -> None:
    set_num_threads(threads)
    check, add = kernel("check"), kernel("add")
    memory, y = np.zeros(101, np.int64), np.zeros(100, np.int64)
    memory[0] = 4  # the check's number
    launches = [
        Launch(check, [External(0, 8), 0, 50], 100, checks=True),
        Launch(add, [External(0, 8), External(1), 1], 100, step=1),
    ]
    for small in (1, 1000):
        for each in launches:
            each.grain = small
        run = Program(launches, 2).run
        for place in [0, 1, 50, 99]:
            memory[1:] = 3
            memory[1 + place] = 77
            y[:] = 0
            assert run(pointer(memory), pointer(y)) == (4, 77)
            assert not y.any()
            memory[1:] = 3
            assert run(pointer(memory), pointer(y)) == 0, "a flag is forgotten"
            assert (y == 4).all()
            memory[1 + place] = 50
            assert launcher()(check, 100, small, pointer(memory) + 8, 0, 50) == (4, 50)


@pytest.mark.parametrize("threads", THREADS)
def test_the_lowest_failed_check_is_told(threads: int) -> None:
    set_num_threads(threads)
    first, second = np.full(101, 60), np.full(101, 70)
    first[0], second[0] = 9, 2
    check = kernel("check")
    launches = [Launch(check, [pointer(x) + 8, 0, 50], 100, checks=True) for x in (first, second)]
    for grain in (1, 100):  # all threads find both, or one thread each
        launches[0].grain = launches[1].grain = grain
        launches[1].step = 1  # the first ends the program
        wide = Launch(kernel("who"), [0, pointer(np.zeros(64, np.int64)), 0], 64)
        assert Program([*launches, wide], 0).run() == (9, 60)
        launches[1].step = 0
        wide.step = 1
        for pair in (launches, launches[::-1]):
            run = Program([*pair, wide], 0).run
            assert all(run() == (2, 70) for _ in range(50))


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_agree_whether_to_stop(threads: int) -> None:
    """A check that fails right after a barrier at which a slow thread still looks."""
    set_num_threads(threads)
    good, bad = np.full(101, 3), np.full(101, 60)
    good[0], bad[0] = 1, 2
    check = kernel("check")
    launches = [
        Launch(check, [pointer(x) + 8, 0, 50], 100, step=i, checks=True)
        for i, x in enumerate([good, good, good, bad, good, good])
    ]
    run = Program(launches, 0).run
    assert all(run() == (2, 60) for _ in range(300))


# Python within programs


@pytest.mark.parametrize("threads", THREADS)
def test_python_runs_between_barriers(threads: int) -> None:
    set_num_threads(threads)
    x, y, z = np.arange(100), np.zeros(100, np.int64), np.zeros(100, np.int64)
    seen = []

    def square(source: int, out: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        seen.append((source, out))
        y[:] = y**2

    program = Program(
        [
            Launch(kernel("add"), [External(0), External(1), 1], 100),
            Launch(square, [External(1), 12]),
            Launch(kernel("mirror"), [External(1), External(2), 100], 100),
            Launch(square, [0, -1]),
        ],
        3,
    )  # fmt: skip
    for _ in range(3):
        assert program.run(pointer(x), pointer(y), pointer(z)) == 0
        np.testing.assert_array_equal(z, (np.arange(100)[::-1] + 1) ** 2 + np.arange(100))
        np.testing.assert_array_equal(y, (np.arange(100) + 1) ** 4)
    assert seen == [(pointer(y), 12), (0, -1)] * 3


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_an_exception_ends_the_program(threads: int, error: BaseException) -> None:
    set_num_threads(threads)
    y = np.zeros(100, np.int64)
    failing = [True]

    def call() -> None:
        if failing[0]:
            raise error

    program = Program([Launch(call, []), Launch(kernel("count"), [0, pointer(y), 0], 100)], 0)
    for _ in range(20):
        with pytest.raises(type(error)) as caught:
            program.run()
        assert caught.value is error
    assert not y.any()
    failing[0] = False
    assert program.run() == 0
    assert (y == 1).all()


def test_a_signal_within_a_program() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            Program([Launch(lambda: signal.raise_signal(signal.SIGINT), [])], 0).run()
    finally:
        signal.signal(signal.SIGINT, before)


def test_programs_within_programs() -> None:
    set_num_threads(2)
    x, y = np.arange(97), np.zeros(97, np.int64)
    inner = mirrors(97, 10)
    results = []

    def call() -> None:
        results.append(inner.run(pointer(x), pointer(y)))
        results.append(launcher()(kernel("count"), 97, 1, 0, pointer(x), 0))
        with pytest.raises(RuntimeError, match="threads: expected a change between programs"):
            set_num_threads(3)

    program = Program([Launch(call, [])], 0)
    assert program.run() == 0
    assert results == [0, 0]
    np.testing.assert_array_equal(x, mirrored(np.arange(97), 10) + 1)


# Several callers


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_python_threads_at_once(threads: int) -> None:
    set_num_threads(threads)
    shared, add = mirrors(61, 20), kernel("add")
    errors = []

    def work(seed: int) -> None:
        own = mirrors(61, 20)
        for turn in range(100):
            x, y = np.arange(61) * seed + turn, np.zeros(61, np.int64)
            expected = mirrored(x, 20)
            program = shared if turn % 2 else own
            program.run(pointer(x), pointer(y))
            launcher()(add, 61, 1 + 60 * (turn % 2), pointer(x), pointer(y), seed)
            if not (x == expected).all() or not (y == x + seed).all():
                errors.append((seed, turn))

    running = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for each in running:
        each.start()
    for turn in range(20):  # and the number of threads changes meanwhile
        set_num_threads(1 + (threads + turn) % 3)
    for each in running:
        each.join()
    assert errors == []


def test_rounding_is_ieee_whatever_the_caller_has_set() -> None:
    upward = {"x86_64": 0x800, "aarch64": 0x400000, "arm64": 0x400000}[platform.machine()]
    libm = ctypes.CDLL(None)
    set_num_threads(2)
    x, y = np.arange(1, 1001), np.zeros(1000)
    launch, address = launcher(), kernel("divide")
    expected = x / 7.0
    libm.fesetround(upward)
    try:
        for grain in (1, 10_000):
            y[:] = 0
            launch(address, 1000, grain, pointer(x), pointer(y), 7)
            assert libm.fegetround() == upward, "the caller's own is as it was"
            wrong = sum(a != b for a, b in zip(y.tolist(), expected.tolist(), strict=True))
            assert wrong == 0
    finally:
        libm.fesetround(0)


def test_idle_workers_use_no_time() -> None:
    set_num_threads(4)
    program = mirrors(97, 10)
    x, y = np.arange(97), np.zeros(97, np.int64)
    for _ in range(10):
        program.run(pointer(x), pointer(y))
    before = time.process_time()
    threading.Event().wait(0.3)
    assert time.process_time() - before < 0.1, "three workers that spin would take 0.6 s"


# Processes

PRELUDE = """
import os, sys, threading
sys.path.insert(0, "tests")
import numpy as np
from test_runtime import *
set_num_threads(2)
program = mirrors(97, 10)
def works(program=program):
    x, y = np.arange(97), np.zeros(97, np.int64)
    program.run(pointer(x), pointer(y))
    return (x == mirrored(np.arange(97), 10)).all()
assert works()
"""
FORK = """
for turn in range(10):
    child = os.fork()
    if child == 0:
        good = works() and works(mirrors(97, 10)) and len(runtime.pool().workers) == 1
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if works() else 1)
        os._exit(0 if good and os.waitpid(grandchild, 0)[1] == 0 else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert works()
"""
FORK_WHILE_BUSY = """
def work():
    while not done: works()
done = []
busy = threading.Thread(target=work)
busy.start()
for turn in range(10):
    child = os.fork()
    if child == 0:
        os._exit(0 if works() else 1)
    assert os.waitpid(child, 0)[1] == 0
done.append(1)
busy.join()
"""
EXITS = {
    "at rest": "",
    "after an exception": "import atexit\natexit.register(works)\nraise SystemExit(0)",
    "while a daemon works": "def work():\n    while True: works()\n"
    "threading.Thread(target=work, daemon=True).start()\nassert works()",
    "after fork": FORK,
    "after a fork while a thread works": FORK_WHILE_BUSY,
    "in a program": "Program([Launch(sys.exit, [0])], 0).run()",
}


@pytest.mark.parametrize("code", EXITS.values(), ids=EXITS)
def test_a_process_ends(code: str) -> None:
    for _ in range(3):
        command = [sys.executable, "-W", "ignore", "-c", PRELUDE + code]
        ended = subprocess.run(command, timeout=60, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


def test_importing_needle_loads_no_compiler() -> None:
    code = "import needle, needle.compiler.runtime, sys; sys.exit('llvmlite' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Settings


def test_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    set_num_threads(3)
    assert get_num_threads() == 3
    for wrong in (0, -1, 1.5, "2", 65535, None):
        with pytest.raises(ValueError, match=r"set_num_threads: expected an int from 1"):
            set_num_threads(wrong)  # type: ignore[arg-type]
    assert get_num_threads() == 3
    monkeypatch.setattr(runtime.Settings, "threads", None)
    monkeypatch.setenv("NEEDLE_NUM_THREADS", "5")
    assert get_num_threads() == 5
    for wrong in ("0", "-1", "many", "1.5"):
        monkeypatch.setattr(runtime.Settings, "threads", None)
        monkeypatch.setenv("NEEDLE_NUM_THREADS", wrong)
        with pytest.raises(ValueError, match=f"NEEDLE_NUM_THREADS: expected .* received {wrong}"):
            get_num_threads()
    monkeypatch.delenv("NEEDLE_NUM_THREADS")
    assert 1 <= get_num_threads() <= (os.cpu_count() or 1)


# Machine code


def test_code_that_llvm_refuses() -> None:
    with pytest.raises(CompileError, match="received .*expected"):
        engine.kernel("test syntax", lambda name: f"define void @{name}( {{")
    call = "define void @{}() {{ call void @missing() ret void }}\ndeclare void @missing()"
    for _ in range(2):  # it is not kept
        with pytest.raises(CompileError, match="a fault of needle"):
            engine.kernel("test symbol", call.format)
    wrong = "define i64 @{}(i64 %x) {{ %y = add i64 %z, 1 %z = add i64 %y, 1 ret i64 %z }}"
    with pytest.raises(CompileError, match="dominate"):
        engine.kernel("test dominance", wrong.format)


def test_a_missing_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(target, "import_module", missing)
    with pytest.raises(CompileError, match="pip install llvmlite"):
        target.llvm.__wrapped__()


BITS = """
import numpy as np
from needle.compiler import engine, runtime
from needle.compiler.target import vector_bits
lanes = vector_bits() // 32
v = f"<{lanes} x float>"
text = f'''
declare {v} @llvm.fma({v}, {v}, {v})
define void @NAME(ptr %args, i64 %begin, i64 %end, ptr %scratch) {{
entry:
  %x = load ptr, ptr %args
  br label %loop
loop:
  %i = phi i64 [%begin, %entry], [%next, %loop]
  %at = getelementptr float, ptr %x, i64 %i
  %a = load {v}, ptr %at, align 4
  %b = call {v} @llvm.fma({v} %a, {v} %a, {v} %a)
  %c = fmul {v} %b, %b
  %d = fadd {v} %c, %b
  store {v} %d, ptr %at, align 4
  %next = add i64 %i, {lanes}
  %last = icmp uge i64 %next, %end
  br i1 %last, label %out, label %loop
out:
  ret void
}}'''.replace("@llvm.fma(", f"@llvm.fma.v{lanes}f32(")
x = np.random.default_rng(0).standard_normal(4096, dtype="f4")
kernel = engine.kernel(text, lambda name: text.replace("NAME", name))
runtime.launcher()(kernel, 4096, 10_000, x.ctypes.data)
print(x.tobytes().hex())
"""


def test_vector_width_changes_no_bit(rng: np.random.Generator) -> None:
    """Fused where it says so, and nowhere else."""
    x = rng.standard_normal(4096, dtype="f4")
    wide = x.astype("f8")
    fused = (wide * wide + wide).astype("f4")  # rounded twice, yet rarely otherwise than once
    expected = fused * fused + fused
    for bits in ("128", "256", "512"):
        environment = {**os.environ, "NEEDLE_VECTOR_BITS": bits}
        command = [sys.executable, "-c", BITS]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        found = np.frombuffer(bytes.fromhex(ended.stdout), "f4")
        assert (found != expected).sum() <= 2, bits


def test_a_wrong_vector_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEEDLE_VECTOR_BITS", "64")
    with pytest.raises(ValueError, match="NEEDLE_VECTOR_BITS: expected one of 128, 256, 512"):
        target.host.__wrapped__()
