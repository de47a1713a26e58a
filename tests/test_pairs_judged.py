"""What embeddings of pairs are worth: from stock vectors, beside a base, as flips, and in whole runs."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from cli_helpers import invoke, refused, results
from pair_examples import labelled, numbers, pairs, sentence_encoder
from scipy.stats import pearsonr, spearmanr
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import ndcg_score
from test_labelled_tasks import forward
from transformers import AutoModel, AutoTokenizer

from compress.artifact.bundle import Bundle
from compress.measure.flips import flips_of
from compress.measure.label_references import COSINE, label_references
from compress.measure.quality import Scores, score, summarise
from compress.measure.turns import Target
from compress.tasks.registry import task_of
from compress.text.encode import encode
from compress.text.labelled.base import Row
from compress.text.labelled.encoded import encoded

ROWS = pairs(30)
FAST = {"rounds": 1, "timing_seconds": 1, "encoder_seconds": 0}


def stock(folder, texts, pooling="mean"):
    """Vectors of length one from stock transformers."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt"))[0][0].numpy()
        own = {"mean": states.mean(0), "cls": states[0], "lasttoken": states[-1]}[pooling].astype(float)
        found.append(own / np.linalg.norm(own))
    return np.stack(found)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_retrieval_is_that_of_stock_vectors(pooling, tmp_path):
    own = Bundle.load(sentence_encoder(tmp_path / "m", pooling))
    cut = encode(ROWS, "pair", (), own.tokenizer, 64, apart=True)
    quality = summarise(score(forward(own), cut, task=task_of(own.model.config), together=8), None, 0)
    queries, documents = (stock(tmp_path / "m", texts, pooling) for texts in
                          ([row.text for row in ROWS], [row.pair for row in ROWS]))  # fmt: skip
    cosines = queries @ documents.T
    ranks = 1 + (cosines > np.diag(cosines)[:, None]).sum(1)
    assert (quality.score_name, quality.score) == ("mrr", pytest.approx((1 / ranks).mean()))
    metrics = quality.metrics
    assert metrics["ndcg_at_10"] == pytest.approx(ndcg_score(np.eye(30), cosines, k=10))
    for k in (1, 5, 10):
        assert metrics[f"recall_at_{k}"] == pytest.approx((ranks <= k).mean())
    assert metrics["candidates"] == 30
    assert quality.score_ci95[0] < quality.score < quality.score_ci95[1]
    assert quality.nll is None


def test_numbers_are_judged_by_their_correlation_with_cosines(tmp_path):
    rows = numbers(40)
    own = Bundle.load(sentence_encoder(tmp_path / "m"))
    cut = encode(rows, "number", (), own.tokenizer, 64, apart=True)
    quality = summarise(score(forward(own), cut, task=task_of(own.model.config)), None, 0)
    one, other = (stock(tmp_path / "m", texts) for texts in ([r.text for r in rows], [r.pair for r in rows]))
    cosines, told = (one * other).sum(1), [row.label for row in rows]
    assert (quality.score_name, quality.score) == ("spearman", pytest.approx(spearmanr(cosines, told)[0]))
    assert quality.metrics == {"pearson": pytest.approx(pearsonr(cosines, told)[0])}


def beside_a_base(tmp_path, rows=ROWS, kind="pair"):
    base = Bundle.load(sentence_encoder(tmp_path / "m"))
    other = base.clone()
    with torch.no_grad():
        for parameter in other.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    task, cut = task_of(base.model.config), encode(rows, kind, (), base.tokenizer, 64, apart=True)
    (tmp_path / "kept").mkdir()
    before = score(forward(base), cut, task=task, keep=tmp_path / "kept")
    halves = [
        score(forward(other), cut, task=task, base=tmp_path / "kept", part=part)
        for part in (range(10), range(10, len(cut)))
    ]
    return cut, before, Scores.joined([Scores(**json.loads(json.dumps(asdict(half)))) for half in halves])


def test_beside_a_base_there_are_paired_differences_flips_and_distances(tmp_path):
    cut, before, after = beside_a_base(tmp_path)
    quality, alone, base = summarise(after, before, 0), summarise(after, None, 0), summarise(before, None, 0)
    assert quality.cosine_distance > 1e-4
    assert quality.delta_score == pytest.approx(alone.score - base.score)
    assert quality.delta_score_ci95[0] <= quality.delta_score <= quality.delta_score_ci95[1]
    gained = quality.flips_gained - quality.flips_lost
    assert gained == pytest.approx(alone.metrics["recall_at_1"] - base.metrics["recall_at_1"])
    assert quality.flips > quality.flips_lost > 0
    itself = summarise(replace(after, vectors=before.vectors), before, 0)
    assert (itself.delta_score, itself.flips, itself.delta_score_ci95) == (0, 0, (0, 0))

    found = flips_of(Target("small", "torch", Path("small"), "print"), after, before, cut, None)
    assert found.decisions == 30
    assert found.lost / 30 == pytest.approx(quality.flips_lost)
    assert found.gained / 30 == pytest.approx(quality.flips_gained)
    pair_of = {row.text: row.pair for row in ROWS}
    assert len(found.worst) == min(10, found.lost)
    for flip in found.worst:
        assert flip.label == flip.before == pair_of[flip.text]
        assert flip.now in pair_of.values()
        assert flip.now != flip.before
        assert 0 < flip.confidence_now <= 1


def test_of_several_right_texts_another_one_is_no_flip(tmp_path):
    rows = tuple(Row("w50 w51", "", row.pair) for row in ROWS[:4]) + ROWS[4:10]
    cut, before, after = beside_a_base(tmp_path, rows)
    assert len(cut.pairs) == 10
    quality = summarise(after, before, 0)
    found = flips_of(Target("small", "torch", Path("small"), "print"), after, before, cut, None)
    assert found.decisions == 7, "a query each, however many texts belong to it"
    assert found.changed / 7 == pytest.approx(quality.flips)


def test_numbers_have_paired_differences_and_nothing_flips(tmp_path):
    cut, before, after = beside_a_base(tmp_path, numbers(30), "number")
    quality = summarise(after, before, 0)
    assert quality.delta_score_ci95[0] <= quality.delta_score <= quality.delta_score_ci95[1]
    assert quality.flips is None
    assert quality.cosine_distance > 0
    assert flips_of(Target("small", "torch", Path("small"), "print"), after, before, cut, None) is None


def test_beside_it_stands_tf_idf(tmp_path):
    tokenizer = Bundle.load(sentence_encoder(tmp_path / "m")).tokenizer
    rows = tuple(replace(row, pair=f"{row.pair} {row.text.split()[n % 4]}") for n, row in enumerate(ROWS))
    data = encoded(labelled(rows, "pair", 10, 5), (), tokenizer, 64)
    (found,) = label_references(data)
    assert (found.name, found.score_name) == (COSINE, "mrr")
    words = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True)
    words.fit([text for row in (*rows[:10], *rows[15:]) for text in (row.text, row.pair)])
    one, other = (words.transform(t) for t in ([r.text for r in rows[15:]], [r.pair for r in rows[15:]]))
    cosines = (one @ other.T).toarray()
    # a wrong one of the same cosine stands before
    ranks = (cosines >= np.diag(cosines)[:, None] - 1e-12).sum(1)
    assert found.score == pytest.approx((1 / ranks).mean())
    assert label_references(data, earlier=[found]) == [found]
    scale = encoded(labelled(numbers(40), "number", 20, 5), (), tokenizer, 64, embeds=True)
    (told,) = label_references(scale)
    assert (told.score_name, list(told.metrics)) == ("spearman", ["pearson"])


def write(file, rows, columns=("anchor", "positive", "score")):
    lines = [dict(zip(columns, (row.text, row.pair, row.label), strict=False)) for row in rows]
    file.write_text("\n".join(json.dumps({k: v for k, v in line.items() if v != ""}) for line in lines))
    return file


def recipe(folder, model, source, *, base, variants, **changes):
    content = {
        "name": "pairs", "threads": 1, "seed": 1, "model": {"checkpoint": str(model)},
        "data": {"labelled": {"source": str(source), **changes}, "window": 16},
        "base": base, "variants": variants,
        "measure": {**FAST, "prefill_tokens": 4},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on pairs: fine-tuned, a int8, each in torch and ONNX Runtime."""
    folder = tmp_path_factory.mktemp("pairs")
    model = sentence_encoder(folder / "m", "cls")
    file = write(folder / "rows.jsonl", pairs(150))
    own = recipe(
        folder, model, file, base=[{"finetune": {"epochs": 4, "learning_rate": 3e-3}}, "export_onnx"],
        variants={
            "int8": [{"quantize_gptq": {"format": "int8"}}, "export_onnx"],
        },
    )  # fmt: skip
    done = invoke("run", own, "--output", folder / "run")
    assert done.code == 0, done.err
    return folder


def test_a_run_judges_every_artifact_in_its_runtime(ran):
    lines = results(ran / "run")
    assert set(lines) == {
        (name, runtime) for name in ("base", "int8") for runtime in ("torch", "onnxruntime")
    }
    rows = [json.loads(line) for line in (ran / "rows.jsonl").read_text().splitlines()]
    judged = json.loads((ran / "run" / "run.json").read_text())
    assert judged["data"]["labelled"]["rows"]["evaluation"] == 30
    for (variant, runtime), line in lines.items():
        assert line["score_name"] == "mrr"
        assert line["metrics"]["candidates"] == 30
        if (variant, runtime) != ("base", "torch"):
            assert line["delta_score_ci95"] is not None
            assert 0 <= line["cosine_distance"] < 0.2
    assert abs(lines["base", "onnxruntime"]["delta_score"]) < 1e-6
    assert judged["label_references"][0]["name"] == COSINE
    page = (ran / "run" / "report.md").read_text()
    assert "MRR" in page
    assert "the strongest reference, TF-IDF and cosine: MRR" in page
    assert len(rows) == 150
    companions = ran / "run" / "int8" / "1_Pooling" / "config.json"
    assert json.loads(companions.read_text())["pooling_mode_cls_token"] is True


def test_bench_judges_by_the_part_that_was_left_out_as_the_run_did(ran):
    told = invoke("bench", ran / "run" / "base", "--labelled", ran / "rows.jsonl", "--threads", 1,
                  "--output", ran / "again.jsonl")  # fmt: skip
    assert (told.code, "MRR" in told.out) == (0, True), told
    again = [json.loads(line) for line in (ran / "again.jsonl").read_text().splitlines()]
    assert again[0]["score"] == pytest.approx(results(ran / "run")["base", "torch"]["score"])


def test_single_texts_and_pairs_do_not_take_each_others_place(ran, tmp_path):
    single = tmp_path / "single.jsonl"
    single.write_text("\n".join(json.dumps({"text": r.text, "score": n / 7}) for n, r in enumerate(ROWS)))
    told = refused("bench", ran / "m", "--labelled", single)
    assert "labelled.pair" in told
    assert "stands alone" in told
    own = recipe(tmp_path, ran / "m", single, base=["export_onnx"], variants={})
    assert "labelled.pair" in refused("run", own, "--output", tmp_path / "run")
    classes = tmp_path / "classes.csv"
    classes.write_text("text,label\n" + "\n".join(f"{r.text},{'ab'[n % 2]}" for n, r in enumerate(ROWS)))
    own = recipe(tmp_path, ran / "m", classes, base=[{"finetune": {"pooling": "cls"}}], variants={})
    told = refused("run", own, "--output", tmp_path / "run")
    assert "pooling: is of pairs of texts that are embedded" in told
