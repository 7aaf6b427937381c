"""The disk cache: what was put comes back whole, and everything else is a miss, never an error."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from needle.cli import main
from needle.compiler import cache, engine
from needle.compiler.cache import KINDS, LIMIT, Usage, clear, entries, get, pack, put

DATA = bytes(range(256)) * 8


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, of which this process knows nothing."""
    root = tmp_path / "cache"
    monkeypatch.setenv("NEEDLE_CACHE_DIR", str(root))
    monkeypatch.setattr(Usage, "size", None)
    monkeypatch.setattr(Usage, "warned", False)
    return root


def entry() -> Path:
    """The file of the one entry, which is put first."""
    put("kernel", "key", DATA)
    (found,) = entries()
    return found.path


@pytest.mark.parametrize("data", [b"", b"\0", DATA], ids=["empty", "one byte", "2 KiB"])
def test_what_was_put_comes_back(data: bytes) -> None:
    for kind in KINDS:
        assert get(kind, "key") is None
        put(kind, "key", data + kind.encode())
    for kind in KINDS:
        assert get(kind, "key") == data + kind.encode()
    assert get("kernel", "other") is None
    put("kernel", "key", b"new")
    assert get("kernel", "key") == b"new"
    assert len(entries()) == 2


def test_a_truncated_entry_is_a_miss() -> None:
    path = entry()
    whole = path.read_bytes()
    for size in [*range(0, 80), *range(80, len(whole), 97), len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert get("kernel", "key") is None, size
    path.write_bytes(whole)
    assert get("kernel", "key") == DATA


def test_a_flipped_bit_is_a_miss(rng: np.random.Generator) -> None:
    path = entry()
    whole = path.read_bytes()
    places = rng.integers(0, len(whole), 300)
    for place in [*range(64), *places.tolist(), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        assert get("kernel", "key") is None, place


def test_something_after_the_end_is_a_miss() -> None:
    path = entry()
    path.write_bytes(path.read_bytes() + b"\0")
    assert get("kernel", "key") is None


@pytest.mark.parametrize(
    "content", [b"", b"#!/bin/sh\n", b"needle cache 0\n" + DATA, b"\xff" * 4096, cache.MAGIC]
)
def test_a_foreign_file_is_a_miss(content: bytes) -> None:
    path = entry()
    path.write_bytes(content)
    assert get("kernel", "key") is None
    put("kernel", "key", DATA)  # and is replaced
    assert get("kernel", "key") == DATA


def test_a_folder_in_an_entrys_place_is_a_miss() -> None:
    path = entry()
    path.unlink()
    path.mkdir()
    assert get("kernel", "key") is None
    with pytest.warns(RuntimeWarning, match="not kept"):
        put("kernel", "key", DATA)


def test_an_entry_of_another_key_is_a_miss() -> None:
    """Even where two keys had one name: the whole key is in the file."""
    path = entry()
    path.write_bytes(pack(b"kernel\nanother machine\nkey", DATA))
    assert get("kernel", "key") is None
    path.rename(path.with_name("0" * 64))
    assert get("kernel", "key") is None


def test_another_version_or_machine_finds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    path = entry()
    monkeypatch.setattr(cache, "fingerprint", lambda: "another")
    assert get("kernel", "key") is None
    put("kernel", "key", b"other")
    assert len(entries()) == 2
    monkeypatch.undo()
    assert path.exists()


def test_fingerprint_names_all_that_code_depends_on() -> None:
    code = (
        "from needle.compiler.target import *; import needle; "
        "print(fingerprint()); print(host().cpu, host().triple, vector_bits(), sep='\\n')"
    )
    found = {}
    for bits in ("128", "256"):
        environment = {**os.environ, "NEEDLE_VECTOR_BITS": bits}
        command = [sys.executable, "-c", code]
        text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        *lines, cpu, triple, width = text.stdout.splitlines()
        assert cpu in lines
        assert triple in lines
        assert width == bits
        found[bits] = lines
    assert found["128"] != found["256"]


def test_a_folder_that_cannot_be_written_warns_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("NEEDLE_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="NEEDLE_CACHE_DIR"):
        put("kernel", "key", DATA)
    put("kernel", "key", DATA)
    assert get("kernel", "key") is None
    assert entries() == []
    assert clear() == 0


def test_a_full_disk_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(cache, "write_atomically", write)
    with pytest.warns(RuntimeWarning, match="No space left"):
        put("kernel", "key", DATA)
    put("program", "key", DATA)


def test_off_keeps_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        put("kernel", "key", DATA)
    assert get("kernel", "key") is None
    assert not folder.exists()


def test_the_platforms_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEEDLE_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.folder() == tmp_path / "needle"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache.folder() == tmp_path / ".cache" / "needle"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder() == tmp_path / "Library" / "Caches" / "needle"


def test_the_least_recently_used_go(monkeypatch: pytest.MonkeyPatch) -> None:
    size = entry().stat().st_size
    clear()
    monkeypatch.setattr(cache, "LIMIT", 8 * size)
    monkeypatch.setattr(Usage, "size", None)
    for number in range(8):
        put("kernel", f"ke{number}", DATA)
        (found,) = (each for each in entries() if each.used > 1000)
        os.utime(found.path, (number, number))
    assert get("kernel", "ke0") == DATA  # now the one used last
    put("kernel", "ke8", DATA)
    kept = [number for number in range(9) if get("kernel", f"ke{number}")]
    assert kept == [0, 4, 5, 6, 7, 8]
    assert sum(each.size for each in entries()) <= 8 * size
    assert LIMIT == 256 << 20


def test_clear_removes_entries_and_nothing_else(folder: Path) -> None:
    put("kernel", "key", DATA)
    put("program", "key", DATA)
    (folder / "kernel" / ".killed.1.partial").write_bytes(b"half")
    others = [folder / "notes.txt", folder / "kernel" / "notes.txt", folder / ("0" * 64)]
    for path in others:
        path.write_text("mine")
    assert clear() == 0
    assert [path.read_text() for path in others] == ["mine"] * 3
    assert list((folder / "kernel").iterdir()) == [others[1]]
    assert get("kernel", "key") is None


def test_processes_at_once(folder: Path) -> None:
    code = (
        "from needle.compiler.cache import get, put\n"
        "for turn in range(20):\n"
        "    for key in range(5):\n"
        "        data = str(key).encode() * 50_000\n"
        "        put('kernel', str(key), data)\n"
        "        assert get('kernel', str(key)) == data\n"
    )
    running = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(3)]
    assert [each.wait(60) for each in running] == [0, 0, 0]
    assert len(list((folder / "kernel").iterdir())) == 5


def text(name: str) -> str:
    return f"define void @{name}() {{\n  ret void\n}}\n"


def test_a_kernel_is_compiled_once_for_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def make(name: str) -> str:
        made.append(name)
        return text(name)

    monkeypatch.setattr(engine, "ADDRESSES", {})
    first = engine.kernels([("test a", make), ("test b", make), ("test a", make)])
    assert len(made) == 2
    assert first[0] == first[2] != first[1]
    assert engine.kernel("test a", make) == first[0]
    monkeypatch.setattr(engine, "ADDRESSES", {})  # as another process
    engine.kernels([("test a", make), ("test b", make)])
    assert len(made) == 2
    for each in entries():
        each.path.write_bytes(each.path.read_bytes()[:-1])
    monkeypatch.setattr(engine, "ADDRESSES", {})
    engine.kernels([("test a", make), ("test b", make)])
    assert len(made) == 4


def test_the_command(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*args: str) -> str:
        monkeypatch.setattr(sys, "argv", ["needle", "cache", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return capsys.readouterr().out

    monkeypatch.setenv("COLUMNS", "300")
    size = entry().stat().st_size
    lines = [line.split() for line in run().splitlines()]
    assert lines[0] == ["kind", "entries", "bytes", "folder"]
    assert lines[1] == ["kernel", "1", f"{size:,}", str(folder / "kernel")]
    assert lines[2] == ["program", "0", "0", str(folder / "program")]
    assert run("--clear").startswith("removed 0.0 MiB from")
    assert entries() == []
    monkeypatch.setenv("NEEDLE_CACHE_DIR", "off")
    assert run().startswith("nothing is kept")
