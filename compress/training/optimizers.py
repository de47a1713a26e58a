"""Optimisers and schedules.

AdamW (Loshchilov & Hutter 2019), Adam (Kingma & Ba 2015), Adagrad (Duchi et al. 2011), RMSprop (Hinton 2012)
or SGD with Nesterov's momentum for everything, all of them torch's own; or Muon for the matrices inside the
blocks and AdamW for the rest (embeddings, head, norms, biases). The decays of the Adams are 0.9 and 0.95.

Muon (Keller Jordan 2024, https://kellerjordan.github.io/posts/muon): the update is the momentum's nearest
semi-orthogonal matrix, U V^T of its SVD, found by five Newton-Schulz steps

    X <- a X + (b A + c A^2) X,   A = X X^T,   (a, b, c) = (3.4445, -4.7750, 2.0315),   X_0 = M / ||M||_F

which push every singular value into about [0.7, 1.2]. The update is scaled by sqrt(max(1, rows / columns)).
Matrices of one shape go through it together. Cost: 10 to 20 % of a step for batches of 2-4 k tokens, less
for larger ones; state: one float32 copy of the matrices, half of AdamW's.

Schedules are pure functions step -> factor on the learning rate.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.training import sharding

ScheduleName = Literal["wsd", "cosine", "linear", "constant", "exponential", "polynomial"]
OptimizerName = Literal["adamw", "muon", "sgd", "adam", "adagrad", "rmsprop"]
_LAST = 0.01  # of the rate, where an exponential schedule ends
_POWER = 2  # of a polynomial schedule
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def schedule_factor(schedule: ScheduleName, step: int, steps: int, warmup: float, decay: float) -> float:
    """The factor on the learning rate for step 0 .. steps - 1.

    Warm-up is linear over the first `warmup` share of the steps. After it `wsd` (warm-up, stable, decay;
    Hu et al. 2024) stays at 1 and falls linearly towards 0 over the last `decay` share. The others fall over
    the whole rest; with x, from 0 to 1, the share of it that is done:

        cosine        (1 + cos(pi x)) / 2
        linear        1 - x
        polynomial    (1 - x)^2
        exponential   0.01^x: by the same factor every step, towards a hundredth

    >>> [round(schedule_factor("wsd", s, 10, 0.2, 0.4), 2) for s in range(10)]
    [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25]
    >>> [round(schedule_factor("polynomial", s, 6, 0.3, 0), 4) for s in range(6)]
    [0.5, 1.0, 1.0, 0.5625, 0.25, 0.0625]
    >>> [round(schedule_factor("exponential", s, 6, 0.3, 0), 4) for s in range(6)]
    [0.5, 1.0, 1.0, 0.3162, 0.1, 0.0316]
    """
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        falling = max(1, round(decay * steps))
        return min(1.0, (steps - step) / falling)
    progress = (step - warm) / max(1, steps - warm)
    if schedule == "exponential":
        return float(_LAST**progress)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    return float((1.0 - progress) ** _POWER) if schedule == "polynomial" else 1.0 - progress


def build(
    model: nn.Module,
    optimizer: OptimizerName,
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float,
    dtype: torch.dtype = torch.float32,
    *,
    momentum: float = 0.9,
    factors: Mapping[str, float] | None = None,
    extra: nn.Module | None = None,
    together: bool = True,
) -> list[torch.optim.Optimizer]:
    """The optimisers of a model, covering each trainable parameter once.

    Weight decay acts on the matrices inside the blocks only: not on embeddings, head, norms or biases.

    Args:
        model: the model; parameters with `requires_grad=False` stay out.
        optimizer: which, for all; or `muon` for matrices and AdamW for the rest.
        learning_rate: of all but Muon.
        muon_learning_rate: Muon's, in units of the update's spectral norm.
        weight_decay: AdamW's and Muon's decoupled, times the rate; the others' added to the gradient.
        dtype: what Newton-Schulz computes in; bfloat16 where the machine is fast at it.
        momentum: SGD's.
        factors: parameter name -> factor on its rate; 1 for those not named.
        extra: a module that learns beside the model, by AdamW at `learning_rate`.
        together: whether all parameters begin to learn at once; torch's fused SGD takes no others.
    """
    matrices, rest = split(model)
    scale = {id(p): (factors or {}).get(name, 1.0) for name, p in model.named_parameters()}
    adamw: dict[str, Any] = {"lr": learning_rate, "betas": (0.9, 0.95), "fused": True}
    parts: list[torch.optim.Optimizer] = []
    if optimizer == "muon" and matrices:
        groups = _groups(matrices, scale, muon_learning_rate, weight_decay)
        parts.append(Muon(groups, muon_learning_rate, dtype=dtype))
        if rest:
            parts.append(torch.optim.AdamW(_groups(rest, scale, learning_rate, 0.0), **adamw))
    else:
        groups = _groups(matrices, scale, learning_rate, weight_decay)
        groups += _groups(rest, scale, learning_rate, 0.0)
        if optimizer == "sgd":
            sgd: dict[str, Any] = {"lr": learning_rate, "momentum": momentum, "nesterov": momentum > 0}
            parts.append(
                torch.optim.SGD(groups, **sgd, fused=together and not any(map(sharding.is_sharded, rest)))
            )
        elif optimizer == "adagrad":
            parts.append(torch.optim.Adagrad(groups, lr=learning_rate))
        elif optimizer == "rmsprop":
            parts.append(torch.optim.RMSprop(groups, lr=learning_rate))
        else:
            kind = torch.optim.Adam if optimizer == "adam" else torch.optim.AdamW
            parts.append(kind(groups, **adamw))
    beside = [] if extra is None else list(extra.parameters())
    if beside:
        parts.append(torch.optim.AdamW(beside, weight_decay=0.0, **adamw))
    return parts


def _groups(
    parameters: list[nn.Parameter], scale: Mapping[int, float], rate: float, decay: float
) -> list[dict[str, Any]]:
    """A group per factor on the rate."""
    by_factor: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_factor.setdefault(scale[id(parameter)], []).append(parameter)
    return [
        {"params": members, "lr": rate * factor, "weight_decay": decay}
        for factor, members in by_factor.items()
    ]


def split(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters: (matrices inside the blocks, the rest), tied ones once, in the model's order."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is not None:
        embeddings.add(id(head.weight))
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim == 2 and id(p) not in embeddings]
    inside = {id(p) for p in matrices}
    return matrices, [p for p in trainable if id(p) not in inside]


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (see the module's text). All parameters must be matrices (out, in)."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple[torch.Size, bool], list[nn.Parameter]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault((parameter.shape, parameter.is_contiguous()), []).append(parameter)
            for ((rows, columns), straight), parameters in by_shape.items():
                mixed = self._nesterov(parameters, group["momentum"])
                # a matrix that lies in memory as its transpose is taken as that: nothing is copied
                update = torch.stack(mixed if straight else [m.T for m in mixed])
                update = orthogonalise(update, self.dtype)
                update = update if straight else update.mT
                scale = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for parameter, direction in zip(parameters, update.unbind(), strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(sharding.like(direction.to(parameter.dtype), parameter), alpha=-scale)

    def _nesterov(self, parameters: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """Updates the momentum; returns gradient and momentum mixed, (rows, columns) each."""
        mixed = []
        for parameter in parameters:
            gradient = parameter.grad
            assert gradient is not None
            state = self.state[parameter]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            state["momentum"].lerp_(gradient, 1 - momentum)
            mixed.append(sharding.whole(gradient.lerp(state["momentum"], momentum)))
        return mixed


def orthogonalise(matrices: Tensor, dtype: torch.dtype = torch.float32, steps: int = 5) -> Tensor:
    """About U V^T of each matrix's SVD: (..., rows, columns) -> same shape, in `dtype`.

    >>> torch.linalg.svdvals(orthogonalise(torch.diag(torch.tensor([3.0, 1.0, 0.5])))).round().tolist()
    [1.0, 1.0, 1.0]
    """
    shape = matrices.shape
    x = matrices.reshape(-1, *shape[-2:])
    wide = shape[-2] <= shape[-1]
    x = (x if wide else x.mT).to(dtype)  # (n, small, large): A is the smaller square
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    small, large = x.shape[-2:]
    x = _by_gram(x, steps) if dtype == torch.float32 and large >= 2 * small else _by_steps(x, steps)
    return (x if wide else x.mT).reshape(shape)


def _by_steps(x: Tensor, steps: int) -> Tensor:
    """The recursion as it stands: 2 small^2 large + small^3 per step."""
    a, b, c = _NEWTON_SCHULZ
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)  # (n, small, small)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor, steps: int) -> Tensor:
    """The same in the square of the smaller side, for matrices at least twice as long as wide.

    P_k = a I + b A_k + c A_k^2 commutes with A_k, so A_{k+1} = P_k A_k P_k and the result is the product of
    the P_k times X: 2 small^2 large once and about 3.5 small^3 per step. Float32 only: the error of A grows
    by a^2 per step where singular values are small.
    """
    a, b, c = _NEWTON_SCHULZ
    gram = torch.bmm(x, x.mT)  # (n, small, small)
    product = None
    for step in range(steps):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else torch.bmm(factor, product)
        if step + 1 < steps:
            gram = torch.bmm(torch.bmm(factor, gram), factor)
    assert product is not None
    return torch.bmm(product, x)
