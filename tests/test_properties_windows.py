"""Windows of texts that nobody would choose: every token once, none lost but a tail, none in two parts.

Texts are made of characters none of which is there twice, and a tokenizer makes a token of each, so that its
number tells where a token went.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import UserError
from compress.text.documents import Document
from compress.text.framing import Frame, frame_of
from compress.text.translation import Translation
from compress.text.windows import (
    DataConfig,
    TextData,
    Windows,
    digest,
    prepare,
    refuse_overlap,
    renumbered,
    training_documents,
)
from compress.training.batches import Batches

few = settings(max_examples=40)
FIRST = 0x4E00  # of characters that are letters, no spaces and no line ends
END, BOS, CLS, SEP = 1, 2, 3, 4
SPACES = " \n\x0b\x1c\u2028"  # what lines are cut at, and words


@dataclass
class OfCharacters:
    """A token per character, `pieces` for every third, with what real tokenizers write around a text."""

    begin: list[int] = field(default_factory=list)
    end: list[int] = field(default_factory=list)
    eos_token_id: int | None = END
    cls_token_id: int | None = None
    sep_token_id: int | None = None

    def __call__(self, text: Any, add_special_tokens: bool = True, **options: Any) -> dict[str, Any]:
        if isinstance(text, list):
            return {"input_ids": [[ord(c) for c in one] for one in text]}
        ids = [ord(c) for c in text]
        if add_special_tokens:
            mask = [1] * len(self.begin) + [0] * len(ids) + [1] * len(self.end)
            return {"input_ids": [*self.begin, *ids, *self.end], "special_tokens_mask": mask}
        return {"input_ids": ids, "offset_mapping": [(i, i + 1) for i in range(len(ids))]}


TOKENIZERS = st.sampled_from(
    [
        OfCharacters(),
        OfCharacters(eos_token_id=None),
        OfCharacters(begin=[BOS]),
        OfCharacters(begin=[BOS], end=[END]),
        OfCharacters(begin=[CLS], end=[SEP], cls_token_id=CLS, sep_token_id=SEP),
        OfCharacters(begin=[BOS, CLS]),
    ]
)


@st.composite
def texts(draw: st.DrawFn) -> list[Document]:
    """Documents of unlike lengths, one to some hundred; lines of any length, ended in any way."""
    count = draw(st.sampled_from([1, 2, 3, 63, 64, 65, 130]))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    longest = draw(st.sampled_from([1, 2, 7, 40, 300]))
    longest = longest if count > 3 else draw(st.sampled_from([300, 3000, 9000]))
    share = draw(st.sampled_from([0.0, 0.001, 0.05, 0.5]))  # of spaces and line ends
    documents, next_one = [], FIRST
    for i in range(count):
        size = int(rng.integers(1, longest + 1))
        letters = [chr(next_one + k) for k in range(size)]
        next_one += size
        text = "".join(
            letter + (SPACES[rng.integers(len(SPACES))] if rng.random() < share else "") for letter in letters
        )
        documents.append(Document(f"d{i}", text))
    return documents


SIZES = st.builds(
    lambda window, evaluation, calibration, heldout: DataConfig(
        text="t", window=window, evaluation_windows=evaluation,
        calibration_windows=calibration, heldout_windows=heldout,
    ),
    st.sampled_from([8, 9, 13, 16, 64]), st.sampled_from([2, 3, 7]), st.sampled_from([1, 2, 5]),
    st.sampled_from([1, 2, 5]),
)  # fmt: skip


def letters(tokens: np.ndarray) -> list[int]:
    return [int(t) for t in tokens.ravel() if t >= FIRST]


def cut(config: DataConfig, documents: list[Document], tokenizer: Any, training: bool) -> TextData | None:
    try:
        return prepare(config, documents, tokenizer, training=training)
    except UserError as error:
        said = str(error)
        assert "give more text" in said
        assert "\n" not in said
        return None


@few
@given(SIZES, texts(), TOKENIZERS, st.booleans())
def test_every_token_is_in_one_part_once_and_none_is_lost_but_tails(config, documents, tokenizer, training):
    data = cut(config, documents, tokenizer, training)
    if data is None:
        return
    parts = {
        name: getattr(data, name).tokens for name in ("evaluation", "calibration", "heldout")
    } | {"train": data.train}  # fmt: skip
    found = [token for tokens in parts.values() for token in letters(tokens)]
    assert len(found) == len(set(found))
    there = {ord(c) for d in documents for c in d.text if ord(c) >= FIRST}
    assert set(found) <= there
    if training:
        # of every part of windows the tail is lost, which is less than a piece: a document, or a cut of it
        total = sum(len(d.text) for d in documents)
        piece = max(len(d.text) for d in documents) + 1
        if len(documents) < 64:
            piece = min(piece, 6 * max(total // 256, 200) + 1)
        assert len(there) - len(found) <= 3 * piece
    assert not training or len(data.train) >= 2 * config.window


@few
@given(SIZES, texts(), TOKENIZERS)
def test_windows_are_framed_in_order_and_weighed_in_bytes(config, documents, tokenizer):
    data = cut(config, documents, tokenizer, False)
    if data is None:
        return
    frame = frame_of(tokenizer)
    right = Frame(tuple(tokenizer.begin), tuple(tokenizer.end) if tokenizer.cls_token_id else ())
    assert frame == right == data.evaluation.frame
    counts = (config.evaluation_windows, config.calibration_windows, config.heldout_windows)
    order = {ord(c): i for i, c in enumerate("".join(d.text for d in documents)) if ord(c) >= FIRST}
    for windows, count in zip((data.evaluation, data.calibration, data.heldout), counts, strict=True):
        tokens = windows.tokens
        assert tokens.shape == (count, config.window)
        assert tokens.dtype == np.int32
        assert (tokens[:, : len(frame.begin)] == np.array(frame.begin)).all()
        assert np.array_equal(frame.around(frame.inside(tokens)), tokens)
        assert windows.sha256 == digest(tokens)
        assert np.array_equal(windows.text, frame.inside(tokens).ravel())
        if len(documents) < 64:  # then a part is a stretch of the text
            places = [order[t] for t in letters(tokens)]
            assert places == sorted(places)
        predicted = frame.inside(tokens)[:, 0 if frame.begin else 1 :].ravel()
        assert windows.bytes == sum(len(chr(t).encode()) for t in predicted if t != END)


@few
@given(SIZES, texts(), TOKENIZERS, st.randoms(use_true_random=False))
def test_the_order_of_files_and_what_training_takes_change_no_window(config, documents, tokenizer, random):
    data = cut(config, documents, tokenizer, False)
    if data is None or len(documents) < 64:
        return
    shuffled = list(documents)
    random.shuffle(shuffled)
    again = cut(config, shuffled, tokenizer, False)
    for name in ("evaluation", "calibration", "heldout"):
        assert getattr(data, name).sha256 == getattr(again, name).sha256


@few
@given(SIZES, texts(), TOKENIZERS)
def test_what_a_tokenizer_is_trained_on_is_in_no_window(config, documents, tokenizer):
    try:
        data = prepare(config, documents, tokenizer, training=True, tokenizer_from_text=True)
    except UserError:
        return
    seen = {ord(c) for d in training_documents(documents) for c in d.text}
    for windows in (data.evaluation, data.calibration, data.heldout):
        assert not seen & set(letters(windows.tokens))


@few
@given(
    st.sampled_from([1, 2, 7, 8, 13, 64]),
    st.sampled_from([1, 2, 3, 8]),
    st.integers(1, 400),
    st.booleans(),
    st.sampled_from([(), (BOS,)]),
    st.integers(0, 10**6),
)
def test_an_epoch_of_training_predicts_every_token_at_most_once(window, batch, size, moving, begin, seed):
    stream = np.arange(FIRST, FIRST + size, dtype=np.int32)
    batches = Batches(stream, window, batch, seed, moving, begin)
    if batches.windows < batch:
        with pytest.raises(UserError, match="give more text, or lower"):
            batches.check()
        return
    assert batches.check() is batches
    steps = batches.windows // batch  # whole steps of the first epoch
    rows = np.concatenate([batches(step) for step in range(steps)])
    numbers = np.concatenate([batches.numbers(step) for step in range(steps)])
    assert rows.shape == (steps * batch, window + 1)
    assert len(set(numbers.tolist())) == len(numbers)
    predicted = rows[:, 1:].ravel().tolist()
    assert len(predicted) == len(set(predicted))
    assert all(row.tolist() == [*begin, *range(row[len(begin)], row[len(begin)] + len(row) - len(begin))]
               for row in rows)  # fmt: skip
    # however a step is divided, over processes and passes, its windows are those
    for count, parts in ((1, 3), (2, 2), (3, 1)):
        for step in range(min(steps, 2)):
            mine = [
                part
                for rank in range(min(count, batch))
                for part in batches.micro_batches(step, parts, rank, count)
            ]
            assert sorted(n for part in mine for n in part.numbers) == sorted(batches.numbers(step))
            assert sum(part.share for part in mine) == pytest.approx(1)
            assert sum(part.last for part in mine) == min(count, batch)


@settings(max_examples=30)
@given(
    st.integers(100, 2000),
    st.sampled_from([20, 48, 96, 97, 700]),
    st.integers(0, 2000),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([1, 2, 3, 9]),
)
def test_text_that_is_in_both_is_refused_wherever_and_however_often(
    calibration, evaluation, at, share, copies
):
    theirs = np.arange(calibration, dtype=np.int32)
    own = np.arange(10**6, 10**6 + evaluation, dtype=np.int32)
    refuse_overlap(theirs, own)
    shared = own[: int(share * evaluation)]
    theirs = np.concatenate([theirs[:at], *[shared] * copies, theirs[at:]])
    if len(shared) < 48 and len(shared) < evaluation:  # shorter than what counts as the same text
        refuse_overlap(theirs, own)
    elif len(shared) >= 96 or share == 1:
        with pytest.raises(UserError, match="of the evaluation text is also in the calibration text"):
            refuse_overlap(theirs, own)


def test_what_all_records_begin_with_and_a_header_of_many_files_are_no_overlap():
    prompt = np.arange(9_000_000, 9_000_060, dtype=np.int32)
    records = [np.concatenate([prompt, np.arange(i * 100, i * 100 + 40, dtype=np.int32)]) for i in range(8)]
    refuse_overlap(np.concatenate(records[:4]), np.concatenate(records[4:]))
    refuse_overlap(np.concatenate(records[:7]), np.concatenate([prompt, np.arange(10**6, 10**6 + 900)]))


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[Translation, dict[int, str], int]:
    """A smaller vocabulary that keeps every single letter and some of the longer tokens."""
    letters = "abcdefgh"
    words = draw(st.lists(st.text(letters, min_size=2, max_size=4), min_size=1, max_size=12, unique=True))
    strings = dict(enumerate([*letters, *words]))
    kept = draw(st.lists(st.sampled_from(words), unique=True))
    small = [*letters, *kept]
    order = draw(st.permutations(small))
    own = {token: i for i, token in enumerate(order)}

    @dataclass
    class Piece:
        id: int

    class Model:
        def tokenize(self, string: str) -> list[Piece]:
            return [Piece(own[c]) for c in string]

    wide = {token: i for i, token in strings.items()}
    rows = np.array([wide[token] for token in order], dtype=np.int32)
    return Translation(strings, own, Model(), rows), {i: t for t, i in own.items()}, len(strings)


@few
@given(vocabularies(), st.integers(0, 5), st.integers(1, 17), st.booleans(), st.integers(0, 10**6))
def test_windows_in_a_smaller_vocabulary_are_the_same_text(made, count, length, framed, seed):
    words, narrow, size = made
    rng = np.random.default_rng(seed)
    windows = rng.integers(0, size, (count, length)).astype(np.int32)

    def text(ids: Any, strings: dict[int, str]) -> str:
        return "".join(strings[int(i)] for i in ids)

    stream = words.stream(windows.ravel())
    assert stream.dtype == np.int32
    assert text(stream, narrow) == text(windows.ravel(), words.strings)
    shorter = words.cut(windows)
    assert shorter.shape == windows.shape
    for row, new in zip(windows, shorter, strict=True):
        assert text(row, words.strings).startswith(text(new, narrow))
    if count:
        whole = words.whole(windows)
        for row, new, first in zip(windows, whole.tokens, whole.first, strict=True):
            new = new[new >= 0]
            assert text(new, narrow) == text(row, words.strings)
            assert text(new[:first], narrow) == words.strings[int(row[0])]
        lossless = all(words.strings[int(i)] in words.own for i in windows.ravel())
        assert (whole.rows is not None) == lossless
        if lossless:
            assert words.back(whole.tokens.ravel().tolist()) == windows.ravel().tolist()
    begin = (int(rng.integers(8)),) if framed else ()  # a letter, which both have
    data = TextData.of_tokens(length, train=windows.ravel(), calibration=windows, begin=begin)
    new = renumbered(data, words)
    assert text(new.train, narrow) == text(data.train, words.strings)
    assert text(new.begin, narrow) == text(begin, words.strings)
    assert new.calibration.tokens.shape == windows.shape
    assert new.calibration.sha256 == digest(new.calibration.tokens)
    assert isinstance(new.evaluation, Windows)


@given(st.integers(100, 200))
def test_a_token_that_no_vocabulary_has_is_refused(token):
    words = Translation({0: "a"}, {"a": 0}, None, np.zeros(1, np.int32))
    with pytest.raises(UserError, match=f"token {token} is not in the tokenizer's vocabulary"):
        words.stream(np.array([0, token], dtype=np.int32))
