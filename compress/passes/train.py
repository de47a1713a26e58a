"""Training from random weights, or further training: next-token cross-entropy on the recipe's text."""

from typing import ClassVar

from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL
from compress.training.loop import optimise
from compress.training.objectives.base import plain_text
from compress.training.plan import Optimization


class Train(Pass, Optimization):
    """Minimise the mean of -log p(next token); pruned weights stay zero."""

    kind: ClassVar[Kind] = "train"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "heldout"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    together: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = frozenset({CAUSAL})

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks (and embeddings and norms besides)."""
        self.check(model)
        return linear_layers(model)

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """Forward and backward of every token: 6 operations per parameter."""
        return 6.0 * parameters * self.tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Train a copy of the bundle's model.

        Raises:
            UserError: the text does not fill one batch.
        """
        result = bundle.clone()
        notes = optimise(result.model, self, plain_text(), context, masks=bundle.masks)
        return result.evolve(exports={}, notes=notes)
