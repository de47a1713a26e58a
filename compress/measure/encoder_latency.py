"""How long an encoder takes by batch and length: a grid of cells, in the processes that are timed anyway.

Method. A cell is so many texts at once, all of one length, or of the lengths that some data has, in its own
order, each batch as wide as its longest. A repetition is one whole forward pass. The turns of the grid come
after those of prompts where all processes are alive (their peak memory has been read by then), and at the end
of each of those where they are not: in a turn each process goes through the cells from the cheapest to the
dearest, and times each five times after a pass that is not counted. All artifacts have the same seconds; a
turn may take half of those that are left, so that dear cells leave cheap ones their 20 repetitions for a p95.
A cell begins only where it fits, by the time that those before took.

Maths. Texts per second are the batch over the median; tokens per second, the texts' tokens over it, without
those that only fill a batch. Percentiles follow `statistics.percentile`.

Limits: cells beyond the model's context, the seconds, or the memory are left out, and the record of the
protocol says which and why. Texts are cut from the evaluation text; padding takes as long as text, since no
runtime skips it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.host.memory import no_garbage_collection
from compress.measure.statistics import percentile
from compress.runtimes.base import Runtime

REPETITIONS = 5  # of a cell in a turn
TURNS = 4  # with these there is a p95
_ROOM = 3  # times the answer's bytes: the runtime's own, the copy that leaves it, what it is made of


@dataclass(frozen=True)
class Cell:
    """Texts at once: `widths` of the batches, one after the other, and the `tokens` of text in all of them.

    `length`: of every text; None where they are the data's own.
    """

    batch: int
    length: int | None
    widths: tuple[int, ...]
    tokens: int

    @property
    def name(self) -> str:
        """What records call it.

        >>> fixed(8, 128).name, own(2, [3, 9, 4, 5]).name
        ('8 x 128', '2 x own')
        """
        return f"{self.batch} x {'own' if self.length is None else self.length}"

    @property
    def size(self) -> int:
        """Positions of its largest batch, padded ones too."""
        return self.batch * max(self.widths)


def fixed(batch: int, length: int) -> Cell:
    """Texts of one length."""
    return Cell(batch, length, (length,), batch * length)


def own(batch: int, lengths: Sequence[int]) -> Cell:
    """Texts as long as some data's, in its order; those that fill no batch are left out, unless they are all.

    >>> own(2, [3, 9, 4, 5, 7])
    Cell(batch=2, length=None, widths=(9, 5), tokens=21)
    """
    batch = min(batch, len(lengths))
    groups = [lengths[start : start + batch] for start in range(0, len(lengths) - batch + 1, batch)]
    groups = groups[: REPETITIONS * TURNS]  # as many as can be timed
    return Cell(batch, None, tuple(map(max, groups)), sum(map(sum, groups)))


def cells_of(batches: Sequence[int], lengths: Sequence[int], own_lengths: Sequence[int] = ()) -> list[Cell]:
    """All cells, the cheapest first.

    >>> [cell.name for cell in cells_of((1, 8), (16, 512))]
    ['1 x 16', '8 x 16', '1 x 512', '8 x 512']
    """
    found = [fixed(batch, length) for batch in dict.fromkeys(batches) for length in dict.fromkeys(lengths)]
    found += [own(batch, own_lengths) for batch in dict.fromkeys(batches) if own_lengths]
    return sorted(dict.fromkeys(found), key=lambda cell: cell.size)


def time_cell(
    runtime: Runtime, tokens: npt.NDArray[np.int32], widths: Sequence[int], first: int = 0
) -> dict[str, Any]:
    """`seconds` of some passes of tokens [batch, widest], after one that is not counted.

    Repetition r reads the first `widths[(first + r) % len(widths)]` columns. Also `width`, that of a row of
    the answer.
    """
    seconds = []
    with no_garbage_collection():
        state = runtime.prefill(np.ascontiguousarray(tokens[:, : widths[first % len(widths)]]))
        for number in range(first, first + REPETITIONS):
            given = np.ascontiguousarray(tokens[:, : widths[number % len(widths)]])
            start = perf_counter()
            state = runtime.prefill(given)
            seconds.append(perf_counter() - start)
    return {"seconds": seconds, "width": int(state.logits.shape[-1])}


@dataclass
class Grid:
    """What was timed of one artifact: by the name of a cell the seconds of every repetition, or why there are
    none. `context`: the most tokens that its model takes."""

    cells: list[Cell]
    context: int
    left: float  # seconds, for all turns
    turns: int  # that are still to come
    seconds: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    width: int | None = None  # of an answer's row

    @contextmanager
    def turn(self) -> Iterator[float]:
        """A turn: gives the time, by the monotonic clock, at which it has to end."""
        began = time.monotonic()
        yield began + (self.left / 2 if self.turns > 1 else self.left)
        self.left -= time.monotonic() - began
        self.turns -= 1

    def fits(self, cell: Cell, left: float, memory: int) -> bool:
        """Whether a cell is timed in this turn, for which there are `left` seconds; writes down why not.

        `memory`: bytes that are free.
        """
        if max(cell.widths) > self.context:
            reason = f"longer than the model's context of {self.context} tokens"
        elif self.width is not None and _ROOM * 4 * cell.size * self.width > memory:
            reason = f"its answer takes {4 * cell.size * self.width / 1e9:.1f} GB"
        elif left <= 0 or (REPETITIONS + 1) * self.expected(cell) > left:
            reason = "no time left"
        else:
            return True
        if cell.name not in self.seconds:
            self.left_out[cell.name] = reason
        return False

    def expected(self, cell: Cell) -> float:
        """Seconds of a repetition, by those before, or by the dearest cell so far; 0 where there is none."""
        if cell.name in self.seconds:
            return float(np.median(self.seconds[cell.name]))
        timed = [c for c in self.cells if c.name in self.seconds]
        if not timed:
            return 0.0
        nearest = max(timed, key=lambda c: c.size)
        return float(np.median(self.seconds[nearest.name])) * max(1.0, cell.size / nearest.size)

    def add(self, cell: Cell, answer: dict[str, Any]) -> None:
        """What `time_cell` gave."""
        self.seconds.setdefault(cell.name, []).extend(answer["seconds"])
        self.left_out.pop(cell.name, None)
        self.width = answer["width"]

    def summary(self) -> list[dict[str, Any]]:
        """The fields of an `EncoderLatency` for each cell that was timed."""
        return [summarise(cell, self.seconds[cell.name]) for cell in self.cells if cell.name in self.seconds]


def summarise(cell: Cell, seconds: Sequence[float]) -> dict[str, Any]:
    """The fields of an `EncoderLatency`; None where there are too few repetitions for a percentile."""
    middle = percentile(seconds, 0.5)
    texts = None if middle is None else cell.batch / middle
    per_text = cell.tokens / (cell.batch * len(cell.widths))
    return {
        "batch": cell.batch,
        "length": cell.length,
        "seconds_p50": middle,
        "seconds_p95": percentile(seconds, 0.95),
        "texts_per_second": texts,
        "tokens_per_second": None if texts is None else texts * per_text,
        "repetitions": len(seconds),
    }
