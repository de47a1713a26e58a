"""The door for safetensors: the header is checked against the file before the library, or anybody, trusts it.

The format: 8 bytes of length, a JSON header of names -> dtype, shape and the two ends of the data, the data.
Tensors lie one after the other without gaps, and the last ends with the file.
"""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from compress.errors import UserError, door
from compress.host.files import json_value, require_regular

_HEADER_BYTES = 100_000_000  # the library's own bound
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")  # files of weights that are never read
_ADVICE = "the file is truncated or damaged; copy or download it again"
BITS = {
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16,
    "I16": 16, "U16": 16, "U8": 8, "I8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip


class Entry(NamedTuple):
    """A tensor in a file: `start` and `stop` are places in the file."""

    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    stop: int


def entries(file: Path) -> list[Entry]:
    """The tensors of a file, in the order of its header.

    Raises:
        UserError: no such file, or one whose header, its own length and that of the file disagree.
    """
    size = require_regular(file)
    with door(f"{file}: unreadable safetensors header", _ADVICE), file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else size
        if 8 + length > size or length > _HEADER_BYTES:
            raise UserError(f"{file}: header of {length} bytes in a file of {size}; {_ADVICE}")
        found = json_value(stream.read(length), unique=True)
        start = 8 + length
        tensors = [_entry(file, name, e, start) for name, e in found.items() if name != "__metadata__"]
    end = start
    for entry in sorted(tensors, key=lambda e: (e.start, e.stop)):
        if entry.start != end:
            raise UserError(f"{file}: '{entry.name}' begins at {entry.start} where {end} is due; {_ADVICE}")
        end = entry.stop
    if end != size:
        raise UserError(f"{file}: {size} bytes where the header promises {end}; {_ADVICE}")
    return tensors


def _entry(file: Path, name: str, given: Any, start: int) -> Entry:
    dtype, shape, (first, last) = given["dtype"], given["shape"], given["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, first, last)):
        raise ValueError(f"'{name}' has a shape or place that is no count")
    if dtype not in BITS:
        raise ValueError(f"'{name}' is of the unknown type {dtype!r}")
    if prod(shape) * BITS[dtype] != 8 * (last - first):
        raise ValueError(f"'{name}', {dtype} of {shape}, has {last - first} bytes")
    return Entry(name, dtype, shape, file, start + first, start + last)


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file whose header is right, as the library opens it for torch; what the library refuses is told."""
    from safetensors import SafetensorError, safe_open

    entries(file)
    try:
        with safe_open(file, framework="pt") as stream:
            yield stream
    except SafetensorError as error:
        with door(f"{file}: unreadable", _ADVICE):
            raise error from None


def load_tensors(file: Path) -> dict[str, Any]:
    """All tensors of a file; raises UserError as `entries`."""
    from safetensors.torch import load_file

    entries(file)
    with door(f"{file}: unreadable", _ADVICE):
        return load_file(file)
