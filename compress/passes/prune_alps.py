"""prune_alps: which weights go and what the others become, decided together by ADMM.

The method is solvers/alps.py's, over the walk of layerwise/prune.py: layers in order, through those
already pruned, with a target that makes good what was lost before. Any share of zeros or any N:M. Needs
calibration text. On layers of SmolLM2-135M at 50 % the output error was 0.57 to 0.67 of SparseGPT's, for some
ten times its cost: minutes for that model on one core. Very wide layers take long, since the eigenvectors of
H cost 10 in^3; and they are solved whole, with five copies of the weight in memory.

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
from compress.solvers.alps import alps, spectrum
from compress.tasks.base import Task
from compress.tasks.registry import TASKS


class PruneAlps(Pass, Correction, SparsityGoal):
    """ALPS, unstructured or N:M."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    streams: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS

    steps: int = Field(300, ge=1, le=10_000, description="of ADMM at most; it ends when the support settles")
    fitting: int = Field(10, ge=0, le=1000, description="conjugate-gradient steps on the final support")

    def layers(self, model: nn.Module) -> list[str]:
        """The selected linear layers; raises UserError where the goal does not fit them."""
        return check_goal(self, model, linear_layers(model, self.select, self.skip))

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """As prune_sparsegpt, and some 50 steps of ADMM on matrices about 1000 wide."""
        return (4.0 + 6.0) * parameters * calibration_tokens + 50 * 4000.0 * parameters

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Prune a copy. Zeros are exactly as many as asked, or as the masks it carries have if more."""

        def solver(aim: Aim) -> Prune:
            shared = spectrum(aim.hessian, aim.factor.ridge)
            return lambda weight, target, carried: alps(
                weight, shared, target, carried, steps=self.steps, fitting=self.fitting
            )

        names = self.layers(bundle.model)
        return sparsify(bundle, context, names, self, self, solver, self.name())
