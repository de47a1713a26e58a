"""What every part of the campaign says of a case: where it was, how it ended, how to see it again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

GOOD = ("right", "refused", "resumed")  # right data; one line of refusal; the same bytes in the end


@dataclass(frozen=True)
class Outcome:
    """One case.

    `target`: what was put to the test, a row of the table. `verdict`: one of `GOOD`, or a few words for what
    is wrong ("traceback", "hang", "damaged and loaded"), a column of it. `detail`: the line or the end of
    the traceback. `again`: commands or lines of Python that show it, in a fresh process.
    """

    target: str
    verdict: str
    detail: str = ""
    again: str = ""

    @property
    def bad(self) -> bool:
        """Whether somebody has to mend something."""
        return self.verdict not in GOOD


@dataclass(frozen=True)
class Settings:
    """`count` cases drawn from `seed`, in the empty folder `work`, by `jobs` processes at a time."""

    count: int
    seed: int
    work: Path
    jobs: int = 1


Part = Callable[[Settings], Iterator[Outcome]]


def table(outcomes: list[Outcome]) -> str:
    """A Markdown table: targets by verdicts, with the sums."""
    verdicts = sorted({o.verdict for o in outcomes}, key=lambda v: (v not in GOOD, v))
    counts = Counter((o.target, o.verdict) for o in outcomes)
    lines = [_row(["target", "cases", *verdicts]), _row([":--", *["--:"] * (len(verdicts) + 1)])]
    targets = sorted({o.target for o in outcomes})
    for target in targets:
        cells = [counts[target, verdict] for verdict in verdicts]
        lines.append(_row([target, str(sum(cells)), *map(str, cells)]))
    sums = [sum(counts[target, verdict] for target in targets) for verdict in verdicts]
    return "\n".join([*lines, _row(["**all**", str(sum(sums)), *map(str, sums)])])


def distinct(outcomes: list[Outcome]) -> list[Outcome]:
    """One outcome for each failure that differs, by target, verdict and the last line of its detail."""
    seen = {}
    for outcome in outcomes:
        if outcome.bad:
            last = outcome.detail.strip().splitlines()[-1:] or [""]
            seen.setdefault((outcome.target, outcome.verdict, last[0][:120]), outcome)
    return list(seen.values())


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
