"""Sparsity that grows while a model trains.

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (T - t_0))^3          for t_0 <= t <= T

Zhu & Gupta 2017, "To prune, or not to prune", arXiv 1710.01878, eq. 1: fast at first, while weights are
redundant, and ever slower. What is gone stays gone: a mask only shrinks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from compress.solvers import masks


def sparsity_at(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """s_t; `initial` before `begin`, `final` from `end` on.

    >>> [round(sparsity_at(t, 0, 4, 0.0, 0.8), 3) for t in range(6)]
    [0.0, 0.463, 0.7, 0.788, 0.8, 0.8]
    """
    if step >= end:
        return final
    if step <= begin:
        return initial
    return final + (initial - final) * (1 - (step - begin) / (end - begin)) ** 3


def shrink_each(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks that remove round(share * size) of each matrix, the smallest scores first.

    Args:
        scores: name -> (out, in), not negative.
        kept: name -> mask so far; what it drops stays dropped, also where that is more.
        share: of each matrix.
    """
    return {n: masks.smallest(s, _count(kept[n], share)) for n, s in _after(scores, kept).items()}


def shrink_all(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """As `shrink_each`, with one threshold for all matrices together."""
    marked = _after(scores, kept)
    flat = torch.cat([s.flatten() for s in marked.values()])
    mask = masks.smallest(flat, _count(torch.cat([kept[n].flatten() for n in marked]), share))
    parts = mask.split([s.numel() for s in marked.values()])
    return {n: part.view_as(s) for (n, s), part in zip(marked.items(), parts, strict=True)}


def shrink_to_pattern(
    scores: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float, stay: int, of: int
) -> dict[str, Tensor]:
    """Masks on the way to N:M sparsity: of what the pattern would remove, the smallest `share`; 1: all."""
    result = {}
    for name, marked in _after(scores, kept).items():
        leaving = ~masks.pattern(marked, stay, of)
        count = round(share * int(leaving.sum()))
        # groups that had lost more than the pattern asks for do not get it back
        result[name] = masks.smallest(torch.where(leaving, marked, torch.inf), count) & kept[name]
    return result


def _after(scores: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What is gone counts as smaller than anything that is left."""
    return {name: torch.where(kept[name], s.float(), -1.0) for name, s in scores.items()}


def _count(kept: Tensor, share: float) -> int:
    return max(round(share * kept.numel()), int((~kept).sum()))
