"""What every pass and every format must keep to. A new pass or format is covered as soon as it is found."""

import hashlib
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import training_set
from pydantic import ValidationError
from training_set import equal, weights

from compress.artifact.bundle import Bundle
from compress.artifact.counts import file_record, parameter_counts, weight_bytes
from compress.artifact.folder import CODES
from compress.formats import AffineFormat, Int8, QuantizedEmbedding, QuantizedLinear
from compress.formats.registry import FORMATS as CLASSES
from compress.formats.registry import format_from
from compress.models.heads import with_head
from compress.models.layers import linear_layers, matrix
from compress.passes.base import Kind, Pass
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_round import QuantizeRound
from compress.records.manifest import Manifest, changed_settings
from compress.run.registry import names, pass_class
from compress.tasks.causal import CAUSAL
from compress.tasks.sequence_classification import SEQUENCE_CLASSIFICATION

# The fields a pass cannot do without here; one that is not named runs with its defaults.
FIELDS: dict[str, dict[str, Any]] = {
    "train": {"tokens": 128, "batch": 4},
    "distill": {"tokens": 128, "batch": 4},
    "finetune": {"epochs": 0.2, "batch": 4},
    "prune_gradual": {"tokens": 512, "batch": 4, "every": 1},
    "student": {"blocks": 2},
    "prune_structured": {"neurons": 0.25, "multiple_of": 4},
    "prune_vocabulary": {"min_count": 100_000},
    "export_onnx": {"check_tokens": 64},
    "quantize_auto": {"bits_per_weight": 4.5},
    "quantize_bitsandbytes": {"method": "llm_int8"},
    "quantize_rare_rows": {"coverage": 0.6},
    "tune_scales": {"tokens": 128, "batch": 4},
}
FORMATS = [member.model_fields["kind"].default for member in CLASSES]
QUANTIZERS = [name for name in names() if {"format", "embeddings"} <= pass_class(name).model_fields.keys()]
FIXED = [kind for kind in FORMATS if not isinstance(format_from(kind), AffineFormat)]
REFUSED = {("quantize_hqq", kind) for kind in FIXED}  # nothing there that it could fit
ACCEPTED = [(name, format) for name in QUANTIZERS for format in FORMATS if (name, format) not in REFUSED]


@pytest.fixture
def bundle(request: pytest.FixtureRequest, bundle: Bundle) -> Bundle:
    """The tiny decoder; with a head for labels, for a pass that takes no decoder."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name not in names() or pass_class(name).takes(CAUSAL):
        return bundle
    return bundle.evolve(model=with_head(bundle.model, SEQUENCE_CLASSIFICATION, ("a", "b"), 0))


def build(name: str, **fields: Any) -> Pass:
    return pass_class(name).model_validate({**FIELDS.get(name, {}), **fields})


def ready(name: str, bundle: Bundle, make_context: Any) -> Bundle:
    """What the pass may be given: a model with codes if it must come after quantizing."""
    if "quantize" not in pass_class(name).only_after:
        return bundle
    return QuantizeRound()(bundle, make_context(bundle, workdir="ready"))


def tree_hashes(folder: Path, pattern: str = "*") -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob(pattern))
        if p.is_file() and p.name != "manifest.json"  # names the fingerprint and the folders of the run
    }


def with_codes(bundle: Bundle) -> dict[str, torch.Tensor]:
    """Every linear layer's and embedding's weight as (out, in), whether float or codes."""
    found = {}
    for name, module in bundle.model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedEmbedding):
            found[name] = module.quantized.dequantize()
        elif isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            found[name] = matrix(module)
    return found


def holds(pattern: torch.Tensor) -> bool:
    """Whether no group of four neighbours keeps more than two weights."""
    return int((pattern.reshape(-1, 4) != 0).sum(1).max()) <= 2


def test_the_registry_finds_passes_and_formats():
    assert {"train", "distill", "prune_magnitude", "quantize_round", "quantize_gptq"} <= set(names())
    assert {"int4", "int8"} <= set(FORMATS)


@pytest.mark.parametrize("name", names())
class TestEveryPass:
    def test_is_a_frozen_value_that_names_what_it_needs(self, name):
        step = build(name)
        assert step == build(name)
        assert hash(step) == hash(build(name))
        assert pass_class(name).model_validate(step.model_dump(mode="json")) == step
        assert step.kind in get_args(Kind)
        assert type(step).__doc__
        assert type(step).name() == name

    def test_touches_what_it_says(self, name, bundle):
        touched = build(name).layers(bundle.model)
        assert touched
        assert set(touched) <= {n for n, _ in bundle.model.named_modules()}

    def test_leaves_its_input_bit_identical(self, name, bundle, make_context):
        bundle = ready(name, PruneMagnitude(sparsity=0.3)(bundle, make_context(bundle)), make_context)
        before, masks, config = weights(bundle), dict(bundle.masks), bundle.model.config.to_dict()
        kept = {n: m.clone() for n, m in masks.items()}
        state = torch.random.get_rng_state()
        result = build(name)(bundle, make_context(bundle))
        assert equal(before, weights(bundle))
        assert bundle.masks.keys() == kept.keys()
        assert all(torch.equal(bundle.masks[n], kept[n]) for n in kept)
        assert bundle.model.config.to_dict() == config
        assert not bundle.model.training
        assert all(p.grad is None for p in bundle.model.parameters())
        assert result is not bundle
        assert torch.equal(torch.random.get_rng_state(), state), "the process's generator was used"

    def test_the_same_seed_gives_the_same_bytes(self, name, bundle, make_context, tmp_path):
        bundle = ready(name, bundle, make_context)
        hashes = []
        for run in ("first", "second"):
            result = build(name)(bundle, make_context(bundle, seed=7, workdir=f"work-{run}"))
            result.save(tmp_path / run)
            hashes.append(tree_hashes(tmp_path / run))
        assert hashes[0] == hashes[1]
        assert any(n.endswith(".safetensors") for n in hashes[0])

    def test_save_then_load_is_bit_equal(self, name, bundle, make_context, tmp_path):
        bundle = ready(name, bundle, make_context)
        result = build(name)(bundle, make_context(bundle))
        result.save(tmp_path / "artifact")
        loaded = Bundle.load(tmp_path / "artifact")
        assert equal(weights(result), weights(loaded))
        assert loaded.masks.keys() == result.masks.keys()
        assert all(torch.equal(loaded.masks[n], result.masks[n]) for n in result.masks)
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            assert torch.equal(loaded.model(ids).logits, result.model(ids).logits)
        assert loaded.tokenizer.get_vocab() == result.tokenizer.get_vocab()
        assert parameter_counts(loaded.model) == parameter_counts(result.model)
        assert weight_bytes(loaded.model) == weight_bytes(result.model)

    def test_records_equal_what_is_recomputed(self, name, bundle, make_context, tmp_path):
        bundle = ready(name, bundle, make_context)
        result = build(name)(bundle, make_context(bundle))
        manifest = result.save(tmp_path / "artifact")
        assert Manifest.read(tmp_path / "artifact" / "manifest.json") == manifest
        for file, record in manifest.files.items():
            assert file_record(tmp_path / "artifact" / file) == record
        if result.masks:
            total = sum(m.numel() for m in result.masks.values())
            zeros = sum(int((with_codes(result)[n] == 0).sum()) for n in result.masks)
            if "sparsity" in result.notes:
                assert result.notes["sparsity"] == zeros / total
        for layer, layer_record in manifest.layers.items():
            module = result.model.get_submodule(layer)
            assert format_from(layer_record.format) == module.quantized.format
            assert layer_record.shape == module.quantized.shape

    def test_masks_from_an_earlier_step_still_hold(self, name, bundle, make_context):
        if "prune" in build(name).not_after:
            pytest.skip("may not follow a pruning")
        pruned = ready(name, PruneMagnitude(pattern="2:4")(bundle, make_context(bundle)), make_context)
        result = build(name)(pruned, make_context(pruned))
        found = with_codes(result)
        assert result.masks.keys() <= pruned.masks.keys()
        assert result.masks
        for layer, mask in result.masks.items():
            assert (found[layer][~mask] == 0).all(), layer
            if mask.shape[1] == pruned.masks[layer].shape[1]:  # else columns went, and four are not four
                assert holds(found[layer]), layer


@pytest.mark.parametrize(("name", "format"), sorted(REFUSED))
def test_a_format_that_a_pass_cannot_fit_is_refused_with_what_to_use(name, format):
    with pytest.raises(ValidationError, match=f"{format} .*; use "):
        build(name, format=format)


@pytest.mark.parametrize(("name", "format"), ACCEPTED)
class TestEveryQuantizerInEveryFormat:
    def test_a_mask_stays_through_codes_and_disk(self, name, format, bundle, make_context, tmp_path):
        pruned = PruneMagnitude(pattern="2:4")(bundle, make_context(bundle))
        result = build(name, format=format, embeddings=format)(pruned, make_context(pruned))
        result.save(tmp_path / "artifact")
        found = with_codes(Bundle.load(tmp_path / "artifact"))
        for layer, mask in pruned.masks.items():
            assert (found[layer][~mask] == 0).all(), layer
            assert holds(found[layer]), layer

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_stays_tied_and_untied_untied(self, name, format, tied, make_context, tmp_path):
        bundle = training_set.tiny_bundle(tie_embeddings=tied)
        result = build(name, format=format, embeddings=format)(bundle, make_context(bundle))
        result.save(tmp_path / "artifact")
        for model in (result.model, Bundle.load(tmp_path / "artifact").model):
            table, head = model.get_input_embeddings(), model.get_output_embeddings()
            assert (table.quantized is head.quantized) == tied
        manifest = Manifest.read(tmp_path / "artifact" / "manifest.json")
        assert manifest.layers["lm_head"].tied_to == ("model.embed_tokens" if tied else None)
        assert (tmp_path / "artifact" / CODES).is_file()

    def test_gpt2_is_covered_whole(self, name, format, make_context, tmp_path):
        bundle = training_set.tiny_bundle(family="gpt2")
        result = build(name, format=format, embeddings=format)(bundle, make_context(bundle))
        result.save(tmp_path / "artifact")
        loaded = Bundle.load(tmp_path / "artifact")
        assert equal(weights(result), weights(loaded))
        assert not linear_layers(loaded.model)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_by_default_fewer_bits_take_fewer_bytes_tables_included(name):
    """Of SmolLM2-135M: 106 million weights in linear layers beside 28 million of a table."""

    def stored(quantizer: Pass) -> int:
        return quantizer.format.stored_bytes((184_320, 576)) + quantizer.embeddings.stored_bytes(
            (49_152, 576)
        )

    int2, int3, int4 = (build(name, format=kind) for kind in ("int2", "int3", "int4"))
    assert stored(int2) < stored(build(name, format="int3", embeddings="int3")) < stored(int3) < stored(int4)
    assert (int4.embeddings, build(name, format="int2", embeddings="int8").embeddings) == (Int8(), Int8())
    assert build(name, format="int2", embeddings=None).embeddings is None
    assert changed_settings(int2) == {"format": {"kind": "int2"}}
    assert changed_settings(build(name, format="int2", embeddings="int8"))["embeddings"] == {"kind": "int8"}
