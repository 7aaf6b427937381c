"""A folder of pictures, one folder below it per class.

    FOLDER/cat/1.png, FOLDER/cat/2.jpg, FOLDER/dog/1.png  ->  classes ["cat", "dog"]

In: the folder. Out: a Dataset that reads a picture when it is asked for. Next: cifar.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from needle.data.dataset import Dataset, Transforms, pick
from needle.data.picture import read_colour
from needle.errors import expect
from needle.files import AnyPath, FileError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp")


class ImageFolder(Dataset):
    """Sample i: (image, float32 (height, width, 3) in [0, 1], transformed; class, int64).

    classes: the names of the folders below, sorted; samples: (path, class) of all pictures, by
    class and name. Grey and transparent pictures become RGB. After the transforms all must have
    one shape: `Resize((32, 32))` makes it so. FileNotFoundError, ValueError: no folder, no classes,
    a class without pictures. Reading: the errors of `read_colour`, FileError for another shape.
    """

    def __init__(self, folder: AnyPath, transforms: Transforms = None) -> None:
        super().__init__(transforms)
        root = Path(folder)
        message = f"ImageFolder: expected a folder; received {folder}, a path without one"
        expect(root.is_dir(), message, FileNotFoundError)
        below = sorted(path for path in root.iterdir() if is_open(path) and path.is_dir())
        expected = "a folder of pictures for each class"
        expect(below, f"ImageFolder: expected {expected} in {folder}; received none")
        self.classes = [path.name for path in below]
        self.samples = [(path, i) for i, each in enumerate(below) for path in find_pictures(each)]
        self.first: tuple[Path, tuple[int, ...]] | None = None  # what was read first, its shape

    def __getitem__(self, index: Any) -> tuple[np.ndarray, np.int64]:
        path, label = pick(self, self.samples, index)
        image = self.apply_transforms(read_colour(path))
        self.first = self.first or (path, np.shape(image))
        expected = f"an image of shape {self.first[1]}, like {self.first[0]}"
        received = f"{np.shape(image)}; pass transforms=[ndl.data.Resize((height, width))]"
        fits = np.shape(image) == self.first[1]
        expect(fits, f"{path}: expected {expected}; received {received}", FileError)
        return image, np.int64(label)

    def __len__(self) -> int:
        return len(self.samples)


def is_open(path: Path) -> bool:
    """Whether a path is not hidden."""
    return not path.name.startswith(".")


def find_pictures(folder: Path) -> list[Path]:
    """The pictures at any depth of a class's folder, by their suffix."""
    found = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES]
    expected = f"pictures ({', '.join(SUFFIXES)}) in {folder}"
    expect(found, f"ImageFolder: expected {expected}; received a folder without")
    return sorted(path for path in found if is_open(path) and path.is_file())
