"""Chats: what a decoder learns from what its assistant is to say, and from nothing else.

    loss = mean over the tokens of answers of -ln p(token | all of the chat before it)

What is said to the assistant is read, and no loss is on it. A head that is one module (`lm_head`) is given
the positions that an answer's token follows, and no others. The held-out loss is the same, without label
smoothing; the mean is over tokens, not over chats, as all nats of this package are.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.running import Precision, autocast, evaluating
from compress.tasks.base import UNKNOWN
from compress.text.examples import Examples
from compress.training.batches import Material
from compress.training.example_batches import padded, padded_targets
from compress.training.objectives.base import Asked, Moment, Objective
from compress.training.objectives.losses import chunked, cross_entropy
from compress.training.objectives.masked import Chosen

_TOGETHER = 8  # held-out chats per forward pass


def answers_of_chats(
    material: Material, heldout: Examples, padding: int, *, smoothing: float = 0.0
) -> Objective:
    """The objective.

    Args:
        material: the chats to learn from.
        heldout: those that decide which weights to keep.
        padding: the token that fills rows.
        smoothing: share of each target spread over the vocabulary.
    """
    chosen = Chosen()
    minimised = partial(F.cross_entropy, label_smoothing=smoothing) if smoothing else cross_entropy

    def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        targets = more["targets"]
        chosen.places = targets != UNKNOWN
        inputs = {"input_ids": rows, "attention_mask": more["attention_mask"], "use_cache": False}
        return Asked(inputs, targets)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        asked, logits = targets != UNKNOWN, outputs.logits
        chosen.places = None
        logits = logits if logits.dim() == 2 else logits[asked]
        if smoothing:
            logits = logits.float()
        return chunked(minimised, logits, targets[asked])

    def judge(model: Any, precision: Precision) -> float:
        return heldout_answers(model, heldout, padding, precision)

    return Objective(loss, ask=ask, watch=chosen.watch, material=material, heldout=judge)


@torch.no_grad()
def heldout_answers(model: Any, chats: Examples, padding: int, precision: Precision) -> float:
    """Mean nats per token of answers."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    with evaluating(model):
        for start in range(0, len(chats), _TOGETHER):
            items = list(chats.items[start : start + _TOGETHER])
            ids, mask = (torch.from_numpy(part) for part in padded(items, padding)[:2])
            targets = torch.from_numpy(padded_targets(items, ids.shape[1], chats.kind)).to(device)
            with autocast(device, precision):
                logits = model(
                    input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
                ).logits
            asked = targets != UNKNOWN
            total += float(F.cross_entropy(logits[asked].float(), targets[asked], reduction="sum"))
            count += int(asked.sum())
    return total / count
