"""Training: what a model learns from plain text, by what it is for.

    a decoder            the mean of -log p(next token)
    an encoder           the mean of -log p(hidden token), hidden anew each epoch (objectives/masked.py)
    with a second head   the same of pairs, and of whether they follow (objectives/next_sentence.py)
    an encoder-decoder   spans that were taken out, and how a text goes on (objectives/spans.py)

Pruned weights stay zero, so it heals as well. Cost: 6 operations per parameter and token. Limits: text alone;
labels are for `finetune`, a teacher for `distill`.
"""

from typing import Any, ClassVar

from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.models.layers import linear_layers
from compress.passes.base import Kind, Need, Pass
from compress.tasks.base import Task
from compress.tasks.causal import CAUSAL
from compress.tasks.masked import HIDDEN, MASKED
from compress.tasks.next_sentence import MASKED_NEXT
from compress.tasks.registry import task_of
from compress.tasks.seq2seq import SEQ2SEQ
from compress.training.loop import optimise
from compress.training.objectives.base import Objective, plain_text
from compress.training.objectives.masked import masked_text
from compress.training.objectives.next_sentence import pairs_of_text
from compress.training.objectives.spans import spans_of_text
from compress.training.plan import Optimization

# the fields that are of some tasks alone, by the words for these
_OWN = {
    MASKED.noun: ((MASKED, MASKED_NEXT), ("hidden", "whole_words")),
    SEQ2SEQ.noun: ((SEQ2SEQ,), ("spans",)),
}


class Train(Pass, Optimization):
    """Learn plain text by the model's task: next tokens, hidden tokens, spans; pruned weights stay zero."""

    kind: ClassVar[Kind] = "train"
    needs: ClassVar[frozenset[Need]] = frozenset({"train", "heldout"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})
    together: ClassVar[bool] = True
    tasks: ClassVar[frozenset[Task]] = frozenset({CAUSAL, MASKED, MASKED_NEXT, SEQ2SEQ})

    hidden: float = Field(HIDDEN, gt=0, lt=1, description="share of tokens that are hidden (encoders)")
    whole_words: bool = Field(False, description="hide all pieces of a word together (encoders)")
    spans: float = Field(
        0.5, ge=0, le=1, description="share of steps that take spans out; the others go on with a text "
        "(encoder-decoders)"
    )  # fmt: skip

    def layers(self, model: nn.Module) -> list[str]:
        """All linear layers of the blocks (and embeddings and norms besides).

        Raises UserError for a field that is of another kind of model.
        """
        self.check(model)
        config: Any = model.config
        task = task_of(config)
        for other, (tasks, names) in _OWN.items():
            for name in names if task not in tasks else ():
                if getattr(self, name) != type(self).model_fields[name].default:
                    raise UserError(f"train.{name}: is for {other}, and this is {task.noun}; leave it out")
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
        objective = self._objective(result, context)
        notes = optimise(result.model, self, objective, context, masks=bundle.masks)
        return result.evolve(exports={}, notes=notes)

    def _objective(self, bundle: Bundle, context: Context) -> Objective:
        task = task_of(bundle.model.config)
        if task in (MASKED, MASKED_NEXT):
            objective = masked_text if task is MASKED else pairs_of_text
            return objective(
                self, bundle.model, bundle.tokenizer, context,
                share=self.hidden, whole_words=self.whole_words,
            )  # fmt: skip
        if task is SEQ2SEQ:
            return spans_of_text(self, bundle.model, bundle.tokenizer, context, share=self.spans)
        return plain_text()
