"""Tables to rows: every value checked, mistakes told with their place, empty texts left out and counted."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from compress.errors import UserError
from compress.text.labelled import labels
from compress.text.labelled.base import Kind, Label, Row
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.fields import Fields, recognised
from compress.text.labelled.messages import chat_of
from compress.text.labelled.squad import answers
from compress.text.labelled.tables import Table
from compress.text.rows import text_of


@dataclass
class Raw:
    """A table's values as they are: place, text, second text, label, words, group of each row."""

    table: Table
    fields: Fields
    where: str
    source: int = 0
    rows: list[tuple[str, Any, Any, Any, Any, str]] = field(default_factory=list)

    @property
    def known(self) -> tuple[str, ...]:
        """What the label's numbers stand for."""
        return self.table.names.get(self.fields.label, ())


@dataclass
class Part:
    """Rows with their places, groups and sources."""

    rows: list[Row] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)

    def extend(self, other: "Part") -> None:
        """Put other rows behind."""
        self.rows += other.rows
        self.places += other.places
        self.groups += other.groups
        self.sources += other.sources

    def take(self, positions: Sequence[int]) -> "Part":
        """Some of the rows."""
        parts = (self.rows, self.places, self.groups, self.sources)
        return Part(*([values[i] for i in positions] for values in parts))  # type: ignore[arg-type]


def read_raw(table: Table, config: LabelledConfig, where: str, source: int = 0) -> Raw:
    """Read a table; raises UserError for what its columns lack, and what reading it meets."""
    fields = recognised(table.columns, config, table.origin, where)
    raw = Raw(table, fields, where, source)
    names = [name for name in (fields.text, fields.pair, fields.label, fields.words) if name]
    groups = iter(table.groups)
    for place, values in table.read(names):
        by_name = dict(zip(names, values, strict=True))
        found = (by_name.get(n) for n in (fields.text, fields.pair, fields.label, fields.words))
        raw.rows.append((place, *found, next(groups, "")))  # type: ignore[arg-type]
    return raw


def kind_of(tables: Sequence[Raw], config: LabelledConfig) -> tuple[Kind, bool]:
    """What all the tables are, and whether all labels are whole numbers.

    Raises:
        UserError: they are of several kinds.
    """
    told = {raw.fields.kind: raw.table.origin for raw in tables}
    if len(told) > 1:
        of = "; ".join(f"{origin} looks like '{kind or 'class'}'" for kind, origin in told.items())
        raise UserError(f"labelled.kind: the sources are of several kinds ({of}); set labelled.kind")
    values = chain.from_iterable(_values(raw) for raw in tables)
    kind, whole = labels.kind_of(value for value in values if not _absent(value))
    return config.kind or next(iter(told)) or kind, whole


def _values(raw: Raw) -> Iterator[Any]:
    for _, _, _, value, _, _ in raw.rows:
        if not _unlabelled(value, raw):
            yield value


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _unlabelled(value: Any, raw: Raw) -> bool:
    """What data sets without labels, and pairs without agreement, have in a label's place."""
    return bool((value == -1 and raw.known) or (value == "-" and raw.fields.label.lower() == "gold_label"))


def rows_of(raw: Raw, kind: Kind, whole: bool, left_out: Counter[str]) -> Part:
    """The rows of a table; `left_out` counts what is not among them.

    Raises:
        UserError: a value that is not what the kind wants, or most texts are empty.
    """
    part, empty = Part(), 0
    left_out.update(raw.table.left_out)
    for place, text, pair, label, words, group in raw.rows:
        if _unlabelled(label, raw):
            left_out["unlabelled"] += 1
            continue
        row = _row(raw, kind, whole, place, (text, pair, label, words), left_out)
        if row is None:
            empty += 1
            continue
        part.rows.append(row)
        part.places.append(place)
        part.groups.append(group)
        part.sources.append(raw.source)
    if empty * 2 > len(raw.rows):
        raise UserError(
            f"{raw.where}: {raw.table.origin}: {empty:,} of {len(raw.rows):,} texts are empty; is "
            f"'{raw.fields.words or raw.fields.text}' the column of the text?"
        )
    left_out["empty texts"] += empty
    return part


def _row(
    raw: Raw, kind: Kind, whole: bool, place: str, values: tuple[Any, Any, Any, Any], left_out: Counter[str]
) -> Row | None:
    """One row; none where its text is empty."""
    text, pair, label, words = values
    where = raw.where
    if kind == "tags":
        return _tagged(raw, place, words, label, left_out)
    if kind == "chat":
        return chat_of(text, place, where, left_out)
    text = text_of(text, place, where)
    second = text_of(pair, place, where) if raw.fields.pair else None
    if not text.strip() or (second is not None and not second.strip()):
        return None
    found: Label
    if kind == "pair":
        found = ""
    elif kind == "span":
        found = answers(label, second or "", f"{where}: {place}")
    elif kind == "text":
        found = text_of(label, place, where)
        if not found.strip():
            return None
    elif kind == "number":
        if _absent(label):
            raise labels.missing(place, where)
        found = labels.number(label, f"{where}: {place}")
    elif _absent(label):
        raise labels.missing(place, where)
    elif kind == "classes":
        found = labels.names(label, raw.known, whole, place, where)
    else:
        one = label[0] if isinstance(label, list) and len(label) == 1 else label
        found = labels.name(one, raw.known, whole, place, where)
        if raw.fields.pair.lower() == "hypo" and found == "contradictory":
            found = "contradiction"  # as the rest of XNLI says
    return Row(text, found, second)


def _tagged(raw: Raw, place: str, words: Any, tags: Any, left_out: Counter[str]) -> Row | None:
    where = raw.where
    words, tags = (v.split() if isinstance(v, str) else v for v in (words, tags))
    if words is None or words == []:
        return None
    if not isinstance(words, list) or not isinstance(tags, list):
        raise UserError(f"{where}: {place} wants a list of words and a list of tags; write both as lists")
    if len(words) != len(tags):
        raise UserError(f"{where}: {place} has {len(words)} words and {len(tags)} tags; give each word one")
    pairs = [(text_of(word, place, where).strip(), tag) for word, tag in zip(words, tags, strict=True)]
    full = [(word, labels.name(_named(tag, place, where), raw.known, False, place, where))
            for word, tag in pairs if word]  # fmt: skip
    left_out["empty words"] += len(pairs) - len(full)
    if not full:
        return None
    own = tuple(word for word, _ in full)
    return Row(" ".join(own), tuple(tag for _, tag in full), None, own)


def _named(tag: Any, place: str, where: str) -> Any:
    if _absent(tag):
        raise labels.missing(place, where)
    return tag
