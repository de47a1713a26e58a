"""Worker processes for tests that are forked from one in which torch is imported: importing it takes most
of the time of a worker that reads a tiny model.

    python warm_workers.py serve SOCKET         imports once, then forks a worker for each who asks
    python warm_workers.py SOCKET RUNTIME THREADS   asks, and lives as long as the worker does

The second stands for `python -m compress.measure.worker RUNTIME THREADS`: the same pipes, the same answers,
the same exit status, and who kills it has killed the worker. Only the memory is less, since pages of
libraries that were touched by importing them are not counted. Linux only: elsewhere torch may not be forked.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

IMPORTED = ("torch", "transformers")  # the runtimes that take long to import


def serve(path: str) -> None:
    """Fork a worker for every connection, until the parent is gone."""
    from compress.measure import worker  # noqa: F401 - imported before anybody is forked
    from compress.runtimes import prepare

    prepare("torch")
    parent = os.getppid()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how the monitors end
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(path)
        door.listen()
        door.settimeout(1.0)
        while os.getppid() == parent:
            with contextlib.suppress(TimeoutError):
                connection, _ = door.accept()
                if os.fork() == 0:
                    door.close()
                    _monitor(connection)
                connection.close()


def _monitor(connection: socket.socket) -> None:
    """Fork the worker, end it with who asked, tell how it ended."""
    connection.setblocking(True)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    message, pipes, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    asked = json.loads(message)
    child = os.fork()
    if child == 0:
        connection.close()
        _work(asked, pipes)
    for pipe in pipes:
        os.close(pipe)
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError):
                connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
            os._exit(0)
        if select.select([connection], [], [], 0.02)[0]:  # nothing more is ever sent: it is gone
            os.kill(child, signal.SIGKILL)
            os._exit(0)


def _work(asked: dict, pipes: list[int]) -> None:
    from compress.measure import worker

    os.setsid()
    for number, pipe in enumerate(pipes):
        os.dup2(pipe, number)
        os.close(pipe)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    try:
        worker.main(asked["arguments"])
    finally:
        os._exit(1)


def ask(path: str, arguments: list[str]) -> None:
    """Have a worker forked on our pipes; end as it ends."""
    if arguments[0] not in IMPORTED:
        os.execv(sys.executable, [sys.executable, "-m", "compress.measure.worker", *arguments])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}
        socket.send_fds(connection, [json.dumps(asked).encode()], [0, 1, 2])
        for number in (0, 1):  # their ends are noticed
            os.close(number)
        status = connection.recv(16)
    code = int(status or b"1")
    if code < 0:
        os.kill(os.getpid(), -code)
    os._exit(code)


class WarmWorkers:
    """The command for a worker; the process that forks them begins with the first call."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._server: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """As `compress.measure.process.own_worker`."""
        path = Path(self._folder.name) / "socket"
        if self._server is None or self._server.poll() is not None:
            path.unlink(missing_ok=True)
            environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
            program = [sys.executable, __file__, "serve", str(path)]
            self._server = subprocess.Popen(program, env=environment, stdin=subprocess.DEVNULL)
            deadline = time.monotonic() + 120
            while not path.exists():
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the process that forks workers did not start")
                time.sleep(0.02)
        return [sys.executable, "-I", "-S", __file__, str(path)]

    def close(self) -> None:
        """End it."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        self._folder.cleanup()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        ask(sys.argv[1], sys.argv[2:])
