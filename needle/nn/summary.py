"""summary: what each module of a model makes of an input, as a table."""

from __future__ import annotations

from typing import Any, NamedTuple

from needle.autograd import Tensor, no_grad
from needle.nn.module import Module, Parameter, named_tensors
from needle.ops.elementwise import as_tensor

HEAD = ("module", "output", "parameters", "bytes")


class Row(NamedTuple):
    """One module: its path and class, its output's shape, and what it and those below hold."""

    name: str
    output: str
    parameters: int
    nbytes: int


class Summary(NamedTuple):
    """A table of modules in the order of `named_modules`; str() and print show it.

    parameters, trainable: numbers of elements. nbytes: those of parameters and buffers.
    """

    rows: tuple[Row, ...]
    parameters: int
    trainable: int
    nbytes: int

    def __repr__(self) -> str:
        cells = [HEAD, *[(n, o, f"{p:,}", f"{size:,}") for n, o, p, size in self.rows]]
        a, b, c, d = (max(map(len, column)) for column in zip(*cells, strict=True))
        lines = [f"{n:<{a}}  {o:<{b}}  {p:>{c}}  {size:>{d}}" for n, o, p, size in cells]
        rule = "-" * len(lines[0])
        counts = f"{self.parameters:,} parameters, {self.trainable:,} trainable"
        return "\n".join([lines[0], rule, *lines[1:], rule, f"{counts}, {self.nbytes:,} bytes"])


def summary(model: Module, *inputs: Any) -> Summary:
    """Run the model once on inputs, and tell what each module makes and holds.

    It runs in evaluation mode and without gradients, and is left as it was. A module that runs
    several times shows its last output's shape, one that does not run shows "-". Inputs are
    Tensors, or what becomes one.
    """
    modules = model.named_modules()
    modes = [module.training for _, module in modules]
    outputs: dict[Module, str] = {}

    def note(module: Module, inputs: Any, y: Any) -> None:
        outputs[module] = shape_of(y)

    hooks = [module.register_forward_hook(note) for _, module in modules]
    model.eval()
    try:
        with no_grad():
            model(*map(as_tensor, inputs))
    finally:
        for hook in hooks:
            hook.remove()
        for (_, module), mode in zip(modules, modes, strict=True):
            module.training = mode
    rows = tuple(row_of(path, module, outputs.get(module, "-")) for path, module in modules)
    trainable = sum(each.size for each in model.parameters() if each.requires_grad)
    return Summary(rows, rows[0].parameters, trainable, rows[0].nbytes)


def row_of(path: str, module: Module, output: str) -> Row:
    tensors = [each for _, each in named_tensors(module)]
    parameters = sum(each.size for each in tensors if isinstance(each, Parameter))
    nbytes = sum(each.size * each.dtype.itemsize for each in tensors)
    name = f"{path}: {type(module).__name__}" if path else type(module).__name__
    return Row(name, output, parameters, nbytes)


def shape_of(y: Any) -> str:
    """The shape of a Tensor, or those of the Tensors in a sequence."""
    if isinstance(y, (list, tuple)):
        return ", ".join(map(shape_of, y))
    return str(y.shape) if isinstance(y, Tensor) else type(y).__name__
