"""Answers that are decisions: a label, several labels at once, a label per word, or a number.

Logits z of k labels, p = softmax(z), or sigmoid(z) of each where several may hold at once. Beside the score
stand, against the base on the same texts,

    flips   = share of decisions that are not the base's: lost (right before, wrong now), gained (wrong
              before, right now), and those that were wrong and are wrong otherwise
    KL      = mean of KL(p_base || p) over decisions
    calibration error = sum over 15 bins of confidence of (decisions in it / all) |share right - mean
              confidence| (Guo et al. 2017, expected calibration error)

What libraries call a metric they compute: scikit-learn and, of spans, seqeval, in the process that tells, not
in the one that is measured. Scores that are written here too, as functions of weighted texts for their
intervals, are held against theirs in the tests.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress.errors import MissingExtra
from compress.tasks.likelihood import mean_kl
from compress.tasks.ranking import grouped_rankings, ranking_metrics
from compress.tasks.scoring import Columns, Decided, Intervals, Rows, Scoring, Weighted

_BINS = 15

Floats = npt.NDArray[np.float64]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """What a model decided about texts, and what was right: per text an array (decisions,) of each.

    Attributes:
        confidences: the probability of each decision.
        names: of the labels, in the order of their numbers.
    """

    decisions: list[Floats]
    targets: list[Floats]
    confidences: list[Floats]
    names: tuple[str, ...]

    @classmethod
    def of(cls, scores: Columns) -> Judged | None:
        """From the columns of scores; None where nothing was decided."""
        if scores["decisions"] is None:
            return None

        def arrays(name: str) -> list[Floats]:
            return [np.array(row, dtype=np.float64) for row in scores[name]]

        names = tuple(scores["names"])
        return cls(arrays("decisions"), arrays("targets"), arrays("confidences"), names)

    def add(self, decided: Decided) -> None:
        """One more text."""
        for own, more in zip((self.decisions, self.targets, self.confidences), decided, strict=True):
            own.append(np.array(more, dtype=np.float64))

    @property
    def flat(self) -> tuple[Floats, Floats, Floats]:
        """Decisions, targets and confidences of all texts."""
        decisions, targets = np.concatenate(self.decisions), np.concatenate(self.targets)
        return decisions, targets, np.concatenate(self.confidences)


class Decisions(Scoring):
    """What all of them have in common. A subclass says what the score is, and which metrics stand beside."""

    distance_name: ClassVar[str] = "KL"
    tolerances: ClassVar[Mapping[str, float]] = {"float32": 2e-3, "weights": 1e-3, "activations": 0.05}
    score_name: ClassVar[str]

    @abstractmethod
    def statistic(self, judged: Judged) -> Weighted:
        """The score as a function of weights of the texts, (draws, texts) -> (draws,)."""

    @abstractmethod
    def metrics(self, judged: Judged) -> dict[str, float]:
        """Other metrics, by their names."""

    def name_for(self, names: tuple[str, ...]) -> str:
        """What the score of such labels is called."""
        return self.score_name

    def right(self, judged: Judged) -> Booleans:
        """Which decisions are right."""
        decisions, targets, _ = judged.flat
        return decisions == targets

    def differ(self, judged: Judged, base: Judged) -> Booleans:
        """Which decisions are not the base's."""
        return judged.flat[0] != base.flat[0]

    def columns(self, windows: Sequence[tuple[float, ...]], *, compared: bool) -> Columns:
        """`nats`, where what is right is known, and with a base `kl` and `agreements`."""
        known = bool(windows) and all(sums[3] for sums in windows)
        found: dict[str, Any] = {"nats": [sums[0] for sums in windows] if known else []}
        if compared:
            found["kl"] = [sums[1] for sums in windows]
            found["agreements"] = [int(sums[2]) for sums in windows]
        return found

    def summary(
        self, scores: Columns, base: Columns | None, text_bytes: int | None, interval: Intervals
    ) -> Columns:
        """Loss, KL and agreement; the score, the other metrics and flips where what is right is known."""
        found: dict[str, Any] = {}
        nats, count = scores["nats"], sum(scores["tokens"])
        if nats:
            found |= {"nll": sum(nats) / count, "nll_ci95": interval(nats)}
        if base is not None and nats and base["nats"]:
            found["delta_nll"] = found["nll"] - sum(base["nats"]) / count
            found["delta_nll_ci95"] = interval(nats, base["nats"])
        if base is not None and scores["kl"] is not None:
            found |= {"kl_to_base": sum(scores["kl"]) / count, "kl_ci95": interval(scores["kl"])}
            found["top1_agreement"] = sum(scores["agreements"]) / count
        judged = self.judged(scores)
        if judged is None:
            return found
        before = None if base is None else self.judged(base)
        return {**found, **self.compared(judged, before, interval, scores.get("groups") or ())}

    def judged(self, scores: Columns) -> Judged | None:
        """What was decided, from the columns of scores; None where nothing was."""
        return Judged.of(scores)

    def compared(
        self, judged: Judged, base: Judged | None, interval: Intervals, groups: Sequence[int] = ()
    ) -> Columns:
        """The score, the other metrics and, beside a base, the difference and flips.

        `groups`: which query each text is a candidate of, where texts are.
        """
        blocks = len(judged.decisions)
        ours, all_alike = self.statistic(judged), np.ones((1, blocks))
        found: dict[str, Any] = {
            "score_name": self.name_for(judged.names),
            "score": float(ours(all_alike)[0]),
        }
        found["score_ci95"] = interval.of(ours, blocks)
        found["metrics"] = self.metrics(judged) | self.rankings(judged, groups)
        if base is not None:
            theirs = self.statistic(base)
            found["delta_score"] = found["score"] - float(theirs(all_alike)[0])
            found["delta_score_ci95"] = interval.of(lambda weights: ours(weights) - theirs(weights), blocks)
            found |= self.flips(judged, base)
        return found

    def relevance(self, judged: Judged) -> tuple[Floats, Floats] | None:
        """Of each text how relevant it was found, and how relevant it is (texts,); None where labels do not
        tell that."""
        return None

    def rankings(self, judged: Judged, groups: Sequence[int]) -> dict[str, float]:
        """Metrics of the order of the candidates of each query, and how many queries that is of; none where
        texts are not such."""
        told = self.relevance(judged) if len(groups) else None
        ranked = [] if told is None else grouped_rankings(*told, groups)
        return ranking_metrics(ranked) | {"ranked_queries": float(len(ranked))} if ranked else {}

    def flips(self, judged: Judged, base: Judged) -> dict[str, float]:
        """Shares of all decisions that differ from the base's."""
        differ = self.differ(judged, base)
        now, before = self.right(judged), self.right(base)
        return {
            "flips": float(differ.mean()),
            "flips_lost": float((differ & before & ~now).mean()),
            "flips_gained": float((differ & now & ~before).mean()),
        }

    def distance(self, expected: Rows, found: Rows) -> float:
        """Mean KL of the labels' distributions."""
        return mean_kl(expected, found)


_LIBRARIES = {"": {"sklearn": "scikit-learn", "seqeval": "seqeval"}}  # of any kind of labels
_LIBRARIES["text"] = {"rouge_score": "rouge-score", "sacrebleu": "sacrebleu"}


def require_metrics(what: str, kind: str = "") -> None:
    """Raise MissingExtra, before any work, where the libraries that compute metrics are absent: those of any
    labels, or those that a kind of labels needs besides."""
    for module, package in _LIBRARIES.get(kind, {}).items():
        if find_spec(module) is None:
            raise MissingExtra(package, "metrics", what)


def share(parts: Sequence[Floats], wholes: Sequence[Floats]) -> Weighted:
    """sum of parts / sum of wholes, over weighted texts: each text's sum of either."""
    a, b = (np.array([part.sum() for part in each]) for each in (parts, wholes))

    def of(weights: Floats) -> Floats:
        whole: Floats = weights @ b
        return np.divide(weights @ a, whole, out=np.zeros_like(whole), where=whole > 0)

    return of


def calibration_error(right: Booleans, confidences: Floats) -> float:
    """The expected calibration error of decisions (n,).

    >>> round(calibration_error(np.array([True, True, False, True]), np.array([0.9, 0.9, 0.9, 0.9])), 6)
    0.15
    """
    bins = np.minimum((confidences * _BINS).astype(int), _BINS - 1)
    gaps = [abs((right[bins == b] - confidences[bins == b]).sum()) for b in np.unique(bins)]
    return float(sum(gaps) / len(right))


def label_count(config: Any) -> int:
    """How many labels a configuration has."""
    return len(getattr(config, "id2label", None) or ()) or int(getattr(config, "num_labels", 2))
