"""The command `needle`: train, eval, predict, generate, info, cache."""

from needle.cli.commands import main
