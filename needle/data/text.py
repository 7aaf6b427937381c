"""Text: files of it, the Penn Treebank format, and windows of tokens for language models.

    read_text(path) -> a tokenizer's encode (tokenizers.py) -> TokenDataset(tokens, block_size)
    Corpus(folder) -> batchify -> get_batch, as in the course

In: a file or folder. Out: token ids. Next: tokenizers.py.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from needle.autograd import Tensor
from needle.backend.device import Device
from needle.data.dataset import Dataset, pick, takes_indices
from needle.data.stream import sample_rng
from needle.errors import expect
from needle.files import AnyPath, FileError

END_OF_SENTENCE = "<eos>"
MOST_BYTES = 1 << 30


def read_text(path: AnyPath, pattern: str = "**/*") -> str:
    """The text in a file, or in all files of a folder, in the order of their paths.

    UTF-8 (a byte order mark is dropped, CR LF becomes LF). pattern: a glob for the folder's files;
    hidden ones, and those that hold no UTF-8 text, are left out. FileNotFoundError where there is
    nothing, FileError where the file, or all of the folder, is no text, or more than 1 GiB.
    """
    root = Path(path)
    expected = "a file or folder of text"
    message = f"{path}: expected {expected}; received a path without one"
    expect(root.exists(), message, FileNotFoundError)
    if root.is_file():
        check_room(path, [root])
        return decode_text(root, root.read_bytes())
    parts = find_texts(root, pattern)
    expect(parts, f"{path}: expected {expected}; received a folder without text", FileError)
    return "".join(parts)


def find_texts(folder: Path, pattern: str) -> list[str]:
    """The texts in a folder's files, those that are none left out."""
    files = [path for path in sorted(folder.glob(pattern)) if is_plain(path.relative_to(folder))]
    files, texts = [path for path in files if path.is_file()], []
    check_room(folder, files)
    for path in files:
        with suppress(FileError):
            texts.append(decode_text(folder, path.read_bytes()))
    return [text for text in texts if text]


def is_plain(path: Path) -> bool:
    """Whether no part of a path is hidden."""
    return not any(part.startswith(".") for part in path.parts)


def check_room(path: AnyPath, files: list[Path]) -> None:
    size = sum(each.stat().st_size for each in files)
    expected = f"at most {MOST_BYTES:,} bytes of text"
    expect(size <= MOST_BYTES, f"{path}: expected {expected}; received {size:,}", FileError)


def decode_text(path: Path, content: bytes) -> str:
    """Bytes as text; FileError where they are none."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        received = f"byte {content[error.start]:#04x} at offset {error.start}"
        raise FileError(f"{path}: expected text in UTF-8; received {received}") from None
    zero = text.find("\0")
    expect(zero < 0, f"{path}: expected text; received a NUL at character {zero}", FileError)
    return text.replace("\r\n", "\n")


class TokenDataset(Dataset):
    """Windows of a sequence of tokens: sample i is (context, target), both (block_size,).

    context = tokens[s : s + block_size], target = tokens[s + 1 : s + block_size + 1], s = i stride

    stride: block_size by default, so that windows do not overlap. shift: a window begins up to
    stride - 1 tokens later, `randint(stride)` of `sample_rng()`, so that each epoch has others.
    ValueError where the tokens, (n,), are not more than block_size.
    """

    def __init__(
        self, tokens: Any, block_size: int, stride: int | None = None, shift: bool = False
    ) -> None:
        super().__init__()
        self.tokens, self.block_size = np.asarray(tokens), block_size
        self.stride, self.shift = stride or block_size, shift
        received = f"received block_size {block_size} and stride {self.stride}"
        expect(min(block_size, self.stride) > 0, f"TokenDataset: expected 1 or more; {received}")
        expected = f"more than {block_size} tokens (n,), since that is the block_size"
        fits = self.tokens.ndim == 1 and len(self.tokens) > block_size
        expect(fits, f"TokenDataset: expected {expected}; received shape {self.tokens.shape}")
        self.starts = np.arange(0, len(self.tokens) - block_size, self.stride)

    @takes_indices
    def __getitem__(self, index: Any) -> tuple[np.ndarray, np.ndarray]:
        starts = pick(self, self.starts, index)
        last = len(self.tokens) - self.block_size - 1
        if self.shift:
            starts = np.minimum(starts + sample_rng().randint(self.stride), last)
        found = self.tokens[starts[..., None] + np.arange(self.block_size + 1)]
        return found[..., :-1], found[..., 1:]

    def __len__(self) -> int:
        return len(self.starts)

    def changes_samples(self) -> bool:
        """Whether windows are shifted: then they are read one by one, each with its own draw."""
        return self.shift


# The course's names


class Dictionary:
    """Words and their ids, in the order of their first appearance."""

    def __init__(self) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []

    def add_word(self, word: str) -> int:
        """The id of a word, a new one if need be."""
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self) -> int:
        return len(self.idx2word)


class Corpus:
    """The Penn Treebank format (Marcus et al., 1993; Mikolov et al., 2010): train.txt and test.txt
    in a folder, a sentence per line, words between spaces.

    train, test: lists of word ids, with <eos> after each line; dictionary: the words of both, train
    first. max_lines: of each file. FileNotFoundError, FileError: a file is missing or no text.
    """

    def __init__(self, base_dir: AnyPath, max_lines: int | None = None) -> None:
        self.dictionary = Dictionary()
        self.train = self.tokenize(os.path.join(base_dir, "train.txt"), max_lines)
        self.test = self.tokenize(os.path.join(base_dir, "test.txt"), max_lines)

    def tokenize(self, path: AnyPath, max_lines: int | None = None) -> list[int]:
        """The ids of a file's words; new words enter the dictionary."""
        lines = read_text(path).splitlines()[:max_lines]
        return [self.dictionary.add_word(w) for x in lines for w in (*x.split(), END_OF_SENTENCE)]


def batchify(
    data: Any, batch_size: int, device: Device | None = None, dtype: Any = None
) -> np.ndarray:
    """Ids (n,) as columns of consecutive text, an array (n // batch_size, batch_size).

    What is left over is dropped. device: as in the course, where it has no part.
    """
    ids = np.asarray(data, dtype)
    rows = len(ids) // batch_size
    expected = f"at least {batch_size} ids, one per column"
    expect(rows, f"batchify: expected {expected}; received {len(ids)}")
    return np.ascontiguousarray(ids[: rows * batch_size].reshape(batch_size, rows).T)


def get_batch(
    batches: np.ndarray, i: int, bptt: int, device: Device | None = None, dtype: Any = None
) -> tuple[Tensor, Tensor]:
    """(data (m, batch_size), target (m * batch_size,)): rows i on, and those one later, flat.

    m = min(bptt, rows - 1 - i) time steps. IndexError where no row follows row i.
    """
    rows = min(bptt, len(batches) - 1 - i)
    expected = f"i from 0 to {len(batches) - 2}, and at least one step"
    fits = i >= 0 and rows > 0
    expect(fits, f"get_batch: expected {expected}; received i={i}, bptt={bptt}", IndexError)
    options: dict[str, Any] = {"device": device, "dtype": dtype, "requires_grad": False}
    target = batches[i + 1 : i + 1 + rows].reshape(-1)
    return Tensor(batches[i : i + rows], **options), Tensor(target, **options)
