"""AWQ: scale up the weight columns whose inputs are large before rounding, so that they are rounded less.

With s > 0 per input channel, W x = (W diag(s)) (x / s); rounding W diag(s) leaves column j an error that
is s_j times smaller, as long as few columns grow and the grids of their groups do not. The scales follow
the inputs' mean magnitude,

    s_j = E|x_j|^beta,    beta = argmin  || X (W - Q(W diag(s)) diag(s)^-1)^T ||_F^2     over a few values,

and 1/s is folded into what makes the inputs (layerwise/folding.py), so the model computes the same.

Lin et al., AWQ: Activation-aware Weight Quantization (2023), arXiv 2306.00978, equations 4 and 5. Scales
are divided by sqrt(max s * min s), as in the authors' code. Cost: per beta one rounding of the weight and
samples * in * out multiplications.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

# Channels that are all but dead would get scales near 0, and their columns would vanish.
_SMALLEST = 1e-4


def scales_for(magnitudes: Tensor, beta: float) -> Tensor:
    """s of every input channel, (in,) -> (in,), for E|x_j| = `magnitudes`.

    >>> scales_for(Tensor([1.0, 16.0]), beta=0.5)
    tensor([0.5000, 2.0000])
    """
    relative = magnitudes.float() / magnitudes.max().clamp(min=1e-30)
    s = relative.clamp(min=_SMALLEST).pow(beta)
    return s / (s.max() * s.min()).sqrt()


def search(
    weight: Tensor,
    magnitudes: Tensor,
    inputs: Tensor,
    rounded: Callable[[Tensor], Tensor],
    betas: Sequence[float],
) -> tuple[float, dict[float, float]]:
    """The beta of the smallest output error, and every beta's error relative to the output's square.

    Args:
        weight: of all layers that read these inputs, rows stacked, float32 (out, in).
        magnitudes: E|x_j|, (in,).
        inputs: a sample X, (samples, in).
        rounded: a weight (out, in) -> the values it is rounded to.
        betas: what to try; 0 scales nothing. Of equal ones the first wins.
    """
    whole = (inputs @ weight.T).square().sum().clamp(min=1e-30)
    errors = {}
    for beta in betas:
        s = scales_for(magnitudes, beta)
        difference = weight - rounded(weight * s) / s
        errors[beta] = float((inputs @ difference.T).square().sum() / whole)
    return min(errors, key=errors.__getitem__), errors
