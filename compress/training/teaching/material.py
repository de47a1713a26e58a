"""Labelled texts and plain text in one training: which of them a step reads, a pure function of its number.

Of n steps floor(n u) read plain text, evenly spread, u the share. An epoch goes once through the labelled
texts, whatever is read between.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from compress.training.batches import Batches, MicroBatch
from compress.training.example_batches import ExampleBatches


@dataclass(frozen=True)
class LabelledAndText:
    """Steps of either.

    Attributes:
        examples: labelled texts.
        text: windows of plain text, as models read them whole.
        share: of the steps that read plain text, 0 <= share < 1.
    """

    examples: ExampleBatches
    text: Batches
    share: float

    @property
    def windows(self) -> int:
        """Labelled texts, and windows between, while all labelled texts are seen once."""
        return round(self.examples.windows / (1 - self.share))

    @property
    def batch(self) -> int:
        """Of them per step."""
        return self.examples.batch

    @property
    def step_tokens(self) -> int:
        """Tokens of a step, on average."""
        own, other = self.examples.step_tokens, self.text.step_tokens
        return max(1, round((1 - self.share) * own + self.share * other))

    @property
    def seed(self) -> int:
        """Of the order."""
        return self.examples.seed

    def check(self) -> "LabelledAndText":
        """Itself; raises UserError where either is too little."""
        self.examples.check()
        self.text.check()
        return self

    def identity(self, facts: list[Any]) -> str:
        """SHA-256 over JSON values, both materials and the share."""
        values = [self.share, self.examples.identity(facts), self.text.identity(facts)]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def plain(self, step: int) -> bool:
        """Whether a step reads plain text."""
        return self._before(step + 1) > self._before(step)

    def micro_batches(self, step: int, parts: int, rank: int = 0, count: int = 1) -> Iterator[MicroBatch]:
        """What process `rank` of `count` computes in a step: at most `parts`."""
        before = self._before(step)
        if self.plain(step):
            return self.text.micro_batches(before, parts, rank, count)
        return self.examples.micro_batches(step - before, parts, rank, count)

    def _before(self, step: int) -> int:
        """Steps before it that read plain text."""
        return int(step * self.share + 1e-9)
