"""One teacher or several, seen as one distribution.

Several are mixed as  p_T = sum_i w_i softmax(y_i / T),  w_i > 0 summing to 1: the mean of what they hold
likely, which keeps a mode that only one of them knows (You et al. 2017, "Learning from multiple teacher
networks").
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.context import Original
from compress.errors import UserError
from compress.models.attention import panel_attention
from compress.models.running import Precision, autocast
from compress.tasks.base import longest_text
from compress.training import checkpoint


class Teacher(BaseModel):
    """A model to learn from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        "base", min_length=1, description="base: the recipe's; or a folder, .gguf file or hub id"
    )
    weight: float = Field(1.0, gt=0, description="share in the mean of the distributions")


class Teachers:
    """Models on one device, in eval mode, and their weights, which sum to 1."""

    def __init__(
        self,
        student: Original,
        bundles: list[tuple[Original, float]],
        device: torch.device,
        precision: Precision,
        name: str,
        window: int,
    ) -> None:
        """Check and place them.

        Raises:
            UserError: a teacher has another vocabulary than the student, or takes only shorter windows.
        """
        for bundle, _ in bundles:
            _same_vocabulary(name, student, bundle)
            if (longest := longest_text(bundle.model)) < window:
                raise UserError(
                    f"{name}.window: {window} tokens, but the teacher '{bundle.lineage.source}' takes at "
                    f"most {longest}"
                )
        total = sum(weight for _, weight in bundles)
        self.models = [bundle.model.to(device).eval() for bundle, _ in bundles]
        self.weights = [weight / total for _, weight in bundles]
        self.sources = [str(bundle.lineage.source) for bundle, _ in bundles]
        self.device, self.precision = device, precision
        self.rows = _rows(student)

    @property
    def digest(self) -> str:
        """Of all weights."""
        return " ".join(
            f"{w:.17g}*{checkpoint.digest(m)}" for m, w in zip(self.models, self.weights, strict=True)
        )

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Fast attention while the block runs."""
        with ExitStack() as during:
            for model in self.models:
                during.enter_context(panel_attention(model))
            yield

    @torch.no_grad()
    def logits(self, tokens: Tensor, temperature: float) -> Tensor:
        """y with softmax(y / T) the (mixed) distribution: (rows, window) -> (rows * window, vocabulary)."""
        with autocast(self.device, self.precision):
            answers = [m(input_ids=tokens, use_cache=False).logits.flatten(0, 1) for m in self.models]
        answers = [y if y.shape[1] == self.rows else y[:, : self.rows].contiguous() for y in answers]
        if len(answers) == 1:
            return answers[0]
        logs = [
            torch.log_softmax(y.float() / temperature, dim=-1) + math.log(weight)
            for y, weight in zip(answers, self.weights, strict=True)
        ]
        return temperature * torch.logsumexp(torch.stack(logs), dim=0)


def _rows(bundle: Original) -> int:
    return int(bundle.model.get_input_embeddings().weight.shape[0])


def _same_vocabulary(name: str, student: Original, teacher: Original) -> None:
    """Of tokens; rows beyond the last, padding of the matrices, the teacher may have more of."""
    vocabularies = [b.tokenizer.get_vocab() for b in (student, teacher)]
    if vocabularies[0] != vocabularies[1]:
        sizes = [len(v) for v in vocabularies]
        raise UserError(
            f"{name}: the teacher '{teacher.lineage.source}' has another tokenizer ({sizes[1]} tokens) than "
            f"the student '{student.lineage.source}' ({sizes[0]}); both must share one: distil from one of "
            "the same vocabulary"
        )
    rows = [_rows(b) for b in (student, teacher)]
    if rows[1] < rows[0]:
        raise UserError(
            f"{name}: the teacher '{teacher.lineage.source}' predicts {rows[1]} tokens and the student "
            f"'{student.lineage.source}' {rows[0]}, with one tokenizer; take a teacher with as many"
        )
