"""Tokenizers: text to token ids and back, kept as JSON.

    {"format": "needle-tokenizer-1", "kind": "char", "vocabulary": "\\n !,.ab..."}

A tokenizer.json of Hugging Face's library `tokenizers` (the extra `text`) is read and written as it
is. In: text. Out: int32 arrays (n,). Next: loader.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from needle.errors import expect
from needle.files import AnyPath, import_extra, reading, write_atomically

FORMAT = "needle-tokenizer-1"


class Tokenizer:
    """The interface. Ids are below `vocab_size`; `decode(encode(text)) == text` where the
    vocabulary has all of the text."""

    kind = ""
    vocab_size: int

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text, int32 (n,)."""
        raise NotImplementedError(f"{type(self).__name__}: write encode(text)")

    def decode(self, ids: Any) -> str:
        """The text of ids: a list, an array or a Tensor; ValueError for one out of range."""
        raise NotImplementedError(f"{type(self).__name__}: write decode(ids)")

    def to_json(self) -> str:
        """What `save` writes."""
        return json.dumps({"format": FORMAT, "kind": self.kind})

    def save(self, path: AnyPath) -> None:
        """Write a JSON that `load_tokenizer` reads; OSError as in `write_atomically`."""
        write_atomically(path, self.to_json().encode())

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of ids as they come, in whole characters."""
        seen: list[int] = []
        told = text = ""
        for token in ids:
            seen.append(int(token))
            text = self.decode(seen)
            if not text.endswith("\ufffd"):  # else the bytes of a character are still to come
                yield text[len(told) :]
                told = text
                if len(seen) > 64 and text.endswith("\n"):  # where tokenizers begin afresh
                    seen, told, text = [], "", ""
        if text != told:
            yield text[len(told) :]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(vocab_size={self.vocab_size})"


class CharTokenizer(Tokenizer):
    """A token per character (code point); the vocabulary is that of a text, in order.

    encode: ValueError for a character out of the vocabulary, with its place.
    """

    kind = "char"

    def __init__(self, text: Iterable[str]) -> None:
        self.vocabulary = "".join(sorted(set(text)))
        self.vocab_size = len(self.vocabulary)
        expect(self.vocab_size, "CharTokenizer: expected a text with a character; received none")
        self.points = code_points(self.vocabulary)

    def encode(self, text: str) -> np.ndarray:
        points = code_points(text)
        found = np.searchsorted(self.points, points).clip(max=self.vocab_size - 1)
        odd = np.flatnonzero(self.points[found] != points)
        if len(odd):
            at = int(odd[0])
            line, column = text.count("\n", 0, at) + 1, at - text.rfind("\n", 0, at)
            where = f"at position {at} (line {line}, column {column})"
            expected = f"characters of its vocabulary of {self.vocab_size}"
            raise ValueError(f"CharTokenizer: expected {expected}; received {text[at]!r} {where}")
        return found.astype(np.int32)

    def decode(self, ids: Any) -> str:
        return "".join(map(self.vocabulary.__getitem__, as_ids(self, ids).tolist()))

    def to_json(self) -> str:
        kept = {"format": FORMAT, "kind": self.kind, "vocabulary": self.vocabulary}
        return json.dumps(kept)


class ByteTokenizer(Tokenizer):
    """A token per byte of UTF-8: 256 ids, nothing is unknown. Bytes that are no UTF-8 decode as
    U+FFFD."""

    kind = "byte"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.int32)

    def decode(self, ids: Any) -> str:
        return as_ids(self, ids).astype(np.uint8).tobytes().decode("utf-8", "replace")


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer of the library `tokenizers`: one of its objects, or what its tokenizer.json says.

    decode leaves special tokens out. ImportError without the library, FileError for a bad file.
    """

    def __init__(self, source: Any) -> None:
        self.model = source
        if isinstance(source, str):
            self.model = import_extra("tokenizers", "text").Tokenizer.from_str(source)
        self.vocab_size = self.model.get_vocab_size()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.model.encode(text).ids, np.int32)

    def decode(self, ids: Any) -> str:
        return str(self.model.decode(as_ids(self, ids).tolist()))

    def to_json(self) -> str:
        return str(self.model.to_str())


def load_tokenizer(path: AnyPath) -> Tokenizer:
    """The tokenizer in a file that `save` or the library `tokenizers` wrote.

    FileError where it is of another kind, truncated or forged; ImportError where it needs the
    extra `text`.
    """
    content = Path(path).read_bytes()
    with reading(path, "a tokenizer in JSON"):
        text = content.decode()
        found = json.loads(text)
        own = found.get("format") == FORMAT
        if own and found["kind"] == ByteTokenizer.kind:
            return ByteTokenizer()
        if own:
            expect(found["kind"] == CharTokenizer.kind, f"kind {found['kind']!r:.40}")
            tokenizer = CharTokenizer(found["vocabulary"])
            fits = tokenizer.vocabulary == found["vocabulary"]
            expect(fits, "a vocabulary that is not of distinct characters in order")
            return tokenizer
    library = import_extra("tokenizers", "text")
    with reading(path, "a tokenizer.json of the library tokenizers"):
        return HuggingFaceTokenizer(library.Tokenizer.from_str(text))


def code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def as_ids(tokenizer: Tokenizer, ids: Any) -> np.ndarray:
    """Ids as a flat array of integers."""
    found = np.asarray(ids.numpy() if hasattr(ids, "numpy") else ids).reshape(-1)
    if found.size == 0:
        return found.astype(np.int64)
    name = type(tokenizer).__name__
    message = f"{name}: expected integer ids; received {found.dtype}"
    expect(found.dtype.kind in "iu", message, TypeError)
    odd = np.flatnonzero((found < 0) | (found >= tokenizer.vocab_size))
    if len(odd):
        received = f"{found[odd[0]]} at position {odd[0]}"
        raise ValueError(f"{name}: expected ids below {tokenizer.vocab_size}; received {received}")
    return found
