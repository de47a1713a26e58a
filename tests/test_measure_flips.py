"""What changed beside the base, and simple models of labels: by hand, and from a real run by other means."""

import json
import shutil
from collections import Counter
from pathlib import Path

import label_records
import numpy as np
import onnxruntime
import pytest
import transformers
from export_models import word_tokenizer
from label_records import HOSTILE

from compress.measure import harness
from compress.measure.flips import CHARACTERS, Flips, flips_of, marked
from compress.measure.label_references import LEXICON, MAJORITY, REGRESSION, label_references
from compress.measure.quality import Scores
from compress.measure.turns import Target
from compress.records.flips import Change
from compress.records.results import Result
from compress.records.run import RunRecord
from compress.text.encode import encode
from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.encoded import encoded
from compress.text.labelled.load import load_labelled

TARGET = Target("small", "torch", Path("small"), "print")


def scores(decisions, targets, confidences, names) -> Scores:
    count = [1] * len(decisions)
    return Scores([0.0] * len(count), count, None, None, None, "sequence-classification", decisions, targets,
                  confidences, names)  # fmt: skip


def test_labels_that_changed_are_counted_and_the_surest_come_first():
    names = ("a", "b", "c")
    texts = [f"w{n} " * (n + 1) for n in range(6)]
    right = ["a", "a", "b", "b", "c", "c"]
    rows = [Row(text, label) for text, label in zip(texts, right, strict=True)][::-1]  # longest first
    examples = encode(rows, "class", names, word_tokenizer(), 64)
    assert [rows[place].text for place in examples.order] == texts
    targets = [[0], [0], [1], [1], [2], [2]]
    base = scores([[0], [0], [1], [0], [0], [1]], targets, [[0.9], [0.6], [0.7], [0.5], [0.5], [0.5]], names)
    ours = scores([[1], [1], [1], [1], [1], [1]], targets, [[0.5], [0.8], [0.9], [0.9], [0.9], [0.9]], names)
    found = flips_of(TARGET, ours, base, examples, None)
    assert found is not None
    assert (found.decisions, found.lost, found.gained, found.otherwise, found.changed) == (6, 2, 1, 1, 4)
    assert found.changes == [
        Change(label="a", before="a", now="b", count=2),
        Change(label="b", before="a", now="b", count=1),
        Change(label="c", before="a", now="b", count=1),
    ]
    assert [flip.text for flip in found.worst] == [texts[1], texts[0]], "0.6 * 0.8 before 0.9 * 0.5"
    assert (found.worst[0].confidence_before, found.worst[0].confidence_now) == (0.6, 0.8)
    assert (found.worst[0].label, found.worst[0].before, found.worst[0].now) == ("a", "a", "b")
    assert found.fingerprint == "print"


def test_a_set_of_labels_is_one_decision():
    names = ("x", "y")
    examples = encode([Row("w5", ("x", "y")), Row("w6", ())], "classes", names, word_tokenizer(), 64)
    base = scores([[1, 1], [0, 1]], [[1, 1], [0, 0]], [[0.9, 0.8], [0.9, 0.9]], names)
    ours = scores([[1, 0], [0, 0]], [[1, 1], [0, 0]], [[0.7, 0.6], [0.9, 0.9]], names)
    found = flips_of(TARGET, ours, base, examples, None)
    assert found is not None
    assert (found.decisions, found.lost, found.gained) == (2, 1, 1)
    (flip,) = found.worst
    assert (flip.label, flip.before, flip.now) == ("x, y", "x, y", "x")
    assert flip.confidence_before == pytest.approx(0.72)
    assert flip.confidence_now == pytest.approx(0.42)
    assert Change(label="none", before="y", now="none", count=1) in found.changes


def test_a_word_is_found_behind_one_that_the_tokenizer_drops():
    words = ("w5", " ", "w6", "w7")
    tokenizer = word_tokenizer()
    pieces = tokenizer([list(words)], is_split_into_words=True).word_ids(0)
    assert 1 not in pieces, "the case that is meant"
    examples = encode(
        [Row(" ".join(words), ("O", "O", "A", "O"), None, words)], "tags", ("A", "O"), tokenizer, 64
    )
    assert [t for t in examples[0].targets if t >= 0] == [1, 0, 1]
    base = scores([[1, 0, 1]], [[1, 0, 1]], [[0.9, 0.9, 0.9]], ("A", "O"))
    ours = scores([[1, 1, 1]], [[1, 0, 1]], [[0.9, 0.9, 0.9]], ("A", "O"))
    found = flips_of(TARGET, ours, base, examples, tokenizer)
    assert found is not None
    assert found.decisions == 3
    (flip,) = found.worst
    assert flip.word is not None
    assert flip.text[slice(*flip.word)] == "w6"


@pytest.mark.parametrize("place", [0, 50, 119])
def test_a_long_sentence_is_cut_around_the_word(place):
    words = [f"word{n}" for n in range(120)]
    text, word = marked(words, place)
    assert text[slice(*word)] == words[place]
    assert len(text.strip("…")) == CHARACTERS
    text, word = marked(["x" * 1000], 0)
    assert text == "x" * CHARACTERS + "…"
    assert word == (0, CHARACTERS)


def test_numbers_do_not_flip_and_pairs_are_kept():
    examples = encode([Row("w5", 0.5)], "number", ("number",), word_tokenizer(), 64)
    same = scores([[0.4]], [[0.5]], [[1.0]], ("number",))
    assert flips_of(TARGET, same, same, examples, None) is None
    names = ("a", "b")
    long = "w5 " * 200
    examples = encode([Row("w5", "a", long)], "class", names, word_tokenizer(), 512)
    (flip,) = flips_of(
        TARGET, scores([[1]], [[0]], [[0.5]], names), scores([[0]], [[0]], [[0.5]], names), examples, None
    ).worst
    assert flip.pair == long[:CHARACTERS] + "…"


def test_flips_outlive_a_call_that_is_cut_off(tmp_path):
    names = ("a", "b")
    examples = encode([Row("w5", "a")], "class", names, word_tokenizer(), 64)
    base, ours = (scores([[n]], [[0]], [[0.9]], names) for n in (0, 1))
    file = tmp_path / "flips.json"
    Flips(file, examples, None, ()).keep(TARGET, ours, base)
    again = Flips(file, examples, None, ())

    def result(**fields):
        known = {"variant": "small", "runtime": "torch", "device": "cpu", "artifact": "small", "flips": 1.0}
        return Result(**{**known, "fingerprint": "print", **fields})

    assert again.covers(result())
    assert [each.lost for each in again.of([result()])] == [1]
    assert not again.covers(result(fingerprint="another")), "of other weights"
    assert not again.covers(result(runtime="onnxruntime"))
    assert again.covers(result(runtime="onnxruntime", flips=None)), "nothing to know"
    again.forget()
    file.write_text("{}")
    assert Flips(file, examples, None, ()).of([result()]) == [], "of another version"


def judged(folder: Path):
    """Predictions on the evaluation rows by stock transformers and ONNX Runtime, one text at a time."""
    rows = load_labelled(LabelledConfig(source=str(folder / "topics.csv")), 0).evaluation
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "topics" / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "topics" / "base").eval()
    session = onnxruntime.InferenceSession(folder / "topics" / "small" / "onnx" / "model.onnx")
    known = {each.name for each in session.get_inputs()}
    found = []
    for row in rows:
        given = tokenizer(row.text, return_tensors="pt", truncation=True, max_length=64)
        before = model(**given).logits[0].detach().numpy()
        arrays = {name: value.numpy() for name, value in given.items() if name in known}
        now = session.run(None, arrays)[0][0]
        names = [model.config.id2label[int(each.argmax())] for each in (before, now)]
        shares = [np.exp(each - each.max()) for each in (before, now)]
        sure = [float(each.max() / each.sum()) for each in shares]
        found.append((row.text, row.label, *names, *sure))
    return found


def test_a_real_runs_flips_are_those_of_stock_libraries(labelled_runs):
    record = RunRecord.read(labelled_runs / "topics" / "run.json")
    assert [(f.variant, f.runtime) for f in record.flips] == [
        ("base", "onnxruntime"), ("small", "torch"), ("small", "onnxruntime"),
    ]  # fmt: skip
    found = record.flips[-1]
    decided = judged(labelled_runs)
    changed = Counter(each[1:4] for each in decided if each[2] != each[3])
    assert found.decisions == len(decided) == 60
    assert {(c.label, c.before, c.now): c.count for c in found.changes} == changed
    assert changed, "nothing would be seen"
    lost = sorted((e for e in decided if e[2] != e[3] and e[1] == e[2]), key=lambda e: -e[4] * e[5])
    assert [flip.text for flip in found.worst] == [each[0] for each in lost[:10]]
    for flip, each in zip(found.worst, lost, strict=False):
        assert flip.confidence_before == pytest.approx(each[4], abs=1e-4)
        assert flip.confidence_now == pytest.approx(each[5], abs=1e-4)
        assert HOSTILE in flip.text
    lines = [
        json.loads(line) for line in (labelled_runs / "topics" / "results.jsonl").read_text().splitlines()
    ]
    (line,) = [r for r in lines if (r["variant"], r["runtime"]) == ("small", "onnxruntime")]
    assert line["flips"] * 60 == pytest.approx(found.changed)
    assert line["flips_lost"] * 60 == pytest.approx(found.lost)
    assert line["score"] == pytest.approx(np.mean([e[1] == e[3] for e in decided]))
    (step,) = record.step_results
    assert step.pass_name == "prune_magnitude"
    assert None not in (step.score, step.delta_score, step.delta_score_ci95)


@pytest.mark.parametrize("cut_off", [False, True])
def test_results_are_taken_over_with_their_flips(labelled_runs, tmp_path, monkeypatch, cut_off):
    """Also where the call was cut off before `run.json`; nothing is measured again."""
    shutil.copytree(labelled_runs, tmp_path / "runs", symlinks=True)
    folder = tmp_path / "runs"
    before = RunRecord.read(folder / "words" / "run.json")
    assert before.flips
    work = folder / "words" / ".work"
    work.mkdir(exist_ok=True)
    if cut_off:
        (folder / "words" / "run.json").unlink()
        kept = {"flips": [each.model_dump(mode="json") for each in before.flips]}
        (work / "flips.json").write_text(json.dumps(kept))
    monkeypatch.setattr(harness, "Workers", lambda *_: pytest.fail("measured again"))
    outcome = label_records.run(folder, labelled_runs / "words.yaml")
    assert outcome.code == 0, outcome.err
    after = RunRecord.read(folder / "words" / "run.json")
    assert after.flips == before.flips
    assert after.label_references == before.label_references
    assert not (work / "flips.json").exists()


def labelled(kind: str, names: tuple[str, ...], train: list[Row], evaluation: list[Row]):
    data = Labelled("rows", kind, names, tuple(train), tuple(train[:1]), tuple(evaluation))  # type: ignore[arg-type]
    return encoded(data, names, word_tokenizer(), 64)


def test_the_most_frequent_label_and_a_regression():
    train = [Row(f"w5 w{n}", "b") for n in range(10, 16)] + [Row(f"w6 w{n}", "a") for n in range(10, 14)]
    evaluation = [Row("w5 w20", "b"), Row("w6 w21", "a"), Row("w6 w22", "a")]
    data = labelled("class", ("a", "b"), train, evaluation)
    majority, regression = label_references(data)
    assert (majority.name, regression.name) == (MAJORITY, REGRESSION)
    assert majority.score == pytest.approx(1 / 3)
    assert majority.metrics["calibration_error"] == pytest.approx(abs(1 / 3 - 0.6))
    assert regression.score == 1.0
    assert (majority.rows, regression.rows) == (10, 10)
    assert majority.score_ci95 is not None
    assert label_references(data, earlier=[majority]) == [majority], "fitted before"
    other = labelled("class", ("a", "b"), train[:-1], evaluation)
    assert label_references(other, earlier=[majority])[0].rows == 9


def test_a_regression_without_a_word_says_the_most_frequent_label():
    train = [Row("w5", "a"), Row("w5", "a"), Row("w5", "b")]
    data = labelled("class", ("a", "b"), [Row(". !", row.label) for row in train], [Row("?", "a")])
    assert [row.score for row in label_references(data)] == [1.0, 1.0]


def test_the_most_frequent_label_of_each_word():
    def row(text: str, tags: str) -> Row:
        return Row(text, tuple(tags.split()), None, tuple(text.split()))

    train = [row("w5 w6", "A B"), row("w5 w5 w7", "A B B")]
    data = labelled("tags", ("A", "B"), train, [row("w5 w6 w7 w9", "A B A B")])
    (lexicon,) = label_references(data)
    # w5 is A two times of three; w9 was never seen, and B is the more frequent one
    assert lexicon.name == LEXICON
    assert lexicon.score_name == "accuracy"
    assert lexicon.score == pytest.approx(3 / 4)
    numbers = labelled("number", (), [Row("w5", 0.1), Row("w6", 0.2)], [Row("w5", 0.3)])
    assert label_references(numbers) == label_references(None) == []
