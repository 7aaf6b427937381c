"""The command `needle`: train, eval, predict, info. All work is needle.train's."""

from needle.cli.commands import main
