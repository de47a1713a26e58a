"""Surroundings that a run may meet: each ends right, or in one line, and then goes on to the same bytes.

Folders that cannot be written or vanish, two runs of one folder, a core hog, clocks that jump, no temporary
folder, no home, a strict file mode mask, a path with spaces and letters of other scripts, a current folder
that was deleted, closed streams, a reader of the output that went away, a terminal.
"""

from __future__ import annotations

import contextlib
import os
import pty
import random
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from .core import Outcome, Settings
from .disks import can_mount, disk
from .kills import Stage, broken, drawn_kind, end, said
from .runs import Forks, Kind, Shell, differences, environment, finish, forking, orphans, state

_HOURS = 3600.0


class Scene:
    """A case: where it plays, what is drawn, and a second server for a second run."""

    def __init__(self, stage: Stage, second: Forks, source: random.Random, kind: Kind) -> None:
        self.stage, self.forks, self.second, self.source, self.kind = stage, stage.forks, second, source, kind
        self.whole = stage.whole(kind)
        self.case = stage.fresh()
        self.command = kind.command(self.case)

    def moment(self) -> float:
        """Seconds, somewhere in the run."""
        return self.source.uniform(0.0, self.whole.seconds)

    def forked(self, **more: Any) -> int | None:
        """The run in a forked process, to its end."""
        self.forks.start(self.command, self.case, **more)
        return finish(self.forks)

    def shell(self, tail: str = "", before: str = "", **env: str) -> int | None:
        """The run as a line of a shell."""
        (self.case / "tmp").mkdir(exist_ok=True)
        line = f"{before}{shlex.join([sys.executable, '-m', 'compress', *self.command])} {tail}"
        given = {name: value for name, value in (environment(self.case) | env).items() if value}
        with (self.case / "out").open("wb") as out, (self.case / "err").open("wb") as err:
            done = subprocess.run(
                ["bash", "-o", "pipefail", "-c", line], stdin=subprocess.DEVNULL, stdout=out, stderr=err,
                cwd=self.case, env=given, timeout=180,
            )  # fmt: skip
        return done.returncode


def read_only(scene: Scene) -> int | None:
    """The disk is read-only from some moment on, and later is not."""
    with disk(scene.case, mounts=True) as resize:
        resize(512 * 1024)
        scene.forks.start(scene.command, scene.case, **scene.stage.aside())
        status = scene.forks.wait(scene.source.choice((0.0, scene.moment())))
        for _ in range(100):  # refused while a file is open for writing
            done = subprocess.run(["mount", "-o", "remount,ro", str(scene.case)], capture_output=True)
            if done.returncode == 0:
                break
            time.sleep(0.01)
        status = finish(scene.forks) if status is None else status
        subprocess.run(["mount", "-o", "remount,rw", str(scene.case)], check=True)
        if scene.case.joinpath(scene.kind.output).exists():
            shutil.copytree(scene.case / scene.kind.output, scene.stage.work / "kept")
    if (scene.stage.work / "kept").exists():
        shutil.move(scene.stage.work / "kept", scene.case / scene.kind.output)
    return status


def vanishing(scene: Scene) -> int | None:
    """The folder is moved away at some moment."""
    scene.forks.start(scene.command, scene.case)
    status = scene.forks.wait(scene.moment())
    with contextlib.suppress(OSError):
        (scene.case / scene.kind.output).rename(scene.stage.work / "gone")
    shutil.rmtree(scene.stage.work / "gone", ignore_errors=True)
    return finish(scene.forks) if status is None else status


def two_at_once(scene: Scene) -> int | None:
    """A second run of the same folder at some moment of the first; both end, and one of them did the work."""
    scene.forks.start(scene.command, scene.case)
    status = scene.forks.wait(scene.moment() / 2)
    streams = {"out": str(scene.case / "out2"), "err": str(scene.case / "err2")}
    scene.second.start(scene.command, scene.case, **streams)
    other = finish(scene.second)
    status = finish(scene.forks) if status is None else status
    told = (scene.case / "err2").read_text()
    last = told.strip().splitlines()[-1:]
    for name in ("out2", "err2"):
        (scene.case / name).unlink()
    refused = other == 2 and last and last[0].startswith("error: ") and "another run" in last[0]
    if other != 0 and not refused:
        (scene.stage.log / "err").write_text(f"the second run: exit status {other}: {told}")
        return other
    return status


def hog(scene: Scene) -> int | None:
    """Another program takes a core all the time."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            return scene.forked()
        finally:
            busy.kill()


def clock(scene: Scene) -> int | None:
    """The clock is set back or forward by hours, at some moment."""
    hours = scene.source.choice((-9.0, -1.0, 1.0, 9.0, 9000.0))
    return scene.forked(clock={"after": scene.moment(), "seconds": hours * _HOURS})


def terminal(scene: Scene) -> int | None:
    """Output goes to a terminal, with bars of progress."""
    ours, theirs = pty.openpty()
    said: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):
            while data := os.read(ours, 4096):
                said.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    shell = Shell()
    shell.start(scene.command, scene.case, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    status = finish(shell)
    reader.join(10)
    os.close(ours)
    (scene.case / "err").write_bytes(b"".join(said))
    return status


def odd_path(scene: Scene) -> int | None:
    """The folder's name has spaces, quotes and letters of other scripts."""
    name = "run's \u00e9\u00df \u6a21\u578b #1 %20"
    scene.command = replace(scene.kind, output=name).command(scene.case)
    status = scene.forked()
    with contextlib.suppress(FileNotFoundError):
        (scene.case / name).rename(scene.case / scene.kind.output)
    return status


_MISSING = "/nonexistent/folder"
SCENES: dict[str, Callable[[Scene], int | None]] = {
    "read-only disk": read_only,
    "folder vanishes": vanishing,
    "two runs at once": two_at_once,
    "core hog": hog,
    "clock jumps": clock,
    "no temporary folder": lambda scene: scene.shell(TMPDIR=_MISSING),
    "no home": lambda scene: scene.shell(before="unset HOME; "),
    "home missing": lambda scene: scene.shell(HOME=_MISSING),
    "umask 077": lambda scene: scene.forked(umask=0o077),
    "odd path": odd_path,
    "current folder deleted": lambda scene: scene.shell(before='mkdir "$PWD/g" && cd g && rmdir ../g && '),
    "reader went away": lambda scene: scene.shell("| true"),
    "output closed": lambda scene: scene.shell(">&-"),
    "errors closed": lambda scene: scene.shell("2>&-"),
    "input closed": lambda scene: scene.shell("<&-"),
    "ASCII locale": lambda scene: scene.shell(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
    "terminal": terminal,
}
FOR_ROOT = ("read-only disk",)


def run(settings: Settings) -> Iterator[Outcome]:
    """Every scene in turn, with kinds of runs drawn at random."""
    with forking(settings.work) as forks, forking(settings.work / "second") as second:
        stage = Stage(settings.work, forks)
        names = [name for name in SCENES if name not in FOR_ROOT or can_mount(settings.work / "try")]
        if len(names) < len(SCENES):
            print(f"not run, since this is not root on Linux: {', '.join(FOR_ROOT)}", file=sys.stderr)
        for number in range(settings.count):
            source = random.Random(f"{settings.seed} {number}")
            kind = drawn_kind(stage, source, slow=0.0)
            if kind.name == "command":  # its recipe is named after the folder
                kind = stage.ground.kinds["exported"]
            scene = Scene(stage, second, source, kind)
            label = f"--seed {settings.seed}: case {number}: {names[number % len(names)]}: {kind.name}"
            yield met(scene, names[number % len(names)], label)


def met(scene: Scene, name: str, again: str) -> Outcome:
    """One case: how the run ended there, then whether it goes on to the same bytes."""
    status = SCENES[name](scene)
    log, case = scene.stage.log, scene.case
    if left := orphans(case, scene.forks.pid):
        return Outcome(name, "orphan", "\n".join(left), again)
    if broken(log):
        return Outcome(name, "traceback", end(log, status), again)
    last = (said(log).strip().splitlines() or [""])[-1]
    # whose output nobody reads ends without a word, as other programs do; what it wrote to disk counts
    unread = name == "reader went away" and status in (1, 141)
    if status != 0 and not unread and not (status == 2 and last.startswith("error: ")):
        return Outcome(name, "failed", end(log, status), again)
    if status == 0 and name not in ("folder vanishes", "two runs at once"):
        if told := differences(state(case, scene.kind), scene.whole.state):
            return Outcome(name, "other bytes", "\n".join(told[:9]), again)
        return Outcome(name, "right")
    scene.command = scene.kind.command(case)
    scene.stage.log = case
    return scene.stage.judged(scene.kind, scene.forked(), name, again)
