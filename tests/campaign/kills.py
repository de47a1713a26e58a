"""Runs stopped at random moments by SIGINT, SIGTERM or SIGKILL, once or several times, then run to their end.

A run that was stopped must end like one that was not: the same bytes in every file, nothing else on the disk,
no process left. What stops it comes either at a moment drawn from the duration of the whole run, or before a
drawn one of its acts on the disk (opening to write, renaming, removing, linking, making a folder), where a
file that is half-written, or written and not yet known, would do harm. SIGINT and SIGTERM end it with one
line and exit code 130; they come twice at times, and at times to the whole process group, as from a
terminal. "right" is a run that ended before it was stopped.
One case in `_SHELL` is a process that a shell would start, the others are forked (forks.py).
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .core import Outcome, Settings
from .runs import SLOW, Forks, Ground, Kind, Shell, differences, finish, forking, orphans, state, tree

_SHELL = 12
_SLOW_SHARE = 0.08  # of the cases: kinds that measure take a dozen seconds
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
_LINES = ("interrupted; run the same command again to resume", "interrupted; nothing was begun")
_BROKEN = ("Traceback (most recent call last)", "Exception ignored", "terminate called", "Fatal Python")


@dataclass(frozen=True)
class Whole:
    """A run that nothing stopped: its duration, acts on the disk, what it left, where, and how much."""

    seconds: float
    shell_seconds: float
    acts: int
    state: dict[str, Any]
    tree: set[str]
    bytes: int


@dataclass(frozen=True)
class Stop:
    """How a run is stopped: `at` seconds after its start, or before its `act`-th act on the disk.

    `again`: seconds until the signal comes once more; `group`: whether it goes to the whole process group.
    """

    number: int
    at: float
    act: int | None
    again: float | None
    group: bool

    def __str__(self) -> str:
        """For people."""
        name = signal.Signals(self.number).name + (" to the group" if self.group and self.act is None else "")
        when = f"after {self.at:.3f} s" if self.act is None else f"before act {self.act}"
        return f"{name} {when}" + ("" if self.again is None else f", again {self.again * 1000:.0f} ms later")


class Stage:
    """Where cases of one part run: the ground, the server, and runs that nothing stopped."""

    def __init__(self, work: Path, forks: Forks) -> None:
        self.work, self.forks = work, forks
        self.ground = Ground(work / "ground")
        self.ground.make(forks)
        time.sleep(2.5)  # a file as young as this is hashed again each time, which the records tell
        self.wholes: dict[str, Whole] = {}
        self.log = self.case  # where the streams of the command go

    @property
    def case(self) -> Path:
        """Every case has this folder, since records hold the paths of models."""
        return self.work / "case"

    def fresh(self) -> Path:
        """The folder of a case, empty."""
        shutil.rmtree(self.case, ignore_errors=True)
        self.case.mkdir()
        self.log = self.case
        return self.case

    def aside(self) -> dict[str, Any]:
        """Of a job: its streams go to a folder of their own."""
        self.log = self.work / "log"
        self.log.mkdir(exist_ok=True)
        return {"out": str(self.log / "out"), "err": str(self.log / "err")}

    def whole(self, kind: Kind) -> Whole:
        """The run of a kind that nothing stops, made once."""
        if kind.name not in self.wholes:
            case = self.fresh()
            begun = time.monotonic()
            count = {"within": str(case), "acts": str(self.work / "acts"), "at": None}
            self.forks.start(kind.command(case), case, stop=count)
            status = finish(self.forks)
            seconds = time.monotonic() - begun
            if status != 0:
                raise RuntimeError(f"{kind.name}: ends with {status}: {said(case)[-2000:]}")
            acts = int((self.work / "acts").read_text())
            importing = 4.0  # of a process that imports what the server has imported
            held = sum({f.stat().st_ino: f.stat().st_size for f in case.rglob("*") if f.is_file()}.values())
            self.wholes[kind.name] = Whole(
                seconds, seconds + importing, acts, state(case, kind), tree(case), held
            )
        return self.wholes[kind.name]

    def judged(self, kind: Kind, status: int | None, target: str, again: str) -> Outcome:
        """What there is to say of a case whose command has ended and should have worked."""
        whole, case = self.wholes[kind.name], self.case
        if status != 0 or broken(self.log):
            verdict = "traceback" if broken(self.log) else "failed"
            return Outcome(target, verdict, end(self.log, status), again)
        if told := differences(state(case, kind), whole.state):
            return Outcome(target, "other bytes", "\n".join(told[:9]), again)
        if extra := sorted(tree(case) - whole.tree):
            return Outcome(target, "left behind", "\n".join(extra[:9]), again)
        return Outcome(target, "resumed")


def run(settings: Settings) -> Iterator[Outcome]:
    """`settings.count` runs stopped and run again; kinds of runs take turns."""
    with forking(settings.work) as forks:
        stage = Stage(settings.work, forks)
        for number in range(settings.count):
            yield killed(
                stage, random.Random(f"{settings.seed} {number}"), f"--seed {settings.seed}: case {number}"
            )


def drawn_kind(stage: Stage, source: random.Random, slow: float = _SLOW_SHARE) -> Kind:
    """One of the kinds; those that take long seldom."""
    names = [name for name in stage.ground.kinds if (name in SLOW) == (source.random() < slow)]
    quick = [name for name in stage.ground.kinds if name not in SLOW]
    return stage.ground.kinds[source.choice(names or quick)]


def killed(
    stage: Stage,
    source: random.Random,
    label: str,
    kind: Kind | None = None,
    shells: Sequence[bool] = (True, *[False] * (_SHELL - 1)),
) -> Outcome:
    """One case; `shells`: to draw from, whether a shell would start it."""
    kind = kind or drawn_kind(stage, source)
    whole = stage.whole(kind)
    shell = source.choice(shells)
    runner: Forks | Shell = Shell() if shell else stage.forks
    stops = [_drawn(source, whole, shell) for _ in range(source.choice((1, 1, 1, 2)))]
    case = stage.fresh()
    again = f"{label}: {kind.name}{' in a shell' if shell else ''}: {'; '.join(map(str, stops))}"
    stopped = False
    for stop in stops:
        status = _stopped(runner, kind, case, stop)
        if fault := _fault(status, stop, case, runner.pid):
            return Outcome(kind.name, fault[0], fault[1], again)
        stopped |= status != 0
    runner.start(kind.command(case), case)
    status = finish(runner)
    if left := orphans(case, runner.pid):
        return Outcome(kind.name, "orphan", "\n".join(left), again)
    outcome = stage.judged(kind, status, kind.name, again)
    return outcome if stopped or outcome.bad else replace(outcome, verdict="right")


def said(case: Path) -> str:
    """What a command wrote to standard error."""
    return (case / "err").read_text(encoding="utf-8", errors="replace")


def broken(case: Path) -> bool:
    """Whether it told of a fault in a program."""
    return any(words in said(case) for words in _BROKEN)


def _drawn(source: random.Random, whole: Whole, shell: bool) -> Stop:
    number = source.choice(_SIGNALS)
    by_act = not shell and source.random() < 0.5
    again = source.choice((None, None, 0.0, source.uniform(0.0, 0.05), source.uniform(0.0, 1.0)))
    return Stop(
        number,
        source.uniform(0.0, whole.shell_seconds if shell else whole.seconds),
        source.randint(1, whole.acts) if by_act else None,
        None if number == signal.SIGKILL else again,
        source.random() < 0.5,
    )


def _stopped(runner: Forks | Shell, kind: Kind, case: Path, stop: Stop) -> int | None:
    """Start the command, stop it; its exit status."""
    if stop.act is not None:
        hook = {
            "within": str(case),
            "acts": "",
            "at": stop.act,
            "number": int(stop.number),
            "again": stop.again,
        }
        pid = runner.start(kind.command(case), case, stop=hook)
        return finish(runner)
    pid = runner.start(kind.command(case), case)
    status = runner.wait(stop.at)
    for pause in (0.0, stop.again):
        if status is None and pause is not None:
            status = runner.wait(pause) if pause else None
            with contextlib.suppress(ProcessLookupError):
                (os.killpg if stop.group else os.kill)(pid, stop.number)
    return finish(runner, 60) if status is None else status


def _fault(status: int | None, stop: Stop, case: Path, session: int) -> Sequence[str]:
    """What is wrong with how a stopped run ended: verdict and detail; or nothing."""
    if left := orphans(case, session):
        return "orphan", "\n".join(left)
    if broken(case):
        return "traceback", end(case, status)
    if status is None:
        return "hang", f"60 s after {stop}"
    expected = {0, -signal.SIGKILL} if stop.number == signal.SIGKILL else {0, 130}
    last = said(case).strip().splitlines()[-1:]
    if status not in expected or (status == 130 and last not in [[line] for line in _LINES]):
        return "failed", f"after {stop}: {end(case, status)}"
    return ()


def end(case: Path, status: int | None) -> str:
    """How a command ended, and what it said."""
    return f"exit status {status}; {said(case)[-3000:].strip()}"
