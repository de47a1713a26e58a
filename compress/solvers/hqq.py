"""HQQ: zero-points (and scales) that serve the bulk of a group's weights, not its outliers. Needs no data.

Half-quadratic quantization minimises a norm with p < 1, to which a few large errors matter little:

    min_z  sum | w - s (q - z) |^p,       q = round(w / s + z) in the range of codes,

by splitting off the error e, pulled towards w - s (q - z) with a growing weight beta:

    e  =  sign(x) max(|x| - |x|^(p-1) / beta, 0),     x = w - s (q - z)      (generalised soft threshold)
    z  =  mean over the group of  q - (w - e) / s;    beta *= kappa.

Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models (2023),
https://mobiusml.github.io/hqq_blog; p = 0.7, beta = 10, kappa = 1.01, 20 iterations are theirs. x is in the
unit of the weights, as there: at those settings the threshold exceeds most errors of a usual layer (e = 0),
and the step is close to least squares. Ours: each group keeps the best it has met; and the same split
gives the scale for fixed zero-points,

    s  =  sum (q - z) (w - e)  /  sum (q - z)^2,

for grids that store integer zero-points, to which rounding leaves hardly any of the first step's gain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

RoundCodes = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class HalfQuadratic:
    """The settings: the norm, the first weight of the split, its growth per step, the number of steps."""

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iterations: int = 20


def shrink(x: Tensor, beta: float, p: float) -> Tensor:
    """The generalised soft threshold, elementwise.

    >>> shrink(torch.tensor([-1.0, 0.1, 0.0, 2.0]), beta=10.0, p=1.0)
    tensor([-0.9000,  0.0000,  0.0000,  1.9000])
    """
    size = x.abs()
    return x.sign() * (size - size.pow(p - 1) / beta).clamp_(min=0)


def lp_error(weight: Tensor, scales: Tensor, zeros: Tensor, round_codes: RoundCodes, p: float) -> Tensor:
    """sum |w - s (q - z)|^p of each group: (..., width), (...), (...) -> (...)."""
    steps = weight / scales[..., None]
    wrong = steps - (round_codes(steps + zeros[..., None]) - zeros[..., None])
    return wrong.abs_().pow_(p).sum(-1) * scales.abs().pow(p)


def zero_points(
    weight: Tensor, scales: Tensor, zeros: Tensor, round_codes: RoundCodes, settings: HalfQuadratic
) -> Tensor:
    """Real zero-points of a lower l_p error than `zeros`, or `zeros` where none was met.

    Args:
        weight: groups of weights, (..., width).
        scales: (...), not zero, kept.
        zeros: (...), where to start.
        round_codes: real numbers -> the nearest codes.
        settings: of the iteration.
    """
    steps = weight / scales[..., None]
    best, best_error = zeros, lp_error(weight, scales, zeros, round_codes, settings.p)
    beta = settings.beta
    for _ in range(settings.iterations):
        q = round_codes(steps + zeros[..., None])
        e = shrink(weight - scales[..., None] * (q - zeros[..., None]), beta, settings.p)
        zeros = (q - (weight - e) / scales[..., None]).mean(-1)
        error = lp_error(weight, scales, zeros, round_codes, settings.p)
        best = torch.where(error < best_error, zeros, best)
        best_error = torch.minimum(error, best_error)
        beta *= settings.kappa
    return best


def fit_scales(
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor,
    round_codes: RoundCodes,
    exact: Callable[[Tensor], Tensor],
    settings: HalfQuadratic,
) -> Tensor:
    """Scales of a lower l_p error than `scales` for fixed `zeros`, or `scales` where none was met.

    `exact` rounds scales to those that can be stored; the rest is as in `zero_points`.
    """
    best, best_error = scales, lp_error(weight, scales, zeros, round_codes, settings.p)
    beta = settings.beta
    for _ in range(settings.iterations):
        steps = weight / scales[..., None]
        q = round_codes(steps + zeros[..., None]) - zeros[..., None]
        e = shrink(weight - scales[..., None] * q, beta, settings.p)
        fitted = (q * (weight - e)).sum(-1) / q.square().sum(-1).clamp(min=1e-30)
        scales = exact(torch.where(fitted * scales > 0, fitted, scales))
        error = lp_error(weight, scales, zeros, round_codes, settings.p)
        best = torch.where(error < best_error, scales, best)
        best_error = torch.minimum(error, best_error)
        beta *= settings.kappa
    return best
