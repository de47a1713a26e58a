"""What an answer in a text is worth, as SQuAD defines it (Rajpurkar et al. 2016; 2018, where some have none).

Both texts are compared in a normal form: lower case, without ASCII punctuation, without the words a, an and
the, single spaces. With P and G the words of a prediction and of a right answer, each as often as it is in
it,

    exact = 1 where the normal forms are the same, else 0
    F1    = 2 |P and G| / (|P| + |G|);  where one of them has no word: 1 if the other has none, else 0

Of several right answers the best counts, of each number for itself. A question without an answer has the
empty text for its right answer. Limits: articles are English's, and words are what stands between spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NO_PLACE = -1

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class Passage:
    """The part of a context that stands in an example, and the right answers.

    Attributes:
        question: number of the row in its part; a long context stands in several examples.
        start: which character of the context is the first of this part.
        text: the part.
        places: of each token the characters of `text` that it is of, (length, 2): the first, and the one
            after the last; `NO_PLACE` for what is not of the context.
        answers: all that are right, wherever they stand; none of a question without an answer.
    """

    question: int
    start: int
    text: str
    places: npt.NDArray[np.int32]
    answers: tuple[str, ...]

    @property
    def inside(self) -> npt.NDArray[np.int64]:
        """The tokens that are of the context, in their order."""
        return np.flatnonzero(self.places[:, 1] > self.places[:, 0])

    def facts(self) -> list[Any]:
        """All but the places, as JSON has it."""
        return [self.question, self.start, self.text, list(self.answers)]

    @classmethod
    def of_facts(cls, facts: Sequence[Any], places: npt.NDArray[np.int32]) -> Passage:
        """What `facts` gave, with the places."""
        question, start, text, answers = facts
        return cls(question, start, text, places, tuple(answers))


def worth(found: str, right: Sequence[str]) -> tuple[float, float]:
    """Exact match and F1 of a text, "" for no answer, with the right ones, none where there is none.

    >>> worth("The Denver Broncos", ["Denver Broncos", "Broncos"])
    (1.0, 1.0)
    >>> worth("Broncos of Denver", ["Denver Broncos"]) == (0.0, 0.8)
    True
    >>> worth("", []), worth("Denver", [])
    ((1.0, 1.0), (0.0, 0.0))
    """
    own = normal_form(found)
    # an answer of punctuation or articles alone is none, as in SQuAD's own script
    wanted = [form for answer in right if (form := normal_form(answer))] or [""]
    return max(float(own == form) for form in wanted), max(_f1(own.split(), form.split()) for form in wanted)


def normal_form(text: str) -> str:
    """As answers are compared.

    >>> normal_form("  The U.S.  and  a man ")
    'us and man'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _f1(found: list[str], right: list[str]) -> float:
    if not found or not right:
        return float(found == right)
    common = (Counter(found) & Counter(right)).total()
    return 2 * common / (len(found) + len(right))
