"""How labels are spoken of: scores and metrics by their names, in hundredths, differences in points.

Every score and metric is shown a hundred times as large as it is: a share of 0.415 as 41.5 %, a correlation
of 0.8 as 80, and a difference of 0.004 as 0.4 points. A mean squared error stays what it is, as counts do.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from compress.records.base import Interval
from compress.records.results import Result
from compress.report import units

_NAMES = {
    "accuracy": "accuracy",
    "micro_f1": "micro F1",
    "span_f1": "span F1",
    "spearman": "Spearman correlation",
    "rouge_l": "ROUGE-L",
    "rouge_1": "ROUGE-1",
    "rouge_2": "ROUGE-2",
    "chrf": "chrF",
    "bleu": "BLEU",
    "not_ended": "texts not ended",
    "answer_f1": "answer F1",
    "answer_exact_match": "exact match",
    "answer_f1_answerable": "answer F1 where there is one",
    "no_answer_accuracy": "right that there is none",
    "macro_f1": "macro F1",
    "matthews": "Matthews",
    "calibration_error": "calibration error",
    "exact_match": "exact match",
    "word_accuracy": "accuracy of words",
    "word_macro_f1": "macro F1 of words",
    "span_precision": "span precision",
    "span_recall": "span recall",
    "pearson": "Pearson correlation",
    "mean_squared_error": "mean squared error",
    "next_sentence_accuracy": "next sentences told right",
    "next_sentence_nll": "NLL of next sentences",
    "mrr": "MRR",
    "ndcg_at_10": "nDCG@10",
    "recall_at_1": "recall@1",
    "recall_at_5": "recall@5",
    "recall_at_10": "recall@10",
    "ranked_queries": "queries that are ranked",
}
_AS_IT_IS = ("mean_squared_error", "next_sentence_nll", "candidates", "ranked_queries")
_CORRELATIONS = ("spearman", "pearson", "matthews")
_SCORES_OF_TEXTS = ("rouge_l", "rouge_1", "rouge_2", "chrf", "bleu")


def metric_name(key: str) -> str:
    """A score or metric in words.

    >>> metric_name("span_f1"), metric_name("some_metric")
    ('span F1', 'some metric')
    """
    return _NAMES.get(key, key.replace("_", " "))


def score_name(results: Iterable[Result]) -> str:
    """What the results' score is called: empty where nothing is scored, `score` where there are several."""
    names = {result.score_name for result in results if result.score_name}
    return metric_name(names.pop()) if len(names) == 1 else "score" if names else ""


def metric_keys(results: Iterable[Result]) -> list[str]:
    """The other metrics that any result has, in the order of appearance."""
    return list(dict.fromkeys(key for result in results for key in result.metrics or {}))


def unit_of(key: str) -> str:
    """What stands in the heading of a column."""
    return "" if key in _AS_IT_IS else "× 100" if key in _CORRELATIONS + _SCORES_OF_TEXTS else "%"


def score_unit(results: Iterable[Result]) -> str:
    """What a score is shown in, that of several scores together, too."""
    found = {unit_of(result.score_name) for result in results if result.score_name}
    return found.pop() if len(found) == 1 else "× 100"


def factor_of(key: str) -> float:
    """By what a metric is multiplied when it is shown."""
    return 1.0 if key in _AS_IT_IS else 100.0


def hundredths(value: float | None) -> float | None:
    """A score, or a difference of two, as it is shown."""
    return None if value is None else 100 * value


def interval_hundredths(bounds: Interval | None) -> Interval | None:
    """The same of both ends."""
    return None if bounds is None else (100 * bounds[0], 100 * bounds[1])


def lost(result: Result) -> float | None:
    """Points of the score that a result has less than the base; 0 and never -0."""
    return None if result.delta_score is None else 0.0 - 100 * result.delta_score


def lost_interval(result: Result) -> Interval | None:
    """Of what is lost."""
    if result.delta_score_ci95 is None:
        return None
    low, high = result.delta_score_ci95
    return 0.0 - 100 * high, 0.0 - 100 * low


def points(change: float | None) -> str:
    """A difference of two scores in words.

    >>> points(-0.00333), points(0.0), points(None)
    ('−0.333 points', '0 points', '–')
    """
    return units.ABSENT if change is None else f"{units.signed(100 * change)} points"


@dataclass(frozen=True)
class QualityWords:
    """What stands above the quality of the steps of chains."""

    title: str
    unit: str
    change_unit: str
    change: str  # in a sentence


def quality_words(results: Iterable[Result]) -> QualityWords:
    """The score where labels are judged, else the NLL."""
    told = list(results)
    name = score_name(told)
    if name:
        return QualityWords(
            name[:1].upper() + name[1:], score_unit(told), "points", f"{name} after the step minus before it"
        )
    return QualityWords("NLL", "nats", "nats", "Δ NLL after the step minus before it")
