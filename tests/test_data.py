"""Text to windows: disjoint, the same every time, counted in bytes, and refused when it cannot serve."""

from itertools import pairwise

import numpy as np
import pytest

from compress.errors import UserError
from compress.text.documents import Document, load_documents
from compress.text.windows import DataConfig, Windows, digest, prepare, refuse_overlap, training_documents


@pytest.fixture
def tokenizer(bundle):
    return bundle.tokenizer


def numbered(count: int, lines: int = 12, name: str = "d") -> list[Document]:
    """Documents of which no line is in two."""
    return [
        Document(f"{name}{i}", "".join(f"line {name} {i} {j} of the text\n" for j in range(lines)))
        for i in range(count)
    ]


def config(**changes) -> DataConfig:
    sizes = {"window": 16, "evaluation_windows": 6, "calibration_windows": 5, "heldout_windows": 4}
    return DataConfig(**{"text": "t.txt", **sizes, **changes})


def parts(data) -> dict[str, np.ndarray]:
    return {
        "evaluation": data.evaluation.tokens.ravel(),
        "calibration": data.calibration.tokens.ravel(),
        "heldout": data.heldout.tokens.ravel(),
        "train": data.train,
    }


def lines_of(tokenizer, tokens: np.ndarray) -> set[str]:
    """The whole lines of a stretch of tokens; its first and last may be cut."""
    text = tokenizer.decode(tokens).replace("<|endoftext|>", "")
    return set(text.split("\n")[1:-1]) - {""}


MODES = {"documents": numbered(80), "positions": numbered(1, lines=900)}


@pytest.mark.parametrize("mode", MODES)
class TestParts:
    def test_no_line_is_in_two(self, mode, tokenizer):
        data = prepare(config(), MODES[mode], tokenizer, training=True)
        found = {name: lines_of(tokenizer, tokens) for name, tokens in parts(data).items()}
        assert all(found.values())
        assert sum(map(len, found.values())) == len(set().union(*found.values()))

    def test_sizes_and_hashes(self, mode, tokenizer):
        data = prepare(config(), MODES[mode], tokenizer, training=True)
        assert data.evaluation.tokens.shape == (6, 16)
        assert data.calibration.tokens.shape == (5, 16)
        assert data.heldout.tokens.shape == (4, 16)
        assert len(data.train) > 1000
        assert {t.dtype for t in parts(data).values()} == {np.dtype(np.int32)}
        for windows in (data.evaluation, data.calibration, data.heldout):
            assert windows.sha256 == digest(windows.tokens)
        assert data.train_sha256 == digest(data.train)

    def test_the_same_every_time_in_whatever_order_files_come(self, mode, tokenizer):
        first = prepare(config(), MODES[mode], tokenizer, training=True)
        again = prepare(config(), MODES[mode][::-1], tokenizer, training=True)
        for name, tokens in parts(first).items():
            assert np.array_equal(tokens, parts(again)[name]), name

    def test_without_training_there_is_no_train_part_and_the_others_stay(self, mode, tokenizer):
        with_train = prepare(config(), MODES[mode], tokenizer, training=True)
        without = prepare(config(), MODES[mode], tokenizer, training=False)
        assert without.train.size == 0
        for name in ("evaluation", "calibration", "heldout"):
            assert np.array_equal(parts(without)[name], parts(with_train)[name])

    def test_a_tokenizer_sees_no_evaluation_text(self, mode, tokenizer):
        data = prepare(config(), MODES[mode], tokenizer, training=True)
        seen = "".join(d.text for d in training_documents(MODES[mode]))
        assert seen
        assert not [line for line in lines_of(tokenizer, parts(data)["evaluation"]) if line in seen]


def test_parts_of_one_text_are_contiguous_and_evaluation_is_its_end(tokenizer):
    document = MODES["positions"][0]
    data = prepare(config(), [document], tokenizer, training=True)
    text = {name: tokenizer.decode(tokens) for name, tokens in parts(data).items()}
    starts = [document.text.find(text[n]) for n in ("train", "heldout", "calibration", "evaluation")]
    assert starts[0] == 0
    assert all(0 <= a < b for a, b in pairwise(starts))


@pytest.mark.parametrize("end", [" ", "x"], ids=["words", "one word"])
def test_a_line_without_end_is_cut(end, tokenizer):
    line = "".join(f"number {i}," + end for i in range(20_000))
    line = line if end == " " else line.replace(" ", "")
    data = prepare(config(), [Document("d", line)], tokenizer, training=True)
    text = [tokenizer.decode(part) for part in parts(data).values()]
    assert all(piece in line for piece in text)
    assert sum(line.count(piece) for piece in text) == 4
    assert tokenizer.eos_token_id not in data.train


def test_whole_documents_are_separated(tokenizer):
    data = prepare(config(), MODES["documents"], tokenizer, training=True)
    assert (data.train == tokenizer.eos_token_id).sum() > 40
    pieces = prepare(config(), MODES["positions"], tokenizer, training=True)
    assert tokenizer.eos_token_id not in pieces.train  # the only document goes on in the next part


TEXTS = {
    "ascii": "def alpha(x): return x + 3\n",
    "two and three bytes": "für Größe — naïve café, 数字は三バイト\n",
    "four bytes": "a 😀 b 🎉🎉 c\n",
    "spaces": "   \t  two   spaces \n\n\n",
}


@pytest.mark.parametrize("line", TEXTS.values(), ids=TEXTS)
def test_bytes_are_those_of_the_predicted_tokens(line, tokenizer):
    documents = [Document("d", line * 900)]
    data = prepare(config(), documents, tokenizer, training=False, calibrating=False)
    # in a byte-level vocabulary every character of a token stands for one byte
    sizes = np.array([len(token) for token in tokenizer.convert_ids_to_tokens(range(300))])
    for windows in (data.evaluation, data.calibration):
        predicted = int(sizes[windows.tokens[:, 1:]].sum())
        # a character that a window's border cuts counts on one side of it
        slack = 0 if line.isascii() else 3 * len(windows.tokens)
        assert abs(windows.bytes - predicted) <= slack


def test_all_bytes_of_a_text_are_counted_once(tokenizer):
    documents = [Document("d", "".join(TEXTS.values()) * 40)]
    ids = tokenizer(documents[0].text)["input_ids"]
    whole = len(ids) // 3
    data = prepare(
        config(window=whole, evaluation_windows=2, calibration_windows=1, heldout_windows=1),
        [*documents, Document("other", TEXTS["ascii"] * 900)],
        tokenizer,
        training=False,
    )
    text = tokenizer.decode(data.evaluation.tokens.ravel())
    firsts = [len(tokenizer.decode([row[0]]).encode()) for row in data.evaluation.tokens]
    assert data.evaluation.bytes == len(text.encode()) - sum(firsts)


@pytest.mark.parametrize(
    ("changes", "field", "count"),
    [
        ({"evaluation_windows": 5000}, "evaluation_windows", 5000),
        ({"calibration_windows": 5000}, "calibration_windows", 5000),
        ({"heldout_windows": 5000}, "heldout_windows", 5000),
        ({"window": 4096}, "evaluation_windows", 6),
    ],
)
def test_too_short_a_text_names_the_field_and_the_numbers(changes, field, count, tokenizer):
    window = changes.get("window", 16)
    with pytest.raises(UserError) as caught:
        prepare(config(**changes), MODES["documents"], tokenizer, training=False)
    message = str(caught.value)
    assert f"data.{field}: {count} windows of {window} tokens need {count * window} tokens" in message
    assert "t.txt has " in message
    assert "give more text" in message


def test_nothing_left_to_train_on(tokenizer):
    few = config(window=256, evaluation_windows=2, calibration_windows=1, heldout_windows=1)
    with pytest.raises(UserError, match=r"data\.text: t\.txt leaves \d+ tokens to train on; at least 512"):
        prepare(few, numbered(1, lines=70), tokenizer, training=True)


class TestOverlap:
    def windows(self, tokenizer, documents, width: int) -> np.ndarray:
        ids = [t for d in documents for t in tokenizer(d.text)["input_ids"]]
        return np.array(ids[: len(ids) // width * width], dtype=np.int32).reshape(-1, width)

    @pytest.mark.parametrize("width", [16, 64, 256])
    def test_shared_text_is_refused_whatever_the_window(self, tokenizer, width):
        shared = numbered(4, name="shared")
        calibration = self.windows(tokenizer, numbered(10, name="a") + shared, width)
        evaluation = self.windows(tokenizer, shared + numbered(10, name="b"), width)
        with pytest.raises(UserError, match=r"data\.calibration_text: \d+ % of the evaluation text"):
            refuse_overlap(calibration, evaluation)

    def test_other_text_and_a_common_header_are_not(self, tokenizer):
        header = [Document("licence", "a licence that many files begin with\n" * 3)]
        calibration = self.windows(tokenizer, header + numbered(40, name="a"), 64)
        evaluation = self.windows(tokenizer, header + numbered(40, name="b"), 64)
        refuse_overlap(calibration, evaluation)

    def test_what_all_records_begin_with_is_not(self, tokenizer):
        prompt = "You are a careful assistant. Read the question below, think about it, and answer it.\n" * 3
        records = [Document(d.name, prompt + d.text) for d in numbered(120)]
        data = prepare(
            config(calibration_windows=30, evaluation_windows=30), records, tokenizer, training=False
        )
        shared = set(map(bytes, data.calibration.tokens)) & set(map(bytes, data.evaluation.tokens))
        assert shared  # windows that hold nothing but the prompt
        with pytest.raises(UserError, match=r"data\.calibration_text: \d+ %"):
            refuse_overlap(data.evaluation.text, data.evaluation.text)

    def test_a_text_that_holds_itself_twice_is_refused_by_its_own_field(self, tokenizer):
        twice = [Document(f"{d.name}{i}", d.text) for i in range(2) for d in numbered(60, lines=40)]
        few = config(calibration_windows=1500, evaluation_windows=1500)
        with pytest.raises(UserError, match=r"data\.text: \d+ % of the evaluation text .* twice"):
            prepare(few, twice, tokenizer, training=False)
        prepare(few, twice, tokenizer, training=False, calibrating=False)

    def test_a_recipe_that_calibrates_on_its_evaluation_text(self, tokenizer, tmp_path):
        file = tmp_path / "text.txt"
        file.write_text(MODES["positions"][0].text)
        with pytest.raises(UserError, match="would flatter the result"):
            prepare(
                config(text=str(file), calibration_text=str(file), calibration_windows=6),
                load_documents(str(file)),
                tokenizer,
                training=False,
            )
        other = tmp_path / "other.txt"
        other.write_text(numbered(1, lines=200, name="z")[0].text)
        data = prepare(
            config(text=str(file), calibration_text=str(other)),
            load_documents(str(file)),
            tokenizer,
            training=False,
        )
        assert "line z" in tokenizer.decode(data.calibration.tokens.ravel())
        assert isinstance(data.calibration, Windows)
