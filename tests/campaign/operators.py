"""How inputs are damaged: by bytes, as text, as JSON or YAML, and as headers of weights that stay parseable.

Each operator takes a file, a folder of whole inputs and a generator of chances, changes the file, and says in
words what it did; None where it does not fit the file.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import yaml

Operator = Callable[[Path, Random], str | None]

_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 16, 100, 2**15, 2**31, 2**32 + 1, 2**63, -(2**63), 10**30, 0.5,
    -0.5, 1e-30, 1e30, 1e308, float("inf"), float("nan"), "", "x", "1", "0", "../../x", "/etc/passwd",
    "\u0000", "\ud800", "a" * 70_000, [], [1], ["x"], {}, {"x": 1}, [[[[]]]], [0] * 1000,
]  # fmt: skip


def _bytes(path: Path) -> bytearray | None:
    data = bytearray(path.read_bytes()) if path.is_file() else None
    return data or None


def flip(path: Path, chance: Random) -> str | None:
    """One bit, or some bytes."""
    if (data := _bytes(path)) is None:
        return None
    if chance.random() < 0.6:
        place, bit = chance.randrange(len(data)), chance.randrange(8)
        data[place] ^= 1 << bit
        said = f"bit {bit} of byte {place} flipped"
    else:
        place, count = chance.randrange(len(data)), chance.choice((1, 2, 4, 8))
        data[place : place + count] = chance.randbytes(min(count, len(data) - place))
        said = f"{count} bytes at {place} drawn anew"
    path.write_bytes(data)
    return said


def cut(path: Path, chance: Random) -> str | None:
    """Cut off, filled up, or without its beginning."""
    if (data := _bytes(path)) is None:
        return None
    place = chance.choice((0, 1, 8, len(data) // 2, len(data) - 1, chance.randrange(len(data))))
    how = chance.randrange(4)
    if how < 2:
        del data[place:]
    elif how == 2:
        data += chance.choice((b"\0", b"\0" * 4096, bytes(data[:100]), b"\n", b"}"))
    else:
        del data[: max(1, place)]
    path.write_bytes(data)
    return f"{('cut at', 'cut at', 'longer, not at', 'begins at')[how]} {place}"


def smear(path: Path, chance: Random) -> str | None:
    """A range of zeros, a part twice, gone, or over another."""
    if (data := _bytes(path)) is None:
        return None
    start, length = chance.randrange(len(data)), chance.choice((1, 4, 16, 64, 512, 4096))
    part, to = bytes(data[start : start + length]), chance.randrange(len(data))
    how = chance.randrange(5)
    if how == 0:
        data[start : start + length] = bytes(len(part))
    elif how == 1:
        data[start:start] = part
    elif how == 2:
        del data[start : start + length]
    elif how == 3:
        data[to : to + len(part)] = part[: len(data) - to]
    else:
        data[start : start + length] = b"\xff" * len(part)
    path.write_bytes(data)
    return f"{len(part)} bytes at {start} {('zeroed', 'twice', 'gone', f'put at {to}', 'all ones')[how]}"


def misplace(path: Path, chance: Random) -> str | None:
    """The file gone, empty, a folder, a pipe, a link to nothing or to itself, or another's in its place."""
    others = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p != path]
    how = chance.randrange(8)
    if how >= 6 and not others:
        how -= 6
    if how < 6:
        path.unlink(missing_ok=True)
    if how == 1:
        path.touch()
    elif how == 2:
        path.mkdir()
    elif how == 3:
        os.mkfifo(path)
    elif how == 4:
        path.symlink_to(path.parent / "nothing")
    elif how == 5:
        path.symlink_to(path)
    elif how >= 6:
        other, spare = chance.choice(others), path.with_name("spare")
        if how == 6:
            path.rename(spare)
            other.rename(path)
            spare.rename(other)
        else:
            shutil.copyfile(other, path)
        return f"{('swapped with', 'replaced by')[how - 6]} {other.name}"
    return ("gone", "empty", "a folder", "a pipe", "a link to nothing", "a link to itself")[how]


def words(path: Path, chance: Random) -> str | None:
    """Text: no UTF-8, another word or number, brackets, a giant value, lines twice or gone."""
    if (data := _bytes(path)) is None:
        return None
    text, how = bytes(data), chance.randrange(8)
    place = chance.randrange(len(text))
    if how == 0:
        put = chance.choice((b"\xff", b"\x80", b"\xed\xa0\x80", b"\0", b"\x1b[31m", b"\xef\xbb\xbf", b"\r"))
        text = text[:place] + put + text[place:]
    elif how in (1, 2):
        found = list(re.finditer(rb"-?\d+(?:\.\d+)?" if how == 1 else rb"[A-Za-z_]\w+", text))
        if not found:
            return None
        one = chance.choice(found)
        others = (
            b"-1",
            b"0",
            b"9" * 5000,
            b"1e999",
            b"null",
            b'"x"',
            b"[]",
            b"1.5",
            b"16777216",
            b"NaN",
            b"x",
        )
        text = text[: one.start()] + chance.choice(others) + text[one.end() :]
    elif how == 3:
        text = text[:place] + chance.choice((b"[", b"{", b'"', b"'", b"}", b"]", b",", b":")) + text[place:]
    elif how == 4:
        text = (
            text[:place] + chance.choice((b"[", b"x", b'{"a":', b"\n", b" ", b"a: ")) * 50_000 + text[place:]
        )
    else:
        lines = text.split(b"\n")
        at, to = chance.randrange(len(lines)), chance.randrange(len(lines))
        if how == 5:
            lines.insert(to, lines[at])
        elif how == 6:
            del lines[at]
        else:
            lines[at], lines[to] = lines[to], lines[at]
        text = b"\n".join(lines)
    path.write_bytes(text)
    return f"text, way {how} at {place}"


def json_value(path: Path, chance: Random) -> str | None:
    """A value of JSON, anywhere, of another kind or size, renamed, gone, twice, deeper; it stays JSON."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    said = _change(content, chance)
    if said is None:
        return None
    path.write_text(json.dumps(content), encoding="utf-8", errors="surrogatepass")
    return said


def json_line(path: Path, chance: Random) -> str | None:
    """The same in one line of many."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        at = chance.randrange(len(lines))
        content = json.loads(lines[at])
    except (OSError, ValueError):
        return None
    said = _change(content, chance)
    lines[at] = json.dumps(content)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return said and f"line {at}: {said}"


def yaml_value(path: Path, chance: Random) -> str | None:
    """The same in YAML."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        said = _change(content, chance)
        path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return said


def _places(value: Any, path: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Every place of a value: what holds it, its key or index, its path."""
    keys = value if isinstance(value, dict) else range(min(len(value), 50)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key, f"{path}.{key}"
        yield from _places(value[key], f"{path}.{key}")


def _change(content: Any, chance: Random) -> str | None:
    places = list(_places(content))
    if not places:
        return None
    # the upper places are few, and matter more
    top = [place for place in places if place[2].count(".") <= 2]
    holder, key, at = chance.choice(top if chance.random() < 0.4 else places)
    held, how = holder[key], chance.randrange(10)
    if how == 0:
        del holder[key]
        return f"{at} gone"
    if how == 1 and isinstance(holder, dict):
        holder[chance.choice((f"{key}_", "x", str(key).upper(), "")) or "y"] = holder.pop(key)
        return f"{at} renamed"
    if how == 2:
        other_holder, other_key, other = chance.choice(places)
        other_value = other_holder.get(other_key) if isinstance(other_holder, dict) else None
        holder[key] = json.loads(json.dumps(other_value))
        return f"{at} as {other}"
    if how == 3:
        value: Any = held
        for _ in range(chance.choice((1, 3, 60, 300))):
            value = [value] if chance.random() < 0.5 else {"x": value}
        holder[key] = value
        return f"{at} deeper"
    if how <= 6 and isinstance(held, int | float) and not isinstance(held, bool):
        holder[key] = chance.choice((held + 1, held - 1, held * 2, -held, held // 2, held + 0.5, str(held)))
        return f"{at}: {held} -> {holder[key]}"
    if how == 7 and isinstance(held, str) and held:
        where = chance.randrange(len(held))
        holder[key] = held[:where] + chance.choice(("", "x", " ", "\x1b[2J", "é", held)) + held[where + 1 :]
        return f"{at}: {held[:40]!r} -> {holder[key][:40]!r}"
    if how == 8 and isinstance(held, list) and held:
        holder[key] = chance.choice((held[::-1], held + held, held[1:], held[:1] * 999))
        return f"{at}: a list of {len(held)} -> {len(holder[key])}"
    holder[key] = chance.choice(_VALUES)
    return f"{at}: {held!r:.40} -> {holder[key]!r:.40}"


def tensor_header(path: Path, chance: Random) -> str | None:
    """The header of a safetensors file: names, kinds, shapes and places that others have; it stays JSON."""
    data = _bytes(path)
    if data is None or len(data) < 9:
        return None
    length = struct.unpack("<Q", data[:8])[0]
    try:
        header = json.loads(data[8 : 8 + length])
    except ValueError:
        return None
    names = [name for name in header if name != "__metadata__"]
    if not names:
        return None
    one, other = header[chance.choice(names)], header[chance.choice(names)]
    name = chance.choice(names)
    how = chance.randrange(11)
    if how == 0:
        one["data_offsets"], other["data_offsets"] = other["data_offsets"], one["data_offsets"]
    elif how == 1:
        one["shape"] = one["shape"][::-1]
    elif how == 2:
        one["shape"] = chance.choice(
            ([], [1, *one["shape"]], [0], [-1], [2**62, 4], [2**31, 2**31, 0], ["4"])
        )
    elif how == 3:
        one["dtype"] = chance.choice(
            ("F32", "I32", "U32", "F64", "BOOL", "F8_E4M3", "F33", None, 5, "BF16", "F16")
        )
    elif how == 4 and one["dtype"] == "F32" and one["shape"]:
        one["dtype"], one["shape"] = (
            chance.choice(("F16", "BF16")),
            [*one["shape"][:-1], one["shape"][-1] * 2],
        )
    elif how == 5:
        header[f"{name}_"] = header.pop(name)
    elif how == 6:
        del header[name]
    elif how == 7:
        second = chance.choice(names)
        header[name], header[second] = header[second], header[name]
    elif how == 8:
        one["data_offsets"] = [p + chance.choice((-4, -1, 1, 4, 2**40)) for p in one["data_offsets"]]
    elif how == 9:
        header["__metadata__"] = chance.choice(
            ({"format": "np"}, {"format": 5}, [], "x", {}, {"a": "b" * 9999})
        )
    else:
        said = _change(header, chance)
        if said is None:
            return None
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data[8 + length :]))
    return f"header, way {how} of '{name}'"


def gguf_header(path: Path, chance: Random) -> str | None:
    """A count, length, type or value in the header of a GGUF file."""
    data = _bytes(path)
    if data is None:
        return None
    try:
        fields = list(_gguf_fields(bytes(data)))
    except (struct.error, ValueError, KeyError, IndexError):
        return None
    what, place, form = chance.choice(
        fields if chance.random() < 0.5 else [f for f in fields if f[0] != "text"]
    )
    if form == "s":
        data[place] = chance.choice((0, 0x41, 0xFF, data[place] ^ 1))
        said = "another letter"
    else:
        (old,) = struct.unpack_from(f"<{form}", data, place)
        top = 2 ** (8 * struct.calcsize(form)) - 1
        if form in "fd":
            new: Any = chance.choice((0.0, -1.0, float("nan"), float("inf"), 1e30, 1e-30, old * 2))
        else:
            new = (
                chance.choice((0, 1, 2, 3, 8, 32, 255, old + 1, old - 1, old * 2, top, top // 2, 2**30)) & top
            )
            new = new - top - 1 if form in "bhiq" and new > top // 2 else new
        struct.pack_into(f"<{form}", data, place, bool(new) if form == "?" else new)
        said = f"{old} -> {new}"
    path.write_bytes(data)
    return f"{what} at {place}: {said}"


_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def _gguf_fields(data: bytes) -> Iterator[tuple[str, int, str]]:
    """What a field is, where it lies and its form for `struct`: of every one in the header."""
    place = 4

    def scalar(what: str, form: str) -> Iterator[tuple[str, int, str]]:
        nonlocal place
        yield what, place, form
        place += struct.calcsize(form)

    def number(form: str) -> int:
        return int(struct.unpack_from(f"<{form}", data, place)[0])

    def text(what: str) -> Iterator[tuple[str, int, str]]:
        nonlocal place
        length = number("Q")
        yield from scalar(f"length of {what}", "Q")
        if length:
            yield "text", place + length // 2, "s"
        place += length

    yield from scalar("version", "I")
    tensors, settings = number("Q"), struct.unpack_from("<Q", data, place + 8)[0]
    yield from scalar("number of tensors", "Q")
    yield from scalar("number of settings", "Q")
    for _ in range(settings):
        yield from text("a key")
        kind = number("I")
        yield from scalar("type of a value", "I")
        if kind in _FORMS:
            yield from scalar("value", _FORMS[kind])
        elif kind == 8:
            yield from text("a value")
        else:
            inner, count = number("I"), struct.unpack_from("<Q", data, place + 4)[0]
            yield from scalar("type of a list", "I")
            yield from scalar("length of a list", "Q")
            for at in range(count):
                items = text("an entry") if inner == 8 else scalar("entry", _FORMS[inner])
                yield from (item for item in items if at < 3)
    for _ in range(tensors):
        yield from text("a tensor's name")
        dimensions = number("I")
        yield from scalar("dimensions", "I")
        for _ in range(dimensions):
            yield from scalar("dimension", "Q")
        yield from scalar("type of a tensor", "I")
        yield from scalar("place of a tensor", "Q")


RAW: tuple[Operator, ...] = (flip, cut, smear, misplace)
TEXT: tuple[Operator, ...] = (flip, cut, smear, misplace, words, words)
WORDS: tuple[Operator, ...] = (flip, cut, smear, words, words)
JSON: tuple[Operator, ...] = (*TEXT, json_value, json_value, json_value, json_value)
LINES: tuple[Operator, ...] = (*TEXT, json_line, json_line, json_line, json_line)
YAML: tuple[Operator, ...] = (flip, cut, smear, misplace, words, words, words, *[yaml_value] * 5)
TENSORS: tuple[Operator, ...] = (*RAW, tensor_header, tensor_header, tensor_header)
GGUF: tuple[Operator, ...] = (*RAW, gguf_header, gguf_header, gguf_header, gguf_header)
