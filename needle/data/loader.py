"""DataLoader: batches of a dataset as Tensors, epoch after epoch.

In: a dataset. Out: tuples of Tensors that need no gradient. What an epoch gives is decided when it
begins (its order, and the stream that its transforms draw from), so that it depends on no worker
and can go on from a `state_dict()`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from typing import Any, cast

import numpy as np

from needle.array.ndarray import NDArray
from needle.autograd import Tensor
from needle.backend.device import Device
from needle.data.batch import BatchReader, Indices
from needle.data.stream import stream_from_numpy, stream_of
from needle.data.workers import read_ahead
from needle.errors import expect
from needle.init import generator, randint


@dataclass(eq=False)
class Epoch:
    """One pass over a dataset. What it gives is decided when it begins."""

    number: int
    order: np.ndarray | None = None  # of all samples; None for 0, 1, 2, ...
    stream: int | None = None  # what transforms draw from; None for NumPy's global generator
    position: int = 0  # batches that the consumer has received
    under_way: bool = False  # in an iterator; else the next one is to go through it


@dataclass(eq=False, repr=False)
class DataLoader:
    """Batches of a dataset: tuples with one Tensor per field, (batch_size, ...).

    The Tensors require no gradient. An exception while a sample is read keeps its type and names
    the sample's index. ValueError and TypeError for bad arguments and for an empty dataset.

    dataset: has a length and gives sample i, a tuple of arrays or numbers (or one of them).
    batch_size: samples per batch; the last one may have fewer, unless drop_last leaves it out.
    shuffle: a new order each epoch.
    collate_fn: a list of samples -> a tuple (or dict) of arrays; by default fields are stacked.
    num_workers: 0 reads when a batch is asked for; n workers read up to n * prefetch batches ahead.
    worker: "thread", or "process" (by forkserver, or spawn where there is none; dataset and
        collate_fn must pickle).
    seed: decides the order, by (seed, epoch), and the transforms, by (seed, epoch, index). Without
        it both follow `ndl.seed` or, if that was not called, NumPy's global generator:
        `np.random.shuffle` at each `iter(loader)`, and transforms draw from it directly
        (num_workers=0) or from one per sample that its state and the epoch decide.
    device: where the Tensors go.
    """

    dataset: Any
    batch_size: int = 1
    shuffle: bool = False
    _: KW_ONLY
    drop_last: bool = False
    collate_fn: Callable[[list[Any]], Any] | None = None
    num_workers: int = 0
    worker: str = "thread"
    prefetch: int = 2
    seed: int | None = None
    device: Device | None = None

    def __post_init__(self) -> None:
        data, function, name = self.dataset, self.collate_fn, type(self.dataset).__name__
        indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
        require("DataLoader", indexed, "a dataset with __len__ and __getitem__", name, TypeError)
        called = function is None or callable(function)
        require("DataLoader", called, "a callable collate_fn", repr(function), TypeError)
        known = self.worker in ("thread", "process")
        require("DataLoader", known, "worker='thread' or 'process'", repr(self.worker))
        for name, least in {"batch_size": 1, "num_workers": 0, "prefetch": 1, "seed": 0}.items():
            if name != "seed" or self.seed is not None:
                setattr(self, name, as_count(name, getattr(self, name), least))
        self._latest = Epoch(0)
        self._samples()

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        whole, rest = divmod(self._samples(), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[Any]:
        """Begin an epoch, or continue the one that `load_state_dict` brought."""
        if self._latest.under_way:  # the consumer has left it
            self._latest = Epoch(self.epoch + 1)
        epoch = self._latest
        if epoch.order is None and epoch.stream is None:
            self._decide(epoch)
        if epoch.stream is None and self.num_workers:
            epoch.stream = stream_from_numpy(epoch.number)
        epoch.under_way = True
        return self._batches(epoch)

    @property
    def epoch(self) -> int:
        """The number of the epoch under way, from 0; once it is through, the next one's."""
        return self._latest.number

    def state_dict(self) -> dict[str, Any]:
        """Where the consumer stands, as plain numbers and lists (JSON can hold it).

        Batches that workers have read ahead do not count. Without a seed, the order of the epoch
        under way is part of it; the state of the global generator that transforms and later epochs
        draw from is the caller's to save.
        """
        epoch, drawn = self._latest, self.seed is None  # else order and stream follow from it
        order = epoch.order.tolist() if drawn and epoch.order is not None else None
        state = {"epoch": epoch.number, "position": epoch.position, "order": order}
        return {**self._identity(), **state, "stream": epoch.stream if drawn else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next `iter` go on where `state_dict` was taken: the same remaining batches.

        The workers may differ; the number of samples, batch_size, shuffle, drop_last and seed must
        not. ValueError or TypeError where the state does not fit; the loader then stays as it was.
        """
        op, identity = "load_state_dict", self._identity()
        keys = {*identity, "epoch", "position", "order", "stream"}
        received = list(state) if isinstance(state, dict) else type(state).__name__
        fits = isinstance(state, dict) and set(state) == keys
        require(op, fits, f"a state with {sorted(keys)}", received)
        for key, known in identity.items():
            require(op, state[key] == known, f"{key}={known}", f"{key}={state[key]}")
        number, position = (as_count(key, state[key], 0, op) for key in ("epoch", "position"))
        require(op, position <= len(self), f"a position up to {len(self)}", position)
        order, stream = state["order"], state["stream"]
        given = order is not None or not self.shuffle or self.seed is not None
        begun = position > 0 or stream is not None
        require(op, given or not begun, "the order of an epoch", "none")
        order = None if order is None else as_order(order, self._samples(), op)
        stream = None if stream is None else as_count("stream", stream, 0, op)
        self._latest = Epoch(number, order, stream, position)

    def __repr__(self) -> str:
        names = ("batch_size", "shuffle", "num_workers", "seed")
        options = ", ".join(f"{name}={getattr(self, name)}" for name in names)
        return f"DataLoader({self.dataset!r}, {options}): {len(self)} batches"

    def _identity(self) -> dict[str, Any]:
        """What decides an epoch's batches, and must not change before it is continued."""
        names = ("batch_size", "shuffle", "drop_last", "seed")
        return {"samples": self._samples(), **{name: getattr(self, name) for name in names}}

    def _samples(self) -> int:
        """How many samples the dataset has; ValueError where they make no batch."""
        samples, name = len(self.dataset), type(self.dataset).__name__
        require("DataLoader", samples, "a dataset with at least one sample", f"an empty {name}")
        least = self.batch_size if self.drop_last else 1
        expected = f"at least {least} samples, one whole batch, with drop_last=True"
        require("DataLoader", samples >= least, expected, samples)
        return samples

    def _decide(self, epoch: Epoch) -> None:
        """Decide an epoch's order and stream."""
        seed, rng = self.seed, cast(Any, np.random)
        if seed is None and generator() is not None:  # ndl.seed was called
            seed = int(randint(0, 1 << 53).item())
        if seed is not None:
            rng = np.random.default_rng((seed, epoch.number))
            epoch.stream = stream_of(seed, epoch.number)
        if self.shuffle:
            epoch.order = rng.permutation(self._samples())  # as np.random.shuffle orders them

    def _batches(self, epoch: Epoch) -> Iterator[Any]:
        """The rest of an epoch."""
        order: Indices = range(self._samples()) if epoch.order is None else epoch.order
        starts = range(
            epoch.position * self.batch_size, len(self) * self.batch_size, self.batch_size
        )
        indices = (order[start : start + self.batch_size] for start in starts)
        reader = BatchReader(self.dataset, self.collate_fn, epoch.stream)
        batches = read_ahead(reader, indices, self.num_workers, self.worker, self.prefetch)
        with closing(batches):  # as soon as the consumer leaves its loop
            for batch in batches:
                tensors = to_tensors(batch, self.device)
                epoch.position += 1
                yield tensors
        if epoch is self._latest:
            self._latest = Epoch(epoch.number + 1)


def require(op: str, fits: object, expected: str, received: Any, error: Any = ValueError) -> None:
    expect(fits, f"{op}: expected {expected}; received {received}", error)


def as_count(name: str, value: Any, least: int, op: str = "DataLoader") -> int:
    """value as an int of at least `least`."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    require(op, whole, f"an integer {name}", repr(value), TypeError)
    require(op, value >= least, f"a {name} of at least {least}", value)
    return int(value)


def as_order(value: Any, samples: int, op: str) -> np.ndarray:
    """value as a permutation of the samples."""
    order = np.asarray(value)
    whole = order.dtype.kind in "iu" and order.shape == (samples,)
    fits = whole and np.array_equal(np.sort(order), np.arange(samples))
    require(op, fits, f"an order with each of {samples} samples once", "another list")
    return order.astype(np.int64)


def to_tensors(batch: Any, device: Device | None) -> Any:
    """A batch's arrays as Tensors: in a tuple, or in a dict where collate_fn made one."""
    if isinstance(batch, dict):
        return {key: to_tensor(value, device) for key, value in batch.items()}
    fields = batch if isinstance(batch, tuple | list) else (batch,)
    return tuple(to_tensor(field, device) for field in fields)


def to_tensor(value: Any, device: Device | None) -> Any:
    """A Tensor of an array or a number; what is neither stays as it is."""
    is_array = isinstance(value, np.ndarray | np.generic) and value.dtype.kind not in "OUSM"
    if is_array or isinstance(value, NDArray | int | float):
        return Tensor(value, device=device, requires_grad=False)
    return value
