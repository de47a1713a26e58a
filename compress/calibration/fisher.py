"""What errors of each layer's outputs do to a decoder's loss: the Fisher information there.

    F = E[g g^T] (out, out),   g = d log p(t) / d y,   tokens t drawn from the model's own distribution p,

y being the layer's output at a position, whose gradient comes from all tokens after it. The expectation is
over positions of calibration text; to second order the KL that an error dy of independent positions costs is
half of dy^T F dy (Martens 2014, arXiv 1412.1193, sections 5 and 9).

Cost: a forward and a backward pass over the tokens, without gradients of weights. Memory: F of every layer,
of at most 2048 outputs together (further ones are taken for independent of these), and the passes'.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.calibration.moments import gram, mirrored
from compress.errors import UserError
from compress.host.progress import track
from compress.models.running import (
    Precision,
    autocast,
    backward_passes,
    evaluating,
    gradients_of_activations,
)
from compress.tasks.registry import task_of

_TOGETHER = 2048  # outputs
_PASS = 512  # tokens


def require_decoder(model: Any) -> None:
    """Refuse a model whose text is not predicted token by token.

    Raises:
        UserError: names the field.
    """
    if not task_of(model.config).continues:
        raise UserError(
            "outputs: 'fisher' draws a decoder's next tokens, which "
            f"{type(model).__name__} does not give; take 'alike'"
        )


def output_fisher(
    model: Any,
    windows: Tensor,
    names: Sequence[str],
    *,
    tokens: int,
    seed: int,
    precision: Precision = "float32",
) -> dict[str, list[Tensor]]:
    """F of the layers `names`, float32: of each a list for consecutive outputs, (part, part) each.

    Args:
        model: all of it in memory.
        windows: calibration token ids (n, length); of each the first tokens are taken.
        names: of linear layers. One that saw no token has zeros.
        tokens: how many to look at in all.
        seed: of the drawn tokens.
        precision: of the passes; sums are float32.

    Raises:
        UserError: not a decoder.
    """
    require_decoder(model)
    device = model.get_input_embeddings().weight.device
    length = min(windows.shape[1], max(2, -(-tokens // len(windows))))
    texts = windows[: -(-tokens // length), :length]
    batches = texts.split(max(1, _PASS // length))
    random = torch.Generator(device).manual_seed(seed)
    found = {name: _zeros(model.get_submodule(name), device) for name in names}
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.enter_context(backward_passes(model))
        stack.enter_context(gradients_of_activations(model))
        for name, parts in found.items():
            stack.callback(model.get_submodule(name).register_forward_hook(_watching(parts)).remove)
        bar = stack.enter_context(track(texts.numel(), "weighing outputs", "tokens"))
        for rows in batches:
            with autocast(device, precision):
                logits = model(input_ids=rows.to(device), use_cache=False).logits.flatten(0, 1).float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
            F.cross_entropy(logits, drawn, reduction="sum").backward()
            bar.advance(rows.numel())
    for parts in found.values():
        for part in parts:
            mirrored(part).div_(texts.numel())
    return found


def _zeros(module: Any, device: torch.device) -> list[Tensor]:
    outputs = int(module.out_features)
    sizes = [min(_TOGETHER, outputs - start) for start in range(0, outputs, _TOGETHER)]
    return [torch.zeros(size, size, device=device) for size in sizes]


def _watching(parts: list[Tensor]) -> Callable[..., None]:
    """A hook that sums the outer products of the gradients at a layer's output."""

    def add(gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2)  # (positions, out)
        for part, columns in zip(parts, rows.split([len(p) for p in parts], 1), strict=True):
            gram(columns, part)

    def hook(module: Any, given: Any, output: Tensor) -> None:
        output.register_hook(add)

    return hook
