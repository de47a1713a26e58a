"""Labelled texts as tokens: what a model with a head is asked, and what is right.

Examples of a length stand together, so that they go through a model at once without padding: what is measured
of a text is what the model says of it alone. How rows become examples: encode.py.

Imports no model library: the process that is measured reads examples, too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.tasks.answers import Passage
from compress.tasks.base import UNKNOWN, Example
from compress.text.framing import NO_FRAME, Frame
from compress.text.labelled.duplicates import normal_form
from compress.text.prompts import Prompt
from compress.text.translation import Translation

SPAN = "span"
BY_TOKEN = ("chat", "text")  # kinds whose targets are tokens


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

    def renumbered(self, words: Translation) -> Examples:
        """Chats, or texts and their targets, in a smaller vocabulary, token by token.

        Raises:
            UserError: a token of them is not in it.
        """

        def renamed(tokens: NDArray[Any]) -> NDArray[Any]:
            own = words.stream(tokens.astype(np.int32))
            if len(own) != len(tokens):
                raise UserError(
                    "labelled: a token of the texts to judge by is not in the smaller vocabulary; name the "
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


def distinct_texts(rows: Sequence[LabelledRow]) -> list[str]:
    """The texts of pairs in the order of their appearance, those that are alike but for case and spaces
    once."""
    found: dict[str, str] = {}
    for row in rows:
        for text in (row.text, row.pair or ""):
            found.setdefault(normal_form(text), text)
    return list(found.values())


def _apart(flat: NDArray[Any], lengths: NDArray[np.int64]) -> list[NDArray[Any]]:
    return np.split(flat, np.cumsum(lengths)[:-1])
