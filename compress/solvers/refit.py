"""Refit the scales of a quantized weight with its codes frozen, then the codes with the scales frozen.

Both steps lower the same error of the layer's output, the one that GPTQ treats greedily:

    E(W^) = tr((W - W^) H (W - W^)^T),        H = E[x x^T],  W^ = one row after another  A s,

where A (in, groups) holds the steps (code less zero-point) of a row, each in the column of its group.

    scales:  s = argmin (w - A s)^T H (w - A s) = (A^T H A)^-1 A^T H w, a small system per row;
    codes:   for one column after another, all others fixed, E is a parabola in w^_j with its minimum at
             w^_j + [(W - W^) H]_j / H_jj; its nearest value on the grid is the best one.

GPTQ rounds a column once and only later columns make good its error; coordinate descent comes back to it.
Scales are rounded to what the format stores before any code is chosen with them, a row keeps its old
scales where the rounded new ones are no better, and so no step raises E.

Both need the rows of (W - W^) H; each leaves them behind for the next.

The cyclic descent over columns is QuantEase's (Behdin et al. 2023, arXiv 2309.01885); that scales of
frozen codes are a least-squares problem is classical. Cost per round: about 2.5 out * in^2 multiplications;
memory four copies of W and one of H.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of a slice's normal equations: 8 MB in float64, of which there are several copies.
_SLICE = 1 << 20
_RIDGE = 1e-7

RoundColumn = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True)
class Fit:
    """A weight on its grid, and what it lacks.

    Attributes:
        values: W^, on the grid of `scales`, float32 (out, in).
        scales: (out, groups), none of them zero.
        lost: (W - W^) H, half the falling slope of E, float32 (out, in).
    """

    values: Tensor
    scales: Tensor
    lost: Tensor

    @classmethod
    def of(cls, target: Tensor, values: Tensor, scales: Tensor, hessian: Tensor) -> "Fit":
        """That of `values` (out, in), which stand for `target` (out, in), under H (in, in)."""
        return cls(values, scales, (target.float() - values) @ hessian.float())


def refine(
    target: Tensor,
    values: Tensor,
    scales: Tensor,
    hessian: Tensor,
    width: int,
    rounder: Callable[[Tensor], RoundColumn],
    exact: Callable[[Tensor], Tensor],
    mask: Tensor | None = None,
    rounds: int = 2,
) -> tuple[Tensor, Tensor]:
    """Alternate both steps; the codes come last, so that the values are on the grid of the scales.

    Args:
        target: what the values stand for, float32 (out, in).
        values: on the grid of `scales`, float32 (out, in), as from `gptq`.
        scales: (out, groups), none of them zero.
        hessian: H (in, in).
        width: columns per group; the last group may be shorter.
        rounder: scales -> (column (out,), its index) -> the nearest values on their grid.
        exact: rounds scales to those that can be stored.
        mask: bool (out, in); False is zero in `values` and stays zero.
        rounds: how often to alternate.

    Returns:
        (values (out, in), scales (out, groups)), of an error that is not larger.
    """
    if not rounds:
        return values, scales
    fit = Fit.of(target, values, scales, hessian)
    for _ in range(rounds):
        fit = refit_scales(fit, hessian, width, exact)
        fit = coordinate_descent(fit, hessian, rounder(fit.scales), mask)
    return fit.values, fit.scales


def refit_scales(
    fit: Fit,
    hessian: Tensor,
    width: int,
    exact: Callable[[Tensor], Tensor] = lambda scales: scales,
) -> Fit:
    """The least-squares scales for frozen codes, row by row not worse; arguments as in `refine`.

    A group whose codes are all at the zero-point keeps its scale.

    >>> w, codes, h = torch.tensor([[2.0, 4.0, 9.0]]), torch.tensor([[1.0, 2.0, 3.0]]), torch.eye(3)
    >>> fit = refit_scales(Fit.of(w, codes, torch.ones(1, 2), h), h, width=2)
    >>> fit.values.round(decimals=4).tolist(), fit.scales.round(decimals=4).tolist()
    ([[2.0, 4.0, 9.0]], [[2.0, 3.0]])
    """
    groups = fit.scales.shape[1]
    of_column = torch.arange(fit.values.shape[1], device=fit.values.device) // width
    h = hessian.float()
    new = Fit(torch.empty_like(fit.values), torch.empty_like(fit.scales), fit.lost.clone())
    together = max(1, _SLICE // groups**2)
    for start in range(0, len(fit.values), together):
        rows = slice(start, start + together)
        old, scales = fit.values[rows], fit.scales[rows]
        steps = old / scales[:, of_column]  # A, each row's nonzero entries
        normal, falling = _normal(steps, h, width, groups), _by_group(steps * fit.lost[rows], width, groups)
        fitted = exact(scales + _solve(normal, falling).float())
        move = (fitted - scales).double()
        # E(s + m) - E(s) = m^T A^T H A m - 2 m^T A^T H (w - A s); a row that does not fall stays
        rises = ((normal @ move[..., None])[..., 0] * move).sum(1) >= 2 * (falling * move).sum(1)
        fitted[rises] = scales[rises]
        values = torch.where(rises[:, None], old, steps.mul_(fitted[:, of_column]))
        new.scales[rows], new.values[rows] = fitted, values
        new.lost[rows] -= values.sub_(old) @ h
    return new


def coordinate_descent(
    fit: Fit,
    hessian: Tensor,
    round_column: RoundColumn,
    mask: Tensor | None = None,
    sweeps: int = 1,
    block: int = 16,
) -> Fit:
    """Choose each column's codes again, given all others, on the grid of `round_column`; scales stay.

    Columns are taken by falling H_ii, as in `gptq`; those that never see an input stay as they are.

    >>> h, w = torch.tensor([[1.0, 0.9], [0.9, 1.0]]), torch.tensor([[0.48, 0.48]])
    >>> fit = Fit.of(w, w.round(), torch.ones(1, 1), h)
    >>> coordinate_descent(fit, h, lambda column, index: column.round()).values
    tensor([[1., 0.]])
    """
    diagonal = hessian.diagonal()
    order = torch.argsort(diagonal, descending=True, stable=True)
    h = hessian.float()
    # (in, out), so that a column of the weight is contiguous
    work = fit.values.float().T[order].contiguous()
    lost = fit.lost.T[order].contiguous()
    kept = None if mask is None else mask.T[order].contiguous()
    indices, alive = order.tolist(), int((diagonal > 0).sum())
    inverse = (1.0 / diagonal[order].float()).tolist()
    for _ in range(sweeps):
        for start in range(0, alive, block):
            stop = min(start + block, alive)
            around = h[order[start:stop]][:, order]  # these columns' rows of H (block, in), in this order
            inner = around[:, start:stop]
            part = lost[start:stop].clone()  # (block, out), kept up to date inside the block
            changes = torch.empty_like(part)
            rows = zip(work[start:stop], part, changes, inner, strict=True)
            for i, (value, falling, change, row) in enumerate(rows):
                at = start + i
                best = round_column(torch.add(value, falling, alpha=inverse[at]), indices[at])
                if kept is not None:
                    best = best * kept[at]
                torch.sub(best, value, out=change)
                value.copy_(best)
                if at + 1 < stop:
                    part[i + 1 :].addr_(row[i + 1 :], change, alpha=-1)
            lost.addmm_(around.T, changes, alpha=-1)
    return Fit(_in_order(work, order), fit.scales, _in_order(lost, order))


def _in_order(permuted: Tensor, order: Tensor) -> Tensor:
    """(in, out) with its rows in `order` -> (out, in)."""
    result = torch.empty_like(permuted)
    result[order] = permuted
    return result.T.contiguous()


def _normal(steps: Tensor, h: Tensor, width: int, groups: int) -> Tensor:
    """A^T H A of every row: steps (rows, in) -> (rows, groups, groups), float64."""
    matrix = steps.new_zeros(len(steps), groups, groups, dtype=torch.float64)
    for g in range(groups):
        left, right = g * width, min((g + 1) * width, steps.shape[1])
        # symmetric, so only what lies left of the group's end
        product = (steps[:, left:right] @ h[left:right, :right]) * steps[:, :right]
        matrix[:, g, : g + 1] = _by_group(product, width, g + 1)
    return matrix + matrix.tril(-1).transpose(1, 2)


def _by_group(products: Tensor, width: int, groups: int) -> Tensor:
    """Sums over each group's columns: (rows, in) -> (rows, groups), float64."""
    padding = groups * width - products.shape[1]
    padded = torch.nn.functional.pad(products, (0, padding))
    return padded.view(len(products), groups, width).sum(2).double()


def _solve(normal: Tensor, right: Tensor) -> Tensor:
    """The small systems (rows, groups, groups), (rows, groups) -> (rows, groups).

    A ridge relative to each diagonal entry keeps them positive; a row it does not help stays unmoved.
    """
    diagonal = normal.diagonal(dim1=1, dim2=2)
    ridge = _RIDGE * diagonal + (diagonal <= 0).double()
    lower, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))
    sound = (failed == 0)[:, None]
    unit = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device)
    lower = torch.where(sound[..., None], lower, unit)
    return torch.where(sound, torch.cholesky_solve(right[..., None], lower)[..., 0], 0.0)
