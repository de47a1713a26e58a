"""Ctrl-C and SIGTERM: the first ends the command in order, others do not cut that short.

Python calls handlers between any two instructions, also while the command tidies up, prints its last line, or
lets libraries end theirs; an exception there would end as a traceback, with temporary folders left behind.
They call them in finalizers, too, where Python reports an exception and goes on: the signal then comes again.
"""

import atexit
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

RESUMABLE = "interrupted; run the same command again to resume"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_TIDYING_SECONDS = 5.0  # after which a second signal ends what hangs
_AGAIN_SECONDS = 0.01
_left: float | None = None  # when the command began to leave
_asked = False  # whether a signal was why
_reported: Callable[[Any], object] | None = None  # what else tells of exceptions that nobody can catch


class Interrupted(BaseException):
    """A signal asked the command to end.

    No KeyboardInterrupt, which the command-line library turns into an exit of its own.
    """


def begin() -> None:
    """From now on a signal raises `Interrupted`, once."""
    global _asked, _left, _reported
    _asked, _left = False, None
    if _reported is None:
        _reported, sys.unraisablehook = sys.unraisablehook, _swallowed
    for number in _SIGNALS:
        signal.signal(number, _interrupt)


def leave() -> None:
    """The command is ending, well or not: from now on signals raise nothing."""
    global _left, _reported
    _left = _left or time.monotonic()
    if _reported is not None:
        sys.unraisablehook, _reported = _reported, None
    # registered last, called first: what Python and libraries tidy at the end is not interrupted either
    atexit.register(_ignore)


def asked() -> bool:
    """Whether a signal has raised `Interrupted`, whatever came of it: libraries in other languages turn what
    is raised inside them into errors of their own."""
    return _asked


def _interrupt(*_: object) -> None:
    global _asked, _left
    if _left is None:
        _asked, _left = True, time.monotonic()
        raise Interrupted
    if time.monotonic() - _left > _TIDYING_SECONDS:
        os.write(2, f"{RESUMABLE}\n".encode())
        os._exit(130)


def _swallowed(unraisable: Any) -> None:
    """Where nobody could catch it: the signal comes again, when that place is left."""
    global _left
    if isinstance(unraisable.exc_value, Interrupted):
        _left = None
        again = threading.Timer(_AGAIN_SECONDS, signal.raise_signal, (signal.SIGINT,))
        again.daemon = True
        again.start()
    elif _reported is not None:
        _reported(unraisable)


def _ignore() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
