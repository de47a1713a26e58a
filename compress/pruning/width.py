"""Fewer channels of the residual stream: which, and norms that see fewer.

A norm divides by the size of what it sees, rms(h) or std(h) over all channels. Over the channels S that stay
it would divide by another number, so its gain is multiplied by the mean over calibration positions of

    rms(h_S) / rms(h).

There is no layer that could be refitted at no cost, because every block reads the stream.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compress.pruning.importance import magnitude, stream_activation
from compress.pruning.structure import Structure


def kept_channels(scores: Tensor, count: int) -> Tensor:
    """The `count` channels of the highest scores, ascending."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values


def channel_scores(
    model: Any, windows: Tensor, structure: Structure, importance: str, known: Tensor | None
) -> Tensor:
    """Scores of the stream's channels, (width,): `known` ones, those of magnitude, or of activation."""
    if known is not None:
        return known
    if importance == "magnitude":
        return magnitude(model, structure.stream)
    return stream_activation(model, windows, structure.width)


@torch.no_grad()
def match_norms(model: Any, windows: Tensor, structure: Structure, kept: Tensor) -> dict[str, float]:
    """Multiply the gains of all norms on the stream, in place; the factors by the norms' names."""
    totals: dict[str, list[float]] = {}
    norms = _norms(model, structure)
    with ExitStack() as stack:
        for name, module in norms.items():

            def watch(module: nn.Module, inputs: Any, name: str = name) -> None:
                h = inputs[0].float().flatten(0, -2)  # (positions, width)
                if isinstance(module, nn.LayerNorm):
                    ratio = h[:, kept].std(1, correction=0) / h.std(1, correction=0)
                else:
                    ratio = h[:, kept].square().mean(1).sqrt() / h.square().mean(1).sqrt()
                totals.setdefault(name, []).append(float(ratio.mean()))

            stack.callback(module.register_forward_pre_hook(watch).remove)
        for rows in windows.split(4):
            model(input_ids=rows)
    factors = {name: sum(found) / len(found) for name, found in totals.items()}
    for name, factor in factors.items():
        norms[name].weight.mul_(factor)
    return factors


def _norms(model: Any, structure: Structure) -> dict[str, Any]:
    """Modules that hold one gain per channel of the stream, and no matrix."""
    found = {}
    for part in structure.stream:
        name, _, leaf = part.parameter.rpartition(".")
        module = model.get_submodule(name)
        if leaf == "weight" and module.weight.dim() == 1:
            found[name] = module
    return found
