"""Measured losses before bits are chosen by them: read off between rates, drawn towards each other."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.knapsack import choose
from compress.solvers.losses import extended, tempered

positive = st.floats(1e-6, 1e3)


def test_a_loss_that_falls_by_four_per_bit_is_extended_exactly():
    at, wanted = [2.0, 3.0, 4.0], [2.0, 2.25, 3.5, 4.0]
    found = extended([4.0**-r for r in at], at, wanted)
    assert found == pytest.approx([4.0**-r for r in wanted])


@given(st.lists(positive, min_size=2, max_size=5), st.floats(0, 1))
def test_the_measured_losses_stay_when_wholly_trusted_and_level_out_when_not(levels, trust):
    rows, weights = [[x, x / 4] for x in levels], list(range(1, len(levels) + 1))
    for found_row, row in zip(tempered(rows, levels, weights, 1.0), rows, strict=True):
        assert found_row == pytest.approx(row)
    spread = [math.log(row[0] / w) for row, w in zip(rows, weights, strict=True)]
    drawn = tempered(rows, levels, weights, trust)
    found = [math.log(row[0] / w) for row, w in zip(drawn, weights, strict=True)]
    assert max(found) - min(found) == pytest.approx(trust * (max(spread) - min(spread)), abs=1e-6)
    assert sum(row[0] for row in drawn) == pytest.approx(sum(levels))
    for row in drawn:
        assert row[0] == pytest.approx(4 * row[1])


@pytest.mark.parametrize("trust", [0.0, 0.5, 1.0])
def test_rates_follow_reverse_water_filling_times_the_trust(trust):
    """Two tensors of one size, one 4^2 times as sensitive: two bits apart by the rule."""
    rates, size = [quarter / 4 for quarter in range(4, 33)], 1000
    levels = [1.0, 16.0]
    losses = [[level * 4.0 ** (3 - rate) for rate in rates] for level in levels]
    costs = [[int(size * rate) for rate in rates]] * 2
    chosen = choose(costs, tempered(losses, levels, [size, size], trust), int(size * 2 * 4.0))
    low, high = (rates[k] for k in chosen)
    assert high - low == pytest.approx(2 * trust, abs=0.25)
    assert low + high == pytest.approx(8.0, abs=0.25)


@given(st.lists(positive, min_size=2, max_size=5), st.floats(0, 1))
def test_levels_are_tempered_as_the_equation_says(levels, trust):
    weights = list(range(1, len(levels) + 1))
    factors = [(x / w) ** (trust - 1) for x, w in zip(levels, weights, strict=True)]
    keep = sum(levels) / sum(x * f for x, f in zip(levels, factors, strict=True))
    found = tempered([[x, x / 4, 7.0] for x in levels], levels, weights, trust)
    for row, level, factor in zip(found, levels, factors, strict=True):
        assert row == pytest.approx([x * factor * keep for x in (level, level / 4, 7.0)], rel=1e-9)


def test_between_measured_rates_logarithms_are_joined_by_lines_and_flat_beyond():
    found = extended([8.0, 2.0, 1.0], [2.0, 3.0, 5.0], [1.0, 2.0, 2.5, 3.0, 4.0, 5.0, 9.0])
    assert found == pytest.approx([8.0, 8.0, 4.0, 2.0, math.sqrt(2.0), 1.0, 1.0])


def test_losses_of_nothing_are_numbers():
    assert all(math.isfinite(x) and x > 0 for x in extended([1.0, 0.0], [2.0, 3.0], [2.5, 3.0]))
    found = tempered([[0.0, 0.0], [1.0, 0.25]], [0.0, 1.0], [1, 1], 0.5)
    assert found[0] == [0.0, 0.0]
    assert all(math.isfinite(x) for row in found for x in row)
