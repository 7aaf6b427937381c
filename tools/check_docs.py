"""Run every ```python block of README.md and docs/, so that what the pages show stays true.

The blocks of one page share a namespace, an empty working directory and a process. Two marks, each
on the line above a fence:

    <!-- no-run -->    above a ```python block: it is shown, not run
    <!-- output -->    above a ```text block: what the block before it must print, to the letter

`python tools/check_docs.py [PAGE.md ...]` checks the given pages, or all.
"""

from __future__ import annotations

import contextlib
import difflib
import io
import re
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r"^(?P<indent>\s*)```(?P<language>\w*)")


@dataclass
class Block:
    """A fenced block: language, the mark above it, text, and the number of its first line."""

    language: str
    mark: str
    text: str
    line: int


def find_blocks(page: str) -> Iterator[Block]:
    lines = page.splitlines()
    index = 0
    while index < len(lines):
        fence = FENCE.match(lines[index])
        if fence is None:
            index += 1
            continue
        start, closing = index + 1, fence["indent"] + "```"
        end = next(
            (i for i in range(start, len(lines)) if lines[i].rstrip() == closing), len(lines)
        )
        above = next((line.strip() for line in reversed(lines[:index]) if line.strip()), "")
        mark = (
            above.removeprefix("<!--").removesuffix("-->").strip()
            if above.startswith("<!--")
            else ""
        )
        yield Block(
            fence["language"], mark, textwrap.dedent("\n".join(lines[start:end])), start + 1
        )
        index = end + 1


def run_page(path: Path) -> str:
    """What is wrong with a page, or the empty string."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    for block in find_blocks(path.read_text(encoding="utf-8")):
        if block.language == "python" and block.mark != "no-run":
            out = io.StringIO()
            code = "\n" * (block.line - 1) + block.text  # tracebacks then name the page's own lines
            try:
                with contextlib.redirect_stdout(out):
                    exec(compile(code, str(path), "exec"), namespace)
            except BaseException:
                trace = textwrap.indent(traceback.format_exc(), "    ")
                return f"the block at line {block.line} failed:\n{trace}"
            printed = out.getvalue()
        elif block.mark == "output":
            shown, found = block.text.rstrip().splitlines(), printed.rstrip().splitlines()
            if shown != found:
                diff = "\n".join(
                    difflib.unified_diff(shown, found, "shown", "printed", lineterm="")
                )
                return f"the output at line {block.line} differs:\n{textwrap.indent(diff, '    ')}"
    return ""


def main() -> int:
    if sys.argv[1:2] == ["--one"]:
        problem = run_page(Path(sys.argv[2]))
        print(problem, end="")
        return int(bool(problem))
    pages = [Path(name).resolve() for name in sys.argv[1:]] or [
        ROOT / "README.md",
        *sorted(ROOT.glob("docs/**/*.md")),
    ]
    failed = 0
    for page in pages:
        count = sum(
            each.language == "python" for each in find_blocks(page.read_text(encoding="utf-8"))
        )
        if not count:
            continue
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--one", str(page)]
            found = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        name = page.relative_to(ROOT) if page.is_relative_to(ROOT) else page
        if found.returncode:
            failed += 1
            print(f"{name}: {found.stdout}{found.stderr}")
        else:
            print(f"{name}: {count} blocks")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
