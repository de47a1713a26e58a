"""Wanda: prune by the size of a weight times the size of its input; nothing else changes.

    s_ij = |W_ij| ||x_j||_2,        the smallest s_ij of every output row i go.

For a single weight removed alone, s_ij^2 is exactly the squared change of the layer's output on the
calibration text. Comparing inside a row keeps every output equally connected, which the paper finds to
matter for language models. ||x_j||_2 enters only by its ratio to the others, so the root mean square
sqrt(H_jj), H = E[x x^T], serves as well.

Sun, Liu, Bair, Kolter: A Simple and Effective Pruning Approach for Large Language Models (2023),
arXiv 2306.11695; equation 1. Cost: a sort per row.
"""

from torch import Tensor

from compress.solvers.masks import Quota, best_per_row


def scores(weight: Tensor, squared_norms: Tensor) -> Tensor:
    """|W_ij| ||x_j||, (out, in), from a weight (out, in) and the inputs' squared norms (in,)."""
    return weight.float().abs() * squared_norms.float().clamp(min=0).sqrt()


def wanda(weight: Tensor, squared_norms: Tensor, target: Quota, carried: Tensor | None = None) -> Tensor:
    """The mask, bool (out, in).

    Args:
        weight: (out, in).
        squared_norms: ||x_j||^2 of the inputs, or their mean squares, (in,).
        target: how many zeros, or N:M as (N, M).
        carried: the mask the layer already has; False stays False.

    >>> import torch
    >>> wanda(torch.tensor([[1.0, -2.0], [3.0, 1.0]]), torch.tensor([9.0, 1.0]), 2).tolist()
    [[True, False], [True, False]]
    """
    return best_per_row(scores(weight, squared_norms), target, carried)
