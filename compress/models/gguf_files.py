"""The door for GGUF: every count in the header is held against the length of the file first.

A header begins with the numbers of tensors and of settings; each text and each list begins with its length.
Readers allocate what these say. Here the file is walked from count to count, which reads nothing but the
header, and what cannot lie in the file is refused.
"""

import math
import struct
from collections.abc import Mapping
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import IO, Any

from compress.errors import MissingExtra, UserError, door
from compress.host.files import require_regular
from compress.host.tensor_files import PICKLES
from compress.models.sizes import require_possible

_ADVICE = "copy or download it again"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_DEPTH, _DIMENSIONS = 4, 8
# types for which the library that reads GGUF has no float values: of activations, and plain numbers
_NO_WEIGHTS = {9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 41: "Q1_0"}
# of `ARCHITECTURE.NAME`: what Hugging Face calls it
_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "vocab_size": "vocab_size",
}


def require_gguf(path: Path) -> None:
    """A single file must be a whole GGUF."""
    require_regular(path)
    with path.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        if path.suffix in {p[1:] for p in PICKLES}:
            raise UserError(f"{path}: pickled weights are refused, since unpickling can run any code")
        raise UserError(f"{path}: no GGUF file (it begins with {magic!r}); a model is a directory or a .gguf")
    if find_spec("gguf") is None:
        raise MissingExtra("gguf", "gguf", f"reading {path.name}")
    check_gguf(path)


def check_gguf(path: Path) -> None:
    """Refuse a GGUF file that is damaged, cut short, or says more than it can hold.

    Raises:
        UserError: with what is wrong.
    """
    from gguf import GGUFReader

    size = require_regular(path)
    with door(f"{path}: truncated or damaged GGUF", _ADVICE):
        with path.open("rb") as stream:
            tensors, settings = _Header(stream, size).walk()
        require_possible(_named(settings), path, tensors, size, sharing=0)
        end = 0
        for tensor in sorted(GGUFReader(path).tensors, key=lambda t: int(t.data_offset)):
            if int(tensor.data_offset) < end:
                raise UserError(f"{path}: damaged GGUF, tensor {tensor.name!r} lies on another; {_ADVICE}")
            end = int(tensor.data_offset) + int(tensor.n_bytes)
    for key, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{path}: damaged GGUF, {key} is {value}; {_ADVICE}")
    if end > size:
        raise UserError(f"{path}: truncated GGUF, {size} bytes of {end}; {_ADVICE}")


def _named(settings: Mapping[str, Any]) -> dict[str, Any]:
    architecture = settings.get("general.architecture", "")
    found = {_SIZES.get(key.removeprefix(f"{architecture}."), ""): value for key, value in settings.items()}
    return {key: value for key, value in found.items() if key}


class _Header:
    """A walk through the header; `ValueError` and `struct.error` where it cannot be one, UserError where it
    tells of what is not read."""

    def __init__(self, stream: IO[bytes], size: int) -> None:
        self._stream, self._size = stream, size

    def walk(self) -> tuple[int, dict[str, Any]]:
        """How many tensors there are, and the settings that are single values."""
        self._stream.seek(4)  # behind the magic, which was read
        version = self._scalar("I")
        if version not in (2, 3):
            raise ValueError(f"version {version}; 2 and 3 are read")
        tensors, count = self._scalar("Q"), self._scalar("Q")
        self._require(tensors, 24, "tensors")
        self._require(count, 13, "settings")
        settings = {}
        for _ in range(count):
            name = self._text().decode("utf-8")
            value = self._value(self._scalar("I"), 0)
            if isinstance(value, int | float | str):
                settings[name] = value
        for _ in range(tensors):
            name = self._text().decode("utf-8")
            dimensions = self._scalar("I")
            if dimensions > _DIMENSIONS:
                raise ValueError(f"'{name}' has {dimensions} dimensions")
            elements = prod(self._scalar("Q") for _ in range(dimensions))
            kind, place = self._scalar("I"), self._scalar("Q")
            if kind in _NO_WEIGHTS:
                raise UserError(
                    f"{self._stream.name}: '{name}' holds {_NO_WEIGHTS[kind]}, which nothing here reads as "
                    "weights; take a file with F32, F16, BF16 or quantized ones"
                )
            # the smallest block types have less than two bits a weight
            if place > self._size or elements > 8 * self._size:
                raise ValueError(f"'{name}' (type {kind}) lies beyond its end")
        return tensors, settings

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self._text().decode("utf-8", "replace")
        if kind != _LIST or depth >= _DEPTH:
            raise ValueError(f"a value of the unknown type {kind}")
        inner, count = self._scalar("I"), self._scalar("Q")
        if inner in _SCALARS:
            width = struct.calcsize(_SCALARS[inner])
            self._require(count, width, "values")
            self._stream.seek(count * width, 1)
            return None
        self._require(count, 8 if inner == _TEXT else 12, "values")
        for _ in range(count):
            self._value(inner, depth + 1)
        return None

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack(f"<{form}", self._stream.read(struct.calcsize(form)))
        return value

    def _text(self) -> bytes:
        length = self._scalar("Q")
        self._require(length, 1, "bytes of text")
        return self._stream.read(length)

    def _require(self, count: int, width: int, what: str) -> None:
        left = self._size - self._stream.tell()
        if count * width > left:
            raise ValueError(f"{count:,} {what} in the {left:,} bytes that are left")
