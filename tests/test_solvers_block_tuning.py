"""The descent behind block tuning, against its equations written out number by number."""

import math

import pytest
import torch

from compress.formats import Int3, QuantizedTensor
from compress.solvers.block_tuning import descend, positions, tuned_codes


def test_a_start_is_the_point_of_its_cell_nearest_to_the_original():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    held = QuantizedTensor.round(Int3(group=None), weight)
    codes = held.unpacked()
    codes[0] = 7 - codes[0]  # far from the weights, as an error-compensating rounder may leave them
    scales, zeros = held.grid.scales, held.grid.zeros.float()
    start = positions(weight / scales + zeros, codes)
    for row in range(6):
        for column in range(40):
            ideal = float(weight[row, column] / scales[row, 0] + zeros[row, 0])
            code = int(codes[row, column])
            wanted = min(max(ideal, code - 0.499), code + 0.499)
            assert float(start[row, column]) == pytest.approx(wanted, abs=1e-5)
    assert torch.equal(start.round(), codes.float()), "a start stands for the code it came from"


def test_codes_round_the_sum_and_gradients_pass_but_where_it_is_clamped():
    position = torch.tensor([0.3, 2.4, 6.9, 0.1, 7.4])
    offset = torch.tensor([0.1, 0.2, -0.5, -0.5, 0.5], requires_grad=True)
    found = tuned_codes(position, offset, 8)
    assert found.tolist() == [0, 3, 6, 0, 7]
    (found * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert offset.grad is not None
    assert offset.grad.tolist() == [1, 2, 3, 0, 0]


def by_hand(start, bounds, rates, gradient, judged, steps, checks):
    """Plain numbers: (the kept point, its error, the path)."""
    now, best, least, path = list(start), list(start), judged(start), [list(start)]
    for step in range(steps):
        slopes = gradient(now, step)
        for i, slope in enumerate(slopes):
            moved = now[i] - rates[i] * (1 - step / steps) * ((slope > 0) - (slope < 0))
            now[i] = min(max(moved, -bounds[i]), bounds[i])
        path.append(list(now))
        if any(step + 1 == steps * (i + 1) // checks for i in range(checks)) and judged(now) < least:
            best, least = list(now), judged(now)
    return best, least, path


@pytest.mark.parametrize("checks", [1, 3, 5])
@pytest.mark.parametrize("steps", [5, 12])
def test_every_step_is_that_of_the_equation(steps, checks):
    """A wavy function, so that the way turns; the judge prefers another point than where it ends."""
    start, bounds, rates = [0.0, 0.1, -0.2], [0.5, 0.25, 0.3], [0.15, 0.05, 0.11]

    def gradient(at, step):
        return [math.cos(9 * x + i + step) - x for i, x in enumerate(at)]

    def judged(at):
        return sum(math.sin(7 * x + 2 * i) for i, x in enumerate(at)) + 10

    parameters = [torch.tensor([x], dtype=torch.double, requires_grad=True) for x in start]
    seen = []

    def loss(step):
        seen.append([float(p.detach()) for p in parameters])
        slopes = gradient(seen[-1], step)
        return sum(slope * p.sum() for slope, p in zip(slopes, parameters, strict=True))

    outcome = descend(
        parameters,
        [bounds[0], torch.tensor([bounds[1]], dtype=torch.double), bounds[2]],
        rates,
        loss,
        lambda: judged([float(p.detach()) for p in parameters]),
        steps,
        checks,
    )
    best, least, path = by_hand(start, bounds, rates, gradient, judged, steps, checks)
    assert [x for at in seen for x in at] == pytest.approx([x for at in path[:-1] for x in at])
    assert [float(p.detach()) for p in parameters] == pytest.approx(best)
    assert outcome.before == pytest.approx(judged(start))
    assert outcome.after == pytest.approx(least)


def test_the_whole_interval_is_within_reach():
    """steps * r / 2 and a half step more: what SignRound's default rate, 1 / steps, is chosen for."""
    p = torch.zeros(1, requires_grad=True)
    descend([p], [9.0], [1 / 50], lambda _: -p.sum(), lambda: -float(p.detach().sum()), 50)
    assert p.item() == pytest.approx(0.5 + 0.5 / 50)


def test_of_equal_points_the_earlier_is_kept():
    p = torch.zeros(1, requires_grad=True)
    outcome = descend([p], [1.0], [0.1], lambda _: -p.sum(), lambda: 1.0, 4)
    assert p.item() == 0
    assert outcome.before == outcome.after == 1.0
