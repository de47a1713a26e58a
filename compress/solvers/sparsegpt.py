"""SparseGPT: prune column by column, each column's loss made good by those not yet visited.

Minimises  || (W - W^) X ||_F^2  over W^ with a given number of zeros. With U the upper Cholesky factor of
H^-1 (H^-1 = U^T U, H = E[x x^T] + damping), removing w_i and updating the later columns as well as they can
be costs  w_i^2 / U_ii^2.  So, for every block of columns:

    the weights with the least  w_i^2 / U_ii^2  of the block are masked  (N:M: per group, as it is reached);
    for each column i of it:    e = (w_i - m_i w_i) / U_ii;    w_j -= e U_ij   for all j > i.

Masking a block at a time lets the choice see what earlier columns have changed, and lets columns differ.
Every block gets the same share of zeros. Columns are visited in the factor's order: falling H_ii, for N:M by
groups, so that those that matter most have the most others to compensate.

Frantar, Alistarh: SparseGPT (2023), arXiv 2301.00774; equations 3 and 4, algorithm 1 (blocks of 128).
Cost: O(out * in^2) multiplications and in^3 for the factor, which layers with the same input share.
"""

import torch
from torch import Tensor

from compress.solvers.gptq import Factor
from compress.solvers.masks import Quota, best, spread


def sparsegpt(
    weight: Tensor, factor: Factor, target: Quota, carried: Tensor | None = None, block: int = 128
) -> tuple[Tensor, Tensor]:
    """Prune `weight` (out, in); returns the new values, float32, and the mask, both (out, in).

    Args:
        weight: (out, in).
        factor: of the layer's H, from `solvers.gptq.factorise`; for N:M with `together` = M.
        target: how many zeros, or N:M as (N, M).
        carried: the mask the layer already has; False stays exactly zero.
        block: columns that are masked together; for N:M as many whole groups as fit.

    >>> from compress.solvers.gptq import factorise
    >>> sparsegpt(torch.tensor([[0.5, -2.0, 3.0, 1.0]]), factorise(torch.eye(4)), 2)[0]
    tensor([[ 0., -2.,  3.,  0.]])
    """
    order, upper = factor.order, factor.upper
    out, columns = weight.shape
    # (in, out), so that a column of the weight is contiguous
    work = weight.float().T[order].contiguous()
    kept = torch.ones_like(work, dtype=torch.bool) if carried is None else carried.T[order].contiguous()
    if isinstance(target, tuple):
        block = max(target[1], block // target[1] * target[1])
        assert bool((order.view(-1, target[1]).diff(dim=1) == 1).all()), (
            "groups of columns must stay together"
        )
    starts = range(0, columns, block)
    counts = None
    if isinstance(target, int):
        least = torch.stack([(~part).sum() for part in kept.split(block)]).cpu()
        sizes = torch.tensor([out * min(block, columns - start) for start in starts])
        counts = spread(max(target, int(least.sum())), sizes, least).tolist()
    for number, start in enumerate(starts):
        stop = min(start + block, columns)
        part, mask, u = work[start:stop], kept[start:stop], upper[start:stop, start:stop]
        scale = u.diagonal().square()[:, None]
        if counts is not None:
            mask.copy_(best(part.square() / scale, counts[number], mask))
        errors = torch.empty_like(part)
        for i in range(stop - start):
            if isinstance(target, tuple) and i % target[1] == 0:
                group = slice(i, i + target[1])
                scores = (part[group].square() / scale[group]).T
                mask[group] = best(scores, target, mask[group].T).T
            removed = part[i] * ~mask[i]
            torch.div(removed, u[i, i], out=errors[i])
            part[i] -= removed
            if i + 1 < stop - start:
                part[i + 1 :].addr_(u[i, i + 1 :], errors[i], alpha=-1)
        if stop < columns:
            work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    values, mask = torch.empty_like(work), torch.empty_like(kept)
    values[order], mask[order] = work, kept
    return (values.T * mask.T).contiguous(), mask.T.contiguous()
