"""The parts of labelled data as a model reads them."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UserError
from compress.tasks.base import UNKNOWN, Example
from compress.text.encode import apart, cut_by, encode
from compress.text.examples import Examples
from compress.text.framing import require_known
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

    @property
    def deciding(self) -> Examples:
        """Those that decide which weights to keep: held out, or where none are, those to train on."""
        return self.heldout if len(self.heldout) else self.train

    @property
    def paired(self) -> bool:
        """Whether rows have two texts."""
        return paired(self.train.rows)

    def apart(self, tokenizer: Any, longest: int, *, wanted: bool) -> "LabelledData":
        """The same rows, texts of pairs each by itself where that is wanted, else as one text."""
        train, heldout, evaluation = (
            apart(part, tokenizer, longest, wanted=wanted)
            for part in (self.train, self.heldout, self.evaluation)
        )
        return LabelledData(self.source, train, heldout, evaluation, self.notes)

    def cut_by(self, tokenizer: Any, longest: int) -> "LabelledData":
        """The same rows for a model of another tokenizer."""
        train, heldout, evaluation = (
            cut_by(part, tokenizer, longest) for part in (self.train, self.heldout, self.evaluation)
        )
        return LabelledData(self.source, train, heldout, evaluation, self.notes)


def paired(rows: Sequence[Any]) -> bool:
    """Whether all rows have two texts."""
    return bool(rows) and all(row.pair is not None for row in rows)


def read_apart(kind: str, *, embeds: bool, pairs: bool) -> bool:
    """Whether the texts of rows are read each by itself: those of pairs without a label, and those of pairs
    with a number by a model that embeds."""
    return kind == "pair" or (embeds and kind == "number" and pairs)


def _largest(item: Example) -> int:
    return int(item.ids.max())


def _asked(examples: Examples) -> int:
    """How many tokens have a target."""
    return sum(int((item.targets != UNKNOWN).sum()) for item in examples.items)


def encoded(
    labelled: Labelled,
    names: Sequence[str],
    tokenizer: Any,
    longest: int,
    rows: int | None = None,
    *,
    embeds: bool = False,
) -> LabelledData:
    """Rows as examples.

    Args:
        labelled: the rows.
        names: of the labels in the order of their numbers, all of the data's among them.
        tokenizer: cuts them.
        longest: the most tokens that the model takes.
        rows: of the model's table of tokens; the texts, and what a chat template writes, may hold no others.
        embeds: whether the model does, so that it reads the texts of pairs with a number each by itself, as
            anybody reads those of pairs without a label.

    Raises:
        UserError: no row to judge by; a token beyond the model's rows.
    """
    one_by_one = read_apart(labelled.kind, embeds=embeds, pairs=paired(labelled.train))
    parts = {
        part: encode(getattr(labelled, part), labelled.kind, names, tokenizer, longest, apart=one_by_one)
        for part in ("train", "heldout", "evaluation")
    }
    if not len(parts["evaluation"]):
        raise UserError(f"labelled.evaluation: {labelled.source} leaves no rows to judge by; give more")
    for part, examples in parts.items():
        if not len(examples) and (count := len(getattr(labelled, part))):
            raise UserError(
                f"labelled.{part}: of all {count} rows of {labelled.source} the answers lie beyond the "
                f"{longest} tokens that the model takes; give shorter rows, or a model that takes more"
            )
    for examples in parts.values() if rows is not None else ():
        if (most := max((item for item in examples.items), key=_largest, default=None)) is not None:
            where = f"labelled: a row of {labelled.source}"
            require_known([_largest(most)], rows or 0, where, tokenizer.convert_ids_to_tokens)
    cut = {part: examples.cut for part, examples in parts.items()}
    notes = {**labelled.notes, "cut_off": cut, "longest": room_for(labelled.kind, tokenizer, longest)}
    if any(len(examples) > len(examples.rows) for examples in parts.values()):  # long contexts are several
        notes["examples"] = {part: len(examples) for part, examples in parts.items()}
    if labelled.kind == "chat":
        lost = {part: len(examples.rows) - len(examples) for part, examples in parts.items()}
        if any(lost.values()):
            notes["answers_cut_off"] = lost
        notes["answer_tokens"] = {part: _asked(examples) for part, examples in parts.items()}
    return LabelledData(labelled.source, **parts, notes=notes)
