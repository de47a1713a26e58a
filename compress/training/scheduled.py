"""The optimisers of a run, and the rates that its schedule gives them."""

from collections.abc import Mapping

import torch
from torch import nn

from compress.models.running import Precision
from compress.training import optimizers
from compress.training.plan import Optimization


class Scheduled:
    """The optimisers of a run and their schedule."""

    def __init__(
        self,
        model: nn.Module,
        extra: nn.Module,
        plan: Optimization,
        steps: int,
        factors: Mapping[str, float],
        precision: Precision,
    ) -> None:
        self.plan, self.steps = plan, steps
        self.parts = optimizers.build(
            model,
            plan.optimizer,
            plan.learning_rate,
            plan.muon_learning_rate,
            plan.weight_decay,
            torch.bfloat16 if precision == "bfloat16" else torch.float32,
            momentum=plan.momentum,
            factors=factors,
            extra=extra,
            together=not plan.unfreeze,
        )
        self.rates = [[float(group["lr"]) for group in part.param_groups] for part in self.parts]

    def step(self, step: int) -> None:
        """Update the parameters with the rate of this step, and drop the gradients."""
        plan = self.plan
        factor = optimizers.schedule_factor(plan.schedule, step, self.steps, plan.warmup, plan.decay)
        for part, full in zip(self.parts, self.rates, strict=True):
            for group, rate in zip(part.param_groups, full, strict=True):
                group["lr"] = rate * factor
            part.step()
            part.zero_grad(set_to_none=True)
