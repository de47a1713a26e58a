"""Fewer channels of the residual stream: which, and norms that see fewer.

A norm divides by the size of what it sees, rms(h) or std(h) over all channels. Over the channels S that stay
it would divide by another number, so its gain is multiplied by the mean over calibration positions of

    rms(h_S) / rms(h).

There is no layer that could be refitted at no cost, because every block reads the stream. Positions where the
stream is zero, as at a padding token, have no ratio and count for nothing.

T5 divides what its head reads by the root of the width, where the head is the token table. Over fewer
channels it would divide by less, so the gain of the last norm is multiplied by the ratio of the two roots.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats.swap import embedding_scale
from compress.structured.importance import magnitude, stream_activation
from compress.structured.structure import Structure
from compress.tasks.registry import task_of


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
def match_norms(model: Any, windows: Tensor, structure: Structure, kept: Tensor) -> None:
    """Multiply the gains of all norms on the stream, in place."""
    norms = _norms(model, structure)
    last = _scaled_by_width(model, windows, norms, structure.width)
    totals = dict.fromkeys(norms, (0.0, 0))  # sum of the ratios, and how many
    with ExitStack() as stack:
        for name, module in norms.items():

            def watch(module: nn.Module, inputs: Any, name: str = name) -> None:
                h = inputs[0].float().flatten(0, -2)  # (positions, width)
                if isinstance(module, nn.LayerNorm):
                    part, whole = h[:, kept].std(1, correction=0), h.std(1, correction=0)
                else:
                    part, whole = (x.square().mean(1).sqrt() for x in (h[:, kept], h))
                ratios = part[whole > 0] / whole[whole > 0]
                total, count = totals[name]
                totals[name] = total + float(ratios.sum()), count + len(ratios)

            stack.callback(module.register_forward_pre_hook(watch).remove)
        for rows in windows.split(4):
            task_of(model.config).answers(model, rows)
    for name, (total, count) in totals.items():
        if count:
            norms[name].weight.mul_(total / count)
    if last is not None:
        norms[last].weight.mul_((len(kept) / structure.width) ** 0.5)


def require_free_width(model: Any, field: str) -> None:
    """Refuse Gemma's kind: embeddings are multiplied by the root of the width, and a norm's gain is one more
    than its weight, so fewer channels would be another function.

    Raises:
        UserError: names the field.
    """
    if embedding_scale(model.get_input_embeddings()) != 1.0:
        raise UserError(
            f"{field}: model_type '{model.config.model_type}' scales its embeddings by its width, which has "
            "to stay; take out other parts"
        )


def _scaled_by_width(model: Any, windows: Tensor, norms: Mapping[str, Any], width: int) -> str | None:
    """The norm before the head, where what it gives is divided by the root of the width; else None."""
    head = model.get_output_embeddings()
    if head is None:
        return None
    given: dict[str, Tensor] = {}  # by the norms, in the order in which they run
    read: list[Tensor] = []
    with ExitStack() as stack:
        for name, module in norms.items():

            def note(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
                given[name] = given.pop(name, output)

            stack.callback(module.register_forward_hook(note).remove)
        stack.callback(head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])).remove)
        task_of(model.config).answers(model, windows[:1])
    last = next(reversed(given), None)
    if last is None or not read or read[0].shape != given[last].shape:
        return None
    divided = given[last].float() * width**-0.5
    return last if torch.allclose(read[0].float(), divided, rtol=1e-4, atol=1e-6) else None


def _norms(model: Any, structure: Structure) -> dict[str, Any]:
    """Modules that hold one gain per channel of the stream, and no matrix."""
    found = {}
    for part in structure.stream:
        name, _, leaf = part.parameter.rpartition(".")
        module = model.get_submodule(name)
        if leaf == "weight" and module.weight.dim() == 1:
            found[name] = module
    return found
