"""Are the files those that were written? SHA-256 of each, compared before anything is made of them.

Method. `manifest.json` states length and hash of every file beside it, and under `seal` the hash of all else
that it says itself; an export without one has `SHA256SUMS`, which `sha256sum -c` reads, too. Files are
hashed side by side, outside the interpreter's lock. What was hashed once in this process is not read again
while it looks unchanged (device, inode, length, time of change), so a run that has just written a step opens
it for nothing.
Cost: one reading of the files; the rate is in docs/notes/loading.md.
Limits: a folder that states nothing (somebody else's) passes. A hash tells damage, not malice: whoever can
change a file can change what is stated of it.

Imports neither torch nor pydantic, since runtimes without them open artifacts, too.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from compress.artifact.folder import MANIFEST, has_manifest
from compress.errors import UserError
from compress.host.files import json_value, leaves, read_text
from compress.records.seal import SEAL, seal_of

SUMS = "SHA256SUMS"
_AT_ONCE = 4  # files; hashing is bound by the processor, reading by the disk
_LARGEST = 1 << 28  # bytes of a list of hashes
# as sha256sum writes it, and with --tag
_LINE = re.compile(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)|SHA256 \((?:\./)?(.+)\) = ([0-9a-fA-F]{64})")
_known: dict[tuple[int, int, int, int], str] = {}  # what a file looked like -> its hash


class Stated(NamedTuple):
    """What is stated of a file; `bytes` None where only the hash is."""

    bytes: int | None
    sha256: str


def sha256_of(file: Path) -> str:
    """The hash of a file, read now; remembered for `verify`."""
    with file.open("rb") as stream:
        before = _look(os.fstat(stream.fileno()))
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    _known[before] = digest
    return digest


def verify(path: Path, *, whole: bool = True) -> None:
    """Compare a folder's files, or one file, with what the folder states of them.

    One file is held against the line of SHA256SUMS that names it; where none does, nothing is stated of it,
    and it passes.

    Args:
        path: a folder or a file.
        whole: a stated file that is missing is a fault; else only files that are there are compared, since
            somebody's list may name what was never copied.

    Raises:
        UserError: a file is missing, or of another length or hash; the list of hashes cannot be read.
    """
    folder = path.parent if path.is_file() else path
    if path.is_file():  # a manifest beside it is of a folder, and may be anybody's
        listed = {name: of for name, of in _in_list(folder / SUMS).items() if name == path.name}
    else:
        listed = stated(folder)
    if not whole:
        listed = {name: record for name, record in listed.items() if (folder / name).is_file()}
    wrong = fault(folder, listed)
    if wrong is not None:
        raise UserError(wrong)


def fault(folder: Path, listed: Mapping[str, Stated]) -> str | None:
    """What is wrong with the first of a folder's files that is not as stated, and what to do; or None."""
    for name, record in listed.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size is None or record.bytes not in (None, size):
            of = "" if record.bytes is None else f" or not of the {record.bytes} bytes its manifest states"
            return f"{file}: missing{of}; copy it again"
    names = list(listed)
    for name, found in zip(names, _hashes(folder / name for name in names), strict=True):
        if found != listed[name].sha256:
            return (
                f"{folder / name}: is not what was written (its SHA-256 differs from the one that is stated "
                "beside it); copy it again, or load it with verify=False (--no-verify) if the change is yours"
            )
    return None


def stated(folder: Path) -> dict[str, Stated]:
    """The files of a folder by name, as its manifest or its list of hashes states them; else none.

    Raises:
        UserError: either cannot be read.
    """
    if has_manifest(folder):
        return _in_manifest(folder / MANIFEST)
    return _in_list(folder / SUMS)


def write_sums(folder: Path) -> None:
    """State the hashes of a folder's files, where no manifest does."""
    if has_manifest(folder):
        return
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != SUMS)
    text = "".join(f"{sha256_of(file)}  {file.name}\n" for file in files)
    (folder / SUMS).write_text(text, encoding="utf-8")


def _in_manifest(file: Path) -> dict[str, Stated]:
    try:
        content = json_value(read_text(file, _LARGEST).encode())
        files = content["files"]
        found = {str(name): Stated(int(of["bytes"]), str(of["sha256"])) for name, of in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{file}: does not list its files; copy the artifact again") from None
    if content.get(SEAL) not in (None, "", seal_of(content)):
        raise UserError(
            f"{file}: is not what was written (it states another hash of itself); copy it again, or load "
            "it with verify=False (--no-verify) if the change is yours"
        )
    if outside := [name for name in found if leaves(name)]:
        raise UserError(f"{file.parent}: refers to '{outside[0]:.200}', which lies outside it")
    return found


def _in_list(file: Path) -> dict[str, Stated]:
    if not file.is_file():
        return {}
    found = {}
    for line in read_text(file, _LARGEST).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        matched = _LINE.fullmatch(line)
        if matched is None:
            raise UserError(
                f"{file}: {line[:60]!r} is no hash and name; copy it again, or take the list away if it is "
                "somebody's notes"
            )
        name, digest = matched[2] or matched[3], matched[1] or matched[4]
        if leaves(name):
            raise UserError(f"{file}: refers to '{name:.200}', which lies outside it")
        found[name] = Stated(None, digest.lower())
    return found


def _hashes(files: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        return list(pool.map(lambda file: _known.get(_look(file.stat())) or sha256_of(file), files))


def _look(state: os.stat_result) -> tuple[int, int, int, int]:
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
