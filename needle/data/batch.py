"""One batch: the samples at some indices, put together.

In: a dataset and indices. Out: NumPy arrays, one per field, which the loader turns into Tensors. A
BatchReader is all that a worker needs, and it can be sent to another process. Next: workers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from needle.data.stream import open_stream
from needle.errors import expect

Indices = Sequence[int] | np.ndarray  # a range where the order is not shuffled


@dataclass(frozen=True)
class BatchReader:
    """Reads batches of a dataset; its random transforms draw from the stream.

    Without a stream they draw from NumPy's global generator.
    """

    dataset: Any
    collate_fn: Callable[[list[Any]], Any] | None
    stream: int | None

    def read(self, indices: Indices) -> Any:
        """The batch at indices; an exception keeps its type, and its message names the samples."""
        reading, samples = indices, []
        try:
            getitem = type(self.dataset).__getitem__
            whole = self.collate_fn is None and getattr(getitem, "takes_indices", False)
            if whole and not self.dataset.changes_samples():
                many = slice(indices.start, indices.stop) if isinstance(indices, range) else indices
                return self.dataset[many]
            for index in map(int, indices):
                reading = [index]
                with open_stream(self.stream, index):
                    samples.append(self.dataset[index])
            reading = indices
            with open_stream(self.stream, ~int(indices[0])):  # an index that no sample has
                return (self.collate_fn or collate)(samples)
        except Exception as error:
            raise self.name_samples(error, reading) from error

    def name_samples(self, error: Exception, indices: Indices) -> Exception:
        """The error with a message that says which samples were read, or else a RuntimeError."""
        word = "sample" if len(indices) == 1 else "samples"
        listed = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        message = f"DataLoader: {word} {listed} of {type(self.dataset).__name__}: {error}"
        try:
            found = type(error)(message)
        except Exception:  # a type that takes more than a message
            found = None
        # Within a generator, StopIteration would only end it.
        if isinstance(found, Exception) and not isinstance(found, StopIteration):
            return found
        return RuntimeError(f"{message} ({type(error).__name__})")


def collate(samples: list[Any]) -> tuple[np.ndarray, ...]:
    """Stack samples field by field: [(x0, y0), (x1, y1)] -> (x, y).

    A sample that is no tuple is one field. NumPy's dtypes stay; Python floats become float32, ints
    int64. ValueError where numbers of fields or shapes differ, TypeError for what is no number.
    """
    rows = [tuple(each) if isinstance(each, tuple | list) else (each,) for each in samples]
    counts = sorted({len(row) for row in rows})
    expect(len(counts) == 1, f"expected one number of fields; received {counts}; pass a collate_fn")
    return tuple(stack(field, values) for field, values in enumerate(zip(*rows, strict=True)))


def stack(field: int, values: tuple[Any, ...]) -> np.ndarray:
    """One field of all samples, along a new first axis."""
    arrays = [x.numpy() if hasattr(x, "realize_cached_data") else np.asarray(x) for x in values]
    for value, array in zip(values, arrays, strict=True):
        if array.dtype.kind in "OUSM":
            received = f"received {type(value).__name__}; pass a collate_fn"
            raise TypeError(f"expected numbers or arrays in field {field}; {received}")
        if array.shape != arrays[0].shape:
            received = f"received {arrays[0].shape} and {array.shape}; pass a collate_fn that pads"
            raise ValueError(f"expected one shape in field {field}; {received}")
    found = np.stack(arrays)
    return found.astype(np.float32) if all(type(x) is float for x in values) else found
