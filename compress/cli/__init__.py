"""Parsing and printing only.

Importing the commands takes a moment, in which nothing has begun: a signal then ends the process with a line,
as it does later.
"""

import os
import signal


def main() -> None:
    """Console script: run a command of the command line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _nothing_begun)
    from compress.cli.commands import main as command

    command()


def _nothing_begun(*_: object) -> None:
    os.write(2, b"interrupted; nothing was begun\n")
    os._exit(130)
