"""What a pass gives the loop: a loss, and what it needs around it."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from compress.models.running import Precision
from compress.training.batches import Material
from compress.training.objectives.losses import chunked, cross_entropy


class Moment(NamedTuple):
    """Where in a run a loss is asked for.

    Attributes:
        step: from 0.
        steps: of the whole run.
        windows: number of each row's window in the text (`Batches.numbers`), (rows,).
        start: first position of the rows that counts; those before are a prompt.
    """

    step: int
    steps: int
    windows: NDArray[np.int64]
    start: int = 0

    @property
    def share(self) -> float:
        """Of the run that is done, 0 <= share < 1."""
        return self.step / self.steps


class Asked(NamedTuple):
    """What a model is called with, and what it should give.

    Attributes:
        inputs: of the call, by name; `input_ids` (rows, window) among them.
        targets: (rows, window) tokens; or what the objective makes of them.
    """

    inputs: Mapping[str, Any]
    targets: Tensor


# (rows of a micro-batch, what else belongs to them, moment) -> question
Ask = Callable[[Tensor, Mapping[str, Tensor], Moment], Asked]
# (model outputs with .logits (rows, window, vocab), inputs, targets (rows, window), moment) -> mean
Loss = Callable[[Any, Mapping[str, Any], Tensor, Moment], Tensor]
# (model, precision) -> held-out loss
Heldout = Callable[[Any, Precision], float]
# (model, rows (rows, window + 1), moment) -> rows to train on instead, and their first position that counts
Rewrite = Callable[[Any, Tensor, Moment], tuple[Tensor, int]]
# (() -> layer name -> weight (out, in), () -> layer name -> mask so far, step, steps) -> masks that change
MaskSchedule = Callable[
    [Callable[[], Mapping[str, Tensor]], Callable[[], Mapping[str, Tensor]], int, int], Mapping[str, Tensor]
]


@dataclass(frozen=True)
class Objective:
    """One kind of training.

    Attributes:
        loss: what is minimised: a mean over positions.
        extra: modules that learn beside the model and are thrown away.
        watch: lasts as long as the model trains; puts hooks on it and takes them off again.
        rewrite: replaces the rows of a micro-batch, None to train on the text as it is.
        ask: makes the question of the rows: by default, every token from those before it.
        material: what is learnt from; None: windows of the training text.
        heldout: what decides which weights to keep; None: nats per token of the held-out windows.
        moving: every epoch cuts the text elsewhere; False: always the same windows.
        masks: a schedule of masks, for the layers that `optimise` was given masks of.
        judge_from: the first step whose weights may be kept: before it the model is not yet what is asked.
        identity: what else the result depends on (a teacher's digest): a checkpoint of another is ignored.
        notes: facts about it for the record.
    """

    loss: Loss
    extra: nn.Module = field(default_factory=nn.Module)
    watch: Callable[[Any], AbstractContextManager[None]] = lambda model: nullcontext()
    rewrite: Rewrite | None = None
    ask: Ask = field(default_factory=lambda: next_token)
    material: Material | None = None
    heldout: Heldout | None = None
    moving: bool = True
    masks: MaskSchedule | None = None
    judge_from: int = 0
    identity: str = ""
    notes: Mapping[str, Any] = field(default_factory=dict)

    def pruning(self, masks: MaskSchedule, judge_from: int) -> "Objective":
        """The same with masks that change."""
        return replace(self, masks=masks, judge_from=judge_from)


def next_token(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
    """Every token from those before it: rows (rows, window + 1)."""
    return Asked({"input_ids": rows[:, :-1], "use_cache": False}, rows[:, 1:])


def plain_text() -> Objective:
    """The objective of predicting the text's next token, without a teacher."""

    def loss(outputs: Any, inputs: Mapping[str, Any], text: Tensor, moment: Moment) -> Tensor:
        return chunked(cross_entropy, outputs.logits.flatten(0, 1), text.flatten())

    return Objective(loss)
