"""Every family's graph is its torch model: float and in codes, with the cache, greedily, and in batches."""

import numpy as np
import pytest
import torch
from export_models import MODELS, exported, quantized, tiny_bundle, tokens, torch_logits
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.export.onnx.architecture import Attention, Linear, Norm, Rotary
from compress.export.onnx.check import compare
from compress.export.onnx.families import describe
from compress.export.onnx.forms import Forms
from compress.export.onnx.rotary import arranged
from compress.formats import Int4, Int8

FAMILIES = [
    "smollm3",
    "olmo2",
    "gemma",
    "gemma2",
    "gemma3",
    "phi",
    "phi_normed_heads",
    "phi3",
    "gpt_neox",
    "gpt_neox_in_turn",
]
CODES = {"int4": Int4(group=32), "int8": Int8(group=32, symmetric=False)}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_check_passes(name, tmp_path):
    bundle = tiny_bundle(name)
    result = compare(bundle.model, exported(bundle, tmp_path), tokens(2, 32), "float32", tolerance=1e-3)
    assert result.passed
    assert result.greedy_tokens > result.greedy_ties


@pytest.mark.parametrize("format", CODES)
@pytest.mark.parametrize("name", FAMILIES)
def test_codes_are_multiplied_as_they_are(name, format, tmp_path):
    bundle = quantized(tiny_bundle(name), CODES[format])
    ids = tokens(batch=2, length=24)
    expected = torch_logits(bundle.model, ids)
    tolerance = 1e-4 * np.abs(expected).max()
    runtime = exported(bundle, tmp_path, Forms(accuracy_level=0))
    assert np.abs(runtime.logits(ids) - expected).max() < tolerance
    state = runtime.prefill(ids[:, :20])
    assert np.abs(state.logits - expected[:, 19]).max() < tolerance
    state = runtime.decode(state, ids[:, 20])
    assert np.abs(state.logits - expected[:, 20]).max() < tolerance


def test_fused_rows_are_cut_without_touching_a_code():
    held = quantized(tiny_bundle("phi3"), Int4(group=32)).model
    attention, mlp = describe(held).blocks[1].attention, describe(held).blocks[1].mlp
    layer = held.model.layers[1]
    for parts, fused in (
        ((attention.query, attention.key, attention.value), layer.self_attn.qkv_proj.quantized),
        ((mlp.gate, mlp.up), layer.mlp.gate_up_proj.quantized),
    ):
        for field in ("codes", "scales", "zeros"):
            assert torch.equal(torch.cat([getattr(p.weight, field) for p in parts]), getattr(fused, field))


def test_gpt_neox_rows_are_those_of_each_head():
    model = tiny_bundle("gpt_neox").model
    fused = model.gpt_neox.layers[0].attention.query_key_value
    attention = describe(model).blocks[0].attention
    x = torch.randn(3, 64)
    with torch.no_grad():
        query, key, value = fused(x).view(3, 4, 3 * 16).chunk(3, dim=-1)  # as the model splits it
    for part, expected in ((attention.query, query), (attention.key, key), (attention.value, value)):
        assert torch.allclose(x @ part.weight.T + part.bias, expected.reshape(3, -1), atol=1e-5)


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 10**6))
def test_heads_in_another_order_score_the_same(turned, rest, seed):
    """Filling up the pairs changes no product of a query and a key, wherever the two stand."""
    width = 2 * turned + rest
    frequencies = 10000.0 ** -(torch.arange(turned) / turned)
    parts = [Linear(name, torch.randn(2 * width, 8), torch.randn(2 * width)) for name in "qkvo"]
    norms = [Norm("layer", name, torch.randn(width), torch.randn(width), 1e-5) for name in "qk"]
    before = Attention(*parts, *norms, width, 1.0, Rotary(frequencies, 1.0))
    if 2 * (-(-turned // 8) * 8) > width:
        with pytest.raises(UserError, match=f"of which {2 * turned} columns are turned"):
            arranged(before)
        return
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))
    assert len(arranged(before).rotary.frequencies) % 8 == 0
    assert torch.allclose(scores(before, x), scores(arranged(before), x), rtol=1e-4, atol=1e-3)


def scores(attention: Attention, x: torch.Tensor) -> torch.Tensor:
    """Two heads' products of a query at position 11 and a key at position 3."""
    states = []
    for layer, norm, position, row in (
        (attention.query, attention.query_norm, 11, x[0]),
        (attention.key, attention.key_norm, 3, x[1]),
    ):
        heads = (layer.weight @ row + layer.bias).view(2, attention.head_width)
        heads = torch.nn.functional.layer_norm(heads, (attention.head_width,), norm.weight, norm.bias)
        angles = position * attention.rotary.frequencies
        half = len(angles)
        a, b, rest = heads.split([half, half, attention.head_width - 2 * half], dim=-1)
        turned = (a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin(), rest)
        states.append(torch.cat(turned, dim=-1))
    return (states[0] * states[1]).sum(-1)


def test_what_an_embedding_is_multiplied_with_stays_out_of_its_tied_head(tmp_path):
    decoder = describe(quantized(tiny_bundle("gemma"), Int4()).model)
    assert decoder.embedding_scale == 8.0  # the root of the width, 64
    assert decoder.head.weight is decoder.embedding


def test_a_model_that_looks_ahead_is_refused():
    model = tiny_bundle("gemma3").model
    model.config.use_bidirectional_attention = True
    with pytest.raises(UserError, match="use_bidirectional_attention"):
        describe(model)


def test_every_family_is_tested():
    from compress.export.onnx.families import _READERS

    assert {tiny_bundle(name).model.config.model_type for name in MODELS} == set(_READERS)
