"""Learning targets that are texts: what an encoder-decoder minimises on sources and what is to come of them.

    loss = mean over the batch's target tokens, the end among them, of -sum_k t_k ln p_k,
           t = (1 - s) onehot + s / vocabulary (label smoothing s)

each from the whole source and the target before it. Rows are padded on the right: a source's padding is
masked from both stacks; a target's comes after its end, where nothing that counts looks, and counts for
nothing.

The held-out loss is the same without smoothing; or one minus the mean ROUGE-L of what the model writes,
greedily, of the held-out sources, no longer than their longest target (tasks/written.py): what it is judged
by. Cost of that: a call per token, for a batch of sources at a time.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.models.running import Precision, autocast, evaluating
from compress.tasks.base import UNKNOWN, Example
from compress.tasks.seq2seq import SEQ2SEQ, proceed, read, shifted, start_token
from compress.tasks.written import greedily, row_scores
from compress.text.examples import Examples
from compress.training.batches import Material
from compress.training.example_batches import padded, padded_targets
from compress.training.objectives.base import Ask, Asked, Moment, Objective
from compress.training.objectives.labelled import StopBy
from compress.training.objectives.losses import chunked, cross_entropy

_TOGETHER = 32  # held-out examples per forward pass


def texts_of_texts(
    model: Any,
    material: Material,
    heldout: Examples,
    tokenizer: Any,
    *,
    smoothing: float = 0.0,
    stop_by: StopBy = "loss",
) -> Objective:
    """The objective.

    Args:
        model: an encoder-decoder.
        material: the examples to learn from.
        heldout: those that decide which weights to keep.
        tokenizer: makes text of tokens, and says which one ends a text.
        smoothing: s.
        stop_by: what is told of the held-out examples.
    """
    padding = tokenizer.pad_token_id or 0

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        right = targets.flatten()
        counts = right != UNKNOWN
        function = partial(_smoothed, smoothing) if smoothing else cross_entropy
        return chunked(function, outputs.logits.flatten(0, 1)[counts], right[counts])

    def judge(model: Any, precision: Precision) -> float:
        return heldout_texts(model, heldout, tokenizer, precision, stop_by)

    ask = pairs_of(start_token(model), padding)
    return Objective(loss, ask=ask, material=material, heldout=judge)


def pairs_of(start: int, padding: int) -> Ask:
    """What asks for the targets of padded examples."""

    def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        targets = more["targets"]
        text = shifted(targets, start).masked_fill(shifted(targets, start) == UNKNOWN, padding)
        mask = more["attention_mask"]
        inputs = {"input_ids": rows, "attention_mask": mask, "decoder_input_ids": text, "use_cache": False}
        return Asked(inputs, targets)

    return ask


@torch.no_grad()
def heldout_texts(
    model: Any, examples: Examples, tokenizer: Any, precision: Precision, stop_by: StopBy
) -> float:
    """Mean nats per target token, or one minus the mean ROUGE-L of what is written."""
    device, padding = next(model.parameters()).device, tokenizer.pad_token_id or 0
    total, count = 0.0, 0
    written: list[str] = []
    with evaluating(model):
        for start in range(0, len(examples), _TOGETHER):
            items = list(examples.items[start : start + _TOGETHER])
            ids, mask, _ = padded(items, padding)
            source, seen = (torch.from_numpy(each).to(device) for each in (ids, mask))
            with autocast(device, precision):
                if stop_by == "score":
                    limit = max(len(item.targets) for item in examples.items)
                    written += _texts(model, tokenizer, source, seen, limit)
                    continue
                wanted = _targets(items).to(device)
                answers = SEQ2SEQ.answers(model, source, attention_mask=seen, text=wanted.clamp(min=0))
            right = wanted.flatten()
            counts = right != UNKNOWN
            nats = F.cross_entropy(answers.float().flatten(0, 1)[counts], right[counts], reduction="sum")
            total, count = total + float(nats), count + int(counts.sum())
    if stop_by == "loss":
        return total / count
    right_texts = [_label(examples, number) for number in range(len(examples))]
    return 1.0 - float(row_scores(written, right_texts).mean())


def _texts(model: Any, tokenizer: Any, source: Tensor, mask: Tensor, limit: int) -> list[str]:
    """What is written of sources (n, length)."""
    ends = _ends(model, tokenizer)
    first = getattr(model.generation_config, "forced_bos_token_id", None)
    texts = greedy(model, source, mask, limit, ends, first)
    return [tokenizer.backend_tokenizer.decode(ids) for ids in texts]


def greedy(
    model: Any, source: Tensor, mask: Tensor, limit: int, ends: Collection[int], first: int | None = None
) -> list[list[int]]:
    """The likeliest tokens one after another, for sources (n, length) of which `mask` is 0 where they are
    padded: at most `limit`, up to one of `ends`; `first`: the token that each text begins with."""
    reading, logits = read(model, source, mask)

    def following(tokens: list[int]) -> list[int]:
        found: list[int] = proceed(model, reading, source.new_tensor(tokens)[:, None]).argmax(-1).tolist()
        return found

    tokens = logits.argmax(-1).tolist() if first is None else [first] * len(source)
    return [ids for ids, _ in greedily(tokens, following, limit, ends)]


def _ends(model: Any, tokenizer: Any) -> set[int]:
    told = getattr(model.generation_config, "eos_token_id", None)
    told = model.config.eos_token_id if told is None else told
    found = set(told if isinstance(told, list) else [told]) | {tokenizer.eos_token_id}
    return {int(token) for token in found if token is not None}


def _targets(items: Sequence[Example]) -> Tensor:
    return torch.from_numpy(padded_targets(list(items), 0, "text").astype(np.int64))


def _label(examples: Examples, number: int) -> str:
    return str(examples.rows[examples.order[number]].label)


def _smoothed(smoothing: float, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)
