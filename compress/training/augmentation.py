"""Examples whose texts are changed anew in every epoch: a pure function of (seed, epoch, row).

Of the examples of an epoch a share, each by a draw of its own, gets some words replaced, deleted, inserted or
swapped (text/labelled/augment.py), the label kept; tags go with their words, of a pair both texts are
changed, of a question and its context the question. All changed texts of an epoch are cut into tokens
together; a context that then is in fewer parts leaves the others as they are. Nothing is remembered between
steps.
"""

import hashlib
import json
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
from pydantic import Field

from compress.tasks.base import Example
from compress.text.encode import encode
from compress.text.examples import SPAN, Examples
from compress.text.labelled.augment import Rates, Vocabulary, augmented_row
from compress.text.labelled.base import Row


class Augment(Rates):
    """Rates of the changes, and whom they befall."""

    share: float = Field(0.5, gt=0, le=1, description="of the examples of an epoch, those that are changed")


@dataclass(frozen=True)
class Augmented:
    """Examples with the settings of their changes.

    Attributes:
        examples: to learn from, with their rows.
        settings: what is changed how often.
        tokenizer: cuts the changed texts; that which cut the examples.
        longest: the most tokens that the model takes.
        seed: of all draws.
    """

    examples: Examples
    settings: Augment
    tokenizer: Any = field(repr=False)
    longest: int
    seed: int

    def changed(self, epoch: int) -> dict[int, Example]:
        """Number of an example -> what stands in its place in an epoch, of those that are changed."""
        found: dict[int, Row] = {}  # by its place among the rows
        for place in dict.fromkeys(self.examples.order):
            draw = np.random.default_rng([self.seed, epoch, place])
            if draw.random() < self.settings.share:
                row = self._rows[place]
                asked = replace(row, pair=None) if self.examples.kind == SPAN else row
                changed = augmented_row(asked, draw, self.settings, self._vocabulary)
                changed = replace(changed, pair=row.pair) if self.examples.kind == SPAN else changed
                if changed != row:
                    found[place] = changed
        if not found:
            return {}
        own = self.examples
        cut = encode(
            list(found.values()), own.kind, own.names, self.tokenizer, self.longest, range(len(found))
        )
        ready: dict[int, list[Example]] = {}  # a question has several where its context is long
        places = list(found)
        for number, item in zip(cut.order, cut.items, strict=True):
            ready.setdefault(places[number], []).append(item)
        return {number: ready[place].pop(0) for number, place in enumerate(own.order) if ready.get(place)}

    @cached_property
    def identity(self) -> str:
        """SHA-256 of the texts that are changed and of the settings."""
        values = [self.settings.model_dump(), self.examples.tokenizer, self.longest]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        for row in self._rows:
            digest.update(json.dumps(astuple(row)).encode())
        return digest.hexdigest()

    @cached_property
    def _rows(self) -> tuple[Row, ...]:
        return tuple(Row(row.text, row.label, row.pair, row.words) for row in self.examples.rows)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary.of(self._rows)
