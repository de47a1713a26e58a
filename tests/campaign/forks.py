"""Commands of compress-lm in processes forked from this one, which has imported what they need.

A script: a JSON object per line on standard input is one command; it answers `{"pid": ...}` when the process
runs and `{"status": ...}` when it has ended (negative: the signal that ended it). A process is what a shell
would start: a session of its own, the system's handling of signals, its own standard streams, environment,
folder and file mode mask; what differs is that its imports are done. Jobs: `arguments` (of compress-lm, or
`{"make": FOLDER}` for the checkpoints), `env`, `cwd`, `out`, `err`, and what may befall it: `stop`, `clock`,
`limit`, `umask`.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

IMPORTS = (
    "onnxruntime", "transformers.models.llama.modeling_llama", "compress.api", "compress.cli.commands",
    "compress.measure.process", "compress.run.registry", "compress.export.onnx.artifact",
    "compress.export.gguf.artifact", "compress.export.compressed_tensors.artifact", "compress.run.preflight",
    "compress.training.loop", "compress.training.teaching.distillation",
)  # fmt: skip
# of the audit events: what changes the disk, or opens a file to write it
CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate", "shutil.rmtree"}
_WRITING = os.O_WRONLY | os.O_RDWR


def main() -> None:
    """Serve jobs until the input ends."""
    from importlib import import_module

    for name in IMPORTS:
        import_module(name)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            leave(job)
        print(json.dumps({"pid": child}), flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status}), flush=True)


def leave(job: dict[str, Any]) -> NoReturn:
    """Be the process of a job, and end as Python does; but without the destructors of libraries.

    They would join threads that the forked process never had.
    """
    code = 0
    try:
        become(job)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def become(job: dict[str, Any]) -> None:
    """Take the surroundings of a job, and do what it says."""
    os.setsid()
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        (2, job["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
    ):
        os.dup2(os.open(name, flags, 0o644), number)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(job["env"])
    tempfile.tempdir = None  # looked up anew
    os.chdir(job["cwd"])
    if "make" in job:
        make(Path(job["make"]))
        return
    if "umask" in job:
        os.umask(job["umask"])
    if "limit" in job:  # bytes of any one file
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], resource.RLIM_INFINITY))
    if "clock" in job:
        jump(**job["clock"])
    if "stop" in job:
        stop(**job["stop"])
    from compress.cli import main as command

    sys.argv = ["compress-lm", *job["arguments"]]
    command()


def stop(within: str, acts: str, at: int | None, number: int = 0, again: float | None = None) -> None:
    """Send this process a signal before its `at`-th act on a file below `within`; without `at` count them.

    The count goes into the file `acts` when the process ends. `again`: seconds until the signal comes twice.
    """
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        writes = (
            event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if not (event in CHANGES or writes):
            return
        if any(
            isinstance(path, str | os.PathLike) and os.fspath(path).startswith(within) for path in arguments
        ):
            count += 1
            if count == at:
                if again is not None:
                    later = threading.Timer(again, os.kill, (os.getpid(), number))
                    later.daemon = True
                    later.start()
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)
    if at is None:
        atexit.register(lambda: Path(acts).write_text(str(count), encoding="utf-8"))


def jump(after: float, seconds: float) -> None:
    """Set the clock by `seconds` when `after` seconds have passed; what counts seconds goes on evenly."""
    now, begun = time.time, time.monotonic()

    def shifted() -> float:
        return now() + (seconds if time.monotonic() - begun >= after else 0.0)

    time.time = shifted
    time.time_ns = lambda: int(shifted() * 1e9)


def make(folder: Path) -> None:
    """Save the checkpoints that runs start from: `plain`, the same in shards, and `large`, both a Llama."""
    import torch

    from compress.models.create import Architecture, create
    from compress.text.documents import load_documents

    documents = load_documents(str(folder / "text"))
    shape: dict[str, Any] = {"preset": "1m", "vocab_size": 320, "context": 256}
    shape |= {"layers": 3, "hidden": 64, "heads": 4, "kv_heads": 2, "intermediate": 128}
    model, tokenizer = create(Architecture(**shape), documents, seed=0)
    with torch.no_grad():
        for weight in model.parameters():  # at its small random start logits hardly differ
            if weight.dim() == 2:
                weight.mul_(4)
    for name, shard in (("plain", "1GB"), ("sharded", "100KB")):
        model.save_pretrained(folder / name, max_shard_size=shard)
        tokenizer.save_pretrained(folder / name)


if __name__ == "__main__":
    main()
