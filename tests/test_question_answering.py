"""Answers in contexts: what they are worth, and how questions are cut, by other means."""

import re
import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from question_models import CONTEXT, cut_rows, finder, labelled, long_row, pieces, questions

from compress.errors import UserError
from compress.tasks.answers import worth
from compress.text.encode import cut_by
from compress.text.examples import Examples
from compress.text.labelled.base import Row

WORDS = st.lists(st.sampled_from(["a", "an", "The", "U.S.", "cat", "Cat,", "theme", "!", "dog"]), max_size=6)


def naive(found: str, right: list[str]) -> tuple[float, float]:
    """SQuAD's numbers, word by word."""

    def words(text):
        kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    golds = [words(each) for each in right if words(each)] or [[]]
    exact = max(float(words(found) == gold) for gold in golds)
    f1 = []
    for gold in golds:
        own = words(found)
        same = sum(min(n, Counter(gold)[word]) for word, n in Counter(own).items())
        if not own or not gold:
            f1.append(float(own == gold))
        elif not same:
            f1.append(0.0)
        else:
            precision, recall = same / len(own), same / len(gold)
            f1.append(2 * precision * recall / (precision + recall))
    return exact, max(f1)


@given(WORDS, st.lists(WORDS, max_size=3))
def test_answers_are_worth_what_squad_says(found, right):
    text, golds = " ".join(found), [" ".join(each) for each in right]
    assert worth(text, golds) == pytest.approx(naive(text, golds))


def text_of(item, first, last):
    passage = item.passage
    return passage.text[passage.places[first, 0] : passage.places[last, 1]]


def test_a_context_is_one_text_with_its_question_and_the_answer_has_its_tokens():
    row = Row("which colour is it?", ((9, "Light  Blue"),), "the cup, Light  Blue and one hundred.")
    (item,) = cut_rows([row]).items
    words = pieces().convert_ids_to_tokens(item.ids.tolist())
    assert words[:7] == ["[CLS]", "which", "colour", "is", "it", "?", "[SEP]"]
    assert words[7:-1] == ["the", "cup", ",", "light", "blue", "and", "one", "hundred", "."]
    assert item.types.tolist() == [0] * 7 + [1] * 10
    assert item.targets.tolist() == [10, 11]
    assert text_of(item, *item.targets) == "Light  Blue"
    assert item.passage.inside.tolist() == list(range(7, 16))
    assert item.passage.answers == ("Light  Blue",)


def test_without_an_answer_both_ends_are_at_the_first_token():
    cut = cut_rows([Row("how many are there?", (), "the cup is white.")])
    assert cut[0].targets.tolist() == [0, 0]
    assert (cut[0].passage.answers, cut.cut) == ((), 0)


def test_a_part_of_a_word_has_the_tokens_that_it_touches():
    (item,) = cut_rows([Row("how many are there?", ((1, "hund"),), "xhundx cup")]).items
    assert text_of(item, *item.targets) == "hund"
    (item,) = cut_rows([Row("how many are there?", ((1, "eve"),), "seven cup")]).items
    assert text_of(item, *item.targets) == "seven", "one token"


@pytest.mark.parametrize("longest", [24, 64])
def test_a_long_context_stands_in_several_texts_that_overlap_and_no_token_is_lost(longest):
    rows = [Row("how many are there?", (), "the cup."), long_row()]
    cut = cut_rows(rows, longest)
    own = [item for item, row in zip(cut.items, cut.order, strict=True) if row == 1]
    own.sort(key=lambda item: item.passage.start)
    assert len(own) > 3
    whole = pieces()(rows[1].pair, add_special_tokens=False)["input_ids"]
    room, step = longest - 3 - 5, (longest - 3) // 4  # five tokens of the question, three specials
    assert [item.ids[7:-1].tolist() for item in own] == [
        whole[start : start + room] for start in range(0, len(whole) - step, room - step)
    ]
    for item in own:
        assert len(item.ids) <= longest
        assert item.ids[:7].tolist() == own[0].ids[:7].tolist(), "the whole question"
        start = item.passage.start
        assert rows[1].pair[start : start + len(item.passage.text)] == item.passage.text
        if item.targets.any():
            assert text_of(item, *item.targets) == "light blue"
        else:
            assert "light blue" not in item.passage.text
    assert own[0].passage.start == 0
    assert own[-1].passage.start + len(own[-1].passage.text) == len(rows[1].pair)
    assert sum(bool(item.targets.any()) for item in own) in (1, 2)
    assert cut.cut == 0, "nothing is lost"


def test_what_cannot_be_whole_is_cut_and_counted():
    long = " ".join(["lamp"] * 40)
    rows = [
        Row(" ".join(["which"] * 40), ((4, "cup"),), "the cup."),  # a question that leaves no room
        Row("which?", ((0, long),), long),  # an answer that is longer than any text
        Row("which?", ((4, "cup"),), "the cup."),
    ]
    cut = cut_rows(rows, 32)
    assert cut.cut == 2
    (item,) = [item for item, row in zip(cut.items, cut.order, strict=True) if row == 0]
    words = pieces().convert_ids_to_tokens(item.ids.tolist())
    assert words == ["[CLS]", *["which"] * 14, "[SEP]", "the", "cup", ".", "[SEP]"]
    assert text_of(item, *item.targets) == "cup"
    with pytest.raises(UserError, match="the model takes 8 tokens, too few for a question and its context"):
        cut_rows(rows, 8)
    with pytest.raises(UserError, match=r"the context '\\u200b' has no token; leave it out"):
        cut_rows([Row("which?", (), "\u200b")])


@pytest.mark.parametrize("family", ["Bert", "ModernBert"])
def test_examples_come_back_from_their_file_as_they_were(family, tmp_path):
    cut = cut_rows([*questions(20), long_row()], tokenizer=finder(family).tokenizer)
    cut.save(tmp_path / "e.npz")
    again = Examples.load(tmp_path / "e.npz")
    assert again.sha256 == cut.sha256
    assert (again.kind, again.names, len(again)) == ("span", (), len(cut))
    for one, other in zip(cut.items, again.items, strict=True):
        assert one.passage.facts() == other.passage.facts()
        assert np.array_equal(one.passage.places, other.passage.places)


def test_what_is_right_is_part_of_what_data_is_known_by():
    row = questions(1, none=0)[0]
    one, other = (
        cut_rows([Row(row.text, label, row.pair)]) for label in (row.label, (*row.label, (0, "the")))
    )
    assert one[0].targets.tolist() == other[0].targets.tolist()
    assert one.sha256 != other.sha256


def test_another_tokenizer_cuts_the_same_parts():
    """A variant with a smaller vocabulary is asked text by text what the base is asked."""
    rows = [*questions(6), long_row()]
    cut = cut_rows(rows)
    smaller = pieces()
    smaller.backend_tokenizer.normalizer = None  # another one, by its digest; all is in lower case but titles
    again = cut_by(cut, smaller, CONTEXT)
    assert again is not cut
    assert again.order == cut.order
    for one, other in zip(cut.items, again.items, strict=True):
        assert other.passage.start == one.passage.start
        assert other.passage.text.strip() == one.passage.text.strip()
        assert other.targets.any() == one.targets.any()
    assert cut_by(cut, pieces(), CONTEXT) is cut
    assert cut.alike(cut)


def test_tokens_of_one_part_are_counted_where_they_are():
    data = labelled(finder(), train=20)
    assert data.notes["cut_off"] == {"train": 0, "heldout": 0, "evaluation": 0}
    assert "examples" not in data.notes
    data = labelled(finder(), train=20, longest=24)
    assert data.notes["examples"]["train"] == len(data.train) > 20
    assert re.match(r"[0-9a-f]{64} ", data.sha256)
