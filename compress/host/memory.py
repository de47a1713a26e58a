"""Memory is three numbers, never mixed: bytes on disk, bytes of weights resident, peak RSS of a fresh
process.

Bytes on disk are what one would copy to deploy: every file of the artifact's folder, without the exports
that lie inside it (each is an artifact of its own). Resident weight bytes come from the
runtime that holds them. Peak RSS is the high-water mark of the process that calls `peak_rss_bytes`: VmHWM
where Linux tells it, else `getrusage`. It counts everything that was ever resident together: interpreter,
libraries, mapped files, weights, activations. Limits: pages of a shared file mapping count fully in each
process.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # in malloc.h
_LEARNT, _MAPPED = 32 << 20, 1 << 16  # what glibc comes to by itself: bytes, a number of arrays


def peak_rss_bytes() -> int | None:
    """High-water mark of this process's resident memory in bytes; None where the system does not tell."""
    hwm = _proc_field(Path("/proc/self/status"), "VmHWM:")
    if hwm is not None:
        return hwm
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB elsewhere


def reset_peak() -> None:
    """Start a new high-water mark (Linux; elsewhere the mark is that of the whole process)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def trim() -> None:
    """Give freed memory back to the system (glibc; elsewhere nothing happens).

    Freed arrays of a few megabytes stay in the heap, between others that live on. Over many blocks of a
    model such holes add up, and the peak would grow with depth.
    """
    with suppress(OSError, AttributeError, TypeError):  # no such library, function, or name for it
        ctypes.CDLL(None).malloc_trim(0)


def give_back() -> None:
    """As `trim`, after freeing what only refers to itself, as models do."""
    gc.collect()
    trim()


@contextmanager
def returned_at_once() -> Iterator[None]:
    """While the block runs, freed arrays of 8 MB and more go back to the system at once (glibc).

    By itself glibc learns to keep arrays of up to 32 MB, which saves time and lets a peak be half holes; at
    the end that is its rule again.
    """
    _keep_below(8 << 20)
    try:
        yield
    finally:
        _keep_below(_LEARNT)


@contextmanager
def kept_for_reuse() -> Iterator[None]:
    """While the block runs, freed memory stays with the process, for the next array of its size (glibc).

    For loops that ask for the same large arrays again and again. By itself glibc gives each back and gets
    fresh pages, which the system has to find and to clear: a third of a training step of a model of 135 M
    parameters. The peak is about the same.
    """
    _set_malloc(_M_MMAP_MAX, 0)
    _set_malloc(_M_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        _set_malloc(_M_MMAP_MAX, _MAPPED)
        _set_malloc(_M_TRIM_THRESHOLD, 2 * _LEARNT)
        trim()


def _keep_below(size: int) -> None:
    _set_malloc(_M_MMAP_THRESHOLD, size)


def _set_malloc(option: int, value: int) -> None:
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(option, value)


def total_memory_bytes() -> int:
    """Physical memory of the machine."""
    import psutil  # here, because workers that report their own peak must not pay for it

    return int(psutil.virtual_memory().total)


def available_memory_bytes() -> int:
    """What new processes can take without swapping, a container's limit included."""
    import psutil

    available = int(psutil.virtual_memory().available)
    limit, used = _number("/sys/fs/cgroup/memory.max"), _number("/sys/fs/cgroup/memory.current")
    if limit is not None and used is not None:
        available = min(available, max(0, limit - used))
    return available


def _proc_field(file: Path, field: str) -> int | None:
    """Bytes of a `Name:   123 kB` line, None where file or line are missing."""
    try:
        for line in file.read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _number(file: str) -> int | None:
    try:
        return int(Path(file).read_text())
    except (OSError, ValueError):  # absent, or "max"
        return None


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Collect now, and not while the block runs: what is timed should not pay for it."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
