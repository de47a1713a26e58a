"""Metrics of rankings, by hand and against scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from compress.tasks.ranking import Ranking, grouped_rankings, ranking_metrics
from compress.tasks.retrieval import cosines_between, ranked


@pytest.mark.parametrize("grades", [2, 4])
def test_ndcg_is_scikit_learns_where_no_scores_are_equal(grades):
    rng = np.random.default_rng(0)
    for _ in range(50):
        gains = rng.integers(0, grades, 25)
        gains[0] = 1
        scores = rng.permutation(25).astype(float)
        assert Ranking.of(scores, gains).ndcg() == pytest.approx(ndcg_score([gains], [scores], k=10))


def test_mrr_and_recall_are_their_definitions():
    first = Ranking.of(np.array([0.9, 0.8, 0.7, 0.6]), np.array([0, 1, 0, 1]))
    second = Ranking.of(np.array([0.9, 0.8, 0.7]), np.array([1, 0, 0]))
    assert (first.ranks.tolist(), second.ranks.tolist()) == ([2, 4], [1])
    found = ranking_metrics([first, second])
    assert found["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["recall_at_1"] == pytest.approx((0 + 1) / 2)
    assert found["recall_at_5"] == found["recall_at_10"] == 1
    dcg = (1 / np.log2(3) + 1 / np.log2(5)) / (1 + 1 / np.log2(3))
    assert found["ndcg_at_10"] == pytest.approx((dcg + 1) / 2)


def test_what_tells_nothing_apart_gains_nothing():
    same = Ranking.of(np.zeros(20), np.arange(20) == 3)
    assert (same.ranks.tolist(), same.ndcg(), same.recall(10)) == ([20], 0, 0)
    graded = Ranking.of(np.zeros(3), np.array([2, 0, 1]))
    assert (graded.ranks.tolist(), graded.gains.tolist()) == ([2, 3], [1, 2])


def test_only_queries_with_right_and_wrong_passages_are_ranked():
    scores = np.array([0.9, 0.1, 0.3, 0.8, 0.5, 0.4, 0.2])
    gains = np.array([1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 1.0])
    groups = [7, 7, 1, 1, 1, 5, 9]  # 5 and 9 have one passage, 5 no right one
    found = grouped_rankings(scores, gains, groups)
    assert [each.ranks.tolist() for each in found] == [[1, 2], [1]]
    assert grouped_rankings(scores, 0 * gains, groups) == []
    assert grouped_rankings(scores, gains, range(7)) == [], "a passage each"
    assert grouped_rankings(scores, gains - 0.5, groups) == [], "no gain is negative"
    assert grouped_rankings(scores, gains, [7, 7, 1, 2, 3, 5, 9]) == [], "one of six: no queries"


def test_a_text_is_looked_for_among_all_second_texts():
    angles = np.array([0.0, 10.0, 80.0, 20.0, 85.0]) * np.pi / 180
    similarity = cosines_between(np.stack([np.cos(angles), np.sin(angles)], 1))
    found = ranked([(0, 1), (2, 3), (0, 4)], similarity)
    assert (found.queries, found.candidates) == ((0, 2), 3)
    # 0 finds 1 first, and 4 last; 2 finds 4 first, then 3
    assert [each.ranks.tolist() for each in found.rankings] == [[1, 3], [2]]
    assert [int(each[0]) for each in found.decisions] == [1, 4]
    assert [int(each[0]) for each in found.targets] == [1, 3]
    cosines = np.cos(angles[[1, 3, 4]])
    share = np.exp(20 * cosines) / np.exp(20 * cosines).sum()
    assert found.confidences[0][0] == pytest.approx(share[0])


def test_a_text_does_not_find_itself():
    vectors = np.array([[1.0, 0.0], [0.9, 0.1], [0.8, 0.4]])
    found = ranked([(0, 1), (2, 0)], cosines_between(vectors))
    assert [each.ranks.tolist() for each in found.rankings] == [[1], [2]], "0 is no candidate of itself"


def test_of_equal_candidates_a_wrong_one_is_found_first():
    found = ranked([(0, 1), (2, 3)], cosines_between(np.ones((4, 2))))
    assert [int(each[0]) for each in found.decisions] == [3, 1]
    assert [int(each[0]) for each in found.targets] == [1, 3]
    assert [each.ranks.tolist() for each in found.rankings] == [[2], [2]]
