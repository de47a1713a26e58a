"""Files of rows: which columns there are, and their values row by row, with the place of each.

`.csv` and `.tsv` begin with a header. A field in quotes may hold the delimiter, line ends, and quotes
written twice. A `.tsv` whose quotes do not come out even, or swallow lines that are rows by themselves,
is read as text without quoting, as the files of GLUE are. A row of another width than the header is
refused, except in files of GLUE, which hold some: there it is left out and counted.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compress.errors import UserError, reason
from compress.host.files import RECORDS_BYTES, TEXT_BYTES, json_value, parse_json, read_bytes, read_text
from compress.text.labelled.conll import sentences
from compress.text.labelled.squad import questions
from compress.text.rows import data_set, parquet_columns, parquet_rows, text_lines

SUFFIXES = (".tsv", ".csv", ".jsonl", ".json", ".parquet", ".conll", ".bio", ".iob", ".iob2")
_OTHER_CHATS = ("conversations", "conversation")  # laid out in ways of their own
_COLA = ("source", "label", "star", "sentence")  # it ships without a header
_GLUE = (  # columns by which a file of GLUE or XNLI is known: its quotes are text
    {"quality", "#1 string", "#2 string"},
    {"genre", "sentence1", "sentence2", "score"},
    {"qid1", "question1", "question2", "is_duplicate"},
    {"pairid", "sentence1", "sentence2", "gold_label"},
    {"promptid", "sentence1", "sentence2"},
    {"index", "question", "sentence", "label"},
    {"index", "sentence1", "sentence2", "label"},
    {"premise", "hypo", "label"},
)

Read = Callable[[Sequence[str]], Iterator[tuple[str, tuple[Any, ...]]]]


@dataclass(frozen=True)
class Table:
    """Rows of one file or split.

    Attributes:
        columns: their names.
        read: the values of some columns, each row with its place, such as `rows.csv:7`.
        names: of columns whose values are numbers of names: the names.
        groups: of each row, where rows belong together; a part gets a whole group.
        left_out: what reading left out, counted while it reads.
    """

    origin: str
    columns: tuple[str, ...]
    read: Read
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    left_out: Counter[str] = field(default_factory=Counter)


def open_table(file: Path, where: str, kind: str | None) -> Table:
    """A file as a table; `where` is the field of the recipe that named it.

    Raises:
        UserError: a kind of file that is not read, or a file that is not what its name says.
    """
    suffix = file.suffix.lower()
    if suffix in (".csv", ".tsv") or (suffix == ".txt" and file.name.startswith("msr_paraphrase")):
        return _delimited(file, where, tabs=suffix != ".csv")
    if suffix == ".jsonl":
        return _records(file, where, list(_json_lines(file, where)), kind)
    if suffix == ".json":
        return _json(file, where, kind)
    if suffix == ".parquet":
        return _parquet(file, where, kind)
    if suffix in (".conll", ".bio", ".iob", ".iob2") or (suffix == ".txt" and kind == "tags"):
        return _conll(file, where)
    raise UserError(f"{where}: {file} is of no kind that is read; give {', '.join(sorted(SUFFIXES))}")


def _delimited(file: Path, where: str, *, tabs: bool) -> Table:
    content = read_text(file, TEXT_BYTES).removeprefix("\ufeff")
    head = content.partition("\n")[0]
    delimiter = "\t" if tabs else next((d for d in ",;\t" if d in head), ",")
    header = [name.strip() for name in head.split("\t")]
    cola = len(header) == 4 and header[1] in ("0", "1") and header[2] in ("", "*")
    glue = tabs and (cola or any(known <= {name.lower() for name in header} for known in _GLUE))
    left_out: Counter[str] = Counter()
    if glue:
        lines = _unquoted(content)
    else:
        lines = _quoted(content, delimiter, file, where)
        if tabs:
            lines = _tabs(lines, content)
    first = next(lines, None)
    if first is None:
        raise UserError(f"{where}: {file} is empty; its first line names the columns, then come rows")
    columns = _COLA if cola else tuple(name.strip() for name in first[1])
    rows = [first, *lines] if cola else list(lines)
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{where}: {file} has the column '{twice}' twice; rename one")
    kept = []
    for number, values in rows:
        if len(values) == len(columns):
            kept.append((f"{file}:{number}", values))
        elif glue:
            left_out["broken rows"] += 1
        else:
            raise UserError(
                f"{where}: {file}:{number} has {len(values)} fields where the header has {len(columns)} "
                f"({', '.join(columns)}); put fields that hold the delimiter or a line end into quotes"
            )

    def read(names: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        places = [columns.index(name) for name in names]
        for place, values in kept:
            yield place, tuple(values[i] for i in places)

    return Table(str(file), columns, read, left_out=left_out)


_Lines = Iterator[tuple[int, list[str]]]


def _unquoted(content: str) -> _Lines:
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, line.split("\t")


def _quoted(content: str, delimiter: str, file: Path, where: str) -> _Lines:
    """Rows with the numbers of the lines where they begin."""
    reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, strict=True)
    begins = 1
    try:
        for values in reader:
            if any(value.strip() for value in values):
                yield begins, values
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{where}: {file}:{begins} is not readable ({reason(error)}); quotes in a quoted field are "
            "written twice, and texts too long for a field go into .jsonl"
        ) from None


def _tabs(lines: _Lines, content: str) -> _Lines:
    """As quoted or, where quotes do not come out even or swallow whole lines, as text without quoting."""
    try:
        rows = list(lines)
    except UserError:
        rows = []
    plain = list(_unquoted(content))
    even, plainly = ({len(values) for _, values in found} for found in (rows, plain))
    swallowed = len(plainly) == 1 and (len(rows) < len(plain) or plainly != even)
    return iter(plain if not rows or swallowed else rows)


def _json_lines(file: Path, where: str) -> Iterator[tuple[str, Any]]:
    for number, line in text_lines(file, where):
        yield f"{file}:{number}", parse_json(line.encode(), f"{where}: {file}:{number}")


def _json(file: Path, where: str, kind: str | None) -> Table:
    try:
        content = json_value(read_bytes(file, RECORDS_BYTES).removeprefix(b"\xef\xbb\xbf"))
    except ValueError as error:
        raise UserError(f"{where}: {file}: not readable as JSON ({reason(error)})") from None
    data = content.get("data") if isinstance(content, dict) else content
    if not isinstance(data, list):
        raise UserError(
            f"{where}: {file} is neither a list of rows nor laid out as SQuAD (data, paragraphs, qas)"
        )
    if data and isinstance(data[0], dict) and "paragraphs" in data[0]:
        return _records(file, where, list(questions(data, file, where)), kind)
    return _records(file, where, [(f"{file}, row {i}", row) for i, row in enumerate(data)], kind)


def _records(file: Path, where: str, rows: list[tuple[str, Any]], kind: str | None) -> Table:
    if not rows:
        raise UserError(f"{where}: {file} holds no rows")
    columns: dict[str, None] = {}
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{where}: {place} is no JSON object; write one per row, its fields by name")
        columns.update(dict.fromkeys(row))
    listed = [name for name in columns if isinstance(rows[0][1].get(name), list)]
    _refuse_other_chats(listed, kind, rows[0][0], where)

    def read(names: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        for place, row in rows:
            yield place, tuple(row.get(name) for name in names)

    return Table(str(file), tuple(columns), read)


def _refuse_other_chats(columns: Sequence[str], kind: str | None, place: str, where: str) -> None:
    if kind is None and "messages" not in columns and (own := [n for n in columns if n in _OTHER_CHATS]):
        raise UserError(
            f"{where}: {place} holds a chat ('{own[0]}') in another layout than is read; write it as "
            "'messages', a list of {role, content}"
        )


def _parquet(file: Path, where: str, kind: str | None) -> Table:
    columns = tuple(parquet_columns(file, where))
    _refuse_other_chats(columns, kind, str(file), where)

    def read(names: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        distinct = list(dict.fromkeys(names))
        for index, values in enumerate(parquet_rows(file, distinct, where)):
            row = dict(zip(distinct, values, strict=True))
            yield f"{file}, row {index}", tuple(row[name] for name in names)

    return Table(str(file), columns, read)


def _conll(file: Path, where: str) -> Table:
    left_out: Counter[str] = Counter()
    rows = list(sentences(read_text(file, TEXT_BYTES).removeprefix("\ufeff"), file, where, left_out))

    def read(names: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        for number, words, tags in rows:
            yield f"{file}:{number}", tuple(words if name == "tokens" else tags for name in names)

    return Table(str(file), ("tokens", "tags"), read, left_out=left_out)


def data_set_tables(name: str, where: str) -> dict[str, Table]:
    """The splits of a data set by their names; the one that is named, as `train`."""
    identifier, _, split = name.partition(":")
    found = data_set(identifier, split or None, where)
    splits = {"train": found} if split else dict(found)
    return {part: _of_data_set(name, part, rows) for part, rows in splits.items()}


def _of_data_set(name: str, part: str, rows: Any) -> Table:
    features = getattr(rows, "features", None) or {}
    names = {column: known for column in rows.column_names if (known := _known(features.get(column)))}

    def read(wanted: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        for index, row in enumerate(rows):
            yield f"data set {name} {part}, row {index}", tuple(row[column] for column in wanted)

    return Table(f"data set {name}", tuple(rows.column_names), read, names)


def _known(feature: Any) -> tuple[str, ...]:
    """The names that a column's numbers stand for, in lists too."""
    names = getattr(feature, "names", None) or getattr(getattr(feature, "feature", None), "names", None)
    return tuple(names or ())
