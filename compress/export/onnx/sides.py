"""Reading batches padded on either side: what makes a traced encoder forget in which column a text begins.

Relative and rotary positions do not depend on it; other models have to be helped. Of these ways the first is
taken that gives a text padded on the left what the text alone gives, in torch, before the model is traced:

    as it is   ModernBERT, T5.
    filled     the mask's padding gets the padding token's number, from which RoBERTa counts positions.
    counted    rows of position embeddings (BERT, DistilBERT, BART) are taken in the order of the mask's
               ones: the table's rows of columns 0, 1, ... are there, and a text's n-th token takes the n-th.
    turned     an answer for the whole text (a classifier's) does not depend on columns: rows are turned until
               the text begins in the first.
    guarded    none of them helps: the graph takes rows padded on the right, and on the left fails, as an
               index there leads out of the row.

Cost: two short texts through the model; in the graph one gather of position rows per token.
Limit: ones of a mask must follow each other; of zeros between them the model says whatever it says.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compress.models.running import device_of

Given = Mapping[str, Tensor]  # inputs by name, (batch, sequence)
Read = Callable[[Any, Given], Tensor]  # a model and its inputs -> (batch, sequence, width)

_TOKENS, _PADDING = 6, 3
_TOLERANCE = 1e-4  # of the largest number
_FAR = 2**40


def on_either_side(model: Any, read: Read, inputs: list[str], *, pooled: bool = False) -> tuple[Read, bool]:
    """A way to `read` that gives rows what each alone gives, and whether it takes padding on the left.

    `pooled`: the answer is one for the whole text, (batch, width).
    """
    ways: list[Read] = [read, partial(_filled, read), partial(_counted, read)]
    ways += [partial(_turned, read)] if pooled else []
    for way in ways:
        if _same(model, read, way, inputs, pooled):
            return way, True
    return partial(_guarded, read), False


def _same(model: Any, read: Read, way: Read, inputs: list[str], pooled: bool) -> bool:
    """Whether a text padded on the left, with what is no padding token, gives what it gives alone."""
    pad = getattr(model.config, "pad_token_id", None)
    filler, *ids = (i for i in range(_TOKENS + 2) if i != pad)
    text = torch.tensor([ids[:_TOKENS]], device=device_of(model))
    row = torch.cat((torch.full((1, _PADDING), filler, device=device_of(model)), text), dim=1)
    mask = (torch.arange(row.shape[1], device=device_of(model)) >= _PADDING).long()[None]

    def given(ids: Tensor, mask: Tensor) -> Given:
        values = {"input_ids": ids, "attention_mask": mask}
        return {name: values.get(name, torch.zeros_like(ids)) for name in inputs}

    with torch.inference_mode():
        alone = read(model, given(text, torch.ones_like(text))).float()
        try:
            padded = way(model, given(row, mask)).float()
            padded = padded if pooled else padded[:, _PADDING:]
        except (RuntimeError, IndexError):  # its positions are no rows that are added to a token's
            return False
    return bool((alone - padded).abs().max() <= _TOLERANCE * alone.abs().max())


def _filled(read: Read, model: Any, given: Given) -> Tensor:
    pad = int(getattr(model.config, "pad_token_id", None) or 0)
    ids = torch.where(given["attention_mask"] == 1, given["input_ids"], pad)
    return read(model, {**given, "input_ids": ids})


def _counted(read: Read, model: Any, given: Given) -> Tensor:
    """With hooks on the modules that give a row per column."""
    positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)  # (batch, sequence)

    def count(module: Any, arguments: Any, rows: Tensor) -> Tensor:
        # (..., sequence, width), the same for every text -> (batch, sequence, width)
        return rows.reshape(-1, positions.shape[1], rows.shape[-1])[0][positions]

    tables = [part for name, part in model.named_modules() if name.endswith(_TABLES)]
    hooks = [table.register_forward_hook(count) for table in tables]
    try:
        return read(model, given)
    finally:
        for hook in hooks:
            hook.remove()


def _turned(read: Read, model: Any, given: Given) -> Tensor:
    mask = given["attention_mask"]
    columns = torch.arange(mask.shape[1], device=mask.device) + mask.argmax(1, keepdim=True)
    columns = torch.where(columns < mask.shape[1], columns, columns - mask.shape[1])  # (batch, sequence)
    return read(model, {name: torch.gather(value, 1, columns) for name, value in given.items()})


_TABLES = ("position_embeddings", "embed_positions")  # what families of `transformers` call them


def _guarded(read: Read, model: Any, given: Given) -> Tensor:
    ids, first = given["input_ids"], given["attention_mask"][:, :1]
    columns = torch.arange(ids.shape[1], device=ids.device) + (first - 1) * _FAR  # (batch, sequence)
    return read(model, {**given, "input_ids": torch.gather(ids, 1, columns)})
