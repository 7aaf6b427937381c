"""Workers: they read batches ahead of the consumer, in threads or in processes.

In: a BatchReader and the indices of each batch. Out: the batches, in order. Nothing outlives
`read_ahead`, and a process ends when its consumer does, even by kill -9. Imports that cost
milliseconds are made when the first worker is. Next: loader.py.
"""

from __future__ import annotations

import os
import pickle
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable
from types import SimpleNamespace
from typing import Any, cast

from needle.data.batch import BatchReader, Indices

PRELOADED = ["__main__", "concurrent.futures.process", "numpy.random", __name__]


def read_ahead(
    reader: BatchReader, batches: Iterable[Indices], num_workers: int, worker: str, prefetch: int
) -> Generator[Any, None, None]:
    """What `reader` reads at each of `batches`, in order.

    Workers read up to num_workers * prefetch batches ahead; without workers, none is. Leaving early
    waits for the batches that are being read; no other is begun.
    """
    if not num_workers:
        yield from map(reader.read, batches)
        return
    from concurrent.futures import BrokenExecutor, ThreadPoolExecutor

    if worker == "process":
        pool, read, leave = start_processes(reader, num_workers)
    else:
        pool, read, leave = ThreadPoolExecutor(num_workers, "needle"), reader.read, lambda: None
    pending: deque[Any] = deque()
    try:
        for indices in batches:
            try:
                pending.append(pool.submit(read, indices))
            except BrokenPipeError:  # a process ended before it had received the reader
                raise BrokenExecutor from None
            if len(pending) > num_workers * prefetch:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenExecutor:
        name, first, last = type(reader.dataset).__name__, indices[0], indices[-1]
        raise RuntimeError(
            f"DataLoader: expected samples {first} to {last} of {name}; received the end of a "
            "worker process, at these or earlier ones; see its last words above (a script must "
            "start its work under `if __name__ == '__main__':`), or use worker='thread'"
        ) from None
    finally:
        leave()
        pool.shutdown(cancel_futures=True)


def start_processes(reader: BatchReader, count: int) -> tuple[Any, Any, Any]:
    """A pool, what it is to call with indices, and what to call when no more are to be read.

    TypeError where the reader does not pickle.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    try:
        payload = pickle.dumps(reader, pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        raise refusal(error) from error
    served = "forkserver" in multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("forkserver" if served else "spawn")
    if served:  # the server imports these once: 25 ms an epoch, not 350
        context.set_forkserver_preload(PRELOADED)
    left, leave = context.Pipe(duplex=False)
    return ProcessPoolExecutor(count, context, begin, (payload, left)), read_here, leave.close


def refusal(error: Exception) -> TypeError:
    expected = "a dataset and a collate_fn that pickle, and that a worker process can import"
    fix = "define their functions and classes in a module, or use worker='thread'"
    return TypeError(f"DataLoader: expected {expected}; received {error}; {fix}")


Here = SimpleNamespace(reader=None)  # what a worker process holds: what `begin` says, and a reader


def begin(payload: bytes, left: Any) -> None:
    """A worker process begins; the pipe `left` ends where no more batches are to be read."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the consumer's, who ends us
    threading.Thread(target=end_with_consumer, daemon=True).start()
    Here.payload, Here.left = payload, left


def end_with_consumer() -> None:
    import multiprocessing

    cast(Any, multiprocessing.parent_process()).join()
    os._exit(1)


def read_here(indices: Indices) -> Any:
    """In a worker process: the batch at indices, or None when the consumer has left."""
    if Here.left.poll():
        return None
    try:
        Here.reader = Here.reader or pickle.loads(Here.payload)
    except Exception as error:
        raise refusal(error) from None
    try:
        return Here.reader.read(indices)
    except Exception as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            raise RuntimeError(f"{error} ({type(error).__name__})") from error
        raise
