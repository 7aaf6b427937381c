"""Where a value is made: the line of the user's code, and the module's path. Next: debug.py."""

from __future__ import annotations

import linecache
import sys
from pathlib import Path
from typing import Any, NamedTuple

from needle.autograd import MODE

PACKAGE = str(Path(__file__).parent)
APPLICATIONS = tuple(str(Path(PACKAGE, room)) for room in ("train", "cli"))


class Site(NamedTuple):
    """Where a value was made: the line of the user's code, and the module that ran."""

    file: str
    line: int
    path: str
    backward: bool

    def __str__(self) -> str:
        code = linecache.getline(self.file, self.line).strip()
        place = f"{self.file}:{self.line}" + (f" `{code}`" if code else "")
        return f"{place} (in {self.path})" if self.path else place


def current_site(path: str = "") -> Site:
    """The innermost line of the stack that is not needle's own; path is the module's."""
    frame: Any = sys._getframe(1)
    while frame.f_back is not None and is_inside(frame.f_code.co_filename):
        frame = frame.f_back
    in_backward = MODE.backward_of is not None
    return Site(frame.f_code.co_filename, frame.f_lineno, path, in_backward)


def is_inside(file: str) -> bool:
    """Whether a file is part of the library (the applications in it count as users)."""
    return file.startswith(PACKAGE) and not file.startswith(APPLICATIONS)
