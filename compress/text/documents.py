"""Documents from where the text is: the standard library, files, folders, or a `datasets` name.

The default needs no network and no download: the source of the Python standard library on this machine,
test folders and generated tables left out.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import MissingExtra, UserError
from compress.host.files import LINE_BYTES, TEXT_BYTES, at_home, read_text

_READABLE = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
_ROWS = 256  # of a parquet file, at a time: a text that many rows share is stored once
_RATIO, _MORE_BYTES = 100, 1 << 26  # what a file that packs texts may come to: no text packs so well
_LEFT_OUT = {
    "encodings",  # generated tables, near copies of one another: what is learnt from one scores on the next
    "pydoc_data",
    "test",
    "tests",
    "idle_test",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "lib2to3",
}


_WORDS_FOR: dict[type, str] = {
    list: "a list, such as a chat,",
    dict: "an object",
    bytes: "bytes",
    int: "a number",
    float: "a number",
    bool: "true or false",
}


@dataclass(frozen=True)
class Document:
    """A named text; `ends` is false for a piece that is followed by the next one of the same text."""

    name: str
    text: str
    ends: bool = True


def load_documents(source: str | Sequence[str]) -> list[Document]:
    """All documents of a source or of several.

    Raises:
        UserError: nothing there, no text in it, or a kind of file that is not read.
    """
    sources = [source] if isinstance(source, str) else list(source)
    documents = [d for s in sources for d in _load(s) if d.text.strip()]
    if not documents:
        raise UserError(f"data.text: {', '.join(sources)} holds no text")
    return documents


def text_hash(source: str | Sequence[str]) -> str:
    """SHA-256 of all documents of a source or of several."""
    digest = hashlib.sha256()
    for document in load_documents(source):
        digest.update(f"{document.name}\0{document.text}\0".encode())
    return digest.hexdigest()


def _load(source: str) -> Iterator[Document]:
    if source == "stdlib":
        yield from _standard_library()
    elif source.startswith("datasets:"):
        yield from _from_datasets(source.removeprefix("datasets:"))
    else:
        path = at_home(source)
        if path.is_dir():
            files = [p for p in sorted(path.rglob("*")) if p.suffix in _READABLE and p.is_file()]
            if not files:
                raise UserError(f"data.text: {path} holds no {', '.join(_READABLE)} file")
            for file in files:
                yield from _read(file, str(file.relative_to(path)))
        elif path.is_file():
            yield from _read(path, path.name)
        else:
            raise UserError(
                f"data.text: '{source}' does not exist (file, folder, 'stdlib' or 'datasets:NAME')"
            )


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).parts
        if not _LEFT_OUT.intersection(parts):
            yield Document("/".join(parts), file.read_text(encoding="utf-8", errors="replace"))


def _read(file: Path, name: str) -> Iterator[Document]:
    if file.suffix == ".jsonl":
        yield from _read_jsonl(file, name)
    elif file.suffix == ".parquet":
        yield from _read_parquet(file, name)
    else:
        # a mark of the encoding is no text
        yield Document(name, read_text(file, TEXT_BYTES).removeprefix("\ufeff"))


def _read_jsonl(file: Path, name: str) -> Iterator[Document]:
    with file.open("rb") as stream:  # in bytes, so that a broken line can be told from the others
        lines = iter(lambda: stream.readline(LINE_BYTES + 1), b"")
        for number, line in enumerate(lines, start=1):
            if len(line) > LINE_BYTES:
                raise UserError(
                    f"data.text: {file}:{number} is longer than the {LINE_BYTES:,} bytes that are read of a "
                    "line; write one record per line, and long texts as files of their own"
                )
            if not line.strip():
                continue
            try:
                text = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))["text"]
            except UnicodeDecodeError:
                raise UserError(f"data.text: {file}:{number} is not UTF-8 text; convert it") from None
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f'data.text: {file}:{number} is no JSON object with a "text" field; write one per line'
                ) from None
            yield Document(f"{name}:{number}", _text(text, f"{file}:{number}"))


def _read_parquet(file: Path, name: str) -> Iterator[Document]:
    if find_spec("pyarrow") is None:
        raise MissingExtra("pyarrow", "parquet", f"reading {file.name}")
    from pyarrow import parquet

    row = 0
    try:
        table = parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise UserError(
                f"data.text: {file} has no column 'text' (it has {', '.join(table.schema_arrow.names)})"
            )
        _require_small_groups(table, file)
        left = _MORE_BYTES + _RATIO * file.stat().st_size
        for batch in table.iter_batches(batch_size=_ROWS, columns=["text"]):
            for entry in batch.column(0):
                text = _text(entry.as_py(), f"{file}, row {row}")
                left -= len(text)
                if left < 0:
                    raise UserError(f"data.text: {file} holds more than {_RATIO} times its bytes of text")
                yield Document(f"{name}:{row}", text)
                row += 1
    except UnicodeDecodeError:
        raise UserError(f"data.text: {file} is not UTF-8 text after row {row}; convert it") from None
    except (GeneratorExit, UserError):
        raise
    except Exception:  # its readers raise errors of the system's kind for what a file says
        raise UserError(f"data.text: {file} is no whole parquet file; copy or download it again") from None


def _require_small_groups(table: Any, file: Path) -> None:
    """Refuse a parquet file of which too much is read at once: the texts of one row group."""
    for number in range(table.metadata.num_row_groups):
        group = table.metadata.row_group(number)
        columns = (group.column(i) for i in range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in columns if c.path_in_schema.split(".")[0] == "text")
        if size > LINE_BYTES:
            raise UserError(
                f"data.text: {file}: row group {number} holds {size:,} bytes of text where at most "
                f"{LINE_BYTES:,} are read at once; write it with a smaller row_group_size"
            )


def _text(value: object, place: str) -> str:
    """A record's text; none where the record has null, as data sets have some.

    Raises:
        UserError: it is something else, or has half a character, which no file of text can hold.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        what = _WORDS_FOR.get(type(value), f"a {type(value).__name__}")
        raise UserError(f"data.text: {place} holds {what} where a text is wanted; write it as one text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise UserError(
            f"data.text: {place} holds half a character ({half} at {error.start}); take it out, or write "
            "the whole one"
        ) from None
    return value


def _from_datasets(name: str) -> Iterator[Document]:
    if find_spec("datasets") is None:
        raise MissingExtra("datasets", "datasets", f"reading the data set {name}")
    identifier, _, split = name.partition(":")
    rows = _rows(identifier, split or "train")
    if "text" not in rows.column_names:
        raise UserError(
            f"data.text: data set {name} has no column 'text' (it has {', '.join(rows.column_names)})"
        )
    for index, row in enumerate(rows):
        yield Document(f"{name}:{index}", _text(row["text"], f"data set {name}, row {index}"))


def _rows(identifier: str, split: str) -> Any:
    """A data set by `NAME`, `OWNER/NAME`, either with `/CONFIG`; of two parts the second can be either."""
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
    raise UserError(f"data.text: data set '{identifier}' cannot be loaded: {why}")
