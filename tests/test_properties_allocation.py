"""What is shared out under a budget: never above it, never worse than brute force, never worse with more."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.formats import Coded, Grid, Int4
from compress.formats.coded.rate_control import RateControl
from compress.formats.coded.streams import bits_per_weight
from compress.layerwise.budget import Candidates
from compress.solvers import outliers
from compress.solvers.knapsack import cheapest, choose
from compress.solvers.masks import spread
from compress.structured import blocks, target

few = settings(max_examples=40)
Table = list[list[float]]


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[list[int]], Table]:
    """Few items: costs of nothing, alike, next to each other at a gigabyte; losses of one power of two, so
    that sums are exact, some negative, some alike, from a millionth to a million."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    kind = draw(st.sampled_from(["small", "large", "alike"]))
    cost = {"small": st.integers(0, 9), "large": st.integers(10**9, 10**9 + 3), "alike": st.just(5)}[kind]
    power = 2.0 ** draw(st.sampled_from([-20, 0, 20]))
    loss = st.integers(-3, 40).map(lambda n: n * power)
    costs = [[draw(cost) for _ in range(width)] for width in widths]
    return costs, [[draw(loss) for _ in range(width)] for width in widths]


def total(table: list[list[int]] | Table, chosen: list[int]) -> float:
    return sum(row[k] for row, k in zip(table, chosen, strict=True))


def every(table: list[list[int]]) -> list[list[int]]:
    return [list(x) for x in itertools.product(*(range(len(row)) for row in table))]


@few
@given(problems(), st.integers(-2, 12), st.data())
def test_the_least_loss_under_every_budget_and_never_more_with_more(problem, extra, data):
    costs, losses = problem
    all_of_them = every(costs)
    sums = sorted({int(total(costs, x)) for x in all_of_them})
    budget = data.draw(st.sampled_from(sums)) + extra
    fitting = [total(losses, x) for x in all_of_them if total(costs, x) <= budget]
    if not fitting:
        with pytest.raises(UserError, match=rf"budget .* is too small.*need {sums[0]:,}; raise it"):
            choose(costs, losses, budget)
        return
    found = choose(costs, losses, budget)
    assert total(costs, found) <= budget
    assert total(losses, found) == min(fitting)
    assert total(losses, choose(costs, losses, budget + 1)) <= min(fitting)
    # and asked the other way round: no more bytes for the same loss
    again = cheapest(costs, losses, min(fitting))
    assert total(losses, again) <= min(fitting)
    wanted = min(total(costs, x) for x in all_of_them if total(losses, x) <= min(fitting))
    assert total(costs, again) == wanted <= budget


@few
@given(problems(), st.permutations(range(5)), st.integers(0, 40))
def test_the_order_of_items_changes_no_sum(problem, order, budget):
    costs, losses = problem
    order = [i for i in order if i < len(costs)]
    budget += sum(map(min, costs))
    one = choose(costs, losses, budget)
    other = choose([costs[i] for i in order], [losses[i] for i in order], budget)
    assert total(losses, one) == total([losses[i] for i in order], other)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_are_refused(value):
    for solve in (choose, cheapest):
        with pytest.raises(UserError, match=rf"a loss of {value} was measured"):
            solve([[1, 2], [1, 2]], [[1.0, value], [3.0, 0.0]], 4)
    assert choose([], [], 0) == cheapest([], [], 0.0) == []


FORMATS = tuple(Int4(group=16 * (k + 1)) for k in range(4))  # mere names here


@few
@given(problems(), st.integers(0, 3000), st.sampled_from([1, 7, 256]), st.integers(0, 400), st.data())
def test_files_are_never_above_their_budget_whatever_they_add(problem, room, page, differing, data):
    costs, losses = problem
    members = [[f"m{i}"] for i in range(len(costs))]
    formats = [FORMATS[: len(row)] for row in costs]
    candidates = Candidates(members, formats, costs)

    def size(plan: dict[str, Int4]) -> int:  # to pages, and more where two neighbours differ
        which = [FORMATS.index(plan[name]) for (name,) in members]
        differ = sum(a != b for a, b in itertools.pairwise(which))
        return (
            sum(-(-row[k] // page) * page for row, k in zip(costs, which, strict=True)) + differ * differing
        )

    smallest = size(candidates.plan(candidates.smallest))
    reserve = data.draw(st.sampled_from([0, 100]))
    found = candidates.within_bytes(losses, size, smallest + room + reserve, reserve)
    fitting = [x for x in every(costs) if size(candidates.plan(x)) <= smallest + room]
    assert found in fitting
    best = min(total(losses, x) for x in fitting)
    assert total(losses, found) >= best
    if page == 1 and not differing:  # then bytes add up
        assert total(losses, found) == best
    with pytest.raises(UserError, match=r"budget_bytes .* is too small"):
        candidates.within_bytes(losses, size, smallest - 1 + reserve, reserve)


@few
@given(problems(), st.floats(0, 64))
def test_bits_per_weight_are_never_above_those_asked_for(problem, bits):
    costs, losses = problem
    candidates = Candidates([[f"m{i}"] for i in range(len(costs))], [FORMATS[: len(r)] for r in costs], costs)
    weights = 10**9
    try:
        found = candidates.within_bits(losses, weights, bits)
    except UserError:
        assert sum(map(min, costs)) * 8 / weights > bits
        return
    assert candidates.total(found) * 8 / weights <= bits
    assert candidates.plan(found).keys() == {f"m{i}" for i in range(len(costs))}


@few
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=6),
    st.lists(st.floats(0, 1), min_size=6, max_size=6),
    st.floats(0, 1),
    st.data(),
)
def test_zeros_are_shared_out_to_one_as_evenly_as_bounds_allow(sizes, wanted, share, data):
    least = [data.draw(st.integers(0, size)) for size in sizes]
    count = max(round(share * sum(sizes)), sum(least))
    shares = torch.tensor(wanted[: len(sizes)], dtype=torch.float64)
    found = spread(count, torch.tensor(sizes), torch.tensor(least), shares)
    assert int(found.sum()) == count
    assert all(low <= n <= size for n, low, size in zip(found.tolist(), least, sizes, strict=True))
    # by the definition: some q, at which each part is (share + q) of its size within its bounds, to one
    lowest, highest = -2.0, 2.0
    for n, size, low, own in zip(found.tolist(), sizes, least, shares.tolist(), strict=True):
        if n > low:
            lowest = max(lowest, (n - 1 - 1e-6) / size - own)
        if n < size:
            highest = min(highest, (n + 1 + 1e-6) / size - own)
    assert lowest <= highest


@few
@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(1, 10**9)), min_size=1, max_size=9
    ),
    st.floats(0.01, 0.99),
    st.floats(0.001, 0.3),
)  # fmt: skip
def test_shares_by_outliers_keep_their_mean_and_their_reach(pairs, sparsity, reach):
    ratios, sizes = zip(*pairs, strict=True)
    found = outliers.shares(ratios, sizes, sparsity, reach)
    assert np.average(found, weights=sizes) == pytest.approx(sparsity, abs=1e-9)
    assert max(found) - min(found) <= 2 * reach + 1e-9
    order = sorted(range(len(ratios)), key=lambda i: ratios[i])
    assert all(found[a] >= found[b] - 1e-12 for a, b in itertools.pairwise(order))


@few
@given(st.integers(1, 200), st.integers(1, 200))
def test_blocks_and_shapes_that_stay_are_spread_from_first_to_last(count, keep):
    if keep <= count:
        found = blocks.spread(count, keep)
        assert len(set(found)) == keep
        assert found == sorted(found)
        assert found[0] == 0
        assert keep == 1 or found[-1] == count - 1
        gaps = np.diff(found)
        assert not len(gaps) or gaps.max() - gaps.min() <= 1
    shapes = target.spread(list(range(count)), keep)
    assert shapes[0] == 0
    assert len(shapes) == len(set(shapes)) == min(count, keep)
    assert keep == 1 or shapes[-1] == count - 1


@settings(max_examples=10)
@given(
    st.lists(st.sampled_from([(64, 96), (32, 64), (96, 128)]), min_size=6, max_size=9),
    st.sampled_from([3.0, 4.0]),
    st.floats(0, 0.05),
    st.integers(0, 999),
)
def test_matrices_rounded_one_after_another_meet_their_rate_together(shapes, rate, added, seed):
    """Also where a solver moves weights so that each takes some hundredths of a bit more than was seen."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [torch.randn(shape, generator=generator) for shape in shapes]
    format = Coded(rate=rate, trellis=False)
    weights = sum(m.numel() for m in matrices)
    control, bits, alone = RateControl(weights), 0.0, 0.0
    for matrix in matrices:
        grid = control.fit(format, matrix)
        moved = matrix * 2**added
        own = format.fit(matrix)
        alone += bits_per_weight(format.codes(moved, own), own.scales) * matrix.numel()
        codes = format.codes(moved, Grid(grid.scales, grid.zeros))
        control.spent(format, [(codes, grid.scales)])
        bits += bits_per_weight(codes, grid.scales) * codes.numel()
    assert bits <= alone + 0.002 * weights
    assert bits / weights <= rate + 0.035
    assert bits / weights >= rate - 0.1
