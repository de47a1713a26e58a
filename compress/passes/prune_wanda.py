"""prune_wanda: zeros where weight times input is smallest; the other weights stay as they are.

The scores are solvers/wanda.py's, over the walk of layerwise/prune.py: layers in order, through those
already pruned. Any share of zeros or any N:M, compared inside each output row. Needs calibration text; costs
one forward pass over it.

Zeros alone make a model neither faster nor smaller; stored by `store_sparse` it is smaller.
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.layerwise.prune import Prune, sparsify
from compress.layerwise.sparsity import SparsityGoal, check_goal
from compress.layerwise.target import Aim, Correction
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.solvers.masks import Quota
from compress.solvers.wanda import wanda
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class PruneWanda(Pass, SparsityGoal):
    """Wanda, unstructured or N:M."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    streams: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    batch: int | None = Field(
        None, ge=1, le=1024, description="calibration windows per forward pass; null: about 2048 tokens"
    )

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers; raises UserError where the goal does not fit them."""
        return check_goal(self, model, linear_layers(model, self.select, self.skip))

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """A forward pass over the calibration text, and its second moments."""
        return (2.0 + 4.0) * parameters * calibration_tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune a copy. Zeros are exactly as many as asked, or as the masks it carries have if more."""

        def solver(aim: Aim) -> Prune:
            squares = aim.hessian.diagonal()

            def prune(weight: Tensor, target: Quota, carried: Tensor | None) -> tuple[Tensor, Tensor]:
                mask = wanda(weight, squares, target, carried)
                return weight.masked_fill(~mask, 0.0), mask

            return prune

        plain = Correction(asymmetric=0, batch=self.batch)  # weights that stay are not changed
        names = self.layers(bundle.model)
        return sparsify(bundle, context, names, self, plain, solver, self.name())
