"""What training minimises: pure functions of logits.

Notation: z are the student's logits, y the teacher's, both (positions, vocabulary); q_T = softmax(z / T),
p_T = softmax(y / T). All return the mean over positions, in nats, as a float32 scalar, and compute in
float32 whatever the logits' type.

- cross-entropy              -log q_1[target]
- forward KL                 T^2 KL(p_T || q_T)          Hinton, Vinyals, Dean 2015, "Distilling the Knowledge
                             in a Neural Network": soft-target gradients fall as 1/T^2, so T^2 keeps
                             their size when T changes. Covers all that the teacher finds likely.
- reverse KL                 T^2 KL(q_T || p_T)          Gu et al. 2023, MiniLLM: seeks the teacher's mode.
- Jensen-Shannon, beta       T^2 [beta KL(p_T || m) + (1 - beta) KL(q_T || m)], m = beta p_T + (1 - beta) q_T
                             Agarwal et al. 2023, GKD: bounded, between the two (beta is the teacher's share).
- skew KL, alpha             T^2 KL(p_T || alpha p_T + (1 - alpha) q_T)
                             Ko et al. 2024, DistiLLM: forward KL without its unbounded gradients.

Memory: each needs a few float32 copies of the logits. `chunked` bounds that by a block of positions and
keeps only the gradient, in the logits' own type: for 2048 positions of a vocabulary of 49 k, 0.4 GB per
copy becomes 50 MB per block.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = 2**20  # logits per block: 4 MB

Divergence = Literal["forward_kl", "reverse_kl", "jensen_shannon", "skew_kl"]


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean of -log softmax(z)[target]: (n, v), (n) -> scalar."""
    return F.cross_entropy(logits.float(), targets)


def forward_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(p_T || q_T): (n, v), (n, v) -> scalar.

    >>> z = torch.tensor([[0.0, 1.0, 2.0]])
    >>> round(forward_kl(z, z, 2.0).item(), 6)
    0.0
    """
    log_q, log_p = _log_softmax(logits, temperature), _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(log_p, log_q)


def reverse_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(q_T || p_T): (n, v), (n, v) -> scalar."""
    log_q, log_p = _log_softmax(logits, temperature), _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(log_q, log_p)


def jensen_shannon(
    logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, beta: float = 0.5
) -> Tensor:
    """T^2 [beta KL(p || m) + (1 - beta) KL(q || m)], m = beta p + (1 - beta) q, for 0 < beta < 1."""
    log_q, log_p = _log_softmax(logits, temperature), _log_softmax(teacher_logits, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return temperature**2 * (beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m))


def skew_kl(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0, alpha: float = 0.1) -> Tensor:
    """T^2 KL(p || alpha p + (1 - alpha) q), for 0 <= alpha < 1."""
    log_q, log_p = _log_softmax(logits, temperature), _log_softmax(teacher_logits, temperature)
    return temperature**2 * _kl(log_p, _log_mixture(log_p, log_q, alpha) if alpha else log_q)


DIVERGENCES: dict[Divergence, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jensen_shannon": jensen_shannon,
    "skew_kl": skew_kl,
}


def distillation(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    divergence: Divergence = "forward_kl",
    temperature: float = 1.0,
    cross_entropy_weight: float = 0.2,
) -> Tensor:
    """(1 - w) divergence + w cross-entropy: (n, v), (n, v), (n) -> scalar."""
    loss = torch.zeros((), device=logits.device)
    if cross_entropy_weight < 1:
        soft = DIVERGENCES[divergence](logits, teacher_logits, temperature)
        loss = loss + (1 - cross_entropy_weight) * soft
    if cross_entropy_weight > 0:
        loss = loss + cross_entropy_weight * cross_entropy(logits, targets)
    return loss


def chunked(
    function: Callable[..., Tensor], logits: Tensor, *others: Tensor, rows: int | None = None
) -> Tensor:
    """`function(logits, *others)`, a mean over positions, computed block by block with its gradient.

    Args:
        function: any mean over rows, such as those above.
        logits: (n, v); the only input that gets a gradient.
        others: tensors with n rows (teacher's logits, targets).
        rows: positions per block; by default as many as stay in a processor's cache.

    Equal to the plain call up to the order of summation. The gradient of logits in half precision is rounded
    before it is scaled, so that it does not depend on how many positions there are.
    """
    rows = rows or max(1, _BLOCK_ELEMENTS // logits.shape[1])
    one = logits.shape[0] <= rows and logits.dtype == torch.float32  # others: rounded as many blocks' are
    if one or not logits.requires_grad:
        return function(logits, *others)
    into = _cross_entropy_into if function is cross_entropy else partial(_autograd_into, function)
    result: Tensor = _Chunked.apply(into, rows, logits, *others)  # type: ignore[no-untyped-call]
    return result


class _Chunked(torch.autograd.Function):
    """Computes the gradient in the forward pass, since afterwards the blocks are gone."""

    @staticmethod
    def forward(ctx: Any, into: Any, rows: int, logits: Tensor, *others: Tensor) -> Tensor:
        n = logits.shape[0]
        divisor = n if logits.dtype == torch.float32 else 1
        ctx.left = n // divisor  # what is still to be divided by
        gradient = torch.empty_like(logits)
        total = torch.zeros((), dtype=torch.float32, device=logits.device)
        for start in range(0, n, rows):
            block = slice(start, min(start + rows, n))
            total += into(gradient[block], logits[block], *(other[block] for other in others), n=divisor)
        ctx.save_for_backward(gradient)
        return total / ctx.left

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (gradient,) = ctx.saved_tensors
        others = [None] * (len(ctx.needs_input_grad) - 3)
        # in place: it is needed once, and is as large as the logits; a factor in half precision would be
        # wrong by up to a 256th, for all of them alike
        factor = grads[0] if gradient.dtype == torch.float32 else float(grads[0]) / ctx.left
        return (None, None, gradient.mul_(factor), *others)


def _autograd_into(
    function: Callable[..., Tensor], gradient: Tensor, logits: Tensor, *others: Tensor, n: int
) -> Tensor:
    """The sum over these rows of what `function` gives, / n; writes its gradient. Logits (rows, v)."""
    part = logits.detach().requires_grad_()
    with torch.enable_grad():
        loss = len(part) / n * function(part, *others)
    gradient.copy_(torch.autograd.grad(loss, part)[0])
    return loss.detach()


def _cross_entropy_into(gradient: Tensor, logits: Tensor, targets: Tensor, *, n: int) -> Tensor:
    """As `_autograd_into` with cross-entropy, whose gradient is softmax(z) less one at the target.

    In half of the passes that autograd takes over the logits.
    """
    exact = logits.dtype == torch.float32
    soft = torch.softmax(logits, -1, dtype=torch.float32, out=gradient if exact else None)
    wanted = targets[:, None]
    # log sum exp(z): the largest share is at least 1 / v, so its logarithm is exact
    norms = logits.amax(-1).float() - soft.amax(-1).log()
    loss = (norms - logits.gather(1, wanted)[:, 0].float()).sum() / n
    soft.scatter_add_(1, wanted, soft.new_full(wanted.shape, -1.0)).div_(n)
    if not exact:
        gradient.copy_(soft)
    return loss


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return F.log_softmax(logits.float() / temperature, dim=-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over rows of KL(p || q)."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _log_mixture(log_p: Tensor, log_q: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q), without leaving log space."""
    weights = torch.tensor([share, 1 - share], device=log_p.device).log()
    return torch.logaddexp(log_p + weights[0], log_q + weights[1])
