"""Records of files and data sets, one after the other: lines of JSON, parquet, a `datasets` name.

Read as they come and bounded: a line, a row group and what packed text comes to each have an end. `field` is
that of the recipe that named the file, and begins what is said of a mistake.
"""

from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import MissingExtra, UserError
from compress.host.files import LINE_BYTES

_ROWS = 256  # of a parquet file, at a time: a text that many rows share is stored once
_RATIO, _MORE_BYTES = 100, 1 << 26  # what a file that packs texts may come to: no text packs so well
_WORDS_FOR: dict[type, str] = {
    list: "a list, such as a chat,",
    dict: "an object",
    bytes: "bytes",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


def text_lines(file: Path, field: str) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1.

    Raises:
        UserError: a line without end, or not UTF-8.
    """
    with file.open("rb") as stream:  # in bytes, so that a broken line can be told from the others
        lines = iter(lambda: stream.readline(LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > LINE_BYTES:
                raise UserError(
                    f"{field}: {file}:{number} is longer than the {LINE_BYTES:,} bytes that are read of a "
                    "line; write one record per line, and long texts as files of their own"
                )
            if line.strip():
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError:
                    raise UserError(f"{field}: {file}:{number} is not UTF-8 text; convert it") from None


def parquet_columns(file: Path, field: str) -> list[str]:
    """Names of a parquet file's columns; raises UserError as `parquet_rows`."""
    _require_pyarrow(file)
    from pyarrow import parquet

    try:
        return list(parquet.ParquetFile(file).schema_arrow.names)
    except Exception:  # its readers raise errors of the system's kind for what a file says
        raise _no_parquet(file, field) from None


def parquet_rows(file: Path, columns: Sequence[str], field: str) -> Iterator[tuple[Any, ...]]:
    """The values of some columns, row by row.

    Raises:
        UserError: no such column, no whole parquet file, or more text than such a file can hold.
        MissingExtra: pyarrow is not there.
    """
    _require_pyarrow(file)
    from pyarrow import parquet

    row = 0
    try:
        table = parquet.ParquetFile(file)
        for name in columns:
            if name not in table.schema_arrow.names:
                raise UserError(
                    f"{field}: {file} has no column '{name}' (it has {', '.join(table.schema_arrow.names)})"
                )
        _require_small_groups(table, file, columns, field)
        left = _Room(file, field)
        for batch in table.iter_batches(batch_size=_ROWS, columns=list(columns)):
            parts = [batch.column(name) for name in columns]
            for index in range(batch.num_rows):
                yield tuple(left.plain(part[index]) for part in parts)
                row += 1
    except UnicodeDecodeError:
        raise UserError(f"{field}: {file} is not UTF-8 text after row {row}; convert it") from None
    except (GeneratorExit, UserError):
        raise
    except Exception:
        raise _no_parquet(file, field) from None


class _Room:
    """How much text may still come out of a file."""

    def __init__(self, file: Path, field: str) -> None:
        self.file, self.field = file, field
        self.left = _MORE_BYTES + _RATIO * file.stat().st_size

    def plain(self, scalar: Any) -> Any:
        """A value of pyarrow as one of Python, part by part: a list may hold one text any number of times."""
        import pyarrow as pa

        if not scalar.is_valid:
            return None
        if isinstance(scalar, pa.ListScalar):
            return [self.plain(scalar.values[i]) for i in range(len(scalar.values))]
        if isinstance(scalar, pa.StructScalar):
            return {name: self.plain(value) for name, value in scalar.items()}
        value = scalar.as_py()
        self.left -= len(value) if isinstance(value, (str, bytes)) else 1
        if self.left < 0:
            raise UserError(f"{self.field}: {self.file} holds more than {_RATIO} times its bytes of text")
        return value


def _require_pyarrow(file: Path) -> None:
    if find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "parquet", f"reading {file.name}")


def _no_parquet(file: Path, field: str) -> UserError:
    return UserError(f"{field}: {file} is no whole parquet file; copy or download it again")


def _require_small_groups(table: Any, file: Path, columns: Sequence[str], field: str) -> None:
    """Refuse a parquet file of which too much is read at once: the texts of one row group."""
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        if group.total_byte_size <= LINE_BYTES:
            continue  # a broken record of a column ends the process in pyarrow: looked at where it must be
        chunks = (group.column(i) for i in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.split(".")[0] in columns)
        if size > LINE_BYTES:
            raise UserError(
                f"{field}: {file}: row group {number} holds {size:,} bytes of text where at most "
                f"{LINE_BYTES:,} are read at once; write it with a smaller row_group_size"
            )


def text_of(value: object, place: str, field: str) -> str:
    """A record's text; none where the record has null, as data sets have some.

    Raises:
        UserError: it is something else, or has half a character, which no file of text can hold.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        what = _WORDS_FOR.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"{field}: {place} holds {what} where a text is wanted; write it as one text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise UserError(
            f"{field}: {place} holds half a character ({half} at {error.start}); take it out, or write "
            "the whole one"
        ) from None
    return value


def data_set(identifier: str, split: str | None, field: str) -> Any:
    """A data set by `NAME`, `OWNER/NAME`, either with `/CONFIG`; of two parts the second can be either.

    One split's rows, or a mapping of all splits where `split` is none.

    Raises:
        UserError: it cannot be loaded.
        MissingExtra: `datasets` is not there.
    """
    if find_spec("datasets") is None:
        raise MissingExtra("datasets", "datasets", f"reading the data set {identifier}")
    from datasets import load_dataset

    parts = identifier.split("/")
    ways: list[tuple[str, str | None]] = [("/".join(parts[:2]), parts[2] if parts[2:] else None)]
    if len(parts) == 2:
        ways.append((parts[0], parts[1]))
    reasons = []
    for way in ways:
        try:
            return load_dataset(*way, split=split)
        except Exception as error:  # of the hub, of the network, of the files: it has no error of its own
            reasons.append((str(error).strip() or type(error).__name__).splitlines()[0][:300])
    why = "; ".join(dict.fromkeys(reasons))
    raise UserError(f"{field}: data set '{identifier}' cannot be loaded: {why}")
