"""Masks: which weights stay. True is kept; the number removed is exact, ties and all."""

import torch
from torch import Tensor


def smallest(scores: Tensor, count: int) -> Tensor:
    """A mask, shaped as `scores`, that removes exactly the `count` smallest; of equal ones the first go.

    >>> smallest(torch.tensor([1.0, 1.0, 1.0, 5.0]), 2).tolist()
    [False, False, True, True]
    """
    mask = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    order = torch.argsort(scores.flatten(), stable=True)
    mask[order[:count]] = False
    return mask.view_as(scores)


def smallest_per_row(scores: Tensor, count: int) -> Tensor:
    """Remove exactly `count` of every row of `scores` (rows, columns)."""
    order = torch.argsort(scores, dim=1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool)
    return mask.scatter_(1, order[:, :count], False)


def pattern(scores: Tensor, kept: int, of: int) -> Tensor:
    """N:M sparsity: keep the `kept` largest of every `of` neighbours in a row; columns divide by `of`."""
    rows, columns = scores.shape
    mask = smallest_per_row(scores.reshape(-1, of), of - kept)
    return mask.view(rows, columns)
