"""Signed gradient descent on rounding offsets and scales: the solver behind block tuning.

SignRound (Cheng et al. 2023, arXiv 2309.05516) moves weights across rounding borders by the error of a
whole block's output rather than of one layer's:

    w^ = (clamp(round(p + V), 0, levels - 1) - z) * s (1 + d),      V in [-1/2, 1/2], d in [-1/4, 1/4]
    V <- clamp(V - r_t sign(dL/dV)),    d <- clamp(d - r'_t sign(dL/dd)),    r_t falling linearly to 0

with gradients passed straight through the rounding. A code moves by one step at most. The sign makes every
weight travel at the same pace, so that the path, steps * r / 2, is exactly what the interval allows.

Here p is not w / s + z but the point nearest to it inside the cell of a code q that is already there: the
descent starts from codes that an error-compensating rounder chose, and what it flips first are codes that
the original weight lies beyond. Where codes stand for values that are not equally spaced, p is a place among
them, in proportion between two, and gradients pass as if they were: only their signs matter. Scales take
part as in EfficientQAT's block phase (Chen et al. 2024, arXiv 2407.11062). What is returned is the best
judged point, the start included.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MARGIN = 1e-3  # of a step: how far inside its cell a start lies
SCALE_BOUND = 0.25


@dataclass(frozen=True)
class Tuned:
    """The outcome of a descent: errors as judged, of the start and of the point that `parameters` hold."""

    before: float
    after: float


def positions(places: Tensor, codes: Tensor) -> Tensor:
    """Where each code starts inside its cell: the point nearest to the original weight.

    Args:
        places: of the original weight among the codes, w / s + z on a uniform grid, (out, in).
        codes: uint8 (out, in).

    >>> [round(x, 3) for x in positions(torch.tensor([0.1, 0.9]), torch.tensor([0, 0])).tolist()]
    [0.1, 0.499]
    """
    reach = 0.5 - _MARGIN
    return codes + (places - codes).clamp_(-reach, reach)


def tuned_codes(position: Tensor, offset: Tensor, levels: int) -> Tensor:
    """The codes of an offset, as float; gradients pass the rounding, and stop where it is clamped."""
    moved = position + offset
    limited = moved.clamp(0, levels - 1)
    rounded: Tensor = limited + (limited.round() - limited).detach()
    return rounded


def descend(
    parameters: list[Tensor],
    bounds: list[Tensor | float],
    rates: list[float],
    loss: Callable[[int], Tensor],
    judge: Callable[[], float],
    steps: int,
    checks: int = 4,
) -> Tuned:
    """Signed gradient descent on `parameters`, in place, to the best of the points that were judged.

    Args:
        parameters: leaf tensors that require a gradient.
        bounds: of each one's absolute value; a tensor of its shape where elements differ (0: fixed).
        rates: of each one's first step.
        loss: of a step's batch.
        judge: the error on what no step sees; the lowest wins, and a tie goes to the earlier point.
        steps: how many.
        checks: how often the judge is asked on the way, evenly spaced; also at the start.
    """
    before = best = judge()
    kept = [p.detach().clone() for p in parameters]
    asked = {steps * (i + 1) // checks for i in range(checks)}
    for step in range(steps):
        gradients = torch.autograd.grad(loss(step), parameters)
        with torch.no_grad():
            for p, gradient, bound, rate in zip(parameters, gradients, bounds, rates, strict=True):
                p.sub_(gradient.sign(), alpha=rate * (1 - step / steps))
                limit = torch.as_tensor(bound, device=p.device)
                p.copy_(torch.maximum(torch.minimum(p, limit), -limit))
        if step + 1 in asked:
            error = judge()
            if error < best:
                best = error
                for keep, p in zip(kept, parameters, strict=True):
                    keep.copy_(p.detach())
    with torch.no_grad():
        for keep, p in zip(kept, parameters, strict=True):
            p.copy_(keep)
    return Tuned(before, best)
