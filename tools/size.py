"""Count the package: lines without blanks, comments and docstrings per room, ops, and flags.

`python tools/size.py` prints the table; `--check` also fails where a limit is passed.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "needle"
MAX_LINES = 19480
MAX_FLAGS = 8

FLAG = re.compile(r"\bNEEDLE_[A-Z0-9]\w*")
COMPOSITES = {"CompositeMethods", "Composite", "CompositeTuple"}
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def docstring_lines(tree: ast.Module) -> set[int]:
    """The numbers of the lines that docstrings stand on."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                if isinstance(first.value.value, str):
                    lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def count_lines(source: str) -> int:
    """Lines of code: those that hold a token other than layout, comments and docstrings."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(ast.parse(source)))


def names(nodes: list[ast.expr]) -> set[str]:
    """The last names of expressions: primitive of `autograd.primitive` and `primitive(...)`."""
    bare = [node.func if isinstance(node, ast.Call) else node for node in nodes]
    found = {
        node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "") for node in bare
    }
    return found - {""}


def count_ops(sources: list[str]) -> tuple[int, int]:
    """Primitives and composites among the classes decorated with @primitive."""
    classes: dict[str, ast.ClassDef] = {}
    for source in sources:
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = node

    def is_composite(name: str) -> bool:
        node = classes.get(name)
        return name in COMPOSITES or (
            node is not None and any(map(is_composite, names(node.bases)))
        )

    ops = [name for name, node in classes.items() if "primitive" in names(node.decorator_list)]
    composites = sum(map(is_composite, ops))
    return len(ops) - composites, composites


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a limit is passed")
    check = parser.parse_args().check

    sources = {
        path.relative_to(PACKAGE): path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*.py")
    }
    lines: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for path, source in sources.items():
        lines[path.parts[0]] += count_lines(source)
        files[path.parts[0]] += 1
    total = lines.total()
    primitives, composites = count_ops(
        [source for path, source in sources.items() if path.parts[0] == "ops"]
    )
    flags = sorted({flag for source in sources.values() for flag in FLAG.findall(source)})

    print(f"{'room':<20}{'files':>8}{'lines':>8}")
    for room, count in sorted(lines.items(), key=lambda item: -item[1]):
        print(f"{room:<20}{files[room]:>8}{count:>8}")
    listed = ", ".join(flags)
    print(f"{primitives} primitives, {composites} composites")
    print(f"{len(flags)} of {MAX_FLAGS} environment flags: {listed}")

    if check and total > MAX_LINES:
        print(f"size: expected at most {MAX_LINES} lines; found {total}", file=sys.stderr)
    if check and len(flags) > MAX_FLAGS:
        print(
            f"size: expected at most {MAX_FLAGS} environment flags; found {listed}", file=sys.stderr
        )
    return int(check and (total > MAX_LINES or len(flags) > MAX_FLAGS))


if __name__ == "__main__":
    sys.exit(main())
