from collections import defaultdict
from math import log

import numpy as np
import pytest

from compress.measure.ngrams import KneserNey, Unigram, discounts

V = 11


@pytest.fixture
def stream():
    rng = np.random.default_rng(3)
    return np.minimum(rng.zipf(1.5, 400) - 1, V - 2).astype(np.int32)  # token V - 1 is never seen


class SlowKneserNey:
    """Chen & Goodman's definition, written with dictionaries."""

    def __init__(self, tokens):
        triples = defaultdict(int)
        for i in range(len(tokens) - 2):
            triples[tuple(tokens[i : i + 3])] += 1
        before = defaultdict(set)
        for u, v, w in triples:
            before[v, w].add(u)
        pairs = {key: len(value) for key, value in before.items()}
        before = defaultdict(set)
        for v, w in pairs:
            before[w].add(v)
        singles = {(w,): len(value) for w, value in before.items()}
        self.orders = [dict(triples), pairs, singles]

    def discount(self, table):
        n = [0] + [sum(1 for c in table.values() if c == k) for k in (1, 2, 3, 4)]
        result = [0, 0.75, 0.75, 0.75]
        for k in (1, 2, 3):
            if n[1] and n[k]:
                d = k - (k + 1) * n[1] / (n[1] + 2 * n[2]) * n[k + 1] / n[k]
                result[k] = d if 0 < d <= k else 0.75
        return result

    def probability(self, *gram):
        table = self.orders[3 - len(gram)]
        lower = self.probability(*gram[1:]) if len(gram) > 1 else 1 / V
        same = {g: c for g, c in table.items() if g[:-1] == gram[:-1]}
        if not same:
            return lower
        d, total = self.discount(table), sum(same.values())
        count = table.get(gram, 0)
        gamma = sum(d[min(c, 3)] for c in same.values()) / total
        return (count - d[min(count, 3)]) / total + gamma * lower


def test_trigram_equals_the_slow_definition(stream):
    fast, slow = KneserNey.fit(stream, V), SlowKneserNey(stream.tolist())
    grid = np.stack(np.meshgrid(*[np.arange(V)] * 3, indexing="ij"), -1).reshape(-1, 3)
    expected = [slow.probability(*map(int, gram)) for gram in grid]
    np.testing.assert_allclose(fast.probability(*grid.T), expected, rtol=1e-12)
    pairs = grid[:, 1:]
    expected = [slow.probability(*map(int, pair)) for pair in pairs]
    np.testing.assert_allclose(fast.bigram(*pairs.T), expected, rtol=1e-12)


def test_probabilities_sum_to_one(stream):
    model = KneserNey.fit(stream, V)
    every = np.arange(V)
    for u in range(V):
        for v in range(V):
            p = model.probability(np.full(V, u), np.full(V, v), every)
            assert p.min() > 0
            assert p.sum() == pytest.approx(1.0, abs=1e-12)
    assert Unigram.fit(stream, V).probabilities.sum() == pytest.approx(1.0)


def test_windows_are_scored_without_their_first_token_and_without_looking_outside(stream):
    model = KneserNey.fit(stream, V)
    windows = stream[:40].reshape(4, 10)
    nll = model.window_nll(windows)
    assert nll.shape == (4, 9)
    slow = SlowKneserNey(stream.tolist())
    a, b, c, d = (int(t) for t in windows[2, :4])
    assert nll[2, 0] == pytest.approx(-log(slow.probability(a, b)))
    assert nll[2, 1] == pytest.approx(-log(slow.probability(a, b, c)))
    assert nll[2, 2] == pytest.approx(-log(slow.probability(b, c, d)))


def test_more_context_is_better_on_text_that_has_some():
    text = ("the cat sat on the mat and the dog sat on the log " * 60).split()
    ids = {word: i for i, word in enumerate(sorted(set(text)))}
    stream = np.array([ids[word] for word in text])
    windows = stream[:120].reshape(6, 20)
    unigram, trigram = (
        model.fit(stream, len(ids)).window_nll(windows).mean() for model in (Unigram, KneserNey)
    )
    assert trigram < 0.3 * unigram


def test_discounts_stay_in_bounds():
    for counts in ([1, 1, 1], [1, 2, 2, 2, 2, 3], [5, 6], [1] * 50 + [2] * 20 + [3] * 9 + [4] * 5):
        d = discounts(np.array(counts))
        assert d[0] == 0
        assert all(0 < d[k] <= k for k in (1, 2, 3))


def test_ids_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="vocabulary"):
        KneserNey.fit(np.array([0, 1, 9]), 5)
