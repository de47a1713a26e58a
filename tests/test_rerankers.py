"""Rerankers: passages of a query in order, cross-entropy of a single output, and rows that rank nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cli_helpers import invoke, refused, results
from encoder_models import tiny_encoder, tiny_model
from pair_examples import labelled, passages
from sklearn.metrics import ndcg_score
from test_labelled_tasks import forward
from test_pairs_judged import recipe, write
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from compress.artifact.bundle import Bundle
from compress.artifact.labels import fitted, labelled_for
from compress.errors import UserError
from compress.measure.label_references import COSINE, REGRESSION, label_references
from compress.measure.quality import Scores, score, summarise
from compress.passes.distill import Distill
from compress.passes.finetune import Finetune
from compress.tasks.registry import task_of
from compress.text.encode import encode
from compress.text.labelled.base import Row
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.encoded import encoded
from compress.text.labelled.load import load_labelled
from compress.training.objectives.labelled import label_loss

ROWS = passages(16)


def cross_encoder(seed=0):
    """As stock files say it: one output, and no problem_type."""
    return tiny_model("BertForSequenceClassification", seed, num_labels=1)


def scored(own, rows, kind="number", names=()):
    cut = encode(rows, kind, names, own.tokenizer, 64)
    return cut, score(forward(own), cut, task=task_of(own.model.config), together=8)


def by_hand(relevance, rows):
    """nDCG, MRR and recall@1 over the queries, relevance in the order of the rows."""
    queries = list(dict.fromkeys(row.text for row in rows))
    ndcg, first, top = [], [], []
    for query in queries:
        own = [n for n, row in enumerate(rows) if row.text == query]
        gains = np.array([float(rows[n].label) for n in own])
        order = np.argsort(-np.array([relevance[n] for n in own]))
        ndcg.append(ndcg_score([gains], [[relevance[n] for n in own]], k=10))
        first.append(1 / (1 + np.flatnonzero(gains[order] > 0)[0]))
        top.append((gains[order][:1] > 0).sum() / (gains > 0).sum())
    return np.mean(ndcg), np.mean(first), np.mean(top)


@pytest.mark.parametrize("graded", [False, True])
def test_a_single_output_is_judged_by_the_order_of_each_querys_passages(graded):
    own = cross_encoder()
    assert task_of(own.model.config).labels == "number"
    rows = [replace(row, label=row.label * (1 + n % 3)) if graded else row for n, row in enumerate(ROWS)]
    cut, found = scored(own, rows)
    logits = {place: row[0] for place, row in zip(cut.order, found.decisions, strict=True)}
    ndcg, first, top = by_hand(logits, rows)
    quality = summarise(Scores(**json.loads(json.dumps(found.to_json()))), None, 0)
    assert quality.score_name == "spearman"
    assert quality.metrics["ndcg_at_10"] == pytest.approx(ndcg)
    assert quality.metrics["mrr"] == pytest.approx(first)
    assert quality.metrics["recall_at_1"] == pytest.approx(top)
    assert quality.metrics["ranked_queries"] == 16
    assert ("mean_squared_error" in quality.metrics) is graded, "of relevance they are logits"
    if not graded:
        z, y = (np.array([row[0] for row in each]) for each in (found.decisions, found.targets))
        wanted = torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(z), torch.tensor(y))
        assert quality.nll == pytest.approx(float(wanted))


def test_of_two_labels_the_probability_of_1_ranks():
    own = tiny_model("BertForSequenceClassification", num_labels=2)
    rows = passages(16, label=lambda right: str(int(right)))
    cut, found = scored(own, rows, "class", ("0", "1"))
    logits = np.concatenate([forward(own)(item.ids[None], item.types[None])[0] for item in cut.items])
    share = np.exp(logits[:, 1]) / np.exp(logits).sum(1)
    ndcg, first, _ = by_hand(dict(zip(cut.order, share, strict=True)), rows)
    quality = summarise(found, None, 0)
    assert (quality.score_name, quality.metrics["ndcg_at_10"]) == ("accuracy", pytest.approx(ndcg))
    assert quality.metrics["mrr"] == pytest.approx(first)


def test_what_is_no_ranking_has_no_such_metrics():
    own = cross_encoder()
    single = [
        Row(f"{row.text} w{50 + n % 40} w{60 + n % 7}", row.label, row.pair) for n, row in enumerate(ROWS)
    ]
    assert "ndcg_at_10" not in summarise(scored(own, single)[1], None, 0).metrics, "a passage each"
    none = [replace(row, label=0.0) for row in ROWS]
    assert "ndcg_at_10" not in summarise(scored(own, none)[1], None, 0).metrics, "no right one"
    alone = [Row(row.text, row.label) for row in ROWS]
    assert "ndcg_at_10" not in summarise(scored(own, alone)[1], None, 0).metrics, "no pairs"
    other = tiny_model("BertForSequenceClassification", num_labels=2)
    names = [replace(row, label="yes" if row.label else "no") for row in ROWS]
    found = scored(other, names, "class", ("no", "yes"))[1]
    assert "ndcg_at_10" not in summarise(found, None, 0).metrics, "which label is the right one nobody says"
    some = [*ROWS, Row("w91 w92", 1.0, "w93"), Row("w95", 0.0, "w93"), Row("w95", 0.0, "w94")]
    assert summarise(scored(own, some)[1], None, 0).metrics["ranked_queries"] == 16


def test_relevance_is_learnt_by_cross_entropy_and_other_numbers_by_squares():
    z, y = torch.tensor([[0.3], [-2.0], [1.0]]), torch.tensor([[1.0], [0.0], [0.0]])
    wanted = (torch.log1p(z.exp()) - y * z).mean()
    assert float(label_loss("relevance")(z, y)) == pytest.approx(float(wanted))
    tokenizer = cross_encoder().tokenizer
    assert encode(ROWS, "number", (), tokenizer, 64).loss_kind == "relevance"
    graded = [replace(row, label=row.label * 2) for row in ROWS]
    assert encode(graded, "number", (), tokenizer, 64).loss_kind == "number"
    single = [Row(row.text, row.label) for row in ROWS]
    assert encode(single, "number", (), tokenizer, 64).loss_kind == "number", "of texts it may be a share"


def test_a_cross_encoder_keeps_its_one_output_on_labels_0_and_1(tmp_path):
    rows = passages(20, label=lambda right: str(int(right)))
    given = replace(labelled(rows, "class", 56, 12), names=("0", "1"))
    own = cross_encoder()
    numbers = fitted(given, own.model.config)
    assert (numbers.kind, numbers.names, numbers.train[0].label) == ("number", (), 1.0)
    assert fitted(given, tiny_encoder("bert").model.config) is given
    single = replace(given, train=tuple(replace(row, pair=None) for row in given.train))
    assert fitted(single, own.model.config) is single
    tuned = own.apply(Finetune(epochs=6, batch=8, learning_rate=3e-3), labelled=given)
    assert tuned.model.config.num_labels == 1
    assert "head" not in tuned.notes
    assert tuned.notes["loss"].startswith("binary cross-entropy")
    data = labelled_for(own.model, own.tokenizer, given)
    before, after = (
        summarise(score(forward(each), data.train, task=task_of(each.model.config)), None, 0)
        for each in (own, tuned)
    )
    assert after.metrics["ndcg_at_10"] > before.metrics["ndcg_at_10"]
    assert after.nll < before.nll
    student = cross_encoder(seed=5).apply(
        Distill(epochs=3.0, batch=8, learning_rate=3e-3, cross_entropy=0.5), labelled=given, base=tuned
    )
    assert student.notes["heldout_after"] < student.notes["heldout_before"]


def test_stock_libraries_give_the_same_numbers_afterwards(tmp_path):
    own = cross_encoder().apply(Finetune(epochs=1, batch=8), labelled=labelled(ROWS, "number", 40, 8))
    own.save(tmp_path / "out")
    given = [(row.text, row.pair) for row in ROWS[:8]]
    again = Bundle.load(tmp_path / "out")  # with the tokenizer as its files say it
    ours = [row[0] for _, row in sorted(zip(*places(again, ROWS[:8]), strict=True))]
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = [float(stock(**tokenizer(*pair, return_tensors="pt")).logits) for pair in given]
    assert ours == pytest.approx(logits, abs=1e-5)
    encoder = pytest.importorskip("sentence_transformers").CrossEncoder(str(tmp_path / "out"), device="cpu")
    assert encoder.predict(given, activation_fn=torch.nn.Identity()).tolist() == pytest.approx(ours, abs=1e-4)


def places(own, rows):
    cut, found = scored(own, rows)
    return cut.order, found.decisions


def test_tf_idf_ranks_the_same_passages():
    tokenizer = cross_encoder().tokenizer
    data = encoded(labelled(ROWS, "number", 40, 8), (), tokenizer, 64)
    (cosine,) = label_references(data)
    assert (cosine.name, cosine.score_name) == (COSINE, "spearman")
    assert cosine.metrics["ranked_queries"] == 4
    assert cosine.metrics["mrr"] == 1, "the right passage alone has a word of its query"
    classes = replace(
        labelled(passages(16, label=lambda right: str(int(right))), "class", 40, 8), names=("0", "1")
    )
    found = {each.name: each for each in label_references(encoded(classes, ("0", "1"), tokenizer, 64))}
    assert found[REGRESSION].metrics["ranked_queries"] == 4


def test_passages_of_a_query_go_to_one_part(tmp_path):
    file = write(tmp_path / "rows.jsonl", passages(60), ("query", "passage", "label"))
    data = load_labelled(LabelledConfig(source=str(file), kind="number"))
    parts = [{row.text for row in part} for part in (data.train, data.heldout, data.evaluation)]
    assert all(parts)
    assert not parts[0] & parts[2]
    assert not parts[1] & parts[2]
    assert all(sum(row.text == text for row in data.evaluation) >= 4 for text in parts[2])


def test_rows_that_teach_nothing_are_refused(tmp_path):
    file = write(tmp_path / "zeros.jsonl", [replace(row, label=0.0) for row in ROWS])
    with pytest.raises(UserError, match=r"labelled\.label: all 64 rows of .* have the number 0"):
        load_labelled(LabelledConfig(source=str(file), kind="number", text="anchor", pair="positive"))
    with pytest.raises(UserError, match="all 64 rows of .* have '0' alone"):
        load_labelled(LabelledConfig(source=str(file), text="anchor", pair="positive"))
    cross_encoder().save(tmp_path / "m")
    pairs = [replace(row, label="") for row in ROWS]
    file = write(tmp_path / "pairs.jsonl", pairs)
    assert "which labels of the kind 'pair' do not judge" in refused(
        "bench", tmp_path / "m", "--labelled", file
    )


def test_a_run_ranks_every_artifact_in_its_runtime(tmp_path):
    cross_encoder().save(tmp_path / "m")
    file = write(tmp_path / "rows.jsonl", passages(20, label=int), ("query", "passage", "label"))
    own = recipe(
        tmp_path, tmp_path / "m", file, base=[{"finetune": {"epochs": 1}}],
        variants={"pruned": [{"prune_magnitude": {"sparsity": 0.3}}, "export_onnx"]},
    )  # fmt: skip
    done = invoke("run", own, "--output", tmp_path / "run")
    assert done.code == 0, done.err
    lines = results(tmp_path / "run")
    assert set(lines) == {("base", "torch"), ("pruned", "torch"), ("pruned", "onnxruntime")}
    for line in lines.values():
        assert line["score_name"] == "spearman"
        assert line["metrics"]["ranked_queries"] == 4
        assert 0 < line["metrics"]["ndcg_at_10"] <= 1
    page = (tmp_path / "run" / "report.md").read_text()
    assert "NDCG@10" in page
