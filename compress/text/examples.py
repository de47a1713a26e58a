"""Labelled texts as tokens: what a model with a head is asked, and what is right.

A text is cut with the specials that the tokenizer puts around it, a pair with those between; one that is
longer than the model takes is cut off, of a pair the longer side, and counted, as is a target that is a text
(targets.py). Of words with a label each the first piece carries it. A question whose context is too long is
several examples (passages.py). Examples of a length stand together, so that they go through a model at once
without padding: what is measured of a text is what the model says of it alone.

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
from compress.text.framing import NO_FRAME, Frame, frame_of
from compress.text.passages import Asked, again, passages
from compress.text.targets import room_for, targets_written

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
        kind: of the labels: class, classes, number, tags, span, text.
        names: of the labels, in the order of their numbers.
        items: the texts.
        order: which row of the data each is, or is a part of.
        cut: how many were longer than the model takes.
        frame: what the tokenizer puts around a text.
        bytes: of the texts.
        rows: they were made of, in the order of the data.
        tokenizer: digest of the one that cut them.
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
    def sha256(self) -> str:
        """Of tokens, types and targets."""
        digest = hashlib.sha256(repr((self.kind, self.names)).encode())
        for item in self.items:
            for part in (item.ids, item.targets, item.types):
                digest.update(b"-" if part is None else part.tobytes())
            if item.passage is not None:
                digest.update(json.dumps(item.passage.facts()).encode() + item.passage.places.tobytes())
        return digest.hexdigest()

    def cut_by(self, tokenizer: Any, longest: int) -> Examples:
        """The same texts, in the same order, as another tokenizer cuts them; itself for its own."""
        if digest_of(tokenizer) == self.tokenizer:
            return self
        if self.kind == SPAN:
            questions, labels = [row.text for row in self.rows], [row.label for row in self.rows]
            found = passages(again(self.items, questions, labels), tokenizer, longest, once=True)
            return self._with(found.items, self.order, len(found.cut), tokenizer)
        return encode(self.rows, self.kind, self.names, tokenizer, longest, self.order)

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
        return cls(kind, tuple(names), tuple(items))

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
    )  # fmt: skip


def _ordered(items: Sequence[Example], of: Sequence[int], order: Iterable[int] | None) -> list[int]:
    """Places of examples by their lengths, or by an order of the rows that they are of."""
    if order is None:
        return np.argsort([len(item.ids) for item in items], kind="stable").tolist()
    own: dict[int, list[int]] = defaultdict(list)
    for place, row in enumerate(of):
        own[row].append(place)
    return [place for row in order for place in own[row]]


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
