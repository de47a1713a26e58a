"""Folders as GLUE and XNLI ship them, CoNLL columns, and SQuAD's layout."""

import json

import pytest
from labelled_files import every, found, load, rows_csv, sentence, write
from test_labelled_formats import refused

from compress.text.labelled.layout import part_of

NLI = "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse other"
XNLI = "language gold_label sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse"


def tsv(header: str, lines: list[list[str]]) -> str:
    return "\n".join(["\t".join(header.split()), *("\t".join(line) for line in lines)]) + "\n"


def lines(first: int, count: int, make) -> list[list[str]]:
    return [make(i) for i in range(first, first + count)]


# of each task: header, a line of a number, what the row of that line is
TASKS = {
    "SST-2": (
        "sentence label",
        lambda i: [sentence(i), str(i % 2)],
        lambda i: (sentence(i), None, str(i % 2)),
    ),
    "STS-B": (
        "index genre filename year old_index source1 source2 sentence1 sentence2 score",
        lambda i: [str(i), "g", "f", "y", "o", "s", "t", f'"{sentence(i)}', sentence(-i), f"{i / 4:.3f}"],
        lambda i: (f'"{sentence(i)}', sentence(-i), i / 4),
    ),
    "QQP": (
        "id qid1 qid2 question1 question2 is_duplicate",
        lambda i: [str(i), "1", "2", sentence(i), f'"{sentence(-i)}', str(i % 2)],
        lambda i: (sentence(i), f'"{sentence(-i)}', str(i % 2)),
    ),
    "QNLI": (
        "index question sentence label",
        lambda i: [str(i), sentence(i), sentence(-i), ("entailment", "not_entailment")[i % 2]],
        lambda i: (sentence(i), sentence(-i), ("entailment", "not_entailment")[i % 2]),
    ),
    "RTE": (
        "index sentence1 sentence2 label",
        lambda i: [str(i), sentence(i), sentence(-i), ("entailment", "not_entailment")[i % 2]],
        lambda i: (sentence(i), sentence(-i), ("entailment", "not_entailment")[i % 2]),
    ),
}  # fmt: skip


class TestGlue:
    @pytest.mark.parametrize("task", TASKS)
    def test_tasks_with_a_header(self, tmp_path, task):
        header, make, row = TASKS[task]
        write(tmp_path / "train.tsv", tsv(header, lines(1, 20, make)))
        write(tmp_path / "dev.tsv", tsv(header, lines(30, 4, make)))
        write(tmp_path / "test.tsv", tsv("index sentence", [["0", "no label here"]]))
        data = load(str(tmp_path))
        assert {(r.text, r.pair, r.label) for r in data.evaluation} == {row(i) for i in range(30, 34)}
        assert {(r.text, r.pair, r.label) for r in data.train + data.heldout} == {
            row(i) for i in range(1, 21)
        }
        assert data.kind == ("number" if task == "STS-B" else "class")
        assert data.notes["split"] == {"heldout": "cut", "evaluation": "given"}
        assert data.notes["unused"] == [str(tmp_path / "test.tsv")]

    def test_cola_has_no_header(self, tmp_path):
        make = [["gj04", str(i % 2), "*" if i % 2 else "", f'{sentence(i)} "'] for i in range(20)]
        write(tmp_path / "train.tsv", "\n".join("\t".join(line) for line in make))
        write(tmp_path / "dev.tsv", "\n".join("\t".join(line) for line in make[:2]))
        data = load(str(tmp_path))
        assert found(data) == {(f'{sentence(i)} "', None, str(i % 2)) for i in range(20)}
        assert len(data.train) + len(data.heldout) == 20
        assert data.notes["overlaps"]["evaluation"]["same"] == 2

    @pytest.mark.parametrize(
        "names", [("train.tsv", "dev.tsv"), ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")]
    )
    def test_mrpc(self, tmp_path, names):
        head = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
        for name, first in zip(names, (0, 50), strict=True):
            rows = [f'{i % 2}\t1\t2\t{sentence(i)}\t"{sentence(-i - 1)}' for i in range(first, first + 10)]
            write(tmp_path / name, b"\xef\xbb\xbf" + (head + "\r\n".join(rows)).encode())
        write(tmp_path / "dev_ids.tsv", "1\t2\n")
        data = load(str(tmp_path))
        assert data.evaluation[1].label == "1"
        assert [(r.text, r.pair) for r in data.evaluation][:1] == [(sentence(50), f'"{sentence(-51)}')]

    def test_mnli_has_two_evaluations_and_lines_that_are_broken(self, tmp_path):
        def line(i, labels):
            return [str(i), "1", "1n", "fiction", "a", "b", "c", "d", sentence(i), sentence(-i - 1), *labels]

        names = ("neutral", "entailment", "contradiction")
        train = lines(0, 12, lambda i: line(i, ["x", names[i % 3]]))
        write(
            tmp_path / "train.tsv",
            tsv(f"{NLI} sentence1 sentence2 label1 gold_label", [*train, ["5", "broken"]]),
        )
        for name, first in (("dev_matched", 30), ("dev_mismatched", 60)):
            dev = lines(first, 3, lambda i: line(i, ["x", "-" if i == 31 else names[i % 3]]))
            write(tmp_path / f"{name}.tsv", tsv(f"{NLI} sentence1 sentence2 label1 gold_label", dev))
        data = load(str(tmp_path))
        assert [row.text for row in data.evaluation] == [sentence(30), sentence(32)]
        assert data.notes["left_out"] == {"broken rows": 1, "unlabelled": 1}
        assert data.notes["unused"] == [str(tmp_path / "dev_mismatched.tsv")]
        other = load(str(tmp_path), evaluation=str(tmp_path / "dev_mismatched.tsv"))
        assert [row.text for row in other.evaluation] == [sentence(i) for i in (60, 61, 62)]
        assert [row.text for row in other.heldout] == [sentence(30), sentence(32)]  # dev is not wasted

    def test_xnli(self, tmp_path):
        def line(i):
            kind = ("neutral", "entailment", "contradiction")[i % 3]
            return ["de", kind, "a", "b", "c", "d", sentence(i), sentence(-i - 1), "1"]

        for name, first in (("xnli.dev", 0), ("xnli.test", 50)):
            write(
                tmp_path / f"{name}.tsv", tsv(f"{XNLI} sentence1 sentence2 promptID", lines(first, 9, line))
            )
            write(tmp_path / f"{name}.jsonl", "{}")
        alone = load(str(tmp_path))
        assert len(alone.train) + len(alone.heldout) == len(alone.evaluation) == 9
        (tmp_path / "multinli").mkdir()
        made = [
            [sentence(i), sentence(-i), ("neutral", "contradictory", "entailment")[i % 3]]
            for i in range(90, 102)
        ]
        write(tmp_path / "multinli" / "multinli.train.de.tsv", tsv("premise hypo label", made))
        data = load(str(tmp_path))
        assert [len(part) for part in (data.train, data.heldout, data.evaluation)] == [12, 9, 9]
        assert data.names == ("contradiction", "entailment", "neutral")

    def test_folders_of_other_files(self, tmp_path):
        (tmp_path / "data").mkdir()
        rows_csv(tmp_path / "data" / "train-00000-of-00002.csv", 10)
        write(
            tmp_path / "data" / "train-00001-of-00002.csv",
            f"text,label\n{sentence(90)},a\n{sentence(91)},b\n",
        )
        write(tmp_path / "data" / "test.csv", f"text,label\n{sentence(70)},a\n")
        data = load(str(tmp_path), heldout_share=0)
        assert (len(data.train), len(data.heldout), len(data.evaluation)) == (12, 0, 1)
        (tmp_path / "empty").mkdir()
        refused(
            r"labelled\.source: \S+empty has no file of training rows, such as train\.tsv; .+",
            str(tmp_path / "empty"),
        )

    def test_names_of_parts(self):
        names = "train training.1 en.train-3 dev dev_matched valid eval val test my-test trainer latest devil"
        parts = ["train"] * 3 + ["dev"] * 5 + ["test"] * 2 + [None] * 3
        assert [part_of(name) for name in names.split()] == parts


class TestConll:
    def test_sentences(self, tmp_path):
        words = "\n\n".join(f"{a}\tO\nin\tO\nSpace{a}\tB-x" for a in "abcdefgh")
        content = "\ufeff-DOCSTART- -X- O O\n\n# id 7\n" + words.replace("\n\n", "\n\t\n") + "\n\n\n\n"
        data = load(write(tmp_path / "t.conll", content.replace("\n", "\r\n")))
        assert {row.words for row in every(data)} == {(a, "in", f"Space{a}") for a in "abcdefgh"}
        assert {row.label for row in every(data)} == {("O", "O", "B-x")}
        assert (data.kind, data.names, data.notes["left_out"]) == ("tags", ("O", "B-x"), {})
        assert data.train[0].text == " ".join(data.train[0].words)

    def test_empty_sentences_and_words_are_counted(self, tmp_path):
        full = "".join(f"w{i} X O\nv{i} X B\n\n" for i in range(6))
        data = load(write(tmp_path / "t.conll", f"\n\n{full}\n\n \tO\n\n\u00a0\tO\nlast\tB\n# 5\n"))
        assert len(every(data)) == 7
        assert data.notes["left_out"] == {"empty sentences": 3, "empty words": 2}
        assert (("last", "#"), ("B", "5")) in {(row.words, row.label) for row in every(data)}

    def test_a_hash_is_a_word(self, tmp_path):
        content = "".join(f"#\tO\n# B\nx{i}\tO\n\n" for i in range(6))
        assert len(every(load(write(tmp_path / "t.conll", content)))[0].words) == 3

    def test_odd_line_ends_are_parts_of_words(self, tmp_path):
        content = "".join(f"a\u2028b{i}\tO\nc\x85\tB\n\n" for i in range(6))
        assert len({row.words[0] for row in every(load(write(tmp_path / "t.bio", content)))}) == 6

    def test_words_without_tags(self, tmp_path):
        file = write(tmp_path / "t.conll", "one\tO\ntwo\n")
        refused(rf"labelled\.source: {file}:2 has a word and no tag \('two'\); write both, .+", file)
        file = write(tmp_path / "t.conll", "one\tO\ntwo\t\n")
        refused(rf"labelled\.source: {file}:2 has a word and no tag \('two'\); write both, .+", file)
        file = write(tmp_path / "t.jsonl", json.dumps({"tokens": ["a", "b"], "tags": ["O"]}))
        refused(rf"labelled\.source: {file}:1 has 2 words and 1 tags; give each word one", file)
        file = write(tmp_path / "t.jsonl", json.dumps({"tokens": ["a", "b"], "tags": ["O", None]}))
        refused(rf"labelled\.source: {file}:1 has no label .+", file)

    def test_text_files_as_columns(self, tmp_path):
        write(tmp_path / "train.txt", "".join(f"w{i} O\nv{i} B\n\n" for i in range(6)))
        assert len(every(load(str(tmp_path), kind="tags"))) == 6
        refused(r"labelled\.source: \S+ has no file of training rows, .+", str(tmp_path))


class TestSquad:
    def test_articles(self, tmp_path):
        asked = [
            {
                "question": "Who?",
                "answers": [{"text": "Ada", "answer_start": 0}, {"text": "Ada", "answer_start": 0}],
            },
            {"question": "Where?", "answers": [], "is_impossible": True},
            {"question": "What?", "answers": [{"text": "wröte", "answer_start": 4}]},
            {"question": "Why?", "answers": [{"text": "it", "answer_start": 10}]},
        ]
        article = {"title": "t", "paragraphs": [{"context": "Ada wröte it.", "qas": asked}]}
        data = load(write(tmp_path / "s.json", json.dumps({"version": "2", "data": [article]})))
        assert data.kind == "span"
        assert {(row.text, row.label) for row in every(data)} == {
            ("Who?", ((0, "Ada"),)), ("Where?", ()), ("What?", ((4, "wröte"),)), ("Why?", ((10, "it"),)),
        }  # fmt: skip
        assert {row.pair for row in every(data)} == {"Ada wröte it."}

    def test_flat_rows(self, tmp_path):
        ways = [
            "b",
            ["b", "c"],
            {"text": ["c"], "answer_start": [2]},
            [{"text": "b", "answer_start": 1}],
            None,
            "",
            [],
        ]
        rows = [{"question": f"q{i}", "context": "abc", "answers": way} for i, way in enumerate(ways)]
        data = load(write(tmp_path / "s.jsonl", "\n".join(map(json.dumps, rows))))
        assert [row.label for row in sorted(every(data), key=lambda row: row.text)] == [
            ((1, "b"),), ((1, "b"), (2, "c")), ((2, "c"),), ((1, "b"),), (), (), (),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("given", "told"),
        [
            ("x", "the answer 'x' is not in the context; copy it from there"),
            (
                {"text": "b", "answer_start": 0},
                r"at character 0 the context has 'a', not the answer 'b'; mend .+",
            ),
            (
                {"text": "b", "answer_start": -1},
                r"at character -1 the context has 'a', not the answer 'b'; .+",
            ),
            ({"text": ["b"], "answer_start": []}, "1 answers and 0 values of answer_start"),
            ({"text": "b", "answer_start": "1"}, r"an answer is a text, and answer_start the number .+"),
            (3, r"answers are texts, or \{text, answer_start\}"),
        ],
    )
    def test_answers_that_are_not_there(self, tmp_path, given, told):
        file = write(tmp_path / "s.jsonl", json.dumps({"question": "q", "context": "abc", "answers": given}))
        refused(rf"labelled\.source: {file}:1: {told}", file)

    def test_another_layout(self, tmp_path):
        file = write(tmp_path / "s.json", json.dumps({"data": [{"paragraphs": [{"context": "x"}]}]}))
        refused(
            rf"labelled\.source: {file}, data 0, paragraph 0 has no list of 'qas', as SQuAD is laid out", file
        )
