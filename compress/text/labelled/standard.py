"""Labelled rows without a network: from the source of the standard library on this machine.

`stdlib:package`: snippets of eight lines; the label is the package that they come from, of the ten
packages with the most text. `stdlib:kinds`: lines as words; each has its kind as its tag, as Python's
`tokenize` tells it. `stdlib:docstring`: functions without their docstring; the target is its first line.
`stdlib:passages`: such a first line as a query, with functions as passages: its own, which is right (1), and
up to four others of the same file, drawn, which are not (0).

Rows of a file go to one part together, and a text that another file has too, or nearly, is left out, so
that files can be divided. Which rows are taken depends on the library alone. Other versions of Python
give others.
"""

import ast
import hashlib
import io
import keyword
import re
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from compress.errors import UserError, nearest
from compress.text.documents import Document, standard_library
from compress.text.labelled.duplicates import grouped, normal_form
from compress.text.labelled.tables import Table

NAMES = ("stdlib:package", "stdlib:kinds", "stdlib:docstring", "stdlib:passages")
PACKAGES, SNIPPET = 10, 8  # how many; lines
_LEAST_FILES = 8  # of a package, so that every part gets some
_PER_PACKAGE, _PER_FILE, _ROWS = 300, 16, 3000
_LINE_WORDS, _LONGEST_WORD = (4, 40), 60
_FILES, _FILE_CHARACTERS = 320, 40_000  # read word by word, which takes longest
_FUNCTION_LINES = (3, 40)
_SUMMARY_WORDS = (3, 25)
_KINDS = {
    tokenize.NUMBER: "number", tokenize.STRING: "string", tokenize.COMMENT: "comment",
    tokenize.OP: "operator",
}  # fmt: skip
_OPENING, _CLOSING = "([{", ")]}"

_COLUMNS: dict[str, tuple[str, ...]] = {
    "stdlib:kinds": ("tokens", "tags"), "stdlib:docstring": ("function", "summary"),
    "stdlib:passages": ("query", "passage", "label"),
}  # fmt: skip
_WRONG = 4  # passages of a query

_Row = tuple[str, tuple[Any, ...], str]  # place, values, file


def table(source: str, where: str) -> Table:
    """One of the tables; raises UserError for another name."""
    if source not in NAMES:
        raise UserError(f"{where}: '{source}' is no labelled data of the library; {nearest(source, NAMES)}")
    columns = _COLUMNS.get(source, ("text", "label"))
    rows = _rows(source)

    def read(names: Sequence[str]) -> Iterator[tuple[str, tuple[Any, ...]]]:
        places = [columns.index(name) for name in names]
        for place, values, _ in rows:
            yield place, tuple(values[i] for i in places)

    return Table(source, columns, read, groups=tuple(file for _, _, file in rows))


@cache
def _rows(source: str) -> tuple[_Row, ...]:
    documents = list(standard_library())
    if source == "stdlib:passages":
        return tuple(_passages(_rows("stdlib:docstring")))
    make = {"stdlib:package": _snippets, "stdlib:kinds": _lines, "stdlib:docstring": _functions}[source]
    return tuple(_once(list(make(documents))))


def _once(rows: list[_Row]) -> Iterator[_Row]:
    """Rows without those that are like one before."""
    texts = [text if isinstance(text, str) else " ".join(text) for _, (text, *_), _ in rows]
    for index, (first, row) in enumerate(zip(grouped([normal_form(t) for t in texts]), rows, strict=True)):
        if first == index:
            yield row


def _chosen(rows: list[_Row], most: int) -> list[_Row]:
    """At most so many, drawn by their texts, in their order."""
    order = sorted(range(len(rows)), key=lambda i: hashlib.sha256(repr(rows[i][1]).encode()).digest())
    return [rows[i] for i in sorted(order[:most])]


def _snippets(documents: list[Document]) -> Iterator[_Row]:
    packages: dict[str, list[Document]] = defaultdict(list)
    for document in documents:
        if "/" in document.name:
            packages[document.name.split("/")[0]].append(document)
    sizes = {
        name: sum(len(d.text) for d in files)
        for name, files in packages.items()
        if len(files) >= _LEAST_FILES
    }
    for package, _ in Counter(sizes).most_common(PACKAGES):
        rows: list[_Row] = []
        for document in packages[package]:
            lines = [line for line in document.text.split("\n") if line.strip()]
            for start in range(0, len(lines) - SNIPPET + 1, SNIPPET):
                snippet = "\n".join(lines[start : start + SNIPPET])
                rows.append(
                    (f"{document.name}, snippet {start // SNIPPET}", (snippet, package), document.name)
                )
        yield from _chosen(rows, _PER_PACKAGE)


def _lines(documents: list[Document]) -> Iterator[_Row]:
    rows: list[_Row] = []
    for document in _some(documents):
        rows += _chosen([row for row in _tokens(document) if _short(row[1][0])], _PER_FILE)
    yield from _chosen(rows, _ROWS)


def _some(documents: list[Document]) -> list[Document]:
    """Files of ordinary length, drawn by their names."""
    short = [d for d in documents if len(d.text) <= _FILE_CHARACTERS]
    return sorted(short, key=lambda d: hashlib.sha256(d.name.encode()).digest())[:_FILES]


def _short(words: list[str]) -> bool:
    return _LINE_WORDS[0] <= len(words) <= _LINE_WORDS[1] and max(map(len, words)) <= _LONGEST_WORD


def _tokens(document: Document) -> Iterator[_Row]:
    """The words of each logical line and their kinds; spaces in a word become `_`, since it is one word."""
    words: list[str] = []
    kinds: list[str] = []
    try:
        for token in tokenize.generate_tokens(io.StringIO(document.text).readline):
            if token.type == tokenize.NEWLINE:
                if words:
                    yield f"{document.name}:{token.start[0]}", (words, kinds), document.name
                words, kinds = [], []
            elif kind := _kind(token):
                words.append(re.sub(r"\s+", "_", token.string))
                kinds.append(kind)
    except (tokenize.TokenError, SyntaxError):
        return  # a file that is not of this Python: its lines so far count


def _kind(token: tokenize.TokenInfo) -> str | None:
    if not token.string.strip():
        return None
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "keyword"
        return "name"
    if token.type == tokenize.OP and token.string in [*_OPENING, *_CLOSING]:
        return "bracket"
    if tokenize.tok_name[token.type].startswith("FSTRING"):
        return "string"  # the parts of one, from Python 3.12 on
    return _KINDS.get(token.type)


def _functions(documents: list[Document]) -> Iterator[_Row]:
    rows: list[_Row] = []
    for document in documents:
        rows += _chosen(list(_documented(document)), _PER_FILE)
    yield from _chosen(rows, _ROWS)


def _passages(functions: Sequence[_Row]) -> Iterator[_Row]:
    """Queries with their passages, in the order of the functions; of a file with one function none."""
    files: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for _, (function, summary), file in functions:
        files[file][summary].append(function)
    for file, summaries in files.items():
        for summary, right in summaries.items():
            wrong = [each for other, found in summaries.items() if other != summary for each in found]
            wrong.sort(key=lambda each: hashlib.sha256(f"{summary}\0{each}".encode()).digest())
            passages = [*((each, "1") for each in right), *((each, "0") for each in wrong[:_WRONG])]
            for number, (passage, label) in enumerate(passages if wrong else ()):
                yield f"{file}, '{summary:.40}', passage {number}", (summary, passage, label), file


def _documented(document: Document) -> Iterator[_Row]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes in somebody else's strings
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError):
        return
    lines = document.text.split("\n")
    for node in ast.walk(tree):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or len(node.body) < 2:
            continue
        told, end = ast.get_docstring(node), node.end_lineno
        summary = told.strip().split("\n")[0].strip() if told and told.strip() else ""
        if not _SUMMARY_WORDS[0] <= len(summary.split()) <= _SUMMARY_WORDS[1] or end is None:
            continue
        doc = node.body[0]
        before, after = lines[node.lineno - 1 : doc.lineno - 1], lines[(doc.end_lineno or end) : end]
        if not before or not _FUNCTION_LINES[0] <= len(before) + len(after) <= _FUNCTION_LINES[1]:
            continue  # a docstring on the line of its function is in the text
        margin = len(before[0]) - len(before[0].lstrip())
        source = "\n".join(line[margin:] if not line[:margin].strip() else line for line in before + after)
        if summary not in source:  # else it is there to be copied
            yield f"{document.name}:{node.lineno}", (source.rstrip(), summary), document.name
