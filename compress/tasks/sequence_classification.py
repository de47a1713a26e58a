"""Sequence classification: a text, or a pair of them, gets one label, several at once, or a number.

Three tasks, since what is right about a text is told in three ways; `transformers` tells them apart by
`problem_type`, and one label of a single output is a number:

    sequence-classification   softmax over labels; the score is accuracy
    multi-label               a sigmoid per label, which holds from 0.5 on; the score is micro F1
    regression                one number; the score is Spearman's rank correlation (rerankers: of relevance)
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress.tasks.base import UNKNOWN, Question, Task, Window
from compress.tasks.decisions import (
    Booleans,
    Decisions,
    Floats,
    Judged,
    calibration_error,
    label_count,
    share,
)
from compress.tasks.likelihood import log_softmax
from compress.tasks.scoring import Columns, Decided, Intervals, Rows, Scoring, Weighted

_HEAD = "ForSequenceClassification"
RELEVANCE = ("0", "1")  # names of labels that tell whether a passage answers its query


class OneLabel(Decisions):
    """The likeliest label; the score is accuracy."""

    score_name: ClassVar[str] = "accuracy"

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Nats, KL, agreements, and how many targets are known."""
        p, known = log_softmax(rows), targets != UNKNOWN
        nats = -float(p[known, targets[known]].sum())
        if base is None:
            return nats, 0.0, 0.0, float(known.sum())
        q = log_softmax(base)
        kl = float((np.exp(q) * (q - p)).sum())
        agreements = float((rows.argmax(-1) == base.argmax(-1)).sum())
        return nats, kl, agreements, float(known.sum())

    def decided(self, rows: Rows, targets: npt.NDArray[Any]) -> Decided | None:
        """The likeliest label of each row."""
        if (targets == UNKNOWN).any():
            return None
        p = log_softmax(rows)
        best = p.argmax(-1)
        confidences = np.exp(p[np.arange(len(p)), best])
        return Decided(best.tolist(), targets.tolist(), confidences.tolist())

    def statistic(self, judged: Judged) -> Weighted:
        """Accuracy."""
        hits = [(d == t).astype(float) for d, t in zip(judged.decisions, judged.targets, strict=True)]
        return share(hits, [np.ones_like(hit) for hit in hits])

    def metrics(self, judged: Judged) -> dict[str, float]:
        """F1 over the labels that are right somewhere or were decided, Matthews, calibration error."""
        from sklearn.metrics import f1_score, matthews_corrcoef

        decisions, targets, confidences = judged.flat
        several = len({*decisions.tolist(), *targets.tolist()}) > 1
        return {
            "macro_f1": float(f1_score(targets, decisions, average="macro", zero_division=0)),
            # of one label alone it is 0, of which scikit-learn warns
            "matthews": float(matthews_corrcoef(targets, decisions)) if several else 0.0,
            "calibration_error": calibration_error(decisions == targets, confidences),
        }

    def relevance(self, judged: Judged) -> tuple[Floats, Floats] | None:
        """The probability of 1, where labels are 0 and 1."""
        if judged.names != RELEVANCE:
            return None
        decisions, targets, confidences = judged.flat
        return np.where(decisions == 1, confidences, 1 - confidences), targets


class SeveralLabels(Decisions):
    """Every label that is likelier than not; the score is micro F1."""

    score_name: ClassVar[str] = "micro_f1"

    def counted(self, targets: npt.NDArray[Any]) -> int:
        """All labels of a text are one decision."""
        return 1

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Nats and KL summed over the labels of the one row, whether all labels agree, whether told."""
        yes, no = _log_sigmoids(rows[0])
        known = bool((targets != UNKNOWN).all())
        nats = -float(np.where(targets == 1, yes, no).sum()) if known else 0.0
        if base is None:
            return nats, 0.0, 0.0, float(known)
        base_yes, base_no = _log_sigmoids(base[0])
        kl = float((np.exp(base_yes) * (base_yes - yes) + np.exp(base_no) * (base_no - no)).sum())
        return nats, kl, float(((rows[0] > 0) == (base[0] > 0)).all()), float(known)

    def decided(self, rows: Rows, targets: npt.NDArray[Any]) -> Decided | None:
        """0 or 1 per label."""
        if (targets == UNKNOWN).any():
            return None
        yes, no = _log_sigmoids(rows[0])
        decisions = (rows[0] > 0).astype(int)
        return Decided(decisions.tolist(), targets.tolist(), np.exp(np.maximum(yes, no)).tolist())

    def statistic(self, judged: Judged) -> Weighted:
        """2 TP / (2 TP + FP + FN) over all labels."""
        pairs = list(zip(judged.decisions, judged.targets, strict=True))
        return share([2 * d * t for d, t in pairs], [d + t for d, t in pairs])

    def metrics(self, judged: Judged) -> dict[str, float]:
        """Macro F1, the share of texts whose labels are all right, calibration error."""
        from sklearn.metrics import f1_score

        decisions, targets = np.stack(judged.decisions), np.stack(judged.targets)
        flat = judged.flat
        return {
            "macro_f1": float(f1_score(targets, decisions, average="macro", zero_division=0)),
            "exact_match": float((decisions == targets).all(-1).mean()),
            "calibration_error": calibration_error(flat[0] == flat[1], flat[2]),
        }

    def right(self, judged: Judged) -> Booleans:
        """Texts all of whose labels are."""
        found: Booleans = (np.stack(judged.decisions) == np.stack(judged.targets)).all(-1)
        return found

    def differ(self, judged: Judged, base: Judged) -> Booleans:
        """Texts any of whose labels do."""
        found: Booleans = (np.stack(judged.decisions) != np.stack(base.decisions)).any(-1)
        return found

    def distance(self, expected: Rows, found: Rows) -> float:
        """Mean KL of a label."""
        (p, not_p), (q, not_q) = _log_sigmoids(expected), _log_sigmoids(found)
        return float((np.exp(p) * (p - q) + np.exp(not_p) * (not_p - not_q)).mean())


class Number(Decisions):
    """A number; the score is Spearman's correlation with what is right. Nothing flips."""

    distance_name: ClassVar[str] = "mean difference"
    score_name: ClassVar[str] = "spearman"

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Half the squared error, nothing of a distribution, and whether a number is known."""
        known = ~np.isnan(targets.astype(np.float64))
        error = float(((rows[:, 0] - targets)[known] ** 2).sum()) / 2
        return error, 0.0, 0.0, float(known.sum())

    def columns(self, windows: Any, *, compared: bool) -> Any:
        """`nats` alone: of a Gaussian of width one, but for its constant."""
        return super().columns(windows, compared=False)

    def summary(
        self, scores: Columns, base: Columns | None, text_bytes: int | None, interval: Intervals
    ) -> Columns:
        """As of others; of relevance, 0 or 1 for every pair, numbers are logits, nats those of a sigmoid."""
        if not _relevance(scores):
            return super().summary(scores, base, text_bytes, interval)
        own, before = (None if each is None else {**each, "nats": _nats(each)} for each in (scores, base))
        assert own is not None
        found = dict(super().summary(own, before, text_bytes, interval))
        found["metrics"] = {k: v for k, v in found["metrics"].items() if k != "mean_squared_error"}
        return found

    def decided(self, rows: Rows, targets: npt.NDArray[Any]) -> Decided | None:
        """The number."""
        if np.isnan(targets.astype(np.float64)).any():
            return None
        return Decided(rows[:, 0].tolist(), targets.tolist(), [1.0] * len(rows))

    def statistic(self, judged: Judged) -> Weighted:
        """Spearman's rank correlation."""
        from scipy.stats import rankdata

        decisions, targets, _ = judged.flat

        def of(weights: Floats) -> Floats:
            found = np.zeros(len(weights))
            for draw, counts in enumerate(weights.astype(int)):
                rows = np.repeat(np.arange(len(counts)), counts)
                a, b = rankdata(decisions[rows]), rankdata(targets[rows])
                spread = a.std() * b.std()
                found[draw] = ((a - a.mean()) * (b - b.mean())).mean() / spread if spread else 0.0
            return found

        return of

    def metrics(self, judged: Judged) -> dict[str, float]:
        """Pearson's correlation and the mean squared error."""
        decisions, targets, _ = judged.flat
        spread = float(decisions.std() * targets.std())
        covariance = float(((decisions - decisions.mean()) * (targets - targets.mean())).mean())
        return {
            "pearson": covariance / spread if spread else 0.0,
            "mean_squared_error": float(((decisions - targets) ** 2).mean()),
        }

    def flips(self, judged: Judged, base: Judged) -> dict[str, float]:
        """None."""
        return {}

    def relevance(self, judged: Judged) -> tuple[Floats, Floats] | None:
        """The numbers themselves."""
        decisions, targets, _ = judged.flat
        return decisions, targets

    def distance(self, expected: Rows, found: Rows) -> float:
        """Mean absolute difference, of the largest value."""
        return float(np.abs(expected - found).mean() / max(float(np.abs(expected).max()), 1e-9))


class SequenceClassification(Task):
    """To give a text one label of several."""

    name: ClassVar[str] = "sequence-classification"
    noun: ClassVar[str] = "a classifier"
    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    predicts: ClassVar[bool] = False
    pooled: ClassVar[bool] = True
    labels: ClassVar[str | None] = "class"
    problem: ClassVar[str] = "single_label_classification"  # what transformers calls it
    scoring: ClassVar[Scoring] = OneLabel()

    def claims(self, config: Any, architecture: str) -> bool:
        """By the head's name and its problem, which is told by the number of labels where it is left out."""
        if not architecture.endswith(_HEAD) or getattr(config, "is_encoder_decoder", False):
            return False
        problem = getattr(config, "problem_type", None)
        return self.problem == (problem or ("regression" if label_count(config) == 1 else _ONE_LABEL))

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """The whole window; what is right about it nobody knows."""
        return Question(window, slice(None), self.unknown)

    @property
    def unknown(self) -> npt.NDArray[Any]:
        """In the place of what is right."""
        return np.array([UNKNOWN])

    def width(self, config: Any) -> int:
        """The number of labels."""
        return label_count(config)


class MultiLabel(SequenceClassification):
    """To give a text all labels that fit it."""

    name: ClassVar[str] = "multi-label"
    labels: ClassVar[str | None] = "classes"
    problem: ClassVar[str] = "multi_label_classification"
    scoring: ClassVar[Scoring] = SeveralLabels()


class Regression(SequenceClassification):
    """To give a text a number."""

    name: ClassVar[str] = "regression"
    noun: ClassVar[str] = "a regressor"
    labels: ClassVar[str | None] = "number"
    problem: ClassVar[str] = "regression"
    scoring: ClassVar[Scoring] = Number()

    @property
    def unknown(self) -> npt.NDArray[Any]:
        """No number."""
        return np.array([np.nan])


_ONE_LABEL = SequenceClassification.problem

SEQUENCE_CLASSIFICATION, MULTI_LABEL, REGRESSION = SequenceClassification(), MultiLabel(), Regression()


def _relevance(scores: Columns) -> bool:
    """Whether numbers tell which of several texts answer a query, and which do not."""
    told = {target for row in scores["targets"] or () for target in row}
    return bool(len(scores.get("groups") or ())) and bool(told) and told <= {0, 1}


def _nats(scores: Columns) -> list[float]:
    logits, targets = (np.array([row[0] for row in scores[name]]) for name in ("decisions", "targets"))
    found: list[float] = (np.logaddexp(0.0, logits) - targets * logits).tolist()
    return found


def _log_sigmoids(logits: Rows) -> tuple[Floats, Floats]:
    """Of z and of -z, float64."""
    z = logits.astype(np.float64)
    with np.errstate(invalid="ignore"):  # of a NaN, NaN
        return -np.logaddexp(0.0, -z), -np.logaddexp(0.0, z)
