"""The command `needle`, as a user meets it: what it prints, where errors go, and exit codes."""

from __future__ import annotations

import errno
import json
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

import needle as ndl
from needle.cli import main
from needle.train import (
    TrainConfig,
    Trainer,
    class_probabilities,
    load_model,
    open_data,
    open_run,
    read_metrics,
)

TINY = ["--epochs", "2", "--batch-size", "128", "--hidden-dim", "16", "--checkpoint-every", "5"]
EPOCH = re.compile(
    r"epoch [12]/2  loss \d\.\d{4}  accuracy +\d+\.\d\d%  test loss \d\.\d{4}  "
    r"test accuracy +\d+\.\d\d%  +[\d,]+ samples/s"
)

Needle = Callable[..., tuple[int, str, str]]


@pytest.fixture
def needle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Needle:
    """Runs a command in a folder of its own: (exit code, stdout, stderr)."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell ignores it
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["needle", *args])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that knows its digits a little."""
    config = TrainConfig.for_data("digits", epochs=4, hidden_dim=32)
    trainer = Trainer.start(config, tmp_path_factory.mktemp("runs"), "trained")
    trainer.fit()
    return trainer.path


def fails(outcome: tuple[int, str, str], *parts: str) -> None:
    """The outcome is one sentence on stderr, of these parts, and exit code 2."""
    code, out, err = outcome
    assert code == 2
    assert out == ""
    assert err.startswith("needle: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


# train


def test_a_new_run_says_how_it_goes(needle: Needle) -> None:
    code, out, err = needle("train", "mlp_resnet", *TINY, "--name", "first")
    assert (code, err) == (0, "")
    lines = [line for line in out.splitlines() if "no curves.png" not in line]  # no Matplotlib
    head, start, compiled, *epochs, end = lines
    assert re.fullmatch(r"training step traced, compiled and run in [\d.]+ s", compiled)
    assert head == "mlp_resnet with 2,194 parameters on digits, cpu"
    assert start == "runs/first, from the beginning"
    assert len(epochs) == 2
    assert all(EPOCH.fullmatch(line) for line in epochs)
    assert end == "next: needle eval runs/first"
    config = json.loads(Path("runs/first/config.json").read_text())
    assert config["hidden_dim"] == 16
    assert config["optimizer"] == "adam"
    records = read_metrics(Path("runs/first/metrics.jsonl"))
    assert [record["kind"] for record in records].count("epoch") == 2
    pytest.importorskip("matplotlib")
    assert Path("runs/first/curves.png").stat().st_size > 10_000


def test_names_and_folders_are_free(needle: Needle) -> None:
    code, out, _ = needle("train", *TINY, "--run-dir", "elsewhere/my runs")
    assert code == 0
    (path,) = Path("elsewhere/my runs").iterdir()
    assert path.name.startswith("mlp_resnet-digits-")
    assert out.splitlines()[-1] == f"next: needle eval '{path}'"


def test_options_reach_the_configuration(needle: Needle) -> None:
    options = {
        "--epochs": "1", "--batch-size": "500", "--lr": "0.02", "--optimizer": "sgd",
        "--weight-decay": "0.25", "--momentum": "0.5", "--schedule": "step", "--hidden-dim": "4",
        "--num-blocks": "1", "--dropout": "0.5", "--seed": "7", "--device": "cpu_numpy",
        "--checkpoint-every": "3",
    }  # fmt: skip
    arguments = [each for pair in options.items() for each in pair]
    code, _, _ = needle("train", "mlp_resnet", "--data", "digits", *arguments, "--name", "a")
    assert code == 0
    found = json.loads(Path("runs/a/config.json").read_text())
    for option, value in options.items():
        assert str(found[option[2:].replace("-", "_")]) == value


def test_a_run_without_matplotlib(needle: Needle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    code, out, err = needle("train", *TINY, "--name", "a")
    assert (code, err) == (0, "")
    (line,) = [line for line in out.splitlines() if "curves" in line]
    assert line.startswith("no curves.png: matplotlib.figure: expected an installed library")
    assert line.endswith("pip install needle-dl[plot]")
    assert not Path("runs/a/curves.png").exists()


def test_a_terminal_shows_a_live_bar(needle: Needle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, out, _ = needle("train", *TINY, "--name", "a")
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out)
    shown = r"\d+%  epoch [12]/2  loss \d\.\d{4}  accuracy \d+\.\d%  [\d,]+ samples/s"
    assert re.search(shown, plain)
    assert len(EPOCH.findall(plain)) == 2


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["mlp"], ["model: expected one of mlp_resnet, resnet9, lstm, gpt; received 'mlp'"]),
        (["--data", "cifar"], ["data: expected one of digits, mnist, fashion_mnist, cifar10,"]),
        (["--epochs", "0"], ["epochs: expected an integer from 1"]),
        (["--batch-size", "-1"], ["batch_size: expected an integer from 1"]),
        (["--lr", "nan"], ["lr: expected a number of at least 1e-12", "received nan"]),
        (["--optimizer", "x"], ["optimizer: expected one of adam,"]),
        (["--device", "cuda"], ["device: expected one on this machine; received cuda; choose cpu"]),
        (["--name", "a/b"], ["name: expected the name of a folder; received 'a/b'"]),
        (["--data", "mnist", "--data-dir", "."], ["mnist: expected train-images-idx3-ubyte.gz"]),
        (["--resume", "nothing"], ["nothing: expected the folder of a run"]),
        (["--resume", "x", "--lr", "1", "--seed", "2"], ["--resume: expected only", "lr, seed"]),
        (["--run-dir", "file"], ["file"]),
        (["--run-dir", "file/below"], ["file"]),
    ],
)
def test_errors_before_training_leave_nothing(
    needle: Needle, tmp_path: Path, arguments: list[str], parts: list[str]
) -> None:
    (tmp_path / "file").touch()
    fails(needle("train", *arguments), *parts)
    assert os.listdir(tmp_path) == ["file"]


def test_usage_errors(needle: Needle) -> None:
    for arguments in (["train", "--epochs", "x"], ["train", "--nope"], ["nope"], ["eval"]):
        code, out, err = needle(*arguments)
        assert code == 2
        assert out == ""
        assert "Traceback" not in err


def test_a_name_in_use(needle: Needle, tmp_path: Path) -> None:
    (tmp_path / "runs" / "a").mkdir(parents=True)
    cure = "choose another --name, or go on with: needle train --resume runs/a"
    fails(needle("train", *TINY, "--name", "a"), "runs/a: expected a new run;", cure)
    assert not os.listdir(tmp_path / "runs" / "a")


def test_truncated_data(needle: Needle, tmp_path: Path) -> None:
    for name in ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"):
        (tmp_path / name).write_bytes(b"\x00\x00\x08")
    outcome = needle("train", "--data", "mnist", "--data-dir", ".")
    fails(outcome, "train-images-idx3-ubyte", "truncated")


def test_a_loss_that_is_not_finite(needle: Needle) -> None:
    code, _, err = needle("train", *TINY, "--optimizer", "sgd", "--lr", "999", "--name", "a")
    assert code == 2
    assert "expected finite numbers" in err
    assert "choose a smaller learning rate" in err
    assert err.count("\n") == 1


def test_too_little_memory(needle: Needle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("needle.train.trainer.make_model", fail)
    fails(needle("train"), "memory: expected enough for this model and data")


# train --resume


def at_step(step: int, action: Callable[[], Any]) -> Callable[..., None]:
    """A Trainer.run_step that acts after a step."""
    run_step = Trainer.run_step

    def run(self: Trainer, *args: Any) -> None:
        run_step(self, *args)
        if self.progress.step == step:
            action()

    return run


def models(*names: str) -> set[bytes]:
    return {Path("runs", name, "model.safetensors").read_bytes() for name in names}


def test_an_interrupted_run_is_resumed(needle: Needle, monkeypatch: pytest.MonkeyPatch) -> None:
    needle("train", *TINY, "--name", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", at_step(7, lambda: os.kill(os.getpid(), signal.SIGINT)))
        code, _, err = needle("train", *TINY, "--name", "parts")
    assert code == 130
    where = "epoch 1, step 7/12"
    again = "needle train --resume runs/parts"
    assert err == f"needle: interrupted; {where} is saved; go on with: {again}\n"
    code, out, err = needle("train", "--resume", "parts")
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == f"runs/parts, from {where}"
    assert len(models("whole", "parts")) == 1
    code, out, _ = needle("train", "--resume", "runs/parts")
    assert (code, out) == (0, "runs/parts is finished: 2 epochs\n")


def test_a_run_that_is_interrupted_twice_ends_at_once(
    needle: Needle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Trainer, "run_step", at_step(7, twice))
    code, _, err = needle("train", *TINY, "--name", "a")
    assert code == 130
    kept = "the last checkpoint is saved; go on with: needle train --resume runs/a"
    assert err == f"needle: interrupted; {kept}\n"


def test_a_full_disk(needle: Needle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    needle("train", *TINY, "--name", "whole")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", at_step(7, lambda: patch.setattr(os, "replace", fail)))
        code, _, err = needle("train", *TINY, "--name", "parts")
    assert code == 2
    where = "runs/parts/checkpoint.safetensors: No space left on device"
    cure = "what was saved before is whole; go on with: needle train --resume runs/parts"
    assert err == f"needle: {where}; {cure}\n"
    assert needle("train", "--resume", "parts")[0] == 0
    assert len(models("whole", "parts")) == 1


def test_a_run_that_was_killed_is_resumed(needle: Needle, tmp_path: Path) -> None:
    needle("train", *TINY, "--name", "whole")
    command = [sys.executable, "-u", "-m", "needle", "train", *TINY, "--name", "parts"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch 1"):
                process.kill()
                break
    assert process.returncode == -signal.SIGKILL
    assert needle("train", "--resume", "parts")[0] == 0
    assert len(models("whole", "parts")) == 1
    text = Path("runs/parts/metrics.jsonl").read_text()
    steps = [json.loads(line) for line in text.splitlines()]
    assert [each["step"] for each in steps if each["kind"] == "step"] == list(range(1, 25))


# eval


def test_eval_shows_the_test(needle: Needle, trained: Path) -> None:
    code, out, err = needle("eval", str(trained))
    assert (code, err) == (0, "")
    last = read_metrics(trained / "metrics.jsonl")[-1]
    assert f"test loss      {last['test_loss']:.4f}" in out
    assert f"test accuracy  {last['test_accuracy']:.2%} of 360 samples" in out
    rows = [re.findall(r"[\d.]+%?", line) for line in out.splitlines() if line.startswith("│")]
    assert len(rows) == 10
    counts = np.bincount(open_data(TrainConfig(), train=False).labels)
    for digit, row in enumerate(rows):
        assert int(row[0]) == digit
        assert sum(map(int, row[1:-1])) == counts[digit]
    assert needle("eval", "trained", "--run-dir", str(trained.parent))[1] == out


def test_eval_of_clothes_names_them(needle: Needle, tmp_path: Path) -> None:
    from test_train import write_idx

    write_idx(tmp_path)
    data = ["--data", "fashion_mnist", "--data-dir", "."]
    code, _, err = needle("train", *data, "--hidden-dim", "8", "--epochs", "1", "--name", "a")
    assert (code, err) == (0, "")
    os.mkdir("moved")
    for file in tmp_path.glob("*ubyte"):
        file.rename(tmp_path / "moved" / file.name)
    fails(needle("eval", "a"), "fashion_mnist: expected t10k-images-idx3-ubyte.gz in .")
    code, out, _ = needle("eval", "a", "--data-dir", "moved")
    assert code == 0
    assert "9 ankle boot" in out


BROKEN: dict[str, tuple[str, bytes | None, str]] = {
    "no run": ("config.json", None, "expected the folder of a run"),
    "config.json, truncated": ("config.json", b'{"model": "mlp', "config.json: expected the conf"),
    "config.json, another": ("config.json", b"{}", "than the fields of TrainConfig: batch_size,"),
    "model, truncated": ("model.safetensors", b"\x08", "model.safetensors: expected a safetensors"),
    "model, another": (
        "model.safetensors",
        b"\x02" + bytes(7) + b"{}",
        "expected the format needle",
    ),
    "no model": ("model.safetensors", None, "expected a trained model"),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("command", ["eval", "predict"])
def test_broken_runs(
    needle: Needle, trained: Path, tmp_path: Path, command: str, kind: str
) -> None:
    file, content, message = BROKEN[kind]
    run = shutil.copytree(trained, tmp_path / "run")
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    picture = ["x.png"] if command == "predict" else []
    fails(needle(command, "run", *picture), message)


def test_a_model_of_another_architecture(needle: Needle, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "hidden_dim": 64}))
    expected = "numbers of a model of hidden_dim 64 and num_blocks 3; received"
    fails(needle("eval", "run"), "model.safetensors: expected the", expected)
    fails(needle("train", "--resume", "run"), "checkpoint.safetensors: expected the", expected)


def test_a_broken_checkpoint(needle: Needle, trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    whole = (run / "checkpoint.safetensors").read_bytes()
    (run / "checkpoint.safetensors").write_bytes(whole[: len(whole) // 2])
    fails(needle("train", "--resume", "run"), "checkpoint.safetensors: expected a safetensors file")
    (run / "checkpoint.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    fails(needle("train", "--resume", "run"), "expected the format needle-checkpoint-1")


# predict


def test_predict_shows_what_the_model_says(needle: Needle, trained: Path) -> None:
    pillow = pytest.importorskip("PIL.Image")
    samples = open_data(TrainConfig(), train=False)
    model = load_model(*open_run(trained))
    for image in samples[:20][0]:
        expected = class_probabilities(model, image)
        grey = pillow.fromarray(np.uint8(np.rint(image[..., 0] * 255)))
        grey.resize((72, 72), pillow.Resampling.NEAREST).convert("RGB").save("x.png")
        code, out, err = needle("predict", str(trained), "x.png")
        assert (code, err) == (0, "")
        *rows, last = out.splitlines()
        found = [re.fullmatch(r" *(\d) +(\d+\.\d)%  ?(█*) *", row) for row in rows]
        shares = [float(row[2]) for row in found if row]
        assert len(shares) == 10
        np.testing.assert_allclose(shares, 100 * expected, atol=1)  # of pixels in 256 levels
        best = int(expected.argmax())
        assert last == f"{best} ({shares[best]}%)"
        lengths = [len(row[3]) for row in found if row]
        assert lengths == [pytest.approx(share * 0.3, abs=0.52) for share in shares]


def test_predict_of_bad_pictures(needle: Needle, trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    fails(needle("predict", str(trained), "x.png"), "x.png: expected a picture (PNG, ")
    fails(needle("predict", str(trained), "y.png"), "y.png: expected a picture; received a path")


def test_predict_without_pillow(
    needle: Needle, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    fails(needle("predict", str(trained), "x.png"), "pip install needle-dl[data]")


# info, and the command as such


def test_info_tells_what_a_report_needs(needle: Needle, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("NEEDLE_NUM_THREADS", "NEEDLE_VECTOR_BITS", "NEEDLE_CACHE_DIR"):
        monkeypatch.delenv(flag, raising=False)
    monkeypatch.setenv("NEEDLE_BACKEND", "np")
    code, out, err = needle("info")
    assert (code, err) == (0, "")
    facts = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert facts["needle"].startswith(ndl.__version__)
    assert facts["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert facts["NumPy"].startswith(np.__version__)
    assert "cuda() (not usable)" in facts["devices"]
    assert facts["devices"].endswith("by default cpu_numpy()")
    assert facts["flags"] == "NEEDLE_BACKEND=np"
    assert int(facts["threads"]) >= 1
    assert {"platform", "CPU", "extras"} <= facts.keys()


def test_help_lists_the_commands(needle: Needle) -> None:
    code, out, _ = needle("--help")
    assert code == 0
    for command in ("train", "eval", "predict", "info"):
        assert command in out
    code, out, _ = needle("train", "--help")
    assert code == 0
    for option in ("--data-dir", "--resume", "--weight-decay", "one_cycle"):
        assert option in out.lower()


def test_the_package_runs_as_a_module_where_output_is_ascii(trained: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "120"}
    command = [sys.executable, "-m", "needle", "eval", str(trained)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stderr == ""
    assert "test accuracy" in found.stdout
    assert found.stdout.isascii()


def test_importing_needle_imports_none_of_the_command(tmp_path: Path) -> None:
    names = "rich typer safetensors matplotlib PIL pooch needle.train needle.cli".split()
    program = f"import sys, needle; print([name for name in {names} if name in sys.modules])"
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
