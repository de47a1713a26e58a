"""Answers that are texts: what an encoder-decoder writes of a source, beside how likely it holds the target.

Of every evaluation row the model writes a text, greedily, and it is compared with the row's target:

    ROUGE-L     the score: the mean over rows of F1 of the longest common subsequence of words (Lin 2004,
                rouge-score, no stemming); ROUGE-1 and ROUGE-2 likewise of words and of pairs of words
    chrF        F2 of runs of one to six characters, over all rows (Popović 2015, sacrebleu's chrF2)
    BLEU        over all rows (Papineni et al. 2002, sacrebleu's defaults: 13a tokens, exponential smoothing)
    exact match the share of texts that are the target, but for white space
    not ended   the share of texts that met the limit before they ended

Against the base a text flips where it is not the base's; it is lost where the base's was the target and this
one is not. Likelihood, KL and agreement are of the target's tokens, each given the source and those before it
(teacher forcing), as of windows of plain text.

Limits: words are runs of letters and digits in lower case: rouge-score's own on ASCII, and of other scripts,
which rouge-score leaves out, all letters. Languages without spaces are one word to ROUGE: there read chrF.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from compress.tasks.decisions import require_metrics
from compress.tasks.likelihood import Likelihood
from compress.tasks.scoring import Columns, Intervals, Weighted

ROUGE = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}  # by the names of the library
SCORE = "rouge_l"

Floats = npt.NDArray[np.float64]
Text = tuple[list[int], bool]  # tokens without the end, and whether it came


class Written(Likelihood):
    """Likelihood of the targets, and what the texts are worth that were written in their place."""

    def summary(
        self, scores: Columns, base: Columns | None, text_bytes: int | None, interval: Intervals
    ) -> Columns:
        """Likelihood; and where texts were written, the score, the other metrics and flips."""
        found = dict(super().summary(scores, base, text_bytes, interval))
        written, wanted = scores["written"], scores["wanted"]
        if not written:
            return found
        texts = [text for text, _ in written]
        ours = row_scores(texts, wanted)
        found |= {"score_name": SCORE, "score": float(ours.mean())}
        found |= {"score_ci95": interval.of(mean_of(ours)), "metrics": metrics(texts, wanted)}
        found["metrics"]["not_ended"] = 1.0 - float(np.mean([ended for _, ended in written]))
        if base is None or not base["written"]:
            return found
        before = [text for text, _ in base["written"]]
        theirs = row_scores(before, wanted)
        found["delta_score"] = found["score"] - float(theirs.mean())
        found["delta_score_ci95"] = interval.of(mean_of(ours - theirs))
        return found | flips(texts, before, wanted)


def greedily(
    tokens: list[int], following: Callable[[list[int]], list[int]], limit: int, ends: Collection[int]
) -> list[Text]:
    """Texts (rows,) of at most `limit` tokens, each up to one of `ends`, which is counted and left out.

    `tokens`: the first of each text; `following`: the likeliest ones after these.

    >>> greedily([1, 5], lambda tokens: [token + 1 for token in tokens], 3, {3})
    [([1, 2], True), ([5, 6, 7], False)]
    """
    texts: list[list[int]] = [[] for _ in tokens]
    ended = [False] * len(tokens)
    for count in range(1, limit + 1):
        for row, token in enumerate(tokens):
            ended[row] = ended[row] or token in ends
            if not ended[row]:
                texts[row].append(token)
        if all(ended) or count == limit:
            break
        tokens = following(tokens)
    return list(zip(texts, ended, strict=True))


def mean_of(values: Floats) -> Weighted:
    """The mean of values (rows,) over weighted rows."""
    return lambda weights: (weights @ values) / weights.sum(1)


def row_scores(texts: Sequence[str], wanted: Sequence[str]) -> Floats:
    """ROUGE-L of each text, (rows,)."""
    return _rouge(tuple(texts), tuple(wanted))[:, list(ROUGE).index(SCORE)]


def metrics(texts: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """The other metrics, each from 0 to 1, by their names."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    rouge = dict(zip(ROUGE, _rouge(tuple(texts), tuple(wanted)).mean(0), strict=True))
    pairs = [plain(text) for text in texts], [[plain(text) for text in wanted]]
    return {
        **{name: float(value) for name, value in rouge.items() if name != SCORE},
        "chrf": CHRF().corpus_score(*pairs).score / 100,
        # `force`: no warning about texts whose last sign stands apart
        "bleu": BLEU(force=True).corpus_score(*pairs).score / 100,
        "exact_match": float(np.mean([alike(a, b) for a, b in zip(texts, wanted, strict=True)])),
    }


def flips(texts: Sequence[str], before: Sequence[str], wanted: Sequence[str]) -> dict[str, float]:
    """Shares of the texts that differ from the base's, and of those that are the target no more, or now."""
    differ = np.array([not alike(a, b) for a, b in zip(texts, before, strict=True)])
    now, was = (
        np.array([alike(*pair) for pair in zip(each, wanted, strict=True)]) for each in (texts, before)
    )
    return {
        "flips": float(differ.mean()),
        "flips_lost": float((was & ~now).mean()),
        "flips_gained": float((now & ~was).mean()),
    }


def alike(one: str, other: str) -> bool:
    """Whether two texts are the same but for white space."""
    return plain(one) == plain(other)


def plain(text: str) -> str:
    """With single spaces, and none around it.

    >>> plain(" Return\\n  the name. ")
    'Return the name.'
    """
    return " ".join(text.split())


class Words:
    """How ROUGE cuts a text (see the module's text)."""

    def tokenize(self, text: str) -> list[str]:
        """Words in lower case.

        >>> Words().tokenize("Get_name of Größe-2.")
        ['get', 'name', 'of', 'größe', '2']
        """
        return re.findall(r"[^\W_]+", text.lower())


@lru_cache(maxsize=8)  # the base's are asked for beside every variant
def _rouge(texts: tuple[str, ...], wanted: tuple[str, ...]) -> Floats:
    """F1 of each text by each of `ROUGE`, (rows, kinds)."""
    found = [_scorer().score(right, text) for text, right in zip(texts, wanted, strict=True)]
    return np.array([[scores[kind].fmeasure for kind in ROUGE.values()] for scores in found])


@cache
def _scorer() -> Any:
    require_metrics("the score of texts", "text")
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE.values()), use_stemmer=False, tokenizer=Words())
