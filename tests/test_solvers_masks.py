"""Masks: counts are exact, the largest stay, what was gone stays gone, and shares are as even as asked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.solvers import masks

# few distinct values, so that ties are the rule
scores = st.integers(1, 6).flatmap(
    lambda rows: st.integers(1, 12).flatmap(
        lambda columns: st.lists(
            st.sampled_from([0.0, 1.0, 1.0, 2.0]), min_size=rows * columns, max_size=rows * columns
        ).map(lambda values: torch.tensor(values).view(rows, columns))
    )
)


def check_kept_are_largest(scores: torch.Tensor, mask: torch.Tensor) -> None:
    if mask.any() and not mask.all():
        assert scores[mask].min() >= scores[~mask].max()


@given(scores, st.data())
def test_exactly_so_many_are_removed_ties_and_all(scores, data):
    count = data.draw(st.integers(0, scores.numel()))
    mask = masks.smallest(scores, count)
    assert mask.shape == scores.shape
    assert int((~mask).sum()) == count
    check_kept_are_largest(scores, mask)


@given(scores, st.data())
def test_exactly_so_many_are_removed_from_every_row(scores, data):
    count = data.draw(st.integers(0, scores.shape[1]))
    mask = masks.smallest_per_row(scores, count)
    assert ((~mask).sum(1) == count).all()
    for row, kept in zip(scores, mask, strict=True):
        check_kept_are_largest(row, kept)


@given(scores, st.integers(2, 8), st.data())
def test_a_pattern_holds_in_every_group(scores, of, data):
    kept = data.draw(st.integers(1, of - 1))
    wide = scores.repeat(1, of)  # a width that divides
    mask = masks.pattern(wide, kept, of)
    assert (mask.view(-1, of).sum(1) == kept).all()
    for group, stays in zip(wide.view(-1, of), mask.view(-1, of), strict=True):
        check_kept_are_largest(group, stays)


@given(scores, st.data())
def test_masks_are_those_of_sorting(scores, data):
    """What is carried goes first, then the smallest, of equal ones the first; rows, groups or all of it."""
    rows, columns = scores.shape
    size = rows * columns
    carried = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    carried = carried.view(rows, columns)
    first, score = carried.flatten().tolist(), scores.flatten().tolist()
    gone = int((~carried).sum())
    count = data.draw(st.integers(0, scores.numel()))

    def expected(parts: list[torch.Tensor], counts: list[int]) -> torch.Tensor:
        mask = torch.ones(size, dtype=torch.bool)
        for places, n in zip(parts, counts, strict=True):
            ranks = sorted(places.tolist(), key=lambda i: (first[i], score[i], i))
            mask[ranks[:n]] = False
        return mask.view(rows, columns) & carried

    everywhere = torch.arange(size)
    assert torch.equal(masks.best(scores, count, carried), expected([everywhere], [max(count, gone)]))
    per_row = masks.spread(max(count, gone), torch.full((rows,), columns), (~carried).sum(1)).tolist()
    assert torch.equal(
        masks.best_per_row(scores, count, carried), expected(list(everywhere.view(rows, columns)), per_row)
    )
    of = data.draw(st.sampled_from([n for n in range(1, columns + 1) if columns % n == 0]))
    stay = data.draw(st.integers(0, of))
    groups = list(everywhere.view(-1, of))
    for function in (masks.best, masks.best_per_row):
        found = function(scores, (stay, of), carried)
        assert torch.equal(found, expected(groups, [of - stay] * len(groups)))


def test_shares_are_spread_around_those_asked_for():
    """The mean share is met, differences stay as asked for, and parts at an end leave it to the others."""
    sizes = torch.tensor([10_000, 30_000, 5_000])
    found = masks.spread(18_000, sizes, shares=torch.tensor([0.5, 0.3, 0.6])).double() / sizes
    assert (found - found[0]).tolist() == pytest.approx([0, -0.2, 0.1], abs=1e-3)
    # the second is held at its least, and the others share the rest: (0.5 + q) 10000 + (0.6 + q) 5000 = 3000
    least = torch.tensor([0, 20_000, 0])
    found = masks.spread(23_000, sizes, least, torch.tensor([0.5, 0.3, 0.6]))
    assert found.tolist() == [1_667, 20_000, 1_333]


@pytest.mark.parametrize(
    ("wanted_", "count", "limits", "expected"),
    [
        ([1.5, 2.5, 3.0], 7, [9, 9, 9], [2, 2, 3]),
        ([1.7, 2.2, 3.1], 7, [9, 9, 9], [2, 2, 3]),
        ([1.7, 2.2, 3.1], 8, [9, 9, 9], [2, 3, 3]),
        ([1.9, 2.2, 3.1], 7, [1, 9, 9], [1, 3, 3]),  # no room in the first
        ([2.0, 2.0, 2.9], 5, [9, 9, 9], [1, 2, 2]),  # too many: the smallest remainder gives
        ([0.0, 0.2, 0.9], 1, [9, 9, 9], [0, 0, 1]),
        ([2.9999999, 1.0], 4, [9, 9], [3, 1]),
    ],
)
def test_remainders_go_to_the_largest(wanted_, count, limits, expected):
    found = masks.largest_remainder(torch.tensor(wanted_, dtype=torch.double), count, torch.tensor(limits))
    assert found.tolist() == expected


@pytest.mark.parametrize("choose", [masks.smallest, masks.smallest_per_row, masks.best, masks.best_per_row])
def test_scores_without_a_rank_are_refused(choose):
    wrong = torch.tensor([[1.0, torch.nan, 3.0], [0.5, 2.0, 4.0]])
    with pytest.raises(UserError, match=r"scores that are not numbers \(NaN\)"):
        choose(wrong, 1)
    assert int((~choose(wrong.nan_to_num(9.0), 2)).sum()) == (4 if choose is masks.smallest_per_row else 2)
