"""Labelled texts as tokens: what a model with a head is asked, and what is right.

A text is cut with the specials that the tokenizer puts around it, a pair with those between; one that is
longer than the model takes is cut off, of a pair the longer side, and counted, as is a target that is a text
(targets.py). Of words with a label each the first piece carries it. Examples of a length stand together, so
that they go through a model at once without padding: what is measured of a text is what the model says of it
alone.

Imports no model library: the process that is measured reads examples, too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.tasks.base import UNKNOWN, Example
from compress.text.framing import NO_FRAME, Frame, frame_of
from compress.text.targets import room_for, targets_written

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
        kind: of the labels: class, classes, number, tags, text.
        names: of the labels, in the order of their numbers.
        items: the texts.
        order: which row of the data each is.
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
        return digest.hexdigest()

    def cut_by(self, tokenizer: Any, longest: int) -> Examples:
        """The same texts, in the same order, as another tokenizer cuts them; itself for its own."""
        if digest_of(tokenizer) == self.tokenizer:
            return self
        return encode(self.rows, self.kind, self.names, tokenizer, longest, self.order)

    def save(self, file: Path) -> None:
        """Write an .npz without objects in it."""
        ids, targets = ([getattr(item, name) for item in self.items] for name in ("ids", "targets"))
        types = [item.ids * 0 if item.types is None else item.types for item in self.items]
        np.savez(
            file,
            ids=np.concatenate(ids),
            lengths=np.array([len(each) for each in ids]),
            types=np.concatenate(types),
            typed=np.array([item.types is not None for item in self.items]),
            targets=np.concatenate(targets),
            target_lengths=np.array([len(each) for each in targets]),
            names=np.array([self.kind, *self.names]),
        )

    @classmethod
    def load(cls, file: Path) -> Examples:
        """What `save` wrote, without what only the one who made them needs."""
        with np.load(file, allow_pickle=False) as found:
            parts = {name: found[name] for name in found.files}
        ids, types = (_apart(parts[name], parts["lengths"]) for name in ("ids", "types"))
        targets = _apart(parts["targets"], parts["target_lengths"])
        items = (
            Example(own, right, kinds if typed else None)
            for own, right, kinds, typed in zip(ids, targets, types, parts["typed"], strict=True)
        )
        kind, *names = parts["names"].tolist()
        return cls(kind, tuple(names), tuple(items))


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
    cut, longest = 0, room_for(kind, tokenizer, longest)
    for start in range(0, len(rows), _TOGETHER):
        part = rows[start : start + _TOGETHER]
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
            cut += bool(encoded.encodings[index].overflowing) or bool(written and written[index].cut)
    lengths = np.array([len(item.ids) for item in items])
    places = list(order) if order is not None else np.argsort(lengths, kind="stable").tolist()
    size = sum(len(row.text.encode()) + len((row.pair or "").encode()) for row in rows)
    return Examples(
        kind, tuple(names), tuple(items[place] for place in places), tuple(places), cut, frame_of(tokenizer),
        size, tuple(rows), digest_of(tokenizer),
    )  # fmt: skip


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
