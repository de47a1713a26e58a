"""Distillation: learn a teacher's distribution, not only what is right.

    loss = (1 - w) T^2 KL(softmax(y / T) || softmax(z / T)) + w cross-entropy        (y teacher, z student)

Hinton, Vinyals & Dean 2015; other divergences, hidden states and relations (training/teaching/matching.py),
the student's own text (training/teaching/onpolicy.py) by fields. What stands in the place of the next token
in a model that is no decoder, hidden tokens, labels, embeddings, training/teaching/by_task.py says. Two uses,
one pass: healing a pruned model (its masks hold: pruned weights stay zero) and training a student, best one
that starts from its teacher's weights (`student`, `prune_structured`). The teacher runs beside the student, a
forward pass per batch, about a third of a training step; or, of a decoder, it runs once beforehand and leaves
sampled targets (training/teaching/sampled.py), which pays where windows are seen more than once or the
teacher is large.
"""

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task
from compress.tasks.next_sentence import MASKED_NEXT
from compress.tasks.registry import TASKS, task_of
from compress.training.loop import optimise
from compress.training.teaching.by_task import require_fields, teaching_objective
from compress.training.teaching.fields import Teaching


class Distill(Pass, Teaching):
    """Train towards the distribution of the recipe's base model, or of other teachers."""

    kind: ClassVar[Kind] = "distill"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "heldout", "teacher"})
    uses_labels: ClassVar[bool] = True
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    together: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = TASKS - {MASKED_NEXT}  # what two heads say is not taught

    tokens: int = Field(250_000, ge=1, description="tokens to train on, rounded up to whole steps")
    learning_rate: float = Field(2e-3, gt=0, le=10, description="of every optimizer but Muon")
    muon_learning_rate: float = Field(0.01, gt=0, le=1, description="Muon's, for the matrices in the blocks")
    decay: float = Field(0.8, ge=0, le=1, description="share of the steps (wsd only)")

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks (and embeddings, norms and the head besides).

        Raises UserError for a field that is of another kind of model.
        """
        self.check(model)
        config: Any = model.config
        require_fields(self, task_of(config))
        return linear_layers(model)

    def requires(self) -> frozenset[Need]:
        """The base only where it is a teacher."""
        return self.needs if self.learns_from_base() else self.needs - {"teacher"}

    def wants_labels(self, task: Task) -> bool:
        """A model with a head for labels learns from labelled texts, unless from plain text alone; one that
        predicts tokens learns from either."""
        return task.labels is not None and not task.predicts and self.unlabelled < 1

    def reads(self) -> tuple[str, ...]:
        """The teachers that are not the recipe's base."""
        return self.other_models()

    def flops(self, parameters: int, calibration_tokens: int) -> float:
        """Forward and backward, and the teacher's forward: 8 operations per parameter and token."""
        return 8.0 * parameters * self.tokens

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Train a copy of the bundle's model towards the teacher.

        Raises:
            UserError: a teacher has another vocabulary, task or labels, or the texts do not fill one batch.
        """
        result = bundle.clone()
        objective = teaching_objective(self, result, context)
        notes = optimise(result.model, self, objective, context, masks=bundle.masks, what="distilling")
        return result.evolve(exports={}, notes=notes)
