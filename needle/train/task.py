"""What a run's data is: images with classes, or text in windows of tokens.

In: a TrainConfig. Out: the samples to train and to test with, in the form that the model takes, the
tokenizer of a text, and what a loss says about the data. Next: model.py.
"""

from __future__ import annotations

import math
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from needle.data import (
    ByteTokenizer,
    CharTokenizer,
    CIFAR10Dataset,
    CIFAR100Dataset,
    ImageDataset,
    ImageFolder,
    RandomCrop,
    RandomFlipHorizontal,
    TokenDataset,
    Tokenizer,
    digits,
    fashion_mnist,
    load_tokenizer,
    mnist,
    read_text,
)
from needle.data.cifar import CIFAR10_CLASSES
from needle.errors import expect
from needle.files import FileError
from needle.train.config import TrainConfig
from needle.train.image import read_colour

Samples = list[tuple[Path, int]]
SIDE = 32  # of the images that resnet9 takes
TRAIN_SHARE = 0.9  # of a text; the rest tests


class Task(NamedTuple):
    """What a data set of images asks: their shape (height, width, channels), the classes.

    span: the share of the height or width that is drawn on; MNIST's digits have a margin.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    span: float = 1.0


CLOTHES = "T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot"
TASKS = {
    "digits": Task((8, 8, 1), tuple("0123456789")),
    "mnist": Task((28, 28, 1), tuple("0123456789"), span=20 / 28),
    "fashion_mnist": Task((28, 28, 1), tuple(CLOTHES.split(","))),
    "cifar10": Task((32, 32, 3), tuple(CIFAR10_CLASSES)),
    "cifar100": Task((32, 32, 3), tuple(map(str, range(100)))),
}


def task_of(config: TrainConfig) -> Task | None:
    """What the configured data set of images asks; None of text."""
    if config.data == "folder":
        return Task((SIDE, SIDE, 3), config.classes)
    return TASKS.get(config.data)


def open_data(config: TrainConfig, train: bool, tokenizer: Tokenizer | None = None) -> Any:
    """The samples to train with, or those to test with; a text needs its tokenizer.

    ValueError where the files hold images of another shape than the configured data set's, or a
    text too short or with unknown characters; else the errors of needle.data.
    """
    if config.data == "text":
        return open_text(config, train, tokenizer or make_tokenizer(config))
    found: Any = open_images(config, train)
    expected, received = cast(Task, task_of(config)).shape, found.images.shape[1:]
    message = f"{config.data}: expected images of shape {expected}; received {received}"
    expect(expected == received, message)
    if config.model == "resnet9":
        found.images, found.channels_first = enlarge(found.images), True
    elif isinstance(found, CIFAR10Dataset):
        found.channels_first = False
    return found


def open_images(config: TrainConfig, train: bool) -> ImageDataset:
    """The images of a data set as they are; those of CIFAR are flipped and shifted in training."""
    fetched = {"mnist": mnist, "fashion_mnist": fashion_mnist}.get(config.data)
    if fetched:
        return fetched(config.data_dir, train)
    if config.data == "digits":
        return digits(train)
    if config.data == "folder":
        return open_folder(config, train)
    folder, change = config.data_dir, [RandomFlipHorizontal(), RandomCrop(4)] if train else None
    archive = "the folder that CIFAR's binary archive unpacks to: --data-dir FOLDER"
    expect(folder, f"{config.data}: expected {archive}; received none")
    kind = CIFAR10Dataset if config.data == "cifar10" else CIFAR100Dataset
    return kind(folder or "", train, transforms=change)


def split_folder(config: TrainConfig) -> tuple[tuple[str, ...], Samples, Samples]:
    """The classes of a folder, and its pictures with their classes: to train, and to test with.

    A folder with the folders train and test, valid or val has them; of others every tenth tests.
    """
    expected = "a folder of pictures for each class: --data-dir FOLDER"
    expect(config.data_dir, f"folder: expected {expected}; received none")
    root = Path(config.data_dir or "")
    parts = [root / name for name in ("test", "valid", "val") if (root / name).is_dir()]
    if parts and (root / "train").is_dir():
        first, second = ImageFolder(root / "train"), ImageFolder(parts[0])
        found = f"in {parts[0]}, as in {root / 'train'}; received {second.classes}"
        expect(first.classes == second.classes, f"folder: expected {first.classes} {found}")
        train, test = first.samples, second.samples
    else:
        first = ImageFolder(root)
        test = first.samples[9::10]
        train = [each for place, each in enumerate(first.samples) if place % 10 != 9]
    received = f"{len(first.classes)} and {len(train) + len(test)}"
    fits = len(first.classes) > 1 and test
    expect(fits, f"folder: expected two classes and ten pictures at least; received {received}")
    return tuple(first.classes), train, test


def open_folder(config: TrainConfig, train: bool) -> ImageDataset:
    """The pictures of a folder, resized and cut to their middles; in training they are shifted."""
    classes, *parts = split_folder(config)
    received = f"received {classes} in {config.data_dir}"
    expect(config.classes in ((), classes), f"folder: expected {config.classes}; {received}")
    paths, labels = zip(*parts[0 if train else 1], strict=True)
    images = np.stack([read_colour(path, (SIDE, SIDE)) for path in paths])
    return ImageDataset(images, labels, [RandomCrop(4)] if train else None, scale=255)


def completed(config: TrainConfig, tokenizer: Tokenizer | None) -> TrainConfig:
    """The configuration with what the data decides: the size of the vocabulary, or the classes."""
    if tokenizer is not None:
        return replace(config, vocab_size=tokenizer.vocab_size)
    if config.data == "folder" and not config.classes:
        return replace(config, classes=split_folder(config)[0])
    return config


def enlarge(images: np.ndarray) -> np.ndarray:
    """Images (n, H, W, C) of at most 32 x 32 as (n, 32, 32, 3): pixels are repeated a whole number
    of times, zeros put around, and grey is shown as three equal channels."""
    times = SIDE // max(images.shape[1:3])
    images = images.repeat(times, 1).repeat(times, 2)
    margins = [((SIDE - n) // 2, (SIDE - n + 1) // 2) for n in images.shape[1:3]]
    padded = np.pad(images, [(0, 0), *margins, (0, 0)])
    return np.broadcast_to(padded, (*padded.shape[:3], 3))


# Text


class TextDataset(TokenDataset):
    """Windows of a text's tokens. tokens_per_character: what makes a loss one per character."""

    def __init__(self, text: str, tokenizer: Tokenizer, *options: Any) -> None:
        tokens = tokenizer.encode(text)
        self.tokens_per_character = len(tokens) / max(len(text), 1)
        super().__init__(tokens, *options)


def read_texts(config: TrainConfig) -> tuple[str, str]:
    """The text to train with, and that to test with.

    A folder with train.txt and valid.txt or test.txt has them; of others, and of a file, the last
    tenth tests. Without either: the modules of Python's standard library.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    folder = library if config.data_dir is None else Path(config.data_dir)
    for name in ("valid.txt", "test.txt"):
        if (folder / "train.txt").is_file() and (folder / name).is_file():
            return read_text(folder / "train.txt"), read_text(folder / name)
    try:
        text = read_text(folder, "*.py" if folder == library else "**/*")
    except (FileError, FileNotFoundError) as error:
        fix = "" if config.data_dir else "; pass a text: --data-dir PATH"
        raise type(error)(f"{error}{fix}") from None
    cut = int(TRAIN_SHARE * len(text))
    return text[:cut], text[cut:]


def make_tokenizer(config: TrainConfig) -> Tokenizer:
    """The configured tokenizer; char has the characters of the whole text."""
    if config.tokenizer == "byte":
        return ByteTokenizer()
    if config.tokenizer == "char":
        return CharTokenizer("".join(read_texts(config)))
    return load_tokenizer(config.tokenizer)


def open_text(config: TrainConfig, train: bool, tokenizer: Tokenizer) -> TextDataset:
    """Windows of block_size tokens, at random places in training."""
    text, block = read_texts(config)[0 if train else 1], config.block_size
    part = "train" if train else "test"
    expected = f"a text with more than {block} characters to {part} with, block_size"
    expect(len(text) > block, f"text: expected {expected}; received {len(text)}")
    if train or not config.eval_samples:
        return TextDataset(text, tokenizer, block, None, train)
    found = TextDataset(text, tokenizer, block)
    found.starts = found.starts[:: -(-len(found) // config.eval_samples)]
    return found


def measures(data: Any, loss: float, accuracy: float) -> dict[str, float]:
    """What a mean loss and a share of right predictions say about data, by the names in metrics.

    perplexity = e^loss; bits_per_character = loss / ln 2 * tokens per character
    """
    found = {"loss": loss, "accuracy": accuracy}
    if isinstance(data, TextDataset):
        found["perplexity"] = math.exp(min(loss, 700.0)) if loss == loss else loss
        found["bits_per_character"] = loss / math.log(2) * data.tokens_per_character
    return found
