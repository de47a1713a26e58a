"""Labelled texts as tokens: what a model with a head is asked, and what is right.

A text is cut with the specials that the tokenizer puts around it, a pair with those between; one that is
longer than the model takes is cut off, of a pair the longer side, and counted, as is a target that is a text
(targets.py). Of words with a label each the first piece carries it. A question whose context is too long is
several examples (passages.py); chats are written by the model's template (chats.py). For a model that embeds,
the texts of pairs are cut each by itself, every one once. Examples of a length stand together, so that they
go through a model at once without padding: what is measured of a text is what the model says of it alone.

Imports no model library: the process that is measured reads examples, too.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.tasks.answers import Passage
from compress.tasks.base import UNKNOWN, Example
from compress.text.chats import chat_items
from compress.text.framing import NO_FRAME, Frame, frame_of
from compress.text.labelled.duplicates import normal_form
from compress.text.passages import Asked, again, passages
from compress.text.prompts import Prompt, prompted
from compress.text.targets import room_for, targets_written
from compress.text.translation import Translation

SPAN = "span"
_TOGETHER = 1000  # rows that are encoded at a time


class LabelledRow(Protocol):
    """A row of labelled data, as `compress.text.labelled` reads it."""

    @property
    def text(self) -> str: ...  # noqa: D102
    @property
    def pair(self) -> str | None: ...  # noqa: D102
    @property
    def label(self) -> Any: ...  # noqa: D102
    @property
    def words(self) -> tuple[str, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Examples:
    """Texts with labels, those of a length together.

    Attributes:
        kind: of the labels: class, classes, number, tags, span, text, chat, pair.
        names: of the labels, in the order of their numbers.
        items: the texts.
        order: which row of the data each is, or is a part of.
        cut: how many were longer than the model takes; of `chat` there may be fewer items than rows by those
            whose answers were cut off.
        frame: what the tokenizer puts around a text.
        bytes: of the texts.
        rows: they were made of, in the order of the data.
        tokenizer: digest of the one that cut them.
        prompt: how a decoder is asked for their labels, whose prompts the items are; None of other texts.
        choices: then the tokens of each label, in the order of their numbers.
        pairs: where the texts of pairs are read each by itself: of every row the numbers of its two texts
            among `items` and, of the kind `number`, its label.
        groups: of each text that is a pair, which query it is of: the number of its first text.
    """

    kind: str
    names: tuple[str, ...]
    items: tuple[Example, ...] = field(repr=False)
    order: tuple[int, ...] = field(default=(), repr=False)
    cut: int = 0
    frame: Frame = NO_FRAME
    bytes: int = 0
    rows: tuple[LabelledRow, ...] = field(default=(), repr=False)
    tokenizer: str = ""
    prompt: Prompt | None = None
    choices: tuple[NDArray[np.int32], ...] = field(default=(), repr=False)
    pairs: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    groups: tuple[int, ...] = field(default=(), repr=False)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.items[index]

    @property
    def size(self) -> int:
        """Tokens of all, targets that are texts among them."""
        return sum(len(item.ids) + len(item.targets) * (self.kind == "text") for item in self.items)

    @property
    def length(self) -> int:
        """Tokens of the longest, of a source or of a target that is a text."""
        written = self.kind == "text"
        return max((max(len(i.ids), len(i.targets) * written) for i in self.items), default=0)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each text, in the order of the data."""
        order = self.order or range(len(self.items))
        return [len(item.ids) for _, item in sorted(zip(order, self.items, strict=True), key=lambda x: x[0])]

    @property
    def text(self) -> NDArray[np.int32]:
        """The tokens of all one after another, what is around each text left out."""
        begin, end = len(self.frame.begin), len(self.frame.end)
        return np.concatenate([item.ids[begin : len(item.ids) - end] for item in self.items])

    @property
    def texts(self) -> list[str]:
        """Of pairs that are read apart, the texts of `items`."""
        texts = distinct_texts(self.rows)
        return [texts[number] for number in self.order]

    @property
    def loss_kind(self) -> str:
        """What is minimised: the kind; of pairs whose numbers are 0 and 1 alone `relevance`."""
        if self.kind != "number" or not self.groups:
            return self.kind
        return "relevance" if all(float(item.targets[0]) in (0.0, 1.0) for item in self.items) else self.kind

    @property
    def sha256(self) -> str:
        """Of tokens, types and targets."""
        digest = hashlib.sha256(repr((self.kind, self.names)).encode())
        if self.prompt is not None:
            digest.update(repr((self.prompt, [choice.tolist() for choice in self.choices])).encode())
        for item in self.items:
            for part in (item.ids, item.targets, item.types):
                digest.update(b"-" if part is None else part.tobytes())
            if item.passage is not None:
                digest.update(json.dumps(item.passage.facts()).encode() + item.passage.places.tobytes())
        if self.pairs:
            digest.update(repr(self.pairs).encode())
        return digest.hexdigest()

    def cut_by(self, tokenizer: Any, longest: int) -> Examples:
        """The same texts, in the same order, as another tokenizer cuts them; itself for its own."""
        if digest_of(tokenizer) == self.tokenizer:
            return self
        if self.kind == SPAN:
            questions, labels = [row.text for row in self.rows], [row.label for row in self.rows]
            found = passages(again(self.items, questions, labels), tokenizer, longest, once=True)
            return self._with(found.items, self.order, len(found.cut), tokenizer)
        if self.prompt is not None:
            return self.asked_by(self.prompt, tokenizer, longest, self.order)
        return self._cut(tokenizer, longest, self.order, bool(self.pairs))

    def apart(self, tokenizer: Any, longest: int, *, wanted: bool) -> Examples:
        """The same rows, the texts of pairs each by itself where that is wanted, else as one text."""
        if not self.rows or wanted == bool(self.pairs):
            return self
        return self._cut(tokenizer, longest, None, wanted)

    def _cut(self, tokenizer: Any, longest: int, order: Iterable[int] | None, apart: bool) -> Examples:
        cut = encode_apart if apart else encode
        return cut(self.rows, self.kind, self.names, tokenizer, longest, order)

    def asked_by(
        self, prompt: Prompt, tokenizer: Any, longest: int, order: Iterable[int] | None = None
    ) -> Examples:
        """The same texts as prompts for a decoder with this tokenizer, of the kind `class`.

        Raises:
            UserError: as `prompted`.
        """
        texts = [(row.text, row.pair) for row in self.rows]
        found = prompted(texts, self.names, prompt, tokenizer, longest)
        numbers = {name: number for number, name in enumerate(self.names)}
        items = [
            Example(ids, targets_of(row, self.kind, numbers))
            for ids, row in zip(found.prompts, self.rows, strict=True)
        ]
        lengths = np.array([len(ids) for ids in found.prompts])
        places = list(order) if order is not None else np.argsort(lengths, kind="stable").tolist()
        return replace(
            self, items=tuple(items[place] for place in places), order=tuple(places), cut=found.cut,
            frame=NO_FRAME, tokenizer=digest_of(tokenizer), prompt=prompt, choices=found.choices,
        )  # fmt: skip

    def renumbered(self, words: Translation) -> Examples:
        """Chats in a smaller vocabulary, token by token.

        Raises:
            UserError: a token of them is not in it.
        """

        def renamed(tokens: NDArray[Any]) -> NDArray[Any]:
            own = words.stream(tokens.astype(np.int32))
            if len(own) != len(tokens):
                raise UserError(
                    "labelled: a token of the chats to judge by is not in the smaller vocabulary; name the "
                    "whole text under prune_vocabulary.text"
                )
            return own

        items = []
        for item in self.items:
            targets, asked = item.targets.copy(), item.targets != UNKNOWN
            targets[asked] = renamed(targets[asked])
            items.append(Example(renamed(item.ids), targets))
        return replace(self, items=tuple(items), tokenizer="")

    def save(self, file: Path) -> None:
        """Write an .npz without objects in it."""
        ids, targets = ([getattr(item, name) for item in self.items] for name in ("ids", "targets"))
        types = [item.ids * 0 if item.types is None else item.types for item in self.items]
        parts: dict[str, Any] = {
            "ids": np.concatenate(ids),
            "lengths": np.array([len(each) for each in ids]),
            "types": np.concatenate(types),
            "typed": np.array([item.types is not None for item in self.items]),
            "targets": np.concatenate(targets),
            "target_lengths": np.array([len(each) for each in targets]),
            "names": np.array([self.kind, *self.names]),
            "prompt": np.array([] if self.prompt is None else [self.prompt.template]),
            "per_token": np.array(self.prompt is None or self.prompt.per_token),
            "choices": np.concatenate([*self.choices, np.zeros(0, np.int32)]),
            "choice_lengths": np.array([len(choice) for choice in self.choices], dtype=np.int64),
            "pairs": np.array(self.pairs, dtype=np.float64),
            "groups": np.array(self.groups, dtype=np.int64),
            **self._passages(),
        }
        np.savez(file, **parts)

    @classmethod
    def load(cls, file: Path) -> Examples:
        """What `save` wrote, without what only the one who made them needs."""
        with np.load(file, allow_pickle=False) as found:
            parts = {name: found[name] for name in found.files}
        ids, types = (_apart(parts[name], parts["lengths"]) for name in ("ids", "types"))
        targets = _apart(parts["targets"], parts["target_lengths"])
        texts: list[Passage | None] = [None] * len(ids)
        if "passages" in parts:
            places = _apart(parts["places"], parts["lengths"])
            facts = json.loads(parts["passages"].tobytes())
            texts = [Passage.of_facts(*each) for each in zip(facts, places, strict=True)]
        items = (
            Example(own, right, kinds if typed else None, passage=text)
            for own, right, kinds, typed, text in zip(ids, targets, types, parts["typed"], texts, strict=True)
        )
        kind, *names = parts["names"].tolist()
        pairs = tuple((int(first), int(second), *told) for first, second, *told in parts["pairs"].tolist())
        asked = [Prompt(template, bool(parts["per_token"])) for template in parts["prompt"].tolist()]
        choices = tuple(_apart(parts["choices"], parts["choice_lengths"])) if asked else ()
        return cls(
            kind, tuple(names), tuple(items), prompt=next(iter(asked), None), choices=choices,
            pairs=pairs, groups=tuple(parts["groups"].tolist()),
        )  # fmt: skip

    def _passages(self) -> dict[str, NDArray[Any]]:
        """In the file, where examples have some: their facts as JSON, and places one after another."""
        found = [item.passage for item in self.items if item.passage is not None]
        if not found:
            return {}
        told = json.dumps([each.facts() for each in found]).encode()
        places = np.concatenate([each.places for each in found])
        return {"passages": np.frombuffer(told, dtype=np.uint8), "places": places}

    def alike(self, other: Examples) -> bool:
        """Whether answers to both are of the same positions, text by text."""
        return [len(item.ids) for item in self.items] == [len(item.ids) for item in other.items]

    def _with(self, items: list[Example], order: Iterable[int], cut: int, tokenizer: Any) -> Examples:
        """Other examples of the same rows."""
        return replace(
            self, items=tuple(items), order=tuple(order), cut=cut, frame=frame_of(tokenizer),
            tokenizer=digest_of(tokenizer),
        )  # fmt: skip


def encode(
    rows: Sequence[LabelledRow],
    kind: str,
    names: Sequence[str],
    tokenizer: Any,
    longest: int,
    order: Iterable[int] | None = None,
) -> Examples:
    """Rows as examples, in the order of their lengths, or in a given one.

    Args:
        rows: with labels of the kind.
        names: of the labels, in the order of their numbers.
        tokenizer: a fast one.
        longest: the most tokens that the model takes.
        order: of rows, that of another tokenizer's examples; by default that of the lengths.

    Raises:
        UserError: a text of no token.
    """
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


def encode_apart(
    rows: Sequence[LabelledRow],
    kind: str,
    names: Sequence[str],
    tokenizer: Any,
    longest: int,
    order: Iterable[int] | None = None,
) -> Examples:
    """The texts of pairs, each distinct one once and by itself; arguments as of `encode`, but `order` is of
    texts.

    Raises:
        UserError: rows of one text; a text of no token.
    """
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


def distinct_texts(rows: Sequence[LabelledRow]) -> list[str]:
    """The texts of pairs in the order of their appearance, those that are alike but for case and spaces
    once."""
    found: dict[str, str] = {}
    for row in rows:
        for text in (row.text, row.pair or ""):
            found.setdefault(normal_form(text), text)
    return list(found.values())


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


def _apart(flat: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(flat, np.cumsum(lengths)[:-1])
