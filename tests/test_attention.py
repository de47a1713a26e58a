"""Attention in panels is attention; what is not plain and causal is left to transformers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from compress.attention import causal_attention, panel_attention

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("length", [1, 63, 64, 200])  # of one panel and of several, the last one shorter
@pytest.mark.parametrize("shared", [1, 3])
def test_it_is_as_exact_as_bfloat16_allows(length, shared):
    query = normal(2, 2 * shared, length, 16)
    key, value = normal(2, 2, length, 16, seed=1), normal(2, 2, length, 24, seed=2)
    exact = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True, scale=0.5)
    found = causal_attention(query, key, value, 0.5)
    assert found.dtype == torch.bfloat16
    assert (found.float().transpose(1, 2) - exact).norm() < 0.01 * exact.norm()


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@torch.no_grad()
def test_a_model_gives_the_same_and_is_as_it_was_afterwards():
    model, tokens = llama(), torch.arange(100).remainder(50)[None]
    exact = model(tokens).logits
    with panel_attention(model, "bfloat16"), torch.autocast("cpu", torch.bfloat16):
        found = model(tokens).logits
        assert model.config._attn_implementation != "sdpa"
    assert (found - exact).norm() < 0.03 * exact.norm()
    assert model.config._attn_implementation == "sdpa"
    with panel_attention(model, "float32"):
        assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_masks_are_heeded():
    model, tokens = llama(), torch.arange(100).remainder(50)[None]
    mask = (torch.arange(100) >= 7)[None].long()  # padding on the left
    sliding = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)).eval()
    for chosen, more in ((model, {"attention_mask": mask}), (sliding, {})):
        exact = chosen(tokens, **more).logits[:, 7:]
        with panel_attention(chosen, "bfloat16"), torch.autocast("cpu", torch.bfloat16):
            found = chosen(tokens, **more).logits[:, 7:]
        assert (found - exact).norm() < 0.03 * exact.norm()
