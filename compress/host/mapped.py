"""Memory that is still a file: which parts of it are mapped, and how pages are given back (Linux).

A mapped page is read when it is first touched. Until then a change of the file changes it, and one that was
cut off is a SIGBUS.
"""

import ctypes
import mmap
from contextlib import suppress
from pathlib import Path

_DONTNEED = 4  # of madvise: the pages may go, and would be read from the file again


def mapped_files(suffix: str) -> list[tuple[int, int, str]] | None:
    """Start, end and file of every part of this process's memory that is a file with that suffix.

    None where the system does not tell.
    """
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].removesuffix(" (deleted)").endswith(suffix):
            start, _, end = parts[0].partition("-")
            found.append((int(start, 16), int(end, 16), parts[5]))
    return found


def drop_pages(address: int, size: int) -> None:
    """Let go of the whole pages among `size` bytes of a mapped file, which nobody reads any more."""
    start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (address + size) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _DONTNEED)
