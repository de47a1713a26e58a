"""The parts of labelled data as a model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UserError
from compress.text.examples import Examples, encode
from compress.text.labelled.base import Labelled
from compress.text.targets import room_for


@dataclass(frozen=True)
class LabelledData:
    """The parts of labelled data as a model reads them.

    Attributes:
        source: in words.
        notes: facts for records; how many texts were cut off among them.
    """

    source: str
    train: Examples
    heldout: Examples
    evaluation: Examples
    notes: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def kind(self) -> str:
        """Of the labels."""
        return self.train.kind

    @property
    def names(self) -> tuple[str, ...]:
        """Of the labels, in the order of their numbers."""
        return self.train.names

    @property
    def sha256(self) -> str:
        """Of what is learnt from: the examples to train on and those that decide when to stop."""
        return f"{self.train.sha256} {self.heldout.sha256}"

    def cut_by(self, tokenizer: Any, longest: int) -> "LabelledData":
        """The same rows for a model of another tokenizer."""
        train, heldout, evaluation = (
            part.cut_by(tokenizer, longest) for part in (self.train, self.heldout, self.evaluation)
        )
        return LabelledData(self.source, train, heldout, evaluation, self.notes)


def encoded(labelled: Labelled, names: Sequence[str], tokenizer: Any, longest: int) -> LabelledData:
    """Rows as examples; `names`: of the labels in the order of their numbers, all of the data's among them.

    `longest`: the most tokens that the model takes.
    """
    parts = {
        part: encode(getattr(labelled, part), labelled.kind, names, tokenizer, longest)
        for part in ("train", "heldout", "evaluation")
    }
    if not len(parts["evaluation"]):
        raise UserError(f"labelled.evaluation: {labelled.source} leaves no rows to judge by; give more")
    notes = {**labelled.notes, "cut_off": {part: examples.cut for part, examples in parts.items()}}
    notes["longest"] = room_for(labelled.kind, tokenizer, longest)
    if any(len(examples) > len(examples.rows) for examples in parts.values()):  # long contexts are several
        notes["examples"] = {part: len(examples) for part, examples in parts.items()}
    return LabelledData(labelled.source, **parts, notes=notes)
