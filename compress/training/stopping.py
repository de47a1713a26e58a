"""How far a run is, which of its weights are kept, and when it ends early: decided by the held-out loss.

Without `patience` the last weights are kept, or their average where that scores lower at the end. With it,
the best of all held-out points is kept, the start and averages included, and a run that has met no better
one for `patience` points ends. So a run with patience never ends above the held-out loss it started from.
Memory with patience: one more float32 copy of what is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_CURVE_POINTS = 100


@dataclass
class Best:
    """The weights to keep, by what the held-out loss has said so far; JSON, for checkpoints.

    Attributes:
        score: their held-out loss, in nats.
        step: after how many steps they were met.
        averaged: whether they are an average.
        stale: held-out points since.
    """

    score: float
    step: int = 0
    averaged: bool = False
    stale: int = 0


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds beside tensors, as JSON.

    Attributes:
        identity: digest of all that decides the result.
        heldout_before: the held-out loss of the weights it started from.
        best: which weights to keep.
        step: steps done.
        seconds: spent in steps.
        loss_sum, loss_count: of the steps since the last point of the curve.
        curve: [step, tokens, mean loss since the point before, held-out loss or None] per point.
        average_curve: [step, held-out loss of the averaged weights] per held-out point that has one.
    """

    identity: str
    heldout_before: float
    best: Best
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    curve: list[list[float | int | None]] = field(default_factory=list)
    average_curve: list[list[float | int]] = field(default_factory=list)

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "Progress":
        """From JSON."""
        return cls(**{**values, "best": Best(**values["best"])})

    def record(self, loss: float, tokens: int, heldout: float | None, steps: int) -> None:
        """Count a finished step of `steps`; a hundred times, and at each held-out loss, add to the curve."""
        self.step += 1
        self.loss_sum += loss
        self.loss_count += 1
        if self.step % max(1, steps // _CURVE_POINTS) == 0 or heldout is not None:
            self.curve.append([self.step, tokens, self.loss_sum / self.loss_count, heldout])
            self.loss_sum, self.loss_count = 0.0, 0


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

    @torch.no_grad()
    def consider(self, progress: Progress, score: float, averaged: bool = False) -> None:
        """Keep the model's weights as they stand if their held-out loss says so; never for a loss of NaN."""
        if (self.patience is None and not averaged) or score < progress.best.score:
            progress.best = Best(score, progress.step, averaged)
            for name, parameter in self.weights.items():
                self.tensors[name].copy_(parameter)

    @torch.no_grad()
    def restore(self) -> None:
        """Put the best weights into the model."""
        for name, parameter in self.weights.items():
            parameter.copy_(self.tensors[name])

    def done(self, best: Best) -> bool:
        """Whether the patience is at its end."""
        return self.patience is not None and best.stale >= self.patience
