"""Scales of an 8-bit key-value cache, from what keys and values are on calibration text.

    code = round(x / scale), scale = largest |x| / 127,   one scale per column of a head and side

The operator's kernel takes symmetric codes with scales that are fixed when the graph is written. A pair of
columns that rotary positions turn, (k_i, k_j), has the scale of its largest length sqrt(k_i^2 + k_j^2):
whatever position a key stands at, turning cannot take it beyond its codes.
Cost: one forward pass over the calibration windows. A value larger than any seen there is clipped.
"""

from typing import Any

import torch
from torch import Tensor

from compress.export.onnx.architecture import Rotary
from compress.export.onnx.attention import CacheScales
from compress.export.onnx.families import describe
from compress.export.onnx.rotary import column_order
from compress.host.progress import track
from compress.models.running import device_of
from compress.text.windows import Tokens

_TOKENS = 1024  # of windows that go through the model together
_LARGEST_CODE = 127
_SMALLEST = 1e-8  # for a column that is always 0


def cache_scales(model: Any, windows: Tokens) -> list[CacheScales]:
    """Scales per block, from windows (n, length)."""
    from transformers import DynamicCache

    attentions = [block.attention for block in describe(model).blocks]
    keys, values = ([torch.zeros(a.cache_heads, a.head_width) for a in attentions] for _ in range(2))
    together = max(1, _TOKENS // windows.shape[1])
    with track(len(windows), "scales of the cache", "windows") as progress:
        for ids in torch.from_numpy(windows).long().split(together):
            cache = DynamicCache()
            with torch.inference_mode():
                model(
                    input_ids=ids.to(device_of(model)),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
            for i, layer in enumerate(cache.layers):
                keys[i] = torch.maximum(keys[i], reach(layer.keys, attentions[i].rotary))
                values[i] = torch.maximum(values[i], reach(layer.values, None))
            progress.advance(len(ids))
    for i, attention in enumerate(attentions):
        order = column_order(attention)
        keys[i] = keys[i] if order is None else keys[i][:, order]
    return [CacheScales(_scale(k), _scale(v)) for k, v in zip(keys, values, strict=True)]


def reach(states: Tensor, rotary: Rotary | None) -> Tensor:
    """The largest magnitude of each column at any position the text may be moved to.

    states (batch, heads, tokens, width) -> (heads, width), float32 on the processor.
    """
    states = states.float()
    if rotary is None:
        sizes = states.abs()
    else:
        half = len(rotary.frequencies)
        first, second, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
        length = torch.hypot(first, second)
        sizes = torch.cat((length, length, rest.abs()), dim=-1)
    return sizes.amax((0, 2)).cpu()


def _scale(largest: Tensor) -> Tensor:
    """(heads, width) -> (1, heads, 1, width)."""
    return (largest / _LARGEST_CODE).clamp(min=_SMALLEST)[None, :, None]
