"""What is done to gradients before their norm is taken.

unfreezing       of a parameter whose turn has not come the gradient is dropped: neither its weights nor
                 what the optimiser remembers of it move, nor does it count in the norm
centralisation   of each matrix (out, in) in a linear layer the mean over the inputs is taken off every
                 output's row, G <- G - mean_in(G) (Yong et al. 2020, arXiv 2004.01461); of pruned ones over
                 the weights that are kept
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.training.depths import begins
from compress.training.optimizers import split
from compress.training.plan import Optimization


class Gradients:
    """Those of a model's parameters, in a run of so many steps.

    Args:
        model: as it trains, after it was sharded.
        plan: the settings.
        levels: parameter name -> level (`depths.levels`); empty where the plan does not ask for them.
        steps: of the whole run.
    """

    def __init__(self, model: Any, plan: Optimization, levels: Mapping[str, int], steps: int) -> None:
        self.waiting: list[tuple[int, Any]] = []  # first step that counts, parameter
        if plan.unfreeze and levels:
            top = max(levels.values())
            self.waiting = [
                (first, parameter)
                for name, parameter in model.named_parameters()
                if (first := begins(levels[name], top, plan.unfreeze, steps)) > 0
            ]
        self.matrices = split(model)[0] if plan.centralise else []

    def prepare(self, step: int, dropped: Mapping[int, Tensor]) -> None:
        """Change those of a step, 0 .. steps - 1, in place.

        Args:
            step: its number.
            dropped: id of a parameter -> True where a weight is pruned, and its gradient zero.
        """
        for first, parameter in self.waiting:
            if step < first:
                parameter.grad = None
        for parameter in self.matrices:
            if parameter.grad is not None:
                centralise(parameter.grad, dropped.get(id(parameter)))


@torch.no_grad()
def centralise(gradient: Tensor, dropped: Tensor | None = None) -> None:
    """Take off the mean over the inputs, in place: (out, in); what is `dropped` is zero and stays so.

    >>> gradient = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    >>> centralise(gradient)
    >>> gradient.tolist()
    [[-1.0, 1.0], [0.0, 0.0]]
    """
    if dropped is None:
        gradient.sub_(gradient.mean(dim=1, keepdim=True))
        return
    kept = (~dropped).to(gradient.dtype)
    mean = gradient.sum(dim=1, keepdim=True) / kept.sum(dim=1, keepdim=True).clamp(min=1)
    gradient.sub_(mean * kept)
