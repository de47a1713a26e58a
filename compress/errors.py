"""What a user did that cannot work, told in one line.

The command line prints these as ``error: <line>`` and leaves with exit code 2; anything else is a bug
and keeps its traceback.
"""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def one_line(text: str, longest: int = 100_000) -> str:
    r"""Text as one line that a terminal shows as it stands: what cannot be printed is spelled out.

    >>> one_line("bad name:\n  \x1b[31mred: ")
    'bad name: \\x1b[31mred'
    >>> one_line("a" * 99, longest=30)
    'aaaaaaaaaaaaa ... aaaaaaaaaaaa'
    """
    line = " ".join(part for part in map(str.strip, text.splitlines()) if part).rstrip(" :")
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    if len(line) > longest:
        half = (longest - 5) // 2
        line = f"{line[: longest - 5 - half]} ... {line[-half:]}"
    return line


def reason(error: BaseException) -> str:
    """What an exception says, in a short line; what it is called where it says nothing."""
    return one_line((str(error).strip() or type(error).__name__).splitlines()[0], 300) or type(error).__name__


class UserError(Exception):
    """A mistake of the caller: the message names the file or field, the value, and what to do.

    It is one line, however it was made up: names and values in it may come from anybody's file.
    """

    longest = 1000  # characters

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message, self.longest))


@contextmanager
def door(failure: str, advice: str = "") -> Iterator[None]:
    """Where a library reads what somebody else wrote: whatever it raises becomes `failure: reason; advice`.

    Libraries fail on damaged input wherever it is first used, with any exception; what is written in Rust
    panics, which Python sees as a `BaseException`.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{failure}: {reason(error)}{advice and '; '}{advice}") from None


@contextmanager
def about(name: str) -> Iterator[None]:
    """What is refused inside is refused by the name of what it was about."""
    try:
        yield
    except UserError as error:
        raise UserError(f"'{name}': {error}") from None


@contextmanager
def staying(where: str) -> Iterator[None]:
    """Whatever a plugin calls must not end the program, maybe with the code of success, without a word."""
    try:
        yield
    except SystemExit as error:
        raise UserError(f"{where}: the pass left the program ({reason(error)}); mend it") from error


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
