"""Questions and their contexts as tokens, a long context as several texts that overlap.

    question, context[0:a]      question, context[b:c]      ...      b < a

The question is in each of them whole, so that all are asked alike; the overlap is a quarter of the room that
a text has, at most 128 tokens (SQuAD's usual scripts: 128 of 384), and each text is an example of its own. A
question that is longer than half the room is cut off, which is counted. What is right is the first of the
answers that stands whole in the text; where none does, the first token, for none. A row whose answers are all
longer than the overlap may have none that is whole anywhere: it is counted with those that are cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.tasks.answers import NO_PLACE, Passage
from compress.tasks.base import Example

Label = Sequence[tuple[int, str]]  # (first character in the context, answer) of each

_OVERLAP, _MOST_OVERLAP = 4, 128  # a part of the room; tokens
_LEAST_ROOM = 8  # tokens of question and context
_CONTEXT = 1  # the second of the two texts, to a tokenizer


@dataclass(frozen=True)
class Asked:
    """A question about a context, or about a part of it.

    Attributes:
        number: of its row in the part of the data.
        label: what is right, by its place in the whole context.
        start: which character of the whole context is the first of `context`.
    """

    number: int
    question: str
    context: str
    label: Label
    start: int = 0


@dataclass
class Passages:
    """Examples, the row that each is of, and the rows of which something was cut off."""

    items: list[Example] = field(default_factory=list)
    of: list[int] = field(default_factory=list)
    cut: set[int] = field(default_factory=set)


def passages(asked: Sequence[Asked], tokenizer: Any, longest: int, *, once: bool = False) -> Passages:
    """Examples of at most `longest` tokens; `once`: one of each, what is too long for it cut off and counted.

    Raises:
        UserError: the model takes too few tokens, or a context has none.
    """
    room = longest - tokenizer.num_special_tokens_to_add(pair=True)
    if room < _LEAST_ROOM:
        raise UserError(
            f"labelled: the model takes {longest} tokens, too few for a question and its context; "
            "take another"
        )
    found = Passages()
    questions = _shortened(asked, tokenizer, room // 2, found.cut)
    overlap = 0 if once else min(_MOST_OVERLAP, room // _OVERLAP)
    with encoding():
        cut = tokenizer(
            questions, [each.context for each in asked], truncation="only_second", max_length=longest,
            stride=overlap, return_overflowing_tokens=True, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
    texts: dict[int, list[int]] = {}  # those of each of `asked`
    for text, number in enumerate(cut["overflow_to_sample_mapping"]):
        texts.setdefault(number, []).append(text)
    for number, own in texts.items():
        each, whole = asked[number], False
        parts = [(text, _places(cut, text)) for text in own]
        parts.sort(key=lambda part: part[1][:, 1].max())  # some tokenizers cut the front
        for example, here in _examples(each, parts[:1] if once else parts, parts[-1][0], cut):
            whole = whole or here
            found.items.append(example)
            found.of.append(each.number)
        if len(parts) > 1 if once else each.label and not whole:
            found.cut.add(each.number)
    return found


def again(items: Iterable[Example], questions: Sequence[str], labels: Sequence[Label]) -> list[Asked]:
    """The same parts of the same contexts, for another tokenizer to cut."""
    parts = [item.passage for item in items]
    return [
        Asked(part.question, questions[part.question], part.text, labels[part.question], part.start)
        for part in parts
        if part is not None
    ]


def _shortened(asked: Sequence[Asked], tokenizer: Any, most: int, cut: set[int]) -> list[str]:
    """The questions, none of more tokens."""
    with encoding():
        found = tokenizer(
            [each.question for each in asked],
            add_special_tokens=False, return_offsets_mapping=True, verbose=False,
        )  # fmt: skip
    questions = []
    for each, places in zip(asked, found["offset_mapping"], strict=True):
        questions.append(each.question if len(places) <= most else each.question[: places[most - 1][1]])
        if len(places) > most:
            cut.add(each.number)
    return questions


def _examples(
    each: Asked, parts: Sequence[tuple[int, NDArray[np.int64]]], last: int, cut: Any
) -> Iterable[tuple[Example, bool]]:
    """The texts of a question with their places, and whether an answer stands whole in each; `last` is the
    one with the end of the context."""
    for number, (text, own) in enumerate(parts):
        known = own[own[:, 0] != NO_PLACE]
        if not len(known):
            raise UserError(f"labelled: the context {each.context!r:.80} has no token; leave it out")
        # blanks at the ends of the context, which no token has, belong to the first and the last part
        start = int(known[0, 0]) if number else 0
        end = int(known[-1, 1]) if text != last else len(each.context)
        right = _ends(each, own, start, end)
        passage = Passage(
            each.number, each.start + start, each.context[start:end],
            np.where(own == NO_PLACE, NO_PLACE, own - start).astype(np.int32),
            tuple(answer for _, answer in each.label),
        )  # fmt: skip
        types = cut["token_type_ids"][text] if "token_type_ids" in cut else None
        yield (
            Example(
                np.array(cut["input_ids"][text], dtype=np.int32),
                np.array(right or (0, 0), dtype=np.int64),
                None if types is None else np.array(types, dtype=np.int32),
                passage=passage,
            ),
            right is not None,
        )


def _places(cut: Any, text: int) -> NDArray[np.int64]:
    """Of each token its characters in the context (length, 2), `NO_PLACE` where it is not of that."""
    ids = np.array([NO_PLACE if of is None else of for of in cut.sequence_ids(text)])
    found = np.array(cut["offset_mapping"][text], dtype=np.int64).reshape(len(ids), 2)
    return np.where((ids == _CONTEXT)[:, None], found, NO_PLACE)


def _ends(each: Asked, places: NDArray[np.int64], start: int, end: int) -> tuple[int, int] | None:
    """First and last token of the first answer that stands whole in the characters [start, end)."""
    for first, answer in each.label:
        a = first - each.start
        b = a + len(answer)
        if start <= a and b <= end:
            tokens = np.flatnonzero((places[:, 1] > a) & (places[:, 0] < b) & (places[:, 0] != NO_PLACE))
            if len(tokens):
                return int(tokens[0]), int(tokens[-1])
    return None
