"""prune_magnitude: set the smallest weights to zero.

Per layer (`scope: layer`), or with one threshold for all of them (`scope: model`), or a pattern such as
2:4. Exactly the asked number goes. Zeros alone make a model neither faster nor smaller; stored by
`store_sparse` it is smaller. The masks travel: healing and quantizing keep every zero.

Han et al. 2015, arXiv 1506.02626; one threshold for all layers: Frankle and Carbin 2019. Calibration text is
only looked at for an `allocation` other than uniform.
"""

from typing import ClassVar, Self

import torch
from pydantic import model_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.layerwise.prune import counts
from compress.layerwise.sparsity import ScopedSparsity, SparsityGoal, check_goal, targets
from compress.models.layers import linear_layers, matrix, put_weight
from compress.passes.base import Kind, Need, Pass
from compress.solvers import masks as solve
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class PruneMagnitude(Pass, SparsityGoal, ScopedSparsity):
    """Unstructured or N:M pruning by the size of the weights."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    tasks: ClassVar[frozenset[Task]] = TASKS

    @model_validator(mode="after")
    def _one_threshold_leaves_nothing_to_allocate(self) -> Self:
        if self.scope == "model" and self.allocation != "uniform":
            raise ValueError(
                f"allocation: '{self.allocation}' shares zeros out among layers, scope: model has one "
                "threshold for all; give one of the two"
            )
        return self

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers; raises UserError where the goal does not fit them."""
        return check_goal(self, model, linear_layers(model, self.select, self.skip))

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune; the new masks are added to those the bundle already carries."""
        result = bundle.clone()
        names = self.layers(result.model)
        windows = torch.from_numpy(context.data.calibration.tokens).long()
        goals = targets(
            self, result.model, names, bundle.masks, windows, score=_size, precision=context.precision
        )
        weights = {name: matrix(result.model.get_submodule(name)) for name in names}
        carried = {name: bundle.masks.get(name) for name in names}
        if self.scope == "model":
            masks = _one_threshold(weights, carried, sum(t for t in goals.values() if isinstance(t, int)))
        else:
            masks = {n: solve.best(weights[n].abs(), goals[n], carried[n]) for n in names}
        for name, mask in masks.items():
            put_weight(result.model.get_submodule(name), weights[name].masked_fill(~mask, 0.0))
        zeros = {name: (int((~mask).sum()), mask.numel()) for name, mask in masks.items()}
        return result.evolve(masks={**bundle.masks, **masks}, notes=counts(zeros))


def _size(weight: Tensor, _: Tensor) -> Tensor:
    return weight.abs()


def _one_threshold(
    weights: dict[str, Tensor], carried: dict[str, Tensor | None], count: int
) -> dict[str, Tensor]:
    """The masks of layers whose weights are compared with all others'."""
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()])
    kept = [
        torch.ones(weight.numel(), dtype=torch.bool) if (mask := carried[name]) is None else mask.flatten()
        for name, weight in weights.items()
    ]
    parts = solve.best(everything, count, torch.cat(kept)).split([w.numel() for w in weights.values()])
    return {n: part.view_as(weight) for (n, weight), part in zip(weights.items(), parts, strict=True)}
