"""The attention layers of models whose configuration has no field for the width of a head (BERT, BART).

Such a checkpoint cannot say that a block has fewer heads. A head that is *closed*, its columns of the layer
that reads it all zero, computes nothing and stays in the file; what is made for one runtime may leave it out.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compress.tasks.registry import task_of

# query, key, value and what reads them, under the names of an attention module
_NAMES = (
    ("self.query", "self.key", "self.value", "output.dense"),
    ("q_lin", "k_lin", "v_lin", "out_lin"),
)
# of encoder-decoders; a decoder's (OPT's) may be called so, too, but no graph leaves heads of it out
_OF_TWO_STACKS = (("q_proj", "k_proj", "v_proj", "out_proj"),)
HEAD_WIDTHS = ("head_dim", "attention_head_size", "key_value_proj_dim")  # what attention modules call it


@dataclass(frozen=True)
class AttentionLayers:
    """Full names of one attention's linear layers, and columns per head."""

    makers: tuple[str, str, str]  # of queries, keys and values
    reader: str
    head: int


def attention_layers(model: Any) -> Iterator[AttentionLayers]:
    """Those of a model, in their order; none of other kinds."""
    modules = dict(model.named_modules())
    kinds = _OF_TWO_STACKS if task_of(model.config).stacks == 2 else _NAMES
    for name, module in modules.items():
        for names in kinds:
            query, key, value, reader = (f"{name}.{part}" for part in names)
            if not {query, key, value, reader} <= modules.keys():
                continue
            owners = (module, modules[query.rpartition(".")[0]])
            width = next(int(getattr(m, w)) for m in owners for w in HEAD_WIDTHS if hasattr(m, w))
            yield AttentionLayers((query, key, value), reader, width)


def open_heads(weight: Tensor, head: int) -> Tensor:
    """Which heads a reader's weight (out, heads * head) reads, ascending; the first, where it reads none."""
    read = (weight != 0).any(0).view(-1, head).any(1)
    found: Tensor = read.nonzero()[:, 0]
    return found if len(found) else torch.zeros(1, dtype=torch.long)


def columns_of(heads: Tensor, head: int) -> Tensor:
    """The columns of heads."""
    return (heads[:, None] * head + torch.arange(head)).flatten()


def closable(model: Any) -> bool:
    """Whether a model has such layers."""
    return next(attention_layers(model), None) is not None
