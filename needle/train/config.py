"""The configuration of a run: what decides every bit of it. It is checked when it is made.

In: numbers and names; each model and data set has defaults of its own. Out: a frozen TrainConfig,
which stands in config.json. Next: image.py.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from needle.errors import expect
from needle.files import AnyPath, reading

LANGUAGE_MODELS = ("lstm", "gpt")
# In place of TrainConfig's own defaults, which are the course's settings for MNIST.
WINDOWS = {"max_steps": 2000, "eval_every": 250, "eval_samples": 500, "block_size": 64}
RATES = {"schedule": "cosine", "warmup_steps": 100, "max_norm": 1.0, "dropout": 0.0}
PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("mlp_resnet", "digits"): {
        "epochs": 20, "batch_size": 32, "lr": 0.003, "weight_decay": 5e-4, "schedule": "cosine",
    },
    ("resnet9", "digits"): {"batch_size": 32, "schedule": "cosine"},
    ("resnet9", "folder"): {"batch_size": 32, "schedule": "cosine"},
    ("resnet9", "cifar10"): {"batch_size": 128, "schedule": "one_cycle"},
    ("resnet9", "cifar100"): {"batch_size": 128, "schedule": "one_cycle"},
    ("lstm", "text"): {
        **WINDOWS, **RATES, "batch_size": 32, "lr": 0.003, "min_lr": 3e-4, "weight_decay": 0.0,
        "hidden_dim": 256, "num_blocks": 1,
    },
    ("gpt", "text"): {  # nanoGPT's, for a CPU
        **WINDOWS, **RATES, "batch_size": 12, "lr": 1e-3, "min_lr": 1e-4, "weight_decay": 0.1,
        "hidden_dim": 128, "num_blocks": 4, "num_heads": 4, "bias": False,
        "optimizer": "adamw", "beta2": 0.99, "decay_vectors": False,
    },
}  # fmt: skip


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


def flag(default: bool) -> Any:
    """A field that is true or false."""
    return checked(default, "true or false", lambda x: True)


@dataclass(frozen=True)
class TrainConfig:
    """A model, its data, and how it is trained.

    data_dir: where the data's files lie (of text: a file or a folder); None: mnist and
    fashion_mnist are fetched, text is the sources of Python's standard library. epochs: passes over
    the data; max_steps: above 0, the run has so many steps instead. eval_every: in steps; 0 stands
    for an epoch. eval_samples: windows of the text that tests, evenly; 0 for all. schedule: of the
    learning rate, over all steps. min_lr, warmup_steps: of cosine, the warm-up at most half of the
    run. momentum: of sgd. beta1, beta2: of adam and adamw. decay_vectors: whether weight decay acts
    on biases and norms, too. max_norm: of all gradients together; 0 does not clip. bias: of gpt.
    seed: of weights, order and dropout. checkpoint_every: in steps; there is a checkpoint after
    every evaluation, too. precision: bfloat16 trains under `ndl.autocast`, with parameters in
    float32. jit: whether a step is one compiled program, which changes no bit. vocab_size: of the
    tokenizer, and classes: of a folder of pictures, set when a run begins.

    ValueError for a value out of range, TypeError for one of another type; both name the field.
    """

    model: str = choice("mlp_resnet", "resnet9", *LANGUAGE_MODELS)
    data: str = choice("digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "folder", "text")
    data_dir: str | None = checked(None, "a file's or folder's name", lambda x: x != "", str)
    tokenizer: str = checked("char", "char, byte or the path of a tokenizer.json", lambda x: x)
    epochs: int = integer(10, 1, 1_000_000)
    max_steps: int = integer(0, 0, 1_000_000_000)
    eval_every: int = integer(0, 0, 1_000_000_000)
    eval_samples: int = integer(0, 0, 1_000_000_000)
    batch_size: int = integer(100, 1, 1_000_000)
    optimizer: str = choice("adam", "adamw", "sgd", "rmsprop", "adagrad", "adafactor", "lion")
    lr: float = number(0.001, 1e-12, 1e3)
    weight_decay: float = number(0.001, 0, math.inf)
    decay_vectors: bool = flag(True)
    momentum: float = number(0.9, 0, 1)
    beta1: float = number(0.9, 0, 1)
    beta2: float = number(0.999, 0, 1)
    max_norm: float = number(0.0, 0, math.inf)
    schedule: str = choice("constant", "cosine", "one_cycle", "step", "exponential")
    min_lr: float = number(0.0, 0, 1e3)
    warmup_steps: int = integer(0, 0, 1_000_000_000)
    hidden_dim: int = integer(100, 2, 65536)
    num_blocks: int = integer(3, 1, 1000)
    num_heads: int = integer(4, 1, 65536)
    block_size: int = integer(64, 1, 1_000_000)
    dropout: float = number(0.1, 0, 1)
    bias: bool = flag(True)
    seed: int = integer(0, 0, (1 << 63) - 1)
    device: str = choice("cpu", "cpu_numpy", "cuda")
    checkpoint_every: int = integer(200, 1, 1_000_000_000)
    precision: str = choice("float32", "bfloat16")
    jit: bool = flag(True)
    vocab_size: int = integer(0, 0, (1 << 31) - 1)
    classes: tuple[str, ...] = checked((), "names", lambda x: all(type(each) is str for each in x))

    def __post_init__(self) -> None:
        for each in fields(self):
            value, types = getattr(self, each.name), each.metadata["types"]
            if types == (float,) and type(value) is int:
                value = float(value)
                object.__setattr__(self, each.name, value)
            message = f"{each.name}: expected {each.metadata['expected']}; received {value!r:.100}"
            expect(type(value) in types, message, TypeError)
            expect(each.metadata["holds"](value), message)

        reads_text, received = self.model in LANGUAGE_MODELS, f"received {self.data}"
        expected = "expected text" if reads_text else "expected a data set of images"
        fits = reads_text == (self.data == "text")
        expect(fits, f"data: {expected} for {self.model}; {received}")
        received = f"received {self.hidden_dim} and {self.num_heads}"
        fits = self.model != "gpt" or self.hidden_dim % self.num_heads == 0
        expect(fits, f"hidden_dim: expected a multiple of num_heads; {received}")

    @classmethod
    def for_data(cls, data: str | None = None, **given: Any) -> TrainConfig:
        """The defaults for a model and a data set, with what is given in their place.

        Without a data set: text for models of language, else the folder data_dir, or digits without
        one. Where epochs are given and max_steps are not, the epochs count.
        """
        model = given.get("model", "mlp_resnet")
        images = "folder" if given.get("data_dir") else "digits"
        data = data or ("text" if model in LANGUAGE_MODELS else images)
        defaults = dict(PRESETS.get((model, data), {}))
        if "epochs" in given:
            defaults.pop("max_steps", None)
        return cls(**{"data": data, **defaults, **given})

    @classmethod
    def read(cls, path: AnyPath) -> TrainConfig:
        """The configuration in a config.json; FileError where it is none."""
        text = Path(path).read_bytes()
        with reading(path, "the configuration of a run"):
            found = json.loads(text)
            odd = ", ".join(sorted(set(found).symmetric_difference(cls.__dataclass_fields__)))
            expect(not odd, f"others than the fields of TrainConfig: {odd}")
            classes = tuple(found["classes"])
            expect(classes or found["data"] != "folder", "a folder without classes")
            return cls(**{**found, "classes": classes})
