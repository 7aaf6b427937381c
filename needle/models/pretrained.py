"""Weights in the folders that Hugging Face's transformers saves: config.json and safetensors files.

A model says of which tensors of the file each of its parameters consists. Next: gpt.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from needle.errors import expect
from needle.files import AnyPath, FileError, load_tensors, reading
from needle.nn import Module

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST = 5  # names in an error


class Part(NamedTuple):
    """A tensor of a file, whose last axis is a part of a parameter's, `width` wide. turned: it is
    stored (out, in), as (out, ...) of `shape` where that is given."""

    key: str
    turned: bool = False
    width: int | None = None
    shape: tuple[int, ...] | None = None

    def stored(self, own: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that it should have."""
        if self.shape is not None:
            return self.shape
        shape = (*own[:-1], own[-1] if self.width is None else self.width)
        if self.turned:
            return shape[::-1]
        return shape[-1:] if self.key.endswith(".bias") else shape  # a Linear's is (1, out)


AnyModule = TypeVar("AnyModule", bound=Module)
Parts = Mapping[str, Iterable[Part]]  # by the path of a parameter


def file_in(folder: Path, name: str) -> Path:
    """The path of a file in a folder; FileError where it is not there."""
    path = folder / name
    expect(path.is_file(), f"{path}: expected a file; received a folder without it", FileError)
    return path


def read_config(folder: AnyPath, kind: str) -> dict[str, Any]:
    """What config.json says of a model of this `model_type`; FileError where it is of another."""
    path = file_in(Path(folder), "config.json")
    with reading(path, "the configuration of a model"):
        found = json.loads(path.read_text())
        expect(isinstance(found, dict), f"received a {type(found).__name__}")
    name = found.get("model_type")
    expect(name == kind, f"{path}: expected model_type {kind!r}; received {name!r}", FileError)
    return {"path": path, **found}


def settings(config: dict[str, Any], names: Mapping[str, str], **known: Any) -> dict[str, Any]:
    """The fields of a config dataclass from config.json: positive numbers by the names that they
    have there. known: what else must be as it says there, if it is there."""
    path, found = config["path"], {}
    for field, name in names.items():
        value = config.get(name)
        kinds = (int, float) if name.endswith(("eps", "epsilon", "theta", "factor")) else int
        fits = isinstance(value, kinds) and not isinstance(value, bool) and value > 0
        expect(fits, f"{path}: expected {name} above 0; received {value!r}", FileError)
        found[field] = value
    for name, wanted in known.items():
        value = config.get(name, wanted)
        expect(
            value == wanted, f"{path}: expected {name} {wanted!r}; received {value!r}", FileError
        )
    return found


def read_weights(folder: AnyPath) -> tuple[Path, dict[str, np.ndarray]]:
    """All arrays of model.safetensors, or of the files that the index names, and where they are."""
    folder = Path(folder)
    whole, index = folder / WEIGHTS, folder / INDEX
    if whole.is_file() or not index.is_file():
        return whole, load_tensors(file_in(folder, WEIGHTS))[0]
    with reading(index, "an index of safetensors files"):
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        expect(all(Path(name).name == name for name in names), f"a path outside in {names}")
    arrays: dict[str, np.ndarray] = {}
    for name in names:
        arrays |= load_tensors(file_in(folder, name))[0]
    return index, arrays


def load_model(
    make: Callable[[], AnyModule], weights: tuple[Path, dict[str, np.ndarray]], least: float,
    parts: Callable[[], Parts], prefix: str, passed: tuple[str, ...],
) -> AnyModule:  # fmt: skip
    """A model with its parameters from a file; FileError, with nothing loaded, on what is missing,
    unexpected or of another shape.

    least: numbers that it has at least, so that none is made of a forged configuration. prefix: of
    keys, which a model without a head is saved without. passed: how keys end that are not needed.
    """
    path, arrays = weights
    size = sum(x.size for x in arrays.values())
    text = f"at least {least:,.0f} numbers, by config.json; received {size:,}"
    expect(size >= least, f"{path}: expected {text}", FileError)
    model = make()
    bare = not any(key.startswith(prefix) for key in arrays)
    own = {name: p.shape for name, p in model.named_parameters()}
    keyed = {
        name: [
            each._replace(key=each.key.removeprefix(prefix) if bare else each.key) for each in found
        ]
        for name, found in parts().items()
    }
    wanted = {each.key: each.stored(own[name]) for name, found in keyed.items() for each in found}
    missing = [key for key in wanted if key not in arrays]
    extra = [key for key in arrays if key not in wanted and not key.endswith(passed)]
    shapes = [
        f"{key} {arrays[key].shape} for {shape}"
        for key, shape in wanted.items()
        if key in arrays and arrays[key].shape != shape
    ]
    kinds = {"missing": missing, "unexpected": extra, "of other shapes": shapes}
    if any(kinds.values()):
        text = "; ".join(f"{listed(found)} {kind}" for kind, found in kinds.items() if found)
        name = type(model).__name__
        raise FileError(f"{path}: expected the weights of this {name}; received {text}")
    model.load_state_dict({name: joined(found, arrays, own[name]) for name, found in keyed.items()})
    return model


def joined(parts: Iterable[Part], arrays: Mapping[str, np.ndarray], own: Any) -> np.ndarray:
    """A parameter of its parts, in the model's layout."""
    found = [
        arrays[key].reshape(len(arrays[key]), -1).T if turned else arrays[key]
        for key, turned, *_ in parts
    ]
    return np.concatenate([np.atleast_1d(x) for x in found], -1).reshape(own)


def listed(names: list[str]) -> str:
    more = f" and {len(names) - MOST} more" if len(names) > MOST else ""
    return ", ".join(names[:MOST]) + more
