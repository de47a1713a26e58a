"""One choice per item under a budget, exactly: the multiple-choice knapsack.

    minimise  sum_i loss[i][x_i]    subject to    sum_i cost[i][x_i] <= budget,    one x_i per item i.

Items enter one after the other. A partial solution is a pair (cost, loss), and one that is neither cheaper
nor better than another is dropped, which leaves a Pareto front (Nemhauser and Ullmann, 1969). What keeps
the fronts short is a bound: completed by the linear relaxation of the remaining items, which takes the
steps of their lower convex hulls in the order of loss saved per cost (Sinha and Zoltners, 1979), a partial
solution must not come out worse than the best value allowed. That value starts just above the relaxation
of the whole problem and is raised only while nothing is found; the first solution found is optimal, since
everything at least as good was kept.

Cost: for 211 items of 6 choices and costs of 10^5 to 10^7, well under a second; the problem is NP-hard, and
costs made to be hard can take long. Sums are float64, exact for integers below 2^53.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError

Floats = NDArray[np.float64]

_FIRST_GAP = 1 / 256  # of the gap between the relaxation and a greedy solution
_WIDEN = 4.0
_ROUNDING = 1e-12  # relative; a bound must not fail for a last digit


def choose(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The choices of least summed loss whose summed cost is at most `budget`.

    Args:
        costs: per item and choice, integers of any unit (bytes).
        losses: of the same shape.
        budget: in the unit of the costs.

    Returns:
        The number of the choice of each item.

    Raises:
        UserError: even the cheapest choices cost more, or a loss is no finite number.

    >>> choose([[1, 2, 4], [1, 3]], [[9.0, 5.0, 0.0], [4.0, 0.0]], 5)
    [2, 0]
    """
    _require_finite(losses)
    smallest = sum(min(row) for row in costs)
    if smallest > budget:
        raise UserError(f"budget {budget:,} is too small: the cheapest choices need {smallest:,}; raise it")
    return _solve(costs, losses, budget)


def cheapest(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: float) -> list[int]:
    """The choices of least summed cost whose summed loss is at most `limit`, to a relative 1e-12.

    Raises:
        UserError: even the best choices lose more, or a loss is no finite number.

    >>> cheapest([[1, 2, 4], [1, 3]], [[9.0, 5.0, 0.0], [4.0, 0.0]], 5.0)
    [2, 0]
    """
    _require_finite(losses)
    smallest = sum(min(row) for row in losses)
    if smallest > _loosened(limit):
        raise UserError(f"limit {limit:g} is too small: the best choices lose {smallest:.4g}; raise it")
    return _solve(losses, costs, limit)


def _require_finite(losses: Sequence[Sequence[float]]) -> None:
    wrong = next((x for row in losses for x in row if not math.isfinite(x)), None)
    if wrong is not None:
        raise UserError(f"a loss of {wrong} was measured, which cannot be weighed; is the checkpoint sound?")


def _loosened(limit: float) -> float:
    """By less than one for integers below 10^12; sums of floats may differ from their limit by so much."""
    return limit + _ROUNDING * abs(limit)


@dataclass(frozen=True)
class _Item:
    """Choices that no other choice dominates: weights rise, values fall; `numbers` are the caller's."""

    numbers: list[int]
    weights: Floats
    values: Floats

    def hull(self) -> list[int]:
        """Those on the lower convex hull."""
        kept: list[int] = []
        for k in range(len(self.numbers)):
            while len(kept) > 1 and self._slope(kept[-2], kept[-1]) >= self._slope(kept[-2], k):
                kept.pop()
            kept.append(k)
        return kept

    def _slope(self, a: int, b: int) -> float:
        return float((self.values[b] - self.values[a]) / (self.weights[b] - self.weights[a]))


def _item(weights: Sequence[float], values: Sequence[float]) -> _Item:
    kept: list[int] = []
    for k in sorted(range(len(weights)), key=lambda k: (weights[k], values[k])):
        if not kept or values[k] < values[kept[-1]]:
            kept.append(k)
    as_array = [np.array([row[k] for k in kept], np.float64) for row in (weights, values)]
    return _Item(kept, as_array[0], as_array[1])


@dataclass(frozen=True)
class _Relaxation:
    """The least value of some items if choices could be mixed, as a function of the capacity."""

    weights: Floats  # rising, the first is the least that must be spent
    values: Floats  # falling

    def value(self, capacity: Floats | float) -> Floats:
        """Infinite where not even the lightest choices fit."""
        found = np.interp(capacity, self.weights, self.values)
        return np.where(
            np.asarray(capacity) < self.weights[0] - _ROUNDING * abs(self.weights[0]), np.inf, found
        )


@dataclass(frozen=True)
class _Steps:
    """Steps along the hulls of all items, the most value saved per weight first."""

    items: NDArray[np.int64]
    weights: Floats
    values: Floats

    @classmethod
    def of(cls, items: list[_Item]) -> "_Steps":
        rows = [
            (number, item.weights[b] - item.weights[a], item.values[b] - item.values[a])
            for number, item in enumerate(items)
            for hull in [item.hull()]
            for a, b in itertools.pairwise(hull)
        ]
        rows.sort(key=lambda row: row[2] / row[1])  # stable: an item's own steps stay in their order
        table = np.array(rows, np.float64).reshape(-1, 3)
        return cls(table[:, 0].astype(np.int64), table[:, 1], table[:, 2])

    def relaxation(self, items: list[_Item], first: int) -> _Relaxation:
        """Of the items numbered `first` and up."""
        rest = items[first:]
        taken = self.items >= first
        weights = np.concatenate(([sum(item.weights[0] for item in rest)], self.weights[taken]))
        values = np.concatenate(([sum(item.values[0] for item in rest)], self.values[taken]))
        return _Relaxation(np.cumsum(weights), np.cumsum(values))

    def greedy(self, items: list[_Item], capacity: float) -> float:
        """The value of a solution that takes each step that fits, as long as its item missed none."""
        room = capacity - sum(item.weights[0] for item in items)
        value = sum(item.values[0] for item in items)
        missed: set[int] = set()
        for item, weight, change in zip(self.items, self.weights, self.values, strict=True):
            if item in missed or weight > room:
                missed.add(item)
                continue
            room -= weight
            value += change
        return float(value)


def _solve(
    weights: Sequence[Sequence[float]], values: Sequence[Sequence[float]], capacity: float
) -> list[int]:
    """Least summed value with summed weight <= capacity; a solution exists."""
    capacity = _loosened(capacity)
    unordered = [_item(w, v) for w, v in zip(weights, values, strict=True)]
    # items with most at stake first: their wrong choices are cut at once, and fronts grow only at the end
    order = sorted(range(len(unordered)), key=lambda i: -float(np.ptp(unordered[i].values)))
    items = [unordered[i] for i in order]
    steps = _Steps.of(items)
    bounds = [steps.relaxation(items, first) for first in range(len(items) + 1)]
    least = float(bounds[0].value(capacity))
    gap = max(steps.greedy(items, capacity) - least, 0.0)
    slack = _ROUNDING * sum(float(np.abs(item.values).max()) for item in items)
    share = _FIRST_GAP
    while True:
        last = share >= 1
        found = _search(items, bounds, capacity, least + min(share, 1.0) * gap + slack)
        if found is not None:
            break
        assert not last, "the greedy solution is within its own value"
        share *= _WIDEN
    chosen = [0] * len(items)
    for place, item, k in zip(order, items, found, strict=True):
        chosen[place] = item.numbers[k]
    return chosen


def _search(
    items: list[_Item], bounds: list[_Relaxation], capacity: float, allowed: float
) -> list[int] | None:
    """The best choices of value at most `allowed`; None if there are none."""
    spent, lost = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], int]] = []
    for number, item in enumerate(items):
        weight = (spent[:, None] + item.weights).ravel()  # (front * choices,)
        value = (lost[:, None] + item.values).ravel()
        alive = np.flatnonzero(value + bounds[number + 1].value(capacity - weight) <= allowed)
        alive = alive[np.lexsort((value[alive], weight[alive]))]
        best = np.minimum.accumulate(value[alive])
        alive = alive[np.concatenate(([True], value[alive][1:] < best[:-1]))] if len(alive) else alive
        if not len(alive):
            return None
        spent, lost = weight[alive], value[alive]
        trail.append((alive, len(item.numbers)))
    fits = np.flatnonzero(spent <= capacity)
    if not len(fits):
        return None
    at = int(fits[-1])  # the front falls: the heaviest that fits is the best
    chosen: list[int] = []
    for alive, choices in reversed(trail):
        at, k = divmod(int(alive[at]), choices)
        chosen.append(k)
    return chosen[::-1]
