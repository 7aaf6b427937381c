"""Files, never half written and never half read: atomic writes, tensors as safetensors.

In: arrays or Tensors by name. Out: one file, or the NumPy arrays back. A file of another kind,
truncated or forged raises FileError, before more memory is taken than it has bytes. Nothing is
ever unpickled. A safetensors file is a header's length (8 bytes, little-endian), a header of JSON
and the tensors' bytes:

    {"__metadata__": {name: text},
     name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from needle import dtype as dtypes
from needle.errors import expect

AnyPath = str | os.PathLike[str]
Texts = Mapping[str, str]

CODES = {
    "F64": dtypes.float64, "F32": dtypes.float32, "F16": dtypes.float16, "BF16": dtypes.bfloat16,
    "I64": dtypes.int64, "I32": dtypes.int32, "I16": dtypes.int16, "I8": dtypes.int8,
    "U8": dtypes.uint8, "BOOL": dtypes.bool_,
}  # fmt: skip
PARTIAL = ".partial"  # how the name of a file ends that is being written


class FileError(ValueError):
    """A file that is not what it should be: its name, what was expected, and what was received."""


@contextmanager
def reading(path: AnyPath, expected: str) -> Iterator[None]:
    """Within the block, which interprets what was read, every error becomes a FileError.

    Forged content leads to errors of any kind. Only too little memory is not the file's fault.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        reason = f"without {error}" if isinstance(error, KeyError) else f"that is none: {error}"
        raise FileError(f"{path}: expected {expected}; received content {reason}") from None


def import_extra(module: str, extra: str) -> Any:
    """An optional library; ImportError, naming the extra that brings it, where it is missing."""
    try:
        return import_module(module)
    except ImportError:
        received = f"an environment without it: pip install needle-dl[{extra}]"
        raise ImportError(f"{module}: expected an installed library; received {received}") from None


def find_file(name: str, folder: Path, places: Iterable[str], expected: str) -> Path:
    """The first file of those that a folder may have; FileNotFoundError, which `name` asks for."""
    for path in (folder / place for place in places):
        if path.is_file():
            return path
    received = "a folder without it" if folder.is_dir() else "a path that is no folder"
    raise FileNotFoundError(f"{name}: expected {expected} in {folder}; received {received}")


# Writing


def write_atomically(path: AnyPath, content: bytes) -> None:
    """Write a file so that readers, and a crash at any moment, find the old one or the new, whole.

    The content goes to a temporary file in the same folder, which is synchronised with the disk
    and takes the path's name; then the folder is synchronised too. An OSError (disk full,
    read-only) names the path and leaves the old file as it was, and no temporary file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        synchronise_folder(path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with suppress(OSError):
            partial.unlink()


def synchronise_folder(folder: Path) -> None:
    """Make a change of names in a folder survive a crash of the machine."""
    if os.name == "posix":  # elsewhere a folder cannot be opened
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_partial_files(folder: AnyPath) -> None:
    """Remove what writers that were killed have left in a folder."""
    for path in Path(folder).glob(f".*{PARTIAL}"):
        path.unlink(missing_ok=True)


def save_tensors(path: AnyPath, tensors: Mapping[str, Any], metadata: Texts | None = None) -> None:
    """Write Tensors, NDArrays or NumPy arrays, and texts, by name to a safetensors file.

    TypeError for a dtype that is not needle's, ValueError for the name "__metadata__", before
    anything is written; OSError as in `write_atomically`.
    """
    from safetensors.numpy import save  # needed by those alone who write files

    message = "save_tensors: expected other names than __metadata__; received that one"
    expect("__metadata__" not in tensors, message)
    arrays = {}
    for name, tensor in tensors.items():
        array = np.asarray(tensor.numpy() if hasattr(tensor, "numpy") else tensor, order="C")
        message = f"save_tensors: expected {dtypes.NAMES}; received {array.dtype} for {name}"
        expect(array.dtype in dtypes.DTYPES, message, TypeError)
        arrays[name] = array
    write_atomically(path, save(arrays, dict(metadata or {})))


# Reading


def load_tensors(path: AnyPath) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the texts of a safetensors file; FileError where it is none."""
    from safetensors import deserialize  # needed by those alone who read files

    content = Path(path).read_bytes()
    with reading(path, "a safetensors file"):
        found = deserialize(content)  # checks the header against the file's size
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        arrays = {name: as_array(name, **entry) for name, entry in found}
    return arrays, header.get("__metadata__") or {}


def as_array(name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """A tensor of a file, as an array of its own; ValueError where needle has none such."""
    expect(dtype in CODES, f"{name}: expected one of {', '.join(CODES)}; received {dtype}")
    raw, target = np.frombuffer(data, np.uint8), CODES[dtype]
    if target == dtypes.bool_:
        expect(np.all(raw <= 1), f"{name}: expected bytes of 0 or 1 for BOOL; received others")
    return raw.view(target.newbyteorder("<")).astype(target).reshape(shape)
