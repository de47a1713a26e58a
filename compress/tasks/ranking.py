"""Rankings: how far up the right candidates of a query stand.

Candidates stand in the order of their scores, those that are not right before right ones of the same score,
so that a model which tells nothing apart gains nothing by it. Of a query whose right candidates have the
ranks r_1 < r_2 < ..., from 1,

    MRR        = mean over queries of 1 / r_1
    recall@k   = mean over queries of |{i : r_i <= k}| / number of right candidates
    nDCG@k     = mean over queries of DCG@k / the largest that any order gives,
                 DCG@k = sum over the first k candidates of gain / log2(1 + rank)

with the gain 1 of a right candidate, or its grade (Jarvelin and Kekalainen 2002; linear gains, as
scikit-learn's `ndcg_score` has them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

CUT = 10  # k of nDCG
RECALLS = (1, 5, 10)

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Ranking:
    """Where a query's right candidates stand.

    Attributes:
        ranks: of them, ascending, from 1.
        gains: of them, in the same order.
    """

    ranks: Floats
    gains: Floats

    @classmethod
    def of(cls, scores: npt.NDArray[Any], gains: npt.NDArray[Any]) -> Ranking:
        """From the candidates' scores and gains (n,); those of gain 0 are not right.

        >>> Ranking.of(np.array([0.9, 0.5, 0.9]), np.array([1, 1, 0])).ranks.tolist()
        [2.0, 3.0]
        """
        right = np.flatnonzero(gains > 0)
        # among right ones of one score those of less gain first: no tie is a help
        right = right[np.lexsort((gains[right], -scores[right]))]
        wrong = np.sort(scores[gains <= 0])
        before = len(wrong) - np.searchsorted(wrong, scores[right], side="left")  # as high, or higher
        ranks = 1.0 + before + np.arange(len(right))
        return cls(ranks.astype(np.float64), gains[right].astype(np.float64))

    @property
    def reciprocal(self) -> float:
        """One over the rank of the first right candidate."""
        return float(1 / self.ranks[0])

    def recall(self, k: int) -> float:
        """Share of the right candidates among the first k."""
        return float((self.ranks <= k).mean())

    def ndcg(self, k: int = CUT) -> float:
        """DCG@k over the largest."""
        found = (self.gains / np.log2(1 + self.ranks))[self.ranks <= k].sum()
        best = np.sort(self.gains)[::-1][:k]
        return float(found / (best / np.log2(2 + np.arange(len(best)))).sum())


def ranking_metrics(rankings: Sequence[Ranking]) -> dict[str, float]:
    """nDCG, MRR and recalls, means over queries."""
    found = {f"ndcg_at_{CUT}": float(np.mean([each.ndcg() for each in rankings]))}
    found["mrr"] = float(np.mean([each.reciprocal for each in rankings]))
    return found | {f"recall_at_{k}": float(np.mean([each.recall(k) for each in rankings])) for k in RECALLS}


def grouped_rankings(scores: Floats, gains: Floats, groups: Sequence[int]) -> list[Ranking]:
    """A ranking per group of candidates (n,) that can be ranked: with several, right ones and others; none
    where fewer than half of the groups are so, since then it is not queries that rows are grouped by.

    A group in which all are right has every order right; one without any has none.
    """
    numbers = np.asarray(groups)
    if len(numbers) != len(scores) or not len(numbers) or (gains < 0).any():
        return []
    order = np.argsort(numbers, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)
    ranked = [rows for rows in parts if (gains[rows] > 0).any() and (gains[rows] <= 0).any()]
    if 2 * len(ranked) < len(parts):
        return []
    return [Ranking.of(scores[rows], gains[rows]) for rows in ranked]
