"""Simple answers to labelled sources, judged on the same evaluation rows: what an encoder-decoder must beat.

    lead            the first words of the source, as many as a training target has (the median)
    nearest target  the target of the training source that is nearest by TF-IDF of words (cosine)

Words of the lead are those between white space. The score and the metrics are the task's own, with the same
resampled rows. TF-IDF is scikit-learn's. Limits: the nearest is looked for among at most 20,000 training
rows, drawn at random.
"""

from __future__ import annotations

import statistics

import numpy as np

from compress.measure.statistics import statistic_interval
from compress.records.flips import LabelReference
from compress.tasks.written import SCORE, mean_of, metrics, row_scores
from compress.text.labelled.encoded import LabelledData

LEAD = "the source's first words"
NEAREST = "target of the nearest source (TF-IDF)"
ROWS = 20_000


def text_references(data: LabelledData, seed: int, fingerprint: str) -> list[LabelReference]:
    """A row per simple answer; `seed`: of the resampling, and of the rows that are looked at."""
    wanted = [str(row.label) for row in data.evaluation.rows]
    found = []
    for name, texts in ((LEAD, _lead(data)), (NEAREST, _nearest(data, seed))):
        values = row_scores(texts, wanted)
        found.append(
            LabelReference(
                name=name,
                score_name=SCORE,
                score=float(values.mean()),
                score_ci95=statistic_interval(mean_of(values), len(values), seed=seed),
                metrics=metrics(texts, wanted),
                rows=min(len(data.train), ROWS) if name == NEAREST else len(data.train),
                fingerprint=fingerprint,
            )
        )
    return found


def _lead(data: LabelledData) -> list[str]:
    count = round(statistics.median(len(str(row.label).split()) for row in data.train.rows))
    return [" ".join(row.text.split()[:count]) for row in data.evaluation.rows]


def _nearest(data: LabelledData, seed: int) -> list[str]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    drawn = np.sort(np.random.default_rng(seed).permutation(len(data.train.rows))[:ROWS])
    rows = [data.train.rows[index] for index in drawn]
    words = TfidfVectorizer(token_pattern=r"(?u)[^\W_]+")
    try:
        known = words.fit_transform([row.text for row in rows])
    except ValueError:  # no word in any source
        return [""] * len(data.evaluation.rows)
    found = []
    for row in data.evaluation.rows:
        alike = (known @ words.transform([row.text]).T).toarray()[:, 0]  # cosines: rows have length one
        found.append(str(rows[int(alike.argmax())].label))
    return found
