"""Runs commands that stop themselves at a known place: a job for each line of its input, in JSON.

Imports once, then forks a process for each job. A job: `arguments` of compress-lm, and, if it is to stop,
`place` (the dotted name of a function), `call` (at which of its calls) and `action`: SIGKILL, SIGINT, or
`full`, after which no file can grow beyond 20 kB; `worker`: another command for the workers it starts. Prints
for each job a line with its exit status (negative: the signal that ended it), its standard error, and the
workers that outlived it.
"""

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FULL = 20_000  # bytes


def main() -> None:
    import onnxruntime  # noqa: F401 - what all jobs need, once
    import transformers.models.llama.modeling_llama  # noqa: F401

    import compress.api
    import compress.cli.commands
    import compress.measure.process  # noqa: F401

    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


def run(job: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        child = os.fork()
        if child == 0:
            in_child(job, folder)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        workers = [int(pid) for pid in (folder / "workers").read_text().split()]
        deadline = time.monotonic() + 30
        while any(map(alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.05)
        outlived = [pid for pid in workers if alive(pid)]
        return {"status": status, "err": (folder / "err").read_text(), "outlived": outlived}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def in_child(job: dict[str, Any], folder: Path) -> None:
    from compress.cli import commands as cli
    from compress.measure import process
    from compress.measure.process import WorkerProcess

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    workers = (folder / "workers").open("w", buffering=1)
    start = WorkerProcess.__init__

    def started(self: Any, *arguments: Any, **options: Any) -> None:
        start(self, *arguments, **options)
        print(self.pid, file=workers)

    WorkerProcess.__init__ = started  # type: ignore[method-assign]
    if "worker" in job:
        process.own_worker = lambda: job["worker"]
    if "place" in job:
        stop_at(job["place"], job["call"], job["action"])
    code = 0
    try:
        sys.argv = ["compress-lm", *job["arguments"]]
        cli.main()
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop_at(place: str, call: int, action: str) -> None:
    """Wrap the function so that its `call`-th call acts before it does its work."""
    owner_name, _, name = place.rpartition(".")
    owner = find(owner_name)
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def wrapped(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and action == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (_FULL, resource.RLIM_INFINITY))
        elif calls == call:
            os.kill(os.getpid(), signal.Signals[action])
        return original(*arguments, **options)

    setattr(owner, name, wrapped)


def find(name: str) -> Any:
    """A module, or a class in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, leaf = name.rpartition(".")
        return getattr(importlib.import_module(module), leaf)


if __name__ == "__main__":
    main()
