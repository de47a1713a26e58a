"""Structured pruning of encoder-decoders: both stacks, of T5's kind (gated and not) and of BART's."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import training_set
import transformers
from export_models import tokens
from seq2seq_models import tiny_seq2seq
from test_prune_structured import IMPORTANCES, kill

from compress.artifact.bundle import Bundle
from compress.artifact.counts import weight_file_bytes
from compress.context import Context
from compress.errors import UserError
from compress.models.checkpoints import quiet_transformers
from compress.models.tying import untie
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_structured import PruneStructured
from compress.structured import probes
from compress.structured.probes import Prober
from compress.structured.structure import find_structure
from compress.tasks.base import Example
from compress.tasks.seq2seq import SEQ2SEQ
from compress.text.examples import Examples
from compress.text.labelled.encoded import LabelledData

KINDS = ["t5", "gated", "flan", "mt5", "bart"]
IDS = torch.from_numpy(tokens(2, 24)).long()


def model_of(kind: str) -> Bundle:
    """T5, its gated kind, with a head of its own (FLAN-T5), mT5; BART."""
    if kind == "bart":
        return tiny_seq2seq("bart")
    bundle = tiny_seq2seq("t5")
    sizes = {key: getattr(bundle.model.config, key) for key in ("vocab_size", "d_model", "d_ff", "num_heads")}
    name = "MT5" if kind == "mt5" else "T5"
    config = getattr(transformers, f"{name}Config")(
        **sizes, d_kv=8, num_layers=3, num_decoder_layers=2, decoder_start_token_id=3, pad_token_id=3,
        eos_token_id=2, feed_forward_proj="relu" if kind == "t5" else "gated-gelu",
        architectures=[f"{name}ForConditionalGeneration"],
        **({"tie_word_embeddings": False} if kind == "flan" else {}),
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    if kind == "flan":
        untie(model, ["lm_head.weight"])  # as its files hold one
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return bundle.evolve(model=model)


def few_tokens(make_context: Any) -> Context:
    context = make_context(training_set.tiny_bundle())
    few: dict[str, Any] = {
        name: replace(windows, tokens=windows.tokens % 90 + 4)
        for name in ("calibration", "heldout")
        if (windows := getattr(context.data, name)) is not None
    }
    few["train"] = context.data.train % 90 + 4
    return replace(context, data=replace(context.data, **few))


@torch.no_grad()
def answer(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return SEQ2SEQ.answers(model, ids)


def planted(bundle: Bundle, kind: str, size: float = 0.0) -> None:
    """Half of the neurons, or heads, of every block dead: others in each, but where heads share a table."""
    for sublayer in find_structure(bundle.model).of(kind):
        seed = 7 if sublayer.table else 1 + sublayer.block
        order = torch.randperm(sublayer.units, generator=torch.Generator().manual_seed(seed))
        kill(bundle.model, sublayer, order[: sublayer.units // 2].tolist(), size)


def stock(bundle: Bundle, folder: Any) -> Any:
    """What stock transformers loads of it."""
    bundle.save(folder)
    with quiet_transformers():
        return transformers.AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval()


def close(found: torch.Tensor, wanted: torch.Tensor, share: float = 1e-4) -> None:
    assert (found - wanted).abs().max() < share * wanted.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_dead_neurons_of_both_stacks_go_and_nothing_changes(kind, make_context, tmp_path):
    bundle = model_of(kind)
    planted(bundle, "neurons")
    result = PruneStructured(neurons=0.5, multiple_of=1)(bundle, few_tokens(make_context))
    close(answer(result.model), answer(bundle.model), 2e-3)  # the refit's ridge
    config = result.model.config
    names = ["encoder_ffn_dim", "decoder_ffn_dim"] if kind == "bart" else ["d_ff"]
    assert [getattr(config, name) for name in names] == [56] * len(names)
    loaded = stock(result, tmp_path / "out")
    assert torch.equal(answer(loaded), answer(result.model))
    tied = bundle.model.lm_head.weight is bundle.model.get_input_embeddings().weight
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied == (kind != "flan")
    assert len(result.notes["kept_decoder_blocks"]) == result.notes["left"]["decoder_blocks"] == 2


@pytest.mark.parametrize("kind", ["gated", "bart"])  # of T5's relus some never fire
@pytest.mark.parametrize("importance", IMPORTANCES)
def test_each_importance_finds_neurons_that_do_next_to_nothing(kind, importance, make_context):
    bundle = model_of(kind)
    planted(bundle, "neurons", 1e-3)
    step = PruneStructured(neurons=0.5, importance=importance, refit=None, multiple_of=1)
    result = step(bundle, few_tokens(make_context))
    close(answer(result.model), answer(bundle.model), 1e-2)


@pytest.mark.parametrize("kind", ["t5", "flan", "mt5"])
@pytest.mark.parametrize("importance", ["magnitude", "reconstruction"])
def test_dead_heads_go_in_all_blocks_that_share_their_positions(importance, kind, make_context, tmp_path):
    bundle = model_of(kind)
    planted(bundle, "heads")
    result = PruneStructured(heads=0.5, importance=importance)(bundle, few_tokens(make_context))
    close(answer(result.model), answer(bundle.model), 2e-3)
    config = result.model.config
    assert (config.num_heads, config.d_kv, config.d_model) == (2, 8, 64)
    table = result.model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
    assert table.weight.shape == (32, 2)
    assert torch.equal(answer(stock(result, tmp_path / "out")), answer(result.model))


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_each_importance_finds_heads_that_do_next_to_nothing_in_a_whole_stack(importance, make_context):
    bundle = model_of("gated")
    planted(bundle, "heads", 1e-3)
    context = few_tokens(make_context)
    result = PruneStructured(heads=0.5, importance=importance, refit=None)(bundle, context)
    close(answer(result.model), answer(bundle.model), 1e-2)


def test_heads_of_a_stack_are_weighed_together(make_context):
    """One that is dead in one block and matters in the others stays before one that matters in none."""
    bundle = model_of("gated")
    found = [s for s in find_structure(bundle.model).of("heads") if s.table and s.stack == "encoder.block"]
    for sublayer in found:  # 0: dead in the first block only; 1: feeble everywhere
        kill(bundle.model, replace(sublayer, parts=sublayer.parts[:1]), [1], 1e-2)
    kill(bundle.model, replace(found[0], parts=found[0].parts[:1]), [0])
    for importance in ("activation", "reconstruction", "taylor", "kl"):
        step = PruneStructured(heads=0.25, importance=importance, refit=None)
        result = step(bundle, few_tokens(make_context)).model
        for number, sublayer in enumerate(found):
            old = bundle.model.get_submodule(sublayer.reader).weight[:, [*range(8), *range(16, 32)]]
            assert torch.equal(result.encoder.block[number].layer[0].SelfAttention.o.weight, old)


@pytest.mark.parametrize("kind", KINDS)
def test_dead_channels_go_and_norms_and_the_scale_of_the_head_are_matched(kind, make_context, tmp_path):
    bundle = model_of(kind)
    if kind == "bart":
        bundle = plain_bart()
    found = find_structure(bundle.model)
    parameters = dict(bundle.model.named_parameters())
    dead = torch.randperm(found.width, generator=torch.Generator().manual_seed(0))[: found.width // 2]
    matrices = tuple(p for p in found.stream if parameters[p.parameter].dim() == 2)
    ends = {"bart": 3, "flan": 2}.get(kind, 1)  # tables of tokens and of positions, a head of its own
    assert len(matrices) == ends + sum(is_of_blocks(n, p) for n, p in parameters.items())
    kill(bundle.model, replace(found.sublayers[0], parts=matrices), dead.tolist())
    shares = {"heads": 0.5} if kind == "bart" else {}
    if kind == "bart":  # heads and width go together there
        planted(bundle, "heads")
        with torch.no_grad():
            for part in found.stream:
                if part not in matrices:
                    parameters[part.parameter][dead] = 0
    result = PruneStructured(width=0.5, **shares, importance="activation", multiple_of=1)(
        bundle, few_tokens(make_context)
    )
    assert result.model.config.d_model == 32
    if kind != "bart":  # where a norm subtracts no mean, the rest is as it was
        close(answer(result.model), answer(bundle.model), 2e-3)
    assert torch.isfinite(answer(result.model)).all()
    assert torch.equal(answer(stock(result, tmp_path / "out")), answer(result.model))


def is_of_blocks(name: str, parameter: torch.Tensor) -> bool:
    inside = ".block." in name or ".layers." in name
    return inside and parameter.dim() == 2 and "relative_attention_bias" not in name


def plain_bart() -> Bundle:
    """As the published ones are: no embeddings scaled by their width."""
    bundle = tiny_seq2seq("bart")
    bundle.model.config.scale_embedding = False
    model = type(bundle.model)(bundle.model.config).eval()
    model.load_state_dict(bundle.model.state_dict())
    return bundle.evolve(model=model)


def test_a_width_that_bart_scales_its_embeddings_by_stays():
    with pytest.raises(UserError, match=r"prune_structured.width: model_type 'bart' scales its embeddings"):
        PruneStructured(width=0.5).layers(tiny_seq2seq("bart").model)


def test_blocks_of_each_stack_go_by_shares_of_their_own(make_context):
    """Those that do nothing; the first block's relative positions are handed on to the next."""
    bundle = model_of("gated")
    with torch.no_grad():
        for stack, number in (("encoder", 0), ("encoder", 2), ("decoder", 1)):
            for part in getattr(bundle.model, stack).block[number].layer:
                for name, parameter in part.named_parameters():
                    if name.endswith((".o.weight", ".wo.weight")):
                        parameter.zero_()
    result = PruneStructured(blocks=0.67, decoder_blocks=0.5)(bundle, few_tokens(make_context))
    assert result.notes["kept_blocks"] == [1]
    assert result.notes["kept_decoder_blocks"] == [0]
    assert (result.model.config.num_layers, result.model.config.num_decoder_layers) == (1, 1)
    close(answer(result.model), answer(bundle.model))


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_blocks_go_with_units_and_masks(kind, make_context, tmp_path):
    bundle, context = model_of(kind), few_tokens(make_context)
    masked = PruneMagnitude(sparsity=0.5)(bundle, context)
    step = PruneStructured(decoder_blocks=0.5, neurons=0.5, multiple_of=1, importance="taylor")
    result = step(masked, context)
    assert result.notes["left"]["decoder_blocks"] == 1
    assert result.notes["left"]["blocks"] == result.notes["of"]["blocks"]
    for name, mask in result.masks.items():
        weight = result.model.get_submodule(name).weight
        assert mask.shape == weight.shape
        assert (weight[~mask] == 0).all()
    assert torch.equal(answer(stock(result, tmp_path / "out")), answer(result.model))
    after, before = (sum(p.numel() for p in each.model.parameters()) for each in (result, bundle))
    assert step.share_left(bundle.model) == pytest.approx(after / before, abs=0.1)


@pytest.mark.parametrize("kind", ["gated", "bart"])
@pytest.mark.parametrize(
    "target",
    [
        {"parameters": 0.7, "take": ["neurons"]},
        {"block_parameters": 0.6, "take": ["neurons", "layers"]},
        {"bytes": 0.8, "take": ["neurons", "heads"]},
    ],
)
def test_a_target_is_met_and_hardly_undercut(kind, target, make_context, tmp_path):
    bundle, context = model_of(kind), few_tokens(make_context)
    step = PruneStructured(target={**target, "shapes": 2}, multiple_of=1)
    result = step(bundle, context)
    measure, wanted = next((k, v) for k, v in target.items() if k != "take")
    costs = []
    for each in (bundle, result):
        each.save(tmp_path / "artifact")
        inside = (".block.", ".layers.") if measure == "block_parameters" else ("",)
        parameters = each.model.named_parameters()
        count = sum(p.numel() for n, p in parameters if any(part in f".{n}" for part in inside))
        costs.append(weight_file_bytes(tmp_path / "artifact") if measure == "bytes" else count)
    share = costs[1] / costs[0]
    assert wanted - 0.02 < share <= wanted
    assert result.notes["target"]["reached"] == pytest.approx(share)
    assert all(math.isfinite(value) for value in result.notes["kl_of_shapes_tried"].values())


@pytest.mark.parametrize("labelled", [True, False])
def test_the_loss_is_that_of_stock_transformers(labelled):
    """Of the targets of labelled rows, or of the second half of a window."""
    bundle = model_of("mt5")
    windows = torch.from_numpy(tokens(3, 21)).long()
    pairs = [(window[:10], window[10:]) for window in windows]
    rows = None
    if labelled:
        draw = np.random.default_rng(0)
        lengths = [(5, 3), (7, 12), (9, 1)]
        drawn = [tuple(draw.integers(4, 90, n).astype(np.int32) for n in pair) for pair in lengths]
        part = Examples("text", (), tuple(Example(*pair) for pair in drawn))
        rows = LabelledData("rows", part, part, part)
        pairs = [tuple(torch.from_numpy(each).long() for each in pair) for pair in drawn]
    texts = Prober(rows).texts(bundle.model, windows)
    assert len(texts) == 3
    for source, target in pairs:
        text = next(t for t in texts if torch.equal(t.inputs["input_ids"][0], source))
        with torch.no_grad():
            wanted = bundle.model(input_ids=source[None], labels=target[None].clone()).loss
            assert float(probes.loss(bundle.model, text)) == pytest.approx(float(wanted), rel=1e-5)
    assert probes.unit(SEQ2SEQ) == "nats per token"


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("uneven", {"neurons": 0.5}, "prune_structured.neurons: blocks differ in their number of neurons"),
        ("uneven", {"heads": 0.5}, "prune_structured.heads: blocks differ in their number of heads"),
        ("bart", {"width": 0.5}, "scales its embeddings by its width"),
        ("t5", {"neurons": 0.001}, "remove nothing of 3 and 2 blocks of 4 key-value heads and 112 neurons"),
    ],
)
def test_what_cannot_be_is_refused(kind, fields, message, make_context):
    bundle = model_of("bart") if kind in ("uneven", "bart") else model_of(kind)
    if kind == "uneven":
        config = bundle.model.config
        config.encoder_ffn_dim, config.decoder_attention_heads = 96, 2
        bundle = bundle.evolve(model=type(bundle.model)(config).eval())
    step, context = PruneStructured(**fields), few_tokens(make_context)

    def tried() -> None:
        step.layers(bundle.model)
        step(bundle, context)

    with pytest.raises(UserError, match=message):
        tried()


def test_a_decoder_has_no_blocks_of_a_second_stack():
    with pytest.raises(UserError, match=r"prune_structured.decoder_blocks: is for encoder-decoders.*blocks"):
        PruneStructured(decoder_blocks=0.5).layers(training_set.tiny_bundle().model)
