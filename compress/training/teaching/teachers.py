"""One teacher or several, seen as one distribution.

Several are mixed as  p_T = sum_i w_i softmax(y_i / T),  w_i > 0 summing to 1: the mean of what they hold
likely, which keeps a mode that only one of them knows (You et al. 2017, "Learning from multiple teacher
networks").
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.context import Original
from compress.errors import UserError
from compress.models.attention import panel_attention
from compress.models.running import Precision, autocast
from compress.tasks.base import longest_text
from compress.tasks.registry import task_of
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
            UserError: a teacher is for another task or has another vocabulary than the student, or takes only
                shorter windows.
        """
        for bundle, _ in bundles:
            _require_same_task(name, student, bundle)
            require_teaches(name, _side(student), _side(bundle), window)
        total = sum(weight for _, weight in bundles)
        self.models = [bundle.model.to(device).eval() for bundle, _ in bundles]
        self.weights = [weight / total for _, weight in bundles]
        self.sources = [str(bundle.lineage.source) for bundle, _ in bundles]
        self.device, self.precision = device, precision
        self.rows = _rows(student.model)

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
        return self.mixed(answers, temperature)

    @torch.no_grad()
    def outputs(self, inputs: Mapping[str, Any]) -> list[Any]:
        """What each of them gives for the inputs of a call."""
        with autocast(self.device, self.precision):
            return [model(**inputs) for model in self.models]

    def mixed(self, answers: list[Tensor], temperature: float) -> Tensor:
        """y with softmax(y / T) the mean of the teachers' distributions, of their logits (n, v) each."""
        if len(answers) == 1:
            return answers[0]
        logs = [
            torch.log_softmax(y.float() / temperature, dim=-1) + math.log(weight)
            for y, weight in zip(answers, self.weights, strict=True)
        ]
        return temperature * torch.logsumexp(torch.stack(logs), dim=0)


def _require_same_task(name: str, student: Original, teacher: Original) -> None:
    """Refuse a teacher that answers another question than the student."""
    own, other = task_of(student.model.config), task_of(teacher.model.config)
    if own is not other:
        raise UserError(
            f"{name}: the teacher '{teacher.lineage.source}' is {other.noun} ({other}) and the student "
            f"{own.noun} ({own}); take a teacher of the same task"
        )


class Side(NamedTuple):
    """What must agree between student and teacher; `words`, token -> id, None where it is not known yet."""

    source: str
    words: Mapping[str, int] | None
    rows: int
    longest: int


def side(source: str, model: Any, tokenizer: Any) -> Side:
    """Of a model, which may be without data, and its tokenizer, which may be None."""
    words = None if tokenizer is None else tokenizer.get_vocab()
    return Side(source, words, _rows(model), longest_text(model))


def require_teaches(name: str, student: Side, teacher: Side, window: int) -> None:
    """Refuse a teacher that cannot teach this student.

    The tokens must be the same; rows beyond the last, padding of the matrices, the teacher may have more of.

    Raises:
        UserError: it has another vocabulary than the student, or takes only shorter windows.
    """
    if student.words is not None and teacher.words is not None:
        if student.words != teacher.words:
            raise UserError(
                f"{name}: the teacher '{teacher.source}' has another tokenizer ({len(teacher.words)} tokens) "
                f"than the student '{student.source}' ({len(student.words)}); both must share one: distil "
                "from one of the same vocabulary"
            )
        if teacher.rows < student.rows:
            raise UserError(
                f"{name}: the teacher '{teacher.source}' predicts {teacher.rows} tokens and the student "
                f"'{student.source}' {student.rows}, with one tokenizer; take a teacher with as many"
            )
    if teacher.longest < window:
        raise UserError(
            f"{name}.window: {window} tokens, but the teacher '{teacher.source}' takes at most "
            f"{teacher.longest}"
        )


def _side(bundle: Original) -> Side:
    return side(str(bundle.lineage.source), bundle.model, bundle.tokenizer)


def _rows(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])
