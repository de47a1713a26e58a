"""Labels and columns: what is recognised, what is refused, each with its line."""

import json

import pytest
from labelled_files import every, load, sentence, write
from pydantic import ValidationError
from test_labelled_formats import refused

from compress.errors import UserError
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.fields import Fields, recognised
from compress.text.labelled.labels import kind_of, ordered


def jsonl(file, labels, field="label"):
    rows = [{"text": sentence(i), field: label} for i, label in enumerate(labels)]
    return write(file, "\n".join(map(json.dumps, rows)))


class TestKinds:
    @pytest.mark.parametrize(
        ("values", "kind", "names"),
        [
            (["b", "a"] * 5, "class", ("a", "b")),
            ([" b ", "b", "a"] * 4, "class", ("a", "b")),
            (["a,b", "c"] * 5, "class", ("a,b", "c")),
            ([10, 9, 9.0, "9"] * 3, "class", ("9", "10")),
            (["1", "0", "1.0"] * 4, "class", ("0", "1")),
            ([-1, 0, 1] * 4, "class", ("-1", "0", "1")),
            ([True, False] * 5, "class", ("0", "1")),
            ([True, "maybe"] * 5, "class", ("maybe", "true")),
            (["1.0", "1", "v"] * 4, "class", ("1", "1.0", "v")),
            (["007", "7"] * 5, "class", ("007", "7")),
            (["12345678901234567890", "12345678901234567891"] * 5, "class", None),
            ([0.5, 1, "2"] * 4, "number", ()),
            (["0.5", "1e3"] * 5, "number", ()),
            ([["a", "b"], ["b"], []] * 4, "classes", ("a", "b")),
            ([["a", "a"], "b"] * 5, "classes", ("a", "b")),
        ],
    )
    def test_recognised(self, tmp_path, values, kind, names):
        data = load(jsonl(tmp_path / "r.jsonl", values))
        assert data.kind == kind
        assert data.names == names or (names is None and len(data.names) == 2)
        if kind == "number":
            assert {row.label for row in every(data)} == {float(value) for value in values}
        if kind == "classes":
            assert {row.label for row in every(data)} == {
                tuple(dict.fromkeys(v if isinstance(v, list) else [v])) for v in values
            }

    def test_asked_for(self, tmp_path):
        file = jsonl(tmp_path / "r.jsonl", [1, 2, 5, 3] * 4)
        assert {row.label for row in every(load(file, kind="number"))} == {1.0, 2.0, 5.0, 3.0}
        assert {row.label for row in every(load(file, kind="classes"))} == {("1",), ("2",), ("5",), ("3",)}
        assert {row.label for row in every(load(file, kind="class"))} == {"1", "2", "5", "3"}
        file = jsonl(tmp_path / "s.jsonl", [["a"], ["b"]] * 4)
        assert load(file, kind="class").names == ("a", "b")
        file = jsonl(tmp_path / "t.jsonl", [f"the target {i}" for i in range(9)])
        assert {row.label for row in every(load(file, kind="text"))} == {f"the target {i}" for i in range(9)}

    def test_values_that_the_kind_does_not_take(self, tmp_path):
        file = jsonl(tmp_path / "r.jsonl", ["a", "1"])
        refused(
            rf"labelled\.source: {file}:1 has the label 'a' where a number is wanted", file, kind="number"
        )
        file = jsonl(tmp_path / "r.jsonl", [0.5, float("inf")])
        refused(rf"labelled\.source: {file}:2 has the label inf where a number is wanted", file)
        file = jsonl(tmp_path / "s.jsonl", ["a", ["a", "b"]])
        refused(rf"labelled\.source: {file}:2 has the label \['a', 'b'\] where one .+", file, kind="class")
        file = jsonl(tmp_path / "t.jsonl", [0.5, None])
        refused(rf"labelled\.source: {file}:2 has no label .+", file, kind="number")

    def test_order(self):
        assert ordered(["2", "10", "-1"]) == ("-1", "2", "10")
        assert ordered(["I-x", "O", "B-x"]) == ("O", "B-x", "I-x")
        assert kind_of([]) == ("class", True)


class TestLabelsThatTeachNothing:
    def test_one_label(self, tmp_path):
        file = jsonl(tmp_path / "r.jsonl", ["x"] * 9)
        refused(rf"labelled\.source: all 9 rows of {file} have 'x' alone; give rows of two labels", file)
        file = jsonl(tmp_path / "r.jsonl", [[]] * 9)
        refused(rf"labelled\.source: all 9 rows of {file} have no label; give rows of two labels", file)

    def test_a_label_each(self, tmp_path):
        file = jsonl(tmp_path / "r.jsonl", [f"a summary {i}" for i in range(9)])
        refused(
            rf"labelled\.label: each of the 9 rows of {file} has a label of its own, such as 'a summ.+text.+",
            file,
        )

    def test_ten_thousand_labels_and_one_more(self, tmp_path):
        file = jsonl(tmp_path / "r.jsonl", [f"label {i % 10_000}" for i in range(20_000)])
        data = load(file)
        assert len(data.names) == 10_000
        assert {row.label for row in data.train} == set(data.names)
        assert len(data.evaluation) == 4000
        file = jsonl(tmp_path / "s.jsonl", [f"label {i % 10_001}" for i in range(10_100)])
        refused(
            rf"labelled\.label: {file} has 10,001 distinct labels, such as 'label 0', where at .+",
            file,
        )

    def test_labels_that_training_never_saw(self, tmp_path):
        train = jsonl(tmp_path / "r.jsonl", ["a", "b"] * 9)
        dev = jsonl(tmp_path / "dev.jsonl", ["a", "b", "c"])
        for part in ("evaluation", "heldout"):
            refused(
                rf"labelled\.{part}: {dev}:3 has the label 'c', which no row has that trains; take "
                "such rows out, or train on rows that have it", train, **{part: dev},
            )  # fmt: skip

    def test_tags_that_training_never_saw(self, tmp_path):
        train = write(tmp_path / "t.conll", "".join(f"w{i} O\nv{i} B-x\n\n" for i in range(9)))
        dev = write(tmp_path / "d.conll", "a O\n\nb O\nc B-y\n")
        refused(rf"labelled\.evaluation: {dev}:3 has the label 'B-y', .+", train, evaluation=dev)


class TestEmptyTexts:
    def test_few_are_left_out_and_counted(self, tmp_path):
        lines = ["text,label", *(f"{sentence(i)},{'ab'[i % 2]}" for i in range(10)), ",a", "  ,b"]
        data = load(write(tmp_path / "r.csv", "\n".join(lines)))
        assert len(every(data)) == 10
        assert data.notes["left_out"] == {"empty texts": 2}

    def test_most_are_refused(self, tmp_path):
        file = write(tmp_path / "r.csv", "text,label\n,a\n ,b\nfull,a\n")
        refused(
            rf"labelled\.source: {file}: 2 of 3 texts are empty; is 'text' the column of the text\?", file
        )

    def test_of_pairs_and_targets(self, tmp_path):
        rows = [{"text1": sentence(i), "text2": "" if i < 2 else "x", "label": i % 2} for i in range(12)]
        assert len(every(load(write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, rows)))))) == 10
        rows = [{"document": sentence(i), "summary": None if i < 2 else "x y"} for i in range(12)]
        data = load(write(tmp_path / "s.jsonl", "\n".join(map(json.dumps, rows))))
        assert (data.kind, len(every(data)), data.notes["left_out"]) == ("text", 10, {"empty texts": 2})

    def test_words(self, tmp_path):
        rows = [{"tokens": ["a", " ", f"b{i}"], "tags": ["O", "O", "B"]} for i in range(8)]
        rows.append({"tokens": [], "tags": []})
        data = load(write(tmp_path / "r.jsonl", "\n".join(map(json.dumps, rows))))
        assert {row.words for row in every(data)} == {("a", f"b{i}") for i in range(8)}
        assert data.notes["left_out"] == {"empty words": 8, "empty texts": 1}

    def test_an_evaluation_file_without_rows(self, tmp_path):
        train = jsonl(tmp_path / "r.jsonl", ["a", "b"] * 9)
        dev = write(tmp_path / "dev.csv", "text,label\n")
        refused(rf"labelled\.evaluation: {dev} holds no rows with a label", train, evaluation=dev)


class TestFields:
    @pytest.mark.parametrize(
        ("columns", "expected"),
        [
            ("id text label", Fields("text", "", "label")),
            ("Text Category", Fields("Text", "", "Category")),
            ("utterance intent", Fields("utterance", "", "intent")),
            ("query class", Fields("query", "", "class")),
            ("premise hypothesis label", Fields("premise", "hypothesis", "label")),
            ("sentence1 sentence2 score", Fields("sentence1", "sentence2", "score")),
            ("sentence1 sentence2 label1 gold_label", Fields("sentence1", "sentence2", "gold_label")),
            ("query passage label", Fields("query", "passage", "label")),
            ("anchor positive", Fields("anchor", "positive", kind="pair")),
            ("question answer", Fields("question", "answer", kind="pair")),
            ("sentence1 sentence2", Fields("sentence1", "sentence2", kind="pair")),
            ("question context answers", Fields("question", "context", "answers", kind="span")),
            ("tokens ner_tags pos_tags", Fields("", "", "ner_tags", "tokens", "tags")),
            ("words labels", Fields("", "", "labels", "words", "tags")),
            ("article highlights id", Fields("article", "", "highlights", kind="text")),
            ("source target", Fields("source", "", "target", kind="text")),
            ("text target", Fields("text", "", "target")),
            ("review summary rating", Fields("review", "", "rating")),
        ],
    )
    def test_recognised(self, columns, expected):
        config = LabelledConfig(source="x")
        assert recognised(columns.split(), config, "x.csv", "labelled.source") == expected

    @pytest.mark.parametrize(
        ("columns", "named", "expected"),
        [
            ("title text label", {"text": "title"}, Fields("title", "", "label")),
            ("title text label", {"text": "title", "pair": "text"}, Fields("title", "text", "label")),
            ("sentence1 sentence2 label", {"text": "sentence2"}, Fields("sentence2", "", "label")),
            ("tokens text label", {"text": "text"}, Fields("text", "", "label")),
            ("query body label", {"kind": "pair", "pair": "body"}, Fields("query", "body", kind="pair")),
            (
                "question ctx answer",
                {"kind": "span", "pair": "ctx"},
                Fields("question", "ctx", "answer", kind="span"),
            ),
            ("a b", {"kind": "text", "text": "a", "label": "b"}, Fields("a", "", "b", kind="text")),
            ("a b", {"kind": "tags", "words": "a", "label": "b"}, Fields("", "", "b", "a", "tags")),
        ],
    )
    def test_named(self, columns, named, expected):
        config = LabelledConfig(source="x", **named)
        assert recognised(columns.split(), config, "x.csv", "labelled.source") == expected

    @pytest.mark.parametrize(
        ("columns", "kind", "missing"),
        [("text", "pair", "pair"), ("question context", "span", "label"), ("text label", "tags", "words")],
    )
    def test_a_kind_that_lacks_a_column(self, columns, kind, missing):
        with pytest.raises(
            UserError, match=rf"labelled\.{missing}: no column of x\.csv .+ of kind '{kind}' .+"
        ):
            recognised(columns.split(), LabelledConfig(source="x", kind=kind), "x.csv", "labelled.source")

    def test_many_columns_are_not_all_named(self):
        with pytest.raises(UserError, match=r"\(it has c0, .+ c19 and 30 more\)"):
            recognised([f"c{i}" for i in range(50)], LabelledConfig(source="x"), "x.csv", "labelled.source")

    def test_sources_of_several_kinds(self, tmp_path):
        one = jsonl(tmp_path / "r.jsonl", ["a", "b"])
        two = write(tmp_path / "t.conll", "a O\n")
        refused(
            r"labelled\.kind: the sources are of several kinds \(\S+r\.jsonl looks like 'class'; .+",
            [one, two],
        )


class TestConfig:
    def test_fields(self):
        assert LabelledConfig.model_validate(["a.csv", "b.csv"]).named == "a.csv, b.csv"
        with pytest.raises(ValidationError, match=r"come to 0\.7 \+ 0\.3, which leaves no rows to train on"):
            LabelledConfig(source="x", evaluation_share=0.7, heldout_share=0.3)
        with pytest.raises(ValidationError, match=r"labelled\.source: an empty list"):
            LabelledConfig(source=[])
        with pytest.raises(ValidationError, match="Extra inputs"):
            LabelledConfig.model_validate({"source": "x", "column": "y"})
        assert all(field.description for field in LabelledConfig.model_fields.values())
