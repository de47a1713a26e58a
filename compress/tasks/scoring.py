"""How an answer is judged: alone, against the base model's, and against the same model's in another runtime.

Of every window a scoring gives sums over the rows of an answer that count (`Question.rows`). Whoever measures
cuts the rows into chunks, keeps the base's rows, adds the sums up, resamples windows for intervals; what the
sums are and what is made of them is told here. A task whose quality is another quantity brings a scoring of
its own in its file; a quantity that no record has a field for takes one there, too (records/results.py, and
`Scores` and `Quality` of measure/quality.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.float32]  # of an answer (positions, width)
Columns = Mapping[str, Any]  # name of a field -> what it holds


Weighted = Callable[[npt.NDArray[np.float64]], npt.NDArray[np.float64]]


class Decided(NamedTuple):
    """What a model decided about one text, row by row: lists of one length, but for answers
    (question_answering.py).

    Attributes:
        decisions: numbers of labels, 0 or 1 per label, or values.
        targets: what was right.
        confidences: the probability of each decision, or of each label.
    """

    decisions: list[float]
    targets: list[float]
    confidences: list[float]


class Intervals(Protocol):
    """Resamples the windows, the same for every quantity of a model."""

    def of(self, statistic: Weighted, blocks: int | None = None, /) -> tuple[float, float] | None:
        """Of a quantity that is no mean: `statistic` gives it for each of many weightings (draws, windows) of
        the windows, or of as many `blocks`, (draws,)."""

    def __call__(
        self, sums: Sequence[float], base: Sequence[float] | None = None, /
    ) -> tuple[float, float] | None:
        """Of the mean of what sums to `sums` (windows,), or of its difference to `base` on the same windows.

        None for fewer than two windows.
        """


class Scoring(ABC):
    """What a task's answers are worth."""

    distance_name: ClassVar[str]  # of `distance`, in a sentence
    # By the kind of a graph, how far it may be from torch: of float32, the largest difference of the largest
    # value; of weights in codes and of activations in codes, `distance`.
    tolerances: ClassVar[Mapping[str, float]]

    def kept(self, rows: Rows) -> Rows:
        """What counts of the rows (positions, width) that a window asks for: (rows, width)."""
        return rows

    def counted(self, targets: npt.NDArray[Any]) -> int:
        """How many things a window's sums are over."""
        return len(targets)

    @abstractmethod
    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Over rows (n, width) with their targets (n,) and the base's rows: sums, which add up over chunks.

        Without a base those that compare are 0.
        """

    def decided(self, rows: Rows, targets: npt.NDArray[Any]) -> Decided | None:
        """What the rows (n, width) decide, of tasks with labels; None of those that decide nothing, or where
        nobody told what is right."""
        return None

    @abstractmethod
    def columns(self, windows: Sequence[tuple[float, ...]], *, compared: bool) -> Columns:
        """The sums of all windows by the names of fields of `Scores`; `compared`: there was a base."""

    @abstractmethod
    def summary(
        self, scores: Columns, base: Columns | None, text_bytes: int | None, interval: Intervals
    ) -> Columns:
        """Fields of a result, by their names there.

        Args:
            scores: `columns` of a model, and `tokens`, which `counted` gave.
            base: of the base model; None for itself.
            text_bytes: of the text that was predicted; None where that is not all of it.
            interval: of sums over windows, 95 %.
        """

    @abstractmethod
    def distance(self, expected: Rows, found: Rows) -> float:
        """How far an answer to one text (positions, width) is from the one expected; NaN of a NaN."""
