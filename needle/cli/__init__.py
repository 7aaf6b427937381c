"""The command `needle`: train, eval, predict, info, cache."""

from needle.cli.commands import main
