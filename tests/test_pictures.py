"""Folders of pictures, CIFAR's archives, and transforms, beside Pillow and plain loops."""

from __future__ import annotations

import colorsys
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import needle as ndl
from needle import nn
from needle.data import (
    CenterCrop,
    CIFAR10Dataset,
    CIFAR100Dataset,
    ColorJitter,
    Cutout,
    DataLoader,
    ImageFolder,
    Mixup,
    NDArrayDataset,
    Normalize,
    RandomFlipHorizontal,
    Resize,
)
from needle.data.transforms import turn_hue
from needle.files import FileError

PIL = pytest.importorskip("PIL.Image", reason="Pillow, of the extra data, reads pictures")
RNG = np.random.default_rng(0)


# CIFAR


def cifar_bytes(count: int, labels: int, highest: int = 9) -> tuple[np.ndarray, np.ndarray, bytes]:
    """Images (n, 3, 32, 32), labels (n,), and the records of the binary version."""
    images = RNG.integers(0, 256, (count, 3, 32, 32), np.uint8)
    y = RNG.integers(0, highest + 1, (count, labels)).astype(np.uint8)
    rows = [np.concatenate([y[i], images[i].ravel()]) for i in range(count)]
    return images, y[:, -1], b"".join(row.tobytes() for row in rows)


def old_pickle(key: bytes, labels: bytes, pixels: bytes, more: bytes = b"") -> bytes:
    """What Python 2 and NumPy wrote, by hand: protocol 2, an ndarray of bytes by __setstate__."""

    def text(value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value
        return b"T" + struct.pack("<i", len(value)) + value

    count = len(labels)
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03K\x00\x85q\x04"
    array += text(b"b") + b"\x87Rq\x05(K\x01M" + struct.pack("<H", count) + b"M\x00\x0c\x86q\x06"
    array += b"cnumpy\ndtype\nq\x07" + text(b"u1") + b"K\x00K\x01\x87Rq\x08(K\x03" + text(b"|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + text(pixels) + b"tb"
    numbers = b"]q\x09(" + b"".join(bytes([0x4B, each]) for each in labels) + b"e"
    names = b"](" + b"".join(text(b"x_%d.png" % i) for i in range(count)) + b"e"
    items = text(b"data") + array + text(key) + numbers + more
    items += text(b"batch_label") + text(b"training batch 1 of 5") + text(b"filenames") + names
    return b"\x80\x02}q\x01(" + items + b"u."


def write_cifar10(folder: Path, binary: bool) -> tuple[np.ndarray, np.ndarray]:
    """All files of an archive's folder; the images and labels to train with."""
    parts = []
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        images, labels, records = cifar_bytes(3, 1)
        content = records if binary else old_pickle(b"labels", labels.tobytes(), images.tobytes())
        (folder / (f"{name}.bin" if binary else name)).write_bytes(content)
        parts.append((images, labels))
    x, y = zip(*parts[:5], strict=True)
    return np.concatenate(x), np.concatenate(y)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_cifar10(tmp_path: Path, binary: bool, within: bool) -> None:
    folder = tmp_path / f"cifar-10-batches-{'bin' if binary else 'py'}"
    folder.mkdir()
    images, labels = write_cifar10(folder, binary)
    train = CIFAR10Dataset(str(folder if within else tmp_path), train=True)
    assert (len(train), len(CIFAR10Dataset(folder, False))) == (15, 3)
    x, y = train[4]
    assert x.shape == (3, 32, 32)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, images[4] / np.float32(255))
    assert y == labels[4]
    np.testing.assert_array_equal(train.X, images / np.float32(255))
    np.testing.assert_array_equal(train.y, labels)
    batch, _ = next(iter(DataLoader(train, 5)))
    np.testing.assert_array_equal(batch.numpy(), train.X[:5])
    flipped = CIFAR10Dataset(folder, True, p=0.5, transforms=[RandomFlipHorizontal(1.0)])
    np.testing.assert_array_equal(flipped[4][0], x[:, :, ::-1])
    np.testing.assert_array_equal(flipped[3:5][0][1], x[:, :, ::-1])


def test_the_old_pickle_is_one_that_python_would_read() -> None:
    """As far as without NumPy's old names: the opcodes end where the file does."""
    import pickletools

    content = old_pickle(b"labels", b"\x01\x02", bytes(6144))
    assert [each[0].name for each in pickletools.genops(content)][-1] == "STOP"


def test_cifar100_has_fine_labels(tmp_path: Path) -> None:
    images, labels, records = cifar_bytes(4, 2, 99)
    (tmp_path / "train.bin").write_bytes(records)
    found = CIFAR100Dataset(tmp_path)
    np.testing.assert_array_equal(found.y, labels)
    np.testing.assert_array_equal(found.X, images / np.float32(255))
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    coarse = b"U\x0dcoarse_labels](" + b"K\x07" * 4 + b"e"
    pickled = old_pickle(b"fine_labels", labels.tobytes(), images.tobytes(), coarse)
    (folder / "test").write_bytes(pickled)
    np.testing.assert_array_equal(CIFAR100Dataset(tmp_path, train=False).y, labels)


BAD_CIFAR: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "empty": ("bin", lambda b: b"", "expected whole records of 3073 bytes; received .* 0 bytes"),
    "truncated": ("bin", lambda b: b[:-1], "expected whole records of 3073 bytes; .* 9218 bytes"),
    "a label too high": ("bin", lambda b: b"\x0a" + b[1:], "a label of 10; there are 10 classes"),
    "a pickle, truncated": ("py", lambda b: b[:-400], "a batch of CIFAR's python version .*-bin"),
    "a pickle of another kind": ("py", lambda b: b"\x80\x02}q\x01.", "images of 0 bytes"),
    "no pickle": ("py", lambda b: b"hello", "a batch of CIFAR's python version"),
    "a command": ("py", lambda b: b"cposix\nsystem\n(S'false'\ntR.", "images of 5 bytes"),
    "labels missing": ("py", lambda b: b.replace(b"K\x05", b"", 1), "images and 2 labels"),
}


@pytest.mark.parametrize("kind", BAD_CIFAR)
def test_bad_cifar_is_refused(tmp_path: Path, kind: str) -> None:
    version, damage, message = BAD_CIFAR[kind]
    write_cifar10(tmp_path, version == "bin")
    file = tmp_path / ("test_batch.bin" if version == "bin" else "test_batch")
    images, _, records = cifar_bytes(3, 1)
    whole = records if version == "bin" else old_pickle(b"labels", b"\5\5\5", images.tobytes())
    file.write_bytes(damage(whole))
    with pytest.raises(FileError, match=f"test_batch.*{message}") as caught:
        CIFAR10Dataset(tmp_path, train=False)
    assert "\n" not in str(caught.value)


def test_cifar_that_is_missing(tmp_path: Path) -> None:
    message = r"CIFAR10Dataset: expected data_batch_1\.bin of cifar-10-batches-bin in .*folder with"
    with pytest.raises(FileNotFoundError, match=message):
        CIFAR10Dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="received a path that is no folder"):
        CIFAR100Dataset(tmp_path / "none")


# Folders of pictures


def draw(path: Path, mode: str, size: tuple[int, int], colour: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.new(mode, size, colour).save(path)


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    draw(tmp_path / "dog" / "b.png", "RGB", (4, 3), (255, 0, 51))
    draw(tmp_path / "cat" / "deep" / "c.bmp", "L", (4, 3), 102)
    draw(tmp_path / "cat" / "a.png", "RGBA", (4, 3), (0, 255, 0, 9))
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README").touch()
    return tmp_path


def test_a_folder_of_pictures(animals: Path) -> None:
    data = ImageFolder(animals)
    assert data.classes == ["cat", "dog"]
    assert [(path.name, label) for path, label in data.samples] == [
        ("a.png", 0), ("c.bmp", 0), ("b.png", 1),
    ]  # fmt: skip
    x, y = next(iter(DataLoader(data, 3)))
    assert x.shape == (3, 3, 4, 3)
    assert y.numpy().tolist() == [0, 0, 1]
    np.testing.assert_allclose(x.numpy()[:, 0, 0], [[0, 1, 0], [0.4] * 3, [1, 0, 0.2]], rtol=1e-6)
    turned = ImageFolder(animals, transforms=[lambda image: image.transpose(2, 0, 1)])
    assert turned[2][0].shape == (3, 3, 4)
    with pytest.raises(IndexError, match="ImageFolder: expected indices from -3 to 2; received 3"):
        data[3]


def test_pictures_of_mixed_sizes(animals: Path) -> None:
    draw(animals / "dog" / "wide.png", "I;16", (9, 3), 65535)
    with pytest.raises(FileError, match=r"wide\.png: expected an image of shape \(3, 4, 3\)") as e:
        next(iter(DataLoader(ImageFolder(animals), 4)))
    assert "received (3, 9, 3); pass transforms=[ndl.data.Resize((height, width))]" in str(e.value)
    x, _ = next(iter(DataLoader(ImageFolder(animals, [Resize((8, 8))]), 4)))
    assert x.shape == (4, 8, 8, 3)
    np.testing.assert_allclose(x.numpy()[3], 1, rtol=1e-6)


def test_folders_of_pictures_that_cannot_be_read(animals: Path) -> None:
    (animals / "dog" / "z.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(FileError, match=r"sample 3 of ImageFolder: .*z\.png: expected a picture"):
        next(iter(DataLoader(ImageFolder(animals), 4)))
    (animals / "emu").mkdir()
    with pytest.raises(ValueError, match=r"expected pictures \(.png, .* in .*emu; received a fol"):
        ImageFolder(animals)
    with pytest.raises(FileNotFoundError, match="ImageFolder: expected a folder; received"):
        ImageFolder(animals / "none")
    with pytest.raises(ValueError, match=r"expected a folder of pictures for each class in .*emu"):
        ImageFolder(animals / "emu")


# Transforms


def picture(height: int = 9, width: int = 7, dtype: Any = np.float32) -> np.ndarray:
    return np.random.default_rng(1).random((height, width, 3)).astype(dtype)


def test_normalize() -> None:
    x = picture()
    found = Normalize((0.5, 0.4, 0.3), (0.1, 0.2, 0.4))(x)
    for channel, (mean, std) in enumerate(zip((0.5, 0.4, 0.3), (0.1, 0.2, 0.4), strict=True)):
        np.testing.assert_allclose(found[..., channel], (x[..., channel] - mean) / std, rtol=1e-5)
    assert found.dtype == np.float32
    np.testing.assert_allclose(Normalize(0.5, 2)(x), (x - 0.5) / 2, rtol=1e-6)


@pytest.mark.parametrize("size", [(4, 4), (18, 21), (9, 7), (1, 30), (5, 1)])
def test_resize_is_pillows(size: tuple[int, int]) -> None:
    x = picture()
    found = Resize(size)(x)
    assert found.dtype == np.float32
    for channel in range(3):
        plane = PIL.fromarray(np.ascontiguousarray(x[..., channel]), "F")
        expected = np.asarray(plane.resize(size[::-1], PIL.Resampling.BILINEAR))
        np.testing.assert_allclose(found[..., channel], expected, rtol=2e-6, atol=2e-6)


def test_resize_of_the_shorter_side_and_the_middle() -> None:
    assert Resize(14)(picture(9, 7)).shape == (18, 14, 3)
    assert Resize(3)(picture(9, 70)).shape == (3, 23, 3)
    x = picture(9, 8)
    np.testing.assert_array_equal(CenterCrop((3, 2))(x), x[3:6, 3:5])
    np.testing.assert_array_equal(CenterCrop(8)(x), x[:8])


def test_colour_jitter_is_what_pillow_enhances() -> None:
    enhance = pytest.importorskip("PIL.ImageEnhance")
    levels = np.random.default_rng(2).integers(0, 256, (9, 7, 3), np.uint8)
    kinds = ["Brightness", "Contrast", "Color"]
    for index, kind in enumerate(kinds):
        strengths = [0.0] * 3
        strengths[index] = 0.8
        np.random.seed(index)
        found = ColorJitter(*strengths)(levels / np.float32(255))
        np.random.seed(index)
        factor = 1 + (2 * np.random.rand() - 1) * 0.8
        expected = getattr(enhance, kind)(PIL.fromarray(levels)).enhance(factor)
        np.testing.assert_allclose(found * 255, np.asarray(expected), atol=1.6)
        assert found.dtype == np.float32
    np.random.seed(5)
    assert np.abs(ColorJitter(0.5, 0.5, 0.5)(picture()) - picture()).max() > 0.1
    np.testing.assert_array_equal(ColorJitter()(picture()), picture())


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_hue_turns_as_colorsys_says(dtype: type) -> None:
    """Also of greys, of equal largest channels, and of pure colours."""
    pixels = np.random.default_rng(3).random((5, 6, 3))
    pixels[0] = np.repeat(pixels[0, :, :1], 3, -1)
    pixels[1, :3], pixels[2, :3] = np.sort(np.round(pixels[1, :3], 1)), np.eye(3)
    pixels[3, :3] = 1 - 0.5 * np.eye(3)
    x = pixels.astype(dtype)
    for seed, strength in enumerate((0.5, 0.1)):
        np.random.seed(seed)
        found = ColorJitter(hue=strength)(x)
        np.random.seed(seed)
        change = (2 * np.random.rand() - 1) * strength
        expected = np.empty_like(pixels)
        for place in np.ndindex(5, 6):
            h, s, v = colorsys.rgb_to_hsv(*x[place].astype(float))
            expected[place] = colorsys.hsv_to_rgb((h + change) % 1, s, v)
        np.testing.assert_allclose(found, expected, 0, 16 * np.finfo(dtype).eps)
        assert found.dtype == dtype
        assert np.abs(found - x).max() > strength / 10
    np.testing.assert_allclose(turn_hue(turn_hue(x, 0.3), -0.3), x, 0, 16 * np.finfo(dtype).eps)


@pytest.mark.parametrize("size", [1, 4, 5, 40])
def test_cutout(size: int) -> None:
    for seed in range(10):
        x = picture()
        np.random.seed(seed)
        row, column = np.random.randint(9), np.random.randint(7)
        expected = x.copy()
        for i in range(9):
            for j in range(7):
                rows, columns = i - (row - size // 2), j - (column - size // 2)
                if 0 <= rows < size and 0 <= columns < size:
                    expected[i, j] = 0
        np.random.seed(seed)
        np.testing.assert_array_equal(Cutout(size)(x), expected)
        np.testing.assert_array_equal(x, picture())  # what came in stays


def test_mixup() -> None:
    x, y = RNG.random((12, 2, 2, 1)).astype(np.float32), RNG.integers(0, 4, 12)
    loader = DataLoader(NDArrayDataset(x, y), 12, seed=4, collate_fn=Mixup(4, alpha=0.5))
    (mixed, targets), *_ = loader
    mixed, targets = mixed.numpy(), targets.numpy()
    assert (targets.dtype, targets.shape) == (np.float32, (12, 4))
    np.testing.assert_allclose(targets.sum(1), 1, rtol=1e-6)
    shares = {round(float(s), 5) for s in targets.ravel()} - {0.0, 1.0}
    assert len(shares) == 2  # s and 1 - s
    for each, target in zip(mixed, targets, strict=True):
        options = [(s * a + (1 - s) * b, s, i, j) for s in shares for i, a in enumerate(x)
                   for j, b in enumerate(x)]  # fmt: skip
        _, share, i, j = min(options, key=lambda option: np.abs(option[0] - each).max())
        expected = share * np.eye(4)[y[i]] + (1 - share) * np.eye(4)[y[j]]
        np.testing.assert_allclose(target, expected, atol=1e-4)
    again = DataLoader(
        NDArrayDataset(x, y), 12, seed=4, num_workers=2, collate_fn=Mixup(4, alpha=0.5)
    )
    np.testing.assert_array_equal(next(iter(again))[0].numpy(), mixed)
    logits = ndl.Tensor(RNG.normal(size=(12, 4)).astype(np.float32))
    loss = nn.functional.kl_div(
        nn.functional.log_softmax(logits, 1), ndl.Tensor(targets), reduction="batchmean"
    )
    loss.backward()
    softmax = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(1, keepdims=True)
    np.testing.assert_allclose(logits.grad.numpy(), (softmax - targets) / 12, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Normalize(0, 0), "Normalize: expected finite numbers, std above 0"),
        (lambda: Normalize((0, 0), 1)(picture()), "expected one mean and std, or 3; received 2"),
        (lambda: Resize(0), "Resize: expected a size of one or two numbers of pixels; received 0"),
        (lambda: Resize((1, 2, 3)), r"received \(1, 2, 3\)"),
        (lambda: Resize(2)(np.zeros((2, 2))), "Resize: expected an image"),
        (lambda: CenterCrop(8)(picture()), "CenterCrop: expected an image of at least 8 x 8; re"),
        (lambda: ColorJitter(2), "ColorJitter: expected strengths in"),
        (
            lambda: ColorJitter(hue=0.6),
            r"ColorJitter: expected strengths in \[0, 1\], and hue in \[0, 0.5\]; received",
        ),
        (lambda: ColorJitter(1)(picture()[..., :1]), "ColorJitter: expected 3 channels; received"),
        (lambda: Cutout(0), "Cutout: expected a size"),
        (lambda: Mixup(0), "Mixup: expected at least one class and an alpha above 0; received 0"),
        (lambda: Mixup(2)([(np.zeros(2), 2)]), "Mixup: expected labels below 2; received 2"),
    ],
)
def test_transform_errors(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
