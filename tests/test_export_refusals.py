"""What an export would refuse after the work, the dry run refuses before it."""

import pytest
import training_set
import transformers
from export_models import exported, tiny_bundle, tokens, torch_logits

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.onnx.families import require_supported
from compress.passes.export_onnx import ExportOnnx
from compress.run.preflight import preflight
from compress.run.recipe import Recipe


@pytest.fixture
def plan(tmp_path):
    """Preflight of a chain over a tiny model, 64 wide."""
    bundle = training_set.tiny_bundle()
    bundle.save(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text("".join(document.text for document in training_set.documents()))

    def plan(*passes, base=()):
        data = {"text": str(text), "window": 32, "evaluation_windows": 4, "calibration_windows": 4}
        recipe = Recipe.parse(
            {
                "name": "x",
                "model": {"checkpoint": str(tmp_path / "model")},
                "data": data | {"heldout_windows": 2},
                "base": list(base),
                "variants": {"a": list(passes)},
            }
        )
        return preflight(recipe, tmp_path / "run")

    return plan


def rounded(group, embeddings=None, **fields):
    format = {"kind": "int4", "group": group, "symmetric": True}
    return {"quantize_round": {"format": format, "embeddings": embeddings, **fields}}


@pytest.mark.parametrize(
    ("chain", "match"),
    [
        (
            [rounded(20), "export_onnx"],
            r"^variants\.a\.export_onnx: model\.layers\.0\.self_attn\.q_proj holds codes whose group 20 is "
            r"no multiple of 16; use 32, 64 or 128$",
        ),
        (
            [rounded(32, embeddings={"kind": "int8", "group": 24}), "export_onnx"],
            r"export_onnx: model\.embed_tokens .*group 24",
        ),
        (
            [rounded(48), {"export_compressed_tensors": {"runtimes": ["transformers"]}}],
            r"down_proj is 64 wide, no multiple of its group of 48",
        ),
    ],
)
def test_groups_that_rows_or_kernels_do_not_take(chain, match, plan):
    with pytest.raises(UserError, match=match):
        plan(*chain)


def test_what_an_earlier_variant_wrote_counts(plan):
    with pytest.raises(UserError, match="group 20"):
        plan({"prune_magnitude": {}}, rounded(20), "export_onnx")
    plan(rounded(20), "store_sparse")  # torch takes it


def test_layers_that_are_left_float_and_rows_of_one_group_are_taken(plan):
    skipped = rounded(32)
    skipped["quantize_round"]["skip"] = ["*q_proj", "*k_proj", "*v_proj", "*o_proj", "*up_proj", "*gate_proj"]
    plan(skipped, "export_onnx")
    plan(rounded(1000), "export_onnx")
    plan(rounded(32), "export_onnx")


def test_what_an_earlier_pass_makes_of_the_sizes_is_not_guessed(plan):
    export = {"export_compressed_tensors": {"runtimes": ["transformers"]}}
    plan({"prune_structured": {"heads": 0.5}}, rounded(48), export)


def test_a_graph_for_a_processor_that_is_not_this_one(plan, monkeypatch):
    monkeypatch.setattr("compress.host.machine.adds_products_in_32_bits", lambda: False)
    with pytest.raises(UserError, match="processor: vnni is not reported by this processor"):
        plan({"export_onnx": {"processor": "vnni"}})


@pytest.mark.parametrize(
    ("config", "match"),
    [
        (
            transformers.PhiConfig(hidden_size=160, num_attention_heads=4, partial_rotary_factor=0.4),
            r"^export_onnx: heads 40 wide whose positions turn are not supported, .* multiples of 16",
        ),
        (transformers.LlamaConfig(hidden_size=96, num_attention_heads=4), "heads 24 wide of which 24"),
        (transformers.GPT2Config(add_cross_attention=True), "GPT-2 with cross attention"),
        (transformers.Gemma3TextConfig(use_bidirectional_attention=True), "looks back only"),
    ],
)
def test_what_its_configuration_says(config, match):
    with pytest.raises(UserError, match=match):
        require_supported(config)


def test_heads_that_do_not_turn_may_have_any_width(tmp_path):
    config = transformers.GPT2Config(n_embd=80, n_head=2, n_layer=1, vocab_size=97, n_positions=64)
    bundle = tiny_bundle("gpt2")
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    held = Bundle(model, bundle.tokenizer, bundle.lineage)
    assert ExportOnnx().layers(model)
    ids = tokens(1, 9)
    expected = torch_logits(model, ids)
    assert abs(exported(held, tmp_path).logits(ids) - expected).max() < 1e-4 * abs(expected).max()
