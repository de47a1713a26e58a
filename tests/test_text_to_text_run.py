"""A whole run from the command line of a model that writes texts: what is recorded, shown, measured again."""

import json
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from cli_helpers import invoke, refused, results, write_text
from export_models import word_tokenizer
from seq2seq_models import write_seq2seq
from text_to_text_models import text_rows, write_rows

import compress
from compress.measure.text_references import LEAD, NEAREST
from compress.models.checkpoints import quiet_transformers
from compress.records.protocol import MeasureProtocol
from compress.records.run import RunRecord
from compress.tasks.written import row_scores
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.load import load_labelled

MEASURE = {"prefill_tokens": 16, "rounds": 1, "timing_seconds": 60, "answer_tokens": 7}
TUNE = {"epochs": 6, "batch": 8, "learning_rate": 4e-3, "precision": "float32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder, recipe, rows) of a finished run."""
    pytest.importorskip("onnxscript")
    folder = tmp_path_factory.mktemp("texts")
    rows = write_rows(folder / "rows.jsonl", text_rows(80))
    write_seq2seq(folder / "model", "t5", word_tokenizer(pad_token="w3"))
    export = {"export_onnx": {"check_tokens": 64}}
    recipe = {
        "name": "texts",
        "threads": 1,
        "model": {"checkpoint": str(folder / "model")},
        "data": {"labelled": "nowhere.jsonl", "window": 16, "calibration_windows": 4},
        "base": [{"finetune": TUNE}, export],
        "variants": {
            "worse": [{"prune_magnitude": {"sparsity": 0.97}}, "quantize_round", export],
            "student": [{"student": {"decoder_blocks": 1}}, {"distill": {"epochs": 1, "batch": 8}}],
        },
        "measure": MEASURE,
    }
    (folder / "texts.yaml").write_text(yaml.safe_dump(recipe))
    outcome = invoke("run", folder / "texts.yaml", "--labelled", rows, "-o", folder / "run")
    assert outcome.code == 0, outcome.err
    (folder / "out").write_text(outcome.out)
    return folder, folder / "texts.yaml", rows


def test_every_artifact_is_judged_by_what_it_writes(made):
    folder, _, rows = made
    found = results(folder / "run")
    assert set(found) == {
        *((v, r) for v in ("base", "worse") for r in ("torch", "onnxruntime")),
        ("student", "torch"),
    }
    for result in found.values():
        assert result["score_name"] == "rouge_l"
        assert set(result["metrics"]) == {"rouge_1", "rouge_2", "chrf", "bleu", "exact_match", "not_ended"}
        assert result["protocol"]["answer_tokens"] == 7
        low, high = result["score_ci95"]
        assert low <= result["score"] <= high
    base, worse = found["base", "torch"], found["worse", "onnxruntime"]
    assert base["score"] == pytest.approx(found["base", "onnxruntime"]["score"])
    assert found["base", "onnxruntime"]["flips"] == 0
    assert found["base", "onnxruntime"]["kl_to_base"] < 1e-6
    assert worse["delta_score"] == pytest.approx(worse["score"] - base["score"])
    assert worse["score"] < base["score"]
    assert worse["flips"] >= worse["flips_lost"] > 0
    assert worse["kl_to_base"] > 0.01
    assert worse["delta_nll"] == pytest.approx(worse["nll"] - base["nll"])
    # the base's score and loss, by stock transformers on the file
    data = load_labelled(LabelledConfig(source=str(rows)))
    with quiet_transformers():
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(folder / "run" / "base").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "run" / "base")
    texts, nats, count = [], 0.0, 0
    for row in data.evaluation:
        ids = torch.tensor([tokenizer(row.text)["input_ids"]])
        labels = torch.tensor([[*tokenizer(text_target=row.label)["input_ids"], tokenizer.eos_token_id]])
        with torch.inference_mode():
            nats += float(model(input_ids=ids, labels=labels).loss) * labels.numel()
            written = model.generate(ids, max_new_tokens=7, do_sample=False, num_beams=1, eos_token_id=[1, 2])
        count += labels.numel()
        texts.append(tokenizer.decode(written[0], skip_special_tokens=True))
    scores = row_scores(texts, [row.label for row in data.evaluation])
    assert base["score"] == pytest.approx(float(scores.mean()))
    assert base["nll"] == pytest.approx(nats / count, rel=1e-4)


def test_what_changed_and_simple_answers_are_recorded_and_shown(made):
    folder, _, _ = made
    record = RunRecord.read(folder / "run" / "run.json")
    assert [reference.name for reference in record.label_references] == [LEAD, NEAREST]
    flips = {(each.variant, each.runtime): each for each in record.flips}
    worse = flips["worse", "onnxruntime"]
    assert (worse.what, worse.decisions) == ("texts", len(load(folder).evaluation))
    assert worse.lost > 0
    assert all(flip.confidence_before > flip.confidence_now for flip in worse.worst)
    page = (folder / "run" / "report.html").read_text()
    short = (folder / "run" / "report.md").read_text()
    flip = worse.worst[0]
    for said in ("ROUGE-L", "chrF", "texts that lost most", flip.text, "compared with the target", NEAREST):
        assert said.replace("'", "&#39;") in page, said
    assert "ROUGE-L" in short
    assert flip.text not in short, "texts stay in the folder's page"
    assert f"{worse.changed} of {worse.decisions} texts changed" in short
    assert "beat" in short
    assert "ROUGE-L, × 100" in (folder / "out").read_text()


def load(folder: Path):
    return load_labelled(LabelledConfig(source=str(folder / "rows.jsonl")))


def test_a_second_call_measures_nothing_again(made):
    folder, recipe, rows = made
    before = (folder / "run" / "results.jsonl").read_text()
    again = invoke("run", recipe, "--labelled", rows, "-o", folder / "run")
    assert again.code == 0, again.err
    assert "measuring" not in again.err
    assert (folder / "run" / "results.jsonl").read_text() == before


def test_artifacts_are_judged_by_the_rows_that_training_left_out(made):
    folder, _, rows = made
    own = results(folder / "run")
    protocol = MeasureProtocol(**MEASURE, threads=1)
    measured = compress.measure(
        folder / "run" / "worse", base=folder / "run" / "base", labelled=rows, protocol=protocol
    )
    for result in measured:
        variant = "base" if result.variant.startswith("base") else "worse"
        runtime = result.runtime
        assert result.score == pytest.approx(own[variant, runtime]["score"])
        assert result.delta_score == pytest.approx(own[variant, runtime]["delta_score"] or 0.0) or (
            result.delta_score is None and own[variant, runtime]["delta_score"] is None
        )


def test_labels_that_no_encoder_decoder_learns_are_refused_before_any_work(made):
    folder, recipe, _ = made
    file = folder / "classes.jsonl"
    lines = [json.dumps({"text": f"w5{n % 8} w6{n % 7}", "label": "ab"[n % 2]}) for n in range(60)]
    file.write_text("\n".join(lines))
    line = refused("run", recipe, "--labelled", file, "-o", folder / "no")
    assert "finetune: rows of the kind 'class' are learnt by a classifier" in line
    assert "this model is an encoder-decoder" in line


def test_a_variant_with_fewer_tokens_reads_and_writes_the_same_texts(tmp_path):
    rows = [{"source": f"river {n} sea", "target": f"sea of {n} stones"} for n in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write_text(tmp_path / "text.txt")
    (tmp_path / "rows.txt").write_text("\n".join(text for row in rows for text in row.values()))
    sizes = {"layers": 1, "hidden": 32, "heads": 2, "intermediate": 64, "vocab_size": 365, "context": 64}
    recipe = {
        "name": "trimmed",
        "threads": 1,
        "model": {"create": {"family": "t5", "preset": "1m", "sentinels": 4, **sizes}},
        "data": {"labelled": str(tmp_path / "rows.jsonl"), "text": str(tmp_path / "text.txt"), "window": 16},
        "base": [{"finetune": {**TUNE, "epochs": 2}}],
        "variants": {"trimmed": [{"prune_vocabulary": {"text": [str(tmp_path / "rows.txt")]}}]},
        "measure": MEASURE,
    }
    (tmp_path / "trimmed.yaml").write_text(yaml.safe_dump(recipe))
    outcome = invoke("run", tmp_path / "trimmed.yaml", "-o", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")
    base, trimmed = found["base", "torch"], found["trimmed", "torch"]
    assert trimmed["parameters"] < base["parameters"]
    assert trimmed["delta_nll"] < 0, "what is left of the vocabulary shares all of the probability"
    assert trimmed["score_name"] == "rouge_l"
    assert trimmed["metrics"]["not_ended"] == base["metrics"]["not_ended"]
