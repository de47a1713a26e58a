"""Heads that compute nothing are no part of a graph (models/attention_layers.py).

Limit: where several heads share a group of codes in the layer that reads them, all heads of a group go or
none: the others stay, closed.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from compress.formats import QuantizedLinear
from compress.formats.layers import QuantizedTensor
from compress.models.attention_layers import attention_layers, columns_of, open_heads
from compress.models.layers import is_linear, matrix, replace_module


def without_closed_heads(model: nn.Module) -> tuple[nn.Module, int]:
    """The model without its closed heads, and how many there were; itself where there is none.

    What is returned shares every parameter with `model` that is not cut, and serves to be traced.
    """
    cuts: dict[str, nn.Module] = {}
    count = 0
    for layers in attention_layers(model):
        reader: Any = model.get_submodule(layers.reader)
        kept = open_heads(matrix(reader).cpu(), layers.head)
        if isinstance(reader, QuantizedLinear):
            kept = _whole_groups(reader.quantized, kept, layers.head)
        whole = int(reader.in_features) // layers.head
        if len(kept) == whole:
            continue
        count += whole - len(kept)
        columns = columns_of(kept, layers.head)
        cuts[layers.reader] = _cut(reader, columns=columns)
        cuts |= {name: _cut(model.get_submodule(name), rows=columns) for name in layers.makers}
    if not cuts:
        return model, 0
    shared: dict[int, Any] = {id(p): p for p in (*model.parameters(), *model.buffers())}
    smaller = copy.deepcopy(model, shared)  # what is in the memo counts as copied
    for name, module in cuts.items():
        replace_module(smaller, name, module)
    return smaller, count


def _whole_groups(codes: QuantizedTensor, heads: Tensor, head: int) -> Tensor:
    """These heads, and those that share a group of codes with one of them."""
    width, count = codes.format.group_width(codes.shape[1]), codes.shape[1] // head
    if width >= codes.shape[1]:
        return heads
    groups = set((columns_of(heads, head) // width).tolist())
    own = (set((columns_of(torch.tensor([h]), head) // width).tolist()) for h in range(count))
    return torch.tensor([h for h, found in enumerate(own) if found & groups])


def _cut(module: Any, *, rows: Tensor | None = None, columns: Tensor | None = None) -> nn.Module:
    """A linear layer of some rows, or columns, of another."""
    bias = module.bias if rows is None or module.bias is None else module.bias[rows]
    if isinstance(module, QuantizedLinear):
        found = QuantizedLinear(module.quantized.part(rows, columns), bias, module.activations)
        found.activation_bounds = module.activation_bounds
        return found
    assert is_linear(module)
    weight = module.weight.detach()
    weight = weight if rows is None else weight[rows]
    weight = weight if columns is None else weight[:, columns]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear
