"""Where a run stands, and how it got there: metrics.jsonl, and curves.png drawn from it.

metrics.jsonl has a JSON object per line, for every step and every evaluation; "kind" says which
("step"; "epoch", or "evaluation" where these have a period of their own). A line is written by one
system call, so that nobody reads half of one, not even after a kill. A run that goes on from a
checkpoint first cuts off what was written after it. Next: folder.py.
"""

from __future__ import annotations

import errno
import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import takewhile
from pathlib import Path
from typing import Any

from needle.errors import expect
from needle.files import import_extra, write_atomically

Record = dict[str, Any]

KEPT = ("epoch", "step", "step_in_epoch", "samples", "correct", "loss_sum", "seconds")


@dataclass
class Progress:
    """Where a run stands. record: the line in metrics.jsonl of an evaluation that has just ended.

    steps: of the whole run; period: of training between two evaluations.
    """

    steps: int
    steps_per_epoch: int
    period: int
    epoch: int = 1  # from 1, of the latest step; so is step_in_epoch
    step: int = 0
    step_in_epoch: int = 0
    samples: int = 0  # since the latest evaluation, like what follows
    correct: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    record: Record | None = None

    @property
    def loss(self) -> float:
        """The mean over the samples since the latest evaluation."""
        return self.loss_sum / max(self.samples, 1)

    @property
    def accuracy(self) -> float:
        """The share of them that were predicted right, in training."""
        return self.correct / max(self.samples, 1)

    @property
    def samples_per_second(self) -> float:
        return self.samples / max(self.seconds, 1e-9)

    @property
    def epochs(self) -> int:
        """Passes over the data, the last one perhaps not whole."""
        return -(-self.steps // self.steps_per_epoch)

    @property
    def finished(self) -> bool:
        return self.step >= self.steps

    @property
    def due(self) -> bool:
        """Whether an evaluation follows the latest step."""
        return self.step % self.period == 0 or self.finished

    def count(self, samples: int, correct: int, loss: float) -> None:
        """One more step, with the mean loss of its samples."""
        self.step += 1
        self.epoch, place = divmod(self.step - 1, self.steps_per_epoch)
        self.epoch, self.step_in_epoch = self.epoch + 1, place + 1
        self.samples += samples
        self.correct += correct
        self.loss_sum += loss * samples

    def after_evaluation(self) -> Progress:
        """The same run where the next step begins."""
        place = self.epoch, self.step, self.step_in_epoch
        return Progress(self.steps, self.steps_per_epoch, self.period, *place)

    def state_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in KEPT}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a `state_dict()`; ValueError for what is none."""
        for name in KEPT:
            value = state[name]
            fits = type(value) is type(getattr(self, name)) and 0 <= value < math.inf
            expect(fits, f"progress: expected {name} of at least 0; received {value!r}")
            setattr(self, name, value)

    def __str__(self) -> str:
        place = f"epoch {self.epoch}, step {self.step_in_epoch}/{self.steps_per_epoch}"
        if self.period != self.steps_per_epoch:
            place = f"step {self.step}/{self.steps}"
        return place if self.step else "the beginning"


class MetricsFile:
    """The metrics of a run, open for appending, without the steps after `last_step`.

    OSError, naming the file, where it cannot be written; a line that did not fit is taken back.
    """

    def __init__(self, path: Path, last_step: int = 0) -> None:
        self.path = path
        self.file = open(path, "ab", buffering=0)
        lines = path.read_bytes().splitlines(keepends=True)
        kept = takewhile(lambda line: parse_line(line).get("step", math.inf) <= last_step, lines)
        self.size = sum(map(len, kept))
        self.file.truncate(self.size)

    def append(self, record: Record) -> None:
        """Write one record; ValueError where a number in it, such as the loss, is not finite."""
        finite = all(math.isfinite(x) for x in record.values() if isinstance(x, float))
        received = f"{record}; choose a smaller learning rate"
        expect(finite, f"metrics: expected finite numbers; received {received}")
        line = json.dumps(record).encode() + b"\n"
        try:
            if self.file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self.file.truncate(self.size)
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        self.size += len(line)


def parse_line(line: bytes) -> Record:
    """The record of a whole line; an empty one for anything else."""
    with suppress(ValueError, RecursionError):
        record = json.loads(line)
        if line.endswith(b"\n") and isinstance(record, dict) and type(record.get("step")) is int:
            return record
    return {}


def read_metrics(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; what is no whole line is left out."""
    return [*filter(None, map(parse_line, path.read_bytes().splitlines(keepends=True)))]


def draw_curves(metrics: Path, path: Path) -> None:
    """Draw loss and accuracy, of text loss and perplexity, over the steps of a metrics.jsonl.

    A PNG. ImportError without Matplotlib, OSError as in `write_atomically`.
    """
    figure = import_extra("matplotlib.figure", "plot").Figure((10, 4), layout="constrained")
    records = read_metrics(metrics)
    text = any("perplexity" in record for record in records)
    names = ("loss", "perplexity" if text else "accuracy")
    for axes, name in zip(figure.subplots(1, 2), names, strict=True):
        for key, style in (
            (name, {"color": "tab:blue", "alpha": 0.25, "linewidth": 0.8}),
            (f"train_{name}", {"color": "tab:blue", "label": "train"}),
            (f"test_{name}", {"color": "tab:orange", "label": "test", "marker": "."}),
        ):
            held = [record for record in records if key in record]
            axes.plot([each["step"] for each in held], [each[key] for each in held], **style)
        axes.set(xlabel="step", ylabel=name)
        if name == "perplexity":
            axes.set_yscale("log", base=2)
            axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend()
    picture = BytesIO()
    figure.savefig(picture, format="png", dpi=120)
    write_atomically(path, picture.getvalue())
