"""What is made of measured losses before bits are chosen by them.

Extended: a uniform grid's error falls by 6.02 dB per bit, so the logarithm of a loss is nearly straight in
the rate, and rates between the measured ones are read off the line.

Tempered: that the losses of single tensors, measured one at a time, add up to the model's is true for small
errors only. The rule that follows from it, R_i = R + log2(l_i / l) / 2 with l_i the loss per weight of tensor
i at one rate and l their geometric mean (reverse water-filling; Cover, Thomas: Elements of Information
Theory, section 10.3.3), takes too much from tensors that seem not to matter. With a trust t the levels are

    L_i -> L_i (l_i / l)^(t - 1),

times what keeps their sum, so that the tensors together weigh as much against others as they did; rates then
differ by t times as much: t = 1 is the rule, t = 0 the same rate for all. The shrinkage is ours.
"""

from collections.abc import Sequence

import numpy as np

_LEAST = 1e-30


def extended(losses: Sequence[float], at: Sequence[float], wanted: Sequence[float]) -> list[float]:
    """Losses at the rates `wanted` from those `at` others, in rising order; flat beyond them.

    >>> extended([4.0, 1.0], [2.0, 3.0], [2.0, 2.5, 3.0])
    [4.0, 2.0, 1.0]
    """
    logs = np.log(np.maximum(np.asarray(losses, dtype=np.float64), _LEAST))
    return [float(x) for x in np.exp(np.interp(wanted, at, logs))]


def tempered(
    losses: Sequence[Sequence[float]], levels: Sequence[float], weights: Sequence[int], trust: float
) -> list[list[float]]:
    """Every tensor's losses, with their level shrunk towards the others'.

    Args:
        losses: per tensor, one for each choice it has.
        levels: per tensor, the loss at one and the same rate.
        weights: per tensor, how many it holds.
        trust: t, from 0 to 1.

    >>> tempered([[4.0, 1.0], [16.0, 4.0]], [4.0, 16.0], [1, 1], 0.0)
    [[10.0, 2.5], [10.0, 2.5]]
    """
    found = np.maximum(np.asarray(levels, dtype=np.float64), _LEAST)
    factors = np.exp(np.log(found / np.asarray(weights)) * (trust - 1))
    factors *= found.sum() / (found * factors).sum()
    return [[loss * float(factor) for loss in row] for row, factor in zip(losses, factors, strict=True)]
