"""What an encoder-decoder learns from plain text: spans that were taken out, and how a text goes on.

    loss = mean over target tokens of -ln p(token | source, targets before it)

A `share` of the steps takes spans out (tasks/spans.py); in the others the first half of a window is the
source and the second the target, which is what the task is judged by (Tay et al. 2022, UL2, has both).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.context import TrainingContext
from compress.errors import UserError
from compress.models.running import Precision, autocast, evaluating
from compress.tasks.seq2seq import SEQ2SEQ, halves, shifted, start_token
from compress.tasks.spans import spans_of, take_out
from compress.training.batches import Batches
from compress.training.objectives.base import Asked, Moment, Objective
from compress.training.objectives.losses import chunked, cross_entropy
from compress.training.plan import Optimization

_TOGETHER = 8  # held-out windows per forward pass


def spans_of_text(
    plan: Optimization,
    model: Any,
    tokenizer: Any,
    context: TrainingContext,
    *,
    share: float = 0.5,
    where: str = "train",
) -> Objective:
    """The objective; steps with spans and others alternate by chance, as their share says.

    `where`: the pass's name, for errors.

    Raises:
        UserError: the tokenizer has fewer sentinels than a window has spans.
    """
    text, start = context.data, start_token(model)
    window = plan.window or text.window
    sentinels = _sentinels(tokenizer)
    if share and len(sentinels) < spans_of(window)[1]:
        raise UserError(
            f"{where}.spans: windows of {window} tokens have {spans_of(window)[1]} spans, and the tokenizer "
            f"has {len(sentinels)} sentinels (<extra_id_0> ...); take a shorter window, or spans: 0"
        )
    batches = Batches(text.train, window, plan.windows, context.seed, True, text.begin, text.end, 0)

    def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        if np.random.default_rng([context.seed, moment.step]).random() < share:
            draws = [np.random.default_rng([context.seed, moment.step, int(n)]) for n in moment.windows]
            pair = take_out(rows.cpu().numpy(), draws, sentinels, tokenizer.eos_token_id)
            source, target = (torch.from_numpy(each).to(rows.device) for each in pair)
        else:
            source, target = halves(rows)
        read = {"input_ids": source, "decoder_input_ids": shifted(target, start), "use_cache": False}
        return Asked(read, target)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        return chunked(cross_entropy, outputs.logits.flatten(0, 1), targets.flatten())

    def heldout(model: Any, precision: Precision) -> float:
        return heldout_halves(model, text.heldout.tokens, precision)

    return Objective(loss, ask=ask, material=batches, heldout=heldout, notes={"spans": share})


@torch.no_grad()
def heldout_halves(model: Any, windows: Any, precision: Precision) -> float:
    """Mean nats per token of the second halves of (n, length) windows."""
    device, total, count = next(model.parameters()).device, 0.0, 0
    with evaluating(model):
        for rows in torch.from_numpy(windows.astype(np.int64)).to(device).split(_TOGETHER):
            with autocast(device, precision):
                logits = SEQ2SEQ.answers(model, rows)
            wanted = halves(rows)[1].flatten()
            total += float(cross_entropy(logits.flatten(0, 1), wanted)) * len(wanted)
            count += len(wanted)
    return total / count


def _sentinels(tokenizer: Any) -> list[int]:
    """Numbers of <extra_id_0>, <extra_id_1> ..."""
    words = tokenizer.get_vocab()
    found: list[int] = []
    while (number := words.get(f"<extra_id_{len(found)}>")) is not None:
        found.append(number)
    return found
