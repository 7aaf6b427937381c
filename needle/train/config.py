"""The configuration of a run: what decides every bit of it. It is checked when it is made.

In: numbers and names; each data set has defaults of its own. Out: a frozen TrainConfig, which
stands in config.json, and the data that it names. Next: model.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from needle.data import ImageDataset, digits, fashion_mnist, mnist
from needle.errors import expect
from needle.files import AnyPath, reading

# In place of TrainConfig's own defaults, which are the course's settings for MNIST.
DIGITS = {"epochs": 20, "batch_size": 32, "lr": 0.003, "weight_decay": 5e-4, "schedule": "cosine"}
PRESETS: dict[str, dict[str, Any]] = {"digits": DIGITS}


def choice(*choices: str) -> Any:
    """A field with one of some names, the first by default."""
    return checked(choices[0], f"one of {', '.join(choices)}", lambda x: x in choices)


def integer(default: int, low: int, high: int) -> Any:
    """A field with an integer from low to high."""
    return checked(default, f"an integer from {low} to {high}", lambda x: low <= x <= high)


def number(default: float, low: float, below: float) -> Any:
    """A field with a number of at least low and below another."""
    expected = f"a number of at least {low:g} and below {below:g}"
    return checked(default, expected, lambda x: low <= x < below)


def checked(default: Any, expected: str, holds: Any, *types: type) -> Any:
    """A field of its default's type or another, for whose values something holds."""
    types = (type(default), *types)
    return field(default=default, metadata={"types": types, "expected": expected, "holds": holds})


@dataclass(frozen=True)
class TrainConfig:
    """A model, its data, and how it is trained.

    data_dir: where the files of mnist and fashion_mnist lie; None: fetch them. momentum: of sgd.
    schedule: of the learning rate, over all steps. seed: of weights, order and dropout.
    checkpoint_every: in steps; there is a checkpoint after every epoch, too. precision: bfloat16
    trains under `ndl.autocast`, with parameters in float32. jit: whether a step is
    one compiled program, which changes no bit.

    ValueError for a value out of range, TypeError for one of another type; both name the field.
    """

    model: str = choice("mlp_resnet")
    data: str = choice("digits", "mnist", "fashion_mnist")
    data_dir: str | None = checked(None, "a folder's name", lambda x: x != "", str)
    epochs: int = integer(10, 1, 1_000_000)
    batch_size: int = integer(100, 1, 1_000_000)
    optimizer: str = choice("adam", "adamw", "sgd", "rmsprop", "adagrad", "adafactor", "lion")
    lr: float = number(0.001, 1e-12, 1e3)
    weight_decay: float = number(0.001, 0, math.inf)
    momentum: float = number(0.9, 0, 1)
    schedule: str = choice("constant", "cosine", "one_cycle", "step", "exponential")
    hidden_dim: int = integer(100, 2, 65536)
    num_blocks: int = integer(3, 1, 1000)
    dropout: float = number(0.1, 0, 1)
    seed: int = integer(0, 0, (1 << 63) - 1)
    device: str = choice("cpu", "cpu_numpy", "cuda")
    checkpoint_every: int = integer(200, 1, 1_000_000_000)
    precision: str = choice("float32", "bfloat16")
    jit: bool = checked(True, "true or false", lambda x: True, bool)

    def __post_init__(self) -> None:
        for each in fields(self):
            value, types = getattr(self, each.name), each.metadata["types"]
            if types == (float,) and type(value) is int:
                value = float(value)
                object.__setattr__(self, each.name, value)
            message = f"{each.name}: expected {each.metadata['expected']}; received {value!r:.100}"
            expect(type(value) in types, message, TypeError)
            expect(each.metadata["holds"](value), message)

    @classmethod
    def for_data(cls, data: str = "digits", **given: Any) -> TrainConfig:
        """The defaults for a data set, with what is given in their place."""
        return cls(**{"data": data, **PRESETS.get(data, {}), **given})

    @classmethod
    def read(cls, path: AnyPath) -> TrainConfig:
        """The configuration in a config.json; FileError where it is none."""
        text = Path(path).read_bytes()
        with reading(path, "the configuration of a run"):
            found = json.loads(text)
            odd = ", ".join(sorted(set(found).symmetric_difference(cls.__dataclass_fields__)))
            expect(not odd, f"others than the fields of TrainConfig: {odd}")
            return cls(**found)


class Task(NamedTuple):
    """What a data set asks: the shape (height, width, channels) of its images, its classes.

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
}


def open_data(config: TrainConfig, train: bool) -> ImageDataset:
    """The samples to train with, or those to test with.

    ValueError where the files hold images of another shape than the configured data set's; else
    the errors of needle.data.
    """
    fetched = {"mnist": mnist, "fashion_mnist": fashion_mnist}.get(config.data)
    found = fetched(config.data_dir, train) if fetched else digits(train)
    expected, received = TASKS[config.data].shape, found.images.shape[1:]
    message = f"{config.data}: expected images of shape {expected}; received {received}"
    expect(expected == received, message)
    return found
