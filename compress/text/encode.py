"""Rows of labelled data cut into tokens.

A text is cut with the specials that the tokenizer puts around it, a pair with those between; one that is
longer than the model takes is cut off, of a pair the longer side, and counted, as is a target that is a text
(targets.py). Of words with a label each the first piece carries it. A question whose context is too long is
several examples (passages.py); chats are written by the model's template (chats.py); a decoder without a head
is asked by a prompt (prompts.py). For a model that embeds, the texts of pairs are cut each by itself, every
one once.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.tasks.base import UNKNOWN, Example
from compress.text.chats import chat_items
from compress.text.examples import SPAN, Examples, LabelledRow, distinct_texts
from compress.text.framing import NO_FRAME, frame_of
from compress.text.labelled.duplicates import normal_form
from compress.text.passages import Asked, again, passages
from compress.text.prompts import Prompt, prompted
from compress.text.targets import room_for, targets_written

_TOGETHER = 1000  # rows that are encoded at a time


def encode(
    rows: Sequence[LabelledRow],
    kind: str,
    names: Sequence[str],
    tokenizer: Any,
    longest: int,
    order: Iterable[int] | None = None,
    *,
    apart: bool = False,
) -> Examples:
    """Rows as examples, in the order of their lengths, or in a given one.

    Args:
        rows: with labels of the kind.
        names: of the labels, in the order of their numbers.
        tokenizer: a fast one.
        longest: the most tokens that the model takes.
        order: of rows, that of another tokenizer's examples; by default that of the lengths.
        apart: of pairs, each distinct text once and by itself, where `order` is of texts.

    Raises:
        UserError: a text of no token; of pairs that are read apart, a row of one text.
    """
    if apart:
        return _each_text(rows, kind, tokenizer, longest, order)
    if kind == "chat":
        return _chats(rows, tokenizer, longest, order)
    numbers = {name: number for number, name in enumerate(names)}
    items: list[Example] = []
    of: list[int] = []  # the row of each
    cut, longest = 0, room_for(kind, tokenizer, longest)
    for start in range(0, len(rows), _TOGETHER):
        part = rows[start : start + _TOGETHER]
        if kind == SPAN:
            asked = [Asked(start + n, row.text, row.pair or "", row.label) for n, row in enumerate(part)]
            found = passages(asked, tokenizer, longest)
            items, of, cut = items + found.items, of + found.of, cut + len(found.cut)
            continue
        encoded = _encoded(part, kind, tokenizer, longest)
        written = targets_written(part, tokenizer, longest) if kind == "text" else []
        for index, row in enumerate(part):
            ids = np.array(encoded["input_ids"][index], dtype=np.int32)
            if not len(ids):
                raise UserError(f"labelled: {row.text!r:.80} has no token; leave it out")
            types = None
            if row.pair is not None and "token_type_ids" in encoded:
                types = np.array(encoded["token_type_ids"][index], dtype=np.int32)
            words = encoded.word_ids(index) if kind == "tags" else []
            targets = written[index].ids if written else targets_of(row, kind, numbers, words)
            items.append(Example(ids, targets, types))
            of.append(start + index)
            cut += bool(encoded.encodings[index].overflowing) or bool(written and written[index].cut)
    places = _ordered(items, of, order)
    size = sum(len(row.text.encode()) + len((row.pair or "").encode()) for row in rows)
    return Examples(
        kind, tuple(names), tuple(items[each] for each in places), tuple(of[each] for each in places), cut,
        frame_of(tokenizer), size, tuple(rows), digest_of(tokenizer),
        groups=_queries(rows, kind, [of[each] for each in places]),
    )  # fmt: skip


def _each_text(
    rows: Sequence[LabelledRow], kind: str, tokenizer: Any, longest: int, order: Iterable[int] | None
) -> Examples:
    """The texts of pairs, and which of them make up each row."""
    if single := [row for row in rows if row.pair is None]:
        raise UserError(
            f"labelled.pair: {single[0].text!r:.80} stands alone, where a model that embeds is judged by two "
            "texts in each row; name the column of the second, or give a model with a head"
        )
    texts = distinct_texts(rows)
    numbers = {normal_form(text): number for number, text in enumerate(texts)}
    cut = encode([_Text(text) for text in texts], "pair", (), tokenizer, longest, order)
    place = {number: index for index, number in enumerate(cut.order)}
    pairs = tuple(
        (
            place[numbers[normal_form(row.text)]],
            place[numbers[normal_form(row.pair or "")]],
            *((float(row.label),) if kind == "number" else ()),
        )
        for row in rows
    )
    return replace(cut, kind=kind, rows=tuple(rows), pairs=pairs)


@dataclass(frozen=True)
class _Text:
    """A row of one text, of which nothing is asked."""

    text: str
    pair: str | None = None
    label: str = ""
    words: tuple[str, ...] = ()


def cut_by(examples: Examples, tokenizer: Any, longest: int) -> Examples:
    """The same texts, in the same order, as another tokenizer cuts them, or for a shorter context; themselves
    where nothing would change."""
    if digest_of(tokenizer) == examples.tokenizer and examples.length <= longest:
        return examples
    rows, order = examples.rows, examples.order
    if examples.kind == SPAN:
        questions, labels = [row.text for row in rows], [row.label for row in rows]
        found = passages(again(examples.items, questions, labels), tokenizer, longest, once=True)
        return replace(
            examples, items=tuple(found.items), cut=len(found.cut), frame=frame_of(tokenizer),
            tokenizer=digest_of(tokenizer),
        )  # fmt: skip
    if examples.prompt is not None:
        return asked_by(examples, examples.prompt, tokenizer, longest, order)
    apart = bool(examples.pairs)
    return encode(rows, examples.kind, examples.names, tokenizer, longest, order, apart=apart)


def apart(examples: Examples, tokenizer: Any, longest: int, *, wanted: bool) -> Examples:
    """The same rows, the texts of pairs each by itself where that is wanted, else as one text."""
    if not examples.rows or wanted == bool(examples.pairs):
        return examples
    return encode(examples.rows, examples.kind, examples.names, tokenizer, longest, apart=wanted)


def asked_by(
    examples: Examples, prompt: Prompt, tokenizer: Any, longest: int, order: Iterable[int] | None = None
) -> Examples:
    """The same texts as prompts for a decoder with this tokenizer, of the kind `class`.

    Raises:
        UserError: as `prompted`.
    """
    rows, names = examples.rows, examples.names
    found = prompted([(row.text, row.pair) for row in rows], names, prompt, tokenizer, longest)
    numbers = {name: number for number, name in enumerate(names)}
    items = [
        Example(ids, targets_of(row, examples.kind, numbers))
        for ids, row in zip(found.prompts, rows, strict=True)
    ]
    places = _ordered(items, range(len(items)), order)
    return replace(
        examples, items=tuple(items[place] for place in places), order=tuple(places), cut=found.cut,
        frame=NO_FRAME, tokenizer=digest_of(tokenizer), prompt=prompt, choices=found.choices,
        groups=_queries(rows, examples.kind, places),
    )  # fmt: skip


def _queries(rows: Sequence[LabelledRow], kind: str, places: Sequence[int]) -> tuple[int, ...]:
    """Of each example the number of its first text, where rows are pairs with one label or number."""
    if kind not in ("class", "number") or any(row.pair is None for row in rows):
        return ()
    numbers: dict[str, int] = {}
    own = [numbers.setdefault(normal_form(row.text), len(numbers)) for row in rows]
    return tuple(own[place] for place in places)


def _ordered(items: Sequence[Example], of: Sequence[int], order: Iterable[int] | None) -> list[int]:
    """Places of examples by their lengths, or by an order of the rows that they are of."""
    if order is None:
        return np.argsort([len(item.ids) for item in items], kind="stable").tolist()
    own: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(of):
        own[row].append(place)
    return [place for row in order for place in own[row]]


def _chats(
    rows: Sequence[LabelledRow], tokenizer: Any, longest: int, order: Iterable[int] | None
) -> Examples:
    """Rows of the kind `chat`; those of which no answer is left are among the rows alone."""
    found = chat_items([row.label for row in rows], tokenizer, longest)
    kept = [place for place, item in enumerate(found.items) if item is not None]
    lengths = {place: len(item.ids) for place, item in enumerate(found.items) if item is not None}
    places = sorted(kept, key=lambda p: lengths[p]) if order is None else [p for p in order if p in lengths]
    items = tuple(item for place in places if (item := found.items[place]) is not None)
    size = sum(len(row.text.encode()) for row in rows)
    return Examples(
        "chat", (), items, tuple(places), found.cut, NO_FRAME, size, tuple(rows), digest_of(tokenizer)
    )


def digest_of(tokenizer: Any) -> str:
    """Of all that decides how a fast tokenizer cuts text."""
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return hashlib.sha256(backend.to_str().encode()).hexdigest()


def targets_of(
    row: LabelledRow, kind: str, numbers: Mapping[str, int], words: Sequence[int | None] = ()
) -> NDArray[Any]:
    """What is right about a row, as `Example.targets`; `words`: which word each token is of."""
    if kind == "pair":
        return np.array([UNKNOWN], dtype=np.int64)
    if kind == "number":
        return np.array([float(row.label)])
    if kind == "classes":
        found = np.zeros(len(numbers), dtype=np.int64)
        found[[numbers[name] for name in row.label]] = 1
        return found
    if kind == "tags":
        first = [word is not None and word not in words[:place] for place, word in enumerate(words)]
        tags = (
            numbers[row.label[word]] if new and word is not None else UNKNOWN
            for word, new in zip(words, first, strict=True)
        )
        return np.fromiter(tags, dtype=np.int64, count=len(words))
    return np.array([numbers[row.label]], dtype=np.int64)


def _encoded(rows: Sequence[LabelledRow], kind: str, tokenizer: Any, longest: int) -> Any:
    options = {"truncation": True, "max_length": longest, "verbose": False}
    with encoding():
        if kind == "tags":
            return tokenizer([list(row.words) for row in rows], is_split_into_words=True, **options)
        texts = [row.text for row in rows]
        if rows[0].pair is None:
            return tokenizer(texts, **options)
        return tokenizer(texts, [row.pair or "" for row in rows], **options)
