"""The asymmetric target: what a layer should become when its inputs have already changed.

Earlier layers are compressed, so the layer now sees x~ where the original model gave it x. Instead of
imitating its own output on x~, it should give what the original gave on x; and where its output is added
to a stream whose residual has itself changed from r to r~, it can make good that difference too:

    W~ = argmin_V  E || W x + (r - r~) - V x~ ||^2 + l || V - W ||^2  =  W + (W D + R) (H + l I)^-1,
    H = E[x~ x~^T],   D = E[(x - x~) x~^T],   R = E[(r - r~) x~^T].

The full step overfits the calibration text, so the weight moves by a share of it, W + eta (W~ - W). On
held-out text (H', D', R') the error is a parabola in eta, with its minimum at

    eta = <W D' + R', W~ - W> / <(W~ - W) H', W~ - W>.

Then any rounder follows, under the statistics of x~.

GPTAQ (Li et al. 2025, arXiv 2504.02692); Qronos (Zhang et al. 2025, arXiv 2505.11695), which has the
residual term; the share and its choice on held-out text are ours.
"""

from torch import Tensor

from compress.solvers.gptq import Factor


def wanted(weight: Tensor, drift: Tensor, residual: Tensor | None = None) -> Tensor:
    """W D + R, float32 (out, in): all that the target needs of the original model.

    Args:
        weight: of the original layer, (out, in).
        drift: D (in, in).
        residual: R (out, in); None leaves the stream out.
    """
    result = weight.float() @ drift.float()
    return result if residual is None else result.add_(residual.float())


def correction(wanted: Tensor, factor: Factor) -> Tensor:
    """The full step W~ - W = (W D + R) (H + l I)^-1, float32 (out, in).

    Args:
        wanted: W D + R, (out, in).
        factor: of H + l I, from `solvers.gptq.factorise`.

    >>> import torch
    >>> from compress.solvers.gptq import factorise
    >>> h = torch.eye(3)
    >>> step = correction(wanted(torch.ones(2, 3), 0.5 * h), factorise(h, 1e-6))
    >>> step.round(decimals=3)[0].tolist()
    [0.5, 0.5, 0.5]
    """
    return factor.divide(wanted)


def heldout_share(wanted: Tensor, step: Tensor, hessian: Tensor) -> float:
    """The share eta in [0, 1] of `step` that serves best on text that `step` was not fitted to.

    `wanted` is W D' + R' and `hessian` H' (in, in), both of that text.
    """
    gain = (wanted * step).sum()
    cost = ((step @ hessian.float()) * step).sum()
    return float((gain / cost.clamp(min=1e-30)).clamp(0, 1))
