"""Labelled rows of every kind of file, and the errors of each with their line."""

import json
import re
import sys
from types import ModuleType, SimpleNamespace

import pytest
from labelled_files import every, found, load, rows_csv, sentence, write

from compress.errors import MissingExtra, UserError
from compress.text import rows as rows_module
from compress.text.labelled.config import LabelledConfig


def refused(line, source, **fields):
    with pytest.raises(UserError) as error:
        load(source, **fields)
    assert re.fullmatch(line, str(error.value)), str(error.value)


class TestDelimited:
    def test_quotes_line_ends_and_a_mark_of_the_encoding(self, tmp_path):
        texts = ['say "no", please', "two\nlines", "plain", "größer, viel", "five", "six"]
        quoted = ["text,label"] + [
            f'"{t.replace(chr(34), chr(34) * 2)}",{"ab"[i % 2]}' for i, t in enumerate(texts)
        ]
        content = "\r\n".join(line.replace("\n", "\r\n") for line in quoted) + "\r\n"
        data = load(write(tmp_path / "r.csv", b"\xef\xbb\xbf" + content.encode()))
        assert found(data) == {(t, None, "ab"[i % 2]) for i, t in enumerate(texts)}
        assert (data.kind, data.names) == ("class", ("a", "b"))

    @pytest.mark.parametrize("delimiter", [";", "\t"])
    def test_other_delimiters(self, tmp_path, delimiter):
        lines = [delimiter.join(("label", "text"))]
        lines += [delimiter.join(("xy"[i % 2], f'"{sentence(i)}, {i}"')) for i in range(8)]
        data = load(write(tmp_path / ("r.tsv" if delimiter == "\t" else "r.csv"), "\n".join(lines)))
        assert found(data) == {(f"{sentence(i)}, {i}", None, "xy"[i % 2]) for i in range(8)}

    def test_quotes_that_are_text_in_a_tsv(self, tmp_path):
        texts = ['"Never', 'he said "go"', '"again" he said', "plain one", "another", "sixth"]
        lines = ["text\tlabel", *(f"{t}\t{'ab'[i % 2]}" for i, t in enumerate(texts))]
        data = load(write(tmp_path / "r.tsv", "\n".join(lines)))
        assert {row.text for row in every(data)} == set(texts)

    def test_quotes_in_a_tsv_that_come_out_even_over_lines(self, tmp_path):
        texts = ['"Never', "plain one", 'said he"', "another", "sixth", "seventh"]
        lines = ["text\tlabel", *(f"{t}\t{'ab'[i % 2]}" for i, t in enumerate(texts))]
        data = load(write(tmp_path / "r.tsv", "\n".join(lines)))
        assert {row.text for row in every(data)} == set(texts)

    def test_blank_lines_are_no_rows_and_places_are_lines(self, tmp_path):
        file = write(tmp_path / "r.csv", 'text,label\n"a\nb",x\n\nlast,\n')
        refused(
            rf"labelled\.source: {file}:5 has no label \(null or empty\); give it one, or take the row out",
            file,
        )

    def test_a_row_of_another_width(self, tmp_path):
        file = write(tmp_path / "r.csv", "text,label\none,a\ntwo, or three,b\n")
        refused(
            rf"labelled\.source: {file}:3 has 3 fields where the header has 2 \(text, label\); put fields "
            "that hold the delimiter or a line end into quotes", file,
        )  # fmt: skip

    def test_quotes_that_do_not_end(self, tmp_path):
        file = write(tmp_path / "r.csv", 'text,label\none,a\n"two,b\nthree,a\n')
        refused(rf"labelled\.source: {file}:3 is not readable \(unexpected end of data\); .+", file)

    def test_a_text_longer_than_a_field(self, tmp_path):
        file = write(tmp_path / "r.csv", f"text,label\n{'x' * 140_000},a\n")
        refused(
            rf"labelled\.source: {file}:2 is not readable \(field larger than field limit .+\.jsonl", file
        )

    def test_columns(self, tmp_path):
        file = write(tmp_path / "r.csv", "body,verdict\none,a\n")
        refused(
            rf"labelled\.label: no column of {file} is recognised as the label \(it has body, verdict\); set "
            r"labelled\.label to one of them", file,
        )  # fmt: skip
        refused(rf"labelled\.text: {file} has no column 'txt' \(it has body, verdict\)", file, text="txt")
        file = write(tmp_path / "s.csv", "thing,label\none,a\n")
        refused(
            rf"labelled\.text: no column of {file} is recognised as the text \(it has thing, label\); .+",
            file,
        )
        file = write(tmp_path / "t.csv", "text,text,label\none,two,a\n")
        refused(rf"labelled\.source: {file} has the column 'text' twice; rename one", file)
        file = write(tmp_path / "u.csv", "")
        refused(rf"labelled\.source: {file} is empty; .+", file)

    def test_named_columns(self, tmp_path):
        lines = ["text,label,body,verdict", *(f"no,no,{sentence(i)},{'ab'[i % 2]}" for i in range(8))]
        data = load(write(tmp_path / "r.csv", "\n".join(lines)), text="body", label="verdict")
        assert found(data) == {(sentence(i), None, "ab"[i % 2]) for i in range(8)}

    def test_no_utf8(self, tmp_path):
        file = write(tmp_path / "r.csv", "text,label\ncafé,a\n".encode("latin-1"))
        refused(rf"{file}: is not UTF-8 text \(byte 14\); convert it", file)


class TestJson:
    def test_lines(self, tmp_path):
        lines = [json.dumps({"utterance": sentence(i), "intent": "ab"[i % 2], "id": i}) for i in range(8)]
        data = load(write(tmp_path / "r.jsonl", "\ufeff" + "\n\n".join(lines)))
        assert found(data) == {(sentence(i), None, "ab"[i % 2]) for i in range(8)}

    def test_a_list_of_rows(self, tmp_path):
        rows = [{"text": sentence(i), "label": i % 2} for i in range(8)]
        assert len(every(load(write(tmp_path / "r.json", json.dumps(rows))))) == 8
        assert load(write(tmp_path / "s.json", json.dumps({"data": rows}))).names == ("0", "1")

    @pytest.mark.parametrize("field", ["conversation", "conversations"])
    def test_chats_in_other_layouts(self, tmp_path, field):
        file = write(tmp_path / "r.jsonl", json.dumps({field: [{"role": "user", "content": "hi"}]}))
        refused(
            rf"labelled\.source: {file}:1 holds a chat \('{field}'\) in another layout than is read; .+",
            file,
        )

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ("[1]", "is no JSON object; write one per row, its fields by name"),
            ("{", r"not readable as JSON \(.+\)"),
            ("[" * 200 + "]" * 200, r"not readable as JSON \(nested 200 deep, at most 100 are read\)"),
            ('{"text": "x"}', r"has no label \(null or empty\); .+"),
            ('{"text": "x", "label": null}', r"has no label \(null or empty\); .+"),
            ('{"text": "x", "label": "  "}', r"has no label \(null or empty\); .+"),
            ('{"text": "x", "label": NaN}', r"has no label \(null or empty\); .+"),
            ('{"text": "x", "label": {"a": 1}}', r"has the label \{'a': 1\} where one name is wanted"),
            ('{"text": 3, "label": "a"}', "holds a number where a text is wanted; write it as one text"),
            ('{"text": "cut \\ud83d", "label": "a"}', r"holds half a character \('\\ud83d' at 4\); .+"),
            ('{"text": "x", "label": "\\ud83d"}', r"holds half a character \('\\ud83d' at 0\); .+"),
        ],
    )  # fmt: skip
    def test_a_line_that_is_no_row(self, tmp_path, line, told):
        file = write(tmp_path / "r.jsonl", f'{{"text": "one", "label": "a"}}\n{line}\n')
        refused(rf"labelled\.source: {file}:2:? {told}", file)

    def test_not_a_list(self, tmp_path):
        file = write(tmp_path / "r.json", '{"text": "x"}')
        refused(rf"labelled\.source: {file} is neither a list of rows nor laid out as SQuAD .+", file)
        refused(r"labelled\.source: \S+e\.jsonl holds no rows", write(tmp_path / "e.jsonl", "\n"))


class TestParquet:
    def write(self, file, columns):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table(columns), file)
        return str(file)

    def test_rows(self, tmp_path):
        columns = {"sentence": [sentence(i) for i in range(8)], "label": [i % 2 for i in range(8)]}
        assert found(load(self.write(tmp_path / "r.parquet", columns))) == {
            (sentence(i), None, str(i % 2)) for i in range(8)
        }

    def test_lists_and_structures(self, tmp_path):
        columns = {"tokens": [["a", f"b{i}"] for i in range(8)], "ner_tags": [["O", "B-x"]] * 8}
        data = load(self.write(tmp_path / "r.parquet", columns))
        assert (data.kind, data.names) == ("tags", ("O", "B-x"))
        assert {row.words for row in every(data)} == {("a", f"b{i}") for i in range(8)}
        answers = [{"text": [f"w{i}"], "answer_start": [4]} for i in range(8)]
        columns = {
            "question": [f"q{i}" for i in range(8)],
            "context": [f"The w{i}." for i in range(8)],
            "answers": answers,
        }
        data = load(self.write(tmp_path / "s.parquet", columns))
        assert {row.label for row in every(data)} == {((4, f"w{i}"),) for i in range(8)}

    def test_what_is_refused(self, tmp_path):
        file = write(tmp_path / "r.parquet", b"PAR1 and nothing else")
        refused(rf"labelled\.source: {file} is no whole parquet file; copy or download it again", file)
        file = self.write(tmp_path / "s.parquet", {"conversations": [[{"from": "human"}]]})
        refused(rf"labelled\.source: {file} holds a chat \('conversations'\) in another layout .+", file)
        file = self.write(tmp_path / "t.parquet", {"text": ["x", "y"], "label": ["a", None]})
        refused(rf"labelled\.source: {file}, row 1 has no label \(null or empty\); .+", file)

    def test_lists_that_repeat_a_text_have_an_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows_module, "_MORE_BYTES", 0)
        monkeypatch.setattr(rows_module, "_RATIO", 1)
        columns = {"tokens": [["x" * 5000] * 100], "ner_tags": [["O"] * 100]}
        file = self.write(tmp_path / "r.parquet", columns)
        refused(rf"labelled\.source: {file} holds more than 1 times its bytes of text", file)

    def test_without_the_extra(self, tmp_path, monkeypatch):
        monkeypatch.setattr(rows_module, "find_spec", lambda name: None)
        with pytest.raises(MissingExtra, match="needs the package 'pyarrow'"):
            load(write(tmp_path / "r.parquet", b""))
        with pytest.raises(MissingExtra, match="needs the package 'datasets'"):
            load("datasets:x")


class TestDataSets:
    def data_sets(self, monkeypatch, splits, features):
        class Rows(list):
            @property
            def column_names(self):
                return list(self[0])

        def load_dataset(name, config, split):
            tables = {}
            for part, rows in splits.items():
                tables[part] = Rows(rows)
                tables[part].features = features
            return tables if split is None else tables[split]

        module = ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setattr(rows_module, "find_spec", lambda name: True)

    def test_names_of_numbers_and_splits(self, monkeypatch):
        def rows(first, count):
            return [{"text": sentence(first + i), "label": i % 2} for i in range(count)]

        features = {"label": SimpleNamespace(names=["worse", "better", "never"])}
        splits = {"train": rows(0, 10), "validation": rows(10, 4), "test": [{"text": "x", "label": -1}]}
        self.data_sets(monkeypatch, splits, features)
        data = load("datasets:some/set")
        assert data.names == ("worse", "better", "never")  # as the model's numbers are
        assert [row.label for row in data.evaluation] == ["worse", "better"] * 2
        assert data.notes["unused"] == ["test"]
        alone = load("datasets:some/set:validation", heldout_share=0)
        assert {row.text for row in every(alone)} == {sentence(10 + i) for i in range(4)}
        refused(r"labelled\.evaluation: 'absent' does not exist .+", "datasets:some/set", evaluation="absent")

    def test_names_of_tags_and_rows_without_labels(self, monkeypatch):
        features = {"ner_tags": SimpleNamespace(feature=SimpleNamespace(names=["O", "B-x"]))}
        rows = [{"tokens": ["a", f"b{i}"], "ner_tags": [0, 1]} for i in range(8)]
        self.data_sets(monkeypatch, {"train": rows}, features)
        assert load("datasets:s").train[0].label == ("O", "B-x")
        features = {"label": SimpleNamespace(names=["no", "yes"])}
        rows = [{"text": sentence(i), "label": (-1, 0, 1)[i % 3]} for i in range(12)]
        self.data_sets(monkeypatch, {"train": rows}, features)
        data = load("datasets:s")
        assert len(every(data)) == 8
        assert data.notes["left_out"] == {"unlabelled": 4}
        rows[3]["label"] = 5
        refused(
            r"labelled\.source: data set s train, row 3 has the label 5 where there are 2 names", "datasets:s"
        )

    def test_a_set_without_training_rows(self, monkeypatch):
        self.data_sets(monkeypatch, {"test": [{"text": "x", "label": 0}]}, {})
        refused(
            r"labelled\.source: datasets:s has no split to train on \(it has test\); name one as \S+:SPLIT",
            "datasets:s",
        )


def test_sources(tmp_path):
    one, two = (
        rows_csv(tmp_path / "one.csv", 10),
        write(tmp_path / "two.jsonl", json.dumps({"text": "more", "label": "a"})),
    )
    assert len(every(load([one, two]))) == 11
    refused(
        r"labelled\.source: 'absent\.csv' does not exist \(a file, a folder, 'datasets:NAME' or .+\)",
        "absent.csv",
    )
    file = write(tmp_path / "r.docx", "")
    refused(rf"labelled\.source: {file} is of no kind that is read; give \.bio, .+", file)
    assert LabelledConfig.model_validate("rows.csv") == LabelledConfig(source="rows.csv")
    refused(
        r"labelled\.source: 'stdlib:kind' is no labelled data of the library; did you mean 'stdlib:kinds'\?",
        "stdlib:kind",
    )
