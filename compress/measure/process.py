"""The parent's end of a worker: start it, ask it, notice that it died, never leave it behind.

A worker gets a session of its own, so that Ctrl-C reaches only the parent, which then kills its workers.
A reader thread turns its replies into a queue, so that waiting has a limit and the end of the pipe is
noticed at once. What the worker writes to standard error goes to a file, of which the last lines are in
the error that is raised.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from compress.errors import UserError

STDERR_LINES = 12
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


class WorkerError(UserError):
    """A worker failed or died: says which, what it answered, and the end of its standard error."""

    longest = 4000


WAIT_POLICY = "OMP_WAIT_POLICY"  # how threads wait for each other; PASSIVE: they sleep


def own_worker() -> Sequence[str]:
    """The command of our own worker, before runtime and threads."""
    return (sys.executable, "-m", "compress.measure.worker")


class WorkerProcess:
    """A fresh process `python -m compress.measure.worker`, used as a context manager.

    `what` names the artifact in errors; `log`: file for its standard error; `patience`: seconds without a
    word after which it counts as hung; `sleeping`: its threads sleep while they wait for each other, for a
    machine whose cores are shared; `command`: another worker of the same language.
    """

    def __init__(
        self,
        runtime: str,
        threads: int,
        *,
        what: str,
        log: Path,
        patience: float = 1800.0,
        sleeping: bool = False,
        command: Sequence[str] | None = None,
    ) -> None:
        self.what, self._log, self.patience = what, log, patience
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*(command or own_worker()), runtime, str(threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(threads, sleeping),
                start_new_session=True,
                text=True,
                encoding="utf-8",
            )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def ask(self, do: str, advance: Callable[[], None] = lambda: None, **fields: Any) -> dict[str, Any]:
        """Give one command and wait for its answer; `advance` is called for each progress message.

        Raises:
            UserError: what the worker says the user can mend, in its words.
            WorkerError: it failed otherwise, died, or said nothing for too long.
        """
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError):  # it died before: the reader has noticed too, and tells more
            pipe.write(json.dumps({"do": do, **fields}) + "\n")
            pipe.flush()
        while True:
            reply = self._wait(do)
            if "ok" in reply:
                answer: dict[str, Any] = reply["ok"]
                return answer
            if "error" in reply:
                if reply["kind"] == "user":
                    raise UserError(f"{self.what}: {reply['error']}")
                raise WorkerError(self._story(f"'{do}' failed with {reply['error']}"))
            advance()

    def close(self) -> None:
        """End the worker: its input ends, and after a moment of grace it is killed."""
        if self._process.stdin is not None:
            with suppress(OSError):
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=5.0)
        self.kill()

    def kill(self) -> None:
        """Kill it now and take its pipes down."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            try:
                self._replies.put(json.loads(line))
            except ValueError:  # killed in the middle of a line
                break
        self._replies.put(None)

    def _wait(self, do: str) -> dict[str, Any]:
        deadline = time.monotonic() + self.patience
        try:
            reply = self._replies.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise WorkerError(self._story(f"no word for {self.patience:.0f} s after '{do}'")) from None
        if reply is None:
            self._replies.put(None)  # for the next one who asks
            code = self._process.wait()
            hint = " (killed: out of memory?)" if code == -9 else ""
            raise WorkerError(self._story(f"the worker died in '{do}', exit status {code}{hint}"))
        return reply

    def _story(self, reason: str) -> str:
        try:
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-STDERR_LINES:]
        except OSError:
            lines = []
        said = " | ".join(filter(None, map(str.strip, lines)))
        return f"{self.what}: {reason}" + (f"; its last words: {said}" if said else "")


def _environment(threads: int, sleeping: bool) -> dict[str, str]:
    """The parent's, with threads pinned, no network, and this very package importable."""
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    fixed = {
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # how threads wait is the runtime's own default here, whatever suits training
    inherited = {name: value for name, value in os.environ.items() if name != WAIT_POLICY}
    waiting = {WAIT_POLICY: "PASSIVE"} if sleeping else {}
    return inherited | fixed | waiting | {name: str(threads) for name in THREAD_VARIABLES}
