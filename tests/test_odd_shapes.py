"""Shapes of published models in which one thing is unlike the others: read, run in parts, and in codes."""

import numpy as np
import pytest
import torch
import transformers
from cli_helpers import invoke
from test_odd_architectures import SMALL, logits, recipe, saved

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.onnx.sides import on_either_side
from compress.models.attention import strays, turning_point, window_size
from compress.models.blocks import call
from compress.models.layers import is_linear, linear_layers
from compress.models.stacks import not_walked, stacks
from compress.passes.export_onnx import ExportOnnx
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


@pytest.mark.parametrize("sines", [True, False])
def test_an_encoder_whose_angles_are_a_table(sines):
    """RoFormer: rows of it are not added to tokens. Sines do not mind where a text begins; others do."""
    config = transformers.RoFormerConfig(
        **SMALL, num_attention_heads=4, intermediate_size=96, embedding_size=64
    )
    encoder = transformers.RoFormerForMaskedLM(config).eval()
    if not sines:
        encoder.roformer.encoder.embed_positions.weight.data.normal_(
            generator=torch.Generator().manual_seed(0)
        )
    inputs = ["input_ids", "attention_mask"]
    _, either = on_either_side(encoder, lambda model, given: model(**given)[0], inputs)
    assert either == sines


def blocks_of(encoder, batch):
    """What the first block got, and what each is called with."""
    windows = torch.from_numpy(np.random.default_rng(0).integers(1, 300, (batch, 12)))
    found = stacks(encoder)[0]
    hidden, calls = found.inputs([windows])
    with torch.no_grad():
        x = hidden[0]
        for block, arguments in zip(found.blocks, calls, strict=True):
            x = call(block, x, arguments[0], "float32")
        return x, encoder(windows)[0], found.after([windows], [x])[0]


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_blocks_that_give_a_tuple_of_which_one_value_means_nothing(batch):
    config = transformers.DebertaV2Config(
        **SMALL, num_attention_heads=4, intermediate_size=96, relative_attention=True, position_buckets=8,
        pos_att_type=["p2c", "c2p"], share_att_key=True, norm_rel_ebd="layer_norm", type_vocab_size=0,
    )  # fmt: skip
    encoder = transformers.DebertaV2Model(config).eval()
    last, whole, after = blocks_of(encoder, batch)
    assert torch.allclose(last, whole, atol=1e-5)
    assert torch.allclose(after, whole, atol=1e-5)


def test_what_lies_between_blocks_is_not_passed_over():
    config = transformers.DebertaV2Config(
        **SMALL, num_attention_heads=4, intermediate_size=96, conv_kernel_size=3, conv_act="gelu"
    )
    encoder = transformers.DebertaV2Model(config).eval()
    assert "conv_kernel_size" in not_walked(encoder)
    with pytest.raises(UserError, match="something is done between the blocks"):
        blocks_of(encoder, 3)


def test_shared_blocks_are_refused_before_any_work():
    config = transformers.AlbertConfig(**SMALL, num_attention_heads=4, intermediate_size=96)
    assert "has no list of 2 blocks" in not_walked(transformers.AlbertModel(config))


def test_experts_of_an_encoder_decoder_have_no_graph():
    pytest.importorskip("onnxscript")
    config = transformers.SwitchTransformersConfig(
        vocab_size=300, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, num_experts=2
    )
    with torch.device("meta"):
        model = transformers.SwitchTransformersForConditionalGeneration(config)
    with pytest.raises(UserError, match="experts of an encoder-decoder"):
        ExportOnnx().layers(model)


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
