"""Disks that fill: a run on one too small ends with a line that names it, and goes on when there is room.

As root, on Linux, the folder of a case is a small file system of its own (tmpfs), of a size drawn between
nothing and what the whole run takes; room is given by enlarging it. Elsewhere no file of the run may grow
beyond a drawn number of bytes (RLIMIT_FSIZE), which fails with another error (EFBIG) at a similar place. The
target of an outcome says which it was. After the line every artifact that can be seen, and has a manifest,
must be whole. "right" is a run for which there was room after all.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from .core import Outcome, Settings
from .kills import Stage, broken, drawn_kind, said
from .runs import Kind, finish, forking, orphans

_OPTIONS = "mode=755,size={}k"
_LARGE = 512 * 1024  # kB: room for everything


def run(settings: Settings) -> Iterator[Outcome]:
    """`settings.count` runs on disks of random sizes."""
    with forking(settings.work) as forks:
        stage = Stage(settings.work, forks)
        mounts = can_mount(settings.work / "try")
        for number in range(settings.count):
            source = random.Random(f"{settings.seed} {number}")
            yield full(stage, source, f"--seed {settings.seed}: case {number}", mounts=mounts)


def full(
    stage: Stage, source: random.Random, label: str, *, mounts: bool, kind: Kind | None = None
) -> Outcome:
    """One case."""
    kind = kind or drawn_kind(stage, source, slow=0.05)
    whole = stage.whole(kind)
    case = stage.fresh()
    target = f"{kind.name} ({'a full file system' if mounts else 'a limit on the length of files'})"
    share = source.random()
    with disk(case, mounts) as resize:
        if mounts:
            kilobytes = max(16, int(share * whole.bytes / 1000))
            again = f"{label}: {kind.name} on a tmpfs of {kilobytes} kB"
            resize(kilobytes)
            # what it says, and temporary files, lie elsewhere: the disk of the run is full, no other
            stage.forks.start(kind.command(case), case, **stage.aside())
        else:
            longest = max(max(map(len, _contents(whole.state)), default=0), 2000)
            limit = int(1000 + share * longest)
            again = f"{label}: {kind.name} with files of at most {limit} bytes"
            stage.forks.start(kind.command(case), case, limit=limit, **stage.aside())
        status = finish(stage.forks)
        if left := orphans(case, stage.forks.pid):
            return Outcome(target, "orphan", "\n".join(left), again)
        if fault := _fault(stage, status, case):
            return Outcome(target, fault[0], fault[1], again)
        if torn := _torn(case):
            return Outcome(target, "torn", torn, again)
        resize(_LARGE)
        stage.forks.start(kind.command(case), case, **stage.aside())
        outcome = stage.judged(kind, finish(stage.forks), target, again)
        return replace(outcome, verdict="right") if status == 0 and not outcome.bad else outcome


def _fault(stage: Stage, status: int | None, case: Path) -> tuple[str, ...]:
    """What is wrong with how a run on a full disk ended: verdict and detail."""
    told = said(stage.log)
    if broken(stage.log):
        return "traceback", told[-3000:]
    if status == 0:  # there was room after all
        return ()
    last = (told.strip().splitlines() or [""])[-1]
    if status != 2 or not last.startswith("error: "):
        return "failed", f"exit status {status}; {told[-1000:]}"
    if not any(word in last.lower() for word in ("space", "room", "disk", "too large", "cannot be written")):
        return "unnamed", last
    if str(case) not in last and "disk" not in last:
        return "no place", last
    return ()


def _torn(case: Path) -> str:
    """The first artifact below a folder that can be seen and is not what its manifest states."""
    from compress.artifact.integrity import verify
    from compress.errors import UserError

    for manifest in sorted(case.rglob("manifest.json")):
        hidden = any(part.endswith(".partial") for part in manifest.parts)
        try:
            if not hidden:
                verify(manifest.parent)
        except UserError as error:
            return str(error)
    return ""


def _contents(state: dict[str, object]) -> Iterator[bytes]:
    return (content for content in state.values() if isinstance(content, bytes))


def can_mount(place: Path) -> bool:
    """Whether a file system can be made here."""
    place.mkdir()
    with disk(place, hasattr(os, "geteuid") and os.geteuid() == 0) as resize:
        try:
            resize(64)
        except OSError:
            return False
        return place.is_mount()


@contextmanager
def disk(place: Path, mounts: bool) -> Iterator[Callable[[int], None]]:
    """Yields what makes `place` a disk of so many kilobytes, or changes its size.

    Without `mounts` it does nothing.
    """

    def resize(kilobytes: int) -> None:
        if not mounts:
            return
        options = _OPTIONS.format(kilobytes)
        options = f"remount,{options}" if place.is_mount() else options
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "campaign", str(place)], capture_output=True, text=True
        )
        if done.returncode:
            raise OSError(done.stderr)

    try:
        yield resize
    finally:
        if place.is_mount():
            subprocess.run(["umount", "-l", str(place)], check=True)
