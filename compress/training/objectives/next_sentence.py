"""Masked tokens and next sentences: what BertForPreTraining learns from plain text.

    loss = mean over hidden tokens of -ln p(token)  +  mean over pairs of -ln p(follows, or does not)

Windows become pairs of halves (tasks/next_sentence.py); half of the pairs, drawn anew in every epoch, have
the second half of another window of the text, any but the own. Tokens are hidden in the pair, as
objectives/masked.py does. The held-out loss is the same sum on the task's fixed draws.

Limit: windows know nothing of documents. Another window is nearly always of another document where there are
many; of one long text it is another place of it.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from compress.context import TrainingContext
from compress.errors import UserError
from compress.models.running import Precision, autocast, evaluating
from compress.tasks.base import UNKNOWN, rows_of
from compress.tasks.masked import HIDDEN
from compress.tasks.next_sentence import FOLLOWS, FOREIGN, MASKED_NEXT, joined, types_of
from compress.training.batches import Batches
from compress.training.objectives.base import Asked, Moment, Objective
from compress.training.objectives.losses import chunked, cross_entropy
from compress.training.objectives.masked import Chosen, hidden_by
from compress.training.plan import Optimization

_TOGETHER = 16  # held-out windows per forward pass
_SHORTEST = 8  # tokens of a window: two of each half


def pairs_of_text(
    plan: Optimization,
    model: Any,
    tokenizer: Any,
    context: TrainingContext,
    *,
    share: float = HIDDEN,
    whole_words: bool = False,
    where: str = "train",
) -> Objective:
    """The objective; arguments as of `masked_text`.

    Raises:
        UserError: no mask token, or no [CLS] and [SEP] around texts; windows too short for a pair, or fewer
            than two; no pieces that tell which word they are of.
    """
    mask_token, text = MASKED_NEXT.mask_token(tokenizer), context.data
    if mask_token is None or (len(text.begin), len(text.end)) != (1, 1):
        raise UserError(
            f"{where}: next sentences are learnt with a tokenizer that has a mask token and puts one token "
            "before a text and one behind it, as BERT's; take such a one, or a model without that head"
        )
    window = plan.window or text.window
    vocabulary = rows_of(model.config) or len(tokenizer)
    batches = Batches(text.train, window, plan.windows, context.seed, True, text.begin, text.end, 0)
    if window < _SHORTEST or batches.windows < 2:
        raise UserError(
            f"{where}: {batches.windows} windows of {window} tokens make no pairs; give more text, or "
            f"windows of {_SHORTEST} tokens at least"
        )
    hiding = hidden_by(tokenizer, mask_token, vocabulary, share, whole_words=whole_words, where=where)
    types = torch.from_numpy(types_of(window).astype(np.int64))
    heads = Chosen()

    def ask(rows: Tensor, more: Mapping[str, Tensor], moment: Moment) -> Asked:
        draws = [np.random.default_rng([context.seed, moment.step, int(n)]) for n in moment.windows]
        foreign = np.array([draw.random() < 0.5 for draw in draws])
        own = rows.cpu().numpy()
        others = own.copy()
        for place, (number, draw) in enumerate(zip(moment.windows.tolist(), draws, strict=True)):
            other = (number + 1 + int(draw.integers(batches.windows - 1))) % batches.windows
            if foreign[place]:
                others[place] = batches.fixed(other)
        inputs, targets = hiding(joined(own, others), draws)
        labels = np.where(foreign, FOREIGN, FOLLOWS)[:, None]
        ids, wanted = (
            torch.from_numpy(each).to(rows.device) for each in (inputs, np.concatenate([targets, labels], 1))
        )
        heads.places = wanted[:, :-1] != UNKNOWN
        kinds = types.to(rows.device).expand(len(ids), -1)
        return Asked({"input_ids": ids, "token_type_ids": kinds}, wanted)

    def loss(outputs: Any, inputs: Mapping[str, Any], targets: Tensor, moment: Moment) -> Tensor:
        tokens, labels = targets[:, :-1], targets[:, -1]
        hidden, logits = tokens != UNKNOWN, outputs.prediction_logits
        heads.places = None
        logits = logits if logits.dim() == 2 else logits[hidden]
        return chunked(cross_entropy, logits, tokens[hidden]) + cross_entropy(
            outputs.seq_relationship_logits, labels
        )

    def heldout(model: Any, precision: Precision) -> float:
        return heldout_pairs(model, text.heldout.tokens, mask_token, precision)

    return Objective(
        loss, ask=ask, watch=heads.watch, material=batches, heldout=heldout, notes={"hidden": share}
    )


@torch.no_grad()
def heldout_pairs(model: Any, windows: Any, mask_token: int, precision: Precision) -> float:
    """Mean nats per hidden token and mean nats per pair, added up, of (n, length) windows."""
    device = next(model.parameters()).device
    words, pairs, count = 0.0, 0.0, 0
    with evaluating(model):
        for start in range(0, len(windows), _TOGETHER):
            numbers = range(start, min(start + _TOGETHER, len(windows)))
            asked = [MASKED_NEXT.question(MASKED_NEXT.window(windows, n), n, mask_token) for n in numbers]
            ids = torch.from_numpy(np.stack([q.inputs for q in asked]).astype(np.int64)).to(device)
            types = torch.from_numpy(types_of(ids.shape[1]).astype(np.int64)).to(device).expand(len(ids), -1)
            with autocast(device, precision):
                out = model(input_ids=ids, token_type_ids=types)
            labels = torch.tensor([n % 2 for n in numbers], device=device)
            pairs += float(F.cross_entropy(out.seq_relationship_logits.float(), labels, reduction="sum"))
            for row, question in zip(out.prediction_logits, asked, strict=True):
                places = torch.from_numpy(np.asarray(question.rows)[:-1]).to(device)
                wanted = torch.from_numpy(question.targets[:-1].astype(np.int64)).to(device)
                total = F.cross_entropy(row[places].float(), wanted, reduction="sum")
                words, count = words + float(total), count + len(wanted)
    return words / count + pairs / len(windows)
