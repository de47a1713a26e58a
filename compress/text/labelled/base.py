"""What labelled data is: rows of eight kinds, in three parts.

| kind | a row | its label |
| :-- | :-- | :-- |
| `class` | a text, or two | one of the names |
| `classes` | a text, or two | any number of the names, none too |
| `number` | a text, or two | a finite float |
| `tags` | words | one of the names for each word |
| `span` | a question and its context | where each answer begins in the context, and the answer |
| `text` | a text | the text that is to come of it |
| `pair` | two texts that belong together | nothing: `""` |
| `chat` | what was said, a line per message | who said what, message by message |
"""

from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["class", "classes", "number", "tags", "span", "text", "pair", "chat"]
Label = str | float | tuple[str, ...] | tuple[tuple[int, str], ...] | tuple[tuple[str, str], ...]
NAMED: tuple[Kind, ...] = ("class", "classes", "tags")  # kinds whose labels are of a known set


@dataclass(frozen=True)
class Row:
    """One example.

    Attributes:
        text: of `tags` the words joined by a space, of `span` the question, of `chat` the contents.
        label: by kind: `class` a name; `classes` names; `number` a float; `tags` a name per word; `span`
            (first character in `pair`, answer) of each answer, none if the context has none; `text` the
            target; `pair` ""; `chat` (role, content) of each message.
        pair: the second text; of `span` the context; of `pair` what belongs to `text`. None of single texts.
        words: of `tags`.
    """

    text: str
    label: Label
    pair: str | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Labelled:
    """The parts of labelled data.

    Attributes:
        names: of the labels, in the order of their numbers; empty of kinds without.
        notes: facts for records, plain JSON values: rows read, rows left out, how the parts came about, what
            near duplicates there are.
    """

    source: str
    kind: Kind
    names: tuple[str, ...]
    train: tuple[Row, ...] = field(repr=False)
    heldout: tuple[Row, ...] = field(repr=False)
    evaluation: tuple[Row, ...] = field(repr=False)
    notes: dict[str, Any] = field(default_factory=dict)


def names_of(row: Row) -> tuple[str, ...]:
    """The distinct names in a row's label, of kinds with names."""
    label = row.label
    return (label,) if isinstance(label, str) else tuple(dict.fromkeys(label))  # type: ignore[arg-type]
