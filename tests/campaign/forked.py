"""One case in a child of this process: bounded in seconds and memory, watched, and asked how it ended.

Whatever is imported here is there in the child, so a case costs a fork and its work, and none can spoil the
next. The child's home, its working folder and its place for temporary files are folders of the case; an audit
hook notes what it writes elsewhere and whom it asks on the network, which it does not reach.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SECONDS = 20.0
MEMORY = 1_500_000_000  # bytes beyond those of this process
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
}
_NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"}
_SHORTAGE = (
    "not enough memory", "memory allocation", "memoryerror", "unable to allocate", "can't allocate",
    "bad_alloc", "cannot allocate",
)  # fmt: skip


class Wrong(Exception):
    """What was loaded is not what the files say, though that could be told."""


@dataclass(frozen=True)
class Ended:
    """How a case ended.

    `how`: "value" with what the call returned; "refused" with the line of a `UserError`; "wrong" with that
    of `Wrong`; "traceback"; "killed" with the signal; "hang"; "memory". `events`: what it did to others.
    """

    how: str
    value: Any = None
    line: str = ""
    printed: str = ""
    seconds: float = 0.0
    events: list[str] = field(default_factory=list)


def forked(
    call: Callable[[Path], Any],
    folder: Path,
    scratch: Path,
    *,
    seconds: float = SECONDS,
    memory: int = MEMORY,
) -> Ended:
    """`call(folder)` in a child; what it returns must go through JSON. `scratch` is its own, and emptied."""
    shutil.rmtree(scratch, ignore_errors=True)
    for name in ("home", "tmp"):
        (scratch / name).mkdir(parents=True)
    reader, writer = os.pipe()
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        _in_child(call, folder, scratch, writer, memory)
    os.close(writer)
    answer, late = _read(reader, started + seconds)
    os.close(reader)
    if late:
        _kill(pid)
    _, status, _ = os.wait4(pid, 0)
    _kill(pid)  # what it started and left
    took = time.monotonic() - started
    printed = "".join((scratch / name).read_text("utf-8", "replace") for name in ("out", "err"))
    if late:
        return Ended("hang", line=f"no answer after {seconds:.0f} s", printed=printed, seconds=took)
    if not answer:
        code = os.waitstatus_to_exitcode(status)
        said = printed.strip().splitlines()[-3:]
        how = "memory" if any(word in printed.lower() for word in _SHORTAGE) else "killed"
        return Ended(how, line=f"ended with {code}: {' '.join(said)}", printed=printed, seconds=took)
    found = json.loads(answer)
    if any(word in found["line"].lower() for word in _SHORTAGE):
        found["how"] = "memory"
    return Ended(printed=printed, seconds=took, **found)


def _read(reader: int, deadline: float) -> tuple[bytes, bool]:
    parts = []
    while (left := deadline - time.monotonic()) > 0:
        if not select.select([reader], [], [], left)[0]:
            break
        part = os.read(reader, 1 << 16)
        if not part:
            return b"".join(parts), False
        parts.append(part)
    return b"", True


def _kill(pid: int) -> None:
    """The child and what it started, which are a group of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _in_child(call: Callable[[Path], Any], folder: Path, scratch: Path, writer: int, memory: int) -> None:
    events: list[str] = []
    try:
        os.setpgid(0, 0)
        for number, name in ((0, None), (1, "out"), (2, "err")):
            place = os.devnull if name is None else str(scratch / name)
            os.dup2(os.open(place, os.O_RDWR | os.O_CREAT), number)
        home, temporary = scratch / "home", scratch / "tmp"
        os.environ.update(HOME=str(home), TMPDIR=str(temporary), HF_HUB_OFFLINE="0")
        tempfile.tempdir = str(temporary)
        os.chdir(home)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (_virtual_bytes() + memory,) * 2)
        sys.dont_write_bytecode = True
        socket.setdefaulttimeout(1)
        _watch(events, (str(scratch), str(folder), "/dev/null", "/proc/self", "/dev/shm"))
        found = _asked(call, folder)
    except BaseException:
        found = {"how": "traceback", "value": None, "line": traceback.format_exc()}
    try:
        data = json.dumps({**found, "events": events}).encode()
    except (TypeError, ValueError):
        data = json.dumps({"how": "traceback", "line": f"no JSON: {found!r:.200}", "events": events}).encode()
    sys.stdout.flush()
    sys.stderr.flush()
    while data:
        data = data[os.write(writer, data) :]
    os._exit(0)


def _asked(call: Callable[[Path], Any], folder: Path) -> dict[str, Any]:
    from compress.errors import UserError

    try:
        return {"how": "value", "value": call(folder), "line": ""}
    except UserError as error:
        return {"how": "refused", "value": None, "line": str(error)}
    except Wrong as error:
        return {"how": "wrong", "value": None, "line": str(error)}
    except BaseException:
        return {"how": "traceback", "value": None, "line": traceback.format_exc()[-3000:]}


def _virtual_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0])
    return pages * resource.getpagesize()


def _watch(events: list[str], own: tuple[str, ...]) -> None:
    """Note what is written outside, and refuse the network."""

    def outside(path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return not os.path.realpath(os.fsdecode(path)).startswith(own)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & _WRITES and outside(path):
                events.append(f"wrote {os.fsdecode(path)}")
        elif event in _CHANGES and outside(arguments[0]):
            events.append(f"{event} {os.fsdecode(arguments[0])}")
        elif event in _NETWORK and not (event == "socket.connect" and isinstance(arguments[1], str)):
            events.append(f"network: {event}{arguments[1:]!r:.80}")
            raise OSError("no network in this case")

    sys.addaudithook(hook)
