"""Simple models of labelled texts, judged on the same evaluation texts: what a model must beat.

Of texts with one label: always the label that is most frequent in training; and a logistic regression on
TF-IDF of words (scikit-learn, its defaults but for the strength, C = 10). Of words: the label that a word
most often has in training, and of a word that training lacks the most frequent label of all. Of a tie the
first label in the order of their numbers. Of targets that are texts: text_references.py.

Of pairs without a label, or with a number: the cosine of their TF-IDF vectors (1 + ln of counts; words and
inverse frequencies of all texts, those to judge by too, since whoever searches has them), as if that were a
model which embeds them.

Scores and metrics are the task's own, with the same resampled texts. Limits: the regression is fitted on at
most 20,000 texts, drawn at random, and on the most frequent words, so that words times labels stay below four
million; a pair is one text to it. Words are all those of a row, also those beyond what the model takes.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.measure.statistics import statistic_interval
from compress.measure.text_references import ROWS, text_references
from compress.records.flips import LabelReference
from compress.tasks.decisions import Decisions, Judged
from compress.tasks.registry import task_labelled
from compress.tasks.retrieval import BY_KIND, compared_pairs, ranked
from compress.text.examples import Examples, LabelledRow, distinct_texts
from compress.text.labelled.duplicates import normal_form
from compress.text.labelled.encoded import LabelledData

MAJORITY = "always the most frequent label"
REGRESSION = "TF-IDF and logistic regression"
LEXICON = "most frequent label of each word"
COSINE = "TF-IDF and cosine"
_VERSION = 1  # of what is fitted: another one fits anew
_WORDS, _WEIGHTS = 20_000, 4_000_000
_ITERATIONS = 1000

Floats = npt.NDArray[np.float64]
_Answer = tuple[list[Floats], list[Floats]]  # decisions and confidences per text


def label_references(
    data: LabelledData | None, *, seed: int = 0, earlier: Sequence[LabelReference] = ()
) -> list[LabelReference]:
    """A row per simple model; none of kinds that it has none for. Those of an `earlier` call on the same
    data are taken over.

    `seed`: that of the resampling, and of the texts that the regression is fitted on.
    """
    if data is None or data.kind not in (*_MODELS, *BY_KIND, "text") or not len(data.train):
        return []
    told = f"{_VERSION} {seed} {data.train.sha256} {data.evaluation.sha256}"
    fingerprint = hashlib.sha256(told.encode()).hexdigest()[:16]
    if known := [row for row in earlier if row.fingerprint == fingerprint]:
        return known
    if data.kind == "text":
        return text_references(data, seed, fingerprint)
    if data.kind not in _MODELS:
        return _by_cosine(data, seed, fingerprint) if data.paired else []
    models = _MODELS[data.kind]
    right = _targets(data.evaluation)
    rows = []
    for name, model in models.items():
        decisions, confidences = model(data, seed)
        judged = Judged(decisions, right, confidences, data.names)
        rows.append(_judged(name, judged, data, seed, fingerprint))
    return rows


def _judged(name: str, judged: Judged, data: LabelledData, seed: int, fingerprint: str) -> LabelReference:
    task = task_labelled(data.kind)
    assert task is not None
    scoring = task.scoring
    assert isinstance(scoring, Decisions)
    groups = _groups(data.evaluation)
    rows = len(data.train) if name != REGRESSION else min(len(data.train), ROWS)
    return _told(name, scoring, judged, rows, seed, fingerprint, groups)


def _told(
    name: str,
    scoring: Decisions,
    judged: Judged,
    rows: int,
    seed: int,
    fingerprint: str,
    groups: Sequence[int] = (),
) -> LabelReference:
    statistic = scoring.statistic(judged)
    return LabelReference(
        name=name,
        score_name=scoring.name_for(judged.names),
        score=float(statistic(np.ones((1, len(judged.decisions))))[0]),
        score_ci95=statistic_interval(statistic, len(judged.decisions), seed=seed),
        metrics=scoring.metrics(judged) | scoring.rankings(judged, groups),
        rows=rows,
        fingerprint=fingerprint,
    )


def _groups(examples: Examples) -> list[int]:
    """The query of each row, in the order of the rows, as which references judge them."""
    if not examples.groups:
        return []
    return [group for _, group in sorted(zip(examples.order, examples.groups, strict=True))]


def _by_cosine(data: LabelledData, seed: int, fingerprint: str) -> list[LabelReference]:
    """The cosine of TF-IDF vectors of two texts, in the place of a model that embeds or compares them."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    known, own = distinct_texts(data.train.rows), distinct_texts(data.evaluation.rows)
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    try:
        words.fit([*known, *own])
    except ValueError:  # no word in any text
        return []
    vectors = words.transform(own)  # of length one, or of none
    number = {normal_form(text): place for place, text in enumerate(own)}

    def similarity(one: Any, other: Any) -> Floats:
        found: Floats = (vectors[one] @ vectors[other].T).toarray()
        return found

    pairs = [
        (number[normal_form(row.text)], number[normal_form(row.pair or "")], row.label or 0.0)
        for row in data.evaluation.rows
    ]
    judge = BY_KIND[data.kind]
    judged = (ranked if data.kind == "pair" else compared_pairs)(pairs, similarity)
    groups = _groups(data.evaluation)
    return [_told(COSINE, judge, judged, len(known) + len(own), seed, fingerprint, groups)]


def _targets(examples: Examples) -> list[Floats]:
    numbers = {name: number for number, name in enumerate(examples.names)}
    return [_numbers(row, examples.kind, numbers) for row in examples.rows]


def _numbers(row: LabelledRow, kind: str, numbers: dict[str, int]) -> Floats:
    labels = row.label if kind == "tags" else (row.label,)
    return np.array([numbers[label] for label in labels], dtype=np.float64)


def _majority(data: LabelledData, seed: int) -> _Answer:
    counts = np.bincount(np.concatenate(_targets(data.train)).astype(int), minlength=len(data.names))
    best = int(counts.argmax())
    texts = len(data.evaluation.rows)
    return [np.array([float(best)])] * texts, [np.array([counts[best] / counts.sum()])] * texts


def _regression(data: LabelledData, seed: int) -> _Answer:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    drawn = np.sort(np.random.default_rng(seed).permutation(len(data.train.rows))[:ROWS])
    rows = [data.train.rows[index] for index in drawn]
    labels = np.array([data.names.index(str(row.label)) for row in rows])
    words = TfidfVectorizer(
        max_features=max(1, min(_WORDS, _WEIGHTS // len(data.names))), token_pattern=r"(?u)\b\w+\b"
    )
    try:
        known = words.fit_transform(_texts(rows))
    except ValueError:  # no word in any text
        return _majority(data, seed)
    model = LogisticRegression(C=10.0, max_iter=_ITERATIONS)
    if len(set(labels)) < 2:
        return _majority(data, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # after a thousand steps it is near enough
        model.fit(known, labels)
    shares = model.predict_proba(words.transform(_texts(data.evaluation.rows)))
    best = shares.argmax(1)
    return (
        [np.array([float(model.classes_[number])]) for number in best],
        [np.array([row[number]]) for row, number in zip(shares, best, strict=True)],
    )


def _texts(rows: Sequence[LabelledRow]) -> list[str]:
    return [row.text if row.pair is None else f"{row.text}\n{row.pair}" for row in rows]


def _lexicon(data: LabelledData, seed: int) -> _Answer:
    seen: dict[str, Counter[int]] = defaultdict(Counter)
    total: Counter[int] = Counter()
    for row, numbers in zip(data.train.rows, _targets(data.train), strict=True):
        for word, number in zip(row.words, numbers.astype(int).tolist(), strict=True):
            seen[word][number] += 1
            total[number] += 1

    def answer(word: str) -> tuple[float, float]:
        counts: Any = seen.get(word, total)
        best = min(counts, key=lambda number: (-counts[number], number))
        return float(best), counts[best] / counts.total()

    found = [[answer(word) for word in row.words] for row in data.evaluation.rows]
    return (
        [np.array([decision for decision, _ in row]) for row in found],
        [np.array([confidence for _, confidence in row]) for row in found],
    )


_MODELS: Mapping[str, Mapping[str, Callable[[LabelledData, int], _Answer]]] = {
    "class": {MAJORITY: _majority, REGRESSION: _regression},
    "tags": {LEXICON: _lexicon},
}
