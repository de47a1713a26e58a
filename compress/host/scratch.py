"""Temporary folders that do not pile up: what a killed process left is removed by the next one of ours.

A folder holds `lock`, on which its process keeps a lock that the system takes away when the process ends,
however it ends, and `files`, which is handed out. Whoever makes a folder first removes those beside it whose
lock nobody holds. Between making a folder and locking it, only its name says whose it is: it has the number
of the process, and an empty one goes when no such process is there, or when it is an hour old.
"""

import os
import shutil
import stat
import tempfile
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX = "compress-scratch-"
_LOCK, _FILES = "lock", "files"
_OLD_SECONDS = 3600.0


class Scratch:
    """A temporary folder that lives as long as this value; `parent`: by default the system's place."""

    def __init__(self, parent: Path | None = None) -> None:
        place = Path(tempfile.gettempdir()) if parent is None else parent
        _sweep(place)
        folder = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=place))
        lock = _lock(folder)
        lock.acquire(timeout=0)
        self.path = folder / _FILES
        self.path.mkdir()
        self.remove = weakref.finalize(self, _remove, folder, lock)


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """The same, for the length of a block."""
    made = Scratch(parent)
    try:
        yield made.path
    finally:
        made.remove()


def _sweep(place: Path) -> None:
    """Remove what nobody holds; what belongs to others, or goes meanwhile, is theirs."""
    for folder in place.glob(f"{_PREFIX}*"):
        with suppress(OSError, Timeout):
            if not _ours(folder):
                continue
            if not (folder / _LOCK).exists():
                if _dead(folder) or time.time() - folder.stat().st_mtime > _OLD_SECONDS:
                    folder.rmdir()
                continue
            lock = _lock(folder)
            lock.acquire(timeout=0)
            _remove(folder, lock)


def _ours(folder: Path) -> bool:
    """Whether this user made it: in a place that all may write to a link could lead anywhere."""
    found = folder.lstat()
    own = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    return own and stat.S_ISDIR(found.st_mode)


def _dead(folder: Path) -> bool:
    """Whether the process that made a folder, by its name, is not there any more."""
    import psutil  # here, because few processes find such a folder

    number = folder.name.removeprefix(_PREFIX).partition("-")[0]
    return number.isdecimal() and not psutil.pid_exists(int(number))


def _lock(folder: Path) -> FileLock:
    return FileLock(folder / _LOCK, thread_local=False)  # whichever thread collects garbage may give it back


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder / _FILES, ignore_errors=True)  # while it is ours
    lock.release(force=True)
    shutil.rmtree(folder, ignore_errors=True)
