"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), from the folders that their archives unpack to.

    binary version    records of one label (CIFAR-100: coarse, fine) and 3072 bytes
    python version    a pickled dict; it is searched for its bytes and labels, never unpickled

Either way the 3072 bytes are red, green and blue planes of 32 x 32. In: a folder. Out: images
(3, 32, 32), as in the course. Next: text.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from needle.data.dataset import ImageDataset, Transforms
from needle.errors import expect
from needle.files import AnyPath, find_file, reading

PIXELS = 3 * 32 * 32
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
Labelled = tuple[np.ndarray, np.ndarray]


class CIFAR10Dataset(ImageDataset):
    """60,000 colour images of ten classes: 50,000 to train, 10,000 to test.

    Sample i: (image, float32 (3, 32, 32) in [0, 1], channels first; label). Transforms work on
    (32, 32, 3) before that.

    folder: cifar-10-batches-bin or cifar-10-batches-py, or what holds one of them. p: as in the
    course, where it has no part; flipping is a transform. FileNotFoundError where a file is
    missing, FileError where one is truncated or of another kind.
    """

    files = ([f"data_batch_{number}" for number in range(1, 6)], ["test_batch"])
    folders = ("cifar-10-batches-bin", "cifar-10-batches-py")
    label_bytes, label_key, count = 1, "labels", 10
    channels_first = True

    def __init__(
        self, folder: AnyPath, train: bool = True, p: float = 0.5, transforms: Transforms = None
    ) -> None:
        self.p = p
        paths = [self.find(Path(folder), name) for name in self.files[0 if train else 1]]
        images, labels = zip(*map(self.read, paths), strict=True)
        planes = np.concatenate(images).reshape(-1, 3, 32, 32)
        images_last = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        super().__init__(images_last, np.concatenate(labels), transforms, scale=255)

    @property
    def X(self) -> np.ndarray:
        """All images, float32 (n, 3, 32, 32) in [0, 1], untransformed."""
        return np.divide(self.images.transpose(0, 3, 1, 2), self.scale, dtype=np.float32)

    @property
    def y(self) -> np.ndarray:
        """All labels."""
        return self.labels

    def find(self, folder: Path, name: str) -> Path:
        """The file of a name in the folder or in one of the archives' folders in it."""
        bare = [name, *(f"{each}/{name}" for each in self.folders)]
        places = [f"{each}{suffix}" for each in bare for suffix in (".bin", "")]
        expected = f"{name}.bin of {self.folders[0]}"
        return find_file(type(self).__name__, folder, places, expected)

    def read(self, path: Path) -> Labelled:
        """The images (n, 3072) and labels (n,) of a file."""
        content, binary = path.read_bytes(), path.suffix == ".bin"
        kind = f"whole records of {self.label_bytes + PIXELS} bytes" if binary else "a batch of"
        archive = "" if binary else f" CIFAR's python version (else use {self.folders[0]})"
        with reading(path, kind + archive):
            images, labels = self.parse(content) if binary else self.search(content)
            expect(len(images) == len(labels), f"{len(images)} images and {len(labels)} labels")
            highest = int(labels.max(initial=0))
            expect(highest < self.count, f"a label of {highest}; there are {self.count} classes")
        return images, labels

    def parse(self, content: bytes) -> Labelled:
        """The records of the binary version; the last byte before the pixels is the label."""
        size = self.label_bytes + PIXELS
        expect(content and len(content) % size == 0, f"{len(content)} bytes")
        records = np.frombuffer(content, np.uint8).reshape(-1, size)
        return records[:, self.label_bytes :], records[:, self.label_bytes - 1]

    def search(self, content: bytes) -> Labelled:
        """The bytes and labels of the python version: the longest text, and the small integers
        between the key of the labels and the text that follows them."""
        import pickletools  # needed by those alone who have the python version

        pixels, labels, within = b"", bytearray(), False
        for opcode, arg, _ in pickletools.genops(content):  # reads opcodes, and acts on none
            if isinstance(arg, (str, bytes)) and "STRING" in opcode.name:
                text = arg if isinstance(arg, bytes) else arg.encode("latin-1")
                within = text == self.label_key.encode()
                pixels = max(pixels, text, key=len)
            elif within and opcode.name == "BININT1":
                labels.append(int(str(arg)))
        expect(pixels and len(pixels) % PIXELS == 0, f"images of {len(pixels)} bytes")
        return np.frombuffer(pixels, np.uint8).reshape(-1, PIXELS), np.frombuffer(labels, np.uint8)


class CIFAR100Dataset(CIFAR10Dataset):
    """60,000 colour images of a hundred classes; otherwise as CIFAR10Dataset.

    folder: cifar-100-binary or cifar-100-python, or what holds one of them. The labels are the
    fine ones.
    """

    files = (["train"], ["test"])
    folders = ("cifar-100-binary", "cifar-100-python")
    label_bytes, label_key, count = 2, "fine_labels", 100
