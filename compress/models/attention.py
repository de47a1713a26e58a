"""Causal attention on a CPU, panel by panel, and its gradient.

A panel of queries meets all keys up to its last one in two products, with the query heads that share keys
stacked: half of the scores, and few passes over them. torch's own kernel takes float32's time in bfloat16,
and is slow backwards; unfused attention computes all scores and goes over them many times. Milliseconds
there and back in float32, 2 threads with AVX2, unfused, torch's own and this one: 16 windows of 256 tokens
and 4 heads of 64 39, 35 and 26; 4 of 1024 and 9 heads 380, 360 and 200 (scores kept).

For the gradient the probabilities of short windows are kept, those of long ones computed again. In bfloat16
scores and probabilities are rounded on the way; on real queries and keys the error is little more than that
of rounding those, which torch's kernel makes, too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "causal_panels"
_PANEL = 64  # queries
_KEPT_UP_TO = 512  # tokens; beyond, all layers' probabilities cost more memory than their speed is worth


def window_size(config: Any) -> int | None:
    """How many tokens a position of a windowed block sees; None where no block is one.

    Other models' weights under Llama's name keep the field, which Llama itself does not heed.
    """
    size: int | None = None if strays(config, "sliding_window") else getattr(config, "sliding_window", None)
    return size


def rotary_settings(config: Any) -> list[dict[str, Any]]:
    """How positions turn heads: one set of parameters, or one per kind of block."""
    settings = getattr(config, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in settings.values()):
        return [value for value in settings.values() if value]
    return [settings]


def turning_point(config: Any) -> int | None:
    """The length of a text beyond which every of its positions turns heads otherwise; None without one."""
    points = (
        s.get("original_max_position_embeddings")
        for s in rotary_settings(config)
        if s.get("rope_type") == "longrope"
    )
    return min((int(point) for point in points if point), default=None)


def strays(config: Any, field: str) -> bool:
    """Whether a configuration has a field that its class does not know, so that no model heeds it."""
    return getattr(config, field, None) is not None and not hasattr(type(config)(), field)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of every position to itself and those before it, in the type of its arguments.

    Args:
        query: (batch, heads, length, width), scaled.
        key: (batch, key-value heads, length, width); as many neighbouring query heads share each.
        value: as `key`, of any width.

    Returns:
        (batch, length, heads, width of a value).
    """
    batch, heads, length, width = query.shape
    shared = heads // key.shape[1]
    queries = query.reshape(-1, shared, length, width)
    kept = torch.is_grad_enabled() and length <= _KEPT_UP_TO
    result: Tensor = _Panels.apply(queries, key.flatten(0, 1), value.flatten(0, 1), kept)  # type: ignore[no-untyped-call]
    return result.view(batch, heads, length, -1).transpose(1, 2).contiguous()


class _Panels(torch.autograd.Function):
    """(n, shared, length, width), (n, length, width), (n, length, v) -> (n, shared, length, v)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, kept: bool) -> Tensor:
        result = query.new_empty(*query.shape[:3], value.shape[2])
        probabilities = []
        for panel in _panels(query.shape[2]):
            part = _probabilities(query, key, panel)
            result[:, :, panel] = (part @ value[:, : panel.stop]).unflatten(1, (query.shape[1], -1))
            if kept:
                probabilities.append(part)
        ctx.save_for_backward(query, key, value, *probabilities)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *kept = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(x).float() for x in (key, value))  # sums over the panels
        for number, panel in enumerate(_panels(query.shape[2])):
            part = kept[number] if kept else _probabilities(query, key, panel)
            outer = gradient[:, :, panel].flatten(1, 2)
            of_value[:, : panel.stop] += part.mT @ outer
            of_part = outer @ value[:, : panel.stop].mT
            of_scores = torch.ops.aten._softmax_backward_data(of_part, part, -1, part.dtype)
            of_query[:, :, panel] = (of_scores @ key[:, : panel.stop]).unflatten(1, (query.shape[1], -1))
            of_key[:, : panel.stop] += of_scores.mT @ query[:, :, panel].flatten(1, 2)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


def _panels(length: int) -> list[slice]:
    return [slice(start, min(start + _PANEL, length)) for start in range(0, length, _PANEL)]


def _probabilities(query: Tensor, key: Tensor, panel: slice) -> Tensor:
    """Of a panel's queries, for all keys up to its last: (n, shared * rows, keys)."""
    rows = panel.stop - panel.start
    scores = query[:, :, panel].flatten(1, 2) @ key[:, : panel.stop].mT
    later = torch.full((rows, rows), -torch.inf, dtype=scores.dtype, device=scores.device).triu(1)
    scores.unflatten(1, (query.shape[1], rows))[..., panel.start :] += later
    return torch.softmax(scores, -1)


def _unfused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, dropout: float
) -> Tensor:
    """Attention in plain operations, with any mask. Arguments and result as `causal_attention`'s."""
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.mT
    if mask is None and causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask
    part = torch.softmax(scores, -1, dtype=torch.float32).to(value.dtype)
    return (F.dropout(part, dropout) @ value).transpose(1, 2).contiguous()


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
    """What transformers calls. With a mask or dropout, or not causal: unfused where a gradient is wanted of
    short windows, else left to transformers."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    square = query.shape[2] == key.shape[2]
    plain = attention_mask is None and causal and square and not dropout
    short = torch.is_grad_enabled() and square and query.shape[2] <= _KEPT_UP_TO
    other = any(more.get(name) is not None for name in ("position_bias", "softcap", "cache"))
    if other or not (plain or short):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **more
        )
    query = query * (query.shape[3] ** -0.5 if scaling is None else scaling)
    if not plain:
        return _unfused(query, key, value, attention_mask, causal, dropout), None
    if torch.is_autocast_enabled("cpu"):
        half = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(half), key.to(half), value.to(half)
    with torch.autocast("cpu", enabled=False):
        return causal_attention(query, key, value), None


@contextmanager
def panel_attention(model: Any) -> Iterator[None]:
    """Let a model on a CPU attend so while the block runs."""
    own = model.config._attn_implementation
    if own != "sdpa" or any(p.device.type == "cuda" for p in model.parameters()):
        yield
        return
    AttentionInterface.register(_NAME, _attend)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(own)
