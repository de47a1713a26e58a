"""Causal attention in bfloat16 on a CPU, panel by panel: for forward passes over long windows.

torch's own kernel takes float32's time there. Here a panel of queries meets all keys up to its last one in
two products, with the query heads that share keys stacked. Scores and probabilities are rounded to bfloat16
on the way; on real queries and keys the error is little more than that of rounding those, which torch's
kernel makes, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from compress.training.forward import Precision

_NAME = "bfloat16_panels"
_PANEL = 64  # queries


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attention of every position to itself and those before it, products in bfloat16.

    Args:
        query: (batch, heads, length, width).
        key: (batch, key-value heads, length, width); as many neighbouring query heads share each.
        value: as `key`, of any width.
        scaling: of the scores.

    Returns:
        bfloat16 (batch, length, heads, width of a value).
    """
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]
    half = torch.bfloat16
    queries = (query * scaling).to(half).reshape(-1, shared, length, width)
    keys = key.to(half).flatten(0, 1).transpose(1, 2)
    values = value.to(half).flatten(0, 1)
    result = torch.empty(batch, length, heads, value.shape[3], dtype=half, device=query.device)
    later = torch.full((_PANEL, _PANEL), -torch.inf, dtype=half, device=query.device).triu(1)
    for start in range(0, length, _PANEL):
        stop = min(start + _PANEL, length)
        rows = stop - start
        scores = queries[:, :, start:stop].flatten(1, 2) @ keys[..., :stop]
        scores.unflatten(1, (shared, rows))[..., start:] += later[:rows, :rows]
        part = torch.softmax(scores, -1) @ values[:, :stop]
        result[:, start:stop] = part.view(batch, heads, rows, -1).transpose(1, 2)
    return result


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """What transformers calls; anything but plain causal attention under autocast is left to its own."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and query.shape[2] == key.shape[2] and not dropout
    other = any(more.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if not plain or other or not torch.is_autocast_enabled("cpu"):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **more
        )
    with torch.autocast("cpu", enabled=False):
        scaling = query.shape[3] ** -0.5 if scaling is None else scaling
        return causal_attention(query, key, value, scaling), None


@contextmanager
def panel_attention(model: Any, precision: Precision) -> Iterator[None]:
    """Let a model on a CPU whose passes are in bfloat16 attend so while the block runs; no gradients."""
    own = model.config._attn_implementation
    if precision != "bfloat16" or own != "sdpa" or next(model.parameters()).device.type == "cuda":
        yield
        return
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
