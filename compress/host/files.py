"""The door for files that somebody else wrote: bytes, text and JSON, bounded in length and depth.

A small file is read whole, but for no more than `most` bytes, and only if it is a regular one: in its place
may lie a pipe, which would never answer, a device that never ends, or gigabytes. JSON is looked through for
its depth before it is parsed. Whatever is wrong is told in one line that names the file.

Imports nothing heavy: the memory of whoever measures is reported.
"""

import json
import os
import re
import stat
from pathlib import Path
from typing import Any, BinaryIO

from compress.errors import UserError, reason

CONFIGURATION_BYTES = 1 << 22  # of a model's: a library makes objects of all that it holds
SETTINGS_BYTES = 1 << 26  # of a template, an index of weights, other settings
RECORDS_BYTES = 1 << 28  # of records of a run
VOCABULARY_BYTES = 1 << 28  # of a tokenizer
TEXT_BYTES = 1 << 32  # of a document
LINE_BYTES = 1 << 28  # of a line that is a record, and of what of a file of columns is read at once
_PIECE = 1 << 22
DEPTH = 100  # of lists and objects in each other
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_ALL_BUT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))


def require_regular(path: Path) -> int:
    """Bytes of a file; raises UserError where there is none, or what is there is no file."""
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: {_said(error)}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or device"
        raise UserError(f"{path}: is {kind} where a file was expected; put the file in its place")
    return found.st_size


def read_bytes(path: Path, most: int = SETTINGS_BYTES) -> bytes:
    """A whole file.

    Raises:
        UserError: no such file, no regular one, one that cannot be read, or that holds more than `most`.
    """
    size = require_regular(path)
    try:
        # a pipe that was put here since then must not be waited for
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as stream:
            data = _bounded(stream, most) if size <= most else b""
    except OSError as error:
        raise UserError(f"{path}: {_said(error)}") from None
    if size > most or len(data) > most:
        raise UserError(
            f"{path}: {max(size, len(data)):,} bytes where at most {most:,} are read; is it whole?"
        )
    return data


def _bounded(stream: BinaryIO, most: int) -> bytes:
    """What is left, or a little more than `most` bytes of it; memory as it comes, not as it might."""
    parts, length = [], 0
    while length <= most and (part := stream.read(_PIECE)):
        parts.append(part)
        length += len(part)
    return b"".join(parts)


def read_text(path: Path, most: int = SETTINGS_BYTES) -> str:
    """A whole file of UTF-8, line ends as `\\n`; errors as of `read_bytes`, or it is no UTF-8."""
    data = read_bytes(path, most)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text (byte {error.start}); convert it") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path, missing: str = "", most: int = SETTINGS_BYTES) -> dict[str, Any]:
    """A JSON object from a file; raises UserError with `missing` where there is none."""
    if missing and not path.exists():
        raise UserError(missing)
    content = parse_json(read_bytes(path, most), path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: a JSON object was expected")
    return content


def parse_json(data: bytes, place: object) -> Any:
    """The value that JSON stands for; `place`, a file or a line of one, begins what is said of a mistake.

    Raises:
        UserError: not JSON in UTF-8, nested too deeply, a number of thousands of digits.
    """
    try:
        return json_value(data)
    except ValueError as error:
        raise UserError(f"{place}: not readable as JSON ({reason(error)})") from None


def json_value(data: bytes, *, unique: bool = False) -> Any:
    """The same, where another door says what was read; `unique` refuses a name that an object has twice.

    Raises:
        ValueError: as `parse_json`.
    """
    if (deep := json_depth(data)) > DEPTH:
        raise ValueError(f"nested {deep:,} deep, at most {DEPTH} are read")
    return json.loads(data.decode("utf-8"), object_pairs_hook=_once if unique else None)


def json_depth(data: bytes) -> int:
    """How deeply lists and objects lie in each other, whether or not it is JSON.

    >>> json_depth(b'{"a": [1, "[[["], "b": [[]]}')
    3
    """
    deepest = depth = 0
    for bracket in _STRING.sub(b"", data).translate(None, _ALL_BUT_BRACKETS):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


_NAME, _PATH = 255, 4095  # bytes of a name, and of a path


def leaves(name: str) -> bool:
    """Whether a name that somebody else wrote is none of a file in the folder where it is written.

    By the name alone: links are followed, since the hub's cache is made of them.
    """
    parts = Path(name).parts
    odd = not parts or "\0" in name or any(len(part.encode("utf-8", "replace")) > _NAME for part in parts)
    return odd or Path(name).is_absolute() or ".." in parts


def at_home(path: str | Path) -> Path:
    """A path in which `~` is somebody's home; raises UserError where nobody has that name, or no file can be
    called so."""
    long = next((p for p in Path(path).parts if len(p.encode("utf-8", "replace")) > _NAME), None)
    if long is not None or len(str(path).encode("utf-8", "replace")) > _PATH:
        raise UserError(f"'{str(path)[:80]}...' is too long for the name of a file; shorten it")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: nobody has that home here; write the path out") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r:.60} is given twice")
    return content


def _said(error: OSError) -> str:
    return "no such file" if isinstance(error, FileNotFoundError) else (error.strerror or reason(error))
