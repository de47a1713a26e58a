"""OWL: blocks with more outliers stay denser.

With A_ij = |W_ij| ||x_j|| of all weights of a block, its outlier ratio is

    D_l = #{A_ij > M mean(A)} / #A,

and its density is spread around the asked one by up to lambda: with the D_l scaled to [0, 2 lambda],

    density_l = (1 - s) + scaled_l - mean(scaled),        so that the mean over the weights stays 1 - s.

Yin, Wu, Zhang et al.: Outlier Weighed Layerwise Sparsity (2023), arXiv 2310.05175; equations 1 and 2, M = 5
and lambda = 0.08 as in its experiments.
"""

from collections.abc import Sequence

from torch import Tensor


def outlier_ratio(scores: Sequence[Tensor], threshold: float = 5.0) -> float:
    """D of a block, from A of each of its layers, (out, in) each.

    >>> import torch
    >>> outlier_ratio([torch.tensor([[1.0, 1.0, 1.0, 37.0]])], 3.0)
    0.25
    """
    total = sum(part.numel() for part in scores)
    limit = threshold * float(sum(part.double().sum() for part in scores)) / total
    return sum(int((part > limit).sum()) for part in scores) / total


def shares(
    ratios: Sequence[float], sizes: Sequence[int], sparsity: float, spread: float = 0.08
) -> list[float]:
    """The share of zeros of every block: its mean, weighted by the blocks' sizes, is `sparsity`.

    >>> [round(share, 3) for share in shares([0.0, 0.1], [10, 10], 0.5, 0.08)]
    [0.58, 0.42]
    """
    lowest, highest = min(ratios), max(ratios)
    if highest == lowest:
        return [sparsity] * len(ratios)
    scaled = [2 * spread * (ratio - lowest) / (highest - lowest) for ratio in ratios]
    mean = sum(s * size for s, size in zip(scaled, sizes, strict=True)) / sum(sizes)
    return [sparsity + mean - s for s in scaled]
