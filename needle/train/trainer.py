"""Trainer: a run from its first step, or from a checkpoint, to its last; the same bits either way.

All that a step depends on is in the checkpoint: parameters and running statistics, optimizer,
schedule, the loader's place, the random generator, and the sums behind the numbers shown. It is
written before the first step, every `checkpoint_every` steps, after every evaluation and on Ctrl-C.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

from needle import init, optim
from needle.autograd import Tensor, autocast, no_grad
from needle.data import DataLoader, Tokenizer
from needle.dtype import bfloat16
from needle.errors import expect
from needle.files import AnyPath, reading, remove_partial_files
from needle.jit import jit
from needle.nn import Module
from needle.nn.functional import cross_entropy
from needle.ops import argmax, equal
from needle.optim import Optimizer, Schedule
from needle.train import folder
from needle.train.config import TrainConfig
from needle.train.metrics import MetricsFile, Progress
from needle.train.model import evaluate, in_rows, make_model
from needle.train.task import completed, make_tokenizer, measures, open_data, task_of

OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD, "rmsprop": optim.RMSprop,
    "adagrad": optim.Adagrad, "adafactor": optim.Adafactor, "lion": optim.Lion,
}  # fmt: skip
PARTS = ("progress", "model", "optimizer", "schedule", "loader")  # of a Trainer, with a state


class Interrupted(KeyboardInterrupt):
    """Ctrl-C came; a checkpoint holds the run after its last whole step."""


class Trainer:
    """Trains the model of a run.

        Trainer.start(TrainConfig.for_data("digits", seed=1), root="runs", name="first").fit()
        Trainer.resume("runs/first").fit()  # after an interruption

    Random numbers come from `ndl.seed(config.seed)` on. ValueError where the data is bad or the
    loss is no longer finite, OSError where a file cannot be written; the last checkpoint stays.
    """

    path: Path  # the run's folder, set by start and resume

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer | None = None) -> None:
        if config.data == "text":
            tokenizer = tokenizer or make_tokenizer(config)
        config = completed(config, tokenizer)
        self.config, self.tokenizer = config, tokenizer
        self.data, self.test_data = (open_data(config, part, tokenizer) for part in (True, False))
        device = folder.usable_device(config.device)
        init.seed(config.seed)
        self.model = make_model(config, device)
        self.optimizer = make_optimizer(config, self.model)
        batch, seed = config.batch_size, config.seed
        options: dict[str, Any] = {"shuffle": True, "seed": seed, "device": device}
        whole = tokenizer is not None and len(self.data) >= batch  # of text, the rest is left out
        self.loader = DataLoader(self.data, batch, drop_last=whole, **options)
        epoch = len(self.loader)
        steps = config.max_steps or config.epochs * epoch
        self.schedule = make_schedule(config, self.optimizer, steps)
        self.progress = Progress(steps, epoch, config.eval_every or epoch)
        self.compiles = config.jit and config.device == "cpu"
        self.update = jit(self.train_on_batch) if self.compiles else self.train_on_batch
        self.compile_seconds: float | None = None  # the first step's, where it was compiled

    @classmethod
    def start(cls, config: TrainConfig, root: AnyPath = "runs", name: str | None = None) -> Trainer:
        """A new run in a new folder; the errors of `create_run`."""
        trainer = cls(config)
        trainer.path = folder.create_run(trainer.config, root, name, trainer.tokenizer)
        return trainer

    @classmethod
    def resume(cls, run: AnyPath, root: AnyPath = "runs", data_dir: str | None = None) -> Trainer:
        """A run as its newest checkpoint holds it; FileError where that or config.json is bad."""
        path, config = folder.open_run(run, root, data_dir)
        remove_partial_files(path)
        file = path / folder.CHECKPOINT
        state = folder.load_checkpoint(file) if file.exists() else None
        if state is not None:
            folder.check_size(file, config, state.get("model"))
        trainer = cls(config, folder.load_vocabulary(path, config))
        trainer.path = path
        if state is not None:  # it was not killed before its first checkpoint
            trainer.restore(state)
        return trainer

    # Checkpoints

    def save(self, metrics: MetricsFile) -> None:
        """Write a checkpoint."""
        os.fsync(metrics.file.fileno())  # the metrics survive where the checkpoint does
        state = {name: getattr(self, name).state_dict() for name in PARTS}
        state["random"] = random_state().detach()
        folder.save_checkpoint(self.path / folder.CHECKPOINT, state)

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's state. FileError where it does not fit: drop this trainer."""
        with reading(self.path / folder.CHECKPOINT, "a checkpoint of this run"):
            for name in PARTS:
                getattr(self, name).load_state_dict(state[name])
            found = state["random"]
            fits = found.shape == (2,) and found.dtype == "int64"
            expect(fits, "random: expected a key and a counter of int64; received others")
            random_state().data = Tensor(found)

    # Training

    def fit(self, watch: Callable[[Progress], None] = lambda progress: None) -> None:
        """Train to the last step; `watch` is called after every step and every evaluation.

        Ctrl-C ends it after a whole step, with a checkpoint, and raises Interrupted.
        """
        metrics = MetricsFile(self.path / folder.METRICS, self.progress.step)
        with metrics.file, noting_interrupts() as interrupted:
            if self.progress.step == 0:
                self.save(metrics)
            self.model.train()
            start = time.perf_counter() - self.progress.seconds
            for x, y in self.batches():
                self.run_step(x, y, metrics)
                self.progress.seconds = time.perf_counter() - start
                watch(self.progress)
                if not self.progress.due:
                    self.save_between(metrics, interrupted.is_set())
                    continue
                self.run_test(metrics)
                watch(self.progress)
                self.progress = self.progress.after_evaluation()
                self.save(metrics)
                start = time.perf_counter()

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of all steps that are left, epoch after epoch."""
        while not self.progress.finished:
            yield from islice(self.loader, self.progress.steps - self.progress.step)

    def train_on_batch(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Update the parameters once; the loss, and how many predictions were right."""
        with autocast(bfloat16, self.config.precision == "bfloat16"):
            logits, y = in_rows(self.model(x), y)
            loss = cross_entropy(logits, y)
        with no_grad():
            loss.backward()
        if self.config.max_norm:
            self.optimizer.clip_grad_norm(self.config.max_norm)
        self.optimizer.step()
        self.optimizer.reset_grad()
        return loss.detach(), equal(argmax(logits, 1), y).sum()

    def run_step(self, x: Tensor, y: Tensor, metrics: MetricsFile) -> None:
        """One update of the parameters, and its record."""
        progress, start = self.progress, time.perf_counter()
        found = self.update(x, y)
        if self.compile_seconds is None and self.compiles:
            self.compile_seconds = time.perf_counter() - start
        loss, correct = found[0].item(), int(found[1])
        progress.count(y.size, correct, loss)
        record = {"kind": "step", "step": progress.step, "epoch": progress.epoch}
        record |= measures(self.data, loss, correct / y.size)
        metrics.append({**record, "lr": self.optimizer.lr})
        self.schedule.step()

    def save_between(self, metrics: MetricsFile, interrupted: bool) -> None:
        """After a step that no evaluation follows: write a checkpoint where one is due."""
        if interrupted or self.progress.step % self.config.checkpoint_every == 0:
            self.save(metrics)
            if interrupted:
                raise Interrupted

    def run_test(self, metrics: MetricsFile) -> None:
        """Evaluate; write the record of that and the model."""
        progress, task = self.progress, task_of(self.config)
        found = evaluate(self.model, self.test_data, task and len(task.classes))
        kind = "evaluation" if self.config.eval_every else "epoch"
        record: dict[str, Any] = {"kind": kind, "step": progress.step, "epoch": progress.epoch}
        for part, data, (loss, accuracy) in (
            ("train", self.data, (progress.loss, progress.accuracy)),
            ("test", self.test_data, found[:2]),
        ):
            measured = measures(data, loss, accuracy)
            record |= {f"{part}_{name}": value for name, value in measured.items()}
        progress.record = {**record, "samples_per_second": progress.samples_per_second}
        metrics.append(progress.record)
        folder.save_model(self.path, self.model)


@contextmanager
def noting_interrupts() -> Iterator[threading.Event]:
    """Within the block Ctrl-C sets the event, to be heeded between steps; a second acts at once.

    Nothing sets it outside of the main thread, where Python delivers no signals, and where Ctrl-C
    is ignored or somebody else's.
    """
    asked = threading.Event()

    def note(*signal: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield asked
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def random_state() -> Tensor:
    """The state of the generator that `ndl.seed` began."""
    return cast(Any, init.generator()).state


def make_optimizer(config: TrainConfig, model: Module) -> Optimizer:
    """The configured optimizer of all parameters."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        options["momentum"] = config.momentum
    if config.optimizer in ("adam", "adamw"):
        options |= {"beta1": config.beta1, "beta2": config.beta2}
    groups: list[Any] = model.parameters()
    if not config.decay_vectors:
        vectors = {p for p in groups if p.size == max(p.shape, default=1)}
        matrices = [p for p in groups if p not in vectors]
        rest = [p for p in groups if p in vectors]
        parts = {"params": matrices}, {"params": rest, "weight_decay": 0.0}
        groups = [part for part in parts if part["params"]]
    return OPTIMIZERS[config.optimizer](groups, **options)


def make_schedule(config: TrainConfig, optimizer: Optimizer, steps: int) -> Schedule:
    """The configured schedule over all steps of a run.

    step: to a tenth after each third; exponential: to a hundredth at the end.
    """
    warmup = min(config.warmup_steps, steps // 2)
    kind, options = {
        "constant": (optim.ConstantLR, ()),
        "cosine": (optim.CosineLR, (steps, warmup, config.min_lr)),
        "one_cycle": (optim.OneCycleLR, (config.lr, steps)),
        "step": (optim.StepLR, (math.ceil(steps / 3),)),
        "exponential": (optim.ExponentialLR, (0.01 ** (1 / steps),)),
    }[config.schedule]
    return kind(optimizer, *options)
