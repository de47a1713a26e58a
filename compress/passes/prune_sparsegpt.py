"""prune_sparsegpt: zeros chosen column by column, each column's loss made good by those not yet visited.

The method is solvers/sparsegpt.py's, over the walk of layerwise/prune.py: layers in order, through those
already pruned, with a target that makes good what was lost before. Any share of zeros or any N:M. Needs
calibration text; costs about as much as quantize_gptq.

Zeros alone make a model neither faster nor smaller; stored by `store_sparse` it is smaller.
"""

from typing import ClassVar

from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.layerwise.prune import Prune, sparsify
from compress.layerwise.sparsity import SparsityGoal, check_goal
from compress.layerwise.target import Aim, Correction
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.solvers.sparsegpt import sparsegpt
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class PruneSparsegpt(Pass, Correction, SparsityGoal):
    """SparseGPT, unstructured or N:M."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    streams: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    block: int = Field(128, ge=1, description="columns whose zeros are chosen together")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers; raises UserError where the goal does not fit them."""
        return check_goal(self, model, linear_layers(model, self.select, self.skip))

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """About two forward passes over the calibration text, their second moments, and the solver."""
        return (4.0 + 6.0) * parameters * calibration_tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune a copy. Zeros are exactly as many as asked, or as the masks it carries have if more."""

        def solver(aim: Aim) -> Prune:
            return lambda weight, target, carried: sparsegpt(weight, aim.factor, target, carried, self.block)

        names = self.layers(bundle.model)
        return sparsify(bundle, context, names, self, self, solver, self.name())
