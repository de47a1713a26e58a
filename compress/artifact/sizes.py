"""How many bytes an artifact will have, before anything is written.

All files of the folder: configuration and tokenizer are written to a scratch folder and weighed; the file
of codes is a header, whose text is known from names, types and shapes, and the tensors; the manifest is
built as it will be. Streams of entropy-coded codes are taken to be as long as their rate says. What is added
to a manifest later is the business of the caller, who leaves room.
"""

import json
import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress.artifact.bundle import CODES, Bundle, file_record
from compress.artifact.coded import STREAM
from compress.formats import Format
from compress.formats.packing import packed_bytes
from compress.models.checkpoints import save_configurations
from compress.models.layers import matrix
from compress.records.records import FileRecord, LayerRecord, Lineage, Manifest, PassRecord
from compress.version import __version__

# safetensors' names, in the order in which its writer sorts them, last first
_TYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32", torch.float64: "F64",
    torch.int64: "I64",
}  # fmt: skip
_RANKS = {name: rank for rank, name in enumerate(_TYPES.values())}
_ALIGNED = 8  # bytes; the header is filled up with spaces

_Entry = tuple[str, str, tuple[int, ...], int]  # name, type, shape, bytes


def float_file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the file `model.safetensors` of tensors of these shapes, float32."""
    entries = [(name, "F32", shape, 4 * math.prod(shape)) for name, shape in sorted(shapes.items())]
    return 8 + header_bytes(entries) + sum(entry[3] for entry in entries)


class ArtifactBytes:
    """Weighs plans: which layer gets which format.

    Args:
        bundle: the model in float, and its tokenizer.
        record: of the pass that will write the codes, as near to what it will be as is known.
        scratch: a folder to write small files into.
    """

    def __init__(self, bundle: Bundle, record: PassRecord, scratch: Path) -> None:
        self.model: Any = bundle.model
        self.masked = tuple(sorted(bundle.masks))
        self.lineage = Lineage(source=bundle.lineage.source, steps=(*bundle.lineage.steps, record))
        scratch.mkdir(parents=True, exist_ok=True)
        save_configurations(self.model, scratch)
        bundle.tokenizer.save_pretrained(scratch)
        self.files = {p.name: file_record(p) for p in sorted(scratch.iterdir()) if p.is_file()}
        self.shapes = {
            name: (int(w.shape[0]), int(w.shape[1]))
            for name, module in self.model.named_modules()
            if (w := _matrix_or_none(module)) is not None
        }
        self.owners = _owners(self.model)
        self._longest: dict[str, int] = {}

    def total(self, formats: Mapping[str, Format]) -> int:
        """Bytes of the whole folder when the modules named in `formats` hold codes."""
        entries = self._entries(formats)
        codes = 8 + header_bytes(entries) + sum(entry[3] for entry in entries)
        files = dict(sorted({**self.files, CODES: FileRecord(bytes=codes, sha256="0" * 64)}.items()))
        manifest = Manifest(
            kind="huggingface",
            compress_version=__version__,
            fingerprint=self.lineage.steps[-1].fingerprint,
            lineage=self.lineage,
            layers={name: self._layer(name, format) for name, format in formats.items()},
            masked=self.masked,
            files=files,
        )
        text = manifest.model_dump_json(indent=2) + "\n"
        return sum(record.bytes for record in files.values()) + len(text.encode())

    def share(self, name: str, format: Format) -> int:
        """What one module adds to `total`: codes, its part of the header and of the manifest.

        Right but for the digits of offsets, which depend on what else is in the file.
        """
        record = self._layer(name, format).model_dump_json(indent=2)
        described = len(textwrap.indent(f'"{name}": {record},\n', "    ").encode())
        entries = [] if self.owners[name] != name else self._codes(name, format)
        return described + sum(entry[3] + len(_entry_text(entry, 0)) for entry in entries)

    def stored(self, name: str, format: Format) -> int:
        """Bytes of codes, scales and zero-points alone; none for a module that shares another's."""
        if self.owners[name] != name:
            return 0
        stored = format.stored_bytes(self.shapes[name])
        return min(stored, self._longest_stream(name, format)) if format.streamed else stored

    def weights(self, name: str) -> int:
        """How many weights a module holds; none if it shares another's."""
        out, columns = self.shapes[name]
        return out * columns if self.owners[name] == name else 0

    def _layer(self, name: str, format: Format) -> LayerRecord:
        return LayerRecord(
            format=format.model_dump(),
            shape=self.shapes[name],
            tied_to=None if self.owners[name] == name else self.owners[name],
            embedding=isinstance(self.model.get_submodule(name), nn.Embedding),
        )

    def _codes(self, name: str, format: Format) -> list[_Entry]:
        out, columns = self.shapes[name]
        inner = f"{name}.quantized"
        if format.streamed:
            stream = self.stored(name, format)
            return [(f"{inner}.{STREAM}", "U8", (stream,), stream)]
        groups = format.groups(columns)
        packed = packed_bytes(format.group_width(columns), format.bits)
        found: list[_Entry] = [
            (f"{inner}.codes", "U8", (out, groups, packed), out * groups * packed),
            (f"{inner}.scales", "F16", (out, groups), 2 * out * groups),
        ]
        if not format.symmetric:
            zeros = packed_bytes(groups, format.bits)
            found.append((f"{inner}.zeros", "U8", (out, zeros), out * zeros))
        return found

    def _longest_stream(self, name: str, format: Format) -> int:
        """Bytes at the finest steps that there are: higher rates get no more."""
        if name not in self._longest:
            self._longest[name] = format.longest_stream(matrix(self.model.get_submodule(name)))
        return self._longest[name]

    def _entries(self, formats: Mapping[str, Format]) -> list[_Entry]:
        """Every tensor of the file, in its order."""
        coded = [e for name, f in formats.items() if self.owners[name] == name for e in self._codes(name, f)]
        seen: set[tuple[int, int]] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            module, _, leaf = name.rpartition(".")
            key = (tensor.data_ptr(), tensor.numel())
            if (leaf == "weight" and module in formats) or key in seen:
                continue
            seen.add(key)
            size = tensor.numel() * tensor.element_size()
            coded.append((name, _TYPES[tensor.dtype], tuple(tensor.shape), size))
        return sorted(coded, key=lambda entry: (-_RANKS[entry[1]], entry[0]))


def header_bytes(entries: list[_Entry]) -> int:
    """Bytes of the header of a safetensors file, without the eight that hold its length."""
    text, offset = '{"__metadata__":{"format":"pt"},', 0
    for entry in entries:
        text += _entry_text(entry, offset)
        offset += entry[3]
    length = len(text.encode())  # the last comma is the closing brace's place
    return -(-length // _ALIGNED) * _ALIGNED


def _entry_text(entry: _Entry, offset: int) -> str:
    name, kind, shape, size = entry
    value = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
    return f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))},"


def _matrix_or_none(module: nn.Module) -> torch.Tensor | None:
    """The weight as (out, in), of a module that has a matrix."""
    weight = getattr(module, "weight", None)
    return matrix(module) if isinstance(weight, torch.Tensor) and weight.dim() == 2 else None


def _owners(model: nn.Module) -> dict[str, str]:
    """Module -> the first module that holds the same matrix, itself if there is none before it."""
    first: dict[int, str] = {}
    return {
        name: first.setdefault(id(module.weight), name)
        for name, module in model.named_modules()
        if _matrix_or_none(module) is not None
    }
