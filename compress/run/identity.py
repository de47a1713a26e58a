"""What a model that comes from elsewhere is known by: all files that loading it reads, or a hub's commit.

Settings count like weights, since they go into every artifact: a chat template that was mended, or another
token that ends a text, makes another model.
"""

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from compress.artifact.counts import code_files, file_record
from compress.errors import UserError
from compress.host.files import read_json
from compress.host.reach import version_of
from compress.models.adapters import FILES
from compress.models.checkpoints import hub_revision, weight_files
from compress.models.companions import companion_files
from compress.records.base import write_whole

# of configurations, tokenizers of all kinds, templates and processors
_SETTINGS = {".json", ".jinja", ".txt", ".model", ".spm", ".bpe", ".vocab", ".tiktoken"}
_TEMPLATES = "additional_chat_templates"
_BESIDE_GGUF = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
)
_STEADY_SECONDS = 2.0  # a file younger than this could change again without looking different


class FileHashes:
    """SHA-256 of files; one that was hashed before and looks unchanged (length, times, inode) is not read."""

    def __init__(self, memory: Path, *, keeps: bool = True) -> None:
        """`memory`: a JSON file to remember them in; `keeps`: whether to write it."""
        self.memory, self.keeps = memory, keeps
        self._known: dict[str, list[object]] = {}
        with suppress(UserError):
            self._known = read_json(memory)

    def __call__(self, path: Path) -> str:
        """The hash of one file."""
        state, place = path.stat(), str(path.absolute())
        look = [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]
        known = self._known.get(place)
        if isinstance(known, list) and known[:-1] == look:
            return str(known[-1])
        found = file_record(path).sha256
        if self.keeps and time.time() - max(state.st_mtime, state.st_ctime) > _STEADY_SECONDS:
            self._known[place] = [*look, found]
            with suppress(OSError):  # a folder that cannot be written is told of when a step is kept
                write_whole(self.memory, json.dumps(self._known))
        return found


def identity(source: str, sha256: Callable[[Path], str]) -> list[str]:
    """What tells a directory, a `.gguf` file or a hub id from any other, and from itself once it changed.

    Raises:
        UserError: an index that names no files, a hub id that neither the cache nor the hub has.
    """
    path = Path(source)
    if path.is_file():
        beside = [path.with_name(name) for name in _BESIDE_GGUF]
        return [sha256(path), version_of("gguf"), *_named(path.parent, beside, sha256)]
    if path.is_dir():
        settings = [file for file in path.iterdir() if file.suffix in _SETTINGS]
        beside = [*(path / _TEMPLATES).glob("*.jinja"), *companion_files(path)]
        return _named(path, [*weight_files(path), *code_files(path), *settings, *beside], sha256)
    return [source, hub_revision(source)]


def identity_of_adapter(source: str, sha256: Callable[[Path], str]) -> list[str]:
    """What tells a LoRA adapter from any other: its settings and its weights."""
    path = Path(source)
    return _named(path, [path / name for name in FILES], sha256)


def _named(folder: Path, files: list[Path], sha256: Callable[[Path], str]) -> list[str]:
    """Name and hash of those that are there."""
    there = sorted({file for file in files if file.is_file()})
    return [f"{file.relative_to(folder)} {sha256(file)}" for file in there]
