"""ALPS: choose what to prune and what the rest becomes together, by ADMM, then fit the rest exactly.

Minimises  || (W - W^) X ||_F^2  over W^ with a given number of zeros (or a pattern). A copy B of W^ carries
the error, D the zeros, and a multiplier V holds them together:

    B <- (H + rho I)^-1 (H W - V + rho D)
    D <- P(B + V / rho)                      P keeps the largest of the matrix (N:M: of each group)
    V <- V + rho (B - D)

rho grows by 1.3, 1.2 or 1.1 every third step, less as fewer elements of the support change, until none does;
then the weights on the support are fitted by conjugate gradients (solvers/support.py). Unlike a sweep,
every choice can still be revised by all others. As the problem is not convex, the support that one starts
with (Wanda's scores over the whole matrix) is fitted, too, and the better of both is taken.

Inputs are scaled first so that diag H = 1; P then compares what Wanda compares, |W_ij| ||x_j||. With
H = Q L Q^T, known once for all layers with the same input, the inverse of every rho is a product, and each
step another one (or two with Q, where there are few rows).

Meng, Behdin, Wang, Mazumder: ALPS (2024), arXiv 2406.07831; equations 4 to 6, algorithm 1, and the schedule
of its appendix. Cost: about 30 to 100 steps of out in^2 multiplications, and some 20 in^3.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.solvers.masks import Quota, best
from compress.solvers.support import fit

_FIRST_RHO = 0.1  # of diag H = 1
_EVERY = 3  # steps between looks at the support
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # share of the support that changed -> factor


@dataclass(frozen=True)
class Spectrum:
    """S H S = Q diag(values) Q^T with S = diag(1 / scale), so that the diagonal is 1; H is damped."""

    scaled: Tensor
    scale: Tensor
    vectors: Tensor
    values: Tensor

    def inverse(self, rho: float, rows: int) -> Callable[[Tensor], Tensor]:
        """The product of (rows, in) with (S H S + rho I)^-1, the cheaper way for `_EVERY` such products."""
        divided = self.vectors / (self.values + rho)
        if rows * _EVERY < len(self.values):
            return lambda x: (x @ divided) @ self.vectors.T
        inverse = divided @ self.vectors.T
        return lambda x: x @ inverse


def spectrum(hessian: Tensor, ridge: float) -> Spectrum:
    """Of H (in, in) + `ridge` I, `ridge` above 0."""
    damped = hessian.float().clone()
    damped.diagonal().add_(ridge)
    scale = damped.diagonal().sqrt()
    damped /= scale
    damped /= scale[:, None]
    values, vectors = torch.linalg.eigh(damped)
    return Spectrum(damped, scale, vectors, values.clamp(min=0))


def alps(
    weight: Tensor,
    spectrum: Spectrum,
    target: Quota,
    carried: Tensor | None = None,
    *,
    steps: int = 300,
    fitting: int = 10,
) -> tuple[Tensor, Tensor]:
    """Prune `weight` (out, in); returns the new values, float32, and the mask, both (out, in).

    Args:
        weight: (out, in).
        spectrum: of the layer's damped H.
        target: how many zeros, or N:M as (N, M).
        carried: the mask the layer already has; False stays exactly zero.
        steps: of ADMM at most.
        fitting: of conjugate gradients on the support.

    >>> alps(torch.tensor([[0.5, -2.0, 3.0, 1.0]]), spectrum(torch.eye(4), 0.01), 2)[0]
    tensor([[ 0., -2.,  3.,  0.]])
    """
    scaled = weight.float() * spectrum.scale
    aim = scaled @ spectrum.scaled  # W H
    sparse, multiplier = scaled.clone(), torch.zeros_like(scaled)
    first = best(scaled.abs(), target, carried)
    rho, support = _FIRST_RHO, first
    inverse = spectrum.inverse(rho, len(weight))
    for step in range(1, steps + 1):
        dense = inverse((aim - multiplier).add_(sparse, alpha=rho))
        torch.add(dense, multiplier, alpha=1 / rho, out=sparse)
        mask = best(sparse.abs(), target, carried)
        sparse.mul_(mask)
        multiplier.add_(dense.sub_(sparse), alpha=rho)
        if step % _EVERY == 0:
            changed = int((mask ^ support).sum()) / max(1, int(mask.sum()))
            support = mask
            if changed == 0:
                break
            rho *= next(factor for share, factor in _GROWTH if changed > share)
            inverse = spectrum.inverse(rho, len(weight))
    found = [(fit(scaled, sparse, mask, spectrum.scaled, fitting), mask)]
    found.append((fit(scaled, scaled, first, spectrum.scaled, fitting), first))
    result, mask = min(found, key=lambda pair: _lost(scaled - pair[0], spectrum))
    return result / spectrum.scale, mask


def _lost(difference: Tensor, spectrum: Spectrum) -> float:
    return float(((difference @ spectrum.scaled) * difference).sum())
