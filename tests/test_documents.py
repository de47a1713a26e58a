"""What text is read from: files, folders, records, data sets; and what each refuses."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import training_set

from compress.errors import MissingExtra, UserError
from compress.text import rows as text_module
from compress.text.documents import Document, load_documents


class TestSources:
    def test_files_and_folders(self, tmp_path):
        (tmp_path / "in").mkdir()
        (tmp_path / "a.txt").write_text("first")
        (tmp_path / "in" / "b.md").write_text("zweite – Größe", encoding="utf-8")
        (tmp_path / "in" / "c.bin").write_bytes(b"\xff")
        (tmp_path / "in" / "empty.txt").write_text(" \n")
        expected = [Document("a.txt", "first"), Document("in/b.md", "zweite – Größe")]
        assert load_documents(str(tmp_path)) == expected
        assert load_documents([str(tmp_path / "a.txt"), str(tmp_path / "a.txt")]) == expected[:1] * 2

    def test_jsonl(self, tmp_path):
        file = tmp_path / "t.jsonl"
        file.write_text('{"text": "one"}\n\n{"text": "zwö", "more": 1}\n', encoding="utf-8")
        assert load_documents(str(file)) == [Document("t.jsonl:1", "one"), Document("t.jsonl:3", "zwö")]

    @pytest.mark.parametrize(
        "line", ['{"body": "x"}', "[1]", "{", "plain text", "null", "[" * 100_000 + "]" * 100_000]
    )
    def test_jsonl_without_text(self, tmp_path, line):
        (tmp_path / "t.jsonl").write_text(json.dumps({"text": "ok"}) + "\n" + line + "\n")
        with pytest.raises(UserError, match=r't\.jsonl:2 is no JSON object with a "text" field'):
            load_documents(str(tmp_path / "t.jsonl"))

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    @pytest.mark.parametrize(
        ("value", "what"),
        [
            ([{"role": "user", "content": "hello"}], "a list, such as a chat,"),
            ({"en": "hello"}, "an object"),
            (3, "a number"),
            (0.5, "a number"),
            (True, "true or false"),
            (b"hello", "bytes"),
            ("cut off \ud83d here", r"half a character \('\\ud83d' at 8\)"),
        ],
    )
    def test_records_that_are_no_text_name_their_row(self, tmp_path, kind, value, what):
        if kind == "jsonl" and isinstance(value, bytes):
            pytest.skip("JSON has none")
        if kind == "parquet" and isinstance(value, str):
            pytest.skip("a column of text cannot hold it")
        file = tmp_path / f"t.{kind}"
        if kind == "jsonl":
            file.write_text(json.dumps({"text": "ok"}) + "\n" + json.dumps({"text": value}))
        else:
            import pyarrow as pa
            from pyarrow import parquet

            parquet.write_table(pa.table({"text": [None, value]}), file)
        place = ":2" if kind == "jsonl" else ", row 1"
        with pytest.raises(UserError, match=rf"data\.text: \S+t\.{kind}{place} holds {what}"):
            load_documents(str(file))

    def test_a_record_of_null_is_left_out_of_both_kinds(self, tmp_path):
        file = tmp_path / "t.jsonl"
        file.write_text('{"text": null}\n{"text": "one"}\n')
        assert load_documents(str(file)) == [Document("t.jsonl:2", "one")]

    def test_a_mark_of_the_encoding_is_no_text(self, tmp_path):
        mark = b"\xef\xbb\xbf"
        (tmp_path / "t.jsonl").write_bytes(mark + b'{"text": "one"}\n')
        (tmp_path / "t.txt").write_bytes(mark + b"two")
        assert [d.text for d in load_documents(str(tmp_path))] == ["one", "two"]

    @pytest.mark.parametrize(
        ("source", "asked", "found"),
        [
            ("wikitext/wikitext-2-raw-v1", ("wikitext", "wikitext-2-raw-v1", "train"), ["wikitext"]),
            ("ag_news:test", ("ag_news", None, "test"), ["ag_news"]),
            ("owner/name", ("owner/name", None, "train"), ["owner/name", "owner"]),
            ("owner/name/part:test", ("owner/name", "part", "test"), ["owner/name"]),
        ],
    )
    def test_names_of_data_sets(self, monkeypatch, source, asked, found):
        self.data_sets(monkeypatch, {name: [{"text": "one"}, {"text": None}] for name in found})
        assert load_documents(f"datasets:{source}") == [Document(f"{source}:0", "one")]
        assert self.asked[-1] == asked

    def test_data_sets_that_cannot_be_read(self, monkeypatch):
        self.data_sets(monkeypatch, {"numbers": [{"text": 3}], "other": [{"body": "x"}]})
        with pytest.raises(UserError, match=r"data set 'a/b' cannot be loaded: no set a/b; no set a$"):
            load_documents("datasets:a/b")
        with pytest.raises(UserError, match="data set numbers, row 0 holds a number"):
            load_documents("datasets:numbers")
        with pytest.raises(UserError, match=r"other has no column 'text' \(it has body\)"):
            load_documents("datasets:other")

    def data_sets(self, monkeypatch, known):
        """A `datasets` library that knows these."""

        class Rows(list):
            @property
            def column_names(self):
                return list(self[0])

        def load_dataset(name, config, split):
            self.asked.append((name, config, split))
            if name not in known:
                raise FileNotFoundError(f"no set {name}\nand more lines")
            return Rows(known[name])

        self.asked: list[tuple[str, str | None, str]] = []
        module = ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        monkeypatch.setattr(text_module, "find_spec", lambda name: True)

    def test_parquet(self, tmp_path):
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "t.parquet")
        found = load_documents(str(tmp_path / "t.parquet"))
        assert found == [Document("t.parquet:0", "one"), Document("t.parquet:2", "two")]
        parquet.write_table(pa.table({"body": ["one"]}), tmp_path / "u.parquet")
        with pytest.raises(UserError, match=r"has no column 'text' \(it has body\)"):
            load_documents(str(tmp_path / "u.parquet"))
        (tmp_path / "v.parquet").write_bytes(b"PAR1 and nothing else")
        with pytest.raises(UserError, match=r"v\.parquet is no whole parquet file"):
            load_documents(str(tmp_path / "v.parquet"))

    def test_a_line_without_end_is_refused_by_its_number_and_never_read_whole(self, tmp_path, monkeypatch):
        monkeypatch.setattr(text_module, "LINE_BYTES", 100)
        file = tmp_path / "t.jsonl"
        whole = json.dumps({"text": "x" * 80})
        file.write_text(f"{whole}\n\n{json.dumps({'text': 'y' * 87})}\n", encoding="utf-8")
        assert [len(d.text) for d in load_documents(str(file))] == [80, 87]  # 100 bytes, the end of line too
        file.write_text(f"{whole}\n\n{json.dumps({'text': 'y' * 90})}\n", encoding="utf-8")
        with pytest.raises(UserError, match=r"data\.text: \S+t\.jsonl:3 is longer than the 100 bytes"):
            load_documents(str(file))

    def test_a_row_group_without_end_is_refused_before_it_is_read(self, tmp_path, monkeypatch):
        import pyarrow as pa
        from pyarrow import parquet

        monkeypatch.setattr(text_module, "LINE_BYTES", 5000)
        file, rows = tmp_path / "t.parquet", [f"row {i} " * 20 for i in range(100)]
        table = pa.table({"text": rows, "n": [b"x" * 999] * 100})
        parquet.write_table(table, file, row_group_size=20)
        assert [d.text for d in load_documents(str(file))] == rows
        parquet.write_table(table, file, row_group_size=60)
        with pytest.raises(UserError, match=r"t\.parquet: row group 0 holds [\d,]+ bytes of text where at"):
            load_documents(str(file))

    def test_what_a_file_says_of_columns_is_not_asked_of_small_groups(self):
        class Group:
            total_byte_size, num_columns = 1000, 1

            def column(self, number):
                raise AssertionError("a broken file would end the process here")

        table = SimpleNamespace(metadata=SimpleNamespace(num_row_groups=1, row_group=lambda number: Group()))
        text_module._require_small_groups(table, Path("t.parquet"), ["text"], "data.text")

    @pytest.mark.parametrize(("name", "package"), [("t.parquet", "pyarrow"), ("datasets:x/y", "datasets")])
    def test_an_extra_that_is_not_installed(self, tmp_path, monkeypatch, name, package):
        (tmp_path / "t.parquet").write_bytes(b"")
        monkeypatch.setattr(text_module, "find_spec", lambda name: None)
        source = name if ":" in name else str(tmp_path / name)
        with pytest.raises(MissingExtra, match=rf"needs the package '{package}'"):
            load_documents(source)

    @pytest.mark.parametrize("name", ["t.txt", "t.jsonl"])
    def test_text_that_is_not_utf8(self, tmp_path, name):
        (tmp_path / name).write_bytes('{"text": "café"}\n'.encode("latin-1"))
        with pytest.raises(UserError, match=rf"{name}(:1)?:? is not UTF-8 text( \(byte 13\))?; convert it"):
            load_documents(str(tmp_path / name))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match=r"data\.text: 'absent\.txt' does not exist"):
            load_documents("absent.txt")
        with pytest.raises(UserError, match=r"holds no \.txt"):
            load_documents(str(tmp_path))
        (tmp_path / "empty.txt").write_text("\n")
        with pytest.raises(UserError, match=r"empty\.txt holds no text"):
            load_documents(str(tmp_path / "empty.txt"))

    def test_the_standard_library_is_there_without_its_tests(self):
        documents = load_documents("stdlib")
        names = [d.name for d in documents]
        assert "json/decoder.py" in names
        assert not [n for n in names if "test" in n.split("/")[:-1] or "site-packages" in n]
        assert len(training_set.documents()) < len(names)
