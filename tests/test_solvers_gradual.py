"""Schedules and shares of sparsity against their equations."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from compress.solvers import gradual, outliers

SHAPES = {"a": (2, 6), "b": (3, 4)}


@pytest.mark.parametrize(("begin", "end"), [(0, 7), (3, 4), (4, 12)])
@pytest.mark.parametrize(("initial", "final"), [(0.0, 0.8), (0.3, 0.5)])
def test_sparsity_follows_the_cube(begin, end, initial, final):
    for step in range(15):
        inside = min(max(step, begin), end)
        wanted = final + (initial - final) * (1 - (inside - begin) / (end - begin)) ** 3
        assert gradual.sparsity_at(step, begin, end, initial, final) == pytest.approx(wanted)


@st.composite
def states(draw):
    """Scores with ties, and masks so far, of two matrices."""
    score = st.sampled_from([0.0, 1.0, 2.0, 2.0, 3.0])
    scores, kept = {}, {}
    for name, (rows, columns) in SHAPES.items():
        size = rows * columns
        scores[name] = torch.tensor(draw(st.lists(score, min_size=size, max_size=size))).view(rows, columns)
        flags = draw(st.lists(st.sampled_from([True, True, False]), min_size=size, max_size=size))
        kept[name] = torch.tensor(flags).view(rows, columns)
    return scores, kept


def first(places, score, kept, count):
    """So many places: what is gone before all that is left, then by score, then in their order."""
    return set(sorted(places, key=lambda i: (kept[i], score[i], i))[:count])


@given(states(), st.floats(0, 1))
def test_each_matrix_and_all_together_lose_their_smallest(state, share):
    scores, kept = state
    found = gradual.shrink_each(scores, kept, share)
    for name, mask in found.items():
        flat, stays = scores[name].flatten().tolist(), kept[name].flatten().tolist()
        count = max(round(share * len(flat)), stays.count(False))
        gone = first(range(len(flat)), flat, stays, count)
        assert mask.flatten().tolist() == [i not in gone for i in range(len(flat))]
    both = gradual.shrink_all(scores, kept, share)
    flat = [x for name in SHAPES for x in scores[name].flatten().tolist()]
    stays = [x for name in SHAPES for x in kept[name].flatten().tolist()]
    gone = first(range(len(flat)), flat, stays, max(round(share * len(flat)), stays.count(False)))
    assert [x for name in SHAPES for x in both[name].flatten().tolist()] == [
        i not in gone for i in range(len(flat))
    ]
    assert {n: tuple(m.shape) for n, m in both.items()} == SHAPES


@given(states(), st.floats(0, 1), st.integers(0, 1))
def test_a_share_of_what_the_pattern_would_remove_goes(state, share, stay):
    scores, kept = state
    for name, mask in gradual.shrink_to_pattern(scores, kept, share, stay, 2).items():
        flat, stays = scores[name].flatten().tolist(), kept[name].flatten().tolist()
        leaving = {
            i
            for start in range(0, len(flat), 2)
            for i in first(range(start, start + 2), flat, stays, 2 - stay)
        }
        gone = first(sorted(leaving), flat, stays, round(share * len(leaving)))
        gone |= {i for i, kept_so_far in enumerate(stays) if not kept_so_far}
        assert mask.flatten().tolist() == [i not in gone for i in range(len(flat))]


@given(st.lists(st.floats(0, 10), min_size=4, max_size=30), st.floats(0.5, 6))
def test_outliers_are_what_exceeds_so_many_means(sizes, threshold):
    values = torch.tensor(sizes, dtype=torch.double)
    parts = [values[:3], values[3:]]
    limit = threshold * sum(sizes) / len(sizes)
    assume(all(abs(x - limit) > 1e-9 for x in sizes))  # a tie of sums is nobody's claim
    found = outliers.outlier_ratio(parts, threshold)
    assert found == pytest.approx(sum(x > limit for x in sizes) / len(sizes))


def test_shares_of_zeros_are_those_of_the_equation():
    ratios, sizes, spread = [0.01, 0.02, 0.05, 0.01], [100, 300, 50, 10], 0.05
    scaled = [2 * spread * (r - 0.01) / 0.04 for r in ratios]
    mean = sum(s * n for s, n in zip(scaled, sizes, strict=True)) / sum(sizes)
    assert outliers.shares(ratios, sizes, 0.6, spread) == pytest.approx([0.6 - s + mean for s in scaled])
    assert outliers.shares([0.3, 0.3], [1, 2], 0.6) == [0.6, 0.6]


def test_the_papers_numbers_are_the_defaults():
    """M = 5 and lambda = 0.08, its experiments' own."""
    values = torch.ones(100)
    values[0] = 5.4  # mean 1.044: five of them are 5.22
    assert outliers.outlier_ratio([values]) == 0.01
    values[0] = 5.2  # 1.042, 5.21
    assert outliers.outlier_ratio([values]) == 0.0
    assert outliers.shares([0.0, 1.0], [1, 1], 0.5) == pytest.approx([0.58, 0.42])
