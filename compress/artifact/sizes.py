"""How many bytes an artifact will have at most, before anything is written.

A sum of parts, so that a knapsack can choose among them: a part for every matrix (codes, its lines in the
header and in the manifest), and the rest. Matrices, configuration and tokenizer are exact; text is taken at
its longest, an offset in the header as if it were the last one, so what is written is never larger, but
smaller by some bytes per tensor. Streams of entropy-coded codes are taken to be as long as their rate says.
"""

import json
import math
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from compress.artifact.bundle import Bundle
from compress.artifact.coded import STREAM
from compress.artifact.counts import file_record, unique_state
from compress.artifact.folder import CODES
from compress.formats import Format
from compress.formats.packing import packed_bytes
from compress.models.checkpoints import save_configurations
from compress.models.layers import matrix
from compress.records.manifest import FileRecord, LayerRecord, Lineage, Manifest
from compress.version import __version__

_FRAME = '{"__metadata__":{"format":"pt"},'
_ALIGNED = 8  # bytes; the header is filled up with spaces
_HEADER = 160  # bytes: a file's name and indents in the manifest, the frame of its own header
_LONGEST = 10**15  # bytes, as a number in a manifest
_LONGEST_FLOAT = -1.2345678901234567e-100  # no float takes more characters

_Entry = tuple[str, str, tuple[int, ...], int]  # name, type, shape, bytes


def float_file_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Bytes of the file `model.safetensors` of tensors of these shapes, float32."""
    text, offset = len(_FRAME), 0
    for name, shape in sorted(shapes.items()):
        size = 4 * math.prod(shape)
        text += _text_bytes((name, "F32", shape, size), offset)
        offset += size
    return 8 + -(-text // _ALIGNED) * _ALIGNED + offset  # the last comma is the closing brace's place


def _longest(lineage: Lineage) -> Lineage:
    """A lineage whose times and speeds take as many bytes as they could: a plan must not depend on them."""
    steps = [
        step.model_copy(
            update={
                "seconds": _LONGEST_FLOAT,
                "peak_rss_bytes": _LONGEST,
                "notes": {k: _LONGEST_FLOAT if isinstance(v, float) else v for k, v in step.notes.items()},
            }
        )
        for step in lineage.steps
    ]
    return lineage.model_copy(update={"steps": tuple(steps)})


class Matrices:
    """Matrices of a model that will hold codes.

    Attributes:
        shapes: (out, in) of every module.
        owners: module -> the first that holds the same matrix.

    Args:
        model: in float.
        modules: of a matrix, all that will hold codes.
    """

    def __init__(self, model: Any, modules: Iterable[str]) -> None:
        self.model = model
        self.shapes: dict[str, tuple[int, int]] = {}
        self.owners: dict[str, str] = {}
        first: dict[int, str] = {}
        for name in modules:
            weight = model.get_submodule(name).weight
            self.shapes[name] = int(weight.shape[0]), int(weight.shape[1])
            self.owners[name] = first.setdefault(id(weight), name)

    def weights(self, name: str) -> int:
        """How many weights a module holds; none if it shares another's."""
        out, columns = self.shapes[name]
        return out * columns if self.owners[name] == name else 0


class ArtifactBytes(Matrices):
    """Weighs plans: which layer gets which format.

    Attributes:
        rest: bytes of everything but what `share` tells of.

    Args:
        bundle: the model in float, and its tokenizer.
        modules: of a matrix, all that will hold codes.
        noted: bytes that the manifest will have of the pass that writes the codes.
        scratch: a folder to write small files into.
    """

    def __init__(self, bundle: Bundle, modules: Iterable[str], noted: int, scratch: Path) -> None:
        super().__init__(bundle.model, modules)
        self._longest: dict[str, int] = {}
        floats = {f"{name}.weight" for name in self.shapes}
        state = {name: t for name, t in unique_state(self.model).items() if name not in floats}
        self._last = sum(t.numel() * t.element_size() for t in self.model.parameters())  # an offset's bound
        entries = [(name, "BF16", tuple(t.shape), t.numel() * t.element_size()) for name, t in state.items()]
        kept = sum(entry[3] + _text_bytes(entry, self._last) for entry in entries)
        scratch.mkdir(parents=True, exist_ok=True)
        save_configurations(self.model, scratch)
        bundle.tokenizer.save_pretrained(scratch)
        files = {p.name: file_record(p) for p in scratch.iterdir() if p.is_file()}
        manifest = Manifest(
            kind="huggingface",
            compress_version=__version__,
            fingerprint="0" * 64,
            lineage=_longest(bundle.lineage),
            layers={},
            masked=tuple(sorted(bundle.masks)),
            files={**files, CODES: FileRecord(bytes=_LONGEST, sha256="0" * 64)},
        )
        written = sum(record.bytes for record in files.values()) + len(manifest.model_dump_json(indent=2))
        self.rest = written + noted + 8 + len(_FRAME) + _ALIGNED + kept + self._masks(bundle)

    def _masks(self, bundle: Bundle) -> int:
        """Of masks, a bit for each weight that may become a zero, and what names their file."""
        sizes = [(name, packed_bytes(mask.numel(), 1)) for name, mask in bundle.masks.items()]
        entries = [(name, "U8", (size,), size) for name, size in sizes]
        described = len(FileRecord(bytes=_LONGEST, sha256="0" * 64).model_dump_json(indent=2)) + _HEADER
        return sum(entry[3] + _text_bytes(entry, self._last) for entry in entries) + (
            described if entries else 0
        )

    def total(self, formats: Mapping[str, Format]) -> int:
        """Bytes of the whole folder, at most, when the modules hold codes of these formats."""
        return self.rest + sum(self.share(name, format) for name, format in formats.items())

    def share(self, name: str, format: Format) -> int:
        """What one module adds: codes, its part of the header and of the manifest."""
        record = LayerRecord(
            format=format.model_dump(),
            shape=self.shapes[name],
            tied_to=None if self.owners[name] == name else self.owners[name],
            embedding=isinstance(self.model.get_submodule(name), nn.Embedding),
        )
        described = textwrap.indent(f'"{name}": {record.model_dump_json(indent=2)},\n', "    ")
        entries = [] if self.owners[name] != name else self._codes(name, format)
        return len(described.encode()) + sum(entry[3] + _text_bytes(entry, self._last) for entry in entries)

    def stored(self, name: str, format: Format) -> int:
        """Bytes of codes, scales and zero-points alone; none for a module that shares another's."""
        if self.owners[name] != name:
            return 0
        stored = format.stored_bytes(self.shapes[name])
        return min(stored, self._longest_stream(name, format)) if format.streamed else stored

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


def _text_bytes(entry: _Entry, offset: int) -> int:
    """Bytes of a tensor's part of the header of a safetensors file, with the comma after it."""
    name, kind, shape, size = entry
    value = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset + size]}
    return len(f"{json.dumps(name)}:{json.dumps(value, separators=(',', ':'))},".encode())
