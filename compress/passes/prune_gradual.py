"""prune_gradual: magnitude pruning in small portions while the model trains.

Every few steps the smallest weights go, more of them early than late (solvers/gradual.py: Zhu & Gupta 2017),
and what is left learns to do without them; the last steps train at the final sparsity. Above 70 % or so this
ends well below pruning at once and healing on the same tokens. It trains towards the text, or towards the
recipe's base model as `distill` does. Cost: that of training; a sort of the weights per update.

Exactly the asked number goes, per layer, over the model, or as N:M. Zeros alone make a model neither smaller
nor faster. The masks travel: later passes keep every zero.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.layerwise.sparsity import ScopedSparsity, check_pattern
from compress.models.layers import linear_layers, matrix
from compress.passes.base import Kind, Need, Pass
from compress.solvers import gradual
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL
from compress.training.loop import optimise
from compress.training.objectives.base import plain_text
from compress.training.setup import material_of
from compress.training.teaching.distillation import Distillation, distillation_objective
from compress.training.teaching.guidance import Guidance


class PruneGradual(Pass, Distillation, ScopedSparsity):
    """Magnitude pruning on Zhu and Gupta's schedule while training."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "heldout", "teacher"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    together: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = frozenset({CAUSAL})

    sparsity: float = Field(
        0.8, gt=0, lt=1, description="share of the selected weights that is zero in the end"
    )
    initial: float = Field(0.0, ge=0, lt=1, description="share at the first update")
    begin: float = Field(0.0, ge=0, lt=1, description="share of the steps before the first update")
    end: float = Field(0.7, gt=0, le=1, description="share of the steps after which nothing more goes")
    every: int = Field(10, ge=1, le=100_000, description="steps between updates")
    towards: Literal["text", "teacher"] = Field("teacher", description="what the weights that stay learn")
    tokens: int = Field(500_000, ge=1, description="tokens to train on, rounded up to whole steps")
    learning_rate: float = Field(2e-3, gt=0, le=10, description="of every optimizer but Muon")
    muon_learning_rate: float = Field(0.01, gt=0, le=1, description="Muon's, for the matrices in the blocks")

    @model_validator(mode="after")
    def _can_be_reached(self) -> "PruneGradual":
        if self.begin >= self.end:
            raise ValueError(f"begin: {self.begin} is not before end ({self.end}); lower it")
        if self.initial > self._final():
            raise ValueError(f"initial: {self.initial} is above the final sparsity {self._final()}; lower it")
        asked = [n for n, field in Guidance.model_fields.items() if getattr(self, n) != field.default]
        if self.towards == "text" and asked:
            raise ValueError(
                f"{asked[0]}: is for a teacher, and towards: text has none; leave one of them out"
            )
        return self

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers; raises UserError for one that the pattern does not fit."""
        self.check(model)
        return check_pattern(self, model, linear_layers(model, self.select, self.skip))

    def requires(self) -> frozenset[Need]:
        """The base only where it is a teacher."""
        learns = self.towards == "teacher" and self.learns_from_base()
        return self.needs if learns else self.needs - {"teacher"}

    def reads(self) -> tuple[str, ...]:
        """The teachers that are not the recipe's base."""
        return self.other_models() if self.towards == "teacher" else ()

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """Forward and backward, and a teacher's forward: 6 or 8 operations per parameter and token."""
        return (8.0 if self.towards == "teacher" else 6.0) * parameters * self.tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune and train a copy.

        Raises:
            UserError: a teacher has another vocabulary, or the text does not fill one batch.
        """
        result = bundle.clone()
        modules = {name: result.model.get_submodule(name) for name in self.layers(result.model)}
        masks = {name: mask.clone() for name, mask in bundle.masks.items()}
        for name, module in modules.items():
            masks.setdefault(name, torch.ones(matrix(module).shape, dtype=torch.bool))
        objective = plain_text() if self.towards == "text" else distillation_objective(self, result, context)
        steps = self.steps(material_of(self, objective, context))
        objective = objective.pruning(self._schedule(list(modules)), judge_from=self._last_update(steps) + 1)
        notes = optimise(result.model, self, objective, context, masks=masks, what="pruning")
        removed = sum(int((~masks[name]).sum()) for name in modules)
        total = sum(masks[name].numel() for name in modules)
        facts: dict[str, Any] = {"removed": removed, "of": total, "sparsity": removed / total}
        return result.evolve(masks=masks, exports={}, notes={**facts, **notes})

    def _schedule(self, names: list[str]) -> Callable[..., Mapping[str, Tensor]]:
        def masks(
            weights: Callable[[], Mapping[str, Tensor]],
            masks_so_far: Callable[[], Mapping[str, Tensor]],
            step: int,
            steps: int,
        ) -> Mapping[str, Tensor]:
            begin, end = self._first_update(steps), self._last_update(steps)
            if not begin <= step <= end or ((step - begin) % self.every and step != end):
                return {}
            scores = {name: weight.abs() for name, weight in weights().items() if name in names}
            kept = masks_so_far()
            now = gradual.sparsity_at(step, begin, end, self.initial, self._final())
            if self.group is not None:
                return gradual.shrink_to_pattern(scores, kept, now / self._final(), *self.group)
            shrink = gradual.shrink_each if self.scope == "layer" else gradual.shrink_all
            return shrink(scores, kept, now)

        return masks

    def _first_update(self, steps: int) -> int:
        return min(round(self.begin * steps), self._last_update(steps))

    def _last_update(self, steps: int) -> int:
        return min(round(self.end * steps), steps - 1)

    def _final(self) -> float:
        return self.sparsity if self.group is None else 1 - self.group[0] / self.group[1]
