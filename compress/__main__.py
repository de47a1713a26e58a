"""`python -m compress` is the console script."""

from compress.cli.commands import main

main()
