"""Data: files, datasets, transforms and the loader, against things that needle did not write.

The IDX writer, the crop, the order of an epoch and the split are written here a second time, in the
plainest way. Process workers import this file: what they read stands at its top level.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import tracemalloc
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import needle as ndl
from needle.data import (
    DataLoader,
    Dataset,
    DigitsDataset,
    ImageDataset,
    MNISTDataset,
    NDArrayDataset,
    RandomCrop,
    RandomFlipHorizontal,
    Transform,
    digits,
    fashion_mnist,
    idx,
    mnist,
    parse_mnist,
    read_idx,
    sample_rng,
    stream,
)
from needle.data import batch as batch_module
from needle.init import random as init_random

MNIST_FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist"
real_mnist = pytest.mark.skipif(
    not MNIST_FOLDER.is_dir(), reason=f"the real MNIST is not at {MNIST_FOLDER}"
)
files = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
few = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def no_leaks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test ends with the threads and processes that it began with, and with NumPy's draws."""
    monkeypatch.setattr(init_random.Source, "generator", None)
    np.random.seed(0)
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
    assert living_workers() == 0


def numpys_state() -> tuple[bytes, int]:
    """Where NumPy's global generator stands."""
    _, key, position, *_ = np.random.get_state()
    return key.tobytes(), position


def living_workers() -> int:
    multiprocessing = sys.modules.get("multiprocessing")
    return len(multiprocessing.active_children()) if multiprocessing else 0


# What is read, by workers too


class Squares(Dataset):
    """Sample i is (i, i * i), read one by one."""

    def __init__(self, size: int = 23) -> None:
        super().__init__()
        self.size = size

    def __getitem__(self, index: int) -> Any:
        assert type(index) is int
        return np.float32(index), np.array([index * index], np.int64)

    def __len__(self) -> int:
        return self.size


class Noisy(Squares):
    """Sample i is (i, numbers that are drawn for it)."""

    def __getitem__(self, index: int) -> Any:
        return np.int64(index), sample_rng().rand(2), sample_rng().randint(0, 1000, size=3)


class Picky(Exception):
    def __init__(self, code: int, more: str) -> None:
        super().__init__(code, more)


class Faulty(Squares):
    """Sample 7 is bad in a way that the test chooses."""

    def __init__(self, error: str, pid: int = 0) -> None:
        super().__init__()
        self.error = error
        self.pid = pid

    def __getitem__(self, index: int) -> Any:
        if index == 7:
            self.fail()
        return super().__getitem__(index)

    def fail(self) -> None:
        if self.error == "exit":
            os._exit(3)
        if self.error == "interrupt":
            os.kill(self.pid, signal.SIGINT)
        if self.error == "value":
            raise ValueError("the pixel is sour")
        if self.error == "key":
            {}["no such"]  # noqa: B018
        if self.error == "local":
            raise type("Local", (ValueError,), {})("only here")
        if self.error == "picky":
            raise Picky(5, "apples")
        if self.error == "stop":
            raise StopIteration


def pair_up(samples: list[Any]) -> dict[str, Any]:
    return {"x": np.stack([x for x, _ in samples]), "names": [f"n{int(x)}" for x, _ in samples]}


def mix(samples: list[Any]) -> Any:
    """A collate_fn that draws numbers."""
    return np.stack([x for x, *_ in samples]), sample_rng().rand()


def as_arrays(batch: Any) -> tuple[np.ndarray, ...]:
    return tuple(field.numpy().copy() for field in batch)


def read_all(loader: Any) -> list[Any]:
    return [*map(as_arrays, loader)]


def assert_same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for left, right in zip(a, b, strict=True):
        assert len(left) == len(right)
        for x, y in zip(left, right, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)


# Files


def idx_bytes(array: np.ndarray) -> bytes:
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim)
    return head + b"".join(struct.pack(">I", size) for size in array.shape) + array.tobytes()


def write_pair(folder: Path, x: np.ndarray, y: np.ndarray) -> tuple[Path, Path]:
    images, labels = folder / "images.gz", folder / "labels.gz"
    images.write_bytes(gzip.compress(idx_bytes(x)))
    labels.write_bytes(gzip.compress(idx_bytes(y)))
    return images, labels


def some_images(n: int = 6, height: int = 4, width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 256, (n, height, width), dtype=np.uint8)
    return x, rng.integers(0, 10, n, dtype=np.uint8)


arrays = st.lists(st.integers(0, 5), min_size=1, max_size=4).flatmap(
    lambda shape: st.binary(min_size=int(np.prod(shape)), max_size=int(np.prod(shape))).map(
        lambda data: np.frombuffer(data, np.uint8).reshape(shape)
    )
)


@files
@given(array=arrays, gzipped=st.booleans())
def test_idx_round_trip(array: np.ndarray, gzipped: bool, tmp_path: Path) -> None:
    data = idx_bytes(array)
    path = tmp_path / "array"
    path.write_bytes(gzip.compress(data) if gzipped else data)
    found = read_idx(path, array.ndim)
    assert found.dtype == np.uint8
    assert found.shape == array.shape
    assert found.tobytes() == array.tobytes()


@settings(files, max_examples=300)
@given(data=st.data(), gzipped=st.booleans())
def test_idx_survives_any_damage(data: Any, gzipped: bool, tmp_path: Path) -> None:
    """Damaged bytes give the same array (a gzip header has room for it) or one clear error."""
    array = some_images()[0]
    whole = gzip.compress(idx_bytes(array), mtime=0) if gzipped else idx_bytes(array)
    broken = bytearray(whole)
    where = data.draw(st.integers(0, len(whole) - 1))
    how = data.draw(st.sampled_from(("flip", "cut", "insert", "double", "splice")))
    if how == "flip":
        broken[where] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del broken[where:]
    elif how == "insert":
        broken[where:where] = data.draw(st.binary(min_size=1, max_size=9))
    elif how == "double":
        broken += whole[where:]
    else:
        broken[where : where + 8] = data.draw(st.binary(min_size=8, max_size=8))
    path = tmp_path / "array"
    path.write_bytes(broken)
    found, error = try_to_read(path)
    if error is not None:
        assert str(error).startswith("read_idx: expected ")
        assert f" of {path}; received " in str(error)
        assert " at offset " in str(error)
        assert error.__suppress_context__ or error.__context__ is None
    else:
        assert how != "cut"
        assert found.shape == array.shape
        if gzipped:  # a plain file has no checksum of its pixels
            np.testing.assert_array_equal(found, array)


def try_to_read(path: Path) -> tuple[Any, ValueError | None]:
    try:
        return read_idx(path, 3), None
    except ValueError as error:
        return None, error


@pytest.mark.parametrize("gzipped", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda b: b"",
            "expected 4 more bytes of the IDX header at offset 0 of PATH; received the",
        ),
        (lambda b: b[:6], "expected 10 more bytes of the IDX header at offset 6 of PATH"),
        (lambda b: b + b"\0", "expected the end of the data at offset 88 of PATH; received trail"),
        (
            lambda b: b"\0\0\x08\x01" + b[4:],
            "the IDX magic 00000803 (unsigned bytes, 3 axes) at of",
        ),
        (lambda b: b"\0\0\x0d\x03" + b[4:], "at offset 0 of PATH; received 00000d03"),
        (lambda b: b"PNG!" + b[4:], "at offset 0 of PATH; received 504e4721"),
        (
            lambda b: b[:4] + b"\xff" * 12,
            "received (4294967295, 4294967295, 4294967295), which nee",
        ),
    ],
)
def test_idx_errors(change: Any, message: str, gzipped: bool, tmp_path: Path) -> None:
    data = change(idx_bytes(some_images()[0]))
    path = tmp_path / "array"
    path.write_bytes(gzip.compress(data) if gzipped else data)
    with pytest.raises(ValueError, match="read_idx") as caught:
        read_idx(path, 3)
    assert message.replace("PATH", str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "array"
    data = idx_bytes(some_images()[0])
    path.write_bytes(data[:50])
    refuse(path, "at offset 4 of .* which needs 72: the file is truncated or its header forged$")
    path.write_bytes(gzip.compress(data[:50]))
    refuse(path, "expected 38 more bytes of data at offset 50 of .* the file is truncated$")
    path.write_bytes(gzip.compress(data)[:-12])
    refuse(path, "expected whole gzip data at offset .*; received truncated or damaged: Compressed")


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most memory that Python and NumPy held while working."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuse(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_idx(path, 3)


def test_forged_sizes_allocate_nothing(tmp_path: Path) -> None:
    path = tmp_path / "forged.gz"
    for sizes in ((60000, 28, 28), (2**32 - 1,) * 3, (2**31, 1, 1)):
        path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, *sizes) + b"123"))
        assert peak_bytes(lambda: refuse(path, "forged.gz; received")) < 1 << 19


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    """64 MiB of zeros in 64 KiB, behind a header that claims 3 bytes."""
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 3, 1, 1) + bytes(1 << 26)))
    assert path.stat().st_size < 1 << 17
    assert peak_bytes(lambda: refuse(path, "the end of the data at offset 19")) < 1 << 19


def test_a_claim_that_could_be_true_is_read_bit_by_bit(tmp_path: Path) -> None:
    """40 MB claimed, which 64 KiB of gzip could hold, but they hold noise."""
    path = tmp_path / "claim.gz"
    noise = np.random.default_rng(0).bytes(1 << 16)
    path.write_bytes(gzip.compress(struct.pack(">BBBB3I", 0, 0, 8, 3, 40_000_000, 1, 1) + noise))
    assert peak_bytes(lambda: refuse(path, "the file is truncated")) < 1 << 22


def test_a_limit_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "array"
    path.write_bytes(idx_bytes(some_images()[0]))
    monkeypatch.setattr(idx, "LIMIT", 71)
    refuse(path, "expected sizes for at most 71 bytes of data at offset 4")
    monkeypatch.setattr(idx, "LIMIT", 72)
    assert read_idx(path, 3).size == 72


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"^parse_mnist: expected an IDX file at .*nowhere; rec"
    ):
        parse_mnist(tmp_path / "nowhere", tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"^MNISTDataset: expected an IDX file .*directory"):
        MNISTDataset(tmp_path, tmp_path)


def test_images_and_labels_must_count_alike(tmp_path: Path) -> None:
    x, y = some_images()
    images, labels = write_pair(tmp_path, x, y[:-1])
    with pytest.raises(ValueError, match="one label per image; received 6 images .* 5 labels in"):
        MNISTDataset(images, labels)
    with pytest.raises(ValueError, match="the IDX magic 00000803 .* received 00000801"):
        parse_mnist(labels, images)


def test_parse_mnist(tmp_path: Path) -> None:
    x, y = some_images()
    found, labels = parse_mnist(*map(str, write_pair(tmp_path, x, y)))
    assert found.dtype == np.float32
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(found, x.reshape(6, 12).astype(np.float32) / 255)
    np.testing.assert_array_equal(labels, y)
    empty, none = parse_mnist(*write_pair(tmp_path, x[:0], y[:0]))
    assert empty.shape == (0, 12)
    assert len(none) == 0


@real_mnist
def test_real_mnist_gives_the_courses_numbers() -> None:
    train = MNIST_FOLDER / "train-images-idx3-ubyte.gz", MNIST_FOLDER / "train-labels-idx1-ubyte.gz"
    x, y = parse_mnist(*train)
    assert x.shape == (60000, 784)
    np.testing.assert_allclose(np.linalg.norm(x[:10]), 27.892084)
    np.testing.assert_allclose(np.linalg.norm(x[:1000]), 293.0717, rtol=1e-6)
    assert y[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    places = [1, 42, 1000, 2000, 3000, 4000, 5000, 5005]
    plain = mnist(MNIST_FOLDER)
    assert len(plain) == 60000
    norms = [10.188792, 6.261355, 8.966858, 9.4346485, 9.086626, 9.214664, 10.208544, 10.649756]
    np.testing.assert_allclose([np.linalg.norm(plain[i][0]) for i in places], norms, rtol=1e-6)
    assert [int(plain[i][1]) for i in places] == [0, 7, 0, 5, 9, 7, 7, 8]
    moved = MNISTDataset(*train, transforms=[RandomCrop(28), RandomFlipHorizontal()])
    np.random.seed(0)
    norms = [2.0228338, 0.0, 7.4892044, 0.0, 0.0, 3.8012788, 9.583429, 4.2152724]
    np.testing.assert_allclose([np.linalg.norm(moved[i][0]) for i in places], norms, rtol=1e-6)
    assert len(mnist(MNIST_FOLDER, train=False)) == 10000


# Fetching


def test_a_folder_gzipped_or_plain(tmp_path: Path) -> None:
    x, y = some_images()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(x)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx_bytes(y))
    for load in (mnist, fashion_mnist):
        data = load(tmp_path, transforms=[np.negative])
        np.testing.assert_array_equal(data[2][0], -(x[2, ..., None].astype(np.float32) / 255))
    with pytest.raises(FileNotFoundError, match="expected t10k-images-idx3-ubyte.gz in"):
        mnist(tmp_path, train=False)
    with pytest.raises(FileNotFoundError, match="received a path that is no folder"):
        fashion_mnist(tmp_path / "none")


def fake_pooch(retrieve: Callable[..., str], folder: Path) -> types.ModuleType:
    module = types.ModuleType("pooch")
    module.retrieve = retrieve  # type: ignore[attr-defined]
    module.os_cache = lambda name: folder / name  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize(
    ("load", "train", "url", "sha256"),
    [
        (mnist, True, "https://ossci-datasets.s3.amazonaws.com/mnist/train", "440fcabf"),
        (mnist, False, "https://ossci-datasets.s3.amazonaws.com/mnist/t10k", "8d422c7b"),
        (fashion_mnist, True, "https://raw.githubusercontent.com/zalandoresearch/f", "3aede38d"),
        (fashion_mnist, False, "https://raw.githubusercontent.com/zalandoresearch/f", "346e55b9"),
    ],
)
def test_fetching(
    load: Any, train: bool, url: str, sha256: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = some_images()
    asked = []

    def retrieve(address: str, known_hash: str, fname: str, path: Path) -> str:
        asked.append((address, known_hash, path))
        file = tmp_path / fname
        file.write_bytes(gzip.compress(idx_bytes(x if "images" in fname else y)))
        return str(file)

    monkeypatch.setitem(sys.modules, "pooch", fake_pooch(retrieve, tmp_path))
    assert len(load(train=train)) == 6
    assert len(asked) == 2
    assert asked[0][0].startswith(url)
    assert asked[0][1].startswith(f"sha256:{sha256}")
    assert all(len(known) == len("sha256:") + 64 for _, known, _ in asked)
    assert asked[0][2] == tmp_path / "needle-dl" / load.__name__


def test_fetching_fails_clearly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def retrieve(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setitem(sys.modules, "pooch", fake_pooch(retrieve, tmp_path))
    with pytest.raises(OSError, match="mnist: expected to fetch https.*no route.*pass folder="):
        mnist()
    monkeypatch.setitem(sys.modules, "pooch", None)
    with pytest.raises(ImportError, match=r"pip install needle-dl\[data\], or pass folder"):
        fashion_mnist()


# The embedded digits


def test_digits() -> None:
    train, test = digits(), digits(train=False)
    assert (len(train), len(test)) == (1437, 360)
    for data in (train, test):
        images, labels = data[:]
        assert images.shape == (len(data), 8, 8, 1)
        assert images.dtype == np.float32
        assert (images.min(), images.max()) == (0, 1)
        assert set(np.unique(images * 16)) == set(range(17))
        assert set(labels.tolist()) == set(range(10))
    share = np.bincount(test.labels) / (np.bincount(train.labels) + np.bincount(test.labels))
    assert abs(share - 0.2).max() < 0.005
    assert isinstance(DigitsDataset(transforms=[RandomFlipHorizontal()])[0][0], np.ndarray)


def test_digits_are_what_their_page_says() -> None:
    folder = Path(ndl.data.__file__).parent
    page = (folder / "DIGITS.md").read_text()
    for name in ("digits-images-idx3-ubyte.gz", "digits-labels-idx1-ubyte.gz"):
        assert hashlib.sha256(gzip.decompress((folder / name).read_bytes())).hexdigest() in page
    assert "CC BY 4.0" in page


def test_digits_are_scikit_learns(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn is not installed")
    x, y = datasets.load_digits(return_X_y=True)
    theirs = sorted((*image.astype(int), int(label)) for image, label in zip(x, y, strict=True))
    mine = [digits(train)[:] for train in (True, False)]
    mine = [(*(16 * x[i].ravel()).astype(int), int(y[i])) for x, y in mine for i in range(len(y))]
    assert sorted(mine) == theirs
    program = (Path(ndl.data.__file__).parent / "DIGITS.md").read_text()
    program = program.split("```python\n")[1].split("```")[0]
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)
    for path in tmp_path.iterdir():
        kept = Path(ndl.data.__file__).parent / path.name
        assert gzip.decompress(kept.read_bytes()) == gzip.decompress(path.read_bytes())


# Datasets and transforms


def test_dataset_is_abstract() -> None:
    with pytest.raises(NotImplementedError, match="Dataset: write __getitem__"):
        Dataset()[0]
    with pytest.raises(NotImplementedError, match="Dataset: write __len__"):
        len(Dataset())
    with pytest.raises(NotImplementedError, match="Transform: write __call__"):
        Transform()(np.zeros(1))
    with pytest.raises(TypeError, match="Dataset: expected transforms as a list of callables"):
        Dataset(RandomCrop())  # type: ignore[arg-type]
    assert Dataset([np.negative, np.abs]).apply_transforms(-3) == 3


def test_ndarray_dataset() -> None:
    a, b = np.arange(12).reshape(6, 2), np.arange(6.0)
    data = NDArrayDataset(a, b)
    assert len(data) == 6
    assert data[-1][0].tolist() == [10, 11]
    assert data[1:3][1].tolist() == [1, 2]
    assert data[np.array([4, 0])][0].tolist() == [[8, 9], [0, 1]]
    assert sum(1 for _ in data) == 6  # iteration ends by IndexError
    for bad in (6, -7, np.array([2, 6]), "x", 1.5):
        with pytest.raises(IndexError, match="NDArrayDataset: expected indices from -6 to 5"):
            data[bad]
    assert NDArrayDataset(ndl.Tensor([1, 2]))[1][0] == 2


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ((np.zeros(3), np.zeros((4, 2))), r"received shapes \[\(3,\), \(4, 2\)\]"),
        ((), r"received shapes \[\]"),
        ((np.float32(1), np.zeros(3)), r"received shapes \[\(\), \(3,\)\]"),
    ],
)
def test_ndarray_dataset_errors(arrays: Any, message: str) -> None:
    with pytest.raises(
        ValueError, match=f"NDArrayDataset: expected arrays of one length; {message}"
    ):
        NDArrayDataset(*arrays)


def test_image_dataset(tmp_path: Path) -> None:
    x, y = some_images()
    data = MNISTDataset(*write_pair(tmp_path, x, y))
    expected = x[..., None].astype(np.float32) / np.float32(255)
    for index in (2, -1, np.int64(3), slice(1, 4), slice(2, 3), slice(0, 0), np.array([5, 0])):
        image, label = data[index]
        assert image.dtype == np.float32
        np.testing.assert_array_equal(image, expected[index])
        np.testing.assert_array_equal(label, y[index])
    with pytest.raises(IndexError, match="MNISTDataset: expected indices from -6 to 5; received 6"):
        data[6]
    data[0][0][:] = 7  # a sample is a copy
    np.testing.assert_array_equal(data[0][0], expected[0])
    data.transforms = [np.negative, lambda image: image[:2]]
    np.testing.assert_array_equal(data[1:3][0], -expected[1:3, :2])
    np.testing.assert_array_equal(data[4][0], -expected[4, :2])
    assert data[0:0][0].shape == (0, 4, 3, 1)
    with pytest.raises(ValueError, match=r"ImageDataset: expected images \(n, H, W, C\) and lab"):
        ImageDataset(x, y)
    with pytest.raises(ValueError, match=r"received shapes \(6, 4, 3, 1\) and \(5,\)"):
        ImageDataset(x[..., None], y[:5])


@few
@given(
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    channels=st.integers(1, 3),
    padding=st.integers(0, 8),
    seed=st.integers(0, 1000),
)
def test_random_crop(height: int, width: int, channels: int, padding: int, seed: int) -> None:
    image = np.random.default_rng(seed).random((height, width, channels), np.float32)
    np.random.seed(seed)
    dx, dy = np.random.randint(low=-padding, high=padding + 1, size=2)
    expected = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            if 0 <= i + dx < height and 0 <= j + dy < width:
                expected[i, j] = image[i + dx, j + dy]
    np.random.seed(seed)
    found = RandomCrop(padding)(image)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_random_flip() -> None:
    image = np.random.default_rng(0).random((4, 5, 2))
    draws = [np.random.rand() < 0.3 for _ in range(50)]
    np.random.seed(0)
    flip = RandomFlipHorizontal(0.3)
    for flipped in draws:
        np.testing.assert_array_equal(flip(image), image[:, ::-1] if flipped else image)
    assert 5 < sum(draws) < 25


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomFlipHorizontal(1.5), r"RandomFlipHorizontal: expected a p in \[0, 1\]"),
        (lambda: RandomFlipHorizontal(float("nan")), "received nan"),
        (lambda: RandomCrop(-1), "RandomCrop: expected a padding of 0 or more pixels; received -1"),
        (lambda: RandomCrop()(np.zeros(784)), r"expected an image .* received \(784,\)"),
        (lambda: RandomFlipHorizontal(1)(np.zeros((2, 2))), r"received \(2, 2\)"),
    ],
)
def test_transform_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_sample_streams_are_independent() -> None:
    """Neighbouring indices, epochs and seeds share nothing, and nested streams leave the outer."""
    draws = []
    for seed in range(4):
        for epoch in range(4):
            for index in range(8):
                with stream.open_stream(stream.stream_of(seed, epoch), index):
                    draws.append(sample_rng().rand(8))
    values = np.array(draws)
    assert len(np.unique(values)) == values.size
    assert np.abs(np.corrcoef(values.T) - np.eye(8)).max() < 0.35
    with stream.open_stream(1, 1):
        first = sample_rng().rand(3)
        with stream.open_stream(1, 2):
            other = sample_rng().rand(3)
        second = sample_rng().rand(3)
    with stream.open_stream(1, 2):
        with stream.open_stream(None, 9):  # changes nothing
            np.testing.assert_array_equal(sample_rng().rand(1), other[:1])
        np.testing.assert_array_equal(sample_rng().rand(2), other[1:])
    with stream.open_stream(1, 1):
        np.testing.assert_array_equal(sample_rng().rand(6), np.concatenate([first, second]))
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    assert sample_rng().rand() == expected


# The loader


@few
@given(
    size=st.integers(1, 30),
    batch_size=st.integers(1, 35),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.none() | st.integers(0, 2**70),
    whole=st.booleans(),
)
def test_an_epoch_is_a_partition(
    size: int, batch_size: int, shuffle: bool, drop_last: bool, seed: int | None, whole: bool
) -> None:
    values = np.arange(size)
    data = NDArrayDataset(values, 2 * values) if whole else [(i, 2 * i) for i in range(size)]
    if drop_last and size < batch_size:
        with pytest.raises(ValueError, match=f"at least {batch_size} samples.*received {size}"):
            DataLoader(data, batch_size, drop_last=True)
        return
    loader = DataLoader(data, batch_size, shuffle, drop_last=drop_last, seed=seed)
    for _ in range(2):
        batches = read_all(loader)
        assert (
            len(batches)
            == len(loader)
            == (size // batch_size if drop_last else -(-size // batch_size))
        )
        assert all(len(x) == batch_size for x, _ in batches[:-1])
        seen = np.concatenate([x for x, _ in batches])
        np.testing.assert_array_equal(np.concatenate([y for _, y in batches]), 2 * seen)
        assert len(set(seen.tolist())) == len(seen)
        if not drop_last:
            assert sorted(seen.tolist()) == values.tolist()
        if not shuffle:
            np.testing.assert_array_equal(seen, values[: len(seen)])


def test_the_courses_order() -> None:
    """np.random.shuffle at each `iter`, in the caller's thread, whatever the workers."""
    for options in ({}, {"num_workers": 2}):
        np.random.seed(0)
        loader = DataLoader(NDArrayDataset(np.arange(100)), 1, shuffle=True, **options)
        elements = [int(x.numpy()[0]) for (x,) in loader]
        assert elements[:10] == [26, 86, 2, 55, 75, 93, 16, 73, 54, 95]
        order = np.arange(100)
        np.random.seed(0)
        np.random.shuffle(order)
        assert elements == order.tolist()
        order = np.arange(100)
        np.random.shuffle(order)
        after = numpys_state()
        np.random.seed(0)
        np.random.shuffle(np.arange(100))
        iterator = iter(loader)
        assert numpys_state() == after
        assert [int(x.numpy()[0]) for (x,) in iterator] == order.tolist()


def test_seeded_order_is_numpys_generator() -> None:
    loader = DataLoader(NDArrayDataset(np.arange(20)), 20, shuffle=True, seed=7)
    before = numpys_state()
    for epoch in range(3):
        assert loader.epoch == epoch
        expected = np.random.default_rng((7, epoch)).permutation(20)
        np.testing.assert_array_equal(read_all(loader)[0][0], expected)
    assert numpys_state() == before


def test_batches_are_tensors_without_gradient() -> None:
    data = NDArrayDataset(np.ones((4, 3)), np.arange(4, dtype=np.uint8), np.ones(4, np.float32))
    (x, y, z), _ = list(DataLoader(data, 2, device=ndl.cpu_numpy()))
    assert all(isinstance(each, ndl.Tensor) and not each.requires_grad for each in (x, y, z))
    assert [str(each.dtype) for each in (x, y, z)] == ["float64", "uint8", "float32"]
    assert x.device == ndl.cpu_numpy()
    x.cached_data.numpy()[:] = 5  # a batch does not alias the data set
    assert data.arrays[0].max() == 1


def test_collating() -> None:
    (x,) = next(iter(DataLoader([1.5, 2.5], 2)))
    assert (x.dtype, x.numpy().tolist()) == (np.float32, [1.5, 2.5])
    x, y = next(iter(DataLoader([(1, True), [2, False]], 2)))
    assert (x.dtype, y.dtype) == (np.int64, np.bool_)
    (x,) = next(iter(DataLoader([ndl.Tensor([1.0, 2.0]), ndl.Tensor([3.0, 4.0])], 2)))
    assert x.numpy().tolist() == [[1, 2], [3, 4]]
    batch = next(iter(DataLoader(Squares(), 3, collate_fn=pair_up)))
    assert batch["x"].numpy().tolist() == [0, 1, 2]
    assert batch["names"] == ["n0", "n1", "n2"]
    assert not batch["x"].requires_grad
    (x,) = next(iter(DataLoader(NDArrayDataset(np.arange(4)), 2, collate_fn=np.ravel)))
    assert x.numpy().tolist() == [0, 1]


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([np.zeros(2), np.zeros(3)], ValueError, r"s 0, 1 of list: .* \(2,\) and \(3,\); pas"),
        ([(1, 2), (1,)], ValueError, r"expected one number of fields; received \[1, 2\]; pass"),
        (["a", "b"], TypeError, "expected numbers or arrays in field 0; received str; pass a coll"),
        ([{"x": 1}, {"x": 2}], TypeError, "received dict; pass a collate_fn"),
        ([(0, None)], TypeError, "in field 1; received NoneType"),
    ],
)
def test_collating_errors(data: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^DataLoader: sample.*{message}"):
        next(iter(DataLoader(data, 2)))


class Shifted(NDArrayDataset):
    """A subclass that reads one by one."""

    def __getitem__(self, index: Any) -> Any:
        assert isinstance(index, int)
        return super().__getitem__(index)[0] + 100


class Halved(ImageDataset):
    """A subclass that transforms in its own way."""

    def apply_transforms(self, x: Any) -> Any:
        return x / 2


def test_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set that takes indices is indexed once per batch, unless a subclass changes that."""
    x, y = some_images()
    asked = []
    getitem = ImageDataset.__getitem__

    @ndl.data.takes_indices
    def watched(self: Any, index: Any) -> Any:
        asked.append(index)
        return getitem(self, index)

    monkeypatch.setattr(ImageDataset, "__getitem__", watched)
    data = ImageDataset(x[..., None], y)
    plain = read_all(DataLoader(data, 4))
    assert asked == [slice(0, 4), slice(4, 6)]
    np.testing.assert_array_equal(plain[0][0], x[:4, ..., None].astype(np.float32))
    asked.clear()
    shuffled = read_all(DataLoader(data, 4, shuffle=True, seed=0))
    assert [len(index) for index in asked] == [4, 2]
    np.testing.assert_array_equal(shuffled[1][1], y[asked[1]])
    asked.clear()
    assert_same(plain, read_all(DataLoader(data, 4, collate_fn=batch_module.collate)))
    assert asked == [0, 1, 2, 3, 4, 5]
    assert read_all(DataLoader(Shifted(np.arange(3)), 2))[0][0].tolist() == [100, 101]
    halved = read_all(DataLoader(Halved(x[..., None], y), 4))
    np.testing.assert_array_equal(halved[0][0], plain[0][0] / 2)


class NoInit(Dataset):
    """As in the course: a data set that never calls Dataset.__init__."""

    def __init__(self) -> None:
        self.values = [3.0, 4.0]

    def __getitem__(self, index: int) -> Any:
        return self.apply_transforms(self.values[index])

    def __len__(self) -> int:
        return 2


def test_a_dataset_without_init() -> None:
    assert read_all(DataLoader(NoInit(), 2))[0][0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "expected a batch_size of at least 1; received 0"),
        ({"batch_size": -3}, ValueError, "expected a batch_size of at least 1; received -3"),
        ({"batch_size": 2.5}, TypeError, "expected an integer batch_size; received 2.5"),
        ({"batch_size": None}, TypeError, "expected an integer batch_size; received None"),
        ({"batch_size": True}, TypeError, "expected an integer batch_size; received True"),
        ({"num_workers": -1}, ValueError, "expected a num_workers of at least 0; received -1"),
        ({"prefetch": 0}, ValueError, "expected a prefetch of at least 1; received 0"),
        ({"seed": -1}, ValueError, "expected a seed of at least 0; received -1"),
        ({"seed": "x"}, TypeError, "expected an integer seed; received 'x'"),
        ({"worker": "fiber"}, ValueError, "expected worker='thread' or 'process'; received 'fib"),
        ({"collate_fn": 3}, TypeError, "expected a callable collate_fn; received 3"),
        ({"dataset": 5}, TypeError, "expected a dataset with __len__ and __getitem__; received in"),
        ({"dataset": []}, ValueError, "at least one sample; received an empty list"),
        ({"dataset": NDArrayDataset([])}, ValueError, "received an empty NDArrayDataset"),
        ({"batch_size": 24, "drop_last": True}, ValueError, "at least 24 samples, one whole batc"),
    ],
)
def test_loader_errors(options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^DataLoader: .*{message}"):
        DataLoader(**{"dataset": Squares(), **options})


def test_reprs() -> None:
    loader = DataLoader(Squares(), 4, shuffle=True)
    assert repr(loader) == (
        "DataLoader(Squares(23 samples), batch_size=4, shuffle=True, num_workers=0, seed=None): "
        "6 batches"
    )
    assert repr([RandomCrop(), RandomFlipHorizontal()]) == (
        "[RandomCrop(padding=3), RandomFlipHorizontal(p=0.5)]"
    )


# Workers


@pytest.mark.parametrize("collate_fn", [None, mix])
def test_threads_change_nothing(collate_fn: Any) -> None:
    def batches(num_workers: int, **options: Any) -> list[Any]:
        loader = DataLoader(
            Noisy(), 4, True, seed=5, num_workers=num_workers, collate_fn=collate_fn, **options
        )
        return [*read_all(loader), *read_all(loader)]

    expected = batches(0)
    assert len(np.unique(np.concatenate([batch[1].ravel() for batch in expected]))) >= 12
    for num_workers, prefetch in ((1, 1), (2, 2), (5, 3)):
        assert_same(batches(num_workers, prefetch=prefetch), expected)
    draws = np.concatenate([batch[1] for batch in read_all(DataLoader(Noisy(), 23, seed=6))])
    assert len(np.unique(draws)) == draws.size


def test_processes_change_nothing() -> None:
    for collate_fn in (None, mix):
        expected = read_all(DataLoader(Noisy(), 4, True, seed=5, collate_fn=collate_fn))
        loader = DataLoader(
            Noisy(), 4, True, seed=5, num_workers=2, worker="process", collate_fn=collate_fn
        )
        assert_same(read_all(loader), expected)
    train = digits(transforms=[RandomCrop(1), RandomFlipHorizontal()])
    loader = DataLoader(train, 400, True, seed=5, num_workers=2, worker="process")
    assert_same(read_all(loader), read_all(DataLoader(train, 400, True, seed=5)))


def test_workers_without_a_seed_follow_numpys_and_leave_it() -> None:
    """One stream per (epoch, index), decided by NumPy's state, the same for any workers."""

    def batches(num_workers: int, worker: str = "thread") -> list[Any]:
        np.random.seed(11)
        loader = DataLoader(Noisy(), 6, num_workers=num_workers, worker=worker)
        return read_all(loader)

    expected = batches(1)
    state = numpys_state()
    assert_same(batches(3), expected)
    assert_same(batches(2, "process"), expected)
    assert numpys_state() == state
    loader = DataLoader(Noisy(), 6, num_workers=1)
    first, second = read_all(loader), read_all(loader)
    assert_same(first, expected)
    assert not np.array_equal(second[0][1], first[0][1])  # though NumPy's state is the same
    np.random.seed(12)
    other = read_all(DataLoader(Noisy(), 6, num_workers=2))
    assert not np.array_equal(other[0][1], expected[0][1])


def test_without_seed_and_workers_transforms_draw_from_numpy() -> None:
    np.random.seed(4)
    expected = np.random.rand(2)
    np.random.seed(4)
    np.testing.assert_array_equal(read_all(DataLoader(Noisy(1)))[0][1][0], expected)


def test_ndl_seed_governs() -> None:
    def batches(**options: Any) -> list[Any]:
        ndl.seed(3)
        loader = DataLoader(Noisy(), 6, shuffle=True, **options)
        return [*read_all(loader), *read_all(loader)]

    before = numpys_state()
    expected = batches()
    assert_same(batches(num_workers=2), expected)
    assert not np.array_equal(expected[0][0], expected[4][0])
    assert numpys_state() == before


def test_prefetch_is_bounded() -> None:
    """With 2 workers and prefetch 2, nobody reads more than 4 batches ahead of the consumer."""
    lock, read = threading.Lock(), [0]

    class Counted(Squares):
        def __getitem__(self, index: int) -> Any:
            with lock:
                read[0] += 1
            return super().__getitem__(index)

    consumed = 0
    for _ in DataLoader(Counted(), 1, num_workers=2, prefetch=2):
        consumed += 1
        assert read[0] <= consumed + 4
    assert consumed == read[0] == 23


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 2, "worker": "process"}]
)
def test_a_failing_sample_is_named(options: Any) -> None:
    got = []
    with pytest.raises(ValueError, match="^DataLoader: sample 7 of Faulty: the pixel is sour") as e:
        got.extend(x.numpy().tolist() for x, _ in DataLoader(Faulty("value"), 3, **options))
    assert got == [[0, 1, 2], [3, 4, 5]]
    if options.get("worker") == "process":
        assert "in fail" in str(e.value.__cause__)  # the traceback in the worker
    else:
        assert isinstance(e.value.__cause__, ValueError)
    with pytest.raises(KeyError, match="sample 7 of Faulty: 'no such'"):
        list(DataLoader(Faulty("key"), 3, **options))
    with pytest.raises(RuntimeError, match=r"sample 7 of Faulty: \(5, 'apples'\) \(Picky\)"):
        list(DataLoader(Faulty("picky"), 3, **options))
    with pytest.raises(RuntimeError, match=r"sample 7 of Faulty:  \(StopIteration\)"):
        list(DataLoader(Faulty("stop"), 3, **options))


def test_many_samples_are_named_shortly() -> None:
    with pytest.raises(ValueError, match="samples 0, 1, 2, 3, 4, 5, 6, 7, ... of list: expected"):
        list(DataLoader([np.zeros(i) for i in range(20)], 20))

    class Broken(NDArrayDataset):
        @ndl.data.takes_indices
        def __getitem__(self, index: Any) -> Any:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="samples 0, 1 of Broken: the disk is gone"):
        list(DataLoader(Broken(np.zeros(4)), 2))


def test_a_dying_process_is_reported() -> None:
    loader = DataLoader(Faulty("exit"), 3, num_workers=2, worker="process")
    with pytest.raises(
        RuntimeError, match=r"samples \d+ to \d+ of Faulty; .* the end of a .*thread"
    ):
        list(loader)


@pytest.mark.parametrize("size", [10, 100_000])  # of these, a pipe holds the former only
def test_a_script_without_a_guard_is_told(size: int, tmp_path: Path) -> None:
    """A worker imports the script, which would start workers, and ends before it reads a batch."""
    script = tmp_path / "unguarded.py"
    script.write_text(UNGUARDED.format(here=str(Path(ndl.__file__).parents[1]), size=size))
    found = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert found.returncode == 1
    last = [line for line in found.stderr.splitlines() if line.startswith("RuntimeError")][-1]
    assert "a script must start its work under `if __name__ == '__main__':`" in last


UNGUARDED = """
import sys
sys.path.insert(0, {here!r})
from needle.data import DataLoader, NDArrayDataset
import numpy as np
list(DataLoader(NDArrayDataset(np.arange({size})), 9, num_workers=2, worker="process"))
"""


def test_an_error_that_does_not_pickle_arrives() -> None:
    loader = DataLoader(Faulty("local"), 3, num_workers=1, worker="process")
    with pytest.raises(RuntimeError, match=r"sample 7 of Faulty: only here \(Local\)"):
        list(loader)
    with pytest.raises(ValueError, match="sample 7 of Faulty: only here$"):
        list(DataLoader(Faulty("local"), 3, num_workers=1))


def test_what_does_not_pickle_is_refused() -> None:
    class Local(Squares):
        pass

    loader = DataLoader(Local(), 3, num_workers=1, worker="process")
    with pytest.raises(TypeError, match="expected a dataset and a collate_fn that pickle.*thread"):
        list(loader)


def test_a_worker_that_cannot_import_the_dataset_says_so() -> None:
    """The class is there when it is pickled, and not in the worker."""
    module = types.ModuleType("only_here")
    module.Ghost = type("Ghost", (Squares,), {"__module__": "only_here"})  # type: ignore[attr-defined]
    sys.modules["only_here"] = module
    try:
        loader = DataLoader(module.Ghost(), 3, num_workers=1, worker="process")
        with pytest.raises(TypeError, match="can import; received No module named 'only_here'"):
            list(loader)
    finally:
        del sys.modules["only_here"]


def test_spawn_where_there_is_no_forkserver(monkeypatch: pytest.MonkeyPatch) -> None:
    import multiprocessing

    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    loader = DataLoader(Squares(), 4, num_workers=1, worker="process")
    batches = iter(loader)
    next(batches)
    assert "Spawn" in type(multiprocessing.active_children()[0]).__name__
    assert_same([*map(as_arrays, batches)], read_all(DataLoader(Squares(), 4))[1:])


# Leaving early


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, also where the tests were started with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Gated(Squares):
    """Sample 0 is there; each other one is noted, and waits until the gate is opened.

    The gate is a FIFO, and the notes are a file: both are there for processes, too.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.gate, self.notes = folder / "gate", folder / "notes"
        os.mkfifo(self.gate)
        self.notes.touch()

    def __getitem__(self, index: int) -> Any:
        if index:
            with self.notes.open("a") as notes:
                notes.write(f"{index} ")
            os.close(os.open(self.gate, os.O_RDONLY))  # waits for the other end
        return np.float32(index)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")
@pytest.mark.parametrize("worker", ["thread", "process"])
def test_leaving_early_reads_no_more(
    worker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch that a worker is reading is waited for; those that nobody has begun are dropped."""
    data, join, opened = Gated(tmp_path), threading.Thread.join, []

    def open_and_join(thread: threading.Thread, timeout: float | None = None) -> None:
        opened.append(os.open(data.gate, os.O_RDWR))
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", open_and_join)
    for _ in DataLoader(data, 1, num_workers=1, prefetch=9, worker=worker):
        break
    assert data.notes.read_text() in ("", "1 ")  # none at all, or sample 1
    for end in opened:
        os.close(end)
    assert opened


def test_a_thread_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    start, refused = threading.Thread.start, threading.Event()

    class Waiting(Squares):
        def __getitem__(self, index: int) -> Any:
            refused.wait(60)
            return super().__getitem__(index)

    def refuse_second(thread: threading.Thread) -> None:
        if thread.name == "needle_1":
            refused.set()
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_second)
    before = threading.active_count()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        next(iter(DataLoader(Waiting(), 2, num_workers=3)))
    assert refused.is_set()
    assert threading.active_count() == before


def test_ctrl_c_is_the_consumers() -> None:
    """The terminal sends SIGINT to the workers too; they leave it to the consumer."""
    import multiprocessing

    iterator = iter(DataLoader(Squares(), 2, num_workers=1, worker="process", prefetch=1))
    next(iterator)  # the worker has begun
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGINT)
    assert [int(x[0]) for x, _ in read_all(iterator)] == list(range(2, 23, 2))


def odd(samples: list[Any]) -> Any:
    return np.zeros(3, np.uint16)


def test_a_batch_that_is_no_tensor_leaves_nothing() -> None:
    """The error is still held, with its traceback, when the workers must be gone."""
    before = threading.active_count()
    with pytest.raises(TypeError, match="uint16") as caught:
        list(DataLoader(Squares(), 2, num_workers=2, collate_fn=odd))
    assert threading.active_count() == before
    assert caught.value.__traceback__ is not None


@pytest.mark.parametrize("options", [{"num_workers": 3}, {"num_workers": 2, "worker": "process"}])
def test_leaving_early_leaves_nothing(options: Any) -> None:
    before = threading.active_count()
    open_files = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    loader = DataLoader(Squares(), 2, shuffle=True, seed=0, **options)
    for _ in range(2):
        for step, _ in enumerate(loader):
            assert threading.active_count() > before
            if step == 2:
                break
        assert threading.active_count() == before
        assert living_workers() == 0
    if open_files:  # the fork server keeps a few for itself
        assert len(os.listdir("/proc/self/fd")) <= open_files + 4
    iterator = iter(loader)
    next(iterator)
    del iterator
    assert threading.active_count() == before
    assert living_workers() == 0
    never_begun = iter(loader)
    assert threading.active_count() == before
    del never_begun


@pytest.mark.parametrize(
    "options", [{}, {"num_workers": 2}, {"num_workers": 2, "worker": "process"}]
)
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_the_loop_body(options: Any) -> None:
    before = threading.active_count()
    loader = DataLoader(Squares(), 2, seed=0, **options)
    seen = 0

    def train() -> None:
        nonlocal seen
        for _ in loader:
            seen += 1
            if seen == 3:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert threading.active_count() == before
    assert living_workers() == 0
    state = loader.state_dict()
    assert state["position"] == 3
    resumed = DataLoader(Squares(), 2, seed=0)
    resumed.load_state_dict(state)
    assert read_all(resumed)[0][0].tolist() == [6, 7]


@pytest.mark.parametrize("worker", ["thread", "process"])
@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_waiting_for_a_worker(worker: str) -> None:
    """A worker sends the signal when it reads sample 7, while the consumer waits for it."""
    before = set(threading.enumerate())
    data = Faulty("interrupt", os.getpid())

    def train() -> None:
        for _ in DataLoader(data, 8, num_workers=1, worker=worker):
            threading.Event().wait(20)  # the signal may arrive just after the batch

    with pytest.raises(KeyboardInterrupt):
        train()
    for thread in set(threading.enumerate()) - before:  # the signal may arrive while one starts
        thread.join(60)
        assert not thread.is_alive()
    assert living_workers() == 0


KILLED = """
import os, sys
sys.path.insert(0, {here!r})
from needle.data import DataLoader, NDArrayDataset
import numpy as np
if __name__ == "__main__":
    import multiprocessing
    loader = DataLoader(NDArrayDataset(np.arange(100)), 1, num_workers=2, worker="process")
    iterator = iter(loader)
    next(iterator)
    assert multiprocessing.active_children()
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), 9)
    if sys.argv[1] == "raise":
        raise SystemExit(4)
"""


@pytest.mark.parametrize(("end", "code"), [("kill", -9), ("raise", 4), ("return", 0)])
def test_processes_end_with_their_consumer(end: str, code: int, tmp_path: Path) -> None:
    """stdout ends when the last process that holds it does: consumer, fork server and workers."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(here=str(Path(ndl.__file__).parents[1])))
    with subprocess.Popen(
        [sys.executable, str(script), end], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == code, err.decode()
    assert out == b""
    assert b"Traceback" not in err


# Resuming


@few
@given(
    size=st.integers(2, 25),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    seed=st.none() | st.integers(0, 99),
    threads=st.integers(0, 2),
    epoch=st.integers(0, 2),
    data=st.data(),
)
def test_resuming_equals_going_on(
    size: int, batch_size: int, shuffle: bool, seed: int | None, threads: int, epoch: int, data: Any
) -> None:
    def make(num_workers: int) -> DataLoader:
        return DataLoader(Noisy(size), batch_size, shuffle, seed=seed, num_workers=num_workers)

    np.random.seed(size)
    loader = make(threads)
    position = data.draw(st.integers(0, len(loader)))
    for _ in range(epoch):
        read_all(loader)
    iterator = iter(loader)
    for _ in range(position):
        next(iterator)
    np.random.rand()  # whatever else the user draws
    state, numpys = json.loads(json.dumps(loader.state_dict())), np.random.get_state()
    assert (state["epoch"], state["position"]) == (epoch, position)
    expected = read_all(iterator)
    for _ in range(2):
        expected += read_all(loader)

    np.random.seed(999)
    resumed = make(threads)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    np.random.set_state(numpys)
    found = [batch for _ in range(3) for batch in read_all(resumed)]
    assert_same(found, expected)
    assert resumed.epoch == loader.epoch == epoch + 3
    if seed is not None:
        other = make(2 - threads)  # the workers may change
        other.load_state_dict(state)
        assert_same([batch for _ in range(3) for batch in read_all(other)], expected)


def test_resuming_with_workers_leaves_numpys_state() -> None:
    loader = DataLoader(Noisy(), 4, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    rest = [batch[0] for batch in read_all(iterator)]
    for worker in ("thread", "process"):
        resumed = DataLoader(Noisy(), 4, shuffle=True, num_workers=2, worker=worker)
        loader = DataLoader(Noisy(), 4, shuffle=True)
        np.random.seed(0)
        next(iter(loader))
        resumed.load_state_dict(loader.state_dict())
        before = numpys_state()
        np.testing.assert_equal([batch[0] for batch in read_all(resumed)], rest)
        assert numpys_state() == before


def test_what_workers_read_ahead_does_not_count() -> None:
    for worker in ("thread", "process"):
        loader = DataLoader(Squares(), 2, seed=1, num_workers=2, prefetch=3, worker=worker)
        iterator = iter(loader)
        next(iterator)
        next(iterator)
        assert loader.state_dict()["position"] == 2
        iterator.close()  # type: ignore[attr-defined]


def test_a_state_between_epochs() -> None:
    loader = DataLoader(Squares(), 5, shuffle=True, seed=2)
    start = loader.state_dict()
    assert (start["epoch"], start["position"]) == (0, 0)
    read_all(loader)
    state = loader.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)
    second = read_all(loader)
    loader.load_state_dict(state)
    assert_same(read_all(loader), second)
    loader.load_state_dict(start)
    assert loader.epoch == 0
    first = read_all(loader)
    assert not np.array_equal(first[0][0], second[0][0])


def test_leaving_an_epoch_and_beginning_the_next() -> None:
    loader = DataLoader(Squares(), 5, shuffle=True, seed=2)
    for _ in loader:
        break
    assert loader.state_dict()["position"] == 1
    iter(loader)
    assert loader.epoch == 1
    left, right = iter(loader), iter(loader)  # two epochs at once don't disturb one another
    assert loader.epoch == 3
    assert len(list(zip(left, right, strict=True))) == 5
    assert loader.epoch == 4
    left, right = iter(loader), iter(loader)
    assert len(list(left)) == 5
    assert loader.epoch == 5  # the latest one's
    assert len(list(right)) == 5
    assert loader.epoch == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"samples": 24}, ValueError, "expected samples=23; received samples=24"),
        ({"batch_size": 5}, ValueError, "expected batch_size=4; received batch_size=5"),
        ({"shuffle": False}, ValueError, "expected shuffle=True; received shuffle=False"),
        ({"seed": 1}, ValueError, "expected seed=None; received seed=1"),
        ({"drop_last": True}, ValueError, "expected drop_last=False"),
        ({"position": 7}, ValueError, "expected a position up to 6; received 7"),
        ({"position": -1}, ValueError, "expected a position of at least 0; received -1"),
        ({"epoch": 1.5}, TypeError, "expected an integer epoch; received 1.5"),
        ({"order": [0] * 23}, ValueError, "an order with each of 23 samples once"),
        ({"order": list(range(22))}, ValueError, "an order with each of 23 samples once"),
        ({"order": "abc"}, ValueError, "an order with each of 23 samples once"),
        ({"order": None}, ValueError, "expected the order of an epoch; received none"),
        ({"stream": "x"}, TypeError, "expected an integer stream; received 'x'"),
        ({"more": 1}, ValueError, "expected a state with .*'stream'"),
    ],
)
def test_state_errors(change: Any, error: type[Exception], message: str) -> None:
    loader = DataLoader(Squares(), 4, shuffle=True)
    iterator = iter(loader)
    next(iterator)
    state = loader.state_dict()
    other = DataLoader(Squares(), 4, shuffle=True)
    before = other.state_dict()
    with pytest.raises(error, match=f"^load_state_dict: .*{message}"):
        other.load_state_dict({**state, **change})
    with pytest.raises(
        ValueError, match="load_state_dict: expected a state with .* received NoneT"
    ):
        other.load_state_dict(None)  # type: ignore[arg-type]
    assert other.state_dict() == before
    other.load_state_dict(state)
    assert_same(read_all(other), read_all(iterator))


# Cost


def test_importing_is_cheap() -> None:
    """What costs milliseconds is imported when it is needed."""
    heavy = {"gzip", "pooch", "multiprocessing", "concurrent.futures", "numpy.random", "sklearn"}
    program = (
        "import numpy, sys; before = set(sys.modules); import needle.data; "
        f"print(sorted({heavy} & set(sys.modules) - before))"
    )
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert found.stdout.strip() == "[]"
