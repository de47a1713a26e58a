"""Structured pruning of encoder-decoders in what comes after it: healed, exported, timed, reported."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import training_set
import transformers
from cli_helpers import invoke, results, write_recipe, write_text
from export_models import quantized, tokens, traced_once
from seq2seq_models import PADDING, write_seq2seq
from test_prune_seq2seq import answer, close, few_tokens, model_of, planted, stock
from tokenizers import ByteLevelBPETokenizer

from compress.artifact.bundle import Bundle
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.encoder_check import compare_encoder
from compress.export.onnx.forms import Forms
from compress.formats import Int8
from compress.passes.distill import Distill
from compress.passes.prune_structured import PruneStructured
from compress.records.manifest import Manifest
from compress.runtimes.onnx_seq2seq import OnnxSeq2Seq
from compress.structured import costs as costs_module
from compress.structured.timing import decode_shares, timed


def test_heads_of_bart_are_closed_and_left_out_of_both_graphs(make_context, tmp_path):
    bundle = model_of("bart")
    planted(bundle, "heads")
    result = PruneStructured(heads=0.5)(bundle, few_tokens(make_context))
    close(answer(result.model), answer(bundle.model), 2e-3)
    assert result.notes["closed_heads"]["per_block"] == 2
    assert result.notes["parameters_removed"] == 0, "the file keeps its zeros"
    assert torch.equal(answer(stock(result, tmp_path / "out")), answer(result.model))
    for held in (result, quantized(result, Int8())):
        with traced_once():
            facts = write_artifact(held, tmp_path / "onnx", Forms("token"))
        assert facts["closed_heads_left_out"] == 2 * 5  # of one attention in the encoder, four in the decoder
        runtime = OnnxSeq2Seq(tmp_path / "onnx", 1)
        kind = "float32" if held is result else "activations"
        assert compare_encoder(held.model, runtime, tokens(2, 20), kind, padding=PADDING).passed
        state = runtime.prefill(tokens(1, 9))
        cache = [kept.shape() for kept in (*state.source.values(), *state.text.values())]
        assert {shape[1] for shape in cache if len(shape) == 4} == {2}


def test_a_target_of_time_is_that_of_an_answers_tokens(make_context, monkeypatch):
    asked = []

    def shares(model: Any, whole: Any, rounds: int = 8) -> tuple[float, list[float]]:
        if not asked:
            asked.append(decode_shares(model, whole, rounds=1)[0])
        sizes = [sum(p.numel() for p in each.parameters()) for each in (model, whole)]
        return sizes[0] / sizes[1], [sizes[0] / sizes[1]] * rounds

    monkeypatch.setattr(costs_module, "decode_shares", shares)
    target = {"latency": 0.75, "take": ["neurons", "layers"], "largest_loss": 50.0, "shapes": 2}
    notes = PruneStructured(target=target, multiple_of=1)(model_of("t5"), few_tokens(make_context)).notes
    assert notes["target"]["measured"].startswith("a token of an answer, the source read, in torch")
    assert asked[0] > 0


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_answers_time_is_that_of_steps_with_what_was_read(kind):
    """The source is read once a turn at most, and the clock stands for it."""
    model, reads, steps = model_of(kind).model, [], []
    model.get_encoder().register_forward_hook(lambda *_: reads.append(1))
    model.get_decoder().register_forward_hook(lambda *_: steps.append(1))
    share, rounds = decode_shares(model, model, rounds=4, clock=lambda: float(len(steps)))
    assert share == 1.0
    assert len(rounds) == 4
    assert len(reads) <= 2 + len(steps) // 32
    assert timed(model).startswith("a token of an answer")


def test_a_pruned_model_heals_by_its_teacher(make_context):
    bundle, context = model_of("gated"), few_tokens(make_context)
    context = replace(context, teacher=lambda: bundle)
    pruned = PruneStructured(neurons=0.75, heads=0.5, multiple_of=1, refit=None)(bundle, context)
    settings = {"optimizer": "adamw", "learning_rate": 3e-3, "heldout_points": 1, "batch": 4}
    healed = Distill(tokens=60 * 4 * training_set.WINDOW, spans=0, **settings)(pruned, context)

    def apart(each: Bundle) -> float:
        ids = torch.from_numpy(context.data.heldout.tokens).long()
        p, q = (answer(b.model, ids).log_softmax(-1) for b in (bundle, each))
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert apart(healed) < 0.8 * apart(pruned)


def test_a_whole_run_with_its_report(tmp_path):
    text = write_text(tmp_path / "text")
    pieces = ByteLevelBPETokenizer()
    pieces.train([str(p) for p in sorted(text.iterdir())], vocab_size=300, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer)
    checkpoint = write_seq2seq(tmp_path / "model", "t5", tokenizer)
    shares = ["heads", "neurons", "width", "blocks", "decoder_blocks"]
    recipe = write_recipe(
        tmp_path / "tiny.yaml", text, model={"checkpoint": str(checkpoint)},
        variants={
            "half": [
                {"prune_structured": {**dict.fromkeys(shares, 0.5), "multiple_of": 8}},
                {"distill": {"tokens": 512, "batch": 4, "spans": 0}},
                {"export_onnx": {"check_tokens": 64}},
            ],
        },
    )  # fmt: skip
    outcome = invoke("run", recipe, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")
    assert set(found) == {("base", "torch"), ("half", "torch"), ("half", "onnxruntime")}
    half, graph = found["half", "torch"], found["half", "onnxruntime"]
    assert half["parameters"] < found["base", "torch"]["parameters"]
    assert graph["nll"] == pytest.approx(half["nll"], abs=1e-3)
    assert graph["decode_tokens_per_second"] > 0
    assert Manifest.read(tmp_path / "run" / "half" / "onnx" / "manifest.json").onnx["check"]["passed"]
    assert (tmp_path / "run" / "report.html").is_file()
