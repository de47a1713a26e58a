"""Documents from where the text is: the standard library, files, folders, or a `datasets` name.

The default needs no network and no download: the source of the Python standard library on this machine,
test folders and generated tables left out.
"""

import hashlib
import json
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from compress.errors import UserError
from compress.host.files import TEXT_BYTES, at_home, read_text
from compress.text.rows import data_set, parquet_rows, text_lines, text_of

_READABLE = (".txt", ".md", ".rst", ".py", ".jsonl", ".parquet")
_FIELD = "data.text"
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
        yield from standard_library()
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


def standard_library() -> Iterator[Document]:
    """The source of the standard library on this machine, a document per file, in order of path."""
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
    for number, line in text_lines(file, _FIELD):
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f'{_FIELD}: {file}:{number} is no JSON object with a "text" field; write one per line'
            ) from None
        yield Document(f"{name}:{number}", text_of(text, f"{file}:{number}", _FIELD))


def _read_parquet(file: Path, name: str) -> Iterator[Document]:
    for row, (text,) in enumerate(parquet_rows(file, ["text"], _FIELD)):
        yield Document(f"{name}:{row}", text_of(text, f"{file}, row {row}", _FIELD))


def _from_datasets(name: str) -> Iterator[Document]:
    identifier, _, split = name.partition(":")
    rows = data_set(identifier, split or "train", _FIELD)
    if "text" not in rows.column_names:
        raise UserError(
            f"{_FIELD}: data set {name} has no column 'text' (it has {', '.join(rows.column_names)})"
        )
    for index, row in enumerate(rows):
        yield Document(f"{name}:{index}", text_of(row["text"], f"data set {name}, row {index}", _FIELD))
