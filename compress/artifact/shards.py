"""A model larger than memory: its tensors are read from safetensors files when they are wanted.

`skeleton` makes the model without data, `ShardReader` finds tensors in the files, and an `Offload` moves
one block at a time into memory and, when it is done, out again into a file of its own. `join` makes of
those files the shards of an artifact, copying bytes. So memory holds one block, whatever the depth.

The format of safetensors (8 bytes of length, a JSON header, the data) is simple enough to be written in
pieces; tensors lie in the order of falling element size, which keeps each aligned for its type.
"""

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress.artifact.coded import with_streams
from compress.errors import UserError
from compress.host.steady import Steady
from compress.host.tensor_files import BITS, Entry, entries, opened
from compress.models.conv1d import of_config
from compress.models.finite import BROKEN, numbers_of, require_finite
from compress.models.tying import tie

SHARD_BYTES = 5_000_000_000
_PIECE = 1 << 24  # elements that are compared at once


class ShardReader:
    """Tensors of safetensors files by name.

    Raises:
        UserError: a tensor that is asked for is in none of them, or holds NaN or infinity.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self._place: dict[str, Path] = {}
        files = list(files)
        self._files = Steady(files, by_name=True)  # blocks are read one by one, for hours
        for file in files:
            self._place.update((entry.name, file) for entry in entries(file))

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, floats as float32, in memory of their own: the files are closed again."""
        wanted: dict[Path, list[str]] = {}
        for name in names:
            if name not in self._place:
                raise UserError(f"weights: no tensor '{name}' in the files, so the model cannot be streamed")
            wanted.setdefault(self._place[name], []).append(name)
        found = {}
        self._files.require()
        for file, inside in wanted.items():
            with opened(file) as stream:
                for name in inside:
                    tensor = stream.get_tensor(name)
                    kind = torch.float32 if tensor.is_floating_point() else tensor.dtype
                    found[name] = tensor.to(kind, copy=True)
                    require_finite([(name, found[name])], file)
        return found

    def apart(self, pairs: Mapping[str, str]) -> list[str]:
        """Of parameters that a model says are tied (target -> source), the targets that the files hold beside
        their sources, with other values; compared piece by piece."""
        both = [(one, other) for one, other in pairs.items() if one in self and other in self]
        return [one for one, other in both if self._differ(one, other)]

    def _differ(self, one: str, other: str) -> bool:
        with opened(self._place[one]) as first, opened(self._place[other]) as second:
            left, right = first.get_slice(one), second.get_slice(other)
            shape = left.get_shape()
            if shape != right.get_shape():
                return True
            if not shape:
                return not torch.equal(first.get_tensor(one).float(), second.get_tensor(other).float())
            step = max(1, _PIECE // max(1, prod(shape[1:])))
            pieces = [slice(start, start + step) for start in range(0, shape[0], step)]
            return not all(torch.equal(left[rows].float(), right[rows].float()) for rows in pieces)


@dataclass
class Offload:
    """Blocks of a model without data, each in memory only while it is worked on.

    Attributes:
        model: on torch's meta device but for its buffers.
        reader: where its weights are.
        folder: takes a file for each module that is done.
        parts: those files.
    """

    model: Any
    reader: ShardReader
    folder: Path
    parts: list[Path] = field(default_factory=list)
    _released: list[str] = field(default_factory=list)
    _names: dict[str, list[str]] = field(default_factory=dict)  # of every parameter: all that it has

    def load(self, name: str) -> None:
        """Read all weights of the module `name`; what is tied to them is tied again."""
        module = self.model.get_submodule(name)
        wanted = {key: self._stored(f"{name}.{key}") for key, t in module.state_dict().items() if t.is_meta}
        found = self.reader.read(wanted.values())
        module.load_state_dict(
            {key: found[stored] for key, stored in wanted.items()}, strict=False, assign=True
        )
        self._tie(name)

    def release(self, name: str) -> None:
        """Write what the module has become into a file, and free its memory."""
        module = self.model.get_submodule(name)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"part-{len(self.parts):05d}.safetensors"
        require_finite(((f"{name}.{key}", t) for key, t in numbers_of(module)), "weights", BROKEN)
        kept = with_streams(module.state_dict(), module)
        state = {f"{name}.{key}": tensor.detach().contiguous() for key, tensor in kept.items()}
        try:
            save_file(state, path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be written ({error}); free some space and run again") from None
        self.parts.append(path)
        self._released.append(name)
        self._empty(name)

    def load_rest(self) -> None:
        """Read what belongs to no module that was released: embedding, head, the last norm."""
        for name, module in self.model.named_modules():
            # any of them: a head that is tied to the embedding may have a bias of its own
            wanted = any(own.is_meta for own in module.parameters(recurse=False))
            if wanted and not f"{name}.".startswith(self._prefixes()):
                self.load(name)

    @contextmanager
    def loaded(self, modules: Iterable[str]) -> Iterator[None]:
        """Some modules in memory while the block runs, unchanged and freed at its end."""
        names = [name for name in modules if self._is_empty(name)]
        for name in names:
            self.load(name)
        try:
            yield
        finally:
            for name in names:
                self._empty(name)

    def __post_init__(self) -> None:
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        self._names = {name: names for names in groups.values() for name in names}

    def _empty(self, name: str) -> None:
        """Free the memory of the module `name`, which whatever is tied to it would hold on to."""
        self.model.get_submodule(name).to("meta")
        self._tie(name)

    def _tie(self, name: str) -> None:
        """Where parameters of the module `name` are those of others, make them so again."""
        own = self.model.get_submodule(name).named_parameters(prefix=name)
        if any(len(self._names.get(key, ())) > 1 for key, _ in own):
            tie(self.model)

    def _stored(self, name: str) -> str:
        """The name under which the files hold a tensor: its own, or that of one it is tied to."""
        same = self._names.setdefault(name, [name])
        return next((other for other in [name, *same] if other in self.reader), name)

    def _prefixes(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self._released)

    def _is_empty(self, name: str) -> bool:
        return any(p.is_meta for p in self.model.get_submodule(name).parameters())


def skeleton(config: Any) -> Any:
    """The model of a configuration, in eval mode, weights on the meta device and buffers in memory."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        model = of_config(config, dtype=torch.float32)
    model.tie_weights()
    return model.eval()


def join(parts: Iterable[Path], folder: Path, stem: str, limit: int = SHARD_BYTES) -> list[Path]:
    """Make `stem.safetensors`, or `stem-00001-of-00003.safetensors` ..., of the tensors of all parts.

    A shard holds at most `limit` bytes of data, or one tensor that is larger.
    """
    found = sorted((entry for part in parts for entry in entries(part)), key=_largest_elements_first)
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in found:
        size = entry.stop - entry.start
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += size
    count = len(shards)
    written = []
    for number, shard in enumerate(shards, start=1):
        name = stem if count == 1 else f"{stem}-{number:05d}-of-{count:05d}"
        written.append(folder / f"{name}.safetensors")
        _write(written[-1], shard)
    return written


def write_index(shards: list[Path]) -> None:
    """Beside several shards, the file that tells transformers which tensor is in which."""
    places = {entry.name: entry for shard in shards for entry in entries(shard)}
    index = {
        "metadata": {"total_size": sum(entry.stop - entry.start for entry in places.values())},
        "weight_map": {name: entry.file.name for name, entry in sorted(places.items())},
    }
    path = shards[0].with_name("model.safetensors.index.json")
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _largest_elements_first(entry: Entry) -> tuple[int, str]:
    return -BITS[entry.dtype], entry.name


def _write(path: Path, entries: list[Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for entry in entries:
        size = entry.stop - entry.start
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": entry.shape,
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as target:
        target.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            with entry.file.open("rb") as source:
                source.seek(entry.start)
                _copy(source, target, entry.stop - entry.start)


def _copy(source: Any, target: Any, size: int, chunk: int = 1 << 24) -> None:
    while size:
        data = source.read(min(size, chunk))
        target.write(data)
        size -= len(data)
