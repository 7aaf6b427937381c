"""`python -m needle`: the command line."""

from needle.cli import main

main()
