"""The trellis: what it wins, that the nearest way is found, and that codes tell the way they went."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.formats.coded.trellis import RUN, doubled, follow, halved

# state -> (set, next state), twice; written out once more, so that the tables are checked
MACHINE = {
    0: ((0, 0), (2, 1)), 1: ((1, 2), (3, 3)), 2: ((2, 4), (0, 5)), 3: ((3, 6), (1, 7)),
    4: ((2, 0), (0, 1)), 5: ((3, 2), (1, 3)), 6: ((0, 4), (2, 5)), 7: ((1, 6), (3, 7)),
}  # fmt: skip


def uniform(rows, columns, reach=100.0, seed=0):
    return (torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * reach


def nearest(target):
    return follow(target, torch.ones(len(target), 1), -128, 127)


def test_the_error_is_most_of_a_decibel_below_that_of_the_coarse_grid():
    """Marcellin and Fischer: 1.1 dB with eight states and long runs; a run starts in a given state."""
    target = uniform(8 * RUN, 1000)
    error = float((nearest(target) - target).square().mean())
    assert 10 * math.log10(2.0**2 / 12 / error) > 0.82


def test_no_way_is_nearer():
    target = uniform(7, 5, reach=6.0)
    found = nearest(target)
    for column, steps in zip(target.T, found.T, strict=True):
        best = math.inf
        for turns in itertools.product((0, 1), repeat=len(column)):
            state, cost = 0, 0.0
            for turn, value in zip(turns, column.tolist(), strict=True):
                chosen, state = MACHINE[state][turn]
                cost += (round((value - chosen) / 4) * 4 + chosen - value) ** 2
            best = min(best, cost)
        assert float((column - steps).square().sum()) == pytest.approx(best, rel=1e-5)


def test_steps_go_through_the_states():
    for steps in nearest(uniform(RUN, 20)).T.tolist():
        state = 0
        for step in steps:
            sets = dict(MACHINE[state])
            assert step % 4 in sets
            state = sets[step % 4]


def test_a_way_is_its_own_nearest():
    steps = nearest(uniform(3 * RUN + 5, 12))
    assert torch.equal(nearest(steps), steps)


def test_rows_of_more_weight_are_met_more_nearly():
    target = uniform(64, 2000)
    weights = torch.ones(64, 1)
    weights[::2] = 100.0
    error = (follow(target, weights, -128, 127) - target).square().mean(1)
    assert error[::2].mean() < 0.6 * error[1::2].mean()


@given(st.integers(1, 80), st.integers(1, 5), st.floats(0.1, 1000), st.integers(0, 99))
def test_steps_stay_in_range_and_halves_tell_them(rows, columns, reach, seed):
    steps = nearest(uniform(rows, columns, reach, seed)).to(torch.int16)
    assert steps.min() >= -128
    assert steps.max() <= 127
    halves = halved(steps)
    assert halves is not None
    assert halves.min() >= -64
    assert halves.max() <= 63
    assert torch.equal(doubled(halves), steps)


def test_other_steps_have_no_halves():
    assert halved(torch.ones(1, 1, dtype=torch.int16)) is None
    steps = nearest(uniform(40, 3)).to(torch.int16)
    steps[33, 1] += 1
    assert halved(steps) is None
