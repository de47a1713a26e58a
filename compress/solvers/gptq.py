"""GPTQ: round a weight matrix column by column, each column's error made good by those not yet rounded.

Minimises  || (W - W^) X ||_F^2  over W^ on a grid, X (in, n) the layer's inputs. With H = E[x x^T] + damping
and U the upper Cholesky factor of H^-1 (H^-1 = U^T U), for each column i:

    q = round(w_i);   e = (w_i - q) / U_ii;   w_j -= e U_ij   for all j > i.

Columns are taken in the order of falling H_ii, so that the ones that matter most are rounded while the
most columns are left to compensate. The grid is fixed beforehand ("static groups"): fitting it inside the
loop, from columns that have already moved, is a known mistake.

Frantar, Ashkboos, Hoefler, Alistarh: GPTQ (2022), arXiv 2210.17323; equations 2 and 3, lazy batches in
section 3.3. Cost: O(out * in^2) multiplications and in^3 for the factor; memory one extra copy of W.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError

_TRIES = 4
_PANEL = 256
_ROWS = 512


@dataclass(frozen=True)
class Factor:
    """U with H^-1 = U^T U for the permuted H, the permutation, and the damping that was needed."""

    upper: Tensor
    order: Tensor
    damping: float  # relative to the mean diagonal
    ridge: float  # what that comes to

    @contextmanager
    def damped(self, hessian: Tensor) -> Iterator[Tensor]:
        """H with what was added to it, in H's own memory; afterwards it is as it was."""
        diagonal = hessian.diagonal().clone()
        hessian.diagonal().add_(self.ridge)
        try:
            yield hessian
        finally:
            hessian.diagonal().copy_(diagonal)

    def divide(self, rows: Tensor) -> Tensor:
        """rows (n, in) times the damped H^-1, float32 (n, in)."""
        result = torch.empty_like(rows, dtype=torch.float32)
        for part, divided in zip(rows.split(_ROWS), result.split(_ROWS), strict=True):
            divided[:, self.order] = (part.float()[:, self.order] @ self.upper.T) @ self.upper
        return result


def factorise(hessian: Tensor, damping: float = 0.01, together: int = 1) -> Factor:
    """Order the columns of H (in, in) by falling diagonal and factorise its damped inverse.

    So many neighbours, `together`, stay together, ordered by their mean; fewer, left at the end, come last.
    `damping` is relative to the mean diagonal. Should the factorisation fail, the damping is raised tenfold,
    up to three times; the caller can see that in the result. Columns that never see an input (H_ii = 0)
    have the damping alone: their weights are rounded plainly, and cost little to remove.

    Raises:
        UserError: the matrix holds values that are not finite, or cannot be factorised at all.
    """
    if not _finite(hessian):
        raise UserError("calibration gave values that are not finite; is the checkpoint sound?")
    diagonal = hessian.diagonal().double()
    short = -len(diagonal) % together
    filled = torch.nn.functional.pad(diagonal, (0, short), value=-torch.inf).view(-1, together)
    groups = torch.argsort(filled.mean(1), descending=True, stable=True)
    order = (groups[:, None] * together + torch.arange(together, device=groups.device)).flatten()
    order = order[: len(diagonal)]
    seen = diagonal[diagonal > 0]
    mean = seen.mean() if len(seen) else diagonal.new_ones(())
    backwards = order.flip(0)
    for _ in range(_TRIES):
        # with J the reversal, J H J = L L^T gives H = R R^T, R = J L J upper, and so H^-1 = U^T U with
        # U = R^-1 = J L^-1 J: half the work of inverting H and factorising the inverse
        lower = torch.empty_like(hessian, dtype=torch.float64)
        for rows, wanted in zip(lower.split(_PANEL), backwards.split(_PANEL), strict=True):
            rows.copy_(hessian[wanted][:, backwards])
        lower.diagonal().add_(damping * mean)
        if _cholesky_(lower):
            upper = _reversed_inverse(lower)
            del lower
            if _finite(upper):
                return Factor(upper, order, damping, float(damping * mean))
        damping *= 10
    raise UserError("the calibration statistics cannot be factorised; use more calibration windows")


def _finite(matrix: Tensor) -> bool:
    """Whether all elements are, by panels, since the library's function copies what it looks at."""
    return all(bool(torch.isfinite(rows).all()) for rows in matrix.split(_PANEL))


def _cholesky_(matrix: Tensor) -> bool:
    """L of a symmetric matrix, float64 (n, n), into its own lower triangle; False if it is not positive.

    By panels: the library's function needs a second matrix, and a wide layer's is larger than its weight.
    """
    n = len(matrix)
    for start in range(0, n, _PANEL):
        stop = min(start + _PANEL, n)
        corner, failed = torch.linalg.cholesky_ex(matrix[start:stop, start:stop])
        if failed:
            return False
        matrix[start:stop, start:stop] = corner
        below = torch.linalg.solve_triangular(corner.T, matrix[stop:, start:stop], upper=True, left=False)
        matrix[stop:, start:stop] = below
        for left in range(stop, n, _PANEL):
            right = min(left + _PANEL, n)
            tail = below[left - stop :]
            matrix[left:, left:right].addmm_(tail, tail[: right - left].T, alpha=-1)
    return True


def _reversed_inverse(lower: Tensor) -> Tensor:
    """J L^-1 J of a lower triangle L, float64 (n, n) -> upper, float32.

    By forward substitution, a panel of columns at a time, so that no second matrix in float64 is needed.
    """
    n = len(lower)
    result = torch.zeros(n, n, dtype=torch.float32, device=lower.device)
    panels = [(start, min(start + _PANEL, n)) for start in range(0, n, _PANEL)]
    for first, (left, right) in enumerate(panels):
        columns = lower.new_zeros(n - left, right - left)  # the inverse is lower, too: from row `left` on
        for start, stop in panels[first:]:
            here = slice(start - left, stop - left)
            if start == left:
                columns[here].fill_diagonal_(1.0)
            else:
                columns[here] = lower[start:stop, left:start] @ columns[: start - left].neg()
            triangle = lower[start:stop, start:stop]
            columns[here] = torch.linalg.solve_triangular(triangle, columns[here], upper=False)
        result[: n - left, n - right : n - left] = columns.flip(0, 1)
    return result


def gptq(
    weight: Tensor,
    factor: Factor,
    round_column: Callable[[Tensor, int], Tensor],
    mask: Tensor | None = None,
    block: int = 32,
) -> Tensor:
    """Round `weight` (out, in) on the grid of `round_column`; returns the values (out, in), all on the grid.

    Args:
        weight: float32 (out, in).
        factor: of the layer's H, from `factorise`.
        round_column: (column (out,), its index) -> the nearest values on the grid.
        mask: bool (out, in); False stays exactly zero, and the error of removing it is compensated too.
        block: columns per lazy batch.

    >>> diagonal = factorise(torch.eye(4))
    >>> gptq(torch.tensor([[0.4, 0.6, 1.2, -0.7]]), diagonal, lambda column, index: column.round())
    tensor([[ 0.,  1.,  1., -1.]])
    """
    order, upper = factor.order, factor.upper
    columns = weight.shape[1]
    # (in, out), so that a column of the weight is contiguous
    work = weight.float().T[order].contiguous()
    kept = None if mask is None else mask.T[order].contiguous()
    indices = order.tolist()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        part = work[start:stop]  # (block, out), in place: first what is to be rounded, then the values
        errors = torch.empty_like(part)
        u = upper[start:stop, start:stop]
        scaled = (1.0 / u.diagonal()).tolist()
        for i, (value, error, row) in enumerate(zip(part, errors, u, strict=True)):
            rounded = round_column(value, indices[start + i])
            if kept is not None:
                rounded = rounded * kept[start + i]
            torch.sub(value, rounded, out=error).mul_(scaled[i])
            value.copy_(rounded)
            if i + 1 < stop - start:
                part[i + 1 :].addr_(row[i + 1 :], error, alpha=-1)
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    values = torch.empty_like(work)
    values[order] = work
    del work
    return values.T.contiguous()


def output_error(weight: Tensor, rounded: Tensor, hessian: Tensor) -> float:
    """Relative squared error of the layer's output: tr(D H D^T) / tr(W H W^T), D = W - W^."""
    h = hessian.float()
    lost = whole = 0.0
    for before, after in zip(weight.split(_ROWS), rounded.split(_ROWS), strict=True):
        old = before.float()
        difference = old - after
        lost += float(((difference @ h) * difference).sum())
        whole += float(((old @ h) * old).sum())
    return lost / max(whole, 1e-30)
