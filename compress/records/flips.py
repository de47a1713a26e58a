"""What a variant decides otherwise than its base, text by text, and what simple models decide.

Written by `measure` into `run.json`, read by `report`. The texts are those of the evaluation rows: they may
be private, and stand in the run's folder alone (`run.json`, and the page drawn from it).
"""

from typing import Literal

from pydantic import Field

from compress.records.base import Interval, Record


class Change(Record):
    """How often the base decided `before` and the variant decides `now`, where `label` is right."""

    label: str
    before: str
    now: str
    count: int


class Flip(Record):
    """A decision that was right and is wrong now.

    Attributes:
        text: of the row, cut; of a pair the first one.
        pair: the second one, cut.
        word: of labels per word, where in `text` the word stands: first character, and the one after it.
        confidence_before: the base's probability of its decision.
        confidence_now: the variant's probability of its own.
    """

    text: str
    pair: str | None = None
    word: tuple[int, int] | None = None
    label: str
    before: str
    now: str
    confidence_before: float
    confidence_now: float


class FlipsRecord(Record):
    """What one variant in one runtime decides otherwise than the base in torch.

    Attributes:
        fingerprint: of the variant that was measured.
        decisions: how many there are, of texts or of words.
        lost: right before, wrong now.
        gained: wrong before, right now.
        otherwise: wrong before, wrong in another way now.
        changes: the most frequent ones.
        worst: of those that were lost, where both were surest; of texts, those that lost most of the score.
        what: what is decided: labels, or texts that are written, of which each confidence is the score.
    """

    variant: str
    runtime: str
    fingerprint: str
    decisions: int
    lost: int
    gained: int
    otherwise: int
    changes: list[Change] = Field(default_factory=list)
    worst: list[Flip] = Field(default_factory=list)
    what: Literal["labels", "texts"] = "labels"

    @property
    def changed(self) -> int:
        """Decisions that are not the base's."""
        return self.lost + self.gained + self.otherwise


class FlipBook(Record):
    """Flips found so far by a measurement that is still running."""

    flips: list[FlipsRecord]


class LabelReference(Record):
    """A simple model of the training texts, or a decoder that is asked, judged on the same evaluation texts.

    Attributes:
        rows: texts that it was fitted on; 0 of a decoder that is asked for labels.
        fingerprint: of the data that it was fitted on and is judged by.
    """

    name: str
    score_name: str
    score: float
    score_ci95: Interval | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    rows: int
    fingerprint: str
