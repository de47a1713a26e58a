"""Progress of anything that takes longer than two seconds.

On a terminal a bar with an estimate; in a pipe or in CI plain lines, about one every ten seconds. What
ends within two seconds prints nothing outside a terminal.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

_FIRST_LINE_SECONDS = 2.0
_LINE_SECONDS = 10.0
_TELLING_SHARE = 0.02  # of the work: start-up would distort an estimate made earlier


class Tracker:
    """Counts towards a total; `advance` says how far, with figures to show beside."""

    def __init__(self, total: float, what: str, unit: str) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = 0.0
        self.started = time.monotonic()
        self.figures = ""

    def advance(self, n: float = 1, **figures: float | str) -> None:
        """Move on by `n`; figures (`loss=3.2`) replace those shown before."""
        self.done += n
        if figures:
            self.figures = "  ".join(f"{key} {_show(value)}" for key, value in figures.items())
        self.refresh()

    def note(self, text: str) -> None:
        """Print a line of its own."""
        print(text, file=sys.stderr)

    def refresh(self) -> None:
        """Show the state; the plain tracker does so only now and then."""

    @property
    def seconds_left(self) -> float | None:
        """Estimated from the average pace so far; None while too little is done to tell."""
        passed = time.monotonic() - self.started
        if self.done <= _TELLING_SHARE * self.total:
            return None
        return passed * max(self.total - self.done, 0) / self.done


SILENT = Tracker(0, "", "")  # for processes that work beside the one that tells


class _LineTracker(Tracker):
    _next_line = _FIRST_LINE_SECONDS

    def refresh(self) -> None:
        passed = time.monotonic() - self.started
        if passed >= self._next_line:
            self._next_line = passed + _LINE_SECONDS
            left = self.seconds_left
            ends = "" if left is None else f", about {clock(left)} left"
            share = f"{100 * self.done / self.total:.0f} %" if self.total else ""
            print(f"{self.what}: {share}{ends}  {self.figures}".rstrip(), file=sys.stderr, flush=True)


@contextmanager
def track(total: float, what: str, unit: str = "it") -> Iterator[Tracker]:
    """Show progress towards `total` while the block runs."""
    if not sys.stderr.isatty():
        yield _LineTracker(total, what, unit)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    class BarTracker(Tracker):
        def refresh(self) -> None:
            bar.update(task, completed=self.done, figures=self.figures)

        def note(self, text: str) -> None:
            bar.console.print(text, highlight=False, markup=False)

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    )
    with bar:
        task = bar.add_task(what, total=total, figures="")
        yield BarTracker(total, what, unit)


def clock(seconds: float) -> str:
    """A duration for people.

    >>> clock(8.4), clock(75), clock(4000)
    ('8 s', '1 min 15 s', '1 h 06 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _show(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
