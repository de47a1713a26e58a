"""Inputs of a linear layer taken away, and its other weights refitted to what the layer gave with them.

With S the inputs that stay, P those that go, x the original inputs and x~ those of the compressed model,

    W' = argmin_V  E || W x + e (r - r~) - V x~_S ||^2 + l || V - W_S ||^2
       = W_S + (W_P H_PS + e A_S) (H_SS + l I)^-1,     H = E[x~ x~^T],   A = W D + R

(solvers/asymmetric.py has A; without it, e = 0, the layer imitates itself on the inputs it now gets). With
l = 0 that is W E[x x_S^T] (E[x_S x_S^T])^-1; the ridge holds on to the old weights. Where a mask forbids
weights, the same error is lowered over those that are allowed, by conjugate gradients.

Which inputs go is the other half of the same problem. Taking away the columns C of a unit, with the rest
refitted, adds

    tr( W_C [H^-1]_CC^-1 W_C^T )

to the error; after it W and H^-1 are those without C, so that of two units which do the same, one stays. The
cheapest goes first, one after the other; of many, a batch of candidates at a time.

Optimal brain surgeon (Hassibi, Stork 1993), for structures ZipLM (Kurtic et al. 2023, arXiv 2302.04089),
equations 2 to 4; lazy batches as in GPTQ. Cost: in^3 for the inverse, out * in per column that goes.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from compress.errors import UserError

_LIKELY = 4  # candidates looked at per unit that a batch takes away
_TRIES = 4
_SMALLEST = 1e-12


def refit(
    weight: Tensor,
    kept: Tensor,
    hessian: Tensor,
    aim: Tensor | None = None,
    damping: float = 0.01,
    mask: Tensor | None = None,
) -> Tensor:
    """The weights of the kept inputs, float32 (out, kept).

    Args:
        weight: W (out, in).
        kept: indices of S, ascending.
        hessian: H (in, in).
        aim: e A (out, in), the share of the asymmetric target that is wanted; None: imitate W.
        damping: l, relative to the mean diagonal of H.
        mask: bool (out, kept); False is and stays zero.

    Raises:
        UserError: statistics that are not finite.

    >>> twins = torch.ones(2, 2)  # two inputs that are always equal
    >>> refit(torch.tensor([[1.0, 2.0]]), torch.tensor([0]), twins, damping=1e-6).round(decimals=3)
    tensor([[3.]])
    """
    w, h = weight.double(), hessian.double()
    gone = torch.ones(w.shape[1], dtype=torch.bool, device=w.device)
    gone[kept] = False
    right = w[:, gone] @ h[gone][:, kept]
    if aim is not None:
        right += aim.double()[:, kept]
    inner = h[kept][:, kept]
    inner.diagonal().add_(_ridge(h, damping))
    start = w[:, kept]
    if mask is None:
        step = torch.cholesky_solve(right.T, _cholesky(inner)).T
        return (start + step).float()
    return (start + _conjugate_gradients(right, inner, mask)).float() * mask


def removal_order(
    weight: Tensor, units: Tensor, hessian: Tensor, count: int, damping: float = 0.01, batch: int = 1
) -> Tensor:
    """Which `count` units to take away, the cheapest first, the others refitted after each.

    Args:
        weight: W (out, in).
        units: the columns of each, int64 (units, width).
        hessian: H (in, in).
        count: fewer than there are units.
        damping: as in `refit`.
        batch: units taken between two updates of everything; their effect on each other is exact.

    >>> w, h = torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3)
    >>> removal_order(w, torch.arange(3)[:, None], h, 2).tolist()
    [1, 2]
    """
    w = weight.double().clone()
    h = hessian.double().clone()
    h.diagonal().add_(_ridge(h, damping))
    inverse = torch.cholesky_inverse(_cholesky(h))
    alive = torch.ones(len(units), dtype=torch.bool, device=w.device)
    gone: list[int] = []
    while len(gone) < count:
        now = min(batch, count - len(gone))
        left = alive.nonzero()[:, 0]
        costs = _costs(w, inverse, units[left])
        likely = left[costs.argsort(stable=True)[: now * _LIKELY if batch > 1 else 1]]
        taken = likely if batch == 1 else likely[_among(w, inverse, units[likely], now)]
        _eliminate(w, inverse, units[taken].flatten())
        alive[taken] = False
        gone += taken.tolist()
    return torch.tensor(gone, dtype=torch.long)


def shared_removal_order(
    weights: Sequence[Tensor],
    units: Tensor,
    hessians: Sequence[Tensor],
    count: int,
    damping: float = 0.01,
) -> Tensor:
    """Which `count` units several layers are to lose alike, the cheapest for all of them together first.

    What each layer loses adds up, as `removal_order` has it for one.

    Args:
        weights: W (out, in) of each layer.
        units: the columns of each unit, the same in every layer, int64 (units, width).
        hessians: H (in, in) of each layer's inputs.
        count: fewer than there are units.
        damping: as in `refit`.

    >>> w, h = torch.tensor([[3.0, 1.0, 2.0]]), torch.eye(3)
    >>> shared_removal_order([w, w.flip(1)], torch.arange(3)[:, None], [h, h], 1).tolist()
    [1]
    """
    state = []
    for weight, hessian in zip(weights, hessians, strict=True):
        h = hessian.double().clone()
        h.diagonal().add_(_ridge(h, damping))
        state.append((weight.double().clone(), torch.cholesky_inverse(_cholesky(h))))
    gone: list[int] = []
    while len(gone) < count:
        left = torch.tensor([unit for unit in range(len(units)) if unit not in gone], device=units.device)
        costs = sum(_costs(w, inverse, units[left]) for w, inverse in state)
        assert isinstance(costs, Tensor)
        taken = int(left[costs.argmin()])
        for w, inverse in state:
            _eliminate(w, inverse, units[taken])
        gone.append(taken)
    return torch.tensor(gone, dtype=torch.long)


def _among(w: Tensor, inverse: Tensor, units: Tensor, count: int) -> Tensor:
    """The removal order within a few units, in their own small problem; positions (count,)."""
    columns = units.flatten()
    own = w[:, columns]
    inner = inverse[columns][:, columns]
    small = torch.arange(len(columns), device=w.device).view(units.shape)
    alive = torch.ones(len(units), dtype=torch.bool, device=w.device)
    order = []
    for _ in range(count):
        left = alive.nonzero()[:, 0]
        best = left[_costs(own, inner, small[left]).argmin()]
        _eliminate(own, inner, small[best])
        alive[best] = False
        order.append(best)
    return torch.stack(order)


def _costs(w: Tensor, inverse: Tensor, units: Tensor) -> Tensor:
    """tr(W_C [H^-1]_CC^-1 W_C^T) of every unit, (units,)."""
    if units.shape[1] == 1:
        column = units[:, 0]
        return w[:, column].square().sum(0) / inverse.diagonal()[column].clamp(min=_SMALLEST)
    # one by one: torch's batched solve fails on wide ones with several threads (its issue 142815)
    own = [(w[:, columns].T, inverse[columns][:, columns]) for columns in units]
    return torch.stack([(weights * torch.linalg.solve(corner, weights)).sum() for weights, corner in own])


def _eliminate(w: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Make W and H^-1 those without some columns, in place; what belonged to them becomes zero."""
    corner = inverse[columns][:, columns]
    corner.diagonal().add_(_SMALLEST)
    rows = inverse[columns]
    factor = torch.linalg.solve(corner, rows)  # (columns, in)
    w.addmm_(w[:, columns], factor, alpha=-1)
    inverse.addmm_(rows.T, factor, alpha=-1)
    w[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0
    inverse.diagonal()[columns] = 1


def _ridge(hessian: Tensor, damping: float) -> float:
    mean = float(hessian.diagonal().mean())
    return damping * mean if mean > 0 else 1.0


def _cholesky(matrix: Tensor) -> Tensor:
    """The lower factor; the ridge is raised where rounding has made the matrix indefinite."""
    if not torch.isfinite(matrix).all():
        raise UserError("pruning: calibration gave values that are not finite; is the checkpoint sound?")
    more = 1e-8 * float(matrix.diagonal().mean())
    for _ in range(_TRIES):
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if not failed:
            return lower
        matrix = matrix.clone()
        matrix.diagonal().add_(more)
        more *= 100
    raise UserError("pruning: the calibration statistics cannot be factorised; use more calibration windows")


def _conjugate_gradients(right: Tensor, inner: Tensor, mask: Tensor, steps: int = 50) -> Tensor:
    """X with X inner = right where the mask allows weights, zero elsewhere; every row on its own."""
    scale = 1 / inner.diagonal()
    x = torch.zeros_like(right)
    residual = right * mask
    direction = residual * scale
    energy = (residual * direction).sum(1, keepdim=True)
    for _ in range(steps):
        image = (direction @ inner) * mask
        length = energy / (direction * image).sum(1, keepdim=True).clamp(min=1e-300)
        x += length * direction
        residual -= length * image
        scaled = residual * scale
        fresh = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + fresh / energy.clamp(min=1e-300) * direction
        energy = fresh
    return x
