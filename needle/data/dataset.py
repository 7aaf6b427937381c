"""Datasets: what has a length and gives sample i.

In: arrays. Out: `dataset[i]`, a tuple of NumPy values. A dataset whose `__getitem__` also takes a
slice or an array of indices says so with `takes_indices`; the loader then reads a batch at once.
Next: idx.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from needle.errors import expect

GetItem = TypeVar("GetItem", bound=Callable[..., Any])
Transforms = Sequence[Callable[[Any], Any]] | None


def takes_indices(getitem: GetItem) -> GetItem:
    """Mark a `__getitem__` that takes slices and integer arrays; overriding it drops the mark."""
    getitem.takes_indices = True  # type: ignore[attr-defined]
    return getitem


class Dataset:
    """A sequence of samples. Subclasses write `__getitem__(index)` and `__len__`.

    transforms: functions that `apply_transforms` passes a sample through, in order.
    """

    transforms: Transforms = None  # also of subclasses that don't call __init__

    def __init__(self, transforms: Transforms = None) -> None:
        fits = not callable(transforms) and all(map(callable, transforms or ()))
        message = f"expected transforms as a list of callables; received {transforms!r}"
        expect(fits, f"{type(self).__name__}: {message}", TypeError)
        self.transforms = transforms

    def __getitem__(self, index: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__}: write __getitem__(index)")

    def __len__(self) -> int:
        raise NotImplementedError(f"{type(self).__name__}: write __len__()")

    def apply_transforms(self, x: Any) -> Any:
        """x after all transforms."""
        for transform in self.transforms or ():
            x = transform(x)
        return x

    def changes_samples(self) -> bool:
        """Whether `apply_transforms` does anything."""
        return bool(self.transforms) or type(self).apply_transforms is not Dataset.apply_transforms

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} samples)"


class NDArrayDataset(Dataset):
    """Samples (a[i], b[i], ...) of arrays with one length. ValueError where lengths differ."""

    def __init__(self, *arrays: Any) -> None:
        self.arrays = tuple(np.asarray(array) for array in arrays)
        shapes = [array.shape for array in self.arrays]
        fits = len({shape[:1] for shape in shapes}) == 1 and () not in shapes
        expect(fits, f"NDArrayDataset: expected arrays of one length; received shapes {shapes}")

    @takes_indices
    def __getitem__(self, index: Any) -> tuple[Any, ...]:
        return tuple(pick(self, array, index) for array in self.arrays)

    def __len__(self) -> int:
        return len(self.arrays[0])


class ImageDataset(Dataset):
    """Images and labels: sample i is (image (H, W, C), transformed, and label).

    A slice or an array of indices gives (images (m, H, W, C), labels (m,)); each image passes the
    transforms by itself. Where `channels_first` is set, images leave as (C, H, W), after the
    transforms. ValueError where the arrays' shapes do not fit.

    images: (n, H, W, C), kept as they are: bytes take a quarter of the memory of what they become.
    labels: (n,).
    scale: samples are float32, images / scale; 255 brings bytes into [0, 1].
    """

    channels_first = False

    def __init__(
        self, images: Any, labels: Any, transforms: Transforms = None, *, scale: float = 1
    ) -> None:
        super().__init__(transforms)
        self.images, self.labels, self.scale = np.asarray(images), np.asarray(labels), scale
        x, y = self.images.shape, self.labels.shape
        message = f"expected images (n, H, W, C) and labels (n,); received shapes {x} and {y}"
        expect(len(x) == 4 and y == x[:1], f"{type(self).__name__}: {message}")

    @takes_indices
    def __getitem__(self, index: Any) -> tuple[np.ndarray, Any]:
        label = pick(self, self.labels, index)
        images = np.divide(self.images[index], self.scale, dtype=np.float32)
        if self.changes_samples() and len(images):
            if images.ndim == 3:
                images = self.apply_transforms(images)
            else:
                images = np.stack([self.apply_transforms(image) for image in images])
        return np.moveaxis(images, -1, -3) if self.channels_first else images, label

    def __len__(self) -> int:
        return len(self.images)


def pick(dataset: Dataset, array: Any, index: Any) -> Any:
    """array[index], or an IndexError that names the dataset and its length."""
    try:
        return array[index]
    except IndexError:
        message = f"expected indices from {-len(array)} to {len(array) - 1}; received {index!r}"
        raise IndexError(f"{type(dataset).__name__}: {message}") from None
