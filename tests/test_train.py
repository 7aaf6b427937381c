"""Runs: their files under faults, checkpoints, and resuming to the same bits; pictures as input.

What a killed process leaves is made by killing one, and what a file must hold is read with the
reference implementation of safetensors.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import needle as ndl
from needle.data import ImageDataset
from needle.files import (
    FileError,
    load_tensors,
    remove_partial_files,
    save_tensors,
    write_atomically,
)
from needle.train import (
    TASKS,
    Interrupted,
    MetricsFile,
    Progress,
    TrainConfig,
    Trainer,
    class_probabilities,
    draw_curves,
    evaluate,
    load_checkpoint,
    load_model,
    open_data,
    open_run,
    read_image,
    read_metrics,
    save_checkpoint,
)
from needle.train.model import make_model, state_size
from needle.train.trainer import OPTIMIZERS, make_optimizer, make_schedule

PIL = pytest.importorskip("PIL.Image", reason="Pillow, of the extra data, reads pictures")

# 12 steps per epoch, two epochs: 24 steps, checkpoints after 0, 5, 10, 12, 15, 20 and 24.
TINY: dict[str, Any] = {"epochs": 2, "batch_size": 128, "hidden_dim": 16, "checkpoint_every": 5}


def config(**given: Any) -> TrainConfig:
    return TrainConfig.for_data("digits", **{**TINY, **given})


def results(path: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """What runs of the same bits have in common: the model's file, and the metrics but speed."""
    records = [dict(record) for record in read_metrics(path / "metrics.jsonl")]
    for record in records:
        record.pop("samples_per_second", None)
    return (path / "model.safetensors").read_bytes(), records


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    trainer = Trainer.start(config(), tmp_path_factory.mktemp("runs"), "finished")
    trainer.fit()
    return trainer.path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to damage."""
    path = tmp_path / "copy"
    path.mkdir()
    for file in finished.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def stop_at(step: int, action: Callable[[], Any]) -> Callable[[Progress], None]:
    """A watcher that acts once, after a step."""
    return lambda progress: action() if progress.step == step and not progress.record else None


@pytest.fixture(autouse=True)
def heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores them


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


# Atomic writes


def fail_with(number: int) -> Callable[..., Any]:
    def fail(*args: Any) -> None:
        raise OSError(number, os.strerror(number), "something else")

    return fail


@pytest.mark.parametrize("function", ["fsync", "replace", "open"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    file = tmp_path / "state"
    write_atomically(file, b"old")
    where = "builtins.open" if function == "open" else f"os.{function}"
    monkeypatch.setattr(where, fail_with(number))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        write_atomically(file, b"new")
    monkeypatch.undo()
    assert caught.value.errno == number
    assert caught.value.filename == str(file)
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full: the disk cannot be full")
def test_a_disk_that_is_full_keeps_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "state"
    write_atomically(file, b"old")
    (tmp_path / f".state.{os.getpid()}.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(file, b"newer")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_write_replaces_the_whole_file_with_ordinary_permissions(tmp_path: Path) -> None:
    file = tmp_path / "state"
    file.write_bytes(b"a longer old file")
    write_atomically(file, b"newer")
    assert file.read_bytes() == b"newer"
    mask = os.umask(0)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    for name in (".checkpoint.safetensors.17.partial", "partial", "model.partial.safetensors"):
        (tmp_path / name).touch()
    remove_partial_files(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["model.partial.safetensors", "partial"]


# Tensors in files


def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    names = "float64 float32 float16 int64 int32 int16 int8 uint8 bool".split()
    found = {name: (rng.normal(size=(3, 5)) * 9).astype(name) for name in names}
    found["bfloat16"] = rng.normal(size=(2, 2)).astype(ml_dtypes.bfloat16)
    return found | {"scalar": np.array(2.5), "empty": np.zeros((0, 3)), "turned": found["int8"].T}


def test_tensors_come_back_and_the_reference_reads_them_too(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_tensors(file, tensors(), {"format": "é"})
    found, metadata = load_tensors(file)
    assert metadata == {"format": "é"}
    assert found.keys() == tensors().keys()
    with safe_open(file, "np") as reference:
        assert reference.metadata() == metadata
        for name, expected in tensors().items():
            assert found[name].dtype == expected.dtype
            np.testing.assert_array_equal(found[name], expected)
            np.testing.assert_array_equal(reference.get_tensor(name), expected)


def test_tensors_that_the_reference_wrote(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    expected = {name: array.copy("C") for name, array in tensors().items()}
    save_file(expected, file)
    found, metadata = load_tensors(file)
    assert metadata == {}
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
        found[name][...] = 0  # an array of its own, aligned and writable
        assert found[name].flags.aligned


def test_tensors_of_the_framework_are_saved(tmp_path: Path) -> None:
    x = ndl.Tensor([[1.0, 2.0], [3.0, 4.0]])
    save_tensors(tmp_path / "x", {"tensor": x.transpose(), "array": x.cached_data})
    found, _ = load_tensors(tmp_path / "x")
    np.testing.assert_array_equal(found["tensor"], [[1, 3], [2, 4]])
    np.testing.assert_array_equal(found["array"], [[1, 2], [3, 4]])


def test_what_cannot_be_saved_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x"
    save_tensors(file, {"a": np.ones(3)})
    old = file.read_bytes()
    with pytest.raises(TypeError, match=r"save_tensors: expected float64, .*; received uint32 for"):
        save_tensors(file, {"b": np.ones(3, np.uint32)})
    with pytest.raises(ValueError, match="expected other names than __metadata__"):
        save_tensors(file, {"__metadata__": np.ones(3)})
    assert file.read_bytes() == old


def forge(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[int], end: int) -> dict[str, Any]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


FORGED = {
    "empty": b"",
    "a zip file": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04cposix\nsystem\n(S'false'\ntR.",
    "header beyond the file": struct.pack("<Q", 1 << 60) + b"{}",
    "no JSON": forge(b"{'a': 1}"),
    "a list": forge([]),
    "deep": forge(b"[" * 100_000),
    "not UTF-8": forge(b"\xff\xfe"),
    "metadata of numbers": forge({"__metadata__": {"a": 1}}),
    "data beyond the file": forge(entry("F32", [1 << 40], 4 << 40)),
    "sizes that overflow": forge(entry("F32", [1 << 62, 4], 0)),
    "negative sizes": forge(entry("F32", [-1], 4), bytes(4)),
    "shape against offsets": forge(entry("F32", [2], 4), bytes(4)),
    "trailing bytes": forge(entry("F32", [1], 4), bytes(5)),
    "overlap": forge({**entry("F32", [1], 4), "b": entry("F32", [1], 4)["a"]}, bytes(4)),
    "an unknown dtype": forge(entry("F8_E4M3", [1], 1), bytes(1)),
    "a bool of 2": forge(entry("BOOL", [2], 2), b"\x01\x02"),
    "too many axes": forge(entry("U8", [1] * 80, 1), bytes(1)),
    "an array too large": forge(entry("U8", [0, 1 << 47, 1 << 47], 0)),
}


@pytest.mark.parametrize("kind", FORGED)
def test_forged_tensors_are_refused(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(FORGED[kind])
    with pytest.raises(FileError, match=r"x\.safetensors: expected .*; received ") as caught:
        load_tensors(file)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"a": np.arange(3, dtype=np.int16)})
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(FileError, match="expected a safetensors file"):
            load_tensors(file)


# Checkpoints


def test_a_state_comes_back_with_its_bits(tmp_path: Path) -> None:
    state = {
        "numbers": [0.1, -0.0, 1e-320, float("inf"), 3, True, None, "text", {}],
        "nested": {"a": {"b": np.arange(3)}, "tensor": ndl.ones(2)},
        "by position": {0: {"m": np.ones(2, np.float32)}, 1: (1, 2)},
    }
    save_checkpoint(tmp_path / "c", state)
    found = load_checkpoint(tmp_path / "c")
    assert repr(found["numbers"]) == repr(state["numbers"])
    np.testing.assert_array_equal(found["nested"]["a"]["b"], [0, 1, 2])
    np.testing.assert_array_equal(found["nested"]["tensor"], [1, 1])
    np.testing.assert_array_equal(found["by position"][0]["m"], [1, 1])
    assert found["by position"][1] == [1, 2]


def test_what_a_checkpoint_cannot_hold(tmp_path: Path) -> None:
    expected = r"save_checkpoint: expected arrays, .*; received set at a\.b"
    with pytest.raises(TypeError, match=expected):
        save_checkpoint(tmp_path / "c", {"a": {"b": {1, 2}}})
    with pytest.raises(TypeError, match="received dict at a"):
        save_checkpoint(tmp_path / "c", {"a": {(1, 2): 3}})
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ('{"tensor": "b"}', "received content without 'b'"),
        ('{"tensor": ["a"]}', "expected a tree"),
        ('{"items": 5}', "expected a tree"),
        ('{"items": [["a"]]}', "expected a tree"),
        ('{"items": [[[1], 2]]}', "expected a tree"),
        ("{}", "received content without 'items'"),
        ("7", "expected a tree"),
        ("[7]", "expected a tree"),
        ("{", "expected a tree"),
        ("[" * 900 + "]" * 900, "expected a tree"),
        ("[" * 100_000, "expected a tree"),
    ],
)
def test_forged_trees_are_refused(tmp_path: Path, state: str, expected: str) -> None:
    metadata = {"format": "needle-checkpoint-1", "state": state}
    save_tensors(tmp_path / "c", {"a": np.ones(1)}, metadata)
    with pytest.raises(FileError, match=expected):
        load_checkpoint(tmp_path / "c")


def test_another_safetensors_file_is_no_checkpoint(run: Path) -> None:
    with pytest.raises(
        FileError, match="expected the format needle-checkpoint-1; received needle-mod"
    ):
        load_checkpoint(run / "model.safetensors")


# Metrics


def test_metrics_go_on_after_a_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file)
    for step in range(1, 6):
        metrics.append({"step": step})
    metrics.file.close()
    with file.open("ab") as broken:
        broken.write(b'{"step": 6, "lo')
    assert [record["step"] for record in read_metrics(file)] == [1, 2, 3, 4, 5]
    metrics = MetricsFile(file, last_step=3)
    metrics.append({"step": 4, "again": True})
    metrics.file.close()
    steps = [1, 2, 3, 4]
    assert [record["step"] for record in read_metrics(file)] == steps
    assert file.read_bytes().count(b"\n") == 4


def test_metrics_are_whole_lines_at_any_moment(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in range(1, 4):
        metrics.append({"step": step})
        assert (tmp_path / "metrics.jsonl").read_bytes().count(b"\n") == step
    metrics.file.close()


def test_metrics_of_numbers_that_are_not_finite(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=r"expected finite numbers; received .*nan.*learning rate"):
        metrics.append({"step": 1, "loss": float("nan")})
    metrics.file.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_line_that_the_disk_cut_short_is_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(file)
    metrics.append({"step": 1})
    size = file.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, hard))
    try:
        with pytest.raises(OSError, match="No space left on device") as caught:
            metrics.append({"step": 2, "loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.filename == str(file)
    assert file.stat().st_size == size
    metrics.append({"step": 2})
    metrics.file.close()
    assert [record["step"] for record in read_metrics(file)] == [1, 2]


# Configurations


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("epochs", 0, "epochs: expected an integer from 1 to 1000000; received 0"),
        ("batch_size", -5, "batch_size: expected an integer from 1 to 1000000; received -5"),
        (
            "lr",
            float("nan"),
            "lr: expected a number of at least 1e-12 and below 1000; received nan",
        ),
        ("lr", -1, "lr: expected a number of at least 1e-12 and below 1000; received -1.0"),
        ("weight_decay", float("inf"), "weight_decay: expected a number of at least 0 and below"),
        ("dropout", 1.0, "dropout: expected a number of at least 0 and below 1; received 1.0"),
        ("optimizer", "adamm", "optimizer: expected one of adam, adamw, .*; received 'adamm'"),
        ("data", "cifar", "data: expected one of digits, mnist, .*, text; received 'cifar'"),
        ("schedule", "", "schedule: expected one of constant, .*; received ''"),
        ("seed", -1, "seed: expected an integer from 0 to"),
    ],
)
def test_values_out_of_range(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.for_data(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"), [("epochs", 1.5), ("epochs", True), ("lr", "1"), ("data", 3), ("lr", None)]
)
def test_values_of_other_types(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected .*; received {value!r}"):
        TrainConfig(**{name: value})


def test_defaults_follow_from_the_data() -> None:
    mnist = TrainConfig.for_data("mnist")  # the course's settings
    course = mnist.hidden_dim, mnist.batch_size, mnist.optimizer, mnist.lr, mnist.weight_decay
    assert course == (100, 100, "adam", 0.001, 0.001)
    assert mnist.epochs == 10
    assert TrainConfig.for_data("digits", epochs=2).epochs == 2
    assert TrainConfig.for_data("digits").epochs != 10


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the configuration of a run; received content that is none"),
        ("{", "expected the configuration of a run"),
        ("[" * 100_000, "expected the configuration of a run"),
        ("[]", "expected .* received .* others than the fields of TrainConfig"),
        ("7", "expected the configuration of a run; received"),
        ('{"epochs": 3}', "expected .* others than the fields of TrainConfig: batch_size"),
        ('"\\ud800', "expected the configuration of a run"),
    ],
)
def test_forged_configurations_are_refused(run: Path, text: str, message: str) -> None:
    (run / "config.json").write_text(text)
    with pytest.raises(FileError, match=rf"config\.json: {message}"):
        open_run(run)


def edit_config(run: Path, **changes: Any) -> None:
    found = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**found, **changes}))


def test_a_field_out_of_range_in_a_configuration(run: Path) -> None:
    edit_config(run, epochs=10**30)
    with pytest.raises(FileError, match=r"config\.json: .* epochs: expected an integer from 1 to"):
        open_run(run)
    edit_config(run, epochs=2, lr=10**400)
    with pytest.raises(FileError, match=r"config\.json: .*float"):
        open_run(run)


def test_a_path_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: expected the folder of a run, which has"):
        open_run("nothing", tmp_path)


# Models


@pytest.mark.parametrize("given", [{}, {"hidden_dim": 17, "num_blocks": 1}, {"data": "mnist"}])
def test_the_size_of_a_model_is_known_beforehand(given: dict[str, Any]) -> None:
    chosen = TrainConfig(**given)
    held = make_model(chosen).state_dict().values()
    assert state_size(chosen) == sum(tensor.size for tensor in held)


def test_the_model_is_the_one_of_the_course() -> None:
    pieces = [type(module).__name__ for module in make_model(TrainConfig(num_blocks=1)).modules()]
    branch = ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear", "BatchNorm1d"]
    block = ["Sequential", "Residual", "Sequential", *branch, "ReLU"]
    assert pieces == ["Sequential", "Flatten", "Linear", "ReLU", *block, "Linear"]


def test_a_model_of_another_size_is_refused_before_it_is_built(run: Path) -> None:
    edit_config(run, hidden_dim=65536, num_blocks=1000)  # would take 8 TB
    expected = r"model\.safetensors: expected the \d+ numbers of a model of hidden_dim 65536"
    with pytest.raises(FileError, match=expected):
        load_model(*open_run(run))
    with pytest.raises(FileError, match=r"checkpoint\.safetensors: expected the \d+ numbers"):
        Trainer.resume(run)


def test_a_model_of_other_shapes_is_refused(run: Path) -> None:
    held, metadata = load_tensors(run / "model.safetensors")
    held["1.weight"] = held["1.weight"].T.copy()
    save_tensors(run / "model.safetensors", held, metadata)
    expected = r"model\.safetensors: expected the model in config\.json; received .*1\.weight"
    with pytest.raises(FileError, match=expected):
        load_model(*open_run(run))
    save_tensors(run / "model.safetensors", held)
    with pytest.raises(FileError, match="expected the format needle-model-1; received None"):
        load_model(*open_run(run))


def test_a_run_without_a_model(run: Path) -> None:
    (run / "model.safetensors").unlink()
    expected = "expected a trained model; received a run without a finished epoch; go on with"
    with pytest.raises(FileNotFoundError, match=expected):
        load_model(*open_run(run))


def test_evaluation_counts_what_numpy_counts(finished: Path) -> None:
    path, chosen = open_run(finished)
    model = load_model(path, chosen)
    samples = open_data(chosen, train=False)
    found = evaluate(model, samples, 10)
    model.eval()
    images, labels = samples[:]
    logits = model(ndl.Tensor(images)).numpy().astype(np.float64)
    said = logits.argmax(1)
    confusion = [[np.sum(said[labels == i] == j) for j in range(10)] for i in range(10)]
    np.testing.assert_array_equal(found.confusion, confusion)
    assert found.accuracy == np.mean(said == labels)
    likelihood = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    loss = -likelihood[np.arange(len(samples)), labels].mean()
    assert found.loss == pytest.approx(loss, rel=1e-5)
    shares = class_probabilities(model, images[0])
    np.testing.assert_allclose(shares, np.exp(likelihood[0]), rtol=1e-5)


def test_evaluation_in_batches_and_without_some_classes(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(*open_run(finished)).train()
    samples = open_data(config(), train=False)
    images, labels = samples[samples.labels < 3]
    some = ImageDataset(images, labels)
    whole = evaluate(model, some, 10)
    monkeypatch.setattr("needle.train.model.TEST_BATCH", 7)
    parts = evaluate(model, some, 10)
    np.testing.assert_array_equal(whole.confusion, parts.confusion)
    assert whole.loss == pytest.approx(parts.loss, rel=1e-5)
    assert model.training


# Optimizers and schedules


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_chosen(name: str) -> None:
    chosen = config(optimizer=name, lr=0.5, weight_decay=0.25, momentum=0.75)
    optimizer = make_optimizer(chosen, make_model(chosen))
    assert type(optimizer).__name__.lower() == name
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert name != "sgd" or group["momentum"] == 0.75


@pytest.mark.parametrize(
    ("name", "rates"),
    [  # before the first of 9 steps, before the fifth, and after all
        ("constant", (1.0, 1.0, 1.0)),
        ("cosine", (1.0, (1 + np.cos(np.pi * 4 / 9)) / 2, 0.0)),
        ("one_cycle", (0.04, None, 4e-6)),
        ("step", (1.0, 0.1, 0.001)),
        ("exponential", (1.0, 0.01 ** (4 / 9), 0.01)),
    ],
)
def test_every_schedule_spans_the_run(name: str, rates: tuple[float | None, ...]) -> None:
    chosen = config(schedule=name, lr=1.0)
    optimizer = make_optimizer(chosen, make_model(chosen))
    schedule = make_schedule(chosen, optimizer, 9)
    found = [optimizer.lr]
    for _ in range(9):
        schedule.step()
        found.append(optimizer.lr)
    for step, rate in zip((0, 4, 9), rates, strict=True):
        assert rate is None or found[step] == pytest.approx(rate, abs=1e-12)


# Runs


def test_a_run_leaves_its_files(finished: Path) -> None:
    names = ["checkpoint.safetensors", "config.json", "metrics.jsonl", "model.safetensors"]
    assert sorted(os.listdir(finished)) == names
    records = read_metrics(finished / "metrics.jsonl")
    steps = [record for record in records if record["kind"] == "step"]
    epochs = [record for record in records if record["kind"] == "epoch"]
    assert [record["step"] for record in steps] == list(range(1, 25))
    assert [(record["epoch"], record["step"]) for record in epochs] == [(1, 12), (2, 24)]
    sizes = np.array([128] * 11 + [29])
    for name in ("loss", "accuracy"):
        mean = np.average([record[name] for record in steps[:12]], weights=sizes)
        assert epochs[0][f"train_{name}"] == pytest.approx(mean)
    assert epochs[1]["train_loss"] < epochs[0]["train_loss"]
    model = load_model(*open_run(finished))
    found = evaluate(model, open_data(config(), train=False), 10)
    assert (found.loss, found.accuracy) == (epochs[1]["test_loss"], epochs[1]["test_accuracy"])


def test_equal_seeds_give_equal_bits_and_others_do_not(finished: Path, tmp_path: Path) -> None:
    np.random.seed(123)  # NumPy's global generator has no part in it
    for seed, same in ((0, True), (1, False)):
        trainer = Trainer.start(config(seed=seed), tmp_path)
        trainer.fit()
        assert (results(trainer.path) == results(finished)) is same


def test_default_names_differ(tmp_path: Path) -> None:
    names = {Trainer.start(config(), tmp_path).path.name for _ in range(3)}
    assert len(names) == 3
    assert all(name.startswith("mlp_resnet-digits-") for name in names)


def test_a_name_in_use_is_refused_and_left_alone(run: Path) -> None:
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    expected = "expected a new run; received a name in use; choose another --name, or go on with"
    with pytest.raises(FileExistsError, match=expected):
        Trainer.start(config(), run.parent, run.name)
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/tmp/x"])
def test_a_name_that_is_no_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="name: expected the name of a folder; received"):
        Trainer.start(config(), tmp_path, name)
    assert not os.listdir(tmp_path)


def test_nothing_is_left_of_a_run_that_cannot_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="device: expected one on this machine; received cuda"):
        Trainer.start(config(device="cuda"), tmp_path, "a")
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz"):
        Trainer.start(TrainConfig(data="mnist", data_dir=str(tmp_path)), tmp_path, "a")
    monkeypatch.setattr("os.replace", fail_with(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        Trainer.start(config(), tmp_path, "a")
    assert not os.listdir(tmp_path)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    trainer = Trainer.start(config(lr=999.0, optimizer="sgd", weight_decay=9.0), tmp_path, "a")
    with pytest.raises(ValueError, match="expected finite numbers; received .*; choose a smaller"):
        trainer.fit()
    assert all(np.isfinite(record["loss"]) for record in read_metrics(tmp_path / "a/metrics.jsonl"))
    Trainer.resume(tmp_path / "a")


def test_a_run_in_another_thread_than_the_main_one(finished: Path, tmp_path: Path) -> None:
    trainer = Trainer.start(config(), tmp_path)
    thread = threading.Thread(target=trainer.fit)
    thread.start()
    thread.join()
    assert results(trainer.path) == results(finished)


# Resuming


@pytest.mark.parametrize("step", [1, 5, 11, 12, 13, 23])
def test_an_interrupted_run_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path, step: int
) -> None:
    trainer = Trainer.start(config(), tmp_path, "a")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted):
        trainer.fit(stop_at(step, interrupt))
    assert signal.getsignal(signal.SIGINT) is before
    np.random.seed(99)
    ndl.seed(99)
    trainer = Trainer.resume("a", tmp_path)
    assert trainer.progress.step == (13 if step == 12 else step)  # an epoch's end is waited for
    trainer.fit()
    assert results(trainer.path) == results(finished)


def test_an_interruption_at_the_end_of_a_run_comes_too_late(finished: Path, tmp_path: Path) -> None:
    trainer = Trainer.start(config(), tmp_path, "a")
    trainer.fit(stop_at(24, interrupt))
    assert results(trainer.path) == results(finished)


def test_an_interruption_that_is_ignored_or_handled_elsewhere(tmp_path: Path) -> None:
    heard: list[int] = []
    for handler in (signal.SIG_IGN, lambda number, frame: heard.append(number)):
        signal.signal(signal.SIGINT, handler)
        trainer = Trainer.start(config(epochs=1), tmp_path)
        trainer.fit(stop_at(3, interrupt))
        assert trainer.progress.finished
    assert heard == [signal.SIGINT]


def test_a_second_interruption_acts_at_once(finished: Path, tmp_path: Path) -> None:
    def twice() -> None:
        interrupt()
        interrupt()

    trainer = Trainer.start(config(), tmp_path, "a")
    with pytest.raises(KeyboardInterrupt) as caught:
        trainer.fit(stop_at(8, twice))
    assert caught.type is KeyboardInterrupt
    trainer = Trainer.resume("a", tmp_path)
    assert trainer.progress.step == 5  # its last checkpoint
    trainer.fit()
    assert results(trainer.path) == results(finished)


@pytest.mark.parametrize("optimizer", sorted(set(OPTIMIZERS) - {"adam"}))
def test_every_optimizer_and_schedule_goes_on_to_the_same_bits(
    tmp_path: Path, optimizer: str
) -> None:
    schedules = ("constant", "one_cycle", "step", "exponential")
    given = {"optimizer": optimizer, "schedule": schedules[len(optimizer) % 4], "lr": 0.01}
    whole = Trainer.start(config(**given), tmp_path, "whole")
    whole.fit()
    with pytest.raises(Interrupted):
        Trainer.start(config(**given), tmp_path, "parts").fit(stop_at(7, interrupt))
    with pytest.raises(Interrupted):
        Trainer.resume("parts", tmp_path).fit(stop_at(14, interrupt))
    parts = Trainer.resume("parts", tmp_path)
    parts.fit()
    assert results(parts.path) == results(whole.path)


def test_bfloat16_goes_on_to_the_same_bits_compiled_or_not(finished: Path, tmp_path: Path) -> None:
    whole = Trainer.start(config(precision="bfloat16"), tmp_path, "whole")
    whole.fit()
    with pytest.raises(Interrupted):
        Trainer.start(config(precision="bfloat16"), tmp_path, "a").fit(stop_at(7, interrupt))
    parts = Trainer.resume("a", tmp_path)
    parts.fit()
    eager = Trainer.start(config(precision="bfloat16", jit=False), tmp_path, "eager")
    eager.fit()
    assert results(parts.path) == results(eager.path) == results(whole.path)
    assert results(whole.path) != results(finished)
    assert {p.dtype for p in whole.model.parameters()} == {ndl.float32}
    losses = [
        read_metrics(path / "metrics.jsonl")[-1]["test_loss"] for path in (whole.path, finished)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


# A process that kills itself: at a step, or within the n-th call of a function of the system.
KILLED = """
import os, signal, sys
from needle.train import TrainConfig, Trainer

def killing(function, count):
    calls = iter(range(1, 1000))
    def call(*args):
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return call

root, where, count, given = sys.argv[1], sys.argv[2], int(sys.argv[3]), eval(sys.argv[4])
if where != "step":
    setattr(os, where, killing(getattr(os, where), count))
def watch(progress):
    if where == "step" and progress.step == count:
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.start(TrainConfig.for_data("digits", **given), root, "a").fit(watch)
"""


@pytest.mark.parametrize(
    ("where", "count"), [("step", 3), ("step", 17), ("replace", 2), ("replace", 5), ("fsync", 12)]
)
def test_a_killed_run_goes_on_to_the_same_bits(
    finished: Path, tmp_path: Path, where: str, count: int
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), where, str(count), repr(TINY)]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    text = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    assert text == b"" or text.endswith(b"\n")
    trainer = Trainer.resume(tmp_path / "a")
    trainer.fit()
    assert results(trainer.path) == results(finished)
    assert not list(trainer.path.glob(".*"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    trainer = Trainer.start(config(), tmp_path, "a")
    fail = stop_at(8, lambda: monkeypatch.setattr("os.replace", fail_with(number)))
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        trainer.fit(fail)
    monkeypatch.undo()
    assert caught.value.filename == str(tmp_path / "a" / "checkpoint.safetensors")
    assert not list(trainer.path.glob(".*"))
    trainer = Trainer.resume("a", tmp_path)
    assert trainer.progress.step == 5
    trainer.fit()
    assert results(trainer.path) == results(finished)


def test_a_run_that_was_killed_before_its_first_checkpoint(finished: Path, tmp_path: Path) -> None:
    trainer = Trainer.start(config(), tmp_path, "a")  # only config.json is there
    assert os.listdir(trainer.path) == ["config.json"]
    trainer = Trainer.resume("a", tmp_path)
    trainer.fit()
    assert results(trainer.path) == results(finished)


def test_a_finished_run_has_nothing_left_to_do(run: Path) -> None:
    before = results(run)
    trainer = Trainer.resume(run)
    assert trainer.progress.finished
    trainer.fit()
    assert results(run) == before


Edit = Callable[[dict[str, Any]], Any]
BAD_STATES: dict[str, tuple[Edit, str]] = {
    "no model": (lambda s: s.pop("model"), "the .* numbers of a model"),
    "no optimizer": (lambda s: s.pop("optimizer"), "received content without 'optimizer'"),
    "a model as a list": (lambda s: s.update(model=[]), "the .* numbers of a model"),
    "an epoch as text": (lambda s: s["progress"].update(epoch="2"), "expected epoch of at least 0"),
    "a negative step": (lambda s: s["progress"].update(step=-1), "expected step of at least 0"),
    "a NaN": (lambda s: s["progress"].update(loss_sum=float("nan")), "expected loss_sum of at lea"),
    "no place of the loader": (lambda s: s.update(loader={}), "expected"),
    "another batch size": (lambda s: s["loader"].update(batch_size=3), "batch_size=128"),
    "another random state": (lambda s: s.update(random=np.zeros(3)), "random: expected a key"),
    "a random state as text": (lambda s: s.update(random="x"), "received"),
    "another optimizer": (lambda s: s["optimizer"].update(optimizer="SGD"), "expected"),
    "an optimizer's other shapes": (
        lambda s: s["optimizer"]["state"].update({"0.m": np.zeros(3, np.float32)}),
        "expected",
    ),
    "another schedule": (lambda s: s["schedule"].update(schedule="StepLR"), "expected"),
    "numbers for the schedule": (lambda s: s.update(schedule=7), "expected"),
}


@pytest.mark.parametrize("kind", BAD_STATES)
def test_a_checkpoint_that_does_not_fit_is_refused(run: Path, kind: str) -> None:
    edit, message = BAD_STATES[kind]
    file = run / "checkpoint.safetensors"
    state = load_checkpoint(file)
    edit(state)
    save_checkpoint(file, state)
    before = {each.name: each.read_bytes() for each in run.iterdir()}
    with pytest.raises(FileError, match=rf"checkpoint\.safetensors: expected .*{message}"):
        Trainer.resume(run)
    assert {each.name: each.read_bytes() for each in run.iterdir()} == before


def test_a_truncated_checkpoint_is_refused(run: Path) -> None:
    file = run / "checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(FileError, match=r"checkpoint\.safetensors: expected a safetensors file"):
        Trainer.resume(run)


def test_curves_are_drawn_from_metrics(run: Path) -> None:
    pytest.importorskip("matplotlib", reason="Matplotlib, of the extra plot, draws curves")
    draw_curves(run / "metrics.jsonl", run / "curves.png")
    with PIL.open(run / "curves.png") as image:
        assert image.size == (1200, 480)
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
    (run / "metrics.jsonl").write_bytes(b"")  # interrupted in the first step
    draw_curves(run / "metrics.jsonl", run / "curves.png")


def test_curves_without_matplotlib(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install needle-dl\[plot\]"):
        draw_curves(run / "metrics.jsonl", run / "curves.png")


# Data


def write_idx(folder: Path, shape: tuple[int, int] = (28, 28), highest: int = 9) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 20)):
        x = rng.integers(0, 256, (count, *shape), np.uint8)
        header = struct.pack(">BBBB3I", 0, 0, 8, 3, *x.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        y = (np.arange(count) % (highest + 1)).astype(np.uint8)
        header = struct.pack(">BBBBI", 0, 0, 8, 1, count)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + y.tobytes())


@pytest.mark.parametrize("data", ["mnist", "fashion_mnist"])
def test_a_run_on_files_that_move_meanwhile(tmp_path: Path, data: str) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    write_idx(old)
    given = {"data_dir": str(old), "epochs": 2, "batch_size": 16, "hidden_dim": 8}
    trainer = Trainer.start(TrainConfig.for_data(data, **given), tmp_path, "a")
    with pytest.raises(Interrupted):
        trainer.fit(stop_at(4, interrupt))
    old.rename(new)
    with pytest.raises(FileNotFoundError, match="train-images-idx3-ubyte.gz in"):
        Trainer.resume("a", tmp_path)
    trainer = Trainer.resume("a", tmp_path, data_dir=str(new))
    trainer.fit()
    assert len(TASKS[data].classes) == 10


def test_images_and_labels_of_another_data_set(tmp_path: Path) -> None:
    write_idx(tmp_path, shape=(8, 8))
    chosen = TrainConfig.for_data("mnist", data_dir=str(tmp_path), epochs=1)
    expected = r"mnist: expected images of shape \(28, 28, 1\); received \(8, 8, 1\)"
    with pytest.raises(ValueError, match=expected):
        open_data(chosen, train=True)
    write_idx(tmp_path, highest=10)
    with pytest.raises(ValueError, match="labels"):
        Trainer.start(chosen, tmp_path, "a").fit()


# Pictures

STROKES = np.zeros((8, 8), np.uint8)
STROKES[:, 3] = 255
STROKES[6, 4:6] = 128


def pictures() -> Iterator[tuple[str, Any, float]]:
    """(name, picture, tolerance) of pictures of the same strokes."""
    grey = PIL.fromarray(STROKES)
    yield "grey", grey, 0
    yield "inverted", PIL.fromarray(255 - STROKES), 1e-6
    yield "RGB", grey.convert("RGB"), 0
    yield "RGBA", grey.convert("RGBA"), 0
    yield "grey and alpha", grey.convert("LA"), 0
    yield "palette", grey.convert("P"), 0.01
    yield "16 bits", PIL.fromarray(STROKES.astype(np.uint16) * 257), 1e-6
    yield "1 bit", grey.point(lambda value: 255 * (value > 100)).convert("1"), 0.5
    yield "three times as large", grey.resize((24, 24), PIL.Resampling.NEAREST), 1e-6
    yield "huge", grey.resize((4096, 4096), PIL.Resampling.NEAREST), 1e-6
    for name, colour in (("black", 0), ("white", 255)):
        drawn = np.full((8, 8, 4), colour, np.uint8)
        drawn[..., 3] = STROKES
        yield f"{name} on nothing", PIL.fromarray(drawn), 0.01
    far = PIL.new("RGB", (1000, 300), "white")
    far.paste(PIL.fromarray(255 - STROKES).resize((80, 80), PIL.Resampling.NEAREST), (700, 9))
    yield "small in a corner", far, 1e-6


@pytest.mark.parametrize(("name", "picture", "tolerance"), list(pictures()))
def test_pictures_of_the_same_strokes(
    tmp_path: Path, name: str, picture: Any, tolerance: float
) -> None:
    picture.save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", (8, 8, 1))
    assert found.shape == (8, 8, 1)
    assert found.dtype == np.float32
    assert found.min() >= 0
    assert found.max() <= 1
    expected = STROKES
    if name == "small in a corner":  # its strokes come into the middle
        expected = np.roll(expected, -1, axis=1)
    np.testing.assert_allclose(found[..., 0], expected / 255, atol=tolerance)


def test_a_wide_picture_keeps_its_proportions(tmp_path: Path) -> None:
    drawn = np.zeros((8, 16), np.uint8)
    drawn[2:6, ::2] = 200
    PIL.fromarray(drawn).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", (8, 8, 1))[..., 0]
    np.testing.assert_allclose(found[3:5], 100 / 255, atol=1e-6)
    assert not found[:3].any()
    assert not found[5:].any()


def test_a_margin_as_in_the_data_is_kept_and_a_wide_one_made_so(tmp_path: Path) -> None:
    for side, margin in ((28, 4), (56, 8), (200, 70)):
        drawn = np.zeros((side, side), np.uint8)
        drawn[margin : side - margin, margin : side - margin] = 255
        PIL.fromarray(drawn).save(tmp_path / "x.png")
        found = read_image(tmp_path / "x.png", (28, 28, 1), span=20 / 28)[..., 0]
        expected = np.zeros((28, 28))
        expected[4:24, 4:24] = 1
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 2), (9, 7)])
@pytest.mark.parametrize("mode", ["L", "RGBA", "1", "I;16"])
def test_pictures_of_odd_sizes(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    PIL.new(mode, size, 0).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (28, 28, 1)).shape == (28, 28, 1)


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF"])
def test_other_formats(tmp_path: Path, kind: str) -> None:
    PIL.fromarray(STROKES).resize((80, 80)).save(tmp_path / "x", kind)
    assert read_image(tmp_path / "x", (8, 8, 1)).shape == (8, 8, 1)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(data))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + body + chunk(b"IEND", b"")


WHOLE = png(8, 8, bytes(72))
BAD_PICTURES = {
    "empty": b"",
    "text": b"hello, world",
    "a signature alone": WHOLE[:8],
    "truncated": WHOLE[:-30],
    "a wrong checksum": WHOLE.replace(b"IHDR\x00", b"IHDR\x01"),
    "no pixels": png(0, 8, b""),
    "a bomb": png(60_000, 60_000, bytes(10)),
    "many pixels": png(9_000, 8_000, bytes(10)),
    "a bomb of text": png(
        8, 8, bytes(72), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 27)))
    ),
    "a format that is not read": b"II*\x00" + bytes(100),
}


@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_bad_pictures_are_refused(tmp_path: Path, kind: str) -> None:
    (tmp_path / "x.png").write_bytes(BAD_PICTURES[kind])
    expected = r"x\.png: expected a picture \(PNG, .*\) of at most 64,000,000 pixels; received con"
    with pytest.raises(FileError, match=expected):
        read_image(tmp_path / "x.png", (8, 8, 1))


def test_a_picture_that_is_whole(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(WHOLE)
    assert not read_image(tmp_path / "x.png", (8, 8, 1)).any()


def test_a_path_without_a_picture(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nothing.png"):
        with pytest.raises(FileNotFoundError, match="expected a picture; received a path without"):
            read_image(path, (8, 8, 1))


def test_pictures_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install needle-dl\[data\]"):
        read_image(tmp_path / "x.png", (8, 8, 1))
