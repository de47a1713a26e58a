"""Masks: which weights stay. True is kept; the number removed is exact, ties and all.

A quota is a count of zeros in a matrix (out, in), or a pattern (N, M): at most N of every M neighbours in
a row stay. A mask that is already carried counts towards the quota: what it removed goes first, and stays.
"""

import torch
from torch import Tensor

from compress.errors import UserError

Quota = int | tuple[int, int]


def smallest(scores: Tensor, count: int) -> Tensor:
    """A mask, shaped as `scores`, that removes exactly the `count` smallest; of equal ones the first go.

    >>> smallest(torch.tensor([1.0, 1.0, 1.0, 5.0]), 2).tolist()
    [False, False, True, True]
    """
    if count == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = _numbers(scores).flatten()
    last = flat.kthvalue(count).values  # selecting is much faster than sorting
    mask = flat > last
    equal = torch.nonzero(flat == last).flatten()
    mask[equal[count - int((flat < last).sum()) :]] = True
    return mask.view_as(scores)


def smallest_per_row(scores: Tensor, count: int | Tensor) -> Tensor:
    """Remove exactly `count` of every row of `scores` (rows, columns); a tensor (rows,) says it per row."""
    order = torch.argsort(_numbers(scores), dim=1, stable=True)
    if isinstance(count, int):
        mask = torch.ones_like(scores, dtype=torch.bool)
        return mask.scatter_(1, order[:, :count], False)
    places = torch.arange(scores.shape[1], device=scores.device)
    keeps = places >= count.to(scores.device)[:, None]  # of the places in the order of scores
    return torch.empty_like(keeps).scatter_(1, order, keeps)


def pattern(scores: Tensor, kept: int, of: int) -> Tensor:
    """N:M sparsity: keep the `kept` largest of every `of` neighbours in a row; columns divide by `of`."""
    rows, columns = scores.shape
    mask = smallest_per_row(scores.reshape(-1, of), of - kept)
    return mask.view(rows, columns)


def best(scores: Tensor, target: Quota, carried: Tensor | None = None) -> Tensor:
    """The mask of the largest scores, compared over the whole matrix; scores are not negative.

    Exactly `target` are removed, or as many as `carried` removes if that is more.

    >>> best(torch.tensor([[3.0, 1.0], [2.0, 4.0]]), 2, torch.tensor([[True, True], [True, False]])).tolist()
    [[True, False], [True, False]]
    """
    scores, removed = _after(scores, carried)
    mask = pattern(scores, *target) if isinstance(target, tuple) else smallest(scores, max(target, removed))
    return mask if carried is None else mask & carried


def best_per_row(scores: Tensor, target: Quota, carried: Tensor | None = None) -> Tensor:
    """As `best`, with scores compared inside a row, and rows as equally sparse as they can be."""
    if isinstance(target, tuple):
        return best(scores, target, carried)
    rows, columns = scores.shape
    scores, removed = _after(scores, carried)
    least = torch.zeros(rows, dtype=torch.long) if carried is None else (~carried).sum(1).cpu()
    counts = spread(max(target, removed), torch.full((rows,), columns), least)
    mask = smallest_per_row(scores, counts)
    return mask if carried is None else mask & carried


def spread(count: int, sizes: Tensor, least: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
    """Share `count` out among parts of some `sizes` as evenly as integers allow: int64, one per part.

    Part i gets (shares_i + q) size_i, but at least least_i and at most size_i, for the q at which they sum to
    `count`, rounded by largest remainder. Without `shares` all are alike.

    >>> spread(7, torch.tensor([4, 4, 8]), torch.tensor([3, 0, 0])).tolist()
    [3, 1, 3]
    >>> spread(8, torch.tensor([8, 8]), shares=torch.tensor([0.6, 0.2])).tolist()
    [6, 2]
    """
    least = torch.zeros_like(sizes) if least is None else least
    assert int(least.sum()) <= count <= int(sizes.sum())
    shares = torch.zeros(len(sizes)) if shares is None else shares
    whole = sizes.double()

    def parts(q: float) -> Tensor:
        return ((shares.double() + q) * whole).maximum(least.double()).minimum(whole)

    low, high = -float(shares.max()), 1.0 - float(shares.min())
    for _ in range(60):
        q = (low + high) / 2
        low, high = (q, high) if float(parts(q).sum()) < count else (low, q)
    return largest_remainder(parts(high), count, sizes)


def largest_remainder(wanted: Tensor, count: int, limits: Tensor) -> Tensor:
    """Integers next to `wanted`, float64 (n,) and not above `limits`, that sum to `count`; ties: the first.

    >>> largest_remainder(torch.tensor([1.5, 2.5, 3.0]), 7, torch.tensor([9, 9, 9])).tolist()
    [2, 2, 3]
    """
    result = (wanted + 1e-6).floor().long().minimum(limits)
    while missing := count - int(result.sum()):
        room = (limits > result) if missing > 0 else (result > 0)
        ranks = (wanted - result).masked_fill(~room, -torch.inf if missing > 0 else torch.inf)
        chosen = torch.argsort(ranks, descending=missing > 0, stable=True)[
            : min(abs(missing), int(room.sum()))
        ]
        result[chosen] += 1 if missing > 0 else -1
    return result


def _numbers(scores: Tensor) -> Tensor:
    """The scores; NaN has no rank, and would make the number removed another than was asked for.

    It comes of a weight of 0 times an activation beyond float32.
    """
    if scores.numel() and bool(scores.max().isnan()):
        raise UserError("pruning: scores that are not numbers (NaN); is the checkpoint sound?")
    return scores


def _after(scores: Tensor, carried: Tensor | None) -> tuple[Tensor, int]:
    """Scores in which what is removed already comes first, and how much that is."""
    if carried is None:
        return scores, 0
    return scores.masked_fill(~carried, -1.0), int((~carried).sum())
