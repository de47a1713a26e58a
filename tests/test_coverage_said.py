"""Which share of the weights a pass took is counted, and said where it is less than 95 %."""

import pytest
import torch
import transformers
from cli_helpers import invoke
from export_models import word_tokenizer

from compress import api
from compress.artifact.applied import coverage_of
from compress.artifact.bundle import Bundle
from compress.artifact.folder import MANIFEST
from compress.formats import QuantizedEmbedding, QuantizedLinear
from compress.models.coverage import share_of
from compress.models.layers import linear_layers
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_auto import QuantizeAuto
from compress.passes.quantize_bitsandbytes import QuantizeBitsandbytes
from compress.passes.quantize_round import QuantizeRound
from compress.passes.round_activations import RoundActivations
from compress.passes.store_sparse import StoreSparse
from compress.passes.train import Train
from compress.records.manifest import Coverage, Lineage, Manifest
from compress.report.narrative import headlines
from compress.run.recipe import Recipe


@pytest.fixture
def experts():
    """Two blocks of four experts, kept as parameters of three dimensions; a head of its own."""
    config = transformers.Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, moe_intermediate_size=48, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        tie_word_embeddings=False, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    return Bundle(model, word_tokenizer(), Lineage(source="tiny"))


ATTENTION = 2 * (2 * 32 * 32 + 2 * 16 * 32)  # q and o, k and v, of both blocks
EXPERTS = 2 * 4 * (2 * 48 * 32 + 48 * 32)
ROUTERS = 2 * 4 * 32
TABLES = 64 * 32  # of each


def test_experts_that_are_no_linear_layers_are_named(experts):
    found = share_of(experts.model, linear_layers(experts.model))
    total = ATTENTION + EXPERTS + ROUTERS + 2 * TABLES
    assert (found.taken, found.weights) == (ATTENTION, total)
    assert found.left["model.layers.*.mlp.experts.gate_up_proj (3-D)"] == 2 * 4 * 2 * 48 * 32
    assert found.left["model.layers.*.mlp.experts.down_proj (3-D)"] == 2 * 4 * 48 * 32
    assert found.left["lm_head.weight"] == TABLES
    assert sum(found.left.values()) == total - ATTENTION


@pytest.mark.parametrize("name", ["quantize_auto", "quantize_bitsandbytes"])
def test_passes_with_tables_leave_experts_and_routers(name, experts, make_context, bundle):
    """Attention, embedding and head are taken, in the count and in what the pass makes."""
    step = {
        "quantize_auto": lambda: QuantizeAuto(bits_per_weight=8.5),
        "quantize_bitsandbytes": lambda: QuantizeBitsandbytes(method="llm_int8"),
    }[name]()
    if name == "quantize_bitsandbytes":
        pytest.importorskip("bitsandbytes")
    context = make_context(bundle)
    context.data.calibration.tokens[:] %= 64
    found = coverage_of(step, experts.model)
    taken = ATTENTION + 2 * TABLES
    assert (found.taken, found.weights) == (taken, taken + EXPERTS + ROUTERS)
    assert found.left == {
        "model.layers.*.mlp.experts.gate_up_proj (3-D)": 2 * EXPERTS // 3,
        "model.layers.*.mlp.experts.down_proj (3-D)": EXPERTS // 3,
        "model.layers.*.mlp.gate.weight": ROUTERS,
    }
    made = step(experts, context).model
    kept = sum(p.numel() for p in made.parameters() if p.ndim > 1)
    assert kept == EXPERTS + ROUTERS
    held = [m.quantized.shape for m in made.modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    assert sum(rows * columns for rows, columns in held) == taken


def test_tied_weights_count_once_and_codes_as_the_weights_they_stand_for(bundle, make_context):
    total = sum(p.numel() for p in bundle.model.parameters() if p.ndim > 1)
    layers = linear_layers(bundle.model)
    before = share_of(bundle.model, layers)
    assert before.weights == total
    assert before.left == {"model.embed_tokens.weight": 300 * 32}
    coded = QuantizeRound()(bundle, make_context(bundle))
    after = share_of(coded.model, layers)
    assert (after.taken, after.weights) == (before.taken, total)


def test_words_are_said_below_95_percent():
    assert Coverage(taken=95, weights=100, left={"a": 5}).words() is None
    said = Coverage(taken=20, weights=100, left={"experts (3-D)": 72, "b": 5}).words()
    assert said == "takes 20% of the weights; left as they are: experts (3-D) 72%, b 5.0%, others 3.0%"


def test_passes_that_change_all_weights_are_not_asked(bundle):
    assert coverage_of(Train(tokens=256), bundle.model) is None
    assert coverage_of(PruneMagnitude(), bundle.model).weights == coverage_of(
        QuantizeRound(), bundle.model
    ).weights  # fmt: skip
    assert coverage_of(QuantizeRound(), bundle.model).share == 1.0


def test_plan_manifest_table_and_page_say_it(recipe_dict, tmp_path):
    recipe_dict["base"] = []
    recipe_dict["measure"] = {"prefill_tokens": 16, "rounds": 1, "timing_seconds": 1, "threads": 1}
    recipe_dict["variants"] = {"half": [{"quantize_round": {"select": ["*.mlp.*"], "embeddings": None}}]}
    (tmp_path / "r.yaml").write_text(Recipe.parse(recipe_dict, "test").to_yaml())
    dry = invoke("run", tmp_path / "r.yaml", "-o", tmp_path / "run", "--dry-run")
    done = invoke("run", tmp_path / "r.yaml", "-o", tmp_path / "run")
    assert done.code == 0, done.err
    step = Manifest.read(tmp_path / "run" / "half" / MANIFEST).lineage.steps[-1]
    words = step.coverage.words()
    assert 0 < step.coverage.share < 0.95
    assert "model.embed_tokens.weight" in step.coverage.left
    record, results, _ = api.load_run(tmp_path / "run")
    assert any(words in sentence.text for sentence in headlines(record, results))
    for told in (dry.out, done.out):
        assert words in " ".join(told.split())


@pytest.mark.parametrize("step", [RoundActivations(), StoreSparse()])
def test_layers_that_hold_codes_are_taken_as_those_in_float_are(step, bundle, make_context):
    whole = coverage_of(step, bundle.model)
    coded = QuantizeRound(format="int8")(bundle, make_context(bundle)).model
    tables = sum(p.numel() for p in bundle.model.get_input_embeddings().parameters())
    assert whole.taken == whole.weights - tables > 0
    assert (coverage_of(step, coded).taken, coverage_of(step, coded).weights) == (whole.taken, whole.weights)
