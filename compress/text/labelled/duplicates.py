"""Texts that are the same, or nearly.

A text's normal form is its text without case and with single spaces. Two texts are near duplicates where
their sets of five words in a row, case and punctuation around words left out, agree by a Jaccard index of
0.8: |A and B| / |A or B|. A text of fewer than five words is a duplicate of its normal form alone. What
writes no spaces between words is compared by its normal form, too.

Method: prefix filtering (Chaudhuri, Ganti, Kaushik 2006; Bayardo, Ma, Srikant 2007). With each set
ordered by rarity, two sets of index t share one of their first |A| - ceil(t |A|) + 1 members, so only
those are looked up; what is found is then counted exactly. Cost: linear in the text where most members
are rare. Limit: a member that begins more than 200 texts is looked up among the first 200 of them, so
that a template of thousands of rows does not cost their square.
"""

import math
import string
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

WORDS = 5
SIMILAR = 0.8
_POSTINGS = 200
_EDGES = string.punctuation + "“”„‘’«»…¿¡–—。，、！？：；"
# odd, so that no word is multiplied away; 64 bits make an accident in a billion sets unlikely
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93, 0xA0761D6478BD642F],
    dtype=np.uint64,
)

Members = NDArray[np.int64]


def normal_form(text: str, pair: str | None = None) -> str:
    """Text, and a second one, without case and with single spaces.

    >>> normal_form("A  b\\n", "C")
    'a b\\x00c'
    """
    one = " ".join(text.casefold().split())
    return one if pair is None else f"{one}\0{' '.join(pair.casefold().split())}"


def grouped(forms: Sequence[str]) -> list[int]:
    """For each normal form the first position of a text that it is, or nearly is, a duplicate of.

    Groups are closed: what is near to a member is one.
    """
    first: dict[str, int] = {}
    for index, form in enumerate(forms):
        first.setdefault(form, index)
    distinct = sorted(first)  # so that what is found does not depend on the order of rows
    parent = list(range(len(distinct)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    lookup = _Index(_members(distinct))
    for text in range(len(distinct)):
        for other in lookup.candidates(text):
            if (a := root(text)) != (b := root(other)) and lookup.similar(text, other):
                parent[max(a, b)] = min(a, b)
        lookup.add(text)
    place: dict[int, int] = {}
    for text, form in enumerate(distinct):
        place[root(text)] = min(first[form], place.get(root(text), first[form]))
    group = {form: place[root(text)] for text, form in enumerate(distinct)}
    return [group[form] for form in forms]


def found_in(forms: Sequence[str], others: Sequence[str]) -> list[int | None]:
    """For each normal form the position of one among `others` that it duplicates, or nearly does."""
    same: dict[str, int] = {}
    for index, form in enumerate(others):
        same.setdefault(form, index)
    distinct = list(same)
    left = list(dict.fromkeys(form for form in forms if form not in same))
    lookup = _Index(_members([*distinct, *left]))
    for text in range(len(distinct)):
        lookup.add(text)
    near: dict[str, int] = {}
    for text, form in enumerate(left, start=len(distinct)):
        found = next((o for o in lookup.candidates(text) if lookup.similar(text, o)), None)
        if found is not None:
            near[form] = same[distinct[found]]
    return [same.get(form, near.get(form)) for form in forms]


class _Index:
    """Texts by the rarest of their members."""

    def __init__(self, members: list[Members]) -> None:
        self.members = members
        self.postings: dict[int, list[int]] = defaultdict(list)

    def _prefix(self, text: int) -> list[int]:
        size = len(self.members[text])
        return self.members[text][: size - math.ceil(SIMILAR * size - 1e-9) + 1 if size else 0].tolist()

    def add(self, text: int) -> None:
        for member in self._prefix(text):
            if len(self.postings[member]) < _POSTINGS:
                self.postings[member].append(text)

    def candidates(self, text: int) -> Iterator[int]:
        """Texts that may be similar, each once."""
        size, seen = len(self.members[text]), set[int]()
        for member in self._prefix(text):
            for other in self.postings.get(member, ()):
                if other not in seen:
                    seen.add(other)
                    theirs = len(self.members[other])
                    if min(size, theirs) >= SIMILAR * max(size, theirs) - 1e-9:
                        yield other

    def similar(self, text: int, other: int) -> bool:
        """Whether their Jaccard index is 0.8 at least."""
        one, two = self.members[text], self.members[other]
        both = len(np.intersect1d(one, two, assume_unique=True))
        return both >= SIMILAR * (len(one) + len(two) - both) - 1e-9


def _members(forms: Sequence[str]) -> list[Members]:
    """For each normal form the ranks of its runs of five words, rarest first; none of a shorter text."""
    known: dict[str, int] = {}
    runs: list[NDArray[np.uint64]] = []
    for form in forms:
        words = [w for word in form.replace("\0", " \0 ").split() if (w := word.strip(_EDGES))]
        ids = np.array([known.setdefault(word, len(known) + 1) for word in words], dtype=np.uint64)
        count = len(ids) - WORDS + 1
        if count < 1:
            runs.append(np.zeros(0, dtype=np.uint64))
            continue
        windows = np.lib.stride_tricks.sliding_window_view(ids, WORDS)  # (count, 5)
        runs.append(np.unique((windows * _FACTORS).sum(axis=1, dtype=np.uint64)))
    if not runs:
        return []
    _, ranks, counts = np.unique(np.concatenate(runs), return_inverse=True, return_counts=True)
    order = np.empty(len(counts), dtype=np.int64)
    order[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    ends = np.cumsum([len(run) for run in runs])
    return [np.sort(order[part]) for part in np.split(ranks, ends[:-1])]
