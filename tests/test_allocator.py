"""The allocator: blocks that are aligned, reused, never while somebody reads them, and counted."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import needle as ndl
from needle import NDArray, Tensor
from needle.array import memory
from needle.array.form import compact_form, form
from needle.array.memory import ALIGNMENT, POOLS, USAGE, empty_pools, pool_of, size_class
from needle.array.ndarray import empty
from needle.array.spec import Spec
from needle.dtype import DTYPES, float32

NBYTES = 12352  # a size class that no other test uses


@pytest.fixture(autouse=True)
def empty_cache() -> Iterator[None]:
    """Begin without free blocks, so that reuse is this test's own."""
    gc.collect()
    ndl.memory.empty_cache()
    yield
    ndl.memory.empty_cache()


def new(nbytes: int = NBYTES) -> NDArray:
    return NDArray.empty(Spec((nbytes // 4,), float32))


# Size classes


@given(st.integers(0, 1 << 40))
def test_a_size_class_holds_the_bytes_and_wastes_little(nbytes: int) -> None:
    size = size_class(nbytes)
    assert size >= max(nbytes, 1)
    assert size % ALIGNMENT == 0
    assert size < max(nbytes * 9 / 8, nbytes + ALIGNMENT) + 1
    assert size_class(size) == size


def test_sizes_of_a_class_share_a_pool() -> None:
    assert pool_of(1) is pool_of(ALIGNMENT)
    assert pool_of(ALIGNMENT) is not pool_of(ALIGNMENT + 1)
    assert pool_of(1 << 20) is not pool_of((1 << 20) + 1)


# Reuse


@pytest.mark.parametrize("nbytes", [4, 64, 100, 4096, 1 << 20, 40_000_000])
def test_blocks_are_aligned(nbytes: int) -> None:
    arrays = [new(nbytes) for _ in range(3)]
    assert all(x.ptr % ALIGNMENT == 0 for x in arrays)
    assert all(x.numpy().ctypes.data == x.ptr for x in arrays)
    ends = sorted((x.ptr, x.ptr + nbytes) for x in arrays)
    assert all(end <= start for (_, end), (start, _) in zip(ends, ends[1:], strict=False))


def test_the_block_that_was_freed_last_is_used_first() -> None:
    a, b = new(), new()
    places = a.ptr, b.ptr
    del a, b
    assert ndl.memory.cached() == 2 * size_class(NBYTES)
    assert [new().ptr, new().ptr] == [places[1], places[1]]
    kept = new(), new()
    assert (kept[0].ptr, kept[1].ptr) == places[::-1]
    assert ndl.memory.cached() == 0


def test_results_of_ops_are_blocks_that_are_reused() -> None:
    x = Tensor(np.ones(NBYTES // 4, np.float32), requires_grad=False)
    assert x.cached_data.ptr % ALIGNMENT == 0
    place = NDArray(np.zeros(NBYTES // 4, np.float32)).ptr
    assert NDArray(x.numpy()).ptr == place


def test_empty_arrays_have_memory_of_their_own() -> None:
    a, b = NDArray(np.ones((0, 3))), NDArray(np.ones((3, 0)))
    assert a.ptr != b.ptr
    assert (a.nbytes, a.numpy().shape, b.numpy().shape) == (0, (0, 3), (3, 0))


# Never while somebody reads it


def exports(a: NDArray) -> dict[str, Any]:
    view = a.numpy()
    return {
        "numpy": view,
        "slice": view[3:],
        "reversed": view[::-1],
        "reshaped": view.reshape(8, -1),
        "transposed": view.reshape(8, -1).T,
        "bytes": view.view(np.uint8),
        "asarray": np.asarray(a),
        "memoryview": memoryview(view)[2:],
        "dlpack": np.from_dlpack(a),
        "flat": view.flat,
        "frombuffer": np.frombuffer(view, np.int32),
        "needle's own": a[5:].permute((0,)),
        "tensor": Tensor.make_const(a).reshape(8, -1).T,
        "from_numpy": ndl.from_numpy(view[1:]),
    }


@pytest.mark.parametrize("kind", exports(new()))
def test_a_block_is_not_reused_while_an_export_lives(kind: str) -> None:
    a = new()
    a[:] = 7
    place = a.ptr
    export = exports(a)[kind]
    del a
    assert ndl.memory.cached() == 0
    others = [new() for _ in range(3)]
    assert place not in [x.ptr for x in others]
    for x in others:
        x[:] = -1
    values = export.numpy() if hasattr(export, "numpy") else np.asarray(export)
    assert not np.any(values == -1)
    del export, values, x
    assert place in [new().ptr, new().ptr]


def test_foreign_memory_is_never_reused() -> None:
    x = np.ones(NBYTES // 4, np.float32)
    before = ndl.memory.live()
    t = ndl.from_numpy(x)
    assert ndl.memory.live() == before + NBYTES
    assert t.cached_data.ptr == x.ctypes.data
    assert (t[5:].cached_data.ptr, t.cached_data._handle.ptr()) == (
        x[5:].ctypes.data,
        x.ctypes.data,
    )
    assert t[5:].cached_data.storage is t.cached_data.storage
    del t
    assert (ndl.memory.live(), ndl.memory.cached()) == (before, 0)
    assert new().ptr != x.ctypes.data


def test_from_numpy_of_our_own_memory_finds_its_storage() -> None:
    a = new()
    before = ndl.memory.live()
    t = ndl.from_numpy(a.numpy()[4:][::2])
    assert t.cached_data.storage is a.storage
    assert ndl.memory.live() == before


def test_from_numpy_refuses_elements_that_are_not_aligned() -> None:
    odd = np.zeros(17, np.uint8)[1:].view(np.float32)
    with pytest.raises(
        ValueError, match=r"^from_numpy: expected aligned elements; received others"
    ):
        ndl.from_numpy(odd)
    assert Tensor(odd).tolist() == [0] * 4
    assert NDArray.wrap(odd, ndl.cpu()).ptr % 4 == 0


def test_garbage_that_refers_to_itself_is_not_reused_before_it_is_gone() -> None:
    class Holder:
        """In a cycle, and computes with its arrays when it dies."""

        def __init__(self) -> None:
            self.itself = self
            self.arrays = [new() for _ in range(4)]
            for number, array in enumerate(self.arrays):
                array[:] = number
                assert array.is_alone()  # the collector sees all that refers to the memory

        def __del__(self) -> None:
            for _ in range(4):
                fresh.append(new())
                fresh[-1][:] = -1
            seen.append([array[0].item() for array in self.arrays])
            survivors.append(self.arrays[0])

    seen: list[Any] = []
    fresh: list[NDArray] = []
    survivors: list[NDArray] = []
    Holder()
    gc.collect()
    assert seen == [[0, 1, 2, 3]]
    for each in [new() for _ in range(8)]:
        each[:] = -2
    assert survivors[0][0].item() == 0


def test_who_is_alone_in_memory() -> None:
    a = new()
    assert a.is_alone()
    view = a.numpy()
    assert not a.is_alone()
    del view
    assert a.is_alone()
    part = a[3:]
    assert not a.is_alone()
    assert not part.is_alone()
    del part
    assert a.is_alone()
    export = a.numpy()[2:]
    assert not a.is_alone()
    del export
    assert a.is_alone()
    assert not NDArray.wrap(np.ones(3), ndl.cpu()).is_alone()


# What is counted


def test_live_peak_and_cached() -> None:
    before = ndl.memory.live()
    ndl.memory.reset_peak()
    a, b = new(), new()
    assert (ndl.memory.live(), ndl.memory.peak()) == (before + 2 * NBYTES, before + 2 * NBYTES)
    del a
    assert ndl.memory.live() == before + NBYTES
    assert ndl.memory.cached() == size_class(NBYTES)
    del b
    c = new()
    assert (ndl.memory.live(), ndl.memory.peak()) == (before + NBYTES, before + 2 * NBYTES)
    assert ndl.memory.report().cached == size_class(NBYTES)
    del c
    ndl.memory.empty_cache()
    assert (ndl.memory.live(), ndl.memory.cached()) == (before, 0)


def test_pools_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LIMIT", 10 * NBYTES)
    monkeypatch.setattr(USAGE, "made", 0)
    pool = POOLS.pop(size_class(NBYTES), None)
    try:
        shape = (NBYTES // 4, 1, 1)  # a form that is not interned yet, which takes the new pool
        for _ in range(3):
            arrays = [empty(compact_form(ndl.cpu(), shape, float32)) for _ in range(20)]
            del arrays
            assert ndl.memory.cached() <= 10 * size_class(NBYTES)
        sizes = [new(1 << n).nbytes for n in range(8, 18)]
        assert sum(sizes) > memory.LIMIT
        assert ndl.memory.cached() < sum(sizes)
    finally:
        if pool is not None:
            POOLS[size_class(NBYTES)] = pool


def test_memory_that_the_system_refuses_is_asked_for_again_without_the_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new()
    assert ndl.memory.cached()
    calls = []

    def refuse_once(*args: Any) -> np.ndarray:
        calls.append(args)
        if len(calls) == 1:
            raise MemoryError
        return real(*args)

    real = np.empty
    monkeypatch.setattr(np, "empty", refuse_once)
    assert new(2 * NBYTES).shape == (NBYTES // 2,)
    assert len(calls) == 2
    assert ndl.memory.cached() == size_class(2 * NBYTES)


def test_cycles_that_hold_much_are_collected() -> None:
    class Node:
        pass

    def leak() -> None:
        node: Any = Node()
        node.itself, node.array = node, new(16 << 20)

    gc.collect()
    USAGE.collect_at = USAGE.live + memory.COLLECT_GROWTH
    USAGE.mark = 0
    before = ndl.memory.live()
    for _ in range(20):
        leak()
    assert ndl.memory.live() < before + 2 * memory.COLLECT_GROWTH
    gc.collect()
    assert ndl.memory.live() == before


# Threads and processes


def test_threads_allocate_and_free_at_once() -> None:
    failures: list[Any] = []
    passed: list[NDArray] = []

    def work(number: int) -> None:
        for turn in range(300):
            arrays = [new() for _ in range(3)]
            for place, array in enumerate(arrays):
                array[:] = number * 1000 + turn + place
            if passed:
                try:
                    passed.pop()  # which another thread made
                except IndexError:
                    pass
            passed.append(arrays.pop())
            for place, array in enumerate(arrays):
                if not np.all(array.numpy() == number * 1000 + turn + place):
                    failures.append((number, turn))

    before = ndl.memory.live()
    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    passed.clear()
    assert ndl.memory.live() == before
    blocks = POOLS[size_class(NBYTES)]
    assert len({block.ptr for block in blocks}) == len(blocks)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_process_allocates_on() -> None:
    a = new()
    a[:] = 3
    place = new().ptr
    child = os.fork()
    if child == 0:
        b = new()
        b[:] = 4
        right = b.ptr == place and bool(np.all(a.numpy() == 3))
        os._exit(0 if right else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert np.all(a.numpy() == 3)


# Forms


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_equal_forms_are_one_object(dtype: Any) -> None:
    x = np.zeros((3, 4)).astype(dtype)
    a, b = NDArray(x), NDArray.wrap(x, ndl.cpu())
    assert a.form is b.form
    assert a.form is not NDArray(x, ndl.cpu_numpy()).form
    t = a.permute((1, 0))
    assert t.form is NDArray.wrap(x.T, ndl.cpu()).form
    assert t.form is not a.form
    assert t.form.compact is NDArray(x.T).form
    assert (t.form.strides, t.form.steps) == ((1, 4), (dtype.itemsize, 4 * dtype.itemsize))
    assert (t.form.is_compact, a.form.is_compact) == (False, True)
    assert t.form.nbytes == x.nbytes


def test_strides_of_single_elements_do_not_count() -> None:
    x = np.zeros((4, 1, 6))
    assert NDArray.wrap(x[:1, :, ::-1][:, :, 5:], ndl.cpu()).form is NDArray(x[:1, :, :1]).form
    assert form(ndl.cpu(), (0, 3), (8, 16), x.dtype) is NDArray(np.zeros((0, 3))).form


def test_a_form_spread_is_numpys_broadcast() -> None:
    x = np.zeros((3, 1))
    wide = NDArray(x).form.spread((2, 3, 4))
    assert wide is NDArray.wrap(np.broadcast_to(x, (2, 3, 4)), ndl.cpu()).form
    assert wide.strides == (0, 1, 0)
    assert wide.spread((2, 3, 4)) is wide


def test_views_are_written_unless_their_elements_share_memory() -> None:
    a = NDArray(np.zeros((3, 1)))
    a.permute((1, 0)).numpy()[0, 1] = 5
    assert a.tolist() == [[0], [5], [0]]
    assert not a.broadcast_to((3, 2)).numpy().flags.writeable


def test_pools_can_be_emptied_at_any_time() -> None:
    a = new()
    empty_pools()
    del a
    assert ndl.memory.cached() == size_class(NBYTES)
