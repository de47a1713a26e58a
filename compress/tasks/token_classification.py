"""token-classification: every word of a text gets a label (entities, parts of speech).

Of a word that the tokenizer cuts into pieces the first carries the label (Devlin et al. 2018, section 5.3);
the others are not asked for. Labels that are written B-x, I-x and O mark spans, and the score is F1 over
spans, each right as a whole or not (CoNLL 2003; seqeval); of other labels it is accuracy.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress.tasks.base import UNKNOWN, Example, Question, Task, Window
from compress.tasks.decisions import Floats, Judged, calibration_error, label_count, share
from compress.tasks.scoring import Scoring, Weighted
from compress.tasks.sequence_classification import OneLabel

_HEAD = "ForTokenClassification"


class Spans(OneLabel):
    """The likeliest label of each word; the score is F1 over spans, or accuracy."""

    def statistic(self, judged: Judged) -> Weighted:
        """F1 over spans, 2 TP / (spans found + spans that are there); accuracy where labels mark none."""
        if not marks_spans(judged.names):
            return super().statistic(judged)
        found, there = (_spans(each, judged.names) for each in (judged.decisions, judged.targets))
        hits = [np.array([2.0 * len(a & b)]) for a, b in zip(found, there, strict=True)]
        return share(hits, [np.array([float(len(a) + len(b))]) for a, b in zip(found, there, strict=True)])

    def metrics(self, judged: Judged) -> dict[str, float]:
        """Precision and recall of spans (seqeval), accuracy and macro F1 of words, calibration error."""
        from sklearn.metrics import f1_score

        decisions, targets, confidences = judged.flat
        metrics = {
            "word_accuracy": float((decisions == targets).mean()),
            "word_macro_f1": float(f1_score(targets, decisions, average="macro", zero_division=0)),
            "calibration_error": calibration_error(decisions == targets, confidences),
        }
        if marks_spans(judged.names):
            from seqeval.metrics import precision_score, recall_score

            right, own = (_named(each, judged.names) for each in (judged.targets, judged.decisions))
            metrics["span_precision"] = float(precision_score(right, own, zero_division=0))
            metrics["span_recall"] = float(recall_score(right, own, zero_division=0))
        return metrics

    def name_for(self, names: tuple[str, ...]) -> str:
        """Of labels that mark spans it is theirs."""
        return "span_f1" if marks_spans(names) else self.score_name


class TokenClassification(Task):
    """To give every word a label."""

    name: ClassVar[str] = "token-classification"
    noun: ClassVar[str] = "a tagger"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    predicts: ClassVar[bool] = False
    labels: ClassVar[str | None] = "tags"
    scoring: ClassVar[Scoring] = Spans()

    def claims(self, config: Any, architecture: str) -> bool:
        """By the head's name."""
        return architecture.endswith(_HEAD)

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """Every token; what is right about it nobody knows."""
        return Question(window, slice(None), np.full(len(window), UNKNOWN))

    def asked(self, example: Example) -> Question:
        """The tokens that carry a label."""
        rows: npt.NDArray[np.int64] = np.flatnonzero(example.targets != UNKNOWN)
        return Question(example.ids, rows, example.targets[rows], example.types)

    def width(self, config: Any) -> int:
        """The number of labels."""
        return label_count(config)


TOKEN_CLASSIFICATION = TokenClassification()


def marks_spans(names: tuple[str, ...]) -> bool:
    """Whether labels are written as spans are: B-x and I-x, and O for what is in none.

    >>> marks_spans(("B-person", "I-person", "O")), marks_spans(("NOUN", "VERB"))
    (True, False)
    """
    return all(name == "O" or name[:2] in ("B-", "I-", "E-", "S-", "L-", "U-") for name in names) and (
        len(names) > 1
    )


def _named(rows: list[Floats], names: tuple[str, ...]) -> list[list[str]]:
    return [[names[int(number)] for number in row] for row in rows]


def _spans(rows: list[Floats], names: tuple[str, ...]) -> list[set[Any]]:
    """Of each text its spans, (kind, first word, last word)."""
    from seqeval.metrics.sequence_labeling import get_entities

    return [set(get_entities(row)) for row in _named(rows, names)]
