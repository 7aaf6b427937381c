"""Text files, tokenizers, windows of tokens, and the course's Penn Treebank reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import needle as ndl
from needle.data import (
    ByteTokenizer,
    CharTokenizer,
    Corpus,
    DataLoader,
    HuggingFaceTokenizer,
    TokenDataset,
    batchify,
    get_batch,
    load_tokenizer,
    read_text,
)
from needle.data import text as text_module
from needle.files import FileError

texts = st.text(max_size=40)  # any code points but surrogates


# Tokenizers


@settings(max_examples=80, deadline=None)
@given(text=texts, more=texts)
def test_tokenizers_give_the_text_back(text: str, more: str) -> None:
    tokenizers = [ByteTokenizer()] + ([CharTokenizer(text + more)] if text + more else [])
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32
        assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == text
        assert "".join(tokenizer.stream(ids)) == text
        assert not len(ids) or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert ByteTokenizer().encode(text).tolist() == list(text.encode())


def test_a_vocabulary_is_in_order() -> None:
    tokenizer = CharTokenizer("banana\né")
    assert tokenizer.vocabulary == "\nabné"
    assert tokenizer.encode("nab").tolist() == [3, 1, 2]
    assert repr(tokenizer) == "CharTokenizer(vocab_size=5)"
    assert tokenizer.decode(ndl.Tensor(np.array([[3, 1]]))) == "na"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("x", "'x' at position 0 (line 1, column 1)"),
        ("a\nbb😀b", "'😀' at position 4 (line 2, column 3)"),
        ("ab\n\nZ", "'Z' at position 4 (line 3, column 1)"),
    ],
)
def test_an_unknown_character_is_named_with_its_place(text: str, where: str) -> None:
    with pytest.raises(ValueError, match="CharTokenizer: expected characters of its") as caught:
        CharTokenizer("ab\n").encode(text)
    assert str(caught.value).endswith(f"vocabulary of 3; received {where}")


def test_a_stream_waits_for_whole_characters() -> None:
    tokenizer = ByteTokenizer()
    assert [*tokenizer.stream(tokenizer.encode("aé€"))] == ["a", "é", "€"]
    assert [*tokenizer.stream([0xE2, 0x82])] == ["\ufffd"]  # a character that never ends
    long = "one line\n" * 20
    assert "".join(tokenizer.stream(tokenizer.encode(long))) == long


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([0, 7], ValueError, "expected ids below 2; received 7 at position 1"),
        ([-1], ValueError, "expected ids below 2; received -1 at position 0"),
        ([0.5], TypeError, "expected integer ids; received float64"),
    ],
)
def test_ids_that_no_text_has(ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"CharTokenizer: {message}"):
        CharTokenizer("ab").decode(ids)


def test_tokenizers_are_saved_as_json(tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    for tokenizer in (CharTokenizer("añ\ud800\n\"'"), ByteTokenizer()):
        tokenizer.save(file)
        assert json.loads(file.read_text())["format"] == "needle-tokenizer-1"
        found = load_tokenizer(file)
        assert type(found) is type(tokenizer)
        assert found.to_json() == tokenizer.to_json()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "7",
        "[]",
        "[" * 100_000,
        '{"format": "needle-tokenizer-1"}',
        '{"format": "needle-tokenizer-1", "kind": "word"}',
        '{"format": "needle-tokenizer-1", "kind": "char"}',
        '{"format": "needle-tokenizer-1", "kind": "char", "vocabulary": 5}',
        '{"format": "needle-tokenizer-1", "kind": "char", "vocabulary": ""}',
        '{"format": "needle-tokenizer-1", "kind": "char", "vocabulary": "ba"}',
        '{"format": "needle-tokenizer-1", "kind": "char", "vocabulary": "aa"}',
    ],
)
def test_forged_tokenizers_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(FileError, match=r"t\.json: expected a tokenizer in JSON; received"):
        load_tokenizer(tmp_path / "t.json")


def test_tokenizers_of_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("tokenizers", reason="the library tokenizers is not installed")
    words = {"[UNK]": 0, "the": 1, "cat": 2, "sat": 3}
    model = library.Tokenizer(library.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = library.pre_tokenizers.Whitespace()
    model.decoder = library.decoders.Fuse()
    tokenizer = HuggingFaceTokenizer(model)
    assert tokenizer.vocab_size == 4
    assert tokenizer.encode("the dog sat").tolist() == [1, 0, 3]
    tokenizer.save(tmp_path / "t.json")
    found = load_tokenizer(tmp_path / "t.json")
    assert found.encode("cat sat").tolist() == [2, 3]
    assert found.decode([2, 3]) == model.decode([2, 3])
    (tmp_path / "t.json").write_text('{"model": 7}')
    with pytest.raises(FileError, match=r"expected a tokenizer\.json of the library tokenizers"):
        load_tokenizer(tmp_path / "t.json")


def test_tokenizers_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "t.json").write_text('{"model": {}}')
    with pytest.raises(ImportError, match=r"pip install needle-dl\[text\]"):
        load_tokenizer(tmp_path / "t.json")


# Files


def test_text_of_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfb\r\nc\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "z.py").write_text("first é\n")
    (tmp_path / "picture").write_bytes(b"\x89PNG\xff\xfe")
    (tmp_path / "zeros").write_bytes(b"a\0b")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("no")
    assert read_text(tmp_path / "b.txt") == "b\nc\n"
    assert read_text(tmp_path) == "first é\nb\nc\n"
    assert read_text(tmp_path, "*.txt") == "b\nc\n"


def test_text_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"abc\xff")
    (tmp_path / "y").write_bytes(b"ab\0")
    cases: list[tuple[str, type[Exception], str]] = [
        ("x", FileError, r"x: expected text in UTF-8; received byte 0xff at offset 3"),
        ("y", FileError, r"y: expected text; received a NUL at character 2"),
        ("none", FileNotFoundError, "none: expected a file or folder of text; received a path"),
        ("", FileError, "expected a file or folder of text; received a folder without text"),
    ]
    for name, error, message in cases:
        with pytest.raises(error, match=message):
            read_text(tmp_path / name)
    monkeypatch.setattr(text_module, "MOST_BYTES", 6)
    for name in ("", "x"):
        if name == "x":
            (tmp_path / "x").write_bytes(b"abcdefg")
        with pytest.raises(FileError, match="expected at most 6 bytes of text; received 7"):
            read_text(tmp_path / name)


# Windows


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 60), block=st.integers(1, 20), stride=st.none() | st.integers(1, 25),
    shift=st.booleans(), seed=st.integers(0, 9),
)  # fmt: skip
def test_windows(size: int, block: int, stride: int | None, shift: bool, seed: int) -> None:
    tokens = np.random.default_rng(0).integers(0, 99, size)
    if size <= block:
        with pytest.raises(ValueError, match=f"expected more than {block} tokens"):
            TokenDataset(tokens, block, stride, shift)
        return
    data, step = TokenDataset(tokens, block, stride, shift), stride or block
    wholes = [tokens[s : s + block + 1] for s in range(size)]
    starts = [s for s in range(0, size, step) if len(wholes[s]) == block + 1]
    assert len(data) == len(starts)
    np.random.seed(seed)
    for i, s in enumerate(starts):
        x, y = data[i]
        allowed = wholes[s : s + (step if shift else 1)]
        assert any(np.array_equal(np.append(x, y[-1]), each) for each in allowed)
        np.testing.assert_array_equal(x[1:], y[:-1])
    with pytest.raises(IndexError, match="TokenDataset: expected indices from"):
        data[len(starts)]


def test_windows_in_a_loader() -> None:
    tokens = np.arange(1000, dtype=np.int32)
    plain = [x.numpy() for x, _ in DataLoader(TokenDataset(tokens, 8), 5)]
    np.testing.assert_array_equal(np.concatenate(plain).ravel(), tokens[: 124 * 8])
    loader = DataLoader(TokenDataset(tokens, 8, shift=True), 5, shuffle=True, seed=3)
    first, second = ([(x.numpy(), y.numpy()) for x, y in loader] for _ in range(2))
    starts = np.concatenate([x[:, 0] for x, _ in first])
    assert len(set((starts // 8).tolist())) > 100  # every region once, the last ones cut
    assert len(set((starts % 8).tolist())) == 8  # at any place
    assert not np.array_equal(starts, np.concatenate([x[:, 0] for x, _ in second]))
    for x, y in first:
        np.testing.assert_array_equal(y, x + 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TokenDataset([[1, 2]], 1), r"expected more than 1 tokens \(n,\), .* \(1, 2\)"),
        (lambda: TokenDataset([1, 2], 0), "expected 1 or more; received block_size 0"),
        (lambda: TokenDataset([1, 2], 1, -1), "received block_size 1 and stride -1"),
    ],
)
def test_windows_that_cannot_be(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# The course's Penn Treebank


@pytest.fixture
def treebank(tmp_path: Path) -> Path:
    (tmp_path / "train.txt").write_text(" the cat sat \n the dog <unk> the cat \n")
    (tmp_path / "test.txt").write_text(" a dog sat \n")
    return tmp_path


def test_a_corpus(treebank: Path) -> None:
    corpus = Corpus(str(treebank))
    words = ["the", "cat", "sat", "<eos>", "dog", "<unk>", "a"]
    assert corpus.dictionary.idx2word == words
    assert corpus.dictionary.word2idx == {word: i for i, word in enumerate(words)}
    assert len(corpus.dictionary) == 7
    assert corpus.train == [0, 1, 2, 3, 0, 4, 5, 0, 1, 3]
    assert corpus.test == [6, 4, 2, 3]
    assert Corpus(treebank, max_lines=1).train == [0, 1, 2, 3]
    (treebank / "test.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"test\.txt: expected a file or folder of text"):
        Corpus(treebank)


def test_batches_of_a_corpus() -> None:
    batches = batchify(list(range(11)), 2, device=ndl.cpu(), dtype="float32")
    assert batches.tolist() == [[0, 5], [1, 6], [2, 7], [3, 8], [4, 9]]
    assert batches.dtype == np.float32
    data, target = get_batch(batches, 1, 2, device=ndl.cpu_numpy(), dtype="float32")
    assert data.numpy().tolist() == [[1, 6], [2, 7]]
    assert target.numpy().tolist() == [2, 7, 3, 8]
    assert data.device == target.device == ndl.cpu_numpy()
    data, target = get_batch(batches, 3, 40)
    assert (data.shape, target.shape) == ((1, 2), (2,))
    for i, bptt in ((4, 2), (-1, 2), (0, 0)):
        with pytest.raises(IndexError, match=f"get_batch: expected i from 0 to 3.*i={i}, "):
            get_batch(batches, i, bptt)
    with pytest.raises(ValueError, match="batchify: expected at least 3 ids, one per column"):
        batchify([1, 2], 3, None)
