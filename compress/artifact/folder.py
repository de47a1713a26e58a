"""The folder of an artifact, as far as it can be told from names and lengths."""

import os
from pathlib import Path

from compress.errors import UserError
from compress.host.files import read_json

MANIFEST = "manifest.json"
CODES = "quantized.safetensors"  # or quantized-00001-of-00003.safetensors ... when they are large
EXPORTS = ("onnx", "compressed-tensors", "gguf")  # folders inside an artifact, for other runtimes


def has_manifest(folder: Path) -> bool:
    """Whether there is one, be it a pipe or a link to nowhere: reading it says so."""
    return os.path.lexists(folder / MANIFEST)


def disk_bytes(artifact: Path) -> int:
    """Bytes of all files of an artifact (a folder, or one file such as a GGUF), without nested exports."""
    if artifact.is_file():
        return artifact.stat().st_size
    if not artifact.is_dir():
        raise FileNotFoundError(artifact)
    total, exports = 0, {*EXPORTS, *_other_exports(artifact)}
    for folder, folders, files in os.walk(artifact):
        if Path(folder) == artifact:
            folders[:] = [name for name in folders if name not in exports]
        total += sum((Path(folder) / name).stat().st_size for name in files)
    return total


def whole(path: Path) -> Path:
    """The artifact that an export, or a file in one, lies in; itself for all others."""
    for folder in (path, path.parent):
        if folder.name in EXPORTS and (folder.parent / "config.json").is_file():
            return folder.parent
    return path


def _other_exports(artifact: Path) -> list[str]:
    """The exports that its manifest names: those of third-party passes are called as they like."""
    try:
        named = read_json(artifact / MANIFEST)["exports"]
    except (UserError, KeyError):
        return []
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []
