"""`python -m compress` is the console script."""

from compress.cli import main

main()
