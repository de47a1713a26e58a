"""What a user did that cannot work, told in one line.

The command line prints these as ``error: <line>`` and leaves with exit code 2; anything else is a bug
and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake of the caller: the message names the file or field, the value, and what to do."""


class MissingExtra(UserError):
    """An optional dependency is absent; the message names the command that installs it."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(
            f"{purpose} needs the package '{package}': pip install {package}  (it is in the extra '{extra}')"
        )


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known name nearest to `name`, or lists the known ones.

    >>> nearest("quantize_gtpq", ["quantize_gptq", "train"])
    "did you mean 'quantize_gptq'?"
    >>> nearest("gptq", ["quantize_gptq", "quantize_round"])
    "did you mean 'quantize_gptq'?"
    >>> nearest("zzz", ["train", "distill"])
    'known: distill, train'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5) or [
        n for n in names if name and name in n
    ]
    return f"did you mean '{close[0]}'?" if close else "known: " + ", ".join(names)
