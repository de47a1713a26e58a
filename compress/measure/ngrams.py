"""Reference rows that keep the numbers honest: a unigram model and an interpolated Kneser-Ney trigram.

Method. Both are fitted on the very tokens that trained the base and scored on the very windows, by the
same rule (the first token of a window is not predicted, contexts stay inside the window). A trained
transformer that does not beat the trigram clearly has learnt little.

Maths. Unigram: p(w) = (c(w) + 1) / (N + V). Trigram: interpolated *modified* Kneser-Ney (Chen & Goodman
1998, section 3): at each order, with context h,

    p(w | h) = (c(hw) - D(c(hw))) / c(h.) + gamma(h) p(w | h'),    gamma(h) = sum_w D(c(hw)) / c(h.),

where h' drops the oldest token, c is the plain count at the highest order and the continuation count
(number of different tokens seen before) below it, and the last h' is the uniform distribution over V. D
is 0, D1, D2, D3+ for counts 0, 1, 2, >= 3, from the counts of counts: Y = n1 / (n1 + 2 n2), Dk = k - (k +
1) Y n(k+1) / nk. An unseen context has gamma = 1. The second token of a window has one token of context
and is scored at the middle order.

Cost: sorting the trigrams of N tokens packed in 64-bit integers: about one second and 200 MB for 4 M
tokens. Limits: V < 2**21; no sentence boundaries (the stream's own document separators are tokens as any
other).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Unigram:
    """Add-one unigram model; `probabilities`: float64 [V]."""

    probabilities: Floats

    @classmethod
    def fit(cls, tokens: npt.NDArray[Any], vocabulary: int) -> Unigram:
        """Count `tokens` (one stream of ids below `vocabulary`)."""
        counts = np.bincount(_stream(tokens, vocabulary), minlength=vocabulary).astype(np.float64)
        return cls((counts + 1.0) / (counts.sum() + vocabulary))

    def window_nll(self, windows: npt.NDArray[Any]) -> Floats:
        """Nats per predicted token: int [n, window] -> float64 [n, window - 1]."""
        return np.asarray(-np.log(self.probabilities[windows[:, 1:]]), dtype=np.float64)


@dataclass(frozen=True)
class _Order:
    """One order of the back-off chain. Keys are packed: h * V + w and h."""

    grams: Ints  # [g] sorted keys hw
    discounted: Floats  # [g] c(hw) - D(c(hw))
    contexts: Ints  # [k] sorted keys h
    totals: Floats  # [k] c(h.)
    gammas: Floats  # [k] weight of the lower order

    @classmethod
    def fit(cls, grams: Ints, counts: Ints, vocabulary: int) -> _Order:
        """`grams`: sorted different keys; `counts`: how often (or in how many contexts) each was seen."""
        discount = discounts(counts)[np.minimum(counts, 3)]  # [g]
        contexts, starts = np.unique(grams // vocabulary, return_index=True)
        totals = np.add.reduceat(counts.astype(np.float64), starts)
        gammas = np.add.reduceat(discount, starts) / totals
        return cls(grams, counts - discount, contexts, totals, gammas)

    def mix(self, context: Ints, gram: Ints, lower: Floats) -> Floats:
        """p(w | h) from p(w | h') for packed keys of equal shape."""
        at, known = _find(self.contexts, context)
        where, seen = _find(self.grams, gram)
        direct = np.where(seen, self.discounted[where], 0.0) / self.totals[at]
        return np.where(known, direct + self.gammas[at] * lower, lower)


@dataclass(frozen=True)
class KneserNey:
    """Interpolated modified Kneser-Ney trigram over `vocabulary` tokens."""

    vocabulary: int
    first: _Order
    second: _Order
    third: _Order

    @classmethod
    def fit(cls, tokens: npt.NDArray[Any], vocabulary: int) -> KneserNey:
        """Count one stream of at least three ids below `vocabulary` (itself below 2**21)."""
        stream = _stream(tokens, vocabulary)
        if stream.size < 3 or vocabulary >= 2**21:
            raise ValueError(
                f"a trigram needs 3 tokens and V < 2**21, not {stream.size} tokens and V = {vocabulary}"
            )
        v = vocabulary
        triples, counts = np.unique((stream[:-2] * v + stream[1:-1]) * v + stream[2:], return_counts=True)
        third = _Order.fit(triples, counts, v)
        pairs, pair_counts = np.unique(
            triples % (v * v), return_counts=True
        )  # number of different u before v w
        second = _Order.fit(pairs, pair_counts, v)
        singles, single_counts = np.unique(pairs % v, return_counts=True)
        return cls(v, _Order.fit(singles, single_counts, v), second, third)

    def probability(self, u: npt.NDArray[Any], v: npt.NDArray[Any], w: npt.NDArray[Any]) -> Floats:
        """p(w | u v), elementwise over integer arrays of equal shape."""
        lower = self.bigram(v, w)
        context = np.asarray(u, np.int64) * self.vocabulary + v
        return self.third.mix(context, context * self.vocabulary + w, lower)

    def bigram(self, v: npt.NDArray[Any], w: npt.NDArray[Any]) -> Floats:
        """p(w | v) of the middle order (continuation counts)."""
        v64, w64 = np.asarray(v, np.int64), np.asarray(w, np.int64)
        uniform = np.full(w64.shape, 1.0 / self.vocabulary)
        single = self.first.mix(np.zeros_like(w64), w64, uniform)
        return self.second.mix(v64, v64 * self.vocabulary + w64, single)

    def window_nll(self, windows: npt.NDArray[Any]) -> Floats:
        """Nats per predicted token: int [n, window] -> float64 [n, window - 1]."""
        head = self.bigram(windows[:, :1], windows[:, 1:2])
        tail = self.probability(windows[:, :-2], windows[:, 1:-1], windows[:, 2:])
        return np.asarray(-np.log(np.concatenate([head, tail], axis=1)), dtype=np.float64)


def discounts(counts: Ints) -> Floats:
    """[0, D1, D2, D3+] of modified Kneser-Ney from the counts of counts.

    Few or odd counts of counts can put a D outside (0, k]; it is then 0.75, so that no probability is 0.
    """
    n = np.bincount(np.minimum(counts, 5), minlength=6).astype(np.float64)
    result = np.array([0.0, 0.75, 0.75, 0.75])
    for k in (1, 2, 3):
        if n[1] > 0 and n[k] > 0:
            d = k - (k + 1) * n[1] / (n[1] + 2.0 * n[2]) * n[k + 1] / n[k]
            result[k] = d if 0.0 < d <= k else 0.75
    return result


def _stream(tokens: npt.NDArray[Any], vocabulary: int) -> Ints:
    stream = np.asarray(tokens, np.int64).ravel()
    if stream.size and (stream.min() < 0 or stream.max() >= vocabulary):
        raise ValueError(f"token ids {stream.min()}..{stream.max()} do not fit a vocabulary of {vocabulary}")
    return stream


def _find(keys: Ints, wanted: Ints) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Position of each wanted key in the sorted `keys`, and whether it is there (position 0 where not)."""
    at = np.searchsorted(keys, wanted)
    at = np.where(at < keys.size, at, 0)
    return at, keys[at] == wanted
