"""Averages of the weights over steps, which cost nothing per token and often score better than the last.

`tail`  the plain mean of the weights after each of the last steps (Polyak & Juditsky 1992; Izmailov et al.
        2018, arXiv 1803.05407): for a rate that stays high, where it stands in for the decay (Hägele et al.
        2024, arXiv 2405.18392).
`ema`   a moving mean with a horizon of h steps, a <- a + (w - a) / min(t, h) after step t: the plain mean
        until t = h, exponential from there. So it needs no correction for where it started.

Both are one recursion, a <- a + c (w - a). Memory: one more float32 copy of what is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

AverageName = Literal["none", "ema", "tail"]


class Average:
    """The running mean of a model's trainable parameters.

    Attributes:
        tensors: parameter name -> mean so far; what a checkpoint must hold.
    """

    def __init__(self, model: nn.Module, kind: AverageName, share: float, steps: int) -> None:
        self.kind, self.steps = kind, steps
        self.span = max(1, round(share * steps))  # steps that count
        self.weights = {n: p for n, p in model.named_parameters() if p.requires_grad and kind != "none"}
        self.tensors: dict[str, Tensor] = {n: p.detach().clone() for n, p in self.weights.items()}

    def coefficient(self, step: int) -> float | None:
        """c after step 0 .. steps - 1; None while nothing is averaged.

        >>> [Average(nn.Linear(1, 1), "tail", 0.5, 4).coefficient(step) for step in range(4)]
        [None, None, 1.0, 0.5]
        >>> [Average(nn.Linear(1, 1), "ema", 0.5, 4).coefficient(step) for step in range(4)]
        [1.0, 0.5, 0.5, 0.5]
        """
        if self.kind == "none":
            return None
        if self.kind == "ema":
            return 1 / min(step + 1, self.span)
        counted = step + 1 - (self.steps - self.span)
        return 1 / counted if counted > 0 else None

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a step."""
        c = self.coefficient(step)
        if c is not None:
            for name, parameter in self.weights.items():
                self.tensors[name].lerp_(parameter.detach(), c)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The averaged weights in the model while the block runs."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights and the averaged ones."""
        for name, parameter in self.weights.items():
            before = parameter.detach().clone()
            parameter.copy_(self.tensors[name])
            self.tensors[name].copy_(before)
