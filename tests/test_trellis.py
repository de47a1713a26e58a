"""The trellis: what it wins, that the nearest way is found, and that codes tell the way they went."""

import itertools
import math
import sys

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


@pytest.mark.parametrize("reach", [6.0, 200.0])
def test_no_way_is_nearer_under_weights_and_inside_the_range(reach):
    target = uniform(8, 6, reach, seed=3)
    weights = torch.tensor([1.0, 0.1, 4.0, 1.0, 0.0, 9.0, 2.0, 1.0])[:, None]
    low, high = (-128, 127) if reach > 100 else (-8, 7)
    if reach < 100:
        target = 2 * target
    found = follow(target, weights, low, high)
    assert found.min() >= low
    assert found.max() <= high
    for column, steps in zip(target.T.tolist(), found.T.tolist(), strict=True):
        best = math.inf
        for turns in itertools.product((0, 1), repeat=8):
            state, cost = 0, 0.0
            for turn, value, weight in zip(turns, column, weights[:, 0].tolist(), strict=True):
                chosen, state = MACHINE[state][turn]
                allowed = [step for step in range(low, high + 1) if step % 4 == chosen]
                cost += weight * min((step - value) ** 2 for step in allowed)
            best = min(best, cost)
        mine = zip(steps, column, weights[:, 0].tolist(), strict=True)
        assert sum(w * (step - value) ** 2 for step, value, w in mine) == pytest.approx(best, rel=1e-4)


def test_halves_are_those_of_the_machine_run_by_run():
    """Every run of 32 rows starts in state 0; of a state's steps, two apart, the half tells which."""
    steps = nearest(uniform(3 * RUN + 7, 4, seed=5)).to(torch.int16)
    halves = halved(steps)
    assert halves is not None
    for column in range(4):
        state = 0
        for row, step in enumerate(steps[:, column].tolist()):
            state = 0 if row % RUN == 0 else state
            assert step % 2 == MACHINE[state][0][0] % 2
            assert int(halves[row, column]) == step // 2
            state = dict(MACHINE[state])[step % 4]
    assert torch.equal(doubled(halves), steps)


def test_columns_are_followed_in_slices_without_a_seam(monkeypatch):
    target = uniform(70, 9)
    whole = nearest(target)
    monkeypatch.setattr(sys.modules[follow.__module__], "_TOGETHER", 6)  # two columns of three runs
    assert torch.equal(nearest(target), whole)
