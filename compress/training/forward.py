"""How a model is run while it trains: precision, attention, and its held-out loss."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.errors import UserError

Precision = Literal["float32", "bfloat16"]
_PLAIN_ATTENTION_UP_TO = 512  # tokens; beyond, its scores cost more memory than its speed is worth
_HELDOUT_TOKENS = 8192  # per forward pass


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Matrix products in `precision`, sums and norms in float32; parameters stay as they are."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@contextmanager
def plain_attention(model: Any, window: int) -> Iterator[None]:
    """Unfused attention while the block runs, for short windows on a CPU.

    torch's fused attention is slow backwards there: half of a step for windows of 256 and heads of 32.
    """
    before = model.config._attn_implementation
    on_cpu = next(model.parameters()).device.type == "cpu"
    swap = before == "sdpa" and on_cpu and window <= _PLAIN_ATTENTION_UP_TO
    if swap:
        model.set_attn_implementation("eager")
    try:
        yield
    finally:
        if swap:
            model.set_attn_implementation(before)


@contextmanager
def gradients(model: Any, wanted: bool) -> Iterator[None]:
    """All weights need a gradient, or none does, while the block runs."""
    needed = [p.requires_grad for p in model.parameters()]
    model.requires_grad_(wanted)
    try:
        yield
    finally:
        for parameter, own in zip(model.parameters(), needed, strict=True):
            parameter.requires_grad_(own)


@contextmanager
def gradient_checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Keep the inputs of each block only, and compute the rest again for the gradient (Chen et al. 2016).

    Raises:
        UserError: the architecture has no such mode.
    """
    if not wanted:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(
            f"gradient_checkpointing: transformers has none for {type(model).__name__}; leave it false"
        )
    mode = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # by version
    getattr(model, f"{mode}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(model, f"{mode}_checkpointing_disable")()


@torch.no_grad()
def heldout_nll(model: Any, windows: Tensor, precision: Precision) -> float:
    """Mean nats per predicted token of (n, length) windows, in the precision of training.

    For curves and for stopping; the reported quality is `compress.measure`'s, from the saved artifact.
    """
    training = model.training
    model.eval()
    total = 0.0
    for rows in windows.split(max(1, _HELDOUT_TOKENS // windows.shape[1])):
        with autocast(windows.device, precision):
            logits = model(input_ids=rows, use_cache=False).logits[:, :-1]  # (rows, length - 1, vocab)
        total += float(F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
    model.train(training)
    return total / (windows.shape[0] * (windows.shape[1] - 1))
