"""Attention in panels is attention; what is not plain and causal is left to transformers."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from compress.models.attention import causal_attention, panel_attention

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


@pytest.mark.parametrize("length", [1, 63, 64, 200, 600])  # one panel, some, too many to keep
@pytest.mark.parametrize("shared", [1, 3])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 0.01)])
def test_it_is_as_exact_as_its_type_allows_and_so_is_its_gradient(length, shared, dtype, error):
    """The products' own rounding; against torch's attention in float64."""
    shapes = [(2, 2 * shared, length, 16), (2, 2, length, 16), (2, 2, length, 24)]
    parts = [normal(*shape, seed=seed).double().requires_grad_() for seed, shape in enumerate(shapes)]
    exact = scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True, scale=0.5)
    pull = normal(*exact.shape, seed=3).double()
    wanted = [exact.transpose(1, 2), *torch.autograd.grad(exact, parts, pull)]
    rounded = [part.detach().to(dtype).requires_grad_() for part in parts]
    query, key, value = rounded
    found = causal_attention(0.5 * query, key, value)
    got = [found, *torch.autograd.grad(found, rounded, pull.transpose(1, 2).to(dtype))]
    for own, other in zip(got, wanted, strict=True):
        assert own.dtype == dtype
        assert (own.double() - other).norm() <= error * other.norm()
    with torch.no_grad():
        assert torch.equal(causal_attention(0.5 * query, key, value), found)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@torch.no_grad()
def test_a_model_gives_the_same_and_is_as_it_was_afterwards():
    model, tokens = llama(), torch.arange(100).remainder(50)[None]
    exact = model(tokens).logits
    with panel_attention(model), torch.autocast("cpu", torch.bfloat16):
        found = model(tokens).logits
        assert model.config._attn_implementation != "sdpa"
    assert (found - exact).norm() < 0.03 * exact.norm()
    assert model.config._attn_implementation == "sdpa"
    with panel_attention(model):
        assert (model(tokens).logits - exact).norm() < 1e-5 * exact.norm()


@torch.no_grad()
def test_masks_are_heeded():
    model, tokens = llama(), torch.arange(100).remainder(50)[None]
    mask = (torch.arange(100) >= 7)[None].long()  # padding on the left
    sliding = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8)).eval()
    for chosen, more in ((model, {"attention_mask": mask}), (sliding, {})):
        exact = chosen(tokens, **more).logits[:, 7:]
        with panel_attention(chosen), torch.autocast("cpu", torch.bfloat16):
            found = chosen(tokens, **more).logits[:, 7:]
        assert (found - exact).norm() < 0.03 * exact.norm()


@pytest.mark.parametrize("length", [40, 600])  # short windows are unfused, long ones left to torch
@pytest.mark.parametrize("kind", ["causal", "padded", "sliding", "dropout", "both ways"])
def test_a_model_learns_as_it_does_with_its_own_attention(kind, length):
    """The same loss and gradients, masks and dropout heeded."""
    torch.manual_seed(0)
    more = {"attention_dropout": 1e-12} if kind == "dropout" else {}  # as good as none, and yet some
    if kind == "sliding":
        model = MistralForCausalLM(MistralConfig(**SMALL, sliding_window=8))
    elif kind == "both ways":
        small = SMALL | {"intermediate_size": 64, "max_position_embeddings": 600}
        model = BertForMaskedLM(BertConfig(**small, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SMALL, **more))
    tokens = torch.arange(2 * length).remainder(47).view(2, length)
    mask = {"attention_mask": (torch.arange(length) >= 7).expand(2, -1).long()} if kind == "padded" else {}

    def learnt():
        model.zero_grad()
        loss = model(tokens, **mask).logits[:, 7:].square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    model.train()
    wanted = learnt()
    with panel_attention(model):
        found = learnt()
    assert len(found) == len(wanted) > 10
    for own, other in zip(found, wanted, strict=True):
        assert (own - other).norm() <= 1e-4 * other.norm() + 1e-9
