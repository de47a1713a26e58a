"""The descent behind block tuning, against its equations written out number by number."""

import math

import pytest
import torch

from compress.formats import Coded, Int2, Int3, Int4, Int8, Nf4, QuantizedLinear, QuantizedTensor
from compress.solvers.block_tuning import descend, positions, tuned_codes
from compress.training.codes.rounding import TunableRounding


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


FORMATS = [
    Int4(group=16),
    Int2(group=None),
    Int8(),
    Nf4(group=16),
    Coded(rate=3),
    Coded(rate=3, trellis=False),
]


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_layer_starts_as_its_codes_and_moves_towards_lower_loss(format):
    weight, loss = torch.randn(2, 32, 40, generator=torch.Generator().manual_seed(0)).unbind()
    mask = torch.rand(32, 40, generator=torch.Generator().manual_seed(1)) > 0.2
    held = QuantizedTensor.round(format, weight * mask)
    tunable = TunableRounding(QuantizedLinear(held), weight, mask)
    assert torch.equal(tunable.weight, held.dequantize())
    (tunable.weight * loss).sum().backward()
    width = format.group_width(40)
    scales = held.grid.scales.repeat_interleave(width, 1)[:, :40]
    inside = (tunable.start > 0) & (
        tunable.start < format.levels - 1
    )  # elsewhere a code can move one way only
    assert torch.equal(tunable.offset.grad.sign()[inside], (loss * scales).sign()[inside])
    padded = torch.nn.functional.pad(loss * held.dequantize(), (0, -40 % width))
    slope = padded.view(32, -1, width).sum(2)  # w = u s (1 + d)
    torch.testing.assert_close(tunable.shift.grad, slope, rtol=1e-4, atol=1e-4)
    tuned = tunable.tuned()
    assert torch.equal(tuned.codes, held.codes)
    assert torch.equal(tuned.scales, held.scales)
    movable = torch.zeros(32, 40) if isinstance(format, Coded) else 0.5 * mask
    assert torch.equal(tunable.movable, movable)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_moved_layer_ships_what_it_was_judged_by(format):
    """Codes one step off, scales rounded to float16: written, they stand for the weight that was seen."""
    weight = torch.randn(32, 40, generator=torch.Generator().manual_seed(0))
    held = QuantizedTensor.round(format, weight)
    tunable = TunableRounding(QuantizedLinear(held), weight, None)
    with torch.no_grad():
        tunable.offset.copy_(0.5 * torch.randn(32, 40, generator=torch.Generator().manual_seed(2)).sign())
        tunable.offset.clamp_(-tunable.movable, tunable.movable)
        tunable.shift.fill_(0.0123)
    tunable.shipping = True
    tuned = tunable.tuned()
    assert torch.equal(tuned.dequantize(), tunable.weight)
    moved = tuned.unpacked().int() - held.unpacked().int()
    assert moved.any() != isinstance(format, Coded)
    assert moved.abs().max() <= 1
    torch.testing.assert_close(tuned.grid.scales, 1.0123 * held.grid.scales, rtol=1e-3, atol=0)


@pytest.mark.parametrize("format", FORMATS[:4], ids=str)
def test_places_are_codes_and_what_lies_between_them(format):
    weight = torch.randn(8, 40, generator=torch.Generator().manual_seed(3))
    grid = format.fit(0.8 * weight)
    codes = format.codes(weight, grid)
    values = format.values(codes, grid)
    torch.testing.assert_close(format.places(values, grid), codes.float(), rtol=0, atol=1e-4)
    places = format.places(weight, grid)
    assert torch.equal(places.round().clamp(0, format.levels - 1), codes.float())
    higher = format.values((codes.int() + 1).clamp(max=format.levels - 1).to(torch.uint8), grid)
    torch.testing.assert_close(
        format.places(0.75 * values + 0.25 * higher, grid), codes + 0.25 * (codes < format.levels - 1),
        rtol=0, atol=1e-3,
    )  # fmt: skip
