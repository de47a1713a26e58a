"""Distillation: learn the recipe's base model's distribution, not only the text.

    loss = (1 - w) T^2 KL(softmax(y / T) || softmax(z / T)) + w cross-entropy        (y teacher, z student)

Hinton, Vinyals & Dean 2015. Two uses, one pass: healing a pruned model (its masks hold: pruned weights
stay zero) and training a student, best one that starts from its teacher's layers (`prune_layers`). The
teacher runs beside the student; below some 30 M parameters that is cheaper than storing its answers.
Cost: a forward pass of the teacher per batch, about a third of its training step.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.bundle import Bundle
from compress.errors import UserError
from compress.passes.base import Context, Kind, Need, Pass, linear_layers
from compress.training import checkpoint
from compress.training.forward import autocast, plain_attention
from compress.training.loop import optimise
from compress.training.objectives import Divergence, chunked, distillation
from compress.training.plan import Optimization
from compress.training.task import Moment, Task


class Distill(Pass, Optimization):
    """Train towards the distribution of the recipe's base model."""

    kind: ClassVar[Kind] = "distill"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "heldout", "teacher"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    tokens: int = Field(250_000, ge=1, description="tokens to train on, rounded up to whole steps")
    divergence: Divergence = Field(
        "forward_kl", description="from the teacher's distribution to the student's"
    )
    temperature: float = Field(1.0, gt=0, le=100)
    cross_entropy: float = Field(0.2, ge=0, le=1, description="w: the weight of the text itself")
    learning_rate: float = Field(2e-3, gt=0, le=1, description="AdamW's")
    muon_learning_rate: float = Field(0.01, gt=0, le=1, description="Muon's, for the matrices in the blocks")
    decay: float = Field(0.8, ge=0, le=1, description="share of the steps (wsd only)")

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks (and embeddings and norms besides)."""
        self.check(model)
        return linear_layers(model)

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """Forward and backward, and the teacher's forward: 8 operations per parameter and token."""
        return 8.0 * parameters * self.tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Train a copy of the bundle's model towards the teacher.

        Raises:
            UserError: the teacher has another vocabulary, or the text does not fill one batch.
        """
        teacher = context.teacher()
        _same_vocabulary(bundle, teacher)
        guide = teacher.model.to(context.device).eval()
        result = bundle.clone()

        def objective(outputs: object, inputs: Tensor, targets: Tensor, moment: Moment) -> Tensor:
            with torch.no_grad(), autocast(context.device, context.precision):
                wanted = guide(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
            logits: Tensor = outputs.logits  # type: ignore[attr-defined]
            return chunked(self._loss, logits.flatten(0, 1), wanted, targets.flatten())

        window = self.window or context.data.window
        with plain_attention(guide, window):
            notes = optimise(
                result.model,
                self,
                Task(objective),
                context.data.train,
                context.data.heldout.tokens,
                window=window,
                seed=context.seed,
                workdir=context.workdir,
                device=context.device,
                precision=context.precision,
                logs=context.logs,
                masks=bundle.masks,
                identity=checkpoint.digest(guide),
                what="distilling",
            )
        return result.evolve(exports={}, notes=notes)

    def _loss(self, logits: Tensor, wanted: Tensor, targets: Tensor) -> Tensor:
        return distillation(logits, wanted, targets, self.divergence, self.temperature, self.cross_entropy)


def _same_vocabulary(student: Bundle, teacher: Bundle) -> None:
    rows = [b.model.get_input_embeddings().weight.shape[0] for b in (student, teacher)]
    if rows[0] != rows[1] or student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UserError(
            f"distill: the teacher '{teacher.lineage.source}' has another tokenizer ({rows[1]} tokens) than "
            f"the student '{student.lineage.source}' ({rows[0]}); both must share one: distil from one of "
            "the same vocabulary"
        )
