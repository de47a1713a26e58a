"""A few tokens that stand for a whole distribution, without bias.

For p over a vocabulary and k draws, token i is taken with probability pi_i = min(1, p_i / tau) and weighs
p_i / pi_i = max(p_i, tau), where tau makes the pi sum to k (Horvitz & Thompson 1952). So

    E[sum over taken of weight f(token)] = sum_i p_i f(i)         for every f,

whether f is a log-probability or its gradient; likely tokens are always taken and carry no noise, and the
weights sum to 1 exactly. A bare top-k instead is biased for ever: it teaches that the tail does not exist
(Anshumann et al. 2025, "Sparse Logit Sampling", arXiv 2503.16870, who draw with replacement). Taken without
replacement by one uniform number per row (systematic sampling, Madow 1949): the pi are laid end to end, the
k likeliest tokens first and the others as they are numbered, and a token is taken where one of the points u,
u + 1, u + 2, ... falls into its own. tau depends on the k likeliest alone, so nothing is sorted, and a point
among the others is found by the sums of blocks first. Cost: the k largest of each row, two passes over it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_NOTHING = torch.finfo(torch.float64).tiny
_BLOCK = 64  # tokens
_BELOW_ONE = 1 - 2.0**-40  # so that u + k stays below k + 1


def sample(p: Tensor, k: int, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Exactly k distinct tokens per row, all where there are no more, and their weights.

    Args:
        p: (n, v), rows sum to 1.
        k: tokens per row, at least 1.
        uniform: (n,), one number in [0, 1) per row.

    Returns:
        Token ids (n, min(k, v)), int64, and weights of that shape, float32.

    >>> ids, weights = sample(torch.tensor([[0.7, 0.12, 0.1, 0.08]]), 2, torch.tensor([0.5]))
    >>> ids.tolist(), [round(w, 4) for w in weights[0].tolist()]
    ([[0, 2]], [0.7, 0.3])
    """
    k = min(k, p.shape[1])
    values, likely = p.topk(k, sorted=True)
    values = values.double()
    # the others, in blocks of so many tokens: (n, blocks, _BLOCK)
    others = F.pad(p.scatter(1, likely, 0.0), (0, -p.shape[1] % _BLOCK)).unflatten(1, (-1, _BLOCK))
    ends = others.sum(-1).double().cumsum(-1)  # (n, blocks)
    rest = ends[:, -1:]  # (n, 1)
    tau = threshold(values, rest)
    # fewer than k tokens have any probability: all of them, and others that weigh nothing
    inclusion = torch.where(tau > _NOTHING, (values / tau).clamp(max=1.0), torch.ones_like(values))
    bounds = inclusion.cumsum(-1)
    stretch = k / (bounds[:, -1:] + rest / tau)  # what rounding left
    bounds = bounds * stretch
    points = uniform.double().clamp(max=_BELOW_ONE)[:, None] + torch.arange(k, device=p.device)
    # a point on a bound belongs to the next token, and rounding must not lead past the last
    places = torch.searchsorted(bounds, points, right=True)
    among = (places == k) & (rest > 0)
    places = places.clamp(max=k - 1)
    ids, weights = likely.gather(1, places), torch.maximum(values.gather(1, places), tau)
    if among.any():
        found = _others(others, ends, (points - bounds[:, -1:]) * (tau / stretch))
        ids, weights = torch.where(among, found, ids), torch.where(among, tau, weights)
    return ids, (weights / weights.sum(-1, keepdim=True)).float()


def threshold(values: Tensor, rest: Tensor) -> Tensor:
    """tau: the k largest probabilities, falling (n, k), and what the others sum to (n, 1) -> (n, 1), with the
    sum of min(1, p / tau) = k.

    With the m likeliest taken for certain, the rest r_m shares k - m draws: tau = r_m / (k - m), for the
    smallest m whose next token is not likelier than that.
    """
    k = values.shape[1]
    sums = values.flip(-1).cumsum(-1).flip(-1) + rest  # r_m for m = 0 .. k - 1
    candidates = sums / (k - torch.arange(k, device=values.device))
    first = (values <= candidates * (1 + 1e-12)).double().argmax(-1, keepdim=True)
    return candidates.gather(1, first).clamp(min=_NOTHING)


def _others(blocks: Tensor, ends: Tensor, places: Tensor) -> Tensor:
    """The tokens that places on the line of probabilities fall into, (n, k); blocks (n, b, _BLOCK), their
    ends on the line (n, b), places (n, k). A token of no probability is not found if its row has any other.
    """
    whole = torch.nextafter(ends[:, -1:], ends.new_zeros(()))
    places = torch.minimum(places.clamp(min=0), whole).contiguous()
    block = torch.searchsorted(ends, places, right=True).clamp(max=ends.shape[1] - 1)  # (n, k)
    before = F.pad(ends, (1, 0)).gather(1, block)
    row = torch.arange(len(block), device=block.device)[:, None] * ends.shape[1]
    own = blocks.flatten(0, 1).index_select(0, (row + block).flatten())  # whole blocks: faster than a gather
    own = own.double().cumsum(-1).view(*block.shape, _BLOCK)  # (n, k, _BLOCK)
    last = torch.nextafter(own[..., -1], own.new_zeros(()))
    inside = torch.minimum(places - before, last)[..., None].contiguous()
    return block * _BLOCK + torch.searchsorted(own, inside, right=True)[..., 0].clamp(max=_BLOCK - 1)
