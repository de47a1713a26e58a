"""Structured pruning: what goes together, what is found, what is refitted, and that a target is met."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import training_set
import transformers
from export_models import tiny_bundle as architecture
from pydantic import ValidationError

from compress.artifact.bundle import Bundle
from compress.artifact.counts import weight_file_bytes
from compress.context import Context
from compress.errors import UserError
from compress.models.checkpoints import quiet_transformers
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_structured import PruneStructured
from compress.passes.student import Student
from compress.passes.train import Train
from compress.records.manifest import Lineage
from compress.structured import structure as structure_module
from compress.structured.structure import Structure, Sublayer, find_structure

IDS = torch.arange(20)[None]
IMPORTANCES = ["magnitude", "activation", "taylor", "kl", "reconstruction"]


def logits(bundle: Bundle) -> torch.Tensor:
    with torch.no_grad():
        return bundle.model(input_ids=IDS)[0]


def encoder() -> Bundle:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, architectures=["BertForMaskedLM"],
    )  # fmt: skip
    return Bundle(
        transformers.BertForMaskedLM(config).eval(), architecture("llama").tokenizer, Lineage(source="t")
    )


def opt() -> Bundle:
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=60, hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=1, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return Bundle(
        transformers.OPTForCausalLM(config).eval(), architecture("llama").tokenizer, Lineage(source="t")
    )


def a_model(name: str) -> Bundle:
    return {"bert": encoder, "opt": opt}[name]() if name in ("bert", "opt") else architecture(name)


@torch.no_grad()
def kill(model: Any, sublayer: Sublayer, units: list[int], size: float = 0.0) -> None:
    """Multiply all that belongs to some units."""
    parameters = dict(model.named_parameters())
    for part in sublayer.parts:
        entries = part.entries[units].flatten()
        parameter = parameters[part.parameter]
        parameter.index_copy_(part.axis, entries, size * parameter.index_select(part.axis, entries))


def planted(bundle: Bundle, size: float = 0.0, kinds: tuple[str, ...] = ("heads", "neurons")) -> Structure:
    """Other units dead in every block: half of the neurons and of the heads."""
    found = find_structure(bundle.model)
    for sublayer in found.sublayers:
        if sublayer.kind in kinds:
            count = sublayer.units // 2
            order = torch.randperm(sublayer.units, generator=torch.Generator().manual_seed(sublayer.block))
            kill(bundle.model, sublayer, order[:count].tolist(), size)
    return found


def livelier(bundle: Bundle) -> Bundle:
    """Random weights large enough for units to matter."""
    result = bundle.clone()
    with torch.no_grad():
        for parameter in result.model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6.0)
    return result


@pytest.fixture
def small() -> Bundle:
    return livelier(training_set.tiny_bundle(heads=4, kv_heads=2, layers=2))


@pytest.mark.parametrize("name", ["llama_tied", "llama_multi_head", "qwen2", "qwen3"])
def test_dead_units_go_and_nothing_changes(name, make_context, tmp_path):
    bundle = architecture(name)
    planted(bundle)
    step = PruneStructured(neurons=0.5, heads=0.5, importance="magnitude", multiple_of=1)
    result = step(bundle, few_tokens(make_context))
    assert torch.allclose(logits(result), logits(bundle), atol=1e-4)
    before, after = (sum(p.numel() for p in b.model.parameters()) for b in (bundle, result))
    assert result.notes["parameters_removed"] == before - after > 0
    result.save(tmp_path / "artifact")
    with quiet_transformers():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "artifact", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(IDS).logits, logits(result))
    tied = bundle.model.get_output_embeddings().weight is bundle.model.get_input_embeddings().weight
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert"])
def test_other_architectures_lose_dead_neurons(name, make_context):
    bundle = a_model(name)
    planted(bundle, kinds=("neurons",))
    step = PruneStructured(neurons=0.5, importance="activation", multiple_of=1)
    result = step(bundle, few_tokens(make_context))
    assert torch.allclose(logits(result), logits(bundle), atol=1e-4)


def test_stacked_query_key_value_follow_their_head():
    found = find_structure(architecture("gpt2").model)
    head = found.of("heads")[0]
    fused = next(p for p in head.parts if p.parameter.endswith("c_attn.weight"))
    width, per_head = found.width, head.columns.shape[1]
    own = torch.arange(per_head) + per_head  # of the second head, in each of the three parts
    assert fused.entries[1].tolist() == [*own.tolist(), *(own + width).tolist(), *(own + 2 * width).tolist()]


def test_where_no_field_holds_the_width_of_a_head_heads_and_width_go_together(make_context):
    bundle = architecture("gpt2")
    context = few_tokens(make_context)
    with pytest.raises(
        UserError, match="'gpt2' has no field for the width of a head.*give heads and width the same"
    ):
        PruneStructured(heads=0.5)(bundle, context)
    result = PruneStructured(heads=0.5, width=0.5, multiple_of=1)(bundle, context)
    config = result.model.config
    assert (config.n_head, config.n_embd) == (
        bundle.model.config.n_head // 2,
        bundle.model.config.n_embd // 2,
    )
    assert torch.isfinite(logits(result)).all()


def test_dead_channels_go_and_norms_are_matched(small, make_context):
    found = find_structure(small.model)
    dead = torch.randperm(found.width, generator=torch.Generator().manual_seed(0))[: found.width // 2]
    norms = [p for p in found.stream if dict(small.model.named_parameters())[p.parameter].dim() == 1]
    matrices = tuple(p for p in found.stream if p not in norms)
    kill(small.model, Sublayer(0, "neurons", "", dead[:, None], matrices), dead.tolist())
    result = PruneStructured(width=0.5, importance="activation", multiple_of=1)(small, make_context(small))
    assert result.model.config.hidden_size == found.width // 2
    assert torch.allclose(logits(result), logits(small), atol=1e-3)


def test_a_padding_token_in_the_text_spoils_no_norm(small, make_context):
    """Where the stream is zero, the norm over fewer channels has no ratio to that over all."""
    context = make_context(small)
    token = int(context.data.calibration.tokens[0, 0])
    with torch.no_grad():
        small.model.get_input_embeddings().weight[token] = 0
    result = PruneStructured(width=0.5, multiple_of=1)(small, context)
    assert torch.isfinite(logits(result)).all()


def test_a_width_that_its_embeddings_are_scaled_by_stays(make_context):
    bundle = architecture("gemma")
    with pytest.raises(UserError, match=r"prune_structured.width: model_type 'gemma' scales its embeddings"):
        PruneStructured(width=0.5).layers(bundle.model)
    with pytest.raises(UserError, match=r"student.hidden: model_type 'gemma' scales its embeddings"):
        Student(hidden=bundle.model.config.hidden_size // 2).layers(bundle.model)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_each_importance_finds_units_that_do_next_to_nothing(importance, small, make_context):
    found = planted(small, size=1e-2)
    step = PruneStructured(neurons=0.5, heads=0.5, importance=importance, refit=None, multiple_of=1)
    result = step(small, make_context(small))
    for sublayer in found.of("heads"):
        dead = torch.randperm(2, generator=torch.Generator().manual_seed(sublayer.block))[0]
        rows = found.width // 2
        kept = 1 - int(dead)
        old = small.model.get_submodule(sublayer.reader).weight[:, kept * rows : (kept + 1) * rows]
        assert torch.equal(result.model.get_submodule(sublayer.reader).weight, old)
    difference = (logits(result) - logits(small)).abs().max()
    assert difference < 0.05 * logits(small).abs().max()


def test_only_reconstruction_finds_that_two_neurons_do_the_same(small, make_context):
    with torch.no_grad():
        for block in small.model.model.layers:
            half = block.mlp.gate_proj.weight.shape[0] // 2
            for layer in (block.mlp.gate_proj, block.mlp.up_proj):
                layer.weight[half:] = layer.weight[:half]
    context = make_context(small)
    errors = {}
    for importance in ("magnitude", "reconstruction"):
        step = PruneStructured(
            neurons=0.5, importance=importance, multiple_of=1, refit={"damping": 1e-5, "asymmetric": 0}
        )
        result = step(small, context)
        errors[importance] = float((logits(result) - logits(small)).square().mean().sqrt())
    assert errors["reconstruction"] < 0.02 * errors["magnitude"]


def test_the_refit_lowers_the_loss_of_quality(small, make_context):
    context = make_context(small)

    def distance(**fields: Any) -> float:
        result = PruneStructured(neurons=0.5, heads=0.5, multiple_of=1, **fields)(small, context)
        ids = torch.from_numpy(context.data.heldout.tokens).long()
        with torch.no_grad():
            wanted, found = (b.model(ids).logits.log_softmax(-1) for b in (small, result))
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    without = distance(refit=None)
    assert distance(refit={"asymmetric": 0}) < 0.8 * without
    assert distance() < 0.8 * without


def test_taking_heads_alone_is_not_worse_than_taking_neurons_as_well(make_context, tmp_path):
    """What follows the heads is refitted to what it now reads, whether it loses something itself or not."""
    base = training_set.tiny_bundle(heads=4, kv_heads=4, intermediate=128)
    settings = {"tokens": 60 * 4 * training_set.WINDOW, "batch": 4, "heldout_points": 1, "optimizer": "adamw"}
    trained = Train(**settings)(base, training_set.tiny_context(base, tmp_path))
    context = make_context(trained)
    ids = torch.from_numpy(context.data.heldout.tokens).long()

    def distance(**fields: Any) -> float:
        result = PruneStructured(multiple_of=1, **fields)(trained, context)
        with torch.no_grad():
            wanted, found = (b.model(ids).logits.log_softmax(-1) for b in (trained, result))
        return float((wanted.exp() * (wanted - found)).sum(-1).mean())

    alone = distance(heads=0.5)
    assert alone < distance(heads=0.5, neurons=0.64)
    assert alone < 0.9 * distance(heads=0.5, refit={"asymmetric": 0}), "which refits what lost heads only"
    result = PruneStructured(multiple_of=1, heads=0.5)(trained, context)
    assert result.notes["worst_output_error"][0].endswith("o_proj"), "errors are of what lost something"


def test_masks_are_cut_with_the_weights_and_hold_through_the_refit(small, make_context):
    pruned = PruneMagnitude(sparsity=0.5)(small, make_context(small))
    result = PruneStructured(neurons=0.5, heads=0.5, multiple_of=1)(pruned, make_context(pruned))
    for name, mask in result.masks.items():
        weight = result.model.get_submodule(name).weight
        assert mask.shape == weight.shape
        assert (weight[~mask] == 0).all()
    assert result.masks.keys() == pruned.masks.keys()


def test_blocks_go_with_their_masks(small, make_context):
    pruned = PruneMagnitude(sparsity=0.5)(small, make_context(small))
    result = PruneStructured(blocks=0.5, neurons=0.25, multiple_of=1)(pruned, make_context(pruned))
    assert result.model.config.num_hidden_layers == 1
    assert len(result.masks) == len(pruned.masks) // 2
    assert {n.split(".")[2] for n in result.masks} == {"0"}


@pytest.mark.parametrize(
    "target",
    [
        {"parameters": 0.7},
        {"block_parameters": 0.6},
        {"bytes": 0.7, "take": ["neurons", "layers"], "shapes": 2},
    ],
)
def test_a_target_is_met_and_hardly_undercut(target, small, make_context, tmp_path):
    context = make_context(small)
    result = PruneStructured(target=target, multiple_of=1)(small, context)
    prefix = "model.layers" if "block_parameters" in target else ""
    costs = []
    for bundle in (small, result):
        bundle.save(tmp_path / "artifact")
        count = sum(p.numel() for n, p in bundle.model.named_parameters() if n.startswith(prefix))
        costs.append(weight_file_bytes(tmp_path / "artifact") if "bytes" in target else count)
    share = costs[1] / costs[0]
    wanted = next(v for k, v in target.items() if k in ("parameters", "block_parameters", "bytes"))
    assert wanted - 0.02 < share <= wanted
    assert result.notes["target"]["reached"] == pytest.approx(share)
    assert min(result.notes["kl_of_shapes_tried"].values()) > 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {"parameters": 0.1, "take": ["heads"]},
            "0.1 cannot be met by taking heads .*allow more in target.take",
        ),
        ({"parameters": 10**9}, "is within 1e\\+09 already; give a smaller number"),
        (
            {"parameters": 0.8, "fit_windows": 8},
            "more than the 8 calibration windows; raise data.calibration_windows",
        ),
    ],
)
def test_a_target_that_cannot_be_is_refused(target, message, small, make_context):
    with pytest.raises(UserError, match=message):
        PruneStructured(target=target, multiple_of=1)(small, make_context(small))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give shares of heads, neurons, width or blocks, or a target"),
        ({"neurons": 0.5, "target": {"parameters": 0.5}}, "and not both"),
        ({"target": {"parameters": 0.5, "bytes": 0.5}}, "give one of parameters"),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        PruneStructured(**fields)


def test_a_shape_that_stock_configurations_refuse_is_refused(make_context):
    bundle = architecture("llama_multi_head")  # a width of 64 is no multiple of three heads
    with pytest.raises(
        UserError, match="'llama' cannot have 3 key-value heads.*not a multiple.*other shares"
    ):
        PruneStructured(heads=0.25)(bundle, few_tokens(make_context))


def test_shares_that_round_to_nothing_are_refused(small, make_context):
    with pytest.raises(UserError, match="remove nothing of 2 blocks of 2 key-value heads and 64 neurons"):
        PruneStructured(heads=0.1)(small, make_context(small))


def test_a_mixture_of_experts_is_refused_with_what_to_take_instead(make_context):
    config = transformers.MixtralConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    bundle = architecture("llama").evolve(model=transformers.MixtralForCausalLM(config).eval())
    with pytest.raises(UserError, match="'mixtral'.*take student"):
        PruneStructured(neurons=0.5)(bundle, few_tokens(make_context))


def test_without_the_package_the_command_that_installs_it_is_named(small, monkeypatch):
    monkeypatch.setattr(structure_module, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install torch-pruning.*extra 'pruning'"):
        PruneStructured(neurons=0.5).layers(small.model)


def few_tokens(make_context: Any) -> Context:
    """Data in the few tokens of the models above."""
    context = make_context(training_set.tiny_bundle())
    windows = context.data.calibration
    few = replace(windows, tokens=windows.tokens % 50 + 3)
    return replace(context, data=replace(context.data, calibration=few))
