"""Pairs of texts, each embedded by itself: whether what belongs together lies together.

Pairs without a label: every distinct first text is a query, and all second texts of the evaluation rows are
its candidates, in the order of their cosine to it. Right are those that some row pairs with the query; the
query's own text is no candidate. The score is MRR, and the decision, which can flip, the first candidate; its
probability is that of a softmax over 20 cos, which is what training makes of cosines by default. Metrics of
rankings: tasks/ranking.py. All depend on the number of candidates, which stands beside them.

Pairs with a number: the score is Spearman's correlation of the cosine with the number.

Rows are resampled as queries and as pairs. Cost: the cosines of queries by candidates, 256 queries at a time.
"""

from __future__ import annotations

import base64
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress.tasks.decisions import Booleans, Decisions, Floats, Judged, share
from compress.tasks.ranking import Ranking, ranking_metrics
from compress.tasks.scoring import Columns, Rows, Weighted
from compress.tasks.sequence_classification import Number

SCALE = 20.0
_TOGETHER = 256  # queries

Pairs = Sequence[Sequence[float]]  # numbers of a first and a second text, and what is told of both
Similarity = Callable[[npt.NDArray[np.int64], npt.NDArray[np.int64]], Floats]  # numbers of texts -> cosines


@dataclass(frozen=True)
class Ranked(Judged):
    """What stands first for each query, and where the right candidates stand.

    Attributes:
        queries: numbers of their texts.
        rankings: of each.
        candidates: how many there are.
    """

    queries: tuple[int, ...] = ()
    rankings: list[Ranking] = field(default_factory=list)
    candidates: int = 0


def ranked(pairs: Pairs, similarity: Similarity) -> Ranked:
    """Every first text as a query among all second texts."""
    right: dict[int, set[int]] = defaultdict(set)
    for first, second, *_ in pairs:
        if first != second:
            right[int(first)].add(int(second))
    queries = np.array(sorted(right), dtype=np.int64)
    documents = np.array(sorted({int(second) for _, second, *_ in pairs}), dtype=np.int64)
    found = Ranked([], [], [], (), tuple(queries.tolist()), [], len(documents))
    for start in range(0, len(queries), _TOGETHER):
        part = queries[start : start + _TOGETHER]
        for query, cosines in zip(part.tolist(), similarity(part, documents), strict=True):
            others = documents != query
            candidates, own = documents[others], cosines[others]
            gains = np.isin(candidates, list(right[query])).astype(np.int64)
            found.rankings.append(Ranking.of(own, gains))
            best = np.flatnonzero(own == own.max())
            first = best[np.argmin(gains[best])]  # of equal ones a wrong one
            wanted = first if gains[first] else np.argmax(np.where(gains > 0, own, -np.inf))
            found.decisions.append(candidates[[first]].astype(np.float64))
            found.targets.append(candidates[[wanted]].astype(np.float64))
            shares = np.exp(SCALE * (own - own.max()))
            found.confidences.append(np.array([1 / shares.sum()]))
    return found


class Retrieval(Decisions):
    """The right text before the others; the score is MRR."""

    score_name: ClassVar[str] = "mrr"

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Nothing of a text by itself."""
        return (0.0,)

    def judged(self, scores: Columns) -> Judged | None:
        """From vectors."""
        return ranked(scores["pairs"], cosines_of(scores["vectors"]))

    def statistic(self, judged: Judged) -> Weighted:
        """MRR."""
        assert isinstance(judged, Ranked)
        found = [np.array([each.reciprocal]) for each in judged.rankings]
        return share(found, [np.ones(1)] * len(found))

    def metrics(self, judged: Judged) -> dict[str, float]:
        """nDCG and recalls, and how many candidates there were."""
        assert isinstance(judged, Ranked)
        found = ranking_metrics(judged.rankings)
        del found["mrr"]
        return found | {"candidates": float(judged.candidates)}

    def differ(self, judged: Judged, base: Judged) -> Booleans:
        """Another text stands first, unless both are right."""
        return super().differ(judged, base) & ~(self.right(judged) & self.right(base))


class CosineNumber(Number):
    """The cosine of two texts as a number; the score is Spearman's correlation with what is right."""

    def judged(self, scores: Columns) -> Judged | None:
        """From vectors: a decision per pair."""
        return compared_pairs(scores["pairs"], cosines_of(scores["vectors"]))

    def metrics(self, judged: Judged) -> dict[str, float]:
        """Pearson's correlation: numbers may be of another scale than cosines."""
        found = super().metrics(judged)
        del found["mean_squared_error"]
        return found


def compared_pairs(pairs: Pairs, similarity: Similarity) -> Judged:
    """The cosine of each pair, as a decision."""
    rows = np.array(pairs, dtype=np.float64)
    firsts, seconds = (rows[:, side].astype(np.int64) for side in (0, 1))
    found = [similarity(a, b)[0] for a, b in zip(firsts[:, None], seconds[:, None], strict=True)]
    return Judged(found, list(rows[:, 2:]), [np.ones(1)] * len(rows), ())


RETRIEVAL, SIMILARITY = Retrieval(), CosineNumber()
BY_KIND: Mapping[str, Decisions] = {"pair": RETRIEVAL, "number": SIMILARITY}


def packed(vector: npt.NDArray[Any]) -> str:
    """A vector as text, float32: what a process that measures hands to the one that tells."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode()


def cosines_of(vectors: Sequence[str]) -> Similarity:
    """Of packed vectors, by their numbers, in float64."""
    return cosines_between(np.stack([np.frombuffer(base64.b64decode(each), dtype="<f4") for each in vectors]))


def cosines_between(vectors: npt.NDArray[Any]) -> Similarity:
    """Of vectors (n, width)."""
    units = vectors.astype(np.float64)
    units /= np.maximum(np.linalg.norm(units, axis=1, keepdims=True), 1e-30)

    def similarity(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> Floats:
        found: Floats = units[one] @ units[other].T
        return found

    return similarity
