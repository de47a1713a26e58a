"""The multiple-choice knapsack is exact: nothing that brute force finds is better."""

import itertools
import math
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.solvers.knapsack import cheapest, choose


def total(table, chosen):
    return sum(row[k] for row, k in zip(table, chosen, strict=True))


@st.composite
def problems(draw):
    """Up to five items of up to four choices; losses are eighths, so that their sums are exact."""
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    costs = [[draw(st.integers(0, 12)) for _ in range(width)] for width in widths]
    losses = [[draw(st.integers(0, 40)) / 8 for _ in range(width)] for width in widths]
    return costs, losses


@given(problem=problems(), budget=st.integers(0, 60))
def test_no_choice_within_the_budget_loses_less(problem, budget):
    costs, losses = problem
    every = list(itertools.product(*(range(len(row)) for row in costs)))
    fitting = [total(losses, x) for x in every if total(costs, x) <= budget]
    if not fitting:
        with pytest.raises(UserError, match=f"need {min(total(costs, x) for x in every)};"):
            choose(costs, losses, budget)
        return
    chosen = choose(costs, losses, budget)
    assert total(costs, chosen) <= budget
    assert total(losses, chosen) == min(fitting)


@given(problem=problems(), eighths=st.integers(0, 160))
def test_no_choice_within_the_limit_costs_less(problem, eighths):
    costs, losses = problem
    limit = eighths / 8
    every = list(itertools.product(*(range(len(row)) for row in costs)))
    fitting = [total(costs, x) for x in every if total(losses, x) <= limit]
    if not fitting:
        with pytest.raises(UserError, match=r"the best choices lose .*; raise it"):
            cheapest(costs, losses, limit)
        return
    chosen = cheapest(costs, losses, limit)
    assert total(losses, chosen) <= limit
    assert total(costs, chosen) == min(fitting)


def test_of_equal_costs_the_smaller_loss_is_taken_wherever_it_stands():
    assert choose([[1, 1, 2], [3, 3]], [[5.0, 3.0, 1.0], [1.0, 2.0]], 4) == [1, 0]
    assert choose([[1, 1, 2], [3, 3]], [[5.0, 3.0, 1.0], [2.0, 1.0]], 5) == [2, 1]
    assert cheapest([[1, 1, 2], [5, 3]], [[5.0, 3.0, 1.0], [2.0, 2.0]], 5.0) == [1, 1]


def test_a_smaller_budget_never_loses_less():
    costs, losses = a_model(blocks=3, seed=0)
    smallest, largest = (sum(pick(row) for row in costs) for pick in (min, max))
    budgets = [smallest + (largest - smallest) * i // 20 for i in range(21)]
    found = [total(losses, choose(costs, losses, budget)) for budget in budgets]
    assert found == sorted(found, reverse=True)


def test_the_two_questions_have_one_answer():
    costs, losses = a_model(blocks=4, seed=1)
    budget = sum(row[2] for row in costs)
    best = total(losses, choose(costs, losses, budget))
    assert total(costs, cheapest(costs, losses, best)) <= budget


def test_a_model_of_210_layers_takes_no_time_and_fills_its_budget():
    costs, losses = a_model(blocks=30, seed=2)
    budget = 64_000_001
    started = time.process_time()
    chosen = choose(costs, losses, budget)
    assert time.process_time() - started < 5
    assert 0.999 * budget < total(costs, chosen) <= budget


def test_costs_without_a_common_divisor_take_no_time_either():
    rng = random.Random(0)
    costs = [sorted(rng.randrange(10**5, 10**7) for _ in range(6)) for _ in range(215)]
    losses = [[10 ** rng.gauss(-3, 0.6) * 4.0**-k for k in range(6)] for _ in range(215)]
    budget = sum(row[2] for row in costs)
    started = time.process_time()
    assert total(costs, choose(costs, losses, budget)) <= budget
    assert time.process_time() - started < 5


def a_model(blocks, seed):
    """Bytes of a small Llama's linear layers at 2 to 8 bits, and losses that fall about fourfold per bit."""
    rng = random.Random(seed)
    shapes = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
    bits = (2, 3, 4, 5, 6, 8)
    costs, losses = [], []
    for out, columns in shapes * blocks:
        scale = 10 ** rng.gauss(-3, 0.6)
        costs.append([out * columns * b // 8 + out * columns // 64 * 2 for b in bits])
        losses.append([scale * 4.0 ** (3 - b) * rng.uniform(0.8, 1.2) for b in bits])
    return costs, losses


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("solve", [choose, cheapest])
def test_a_loss_that_cannot_be_weighed_is_refused(solve, wrong):
    with pytest.raises(UserError, match=f"a loss of {wrong} was measured, which cannot be weighed"):
        solve([[1, 2], [1, 2]], [[1.0, 0.0], [1.0, wrong]], 9)
