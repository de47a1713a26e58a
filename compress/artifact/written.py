"""Do the files of an artifact hold what was handed to the writer? Told from headers and the ends of the data.

Every tensor is compared by name, type and shape, every file's length with what its header promises, and of
every tensor the first, middle and last values, bit for bit.
Cost: three short readings per tensor, whatever their size.
Limits: damage between the places that are read; the hashes of the manifest are of what was read back.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.host.tensor_files import Entry, entries

_VALUES = 1024  # compared at each of the three places
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip


def require_written(
    tensors: Mapping[str, Tensor], parts: Iterable[Path], files: Iterable[Path], folder: Path
) -> None:
    """Refuse files that do not hold these tensors and those of the parts, and nothing else.

    Args:
        tensors: that were in memory, under the names that they were written with.
        parts: files whose tensors were joined to them.
        files: what was written.
        folder: to name in an error.

    Raises:
        UserError: names the first tensor that is missing, too many, or another.
    """
    stored = _entries(files)
    joined = _entries(parts)
    if lacking := sorted((tensors.keys() | joined.keys()) - stored.keys()):
        raise UserError(f"{folder}: lacks '{lacking[0]}'; please report it")
    if left := sorted(stored.keys() - tensors.keys() - joined.keys()):
        raise UserError(f"{folder}: holds '{left[0]}', which was not written; please report it")
    for name, tensor in tensors.items():
        _require_same(tensor, stored[name], folder)
    for name, entry in joined.items():
        if name not in tensors:
            same = (entry.dtype, entry.shape) == (stored[name].dtype, stored[name].shape)
            if not same or _ends(entry) != _ends(stored[name]):
                raise _other(folder, name)


def require_saved(model: Any, files: Iterable[Path], folder: Path) -> None:
    """The same for a float model that `transformers` has saved, which leaves out what is shared, and for some
    families writes other names: then those that are the same are compared, and the number of values.

    Raises:
        UserError: as `require_written`.
    """
    stored = _entries(files)
    own = {n: t for n, t in model.state_dict(keep_vars=True).items() if not t.is_meta}
    aliases: dict[tuple[int, int], list[str]] = {}
    for name, tensor in own.items():
        key = (tensor.data_ptr(), tensor.numel()) if tensor.numel() else (id(tensor), 0)
        aliases.setdefault(key, []).append(name)
    ignored = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    lacking = []
    for names in aliases.values():
        found = [name for name in names if name in stored]
        if not found and not any(pattern.search(name) for pattern in ignored for name in names):
            lacking += names[:1]
        for name in found:
            _require_same(own[name], stored[name], folder)
    unknown = sorted(stored.keys() - own.keys())
    renamed = bool(lacking and unknown)
    if lacking and not renamed:
        raise UserError(f"{folder}: lacks '{lacking[0]}'; please report it")
    if unknown and not renamed:
        raise UserError(f"{folder}: holds '{unknown[0]}', which was not written; please report it")
    held = sum(parameter.numel() for parameter in model.parameters())
    count = sum(prod(entry.shape) for entry in stored.values())
    if renamed and count < held and not any(parameter.is_meta for parameter in model.parameters()):
        raise UserError(f"{folder}: holds {count:,} values of a model of {held:,}; please report it")


def _entries(files: Iterable[Path]) -> dict[str, Entry]:
    return {entry.name: entry for file in files for entry in entries(file)}


def _require_same(tensor: Tensor, entry: Entry, folder: Path) -> None:
    kind = _TYPES.get(tensor.dtype, entry.dtype)
    if (kind, list(tensor.shape)) != (entry.dtype, entry.shape):
        raise UserError(
            f"{folder}: '{entry.name}' is stored as {entry.dtype} of {entry.shape} where {kind} of "
            f"{list(tensor.shape)} was written; please report it"
        )
    width = tensor.element_size()
    flat = tensor.detach().reshape(-1)
    held = [flat[start:stop].cpu().contiguous() for start, stop in _places(tensor.numel())]
    if [part.view(torch.uint8).numpy().tobytes() for part in held] != _ends(entry, width):
        raise _other(folder, entry.name)


def _ends(entry: Entry, width: int = 1) -> list[bytes]:
    """The bytes of the values that are compared, each of `width` bytes."""
    found = []
    with entry.file.open("rb") as stream:
        for start, stop in _places((entry.stop - entry.start) // width):
            stream.seek(entry.start + start * width)
            found.append(stream.read((stop - start) * width))
    return found


def _places(count: int) -> list[tuple[int, int]]:
    """The first, middle and last of `count` values."""
    firsts = (0, max(0, (count - _VALUES) // 2), max(0, count - _VALUES))
    return [(first, min(count, first + _VALUES)) for first in firsts]


def _other(folder: Path, name: str) -> UserError:
    return UserError(f"{folder}: '{name}' does not come back as it was written; please report it")
