"""Encoder-decoders: asked as one half of a window by the other, rounded, exported as two graphs."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cli_helpers import invoke, refused, results, write_recipe, write_text
from export_models import SPINNING, quantized, session_entry, tokens, traced_once
from seq2seq_models import CONTEXT, PADDING, SEQ2SEQ, tiny_seq2seq, write_seq2seq

from compress.artifact.bundle import Bundle
from compress.calibration.walk import walk
from compress.errors import UserError
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.check import ExportCheckFailed
from compress.export.onnx.encoder_check import compare_encoder
from compress.export.onnx.forms import Forms
from compress.export.onnx.graph import GraphBuilder
from compress.formats import Int4, Int8, QuantizedTensor
from compress.formats.swap import put_codes, quantize_embeddings, tables
from compress.generation.generator import TextGenerator, generate
from compress.layerwise.quantize import LayerSolver, quantize_sequentially
from compress.measure.quality import score
from compress.models.layers import linear_layers, matrix
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.prune_sparsegpt import PruneSparsegpt
from compress.passes.prune_wanda import PruneWanda
from compress.records.manifest import Manifest
from compress.runtimes import detect_runtime, open_runtime
from compress.runtimes.onnx_seq2seq import OnnxSeq2Seq
from compress.tasks import seq2seq

TASK = seq2seq.SEQ2SEQ
KINDS = list(SEQ2SEQ)


@pytest.fixture(scope="module", autouse=True)
def _graphs_shared_by_formats():
    with traced_once():
        yield


def in_torch(model, ids):
    with torch.inference_mode():
        return TASK.answers(model, torch.from_numpy(ids).long()).numpy()


@pytest.mark.parametrize("name", KINDS)
class TestInTorch:
    def test_the_second_half_of_a_window_is_predicted_from_the_first(self, name):
        model, windows = tiny_seq2seq(name).model, torch.from_numpy(tokens(2, 21)).long()
        source, target = windows[:, :10], windows[:, 10:].clone()
        with torch.inference_mode():
            loss = model(input_ids=source, labels=target).loss
            logits = TASK.answers(model, windows)
        assert logits.shape == (2, 11, model.config.vocab_size)
        own = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())
        assert own == pytest.approx(float(loss), rel=1e-5)
        asked = [TASK.question(window, index) for index, window in enumerate(windows.int().numpy())]
        assert all(np.array_equal(a.targets, t) for a, t in zip(asked, target.numpy(), strict=True))
        scores = score(lambda ids: in_torch(model, ids), windows.int().numpy(), task=TASK)
        assert sum(scores.nats) / sum(scores.tokens) == pytest.approx(float(loss), rel=1e-5)

    def test_all_tables_share_one_set_of_codes_when_it_is_saved_too(self, name, tmp_path):
        bundle = tiny_seq2seq(name)
        ids, before = tokens(2, 20), len(tables(bundle.model))
        exact = in_torch(bundle.model, ids)
        changed = quantize_embeddings(bundle.model, Int8())
        assert len(changed) == before + 1 == 4
        assert len({id(bundle.model.get_submodule(name).quantized) for name in changed}) == 1
        found = in_torch(bundle.model, ids)
        assert 0 < np.abs(found - exact).max() < 0.05 * np.abs(exact).max()
        bundle.save(tmp_path / "out")
        loaded = Bundle.load(tmp_path / "out").model
        assert np.array_equal(in_torch(loaded, ids), found)
        assert len({id(loaded.get_submodule(name).quantized) for name in changed}) == 1

    def test_token_by_token_it_gives_the_same(self, name, tmp_path):
        tiny_seq2seq(name).save(tmp_path / "out")
        stepwise(open_runtime(tmp_path / "out", "torch", 1))


@pytest.mark.parametrize("name", KINDS)
class TestCalibration:
    def test_the_walk_sees_what_a_plain_forward_pass_sees(self, name):
        model = tiny_seq2seq(name).model
        names, windows = linear_layers(model), torch.from_numpy(tokens(6, 20)).long()
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(n).register_forward_pre_hook(lambda _, args, n=n: seen.update({n: args[0]}))
            for n in names
        ]
        with torch.inference_mode():
            TASK.answers(model, windows)
        for handle in handles:
            handle.remove()
        visited = []
        for visit in walk(model, windows, names, both_streams=True, batch=4):
            visited += visit.names
            x = seen[visit.names[0]].flatten(0, -2)
            expected = x.T @ x
            assert (visit.covariance.hessian - expected).norm() < 1e-5 * expected.norm()
            aim = visit.covariance.aim(torch.ones(1, x.shape[1]))
            assert aim is None or aim.norm() < 1e-5 * expected.norm()  # nothing has been changed
        assert sorted(visited) == sorted(names)

    def test_a_decoder_sees_what_its_encoder_has_become(self, name):
        model = tiny_seq2seq(name).model
        names, windows = linear_layers(model), torch.from_numpy(tokens(4, 20)).long()
        moved = {}
        for visit in walk(model, windows, names, both_streams=True):
            weight = model.get_submodule(visit.names[0]).weight.detach()
            aim = visit.covariance.aim(weight)
            moved[visit.names[0]] = 0.0 if aim is None else float(aim.norm())
            if ".encoder." in f".{visit.names[0]}":
                weight *= 1.1
        across = [n for n in moved if ("EncDecAttention.k" in n or "encoder_attn.k_proj" in n)]
        own = next(n for n in moved if ".decoder." in f".{n}")
        assert len(across) == 2
        assert all(moved[n] > 1e-3 for n in across)
        assert moved[own] < 1e-6

    def test_gptq_loses_less_than_rounding(self, name):
        original = tiny_seq2seq(name).model
        names, format = linear_layers(original), Int4(group=16)
        windows, heldout = (torch.from_numpy(tokens(n, 48, seed=n)).long() for n in (32, 8))
        with torch.inference_mode():
            wanted = TASK.answers(original, heldout).log_softmax(-1)

        def loss(model):
            with torch.inference_mode():
                found = TASK.answers(model, heldout).log_softmax(-1)
            return float((wanted.exp() * (wanted - found)).sum(-1).mean())

        rounded, plain, aimed = (tiny_seq2seq(name).model for _ in range(3))
        for n in names:
            put_codes(rounded, n, QuantizedTensor.round(format, matrix(rounded.get_submodule(n))))
        for model, share in ((plain, 0), (aimed, 0.5)):
            solver = LayerSolver(asymmetric=share)
            quantize_sequentially(model, windows, dict.fromkeys(names, format), solver)
        assert loss(plain) < 0.7 * loss(rounded)
        assert loss(aimed) < 0.9 * loss(plain)

    def test_pruning_solvers_keep_their_order(self, name, tmp_path):
        original = tiny_seq2seq(name)
        calibration = SimpleNamespace(tokens=tokens(32, 48, seed=1))
        context = SimpleNamespace(
            data=SimpleNamespace(calibration=calibration),
            device=torch.device("cpu"),
            precision="float32",
            workdir=tmp_path,
        )
        heldout = torch.from_numpy(tokens(8, 48, seed=2)).long()
        with torch.inference_mode():
            wanted = TASK.answers(original.model, heldout)
        lost = []
        for step in (PruneMagnitude(sparsity=0.5), PruneWanda(sparsity=0.5), PruneSparsegpt(sparsity=0.5)):
            pruned = step(original, context)
            assert all(float(mask.float().mean()) == 0.5 for mask in pruned.masks.values())
            with torch.inference_mode():
                lost.append(float((TASK.answers(pruned.model, heldout) - wanted).norm()))
        assert lost[2] < lost[1]
        assert lost[2] < lost[0]
        with pytest.raises(UserError, match="shares zeros out over one list"):
            PruneWanda(sparsity=0.5, allocation="owl").layers(original.model)


def stepwise(runtime):
    """Prefill and decode give what `logits` gives at once."""
    ids = tokens(2, 16)
    whole = runtime.logits(ids)
    state = runtime.prefill(ids[:, :8])
    for position in range(8):
        assert np.abs(state.logits - whole[:, position]).max() < 1e-4 * np.abs(whole).max()
        state = runtime.decode(state, ids[:, 8 + position])
    assert state.length == 16


@pytest.fixture(scope="module", params=KINDS)
def exported(request, tmp_path_factory):
    pytest.importorskip("onnxscript")
    bundle = tiny_seq2seq(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    facts = write_artifact(bundle, folder, Forms("token"))
    return bundle, folder, facts


class TestExport:
    def test_both_graphs_give_what_torch_gives_padded_or_not(self, exported):
        bundle, folder, facts = exported
        assert detect_runtime(folder) == "onnxruntime"
        runtime = open_runtime(folder, "onnxruntime", 1)
        assert isinstance(runtime, OnnxSeq2Seq)
        sleeping = open_runtime(folder, "onnxruntime", 1, waiting="sleep")
        assert [session_entry(sleeping, SPINNING, part) for part in ("_encoder", "_decoder")] == ["0", "0"]
        stepwise(runtime)
        found = compare_encoder(bundle.model, runtime, tokens(4, 30), "float32", padding=PADDING)
        assert found.measure < 1e-4
        assert set(facts["linear_forms"]) == {"float"}

    def test_a_padded_source_is_answered_as_stock_transformers_answers_it_alone(self, exported):
        """On the right, on the left, and in one batch at both ends, whatever the padding is."""
        bundle, folder, _ = exported
        runtime = OnnxSeq2Seq(folder, 1)
        texts = [tokens(1, 20)[0], tokens(1, 9, seed=5)[0], tokens(1, 14, seed=6)[0]]
        alone = [in_torch(bundle.model, text[None])[0] for text in texts]
        tolerance = 1e-5 * max(np.abs(answer).max() for answer in alone)
        for filler, left in ((PADDING, False), (7, False), (PADDING, True), (7, True)):
            for found, right in zip(runtime.padded(texts, filler, left=left), alone, strict=True):
                assert np.abs(found - right).max() < tolerance
        width, target = 15, 10
        for filler in (PADDING, 7):
            ids, mask = np.full((3, width), filler), np.zeros((3, width), np.int64)
            asked = np.full((3, target), filler)
            for row, (text, begin) in enumerate(zip(texts, (3, 11, 0), strict=True)):
                source, wanted = seq2seq.halves(text)  # padded at both ends, on the left, on the right
                ids[row, begin : begin + len(source)] = source
                mask[row, begin : begin + len(source)] = 1
                asked[row, : len(wanted)] = wanted
            answers = runtime._answers(ids, mask, asked)
            for found, right in zip(answers, alone, strict=True):
                assert np.abs(found[: len(right)] - right).max() < tolerance

    def test_the_table_lies_in_the_file_once(self, exported):
        bundle, folder, facts = exported
        parameters = sum(p.numel() for p in bundle.model.parameters())  # tied ones once
        buffers = sum(b.numel() for b in bundle.model.buffers())
        assert facts["weight_bytes"] <= 4 * (parameters + buffers)
        assert (folder / "model.onnx_data").stat().st_size < 4 * parameters + 4096 * 200
        for name in ("encoder_model.onnx", "decoder_model.onnx"):
            onnx.checker.check_model(folder / name)

    def test_a_decoder_that_forgets_is_found_out(self, exported, monkeypatch):
        bundle, folder, _ = exported
        runtime = OnnxSeq2Seq(folder, 1)
        decode = runtime.decode
        monkeypatch.setattr(
            runtime, "decode", lambda state, tokens: decode(replace(state, text=runtime._nothing(1)), tokens)
        )
        with pytest.raises(ExportCheckFailed, match="differ"):
            compare_encoder(bundle.model, runtime, tokens(2, 20), "float32")

    def test_a_token_costs_one_token_and_the_source_is_read_once(self, exported):
        _, folder, _ = exported
        runtime = OnnxSeq2Seq(folder, 1)
        state = runtime.prefill(tokens(2, 9))
        grown = runtime.decode(state, tokens(2, 1)[:, 0])
        assert grown.source is state.source
        for name, kept in grown.text.items():
            assert kept.shape() == [2, 4, 2, 16]
            assert np.array_equal(kept.numpy()[:, :, :1], state.text[name].numpy())
        reading = onnxruntime.InferenceSession(folder / "encoder_model.onnx")
        sides = [f"present.{i}.encoder.{kind}" for i in range(2) for kind in ("key", "value")]
        assert [output.name for output in reading.get_outputs()] == sides

    def test_a_decoder_of_other_weights_is_found_out(self, exported):
        bundle, folder, _ = exported
        other = tiny_seq2seq(bundle.model.config.model_type, seed=1)
        with pytest.raises(ExportCheckFailed, match="differ"):
            compare_encoder(other.model, OnnxSeq2Seq(folder, 1), tokens(2, 20), "float32")


def test_two_graphs_share_weights_of_one_name_only_where_they_are_the_same(tmp_path):
    table, first, second = (np.full((40, 40), value, dtype=np.float32) for value in (1, 2, 3))
    arrays = []
    before = None
    for file, other in (("a.onnx", first), ("b.onnx", second)):
        with GraphBuilder(tmp_path, file, after=before) as graph:
            total = graph.op("Add", graph.weight("table", table), graph.weight("other", other))
            graph.node("Identity", [total], ["y"])
            graph.output("y", onnx.TensorProto.FLOAT, [40, 40])
            graph.save("test", {})
        arrays.append(onnxruntime.InferenceSession(tmp_path / file).run(None, {})[0])
        before = graph
    assert (arrays[0] == 3).all()
    assert (arrays[1] == 4).all()
    assert graph.weight_bytes == table.nbytes  # the table is there already


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("format", "form", "kind"), [
    (Int8(), "token", "activations"),
    (Int8(), "blocks", "activations"),
    (Int4(group=32), "blocks", "weights"),
])  # fmt: skip
def test_codes_are_exported_as_they_are(name, format, form, kind, tmp_path):
    pytest.importorskip("onnxscript")
    bundle = quantized(tiny_seq2seq(name), format)
    write_artifact(bundle, tmp_path, Forms(form, accuracy_level=0 if kind == "weights" else 4))
    found = compare_encoder(bundle.model, OnnxSeq2Seq(tmp_path, 1), tokens(4, 30), kind, padding=PADDING)
    assert found.passed
    assert found.tokens == sum(30 - i for i in range(4))


def test_a_whole_run_with_its_report_and_a_text(tmp_path):
    pytest.importorskip("onnxscript")
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    text = write_text(tmp_path / "text")
    pieces = ByteLevelBPETokenizer()
    pieces.train([str(p) for p in sorted(text.iterdir())], vocab_size=300, show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer)
    checkpoint = write_seq2seq(tmp_path / "model", "t5", tokenizer)
    recipe = write_recipe(
        tmp_path / "tiny.yaml", text, model={"checkpoint": str(checkpoint)}, base=["export_onnx"],
        variants={
            "int8": ["quantize_round", {"export_onnx": {"check_tokens": 128}}],
            "four": ["quantize_gptq", {"export_onnx": {"check_tokens": 128}}],
        },
    )  # fmt: skip
    outcome = invoke("run", recipe, "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")
    assert set(found) == {(v, r) for v in ("base", "int8", "four") for r in ("torch", "onnxruntime")}
    result = found["int8", "onnxruntime"]
    facts = Manifest.read(tmp_path / "run" / "int8" / "onnx" / "manifest.json").onnx
    assert facts["task"] == "seq2seq"
    assert facts["check"]["passed"]
    assert 0 < result["kl_to_base"] < 0.1
    assert result["decode_tokens_per_second"] > 0
    assert result["weight_bytes"] < 0.5 * found["base", "torch"]["weight_bytes"]
    texts = []
    for folder in (tmp_path / "run" / "base", tmp_path / "run" / "base" / "onnx"):
        written = invoke("generate", folder, "-p", "the end of", "--tokens", 5)
        assert written.code == 0, written.err
        texts.append(written.out)
    assert texts[0] == texts[1]
    together = generate(tmp_path / "run" / "base" / "onnx", ["the end of", "a"], tokens=5)
    assert together[0].strip() == texts[0].strip()
    tuned = write_recipe(
        tmp_path / "tuned.yaml",
        text,
        model={"checkpoint": str(checkpoint)},
        variants={"four": ["quantize_gptq", "tune_scales"]},
    )
    line = refused("run", tuned, "-o", tmp_path / "tuned")
    assert "tune_scales: does not take an encoder-decoder (model_type 't5')" in line
    assert "quantize_gptq" in line


def test_an_answer_begins_with_the_token_that_is_forced_upon_it(tmp_path):
    bundle = tiny_seq2seq("bart")
    bundle.save(tmp_path / "out")
    free = TextGenerator(tmp_path / "out")
    prompt = "w5 w6 w7"
    bundle.model.generation_config.forced_bos_token_id = 9
    bundle.save(tmp_path / "forced")
    source = torch.tensor([free.encode(prompt)])
    for folder in ("out", "forced"):
        ours = TextGenerator(tmp_path / folder)
        model = Bundle.load(tmp_path / folder).model
        theirs = model.generate(source, max_new_tokens=6, do_sample=False, num_beams=1, min_length=0)[0, 1:]
        expected = ours.tokenizer.decode(theirs.tolist()).removesuffix("w2")  # the end of a text
        assert "".join(ours.stream(prompt, 6)).strip() == expected.strip()
        assert ours.generate([prompt, prompt], 6) == [ours.generate([prompt], 6)[0]] * 2
    assert free.first is None
    assert ours.first == 9
    assert expected.startswith("w9")


def test_the_room_of_an_answer_is_not_taken_by_its_source(tmp_path):
    tiny_seq2seq("bart").save(tmp_path / "out")
    generator = TextGenerator(tmp_path / "out")
    generator.ends = set()
    list(generator.stream(" ".join(["w5"] * (CONTEXT - 1)), 1000))
    assert generator.counts.tokens == CONTEXT


@pytest.mark.parametrize("field", ["decoder_start_token_id", "forced_bos_token_id"])
def test_a_text_that_would_begin_with_no_token_is_refused(field, tmp_path):
    """On an index out of range torch ends in a traceback, and a graph in the middle of an answer."""
    bundle = tiny_seq2seq("bart")
    text = write_text(tmp_path / "text.txt")
    bundle.model.save_pretrained(tmp_path / "out")
    for file in (tmp_path / "out").glob("*config.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), field: 2**31}))
    bundle.tokenizer.save_pretrained(tmp_path / "out")
    line = refused("generate", tmp_path / "out", "--prompt", "w5 w6 w7")
    assert f"{field}: 2147483648" in line
    assert "give the number of one" in line
    if field == "decoder_start_token_id":
        sizes = ("--window", CONTEXT, "--windows", 2)
        assert field in refused("bench", tmp_path / "out", "--text", text, *sizes)
