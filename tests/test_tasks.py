"""Runs on text, on larger images and in colour: what a task brings, and the same bits after an end.

The runs are as small as they can be; what LSTM, GPT and ResNet compute is tested beside them.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_cli import fails, needle  # noqa: F401 - the fixture
from test_pictures import write_cifar10
from test_train import heed_interrupts, interrupt, results, stop_at  # noqa: F401 - a fixture

import needle as ndl
from needle.data import ByteTokenizer, CharTokenizer
from needle.files import FileError
from needle.train import (
    LANGUAGE_MODELS,
    Interrupted,
    TextDataset,
    TrainConfig,
    Trainer,
    class_probabilities,
    evaluate,
    load_model,
    load_vocabulary,
    make_model,
    make_tokenizer,
    measures,
    open_data,
    open_run,
    read_image,
    read_metrics,
    write_text,
)
from needle.train.model import state_size
from needle.train.task import enlarge, read_texts
from needle.train.trainer import make_optimizer, make_schedule

Needle = Callable[..., tuple[int, str, str]]
TEXT = "the quick brown fox jumps over the lazy dog; " * 20  # 900 characters
# 810 characters to train with, in windows of 8: 101 of them, 7 steps per epoch of 14 windows.
SMALL: dict[str, Any] = {
    "hidden_dim": 8, "num_blocks": 1, "block_size": 8, "batch_size": 14, "max_steps": 18,
    "eval_every": 6, "eval_samples": 5, "checkpoint_every": 4, "warmup_steps": 3, "dropout": 0.1,
}  # fmt: skip
TINY = [x for key, value in SMALL.items() for x in (f"--{key.replace('_', '-')}", str(value))]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    return file


def config(text: Path, model: str = "lstm", **given: Any) -> TrainConfig:
    return TrainConfig.for_data(model=model, data_dir=str(text), **{**SMALL, **given})


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def whole(tmp_path_factory: pytest.TempPathFactory, request: Any) -> tuple[str, Path]:
    """A model and its run, which nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "text.txt").write_text(TEXT)
    trainer = Trainer.start(config(folder / "text.txt", request.param), folder, "whole")
    trainer.fit()
    return request.param, trainer.path


# Runs on text


def test_a_run_on_text_leaves_its_files(whole: tuple[str, Path]) -> None:
    path, chosen = open_run(whole[1])
    assert chosen.vocab_size == len(set(TEXT))
    tokenizer = load_vocabulary(path, chosen)
    assert isinstance(tokenizer, CharTokenizer)
    assert tokenizer.vocabulary == "".join(sorted(set(TEXT)))
    records = read_metrics(path / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    tests = [record for record in records if record["kind"] == "evaluation"]
    assert [record["step"] for record in steps] == list(range(1, 19))
    assert [record["epoch"] for record in steps] == [1] * 7 + [2] * 7 + [3] * 4
    assert [record["step"] for record in tests] == [6, 12, 18]
    for record in steps:
        assert record["perplexity"] == pytest.approx(math.exp(record["loss"]))
        assert record["bits_per_character"] == pytest.approx(record["loss"] / math.log(2))
    assert steps[0]["loss"] == pytest.approx(math.log(len(set(TEXT))), rel=0.3)
    mean = np.mean([record["loss"] for record in steps[6:12]])
    assert tests[1]["train_loss"] == pytest.approx(mean)
    assert tests[2]["test_loss"] < tests[0]["test_loss"]
    found = evaluate(load_model(path, chosen), open_data(chosen, False, tokenizer), None)
    assert (found.loss, found.accuracy) == (tests[2]["test_loss"], tests[2]["test_accuracy"])
    assert found.samples == 8 * len(open_data(chosen, False, tokenizer))
    assert found.confusion is None


def test_evaluation_of_text_is_what_numpy_says(text: Path) -> None:
    chosen = config(text, eval_samples=0, vocab_size=len(set(TEXT)))
    data = open_data(chosen, False)
    assert len(data) == 11  # windows of 8 in 90 characters
    ndl.seed(3)
    model = make_model(chosen).eval()
    found = evaluate(model, data, None)
    x, y = data[:]
    logits = model(ndl.Tensor(x)).numpy().astype(np.float64)
    assert logits.shape == (11, 8, len(set(TEXT)))
    likelihood = logits - np.log(np.exp(logits).sum(2, keepdims=True))
    loss = -np.take_along_axis(likelihood, y[..., None], 2).mean()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert found.accuracy == np.mean(logits.argmax(2) == y)


@pytest.mark.parametrize("step", [3, 6, 7, 14])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    whole: tuple[str, Path], text: Path, tmp_path: Path, step: int
) -> None:
    """In an epoch, at an evaluation, and at the ends of epochs that no evaluation follows."""
    trainer = Trainer.start(config(text, whole[0]), tmp_path, "a")
    with pytest.raises(Interrupted):
        trainer.fit(stop_at(step, interrupt))
    trainer = Trainer.resume("a", tmp_path)
    assert trainer.progress.step == (7 if step == 6 else step)
    trainer.fit()
    assert results(trainer.path) == results(whole[1])


def test_a_run_without_jit_has_the_same_bits(
    whole: tuple[str, Path], text: Path, tmp_path: Path
) -> None:
    trainer = Trainer.start(config(text, whole[0], jit=False), tmp_path, "a")
    trainer.fit()
    assert results(trainer.path) == results(whole[1])


KILLED = """
import os, signal, sys
from needle.train import TrainConfig, Trainer
import test_tasks
from pathlib import Path
def watch(progress):
    if progress.step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.start(test_tasks.config(Path(sys.argv[1]), sys.argv[3]), sys.argv[2], "a").fit(watch)
"""


@pytest.mark.parametrize("whole", ["lstm"], indirect=True)
def test_a_killed_run_goes_on_to_the_same_bits(
    whole: tuple[str, Path], text: Path, tmp_path: Path
) -> None:
    paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    command = [sys.executable, "-c", KILLED, str(text), str(tmp_path), whole[0]]
    ended = subprocess.run(command, check=False, env={**os.environ, "PYTHONPATH": paths})
    assert ended.returncode == -signal.SIGKILL
    trainer = Trainer.resume(tmp_path / "a")
    assert trainer.progress.step == 8
    trainer.fit()
    assert results(trainer.path) == results(whole[1])


def test_a_run_that_was_killed_before_its_first_checkpoint(text: Path, tmp_path: Path) -> None:
    Trainer.start(config(text), tmp_path, "a")
    assert sorted(os.listdir(tmp_path / "a")) == ["config.json", "tokenizer.json"]
    assert Trainer.resume("a", tmp_path).progress.step == 0


def test_nothing_is_left_of_a_run_on_text_that_cannot_begin(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*paths: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        Trainer.start(config(text), tmp_path / "runs", "a")
    assert not os.listdir(tmp_path / "runs")


def test_text_and_tokenizer_that_changed(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        Trainer.start(config(text), tmp_path, "a").fit(stop_at(3, interrupt))
    text.write_text(TEXT + "ß")
    with pytest.raises(ValueError, match=r"expected characters of its .* received 'ß' at position"):
        Trainer.resume("a", tmp_path)
    text.write_text(TEXT[:700])
    with pytest.raises(FileError, match=r"checkpoint\.safetensors: expected a checkpoint of this"):
        Trainer.resume("a", tmp_path)
    text.write_text(TEXT)
    CharTokenizer("abc").save(tmp_path / "a" / "tokenizer.json")
    expected = r"tokenizer\.json: expected a vocabulary of 28, as in config\.json; received .* of 3"
    with pytest.raises(FileError, match=expected):
        Trainer.resume("a", tmp_path)


def test_texts_and_their_parts(tmp_path: Path) -> None:
    def texts(path: Path | None) -> tuple[str, str]:
        place = None if path is None else str(path)
        return read_texts(TrainConfig.for_data(model="gpt", data_dir=place))

    (tmp_path / "b.txt").write_text("y" * 10)
    (tmp_path / "a.txt").write_text("x" * 30)
    assert texts(tmp_path) == ("x" * 30 + "y" * 6, "y" * 4)
    (tmp_path / "train.txt").write_text("train")
    (tmp_path / "test.txt").write_text("test")
    assert texts(tmp_path) == ("train", "test")
    (tmp_path / "valid.txt").write_text("valid")
    assert texts(tmp_path) == ("train", "valid")
    train, test = texts(None)
    library = Path(os.__file__).read_text()  # one of the standard library's modules
    assert library in train + test
    assert len(train) > 1_000_000
    assert len(train) == int(0.9 * len(train + test))


def test_tokenizers_by_name_and_bits_per_character(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("äöü " * 200)
    given = {"data_dir": str(tmp_path / "t.txt"), "block_size": 8}
    assert isinstance(make_tokenizer(TrainConfig.for_data(model="gpt", **given)), CharTokenizer)
    chosen = TrainConfig.for_data(model="gpt", tokenizer="byte", **given)
    assert isinstance(make_tokenizer(chosen), ByteTokenizer)
    CharTokenizer("äöüß ").save(tmp_path / "v.json")
    kept = TrainConfig.for_data(model="gpt", tokenizer=str(tmp_path / "v.json"), **given)
    assert make_tokenizer(kept).vocab_size == 5
    data = open_data(chosen, True)
    assert isinstance(data, TextDataset)
    assert data.tokens_per_character == 7 / 4
    assert measures(data, math.log(2), 0.5)["bits_per_character"] == pytest.approx(7 / 4)
    assert measures(data, 1e9, 0.0)["perplexity"] < math.inf
    assert "perplexity" not in measures(open_data(TrainConfig(), False), 1.0, 0.5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "gpt", "data": "digits"}, "data: expected text for gpt; received digits"),
        ({"data": "text"}, "data: expected a data set of images for mlp_resnet; received text"),
        ({"model": "gpt", "num_heads": 5}, "hidden_dim: expected a multiple of num_heads; rec"),
        ({"model": "gpt", "block_size": 0}, "block_size: expected an integer from 1"),
        ({"tokenizer": ""}, "tokenizer: expected char, byte or the path of a tokenizer.json"),
        ({"beta2": 1.0}, "beta2: expected a number of at least 0 and below 1"),
    ],
)
def test_configurations_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.for_data(**given)


def test_defaults_follow_from_the_model() -> None:
    gpt = TrainConfig.for_data(model="gpt")
    shape = gpt.num_blocks, gpt.num_heads, gpt.hidden_dim, gpt.block_size, gpt.batch_size
    assert shape == (4, 4, 128, 64, 12)  # nanoGPT's, for a CPU
    rates = gpt.lr, gpt.min_lr, gpt.warmup_steps, gpt.max_steps, gpt.beta2, gpt.weight_decay
    assert rates == (1e-3, 1e-4, 100, 2000, 0.99, 0.1)
    assert (gpt.bias, gpt.dropout, gpt.max_norm, gpt.data) == (False, 0.0, 1.0, "text")
    assert TrainConfig.for_data(model="gpt", epochs=2).max_steps == 0
    assert TrainConfig.for_data(model="gpt", epochs=2, max_steps=9).max_steps == 9
    assert TrainConfig.for_data(model="resnet9").data == "digits"


# Generation


def test_text_is_written_as_the_whole_prefix_says(whole: tuple[str, Path]) -> None:
    """The likeliest token after all so far, by a plain forward pass; a context of 8 that is full
    goes on with its last 4."""
    path, chosen = open_run(whole[1])
    model, tokenizer = load_model(path, chosen).eval(), load_vocabulary(path, chosen)
    assert tokenizer is not None
    context, expected = "the quick", ""
    for _ in range(12):
        if whole[0] == "gpt" and len(context) >= 8:
            context = context[-4:]
        logits = model(ndl.Tensor(tokenizer.encode(context)[None])).numpy()
        expected += tokenizer.decode([int(logits[0, -1].argmax())])
        context += expected[-1]
    pieces = [*write_text(model, tokenizer, "the quick", 12, temperature=0.0)]
    assert len(pieces) == 12
    assert "".join(pieces) == expected


def test_generate(needle: Needle, whole: tuple[str, Path]) -> None:  # noqa: F811
    run = str(whole[1])
    first = needle("generate", run, "--prompt", "dog", "--max-tokens", "30", "--seed", "3")
    assert first[0] == 0
    assert first[1].startswith("dog")
    assert len(first[1]) == 3 + 30 + 1
    again = needle("generate", run, "--prompt", "dog", "--max-tokens", "30", "--seed", "3")
    other = needle("generate", run, "--prompt", "dog", "--max-tokens", "30", "--seed", "4")
    assert first == again != other
    for arguments, message in (
        (["--prompt", "dög"], "expected characters of its vocabulary of 28; received 'ö' at posi"),
        (["--prompt", ""], "generate: expected a prompt of at least one token; received none"),
        (["--temperature", "-1"], "generate: expected a temperature of at least 0; received -1.0"),
        (["--top-k", "0"], "generate: expected top_k of at least 1; received 0"),
        (["--top-p", "nan"], "generate: expected top_p above 0 and up to 1; received nan"),
    ):
        fails(needle("generate", run, *(["--prompt", "dog"] + arguments)), message)


# Optimizer, schedule, sizes


def test_vectors_may_be_left_out_of_weight_decay() -> None:
    chosen = TrainConfig(optimizer="adamw", decay_vectors=False, beta1=0.8, beta2=0.95)
    model = make_model(chosen)
    matrices, vectors = make_optimizer(chosen, model).param_groups
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.001, 0.0)
    assert (matrices["beta1"], vectors["beta2"]) == (0.8, 0.95)
    names = {id(p): name for name, p in model.named_parameters()}
    found = [names[id(p)].rsplit(".")[-1] for p in matrices["params"]]
    assert found == ["weight"] * 8  # of Linear; those of BatchNorm are vectors, as are biases
    assert len(vectors["params"]) == 8 + 2 * 6
    (group,) = make_optimizer(TrainConfig(optimizer="adamw"), model).param_groups
    assert group["weight_decay"] == 0.001


def test_warm_up_then_a_cosine_to_the_least() -> None:
    chosen = TrainConfig.for_data(model="gpt")
    optimizer = make_optimizer(chosen, make_model(TrainConfig()))
    schedule, rates = make_schedule(chosen, optimizer, 2000), [optimizer.lr]
    for _ in range(2000):
        schedule.step()
        rates.append(optimizer.lr)
    for step in (0, 50, 99):  # nanoGPT's get_lr
        assert rates[step] == pytest.approx(1e-3 * (step + 1) / 101)
    for step in (100, 1000, 1999):
        share = (step - 100) / 1900
        expected = 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4
        assert rates[step] == pytest.approx(expected)
    short = make_schedule(chosen, make_optimizer(chosen, make_model(TrainConfig())), 10)
    assert short.options["warmup_steps"] == 5


def test_gradients_are_clipped(text: Path, tmp_path: Path) -> None:
    """With SGD the step's length is lr times the norm, which is at most max_norm."""
    given = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "schedule": "constant"}
    given |= {"warmup_steps": 0, "lr": 1.0, "max_norm": 0.01, "max_steps": 1}
    trainer = Trainer.start(config(text, **given), tmp_path)
    before = [p.numpy().copy() for p in trainer.model.parameters()]
    trainer.fit()
    moved = [p.numpy() - x for p, x in zip(trainer.model.parameters(), before, strict=True)]
    assert math.sqrt(sum(float((x**2).sum()) for x in moved)) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("model", LANGUAGE_MODELS)
@pytest.mark.parametrize("given", [{}, {"num_blocks": 2, "hidden_dim": 12, "bias": True}])
def test_the_size_of_a_model_is_known_beforehand(
    text: Path, model: str, given: dict[str, Any]
) -> None:
    chosen = config(text, model, vocab_size=31, **given)
    held = make_model(chosen).state_dict().values()
    assert state_size(chosen) == sum(tensor.size for tensor in held)


# Larger images, and colour


def test_images_are_enlarged_to_32_pixels() -> None:
    x = np.random.default_rng(0).integers(0, 17, (2, 8, 8, 1), np.uint8)
    found = enlarge(x)
    assert found.shape == (2, 32, 32, 3)
    for i in range(32):
        for j in range(32):
            np.testing.assert_array_equal(found[:, i, j], x[:, i // 4, j // 4].repeat(3, 1))
    padded = enlarge(np.ones((1, 28, 28, 1)))
    assert padded.sum() == 3 * 28 * 28
    assert padded[0, 2:30, 2:30].all()
    colour = np.random.default_rng(0).random((1, 32, 32, 3))
    np.testing.assert_array_equal(enlarge(colour), colour)


def test_cifar_needs_its_folder() -> None:
    with pytest.raises(ValueError, match="cifar10: expected the folder that CIFAR's binary archi"):
        open_data(TrainConfig.for_data("cifar10"), True)


@pytest.mark.parametrize("model", ["mlp_resnet", "resnet9"])
def test_a_run_in_colour(needle: Needle, tmp_path: Path, model: str) -> None:  # noqa: F811
    pillow = pytest.importorskip("PIL.Image")
    folder = tmp_path / "cifar"
    folder.mkdir()
    write_cifar10(folder, binary=True)
    data = ["--data", "cifar10", "--data-dir", "cifar", "--batch-size", "8", "--epochs", "1"]
    code, out, err = needle("train", model, *data, "--hidden-dim", "4", "--name", "a")
    assert (code, err) == (0, "")
    code, out, _ = needle("eval", "a")
    assert code == 0
    assert "9 truck" in out
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    pillow.fromarray(pixels).save("x.png")
    image = read_image("x.png", (32, 32, 3))
    np.testing.assert_array_equal(image, pixels / np.float32(255))
    expected = class_probabilities(load_model(*open_run("a", "runs")), image)
    code, out, err = needle("predict", "a", "x.png")
    assert (code, err) == (0, "")
    assert f"({expected.max():.1%})" in out.splitlines()[-1]


def test_a_wide_picture_in_colour_is_cut_to_its_middle(tmp_path: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    wide = np.zeros((64, 100, 3), np.uint8)
    wide[:, 18:82] = np.linspace(0, 252, 64, dtype=np.uint8)[:, None, None]
    wide[:, 50:82, 0] = 0
    pillow.fromarray(wide).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", (32, 32, 3))
    assert found.dtype == np.float32
    rows = (0.5 + np.arange(32)) / 32  # a pixel is the middle of the two that it covers
    np.testing.assert_allclose(found[1:-1, 2:14, 1], rows[1:-1, None].repeat(12, 1), atol=0.02)
    assert found[..., 1].min(1)[1:].all()  # no margin is left
    assert not found[:, 18:, 0].any()


# Folders of pictures


def write_pictures(folder: Path, counts: dict[str, int]) -> None:
    """Pictures of other sizes and modes, light for the first class, dark for the others."""
    pillow = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for index, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            size = (40 + 3 * number, 50 - number, 3)
            pixels = rng.integers(0, 100, size, np.uint8) + np.uint8(0 if index else 150)
            image = pillow.fromarray(pixels)
            image.convert("L" if number % 2 else "RGB").save(folder / name / f"{number:02}.png")


def test_a_run_on_a_folder_of_pictures(needle: Needle, tmp_path: Path) -> None:  # noqa: F811
    write_pictures(tmp_path / "pictures", {"[b]a": 14, "dark ones": 10})
    given = ["--data-dir", "pictures", "--batch-size", "8", "--epochs", "4", "--name", "a"]
    code, out, err = needle("train", "resnet9", *given)
    assert (code, err) == (0, "")
    assert "\n22 and 2 pictures to train and test with, 2 classes\n" in out
    path, config = open_run("a", "runs")
    assert (config.data, config.classes) == ("folder", ("[b]a", "dark ones"))
    assert [
        x["train_accuracy"] for x in read_metrics(path / "metrics.jsonl") if x["kind"] == "epoch"
    ][-1] > 0.8
    code, out, err = needle("eval", "a")
    assert (code, err) == (0, "")
    assert re.search(r"test accuracy +\d+.00% of 2 samples\n", out)
    assert "0 [b]a" in out
    shutil.move("pictures", "elsewhere")
    code, out, err = needle("predict", "a", "elsewhere/[b]a/00.png")
    assert (code, err) == (0, "")
    assert "[b]a" in out.splitlines()[0]
    assert needle("eval", "a", "--data-dir", "elsewhere")[0] == 0
    shutil.move("elsewhere/dark ones", "elsewhere/dim ones")
    fails(
        needle("eval", "a", "--data-dir", "elsewhere"),
        "folder: expected ('[b]a', 'dark ones'); received ('[b]a', 'dim ones') in elsewhere",
    )
    whole = json.loads(Path("runs/a/config.json").read_text())
    for forged, message in (
        (["x"], "model.safetensors: expected the model in config.json"),
        ([], "a run; received content that is none: a folder without classes"),
        ([1], "config.json: expected the configuration of a run; received content"),
        (None, "config.json: expected the configuration of a run; received content"),
    ):
        Path("runs/a/config.json").write_text(json.dumps({**whole, "classes": forged}))
        fails(needle("predict", "a", "elsewhere/[b]a/00.png"), message)


@pytest.mark.parametrize("tests", ["test", "val"])
def test_a_folder_may_say_what_trains_and_what_tests(tests: str, tmp_path: Path) -> None:
    write_pictures(tmp_path / "train", {"a": 2, "b": 1})
    write_pictures(tmp_path / tests, {"a": 1, "b": 2})
    for model, shape in (("mlp_resnet", (32, 32, 3)), ("resnet9", (3, 32, 32))):
        given = TrainConfig.for_data(model=model, data_dir=str(tmp_path))
        train, test = open_data(given, True), open_data(given, False)
        assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1], [0, 1, 1])
        image, label = test[1]
        assert (image.shape, image.dtype, label) == (shape, np.float32, 1)
        expected = read_image(tmp_path / tests / "b" / "00.png", (32, 32, 3))
        np.testing.assert_array_equal(
            image, np.moveaxis(expected, -1, 0) if shape[0] == 3 else expected
        )
        assert train.transforms
        assert not test.transforms
    (tmp_path / tests / "a").rename(tmp_path / tests / "c")
    with pytest.raises(
        ValueError, match=r"folder: expected \['a', 'b'\] in .*; received \['b', 'c'\]"
    ):
        open_data(given, True)


@pytest.mark.parametrize(
    ("counts", "spoil", "message"),
    [
        ({}, "", "ImageFolder: expected a folder; received pictures, a path without one"),
        ({"train": 12}, "", "expected two classes and ten pictures at least; received 1 and 12"),
        ({"a": 3, "b": 3}, "", "expected two classes and ten pictures at least; received 2 and 6"),
        ({"a": 9, "b": 0}, "", "ImageFolder: expected pictures (.png, "),
        ({"a": 9, "b": 3}, "b/01.png", "01.png: expected a picture (PNG, JPEG, BMP, GIF, WEBP)"),
    ],
)  # fmt: skip
def test_folders_that_are_refused(
    needle: Needle,  # noqa: F811
    tmp_path: Path,
    counts: dict[str, int],
    spoil: str,
    message: str,
) -> None:
    write_pictures(tmp_path / "pictures", counts)
    if spoil:
        (tmp_path / "pictures" / spoil).write_bytes(b"none")
    fails(needle("train", "resnet9", "--data-dir", "pictures"), message)
    fails(
        needle("train", "resnet9", "--data", "folder"), "folder: expected a folder of pictures for"
    )
    assert not Path("runs").exists()


def test_resnet9_learns_digits(needle: Needle) -> None:  # noqa: F811
    code, out, err = needle("train", "resnet9", "--epochs", "1", "--name", "a")
    assert (code, err) == (0, "")
    assert out.startswith("resnet9 with 431,946 parameters on digits, cpu\n")
    assert read_metrics(Path("runs/a/metrics.jsonl"))[-1]["test_accuracy"] > 0.8
    expected = "generate: expected a run on text; received resnet9 on digits; see needle predict"
    fails(needle("generate", "a"), expected)
    edited = {**json.loads(Path("runs/a/config.json").read_text()), "data": "cifar100"}
    Path("runs/a/config.json").write_text(json.dumps(edited))
    fails(needle("eval", "a"), "model.safetensors: expected the model in config.json", "shape")


# The command line


def test_a_run_on_text_says_how_it_goes(needle: Needle, text: Path) -> None:  # noqa: F811
    code, out, err = needle("train", "lstm", "--data-dir", "text.txt", *TINY, "--name", "a")
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if "no curves.png" not in line]
    head, sizes, start, compiled, *evaluations, end, more = lines
    assert head == "lstm with 1,052 parameters on text, cpu"
    assert sizes == "810 and 90 tokens to train and test with, a vocabulary of 28"
    assert start == "runs/a, from the beginning"
    assert compiled.startswith("training step traced, compiled and run in ")
    assert [line[:10] for line in evaluations] == ["step  6/18", "step 12/18", "step 18/18"]
    for part in ("loss", "test loss", "test perplexity", "test bits per character", "tokens/s"):
        assert part in evaluations[0]
    assert (end, more) == ("next: needle eval runs/a", "      needle generate runs/a")
    code, out, err = needle("eval", "a")
    assert (code, err) == (0, "")
    assert [line.split("  ")[0] for line in out.splitlines()] == [
        "runs/a: lstm on text", "test loss", "test accuracy", "test perplexity",
        "test bits per character",
    ]  # fmt: skip
    assert "of 88 tokens" in out
    code, out, _ = needle("train", "--resume", "a")
    assert (code, out) == (0, "runs/a is finished: 18 steps\n")
    fails(
        needle("predict", "a", "x.png"),
        "predict: expected a run that classifies images; received lstm on text; see needle gen",
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--data", "digits"], "data: expected text for gpt; received digits"),
        (["--data-dir", "nowhere"], "nowhere: expected a file or folder of text"),
        (["--data-dir", "short"], "text: expected a text with more than 64 characters to train"),
        (["--data-dir", "bytes"], "bytes: expected text in UTF-8; received byte 0xff at offset 0"),
        (["--data-dir", "text.txt", "--tokenizer", "gone.json"], "gone.json: No such file"),
        (["--data-dir", "text.txt", "--tokenizer", "text.txt"], "expected a tokenizer in JSON"),
        (["--num-heads", "3"], "hidden_dim: expected a multiple of num_heads; received 128 and 3"),
    ],
)
def test_errors_before_training_leave_nothing(
    needle: Needle,  # noqa: F811
    text: Path,
    arguments: list[str],
    part: str,
) -> None:
    Path("short").write_text("too short")
    Path("bytes").write_bytes(b"\xff")
    fails(needle("train", "gpt", *arguments), part)
    assert not Path("runs").exists()
