"""What the API pages show: the names that a room exports, with docstrings as plain text.

mkdocs.yml names this file; griffe calls it for every object that it reads.
"""

from __future__ import annotations

import importlib
import re
import textwrap
from functools import cache
from types import ModuleType
from typing import Any

from griffe import Extension, Kind, Object

LISTED_WHOLE = {"Tensor", "NDArray"}  # classes whose methods are shown without a docstring too

CODE = re.compile(r"(`+[^`]+`+)")
SPECIAL = re.compile(r"([\\*_\[\]<>|#])")
COLUMNS = re.compile(r"\S {3,}\S")
ARGUMENT = re.compile(r"\w+(, \w+)*: ")


def as_markdown(docstring: str) -> str:
    """Markdown that shows a docstring as it is: tables keep columns, arguments begin lines."""
    return "\n\n".join(map(paragraph, re.split(r"\n\s*\n", docstring)))


def paragraph(text: str) -> str:
    lines = text.splitlines()
    if any(map(COLUMNS.search, lines)) or all(line.startswith("    ") for line in lines):
        return textwrap.indent(textwrap.dedent(text), "    ")
    shown = [escape(line.strip()) for line in lines]
    for index, line in enumerate(lines[1:]):
        if ARGUMENT.match(line):
            shown[index] += "  "  # Markdown's line break
    return "\n".join(shown)


def escape(line: str) -> str:
    """Backslashes before what Markdown would read as markup, outside `code`."""
    parts = CODE.split(line)
    parts[::2] = [SPECIAL.sub(r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


@cache
def exported(room: str) -> frozenset[str] | None:
    """The names that a room such as needle.nn offers; None for a file, which lists its own."""
    module = importlib.import_module(room)
    if not hasattr(module, "__path__"):
        return None
    names = {name for name, found in vars(module).items() if not isinstance(found, ModuleType)}
    return frozenset(getattr(module, "__all__", names))


def is_shown(obj: Object) -> bool:
    """Whether an object has a place on its page."""
    parent = obj.parent
    if parent is None or obj.kind is Kind.MODULE:
        return True
    if obj.name.startswith("_"):
        return False
    if parent.kind is Kind.MODULE:
        names = exported(".".join(obj.path.split(".")[:2])) if obj.path.count(".") > 2 else None
        if names is not None:
            return obj.name in names
    return obj.docstring is not None or parent.name in LISTED_WHOLE


class Pages(Extension):
    """Rewrites each docstring once it was read, and hides what is not for users."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        obj.public = is_shown(obj)
        if obj.docstring:
            obj.docstring.value = as_markdown(obj.docstring.value)
