"""Data sets by name: handwritten digits (part of the package), MNIST and Fashion-MNIST.

In: two IDX files; or a folder that holds those of MNIST; or nothing: then pooch fetches them once
and checks their SHA-256. Out: an ImageDataset. Next: batch.py.
"""

from __future__ import annotations

from pathlib import Path

from needle.data.dataset import ImageDataset, Transforms
from needle.data.idx import read_images_and_labels
from needle.files import AnyPath, find_file

TRAIN_DIGITS = 1437  # the samples to train with stand first in the files
PAIR = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
FILES = [f"{part}-{name}" for part in ("train", "t10k") for name in PAIR]
SOURCES = {  # where the files lie, and the SHA-256 of each as it is published there
    "mnist": """https://ossci-datasets.s3.amazonaws.com/mnist/
        440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
        3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
        8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
        f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6""",
    "fashion_mnist": """https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/
        3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84
        a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845
        346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073
        67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5""",
}
Folder = AnyPath | None


class DigitsDataset(ImageDataset):
    """Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998): 1,797 images.

    Images float32 (8, 8, 1) in [0, 1], labels uint8. Source, licence and split: DIGITS.md.
    train: the 1,437 samples to train with, or the 360 to test with; a fixed, stratified split.
    """

    def __init__(self, train: bool = True, transforms: Transforms = None) -> None:
        part = slice(TRAIN_DIGITS) if train else slice(TRAIN_DIGITS, None)
        images, labels = (Path(__file__).parent / f"digits-{name}" for name in PAIR)
        x, y = read_images_and_labels(images, labels, op="DigitsDataset")
        super().__init__(x[part, ..., None], y[part], transforms, scale=16)


class MNISTDataset(ImageDataset):
    """The images and labels of two IDX files: float32 (rows, columns, 1) in [0, 1], and uint8.

    Errors: those of `read_idx`, and ValueError where the files count differently.
    """

    def __init__(
        self, image_filename: AnyPath, label_filename: AnyPath, transforms: Transforms = None
    ) -> None:
        x, y = read_images_and_labels(image_filename, label_filename, op="MNISTDataset")
        super().__init__(x[..., None], y, transforms, scale=255)


digits = DigitsDataset


def mnist(folder: Folder = None, train: bool = True, transforms: Transforms = None) -> MNISTDataset:
    """MNIST (LeCun, Cortes and Burges 1998): 60,000 handwritten digits to train, 10,000 to test.

    Images are grey, (28, 28, 1).
    folder: where the four IDX files lie, gzipped or plain; without it they are fetched once and
    kept in the user's cache (`pip install needle-dl[data]`). ImportError without pooch, OSError
    without a network or where a checksum differs, FileNotFoundError where the folder lacks a file,
    and the errors of MNISTDataset.
    """
    return load("mnist", folder, train, transforms)


def fashion_mnist(
    folder: Folder = None, train: bool = True, transforms: Transforms = None
) -> MNISTDataset:
    """Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747): clothes; as `mnist`."""
    return load("fashion_mnist", folder, train, transforms)


def load(source: str, folder: Folder, train: bool, transforms: Transforms) -> MNISTDataset:
    x, y = FILES[:2] if train else FILES[2:]
    if folder is None:
        return MNISTDataset(fetch(source, x), fetch(source, y), transforms)
    return MNISTDataset(find(source, folder, x), find(source, folder, y), transforms)


def find(source: str, folder: AnyPath, name: str) -> Path:
    """The file in the folder, gzipped or plain."""
    return find_file(source, Path(folder), (name, name.removesuffix(".gz")), name)


def fetch(source: str, name: str) -> Path:
    """The file in the user's cache, downloaded if it is not there or damaged."""
    try:
        import pooch  # an optional dependency
    except ImportError:
        message = f"{source}: expected pooch, which fetches the data; received a Python without it"
        fix = "pip install needle-dl[data], or pass folder=... with the files"
        raise ImportError(f"{message}; {fix}") from None
    address, *checksums = SOURCES[source].split()
    url, known = address + name, f"sha256:{checksums[FILES.index(name)]}"
    try:
        return Path(pooch.retrieve(url, known, name, pooch.os_cache("needle-dl") / source))
    except (OSError, ValueError) as error:  # no network; another checksum
        received = f"{type(error).__name__}: {error}; pass folder=... with the files"
        expected = f"expected to fetch {url} with {known}; received {received}"
        raise OSError(f"{source}: {expected}") from error
