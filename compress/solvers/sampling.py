"""A few tokens that stand for a whole distribution, without bias.

For p over a vocabulary and k draws, token i is taken with probability pi_i = min(1, p_i / tau) and weighs
p_i / pi_i = max(p_i, tau), where tau makes the pi sum to k (Horvitz & Thompson 1952). So

    E[sum over taken of weight f(token)] = sum_i p_i f(i)         for every f,

whether f is a log-probability or its gradient; likely tokens are always taken and carry no noise, and the
weights sum to 1 exactly. A bare top-k instead is biased for ever: it teaches that the tail does not exist
(Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870, who draw with replacement). Taken without
replacement by one uniform number per row (systematic sampling, Madow 1949). Cost: a sort of each row.
"""

import torch
from torch import Tensor

_NOTHING = torch.finfo(torch.float64).tiny


def sample(p: Tensor, k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Exactly k distinct tokens per row, all where there are no more, and their weights.

    Args:
        p: (n, v), rows sum to 1.
        k: tokens per row, at least 1.
        uniform: (n,), one number in [0, 1) per row.

    Returns:
        Token ids (n, min(k, v)), int64, and weights of that shape, float32.

    >>> ids, weights = sample(torch.tensor([[0.7, 0.1, 0.1, 0.1]]), 2, torch.tensor([0.5]))
    >>> ids.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[0, 2]], [0.7, 0.3])
    """
    k = min(k, p.shape[1])
    values, order = p.double().sort(dim=-1, descending=True, stable=True)
    tau = threshold(values, k)  # (n, 1)
    likely = torch.arange(p.shape[1], device=p.device) < k
    # fewer than k tokens have any probability: all of them, and others that weigh nothing
    inclusion = torch.where(tau > _NOTHING, (values / tau).clamp(max=1.0), likely.double())
    bounds = inclusion.cumsum(-1)
    bounds = bounds * (k / bounds[:, -1:])  # what rounding left
    points = uniform.double()[:, None] + torch.arange(k, device=p.device)  # (n, k), one per unit of inclusion
    # a point on a bound belongs to the next token, and rounding must not lead past the last
    places = torch.searchsorted(bounds, points.contiguous(), right=True).clamp(max=p.shape[1] - 1)
    weights = torch.maximum(values.gather(1, places), tau)
    return order.gather(1, places), (weights / weights.sum(-1, keepdim=True)).float()


def threshold(values: Tensor, k: int) -> Tensor:
    """tau: (n, v) falling probabilities -> (n, 1), with sum of min(1, p / tau) = k.

    With the m likeliest taken for certain, the rest r_m shares k - m draws: tau = r_m / (k - m), for the
    smallest m whose next token is not likelier than that.
    """
    rest = values.flip(-1).cumsum(-1).flip(-1)  # r_m for m = 0, 1, ...
    certain = torch.arange(k, device=values.device)  # m = 0 .. k - 1
    candidates = rest[:, :k] / (k - certain)
    first = (values[:, :k] <= candidates * (1 + 1e-12)).double().argmax(-1, keepdim=True)
    return candidates.gather(1, first).clamp(min=_NOTHING)
