"""How the package refuses what it cannot take: one sentence, before anything has changed."""

from __future__ import annotations


def expect(holds: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise error(message) unless the condition holds."""
    if not holds:
        raise error(message)


class TraceError(RuntimeError):
    """Code that cannot be traced into a program: which value, where, what to write instead."""


class CompileError(RuntimeError):
    """Code that cannot be made or loaded on this machine: what was expected, received, the cure."""
