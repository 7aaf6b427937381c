"""Compiled code on disk, so that the next process starts fast.

    folder/kind/name:  MAGIC | SHA-256 of the rest | length of the identity | identity | data

The identity is everything that the data depends on (target.fingerprint and the caller's key), and
the name is its hash. What is not exactly such a file, for this identity, is a miss. A folder that
cannot be written is a warning, once. Entries used least recently go when all exceed LIMIT bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from needle.compiler.target import fingerprint
from needle.files import remove_partial_files, write_atomically

KINDS = ("kernel", "program")
LIMIT = 256 << 20
MAGIC = b"needle cache 1\n"
HEAD = len(MAGIC) + 32  # where the checksum ends
LOCK = Lock()


class Usage:
    """What this process knows: bytes on disk, at least, once it has looked, and whether it warned
    already."""

    size: int | None = None
    warned = False


@dataclass(frozen=True)
class Entry:
    kind: str
    path: Path
    size: int  # bytes on disk
    used: float  # when, in seconds since 1970


def folder() -> Path | None:
    """NEEDLE_CACHE_DIR, or the user's cache; None where that is "off" or there is no home."""
    given = os.environ.get("NEEDLE_CACHE_DIR")
    if given:
        return None if given == "off" else Path(given)
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "needle"
    home = os.path.expanduser("~")
    if not os.path.isabs(home):
        return None
    return Path(home, "Library/Caches" if sys.platform == "darwin" else ".cache", "needle")


def locate(root: Path, kind: str, key: str) -> tuple[Path, bytes]:
    """The path of an entry, and its identity."""
    identity = f"{kind}\n{fingerprint()}\n{key}".encode()
    return root / kind / hashlib.sha256(identity).hexdigest(), identity


def get(kind: str, key: str) -> bytes | None:
    """What was put under a key for this machine and this needle, or None."""
    root = folder()
    if root is None:
        return None
    path, identity = locate(root, kind, key)
    try:
        content = path.read_bytes()
    except OSError:
        return None
    data = unpack(content, identity)
    if data is not None:
        with suppress(OSError):  # a folder that can only be read
            os.utime(path)
    return data


def pack(identity: bytes, data: bytes) -> bytes:
    rest = len(identity).to_bytes(8, "little") + identity + data
    return MAGIC + hashlib.sha256(rest).digest() + rest


def unpack(content: bytes, identity: bytes) -> bytes | None:
    """The data of an entry; None where it is damaged or another's."""
    rest = content[HEAD:]
    begin = 8 + len(identity)
    if content[:HEAD] != MAGIC + hashlib.sha256(rest).digest():
        return None
    return rest[begin:] if rest[:begin] == pack(identity, b"")[HEAD:] else None


def put(kind: str, key: str, data: bytes) -> None:
    """Keep data under a key, if the folder allows."""
    root = folder()
    if root is None:
        return
    path, identity = locate(root, kind, key)
    content = pack(identity, data)
    with LOCK:  # threads of one process write to the same temporary file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, content)
        except OSError as error:
            warn(root, error)
            return
        if Usage.size is None:
            Usage.size = sum(each.size for each in entries())
        else:
            Usage.size += len(content)
        if Usage.size > LIMIT:
            Usage.size = shrink(LIMIT * 3 // 4)


def warn(root: Path, error: OSError) -> None:
    if not Usage.warned:
        Usage.warned = True
        text = f"cache: expected a folder to write to; received {root}: {error.strerror}; compiled"
        text += " code is not kept; set NEEDLE_CACHE_DIR to another folder, or to off"
        warnings.warn(text, RuntimeWarning, stacklevel=3)


def entries() -> list[Entry]:
    """All entries, of every machine and version."""
    root, found = folder(), []
    for kind in KINDS if root else ():
        for path in (root / kind).glob("*") if root else ():
            with suppress(OSError):  # another process removed it
                if re.fullmatch("[0-9a-f]{64}", path.name) and path.is_file():
                    facts = path.stat()
                    found.append(Entry(kind, path, facts.st_size, facts.st_mtime))
    return found


def shrink(limit: int) -> int:
    """Remove the entries used least recently until the rest has at most so many bytes; how many it
    has."""
    found = sorted(entries(), key=lambda each: each.used)
    size = sum(each.size for each in found)
    for each in found:
        if size <= limit:
            break
        with suppress(OSError):
            each.path.unlink()
            size -= each.size
    return size


def clear() -> int:
    """Remove every entry, and what writers that were killed have left; how many bytes are left."""
    root = folder()
    for kind in KINDS if root else ():
        with suppress(OSError):
            remove_partial_files(root / kind) if root else None
    return shrink(0)
