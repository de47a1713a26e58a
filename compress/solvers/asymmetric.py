"""The asymmetric target: what a layer should become when its inputs have already changed.

Earlier layers are compressed, so the layer now sees x~ where the original model gave it x. Instead of
imitating its own output on x~, it should give what the original gave on x:

    W~ = argmin_V  E || W x - V x~ ||^2  =  W (E[x x~^T] + l I) (E[x~ x~^T] + l I)^-1.

The full step overfits the calibration text, so the weight moves by a share eta towards it:
W <- (1 - eta) W + eta W~. Then any rounder follows, under the statistics of x~.

GPTAQ (Li et al. 2025, arXiv 2504.02692); Qronos (Zhang et al. 2025, arXiv 2505.11695).
"""

import torch
from torch import Tensor


def asymmetric_target(
    weight: Tensor, hessian: Tensor, cross: Tensor, share: float, damping: float = 0.01
) -> Tensor:
    """Move `weight` (out, in) by `share` towards the target; float32 (out, in).

    Args:
        weight: of the original layer.
        hessian: E[x~ x~^T] (in, in).
        cross: E[x x~^T] (in, in), x of the original model.
        share: eta in [0, 1]; 0 returns the weight.
        damping: l relative to the mean diagonal of `hessian`.

    >>> h = torch.eye(3)
    >>> bool(torch.allclose(asymmetric_target(torch.ones(2, 3), h, h, 0.5), torch.ones(2, 3)))
    True
    """
    if share == 0:
        return weight.float()
    h, c = hessian.double(), cross.double()
    ridge = damping * h.diagonal().mean().clamp(min=1e-12)
    identity = torch.eye(len(h), dtype=h.dtype, device=h.device) * ridge
    # V (H + lI) = W (C + lI); H is symmetric, so solve (H + lI) V^T = (C + lI)^T W^T
    target = torch.linalg.solve(h + identity, (c + identity).T @ weight.double().T).T
    return ((1 - share) * weight.double() + share * target).float()
