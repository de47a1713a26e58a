"""Which weights of a run are kept, and when it ends early: decided by the held-out loss.

Without `patience` the last weights are kept, or their average where that scores lower at the end. With it,
the best of all held-out points is kept, the start and averages included, and a run that has met no better
one for `patience` points ends. So a run with patience never ends above the held-out loss it started from.
Memory with patience: one more float32 copy of what is trained.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Verdict:
    """What the held-out loss has said so far; JSON, for checkpoints.

    Attributes:
        score: the held-out loss of the weights to keep, in nats.
        step: after how many steps they were met.
        averaged: whether they are an average.
        stale: held-out points since.
    """

    score: float
    step: int = 0
    averaged: bool = False
    stale: int = 0


class Keeper:
    """Copies the best weights aside.

    Attributes:
        tensors: parameter name -> best so far; what a checkpoint must hold. Empty without patience.
    """

    def __init__(self, model: nn.Module, patience: int | None) -> None:
        self.patience = patience
        watched = patience is not None
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad and watched}
        self.tensors: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.weights.items()}

    def better(self, verdict: Verdict, score: float) -> bool:
        """Whether the weights that scored so should be kept; never those that scored NaN."""
        return self.patience is None or score < verdict.score

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the model's weights aside."""
        for name, parameter in self.weights.items():
            self.tensors[name].copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the model."""
        for name, parameter in self.weights.items():
            parameter.copy_(self.tensors[name])

    def done(self, verdict: Verdict) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and verdict.stale >= self.patience
