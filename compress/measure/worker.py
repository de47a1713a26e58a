"""The process in which one artifact is loaded and measured: `python -m compress.measure.worker RUNTIME
THREADS`.

It reads one JSON object per line from standard input, `{"do": COMMAND, ...}`, and answers each with one
line, `{"ok": {...}}` or `{"error": ..., "kind": ...}`, after any number of `{"advance": 1}`. Whatever
libraries print goes to standard error. Only the runtime that was asked for is imported, before the first
command, so that the time to load is that of the artifact and the peak memory is that of a process which
deploys it. It ends when its input ends or its parent is gone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from compress.errors import UserError
from compress.generation.plain import continue_tokens
from compress.generation.sampling import Chooser, Sampling
from compress.host.memory import peak_rss_bytes
from compress.measure import encoder_latency, latency, quality
from compress.measure.label_likelihood import LabelLikelihood
from compress.measure.process import PARENT, WAIT_POLICY
from compress.measure.written import write_texts
from compress.runtimes import open_runtime, prepare
from compress.runtimes.base import Runtime
from compress.tasks.prompted import PROMPTED
from compress.text.examples import Examples
from compress.text.translation import TranslatedWindows

Fields = dict[str, Any]


class Worker:
    """One artifact in one runtime, and the commands that it understands (`COMMANDS`).

    `opener` opens it, with the arguments of `open_runtime`, which does unless told otherwise: runtimes that
    are not ours are timed in the same way.
    """

    def __init__(
        self,
        runtime: str,
        threads: int,
        advance: Callable[[], None],
        opener: Callable[..., Runtime] | None = None,
    ) -> None:
        self._name, self._threads, self._advance = runtime, threads, advance
        # files are verified before, by who measures: it would count as loading
        self._open = opener or partial(open_runtime, verify=False)
        self._runtime: Runtime | None = None

    def ready(self) -> Fields:
        """Answers when the imports are done."""
        return {}

    def load(self, path: str, provider: str = "cpu") -> Fields:
        """Load the artifact; from now on the other commands work, and one loaded before is gone."""
        self._runtime = None
        start = time.perf_counter()
        sleeping: Fields = {"waiting": "sleep"} if os.environ.get(WAIT_POLICY) == "PASSIVE" else {}
        runtime = self._runtime = self._open(
            Path(path), self._name, self._threads, provider=provider, **sleeping
        )
        return {
            "load_seconds": time.perf_counter() - start,
            "weight_bytes": runtime.weight_bytes,
            "device": runtime.device,
            "context": runtime.context,
            "task": runtime.task.name,
            "width": getattr(runtime, "width", None),
        }

    def time_round(
        self,
        prompt: str,
        following: str,
        repetitions: int,
        warm_up: int,
        rehearse: bool = True,
        seconds: float = math.inf,
    ) -> Fields:
        """One round of latency on two .npy files of tokens, and the peak memory up to here."""
        after = np.load(following)
        if not self.loaded.task.writes:
            after = after[:, :0]  # an encoder reads whole texts and appends nothing
        samples = latency.time_round(
            self.loaded, np.load(prompt), after, repetitions, warm_up, rehearse, seconds
        )
        return asdict(samples) | {"peak_rss_bytes": peak_rss_bytes()}

    def time_cell(self, texts: str, widths: list[int], first: int) -> Fields:
        """A cell of an encoder's grid, on an .npy file of tokens [batch, widest]."""
        return encoder_latency.time_cell(self.loaded, np.load(texts), widths, first)

    def score(
        self,
        windows: str,
        base: str | None,
        keep: str | None,
        part: tuple[int, int],
        translated: str | None = None,
        writing: Fields | None = None,
    ) -> Fields:
        """Quality on windows [first, end) of a .npy file, or texts with labels of an .npz file; the others as
        in `quality.score`, `translated` an .npz file. `writing`: how texts are written of the sources, which
        is answered besides (`write_texts`)."""
        examples = Examples.load(Path(windows)) if windows.endswith(".npz") else None
        forward, task, together = self.loaded.logits, self.loaded.task, getattr(self.loaded, "together", 1)
        written: Fields = {}
        if writing is not None and examples is not None:
            texts = write_texts(
                self.loaded, examples, range(*part), **writing, together=together, advance=self._advance
            )
            written = {"written": texts}
        if examples is not None and examples.prompt is not None:
            forward, task, together = LabelLikelihood(self.loaded, examples), PROMPTED, 1
        scores = quality.score(
            forward,
            np.load(windows) if examples is None else examples,
            base=None if base is None else Path(base),
            keep=None if keep is None else Path(keep),
            threads=self._threads,
            together=together,
            task=task,
            mask_token=self.loaded.mask_token,
            translated=None if translated is None else TranslatedWindows.load(Path(translated)),
            part=range(*part),
            advance=(lambda: None) if written else self._advance,
        )
        return scores.to_json() | written

    def count_parameters(self) -> Fields:
        """Parameters and those that are not zero, where the runtime can tell."""
        count = getattr(self.loaded, "parameter_counts", None)
        total, nonzero = (None, None) if count is None else count()
        return {"parameters": total, "nonzero_parameters": nonzero}

    def generate(self, tokens: list[int], limit: int, stop: list[int]) -> Fields:
        """Greedy continuation of at most `limit` tokens, ended by one of `stop` (which is left out).

        None from an encoder, which continues nothing.
        """
        runtime = self.loaded
        if not runtime.task.writes:
            return {"tokens": None}
        limit = min(limit, runtime.context - len(tokens))
        return {"tokens": list(continue_tokens(runtime, tokens, Chooser(Sampling()), limit, stop))}

    @classmethod
    def answer(cls, arguments: Sequence[str], opener: Callable[..., Runtime]) -> None:
        """Be the process of a runtime that is not ours: `arguments` are its name and the threads."""
        runtime, threads = arguments
        serve(lambda advance: cls(runtime, int(threads), advance, opener))

    @property
    def loaded(self) -> Runtime:
        """What `load` opened."""
        if self._runtime is None:
            raise RuntimeError("the first command must be load")
        return self._runtime


COMMANDS = ("ready", "load", "time_round", "time_cell", "score", "count_parameters", "generate")


def main(arguments: list[str]) -> None:
    """The process for one of our runtimes."""
    runtime, threads = arguments

    def make(advance: Callable[[], None]) -> Worker:
        prepare(runtime)
        return Worker(runtime, int(threads), advance)

    serve(make)


def serve(make: Callable[[Callable[[], None]], Worker]) -> None:
    """Answer commands until the input ends; `make` is given what tells progress, and may take its time."""
    replies = _claim_stdout()
    _end_with_parent()
    worker = make(lambda: _write(replies, {"advance": 1}))
    for line in sys.stdin:
        message = json.loads(line)
        command = message.pop("do")
        if command not in COMMANDS:
            raise ValueError(f"unknown command {command!r}")
        try:
            _write(replies, {"ok": getattr(worker, command)(**message)})
        except UserError as error:
            _write(replies, {"error": str(error), "kind": "user"})
        except Exception as error:
            traceback.print_exc()
            _write(replies, {"error": f"{type(error).__name__}: {error}", "kind": "failure"})
    os._exit(0)  # nothing is left to tidy, and taking torch down in order costs a second


def _claim_stdout() -> TextIO:
    """Keep the pipe for replies alone: what libraries print, even from C, goes to standard error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _write(replies: TextIO, message: Fields) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


def _end_with_parent() -> None:
    """A killed parent cannot kill us: leave when we have been handed to another one.

    It may have been killed before we could ask who it is; it says so itself where it can.
    """
    parent = int(os.environ.get(PARENT, os.getppid()))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main(sys.argv[1:])
