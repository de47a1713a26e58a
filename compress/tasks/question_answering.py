"""question-answering: which part of a context answers a question (extractive; SQuAD).

A head gives every token t of question and context two logits, s_t to be the first of the answer and e_t to be
the last. The loss is the mean of the cross-entropies of both ends over all tokens of the text (Devlin et al.
2018, section 4.2); a text without the answer has both ends at its first token, which is of no context.

    answer = argmax of s_i + e_j over tokens i <= j of the context, j - i < 30
    none   where s_0 + e_0 is larger, if any question of the data has no answer; else never

A context that is longer than the model takes stands in several examples that overlap (text/passages.py). Then
the answer is the best of them all, and s_0 + e_0 the smallest of them all, as in SQuAD's own scripts. The
score is F1 of words, beside it stands exact match (answers.py). Confidence: p(i) p(j), each of the softmax
over the text. An answer has changed where it stands elsewhere than the base's, unless both are exactly right.
Limit: the model's first token must not be of the question, if the model is to tell that there is no answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress.tasks.answers import NO_PLACE, Passage, worth
from compress.tasks.base import UNKNOWN, Example, Question, Task, Window
from compress.tasks.decisions import Booleans, Decisions, Floats, Judged, calibration_error, share
from compress.tasks.likelihood import log_softmax, mean_kl
from compress.tasks.scoring import Decided, Rows, Weighted

MOST_TOKENS = 30  # of an answer
START, END = 0, 1  # the columns of an answer's rows
_HEAD = "ForQuestionAnswering"
_LOWEST = float(np.finfo(np.float32).min)  # of a text in which no answer can stand


@dataclass(frozen=True)
class Answers:
    """What a model answered to questions, an array (questions,) each.

    Attributes:
        text: number of the first example that a question stands in.
        first, last: characters of the context, the one after the answer; `NO_PLACE` where it says none.
        exact, f1: what the answer is worth.
        confidence: the probability of the answer.
        answerable: whether there is an answer.
    """

    text: npt.NDArray[np.int64]
    first: npt.NDArray[np.int64]
    last: npt.NDArray[np.int64]
    exact: Booleans
    f1: Floats
    confidence: Floats
    answerable: Booleans

    @classmethod
    def of(cls, judged: Judged) -> Answers:
        """The best over all examples of each question."""
        columns = np.stack(judged.decisions).T
        number, first, last, score, none, exact, f1 = columns
        answerable = np.stack(judged.targets)[:, 0] == 1
        sure, sure_of_none = np.stack(judged.confidences).T
        texts = np.arange(len(number))
        best, least, head = (_first(number, key) for key in (-score, none, texts))
        silent = ~answerable.all() & (none[least] > score[best])
        there = answerable[head]
        return cls(
            head,
            np.where(silent, NO_PLACE, first[best]).astype(np.int64),
            np.where(silent, NO_PLACE, last[best]).astype(np.int64),
            np.where(silent, ~there, exact[best] == 1),
            np.where(silent, ~there, f1[best]),
            np.where(silent, sure_of_none[least], sure[best]),
            there,
        )


class BestSpan(Decisions):
    """The likeliest part of a context; the score is F1 of its words."""

    score_name: ClassVar[str] = "answer_f1"

    def kept(self, rows: Rows) -> Rows:
        """Two distributions over the text's tokens (2, positions) of their logits (positions, 2)."""
        return np.ascontiguousarray(rows.T)

    def counted(self, targets: npt.NDArray[Any]) -> int:
        """Both ends."""
        return 2

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Nats, KL, agreements, and how many ends are known; `rows` as `kept` gives them, (2, positions)."""
        p, known = log_softmax(rows), targets[: len(rows)] != UNKNOWN
        nats = -float(p[known, targets[: len(rows)][known]].sum())
        if base is None:
            return nats, 0.0, 0.0, float(known.sum())
        q = log_softmax(base)
        kl = float((np.exp(q) * (q - p)).sum())
        return nats, kl, float((rows.argmax(-1) == base.argmax(-1)).sum()), float(known.sum())

    def chosen(self, rows: Rows, passage: Passage) -> Decided:
        """Of one text, its logits (2, positions).

        Decisions: number of the question, first character, the one after the last, logits of the answer and
        of none, exact, F1; targets: whether there is an answer; confidences: of the answer and of none.
        """
        p = log_softmax(rows)
        none, sure_of_none = float(rows[:, 0].sum(dtype=np.float64)), float(np.exp(p[:, 0].sum()))
        ends, sure, score, text = (NO_PLACE, NO_PLACE), 0.0, _LOWEST, ""
        if (found := best_span(rows, passage.inside)) is not None:
            i, j = found
            a, b = int(passage.places[i, 0]), int(passage.places[j, 1])
            text, ends = passage.text[a:b], (passage.start + a, passage.start + b)
            score = float(rows[START, i].astype(np.float64) + rows[END, j])
            sure = float(np.exp(p[START, i] + p[END, j]))
        exact, f1 = worth(text, passage.answers)
        decisions = [passage.question, *ends, score, none, exact, f1]
        return Decided([*map(float, decisions)], [float(bool(passage.answers))], [sure, sure_of_none])

    def statistic(self, judged: Judged) -> Weighted:
        """The mean F1. A question in several examples counts with the first of them."""
        found = Answers.of(judged)
        parts, wholes = (np.zeros(len(judged.decisions)) for _ in range(2))
        parts[found.text], wholes[found.text] = found.f1, 1.0
        return share(np.split(parts, len(parts)), np.split(wholes, len(wholes)))

    def metrics(self, judged: Judged) -> dict[str, float]:
        """Exact match, calibration error; of data with both, F1 where there is an answer, and the share of
        others that got none."""
        found = Answers.of(judged)
        metrics = {
            "answer_exact_match": float(found.exact.mean()),
            "calibration_error": calibration_error(found.exact, found.confidence),
        }
        if found.answerable.any() and not found.answerable.all():
            metrics["answer_f1_answerable"] = float(found.f1[found.answerable].mean())
            metrics["no_answer_accuracy"] = float(found.exact[~found.answerable].mean())
        return metrics

    def right(self, judged: Judged) -> Booleans:
        """Questions whose answer is exactly right."""
        return Answers.of(judged).exact

    def differ(self, judged: Judged, base: Judged) -> Booleans:
        """Questions whose answer stands elsewhere, but where both are exactly right."""
        ours, theirs = Answers.of(judged), Answers.of(base)
        elsewhere: Booleans = (ours.first != theirs.first) | (ours.last != theirs.last)
        return elsewhere & ~(ours.exact & theirs.exact)

    def distance(self, expected: Rows, found: Rows) -> float:
        """Mean KL of both distributions, of logits (positions, 2)."""
        return mean_kl(expected.T, found.T)


class QuestionAnswering(Task):
    """To find the answer to a question in a context."""

    name: ClassVar[str] = "question-answering"
    noun: ClassVar[str] = "a model that finds answers"
    auto_class: ClassVar[str] = "AutoModelForQuestionAnswering"
    columns: ClassVar[tuple[str, ...]] = ("start_logits", "end_logits")
    predicts: ClassVar[bool] = False
    labels: ClassVar[str | None] = "span"
    scoring: ClassVar[BestSpan] = BestSpan()

    def claims(self, config: Any, architecture: str) -> bool:
        """By the head's name."""
        return architecture.endswith(_HEAD) and not getattr(config, "is_encoder_decoder", False)

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """Every token; what is right about it nobody knows."""
        return Question(window, slice(None), np.full(len(window), UNKNOWN))

    def asked(self, example: Example) -> Question:
        """Every token; what is right are two of them."""
        return Question(example.ids, slice(None), example.targets, example.types, passage=example.passage)

    def decided(self, rows: Rows, question: Question) -> Decided | None:
        """The best span, where there is a context."""
        if question.passage is None:
            return None
        return self.scoring.chosen(rows, question.passage)

    def width(self, config: Any) -> int:
        """First and last."""
        return len(self.columns)


QUESTION_ANSWERING = QuestionAnswering()


def best_span(rows: Rows, inside: npt.NDArray[np.int64]) -> tuple[int, int] | None:
    """The tokens i <= j, both of those `inside`, fewer than `MOST_TOKENS` apart, with the largest
    rows[0, i] + rows[1, j]; of equal ones the first. None where none is inside.

    >>> best_span(np.array([[9.0, 1, 2, 0], [9.0, 3, 0, 1]]), np.array([1, 2, 3]))
    (1, 1)
    """
    if not len(inside):
        return None
    starts, ends = rows[START, inside].astype(np.float64), rows[END, inside].astype(np.float64)
    i, j = np.arange(len(inside))[:, None], np.arange(len(inside))[None]
    sums = np.where((j >= i) & (j - i < MOST_TOKENS), starts[:, None] + ends, -np.inf)
    first, last = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(inside[first]), int(inside[last])


def _first(number: Floats, key: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Of each question, in the order of their numbers, the example with the smallest key."""
    order = np.lexsort((key, number))
    _, places = np.unique(number[order], return_index=True)
    found: npt.NDArray[np.int64] = order[places]
    return found
