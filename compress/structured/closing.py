"""Heads that go where the configuration cannot say so: they are closed, and stay in the file as zeros.

A head that no column reads computes nothing; its queries, keys and values are made zero with it. Masks keep
these weights zero through healing and quantization. Graphs that are exported leave closed heads out
(export/onnx/closed_heads.py), so that they are as small and fast there as if they were gone; in torch and in
the checkpoint nothing is saved, which the notes say.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compress.models.attention_layers import closable
from compress.models.layers import is_linear
from compress.structured.slicing import UnitCounts, possible
from compress.structured.structure import Structure


def closes(model: nn.Module, structure: Structure, counts: UnitCounts) -> bool:
    """Whether so few heads can be had only by closing them."""
    whole = UnitCounts.of(structure)
    return (
        counts.heads < whole.heads
        and closable(model)
        and not possible(model.config, structure, counts)
        and possible(model.config, structure, UnitCounts(whole.heads, counts.neurons, counts.width))
    )


@torch.no_grad()
def close(
    model: nn.Module, structure: Structure, kept: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Make zero, in place, all that holds something of the heads that are not kept.

    Args:
        kept: reader -> the heads that stay, ascending.
        masks: module name -> bool (out, in).

    Returns:
        The masks, and those of the layers that were changed.
    """
    found = dict(masks)
    for sublayer in structure.of("heads"):
        gone = torch.ones(sublayer.units, dtype=torch.bool)
        gone[kept[sublayer.reader]] = False
        for part in sublayer.parts:
            entries = part.entries[gone].flatten()
            parameter = model.get_parameter(part.parameter)
            parameter.index_fill_(part.axis, entries.to(parameter.device), 0.0)
            name, _, leaf = part.parameter.rpartition(".")
            if leaf == "weight" and is_linear(model.get_submodule(name)):
                mask = found[name].clone() if name in found else torch.ones(parameter.shape, dtype=torch.bool)
                found[name] = mask.index_fill_(part.axis, entries, False)
    return found
