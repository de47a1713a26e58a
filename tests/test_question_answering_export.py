"""Models that find answers leave for ONNX Runtime, and a whole run of them is what stock libraries say."""

import json
import shutil
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
import yaml
from cli_helpers import invoke, refused, results
from export_models import quantized
from question_models import finder, questions, write_squad

import compress
from compress.export.onnx import encoder as encoder_export
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.check import ExportCheckFailed
from compress.export.onnx.encoder_check import compare_encoder
from compress.export.onnx.forms import Forms
from compress.export.onnx.trace import trace
from compress.formats import Int4, Int8
from compress.measure.encoder_latency import time_cell
from compress.records.run import RunRecord
from compress.runtimes.onnx_encoder import OnnxEncoder
from compress.tasks.answers import worth
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.load import load_labelled

pytest.importorskip("onnxscript")

FLOAT32 = 1e-5


def batch(tokenizer, side="right"):
    tokenizer.padding_side = side
    rows = questions(5, seed=4)
    found = tokenizer([r.text for r in rows], [r.pair for r in rows], padding=True, return_tensors="np")
    tokenizer.padding_side = "right"
    return {name: value.astype(np.int64) for name, value in found.items()}


def by_stock(model, given):
    with torch.inference_mode():
        said = model(**{name: torch.from_numpy(value) for name, value in given.items()})
    return said.start_logits.numpy(), said.end_logits.numpy()


@cache
def traced(family):
    """A tiny model and its graph, which holds none of its matrices and so serves every format."""
    bundle = finder(family)
    inputs = encoder_export.encoder_inputs(bundle.model, bundle.tokenizer)
    answer, either = encoder_export.encoder_answer(bundle.model, inputs)
    assert either
    shapes = dict.fromkeys(inputs, ("batch", "sequence"))
    return bundle, trace(bundle.model, shapes, ["start_logits", "end_logits"], answer)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "ModernBert"])
def test_the_graph_gives_both_ends_by_optimums_names_whatever_the_batch_and_its_padding(
    family, tmp_path, monkeypatch
):
    bundle, graph = traced(family)
    monkeypatch.setattr(encoder_export, "trace", lambda *arguments: graph)
    facts = write_artifact(bundle, tmp_path, Forms())
    assert facts["task"] == "question-answering"
    graph = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph
    assert [value.name for value in graph.output] == ["start_logits", "end_logits"]
    for value in graph.output:
        shape = value.type.tensor_type.shape.dim
        assert [each.dim_param for each in shape] == ["batch", "sequence"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    taken = {value.name for value in session.get_inputs()}
    right, left = batch(bundle.tokenizer), batch(bundle.tokenizer, "left")
    assert not right["attention_mask"].all(), "the case that is meant"
    assert set(right) == taken
    together = session.run(["start_logits", "end_logits"], right)
    on_left = session.run(["start_logits", "end_logits"], left)
    stock = by_stock(bundle.model, right)
    for row, real in enumerate(right["attention_mask"] == 1):
        alone = {name: value[row : row + 1, real] for name, value in right.items()}
        expected = by_stock(bundle.model, alone)
        for end in (0, 1):
            limit = FLOAT32 * np.abs(expected[end]).max()
            assert np.abs(together[end][row, real] - expected[end][0]).max() < limit
            assert np.abs(together[end][row, real] - stock[end][row, real]).max() < limit
            assert (
                np.abs(on_left[end][row, left["attention_mask"][row] == 1] - expected[end][0]).max() < limit
            )


@pytest.mark.parametrize(("format", "tolerance"), [(Int8(), 0.05), (Int4(group=16), 0.05)])
def test_codes_are_exported_with_the_head_and_measured_there(format, tolerance, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder_export, "trace", lambda *arguments: traced("Bert")[1])
    bundle = quantized(finder(), format)
    facts = write_artifact(bundle, tmp_path, Forms(accuracy_level=0, int8="blocks"))
    assert facts["linear_forms"].get("float", 0) == 0, "nothing is left in float"
    runtime = OnnxEncoder(tmp_path, threads=1)
    given = batch(bundle.tokenizer)
    answer = runtime.masked(given["input_ids"], given["attention_mask"], given["token_type_ids"])
    assert answer.shape == (*given["input_ids"].shape, 2)
    expected = np.stack(by_stock(bundle.model, given), -1)
    real = given["attention_mask"] == 1
    assert np.abs(answer - expected)[real].max() < tolerance * np.abs(expected).max()
    held = np.stack([given["input_ids"][0, :12]] * 3).astype(np.int32)
    agreement = compare_encoder(bundle.model, runtime, held, "weights")
    assert agreement.passed
    assert agreement.task == "question-answering"
    broken = finder(seed=1)
    with pytest.raises(ExportCheckFailed, match="the float32 graph fails its check"):
        compare_encoder(broken.model, runtime, held, "float32")
    with pytest.raises(ExportCheckFailed, match="KL is .*, of padded texts"):
        compare_encoder(broken.model, runtime, held, "weights")
    assert time_cell(runtime, held, [12, 12, 12], 3)


PRUNE = {"prune_magnitude": {"sparsity": 0.6}}
TUNED = {"finetune": {"epochs": 10, "batch": 16, "learning_rate": 5e-3, "heldout_points": 2}}
HEAL = {"distill": {"epochs": 3, "batch": 16, "optimizer": "adamw", "learning_rate": 3e-3, "temperature": 2}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A whole run: a base that learns, and two ways to make it smaller."""
    folder = tmp_path_factory.mktemp("answers")
    finder(head="ForMaskedLM").save(folder / "encoder")
    write_squad(folder / "squad.json", questions(420, seed=1))
    recipe = {
        "name": "answers",
        "threads": 1,
        "model": {"checkpoint": str(folder / "encoder")},
        "data": {"labelled": str(folder / "squad.json"), "window": 24, "calibration_windows": 16},
        "base": [TUNED, "export_onnx"],
        "variants": {
            "small": [PRUNE, {"quantize_gptq": {"format": {"kind": "int4", "group": 16}}}, "export_onnx"],
            "taught": [{"student": {"blocks": 1}}, HEAL],
        },
        "measure": {"prefill_tokens": 16, "rounds": 1, "timing_seconds": 20, "encoder_seconds": 0},
    }
    path = folder / "answers.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    outcome = invoke("run", path, "--output", folder / "run")
    assert outcome.code == 0, outcome.err
    (folder / "out.txt").write_text(outcome.out + outcome.err, encoding="utf-8")
    return folder


def judged(folder, ask):
    """F1 and exact match of the rows that a recipe of this seed judges by, one at a time."""
    rows = load_labelled(LabelledConfig(source=str(folder / "squad.json")), 0).evaluation
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run" / "base")
    found = []
    for row in rows:
        cut = tokenizer(row.text, row.pair, return_offsets_mapping=True)
        start, end = ask({n: np.array([cut[n]], dtype=np.int64) for n in tokenizer.model_input_names})
        start, end = start[0].astype(np.float64), end[0].astype(np.float64)
        inside = [n for n, of in enumerate(cut.sequence_ids(0)) if of == 1]
        best = max(
            ((start[i] + end[j], i, j) for i in inside for j in inside if i <= j < i + 30),
            key=lambda one: one[0],
        )
        places = cut["offset_mapping"]
        silent = start[0] + end[0] > best[0]
        text = "" if silent else row.pair[places[best[1]][0] : places[best[2]][1]]
        found.append((text, *worth(text, [answer for _, answer in row.label])))
    return found


def by_session(folder, name):
    session = onnxruntime.InferenceSession(folder / "run" / name / "onnx" / "model.onnx")
    return lambda given: session.run(["start_logits", "end_logits"], given)


def by_transformers(folder, name):
    model = transformers.AutoModelForQuestionAnswering.from_pretrained(folder / "run" / name).eval()
    return lambda given: by_stock(model, given)


def test_a_run_says_what_stock_libraries_say(folder):
    lines = results(folder / "run")
    asked = {
        ("base", "torch"): by_transformers,
        ("taught", "torch"): by_transformers,
        ("base", "onnxruntime"): by_session,
        ("small", "onnxruntime"): by_session,
    }
    assert set(lines) == {*asked, ("small", "torch")}
    base = judged(folder, by_transformers(folder, "base"))
    for key, way in asked.items():
        own, line = judged(folder, way(folder, key[0])), lines[key]
        assert line["score_name"] == "answer_f1"
        assert line["score"] == pytest.approx(np.mean([f1 for _, _, f1 in own]))
        assert line["metrics"]["answer_exact_match"] == pytest.approx(np.mean([exact for _, exact, _ in own]))
        if key != ("base", "torch"):
            lost = [was == 1 and now == 0 for (_, was, _), (_, now, _) in zip(base, own, strict=True)]
            assert line["flips_lost"] == pytest.approx(np.mean(lost))
            assert line["delta_score"] == pytest.approx(line["score"] - lines["base", "torch"]["score"])
    assert lines["base", "torch"]["score"] > 0.5, "or nothing is told by the rest"
    assert lines["small", "onnxruntime"]["flips_lost"] > 0, "the case that is meant"
    assert lines["small", "onnxruntime"]["kl_to_base"] > 0
    assert lines["small", "onnxruntime"]["disk_bytes"] < lines["base", "onnxruntime"]["disk_bytes"]


def test_what_changed_is_on_the_page_with_both_answers(folder):
    record = RunRecord.read(folder / "run" / "run.json")
    found = next(each for each in record.flips if (each.variant, each.runtime) == ("small", "onnxruntime"))
    rows = load_labelled(LabelledConfig(source=str(folder / "squad.json")), 0).evaluation
    assert found.decisions == len(rows)
    page = (folder / "run" / "report.html").read_text(encoding="utf-8")
    assert "Answer F1" in page
    assert "Exact match" in page
    texts = [judged(folder, way) for way in (by_transformers(folder, "base"), by_session(folder, "small"))]
    wanted = {(row.text, was or "no answer", now or "no answer")
              for row, (was, exact, _), (now, still, _) in zip(rows, *texts, strict=True)
              if exact and not still}  # fmt: skip
    shown = {(flip.text, flip.before, flip.now) for flip in found.worst}
    assert shown
    assert shown <= wanted
    for _, before, now in shown:
        assert before in page
        assert now in page


def test_a_folder_has_the_layout_of_transformers_js(folder):
    place = folder / "run" / "small"
    assert (place / "onnx" / "model.onnx").is_file()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (place / name).is_file()
    config = json.loads((place / "config.json").read_text())
    assert config["architectures"] == ["BertForQuestionAnswering"]


def test_an_artifact_is_measured_by_the_answers_that_training_left_out(folder):
    protocol = compress.MeasureProtocol(threads=1, prefill_tokens=16, rounds=1)
    (line,) = compress.measure(folder / "run" / "taught", labelled=folder / "squad.json", protocol=protocol)
    assert line.score == results(folder / "run")["taught", "torch"]["score"]


def test_answers_that_are_not_in_their_context_stop_a_run_before_it_begins(folder, tmp_path):
    shutil.copy(folder / "answers.yaml", tmp_path / "answers.yaml")
    row = {"question": "which?", "context": "the cup is white."}
    rows = [{**row, "answers": {"text": "white", "answer_start": 3}}] * 9
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    outcome = refused("run", tmp_path / "answers.yaml", "--labelled", tmp_path / "rows.jsonl",
                      "--output", tmp_path / "run")  # fmt: skip
    assert "at character 3 the context has ' cup ', not the answer 'white'" in outcome
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_labels_that_do_not_fit_the_head_are_refused_where_none_is_made(folder, tmp_path):
    """They would be read as plain text, and the model judged by that."""
    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "\n".join(f"cup {n},{'ab'[n % 2]}" for n in range(40))
    )
    recipe = yaml.safe_load((folder / "answers.yaml").read_text())
    recipe |= {"base": [], "variants": {"int8": ["quantize_round"]}}
    recipe["model"]["checkpoint"] = str(folder / "run" / "base")
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    outcome = refused("run", tmp_path / "answers.yaml", "--labelled", tmp_path / "rows.csv",
                      "--output", tmp_path / "run")  # fmt: skip
    assert "data.labelled: the labels of" in outcome
    assert (
        "are of the kind 'class', and the base is a model that finds answers (question-answering)" in outcome
    )


def test_questions_without_a_context_are_refused_by_the_columns_name(folder, tmp_path):
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"question": f"{n}?", "answers": "x"}) for n in range(9))
    )
    recipe = yaml.safe_load((folder / "answers.yaml").read_text())
    recipe["data"]["labelled"] = {"source": str(tmp_path / "rows.jsonl"), "kind": "span"}
    (tmp_path / "answers.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    outcome = refused("run", tmp_path / "answers.yaml", "--output", tmp_path / "run")
    assert "labelled.pair: no column of" in outcome
