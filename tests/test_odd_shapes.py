"""Shapes of published models in which one thing is unlike the others: read, run in parts, and in codes."""

import numpy as np
import pytest
import torch
import transformers
from cli_helpers import invoke
from test_odd_architectures import SMALL, logits, recipe, saved

from compress.artifact.bundle import Bundle
from compress.models.attention import strays, turning_point, window_size
from compress.models.layers import is_linear, linear_layers
from compress.runtimes.torch_runtime import TorchRuntime

TEXT = {
    **SMALL, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
    "short_factor": [1.0] * 8, "long_factor": [3.0] * 8,
}  # fmt: skip
JAMBA = {
    **TEXT, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "num_experts_per_tok": 1,
    "mamba_d_state": 8, "mamba_dt_rank": 8,
}  # fmt: skip


def model(family, folder, **sizes):
    config = getattr(transformers, f"{family}Config")(**sizes)
    return saved(getattr(transformers, f"{family}ForCausalLM")(config), folder)


def step_by_step(folder, stock, first):
    """Every next token's logits, from a prompt of `first` tokens in parts of 7, are stock's of the whole."""
    ids = np.random.default_rng(0).integers(1, 300, (2, 30))
    runtime = TorchRuntime(folder, threads=1, prefill_chunk=7)
    state = runtime.prefill(ids[:, :first])
    for end in range(first, 30):
        expected = logits(stock, ids[:, :end])[:, -1]
        assert np.abs(state.logits - expected).max() < 1e-5 * np.abs(expected).max(), end
        state = runtime.decode(state, ids[:, end])
    return runtime


@pytest.mark.parametrize("first", [10, 16, 17, 25])
def test_angles_that_change_as_the_text_grows(first, tmp_path):
    stock = model("Phi3", tmp_path, **TEXT, original_max_position_embeddings=16, rope_parameters=LONG)
    assert turning_point(stock.config) == 16
    runtime = step_by_step(tmp_path, stock, first)
    assert not runtime.rewinds
    assert not runtime.joins


def test_a_prompt_goes_at_once_through_a_model_that_keeps_a_state_beside_keys(tmp_path):
    step_by_step(tmp_path, model("Jamba", tmp_path, **JAMBA), 20)


def test_a_window_that_nothing_heeds_cuts_no_cache(tmp_path):
    stock = model("Llama", tmp_path, **TEXT, sliding_window=5)
    assert strays(stock.config, "sliding_window")
    assert window_size(stock.config) is None
    assert step_by_step(tmp_path, stock, 20).rewinds
    heeded = transformers.MistralConfig(**TEXT, sliding_window=5)
    assert not strays(heeded, "sliding_window")
    assert window_size(heeded) == 5


def test_a_class_made_of_linear_counts_as_one_if_it_multiplies_and_no_more():
    class Doubles(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    class Multiplies(torch.nn.Linear):
        def forward(self, x):
            return x @ self.weight.T + self.bias

    class Asks(torch.nn.Linear):
        def forward(self, x, more):
            return super().forward(x)

    for device in ("cpu", "meta"):
        kinds = [kind(6, 3, device=device) for kind in (torch.nn.Linear, Multiplies, Doubles, Asks)]
        assert [is_linear(module) for module in kinds] == [True, True, False, False]
    assert not is_linear(torch.nn.Embedding(6, 3))
    weight = kinds[1].weight
    assert kinds[1].weight is weight
    assert weight.is_meta


def test_a_router_is_no_linear_layer(tmp_path):
    sizes = {**TEXT, "num_local_experts": 4, "num_experts_per_tok": 2}
    stock = model("Phimoe", tmp_path / "m", **sizes)
    assert not any("router" in name for name in linear_layers(stock))
    file = recipe(tmp_path, {"quantize_round": {"format": "int8"}}, {"quantize_gptq": {"format": "int8"}})
    done = invoke("run", file, "-o", tmp_path / "run", "--no-measure")
    assert done.code == 0, done.err


def test_falcon_multiplies_in_a_class_of_its_own():
    config = transformers.FalconConfig(**{**SMALL, "num_attention_heads": 4})
    names = linear_layers(transformers.FalconForCausalLM(config))
    assert "transformer.h.0.mlp.dense_h_to_4h" in names
    assert len(names) == 8


def test_a_model_all_of_whose_weights_are_codes(tmp_path):
    """OLMo's norms have no weights, so nothing is left that is a parameter."""
    stock = model("Olmo", tmp_path / "m", **TEXT)
    done = invoke(
        "run",
        recipe(tmp_path, {"quantize_round": {"format": "int8"}}),
        "-o",
        tmp_path / "run",
        "--no-measure",
    )
    assert done.code == 0, done.err
    held = Bundle.load(tmp_path / "run" / "v0").model
    assert not list(held.parameters())
    ids = np.random.default_rng(0).integers(1, 300, (1, 30))
    found = TorchRuntime(tmp_path / "run" / "v0", threads=1).logits(ids)
    expected = torch.from_numpy(logits(stock, ids)).log_softmax(-1)
    rounded = torch.from_numpy(found).log_softmax(-1)
    assert float((expected.exp() * (expected - rounded)).sum(-1).mean()) < 0.01
    assert invoke("generate", tmp_path / "run" / "v0", "--prompt", "The model", "--tokens", 4).code == 0
