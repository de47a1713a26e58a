"""Learning labels: what a head of any kind minimises on examples.

    one label         -sum_k t_k ln p_k,  t = (1 - s) onehot + s / labels (label smoothing s), times the
                      label's weight; of words the mean over those that carry a label
    several labels    the mean over labels of -t ln p - (1 - t) ln (1 - p)
    a number          (z - t)^2
    relevance         softplus(z) - t z of pairs whose numbers are 0 and 1 alone: binary cross-entropy, as
                      sentence-transformers trains a CrossEncoder of one output
    an answer         the mean over both ends of -sum_i t_i ln p_i, i the tokens of the text without
                      padding; label smoothing over all of them

The held-out loss is of the same kind, without smoothing and weights; or one minus the task's own score, so
that what is stopped by is what is asked for.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from compress.models.running import Precision, autocast, evaluating
from compress.tasks.base import UNKNOWN, Task
from compress.tasks.decisions import Decisions, Judged
from compress.text.examples import Examples
from compress.training.batches import Material
from compress.training.example_batches import padded, padded_targets
from compress.training.objectives.base import Asked, Moment, Objective

StopBy = Literal["loss", "score"]
LabelLoss = Callable[[Tensor, Tensor], Tensor]  # logits (examples, ..., labels), targets -> mean

PADDED = -1e4  # a logit so low that its probability is 0, and finite, so that 0 times it is 0
_TOGETHER = 32  # held-out examples per forward pass


def labelled_examples(
    task: Task,
    material: Material,
    heldout: Examples,
    padding: int,
    *,
    smoothing: float = 0.0,
    weights: NDArray[np.float64] | None = None,
    stop_by: StopBy = "loss",
    loss_kind: str | None = None,
) -> Objective:
    """The objective of a task that has labels.

    Args:
        task: of the model.
        material: the examples to learn from.
        heldout: those that decide which weights to keep; with none, those of the material's last epoch do.
        padding: the token that fills rows.
        smoothing: s.
        weights: of the labels, (labels,).
        stop_by: what is told of the held-out examples.
        loss_kind: `Examples.loss_kind` of those to learn from; None: the task's kind of labels.
    """
    kind = loss_kind or str(task.labels)
    minimised = label_loss(kind, smoothing, weights)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        return minimised(logits_of(task, outputs, inputs), targets)

    def judge(model: Any, precision: Precision) -> float:
        return heldout_loss(model, task, heldout, padding, precision, stop_by, kind)

    return Objective(loss, ask=ask, material=material, heldout=judge)


def logits_of(task: Task, outputs: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What a model with labels said, in float32: (texts, labels), of words (texts, length, labels), of
    answers (texts, length, 2), `PADDED` at what is no text."""
    found = task.given(outputs).float()
    return unpadded(task, found, inputs.get("attention_mask"))


def unpadded(task: Task, answers: Tensor, mask: Tensor | None) -> Tensor:
    """Answers (texts, length, width) with nothing for padding to win, where tokens compete for one label."""
    if task.labels != "span" or mask is None:
        return answers
    return answers.masked_fill((mask == 0)[..., None], PADDED)


def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
    """Padded examples, and what is right about them."""
    inputs = {name: value for name, value in more.items() if name != "targets"}
    return Asked({"input_ids": rows, **inputs}, more["targets"])


def label_loss(kind: str, smoothing: float = 0.0, weights: NDArray[np.float64] | None = None) -> LabelLoss:
    """What is minimised for labels of a kind (see the module's text)."""
    scale = None if weights is None else torch.from_numpy(weights.astype(np.float32))

    def one(logits: Tensor, targets: Tensor) -> Tensor:
        flat, wanted = logits.flatten(0, -2), targets.flatten()
        own = None if scale is None else scale.to(flat.device)
        return F.cross_entropy(flat, wanted, own, ignore_index=UNKNOWN, label_smoothing=smoothing)

    def several(logits: Tensor, targets: Tensor) -> Tensor:
        own = None if scale is None else scale.to(logits.device)
        wanted = targets.float() * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, wanted, own)

    def number(logits: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(logits.flatten(), targets.flatten().float())

    def relevance(logits: Tensor, targets: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits.flatten(), targets.flatten().float())

    def ends(logits: Tensor, targets: Tensor) -> Tensor:
        p = logits.transpose(1, 2).log_softmax(-1)  # (texts, length, 2) -> (texts, 2, length)
        right = p.gather(-1, targets[..., None])[..., 0]
        if not smoothing:
            return -right.mean()
        text = logits.transpose(1, 2) > PADDED
        all_alike = p.where(text, 0.0).sum(-1) / text.sum(-1)
        return -((1 - smoothing) * right + smoothing * all_alike).mean()

    losses = {"class": one, "tags": one, "classes": several, "number": number}
    return {**losses, "relevance": relevance, "span": ends}[kind]


@torch.no_grad()
def heldout_loss(
    model: Any,
    task: Task,
    examples: Examples,
    padding: int,
    precision: Precision,
    stop_by: StopBy,
    loss_kind: str | None = None,
) -> float:
    """The mean loss of examples, of the task's kind or another, or one minus their score."""
    device = next(model.parameters()).device
    loss, total, count = label_loss(loss_kind or str(task.labels)), 0.0, 0
    judged = Judged([], [], [], examples.names)
    with evaluating(model):
        for start in range(0, len(examples), _TOGETHER):
            items = list(examples.items[start : start + _TOGETHER])
            ids, mask, types = padded(items, padding)
            given = {"attention_mask": mask} | ({} if types is None else {"token_type_ids": types})
            more = {name: torch.from_numpy(value).to(device) for name, value in given.items()}
            targets = torch.from_numpy(padded_targets(items, ids.shape[1], examples.kind)).to(device)
            with autocast(device, precision):
                answers = task.answers(model, torch.from_numpy(ids).to(device), **more).float()
            answers = unpadded(task, answers, more["attention_mask"])
            weight = int((targets != UNKNOWN).sum()) if task.labels == "tags" else len(items)
            total += float(loss(answers[:, 0] if task.pooled else answers, targets)) * weight
            count += weight
            for item, rows in zip(items, answers.cpu().numpy(), strict=True):
                question = task.asked(item)
                own = rows if task.pooled else rows[: len(item.ids)]
                if (decided := task.decided(task.scoring.kept(own[question.rows]), question)) is not None:
                    judged.add(decided)
    if stop_by == "loss":
        return total / count
    scoring = task.scoring
    assert isinstance(scoring, Decisions)
    return 1.0 - float(scoring.statistic(judged)(np.ones((1, len(judged.decisions))))[0])
