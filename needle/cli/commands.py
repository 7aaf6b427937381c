"""The commands as one application. A user's error ends as a sentence on stderr and exit code 2.

In: arguments, read by typer. Out: text on standard output, by rich; nothing is coloured unasked.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import needle
from needle import train
from needle.compiler import cache
from needle.errors import expect
from needle.train import Progress, TrainConfig, Trainer, folder, open_run

RunName = Annotated[str, typer.Argument(help="A run's folder, or its name in --run-dir.")]
Root = Annotated[Path, typer.Option(help="Where the runs lie.")]
Text = str | None
Integer = int | None
Number = float | None
Flag = bool | None

FORMATS = {"loss": ".4f", "accuracy": ".2%", "perplexity": ".2f", "bits_per_character": ".3f"}


def sentence(error: BaseException) -> str:
    """An error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if isinstance(error, MemoryError):
        return "memory: expected enough for this model and data; received less; choose less of both"
    return " ".join(str(error).split())


def make_console() -> Console:
    """Standard output as it is now."""
    return Console(file=sys.stdout, highlight=False)


def say(console: Console, *lines: str) -> None:
    """Lines as they are: not wrapped, and brackets are no markup."""
    console.print(*lines, sep="\n", markup=False, soft_wrap=True)


# needle info


def show_info() -> None:
    """Show versions, the machine, devices and settings."""
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    affinity = getattr(os, "sched_getaffinity", lambda process: range(os.cpu_count() or 1))
    devices = [
        f"{each}{'' if each.enabled() else ' (not usable)'}" for each in needle.all_devices()
    ]
    extras = [name for name in ("matplotlib", "PIL", "pooch", "tokenizers") if find_spec(name)]
    flags = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("NEEDLE_")]
    facts = {
        "needle": f"{needle.__version__} in {Path(needle.__file__).parent}",
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "NumPy": f"{np.__version__} with {blas.get('name')} {blas.get('version')}",
        "platform": platform.platform(),
        "CPU": processor(),
        "threads": len(affinity(0)),
        "devices": f"{', '.join(devices)}; by default {needle.default_device()}",
        "extras": ", ".join(extras) or "none",
        "flags": ", ".join(flags) or "none",
    }
    say(make_console(), *(f"{name:10} {value}" for name, value in facts.items()))


def processor() -> str:
    """The processor's name, as far as the system tells."""
    file = Path("/proc/cpuinfo")  # on Linux, where `platform` tells the architecture alone
    names = re.findall(r"model name\s*: (.*)", file.read_text() if file.exists() else "")
    return names[0] if names else platform.processor() or platform.machine()


# needle cache


def show_cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all of it.")] = False,
) -> None:
    """List compiled code that is kept on disk, or clear it.

    It lies where NEEDLE_CACHE_DIR says, or in the user's cache; NEEDLE_CACHE_DIR=off keeps none.
    """
    root, console = cache.folder(), make_console()
    if root is None:
        say(console, "nothing is kept: NEEDLE_CACHE_DIR=off, or no home")
        return
    found = cache.entries()
    if clear:
        left = cache.clear()
        removed = sum(entry.size for entry in found) - left
        say(console, f"removed {removed / 2**20:.1f} MiB from {root}")
        return
    table = Table("kind", box=None)
    for header in ("entries", "bytes"):
        table.add_column(header, justify="right")
    table.add_column("folder", overflow="fold")
    for kind in cache.KINDS:
        sizes = [entry.size for entry in found if entry.kind == kind]
        table.add_row(kind, f"{len(sizes):,}", f"{sum(sizes):,}", escape(str(root / kind)))
    console.print(table)


# needle predict


def predict_image(
    run: RunName,
    image: Annotated[Path, typer.Argument(help="A PNG, JPEG, BMP, GIF or WEBP of any size.")],
    run_dir: Root = Path("runs"),
) -> None:
    """Classify a picture with a trained model.

    For models of grey images it is made grey, inverted if its ground is light, cropped if it has
    wide margins, and resized; for those of colour, resized and cut to the middle.
    """
    path, config = open_run(run, run_dir)
    received = f"received {config.model} on {config.data}; see needle generate"
    task = train.task_of(config)
    if task is None:
        raise ValueError(f"predict: expected a run that classifies images; {received}")
    model = train.load_model(path, config)
    picture = train.read_image(image, task.shape, task.span)
    shares = train.class_probabilities(model, picture).tolist()
    best = shares.index(max(shares))
    console, table = make_console(), Table(show_header=False, box=None)
    block = "█" if console.encoding.startswith("utf") else "#"
    for index, (name, share) in enumerate(zip(task.classes, shares, strict=True)):
        style = "bold green" if index == best else None
        table.add_row(escape(name), f"{share:6.1%}", block * round(share * 30), style=style)
    console.print(table)
    console.print(f"[bold]{escape(task.classes[best])}[/bold] ({shares[best]:.1%})")


# needle eval


def evaluate_run(
    run: RunName,
    run_dir: Root = Path("runs"),
    data_dir: Annotated[Text, typer.Option(help="Where the data lies now.")] = None,
) -> None:
    """Show what a trained model is worth on the test data.

    Of images: loss, accuracy and confusion; of text: loss, accuracy of the next token, perplexity
    and bits per character.
    """
    path, config = open_run(run, run_dir, data_dir)
    model, tokenizer = train.load_model(path, config), train.load_vocabulary(path, config)
    samples = train.open_data(replace(config, eval_samples=0), train=False, tokenizer=tokenizer)
    task, console = train.task_of(config), make_console()
    found = train.evaluate(model, samples, task and len(task.classes))
    say(console, f"{path}: {config.model} on {config.data}")
    counted = f" of {found.samples:,} {unit_of(config)}"
    told = train.measures(samples, found.loss, found.accuracy)
    width = max(map(len, told))
    for name, value in told.items():
        text = f"{value:{FORMATS[name]}}{counted if name == 'accuracy' else ''}"
        say(console, f"test {name.replace('_', ' '):{width}}  {text}")
    if task is not None and found.confusion is not None:
        console.print(confusion_table(task.classes, found.confusion.tolist()))


def confusion_table(classes: tuple[str, ...], confusion: list[list[int]]) -> Table:
    """How many samples of a class (rows) the model took for a class (columns, by number)."""
    table = Table("class", title="What each class was taken for", title_justify="left")
    for header in (*map(str, range(len(classes))), "right"):
        table.add_column(header, justify="right")
    for index, (name, counts) in enumerate(zip(classes, confusion, strict=True)):
        cells = [str(count or "") for count in counts]
        cells[index] = f"[bold]{counts[index]}[/bold]"
        share = f"{counts[index] / sum(counts):.1%}" if any(counts) else "-"
        label = name if name == str(index) else f"{index} {escape(name)}"
        table.add_row(label, *cells, share)
    return table


# needle generate


def generate_text(
    run: RunName,
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "\n",
    max_tokens: Annotated[int, typer.Option(help="Tokens to add.", min=0)] = 500,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 1.0,
    top_k: Annotated[Integer, option("Draw among so many tokens.")] = None,
    top_p: Annotated[Number, option("Draw among the likeliest tokens of this share.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the draws.")] = 0,
    run_dir: Root = Path("runs"),
) -> None:
    """Write text with a trained language model, token by token."""
    path, config = open_run(run, run_dir)
    tokenizer = train.load_vocabulary(path, config)
    received = f"received {config.model} on {config.data}; see needle predict"
    if tokenizer is None:
        raise ValueError(f"generate: expected a run on text; {received}")
    model = train.load_model(path, config)
    options = temperature, top_k, top_p
    needle.seed(seed)
    pieces = train.write_text(model, tokenizer, prompt, max_tokens, *options)
    for text in chain([prompt], pieces):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


# needle train, with a live bar on a terminal, and everywhere with a line per epoch


def option(text: str, default: str | bool = True) -> Any:
    """An option with a help text, and the default that this shows."""
    return typer.Option(help=text, show_default=default)


def one_of(name: str) -> str:
    """The names among which a field of TrainConfig chooses."""
    return str(TrainConfig.__dataclass_fields__[name].metadata["expected"]).capitalize() + "."


def unit_of(config: TrainConfig) -> str:
    """What a loss is a mean over."""
    return "tokens" if config.data == "text" else "samples"


DATA_DIR = "the digits, or Python's own sources"
AS_MODEL = "as the model's"


def train_model(
    model: Annotated[Text, typer.Argument(help=one_of("model"), show_default="mlp_resnet")] = None,
    data: Annotated[Text, option(one_of("data"), "digits, or folder; text")] = None,
    data_dir: Annotated[Text, option("Folder of data or of classes, or text.", DATA_DIR)] = None,
    tokenizer: Annotated[Text, option("char, byte or a path of a tokenizer.json.", "char")] = None,
    epochs: Annotated[Integer, option("Passes over the data.")] = None,
    max_steps: Annotated[Integer, option("Steps of the run, in place of epochs.")] = None,
    eval_every: Annotated[Integer, option("Steps between evaluations.", "an epoch")] = None,
    eval_samples: Annotated[Integer, option("Windows of text that test; 0: all.")] = None,
    batch_size: Annotated[Integer, option("Samples per step.")] = None,
    lr: Annotated[Number, option("Learning rate.")] = None,
    optimizer: Annotated[Text, option(one_of("optimizer"))] = None,
    weight_decay: Annotated[Number, option("L2 regularisation; adamw: decoupled.")] = None,
    decay_vectors: Annotated[Flag, option("Decay biases and norms, too.", AS_MODEL)] = None,
    momentum: Annotated[Number, option("Of the optimizer sgd.")] = None,
    beta1: Annotated[Number, option("Of adam and adamw: of the mean.")] = None,
    beta2: Annotated[Number, option("Of adam and adamw: of the mean square.")] = None,
    max_norm: Annotated[Number, option("Limit of all gradients' norm; 0: none.")] = None,
    schedule: Annotated[Text, option(one_of("schedule"))] = None,
    min_lr: Annotated[Number, option("Where the schedule cosine ends.")] = None,
    warmup_steps: Annotated[Integer, option("With which the schedule cosine begins.")] = None,
    hidden_dim: Annotated[Integer, option("Width of the model.")] = None,
    num_blocks: Annotated[
        Integer, typer.Option("--num-blocks", "--num-layers", help="Blocks or layers of the model.")
    ] = None,
    num_heads: Annotated[Integer, option("Attention heads of gpt.")] = None,
    block_size: Annotated[Integer, option("Context: tokens in a window of text.")] = None,
    dropout: Annotated[Number, option("Share of activations that dropout turns off.")] = None,
    bias: Annotated[Flag, option("Whether layers of gpt have a bias.", AS_MODEL)] = None,
    seed: Annotated[Integer, option("Decides weights, order and dropout.")] = None,
    device: Annotated[Text, option(one_of("device"))] = None,
    checkpoint_every: Annotated[Integer, option("Steps between checkpoints.")] = None,
    precision: Annotated[Text, option(one_of("precision"))] = None,
    jit: Annotated[Flag, option("Compile the training step.", "jit")] = None,
    name: Annotated[Text, option("The run's name.", "MODEL-DATA-TIME")] = None,
    resume: Annotated[Text, option("Go on with a run: its folder, or its name.")] = None,
    run_dir: Root = Path("runs"),
) -> None:
    """Train a model. What is not given follows from the model and the data set."""
    given = {key: value for key, value in locals().items() if value is not None}
    del given["run_dir"]
    if resume is None:
        name = given.pop("name", None)
        trainer = Trainer.start(TrainConfig.for_data(**given), run_dir, name)
    else:
        odd = ", ".join(key for key in given if key not in ("resume", "data_dir"))
        expected = "only --run-dir and --data-dir beside it, since the run has its own options"
        expect(not odd, f"--resume: expected {expected}; received {odd}")
        trainer = Trainer.resume(resume, run_dir, data_dir)
    console = make_console()
    if trainer.progress.finished:
        steps, epochs = trainer.config.max_steps, trainer.config.epochs
        done = f"{steps} steps" if steps else f"{epochs} epochs"
        say(console, f"{trainer.path} is finished: {done}")
    else:
        train_on(console, trainer)


def train_on(console: Console, trainer: Trainer) -> None:
    """Train to the end, showing how it goes; then draw the curves."""
    config, path = trainer.config, trainer.path
    again = f"go on with: needle train --resume {shlex.quote(str(path))}"
    size = sum(parameter.size for parameter in trainer.model.parameters())
    say(console, f"{config.model} with {size:,} parameters on {config.data}, {config.device}")
    if config.vocab_size or config.classes:
        both = [getattr(data, "tokens", data) for data in (trainer.data, trainer.test_data)]
        kind = f"tokens to train and test with, a vocabulary of {config.vocab_size:,}"
        if config.classes:
            kind = f"pictures to train and test with, {len(config.classes):,} classes"
        say(console, f"{len(both[0]):,} and {len(both[1]):,} {kind}")
    say(console, f"{path}, from {trainer.progress}")
    try:
        with make_bar(console) as bar:
            bar.add_task("")
            trainer.fit(lambda progress: show(bar, progress, trainer))
    except KeyboardInterrupt as error:
        kept = trainer.progress if isinstance(error, train.Interrupted) else "the last checkpoint"
        print(f"needle: interrupted; {kept} is saved; {again}", file=sys.stderr)
        raise typer.Exit(130) from None
    except OSError as error:
        raise OSError(f"{sentence(error)}; what was saved before is whole; {again}") from None
    try:
        train.draw_curves(path / folder.METRICS, path / folder.CURVES)
    except (ImportError, OSError) as error:
        say(console, f"no curves.png: {sentence(error)}")
    say(console, f"next: needle eval {shlex.quote(str(path))}")
    if config.data == "text":
        say(console, f"      needle generate {shlex.quote(str(path))}")


def make_bar(console: Console) -> bars.Progress:
    """A live bar over all steps, which does nothing where the console is no terminal."""
    state = bars.TextColumn("{task.percentage:3.0f}%  {task.description}")
    columns, disable = (
        (bars.BarColumn(), state, bars.TimeRemainingColumn()),
        not console.is_terminal,
    )
    return bars.Progress(*columns, console=console, transient=True, disable=disable)


def show(bar: bars.Progress, progress: Progress, trainer: Trainer) -> None:
    """Show a step on the bar, and an evaluation as a line; at first, what compiling took."""
    seconds, config = trainer.compile_seconds, trainer.config
    if seconds is not None and not bar.tasks[0].fields.get("told"):
        bar.update(bar.task_ids[0], told=True)
        say(bar.console, f"training step traced, compiled and run in {seconds:.2f} s")
    if config.eval_every:
        place = f"step {progress.step:{len(str(progress.steps))}}/{progress.steps}"
    else:
        place = f"epoch {progress.epoch:{len(str(progress.epochs))}}/{progress.epochs}"
    speed = f"{progress.samples_per_second:7,.0f} {unit_of(config)}/s"
    if progress.record is None:
        state = f"{place}  loss {progress.loss:.4f}  accuracy {progress.accuracy:.1%}"
        state += f"  {speed.strip()}"
        bar.update(
            bar.task_ids[0], completed=progress.step, total=progress.steps, description=state
        )
    else:
        say(bar.console, f"{place}{told_by(progress.record, config)}  {speed}")


def told_by(record: dict[str, Any], config: TrainConfig) -> str:
    """The numbers of an evaluation's line."""
    shown = ["train_loss", "train_accuracy", "test_loss", "test_accuracy"]
    if config.data == "text":
        shown = ["train_loss", "test_loss", "test_perplexity", "test_bits_per_character"]
    line = ""
    for key in shown:
        part, name = key.split("_", 1)
        width = 7 if name == "accuracy" else ""
        text = f"{name.replace('_', ' ')} {record[key]:{width}{FORMATS[name]}}"
        line += f"  {'test ' if part == 'test' else ''}{text}"
    return line


# All of them


app = typer.Typer(
    help="Train, evaluate and use models with needle.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
app.command("train")(train_model)
app.command("eval")(evaluate_run)
app.command("predict")(predict_image)
app.command("generate")(generate_text)
app.command("cache")(show_cache)
app.command("info")(show_info)


def main() -> None:
    """The console entry point."""
    try:
        app(prog_name="needle")
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        print(f"needle: {sentence(error)}", file=sys.stderr)
        sys.exit(2)
