"""The folder of a run, runs/NAME/:

    config.json, metrics.jsonl, checkpoint.safetensors, model.safetensors, curves.png;
    of text, tokenizer.json

metrics.jsonl is written line by line, the others atomically. A checkpoint is a tree: nested dicts
and lists of Tensors, arrays, numbers and texts, as safetensors. Floats in the tree keep their bits.

    {"model": {"weight": Tensor}, "step": 7}  ->  a tensor "model.weight", and as metadata the tree
    {"items": [["model", {"items": [["weight", {"tensor": "model.weight"}]]}], ["step", 7]]}

Next: generate.py.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from needle.backend.device import Device, find_device
from needle.data import Tokenizer, load_tokenizer
from needle.errors import expect
from needle.files import AnyPath, FileError, load_tensors, reading, save_tensors, write_atomically
from needle.nn import Module
from needle.train.config import TrainConfig
from needle.train.model import make_model, state_size

CONFIG, METRICS, CURVES = "config.json", "metrics.jsonl", "curves.png"
VOCABULARY = "tokenizer.json"
CHECKPOINT, MODEL = "checkpoint.safetensors", "model.safetensors"
CHECKPOINT_FORMAT, MODEL_FORMAT = "needle-checkpoint-1", "needle-model-1"

Run = tuple[Path, TrainConfig]


def create_run(
    config: TrainConfig,
    root: AnyPath = "runs",
    name: str | None = None,
    tokenizer: Tokenizer | None = None,
) -> Path:
    """A new folder root/NAME with its config.json; without a name, of model, data and time.

    tokenizer: of a text, kept beside it.

    FileExistsError where the name is taken, ValueError where it is none of a folder.
    """
    is_folder = name is None or (Path(name).name == name and name not in ("", ".."))
    expect(is_folder, f"name: expected the name of a folder; received {name!r}")
    Path(root).mkdir(parents=True, exist_ok=True)
    stamp = f"{config.model}-{config.data}-{time.strftime('%Y%m%d-%H%M%S')}"
    others = (f"{stamp}-{number}" for number in count(2))
    for path in (Path(root, each) for each in ([name] if name else chain([stamp], others))):
        with suppress(FileExistsError):
            path.mkdir()
            break
    else:
        cure = f"choose another --name, or go on with: needle train --resume {path}"
        raise FileExistsError(f"{path}: expected a new run; received a name in use; {cure}")
    try:
        if tokenizer is not None:  # first, since a folder with a config.json is a run
            tokenizer.save(path / VOCABULARY)
        write_atomically(path / CONFIG, json.dumps(asdict(config), indent=2).encode() + b"\n")
    except OSError:
        (path / VOCABULARY).unlink(missing_ok=True)
        path.rmdir()
        raise
    return path


def open_run(run: AnyPath, root: AnyPath = "runs", data_dir: str | None = None) -> Run:
    """The folder of a run, by its path or its name in root, and its configuration.

    data_dir: where the data lies now. FileNotFoundError where there is no run, FileError where
    its config.json is bad.
    """
    for path in (Path(run), Path(root, run)):
        if (path / CONFIG).is_file():
            config = TrainConfig.read(path / CONFIG)
            return path, replace(config, data_dir=data_dir or config.data_dir)
    expected = "the folder of a run, which has a config.json"
    raise FileNotFoundError(f"{run}: expected {expected}; received a path without one")


def load_vocabulary(path: Path, config: TrainConfig) -> Tokenizer | None:
    """The tokenizer of a run on text, None of others; FileError where it is another's."""
    if config.data != "text":
        return None
    tokenizer = load_tokenizer(path / VOCABULARY)
    with reading(path / VOCABULARY, f"a vocabulary of {config.vocab_size}, as in {CONFIG}"):
        received = f"one of {tokenizer.vocab_size}"
        expect(tokenizer.vocab_size == config.vocab_size, received)
    return tokenizer


# Models


def save_model(path: Path, model: Module) -> None:
    """Write the parameters and running statistics of the model of a run."""
    save_tensors(path / MODEL, model.state_dict(), {"format": MODEL_FORMAT})


def load_model(path: Path, config: TrainConfig) -> Module:
    """The model of a run after its last finished epoch.

    FileNotFoundError before the first one ends; FileError where the file is bad, or holds another
    model than the configured one.
    """
    file = path / MODEL
    received = f"a run without a finished epoch; go on with: needle train --resume {path}"
    message = f"{file}: expected a trained model; received {received}"
    expect(file.exists(), message, FileNotFoundError)
    tensors, _ = load_format(file, MODEL_FORMAT)
    check_size(file, config, tensors)
    model = make_model(config, usable_device(config.device))
    with reading(file, "the model in config.json"):
        model.load_state_dict(tensors)
    return model


def load_format(path: AnyPath, name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors and texts of a file of a format; FileError where it is of another."""
    tensors, metadata = load_tensors(path)
    found = metadata.get("format")
    expect(found == name, f"{path}: expected the format {name}; received {found}", FileError)
    return tensors, metadata


def check_size(file: Path, config: TrainConfig, tensors: Any) -> None:
    """Refuse another size than the configured model's, before memory is taken for that."""
    size, sides = state_size(config), f"{config.hidden_dim} and num_blocks {config.num_blocks}"
    if size is None:
        return
    with reading(file, f"the {size} numbers of a model of hidden_dim {sides}"):
        received = sum(x.size for x in tensors.values())
        expect(received == size, f"{received} numbers")


def usable_device(name: str) -> Device:
    """The device of a name; ValueError where this machine lacks it."""
    device = find_device(name)
    expect(device.enabled(), f"device: expected one on this machine; received {name}; choose cpu")
    return device


# Checkpoints


def save_checkpoint(path: AnyPath, state: dict[str, Any]) -> None:
    """Write a state. It comes back with arrays for Tensors and lists for tuples.

    TypeError where it holds something else; OSError as in `write_atomically`.
    """
    tensors: dict[str, Any] = {}
    tree = json.dumps(pack(state, "", tensors))
    save_tensors(path, tensors, {"format": CHECKPOINT_FORMAT, "state": tree})


def load_checkpoint(path: AnyPath) -> dict[str, Any]:
    """The state in a file; FileError where it is no checkpoint, truncated or forged."""
    tensors, metadata = load_format(path, CHECKPOINT_FORMAT)
    with reading(path, "a tree of the file's tensors"):
        return dict(unpack(json.loads(metadata["state"]), tensors))


def pack(state: Any, name: str, tensors: dict[str, Any]) -> Any:
    """What JSON can hold of a state; its tensors go to `tensors`, by their path."""
    if isinstance(state, np.ndarray) or hasattr(state, "numpy"):
        tensors[name] = state
        return {"tensor": name}
    if isinstance(state, dict) and all(type(key) in (str, int) for key in state):
        within = f"{name}." if name else ""
        return {"items": [[key, pack(x, f"{within}{key}", tensors)] for key, x in state.items()]}
    if isinstance(state, (list, tuple)):
        return [pack(x, f"{name}.{index}", tensors) for index, x in enumerate(state)]
    if state is None or type(state) in (bool, int, float, str):
        return state
    expected = "arrays, numbers, texts, lists, and dicts with texts or integers as keys"
    received = f"{type(state).__name__} at {name or 'the top'}"
    raise TypeError(f"save_checkpoint: expected {expected}; received {received}")


def unpack(tree: Any, tensors: dict[str, np.ndarray]) -> Any:
    """The state that `pack` took apart."""
    if isinstance(tree, list):
        return [unpack(each, tensors) for each in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    return {key: unpack(each, tensors) for key, each in tree["items"]}
