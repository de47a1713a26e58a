"""The best weights on a given support: least squares under a mask, by conjugate gradients.

    minimise   || (W - W^) X ||_F^2  =  tr((W - W^) H (W - W^)^T)    over W^ with W^ = W^ * M.

Rows are independent systems (H restricted to the row's support), too many to factorise one by one; all are
stepped together, each with step sizes of its own, by products with H alone. With D = diag H as the
preconditioner, ten steps or so come to where the error no longer falls.

Hestenes, Stiefel (1952); for the weights left by pruning: Meng et al. 2024 (ALPS), arXiv 2406.07831, section
3.3. Cost per step: one product (out, in) (in, in).
"""

import torch
from torch import Tensor

_TINY = 1e-30


def fit(weight: Tensor, start: Tensor, mask: Tensor, hessian: Tensor, steps: int) -> Tensor:
    """W^, float32 (out, in), zero outside `mask`; its error is never above that of `start`.

    Args:
        weight: W, what the layer should compute, (out, in).
        start: where to begin, (out, in); its weights outside the mask are dropped first.
        mask: bool (out, in).
        hessian: H (in, in), positive definite.
        steps: of conjugate gradients.

    >>> h = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    >>> fit(torch.ones(1, 2), torch.ones(1, 2), torch.tensor([[True, False]]), h, 2)
    tensor([[1.5000, 0.0000]])
    """
    inverse = 1.0 / hessian.diagonal()
    current = start.float() * mask
    residual = ((weight.float() - current) @ hessian).mul_(mask)  # minus half the gradient
    preconditioned = residual * inverse
    direction = preconditioned.clone()
    height = (residual * preconditioned).sum(1, keepdim=True)  # (out, 1)
    for _ in range(steps):
        product = (direction @ hessian).mul_(mask)
        length = height / (direction * product).sum(1, keepdim=True).clamp(min=_TINY)
        current.addcmul_(direction, length)
        residual.addcmul_(product, length, value=-1)
        torch.mul(residual, inverse, out=preconditioned)
        before, height = height, (residual * preconditioned).sum(1, keepdim=True)
        direction.mul_(height / before.clamp(min=_TINY)).add_(preconditioned)
    return current
