"""An 8-bit key-value cache: scales that hold wherever a key stands, codes in the graph, its cost told."""

import numpy as np
import pytest
import torch
from export_models import MODELS, tiny_bundle, tokens, torch_logits
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from compress.export.onnx.architecture import Rotary
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.cache import cache_scales, reach
from compress.export.onnx.families import describe
from compress.export.onnx.forms import Forms
from compress.export.onnx.rotary import column_order
from compress.runtimes.onnx_runtime import OnnxRuntime


def turned(states: torch.Tensor, frequencies: torch.Tensor, by: int) -> torch.Tensor:
    """Rotary positions as transformers applies them, to the first columns of states (..., width)."""
    half = len(frequencies)
    a, b, rest = states.split([half, half, states.shape[-1] - 2 * half], dim=-1)
    cos, sin = (by * frequencies).cos(), (by * frequencies).sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


@given(st.integers(0, 10**6), st.integers(-5000, 5000), st.sampled_from([2, 4, 8]))
def test_no_position_takes_a_key_beyond_its_codes(seed, by, half):
    states = torch.randn(2, 3, 5, 16, generator=torch.Generator().manual_seed(seed))
    frequencies = 10000.0 ** -(torch.arange(half) / half)
    largest = reach(states, Rotary(frequencies, 1.0))
    assert (turned(states, frequencies, by).abs().amax((0, 2)) <= largest * (1 + 1e-5)).all()
    assert (largest <= 2**0.5 * states.abs().amax((0, 2, 3))[:, None] * (1 + 1e-6)).all()


class Rounded(DynamicCache):
    """What torch keeps, rounded as the graph rounds it."""

    def __init__(self, attentions, scales):
        super().__init__()
        self.scales = [
            (back(s.key, column_order(a)), s.value) for a, s in zip(attentions, scales, strict=True)
        ]

    def update(self, key, value, index, *more, **fields):
        rounded = (
            (x / scale).round().clamp(-128, 127) * scale
            for x, scale in zip((key, value), self.scales[index], strict=True)
        )
        return super().update(*rounded, index, *more, **fields)


def back(scale, order):
    """From the order in which the graph's heads lie to the model's."""
    return scale if order is None else scale[..., order.argsort()]


def with_int8_cache(bundle, folder):
    """The exported graph, and the cache with which torch computes the same."""
    scales = cache_scales(bundle.model, tokens(4, 40, seed=9))
    write_artifact(bundle, folder, Forms(), scales)
    attentions = [block.attention for block in describe(bundle.model).blocks]
    return OnnxRuntime(folder, threads=1), lambda: Rounded(attentions, scales)


def close(found, expected, of):
    """Equal but where a value on the edge between two codes fell to the other side."""
    return np.abs(found - expected).mean() < 1e-4 * np.abs(of).max()


@pytest.mark.parametrize("name", MODELS)
def test_every_family_decodes_from_codes(name, tmp_path):
    bundle = tiny_bundle(name)
    runtime, rounded = with_int8_cache(bundle, tmp_path)
    ids = tokens(batch=2, length=30)
    with torch.inference_mode():
        expected = bundle.model(torch.from_numpy(ids).long(), past_key_values=rounded()).logits.numpy()
    exact = torch_logits(bundle.model, ids)
    assert not close(expected, exact, exact)  # the codes can be seen
    assert close(runtime.logits(ids), expected, exact)
    state = runtime.prefill(ids[:, :20])
    for position in range(20, 30):
        state = runtime.decode(state, ids[:, position])
    assert close(state.logits, expected[:, -1], exact)
    assert all(value.numpy().dtype == np.int8 for value in state.buffers.values())
