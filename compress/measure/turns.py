"""The processes that are measured, one per artifact and runtime, and their turns of timing.

All are alive together where their models fit into memory; else each is started anew for its turn, and the
protocol of the result says so. Imports of all run at the same time, loading and measuring in turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from compress.artifact.folder import disk_bytes
from compress.host.load import Load, crowded
from compress.host.memory import available_memory_bytes
from compress.host.progress import Tracker
from compress.measure import latency
from compress.measure.encoder_latency import TURNS, Grid, cells_of
from compress.measure.process import WorkerProcess
from compress.measure.reference import Reference
from compress.records.protocol import WARM_DECODES, MeasureProtocol
from compress.runtimes import process_bytes
from compress.tasks.registry import task_named
from compress.text.translation import Translation

MODEL_FACTOR = 2.5  # memory per byte on disk: weights, what loading needs beside them, activations
DECODE_TOKENS = 20  # a decoded token takes as long as so many of a prompt: 40 in torch, 10 in ONNX Runtime


@dataclass(frozen=True)
class Target:
    """What to measure. `path`: the artifact that `runtime` loads; `artifact`: how the result names it."""

    variant: str
    runtime: str
    path: Path
    fingerprint: str = ""
    artifact: str = ""

    def __str__(self) -> str:
        return f"{self.variant} in {self.runtime}"

    @property
    def key(self) -> str:
        """What tells it from all others, and from itself before it was made anew."""
        return f"{self} {self.fingerprint}"


class Workers:
    """The worker processes of one measurement. All of them end with `stack`."""

    def __init__(
        self,
        protocol: MeasureProtocol,
        reference: Reference,
        bar: Tracker,
        stack: ExitStack,
        own_lengths: Sequence[int] = (),
    ) -> None:
        self.protocol, self.reference, self.bar, self.stack = protocol, reference, bar, stack
        self.workers: dict[Target, WorkerProcess] = {}
        self.facts: dict[Target, dict[str, Any]] = {}
        self.started = 0
        self.own_lengths = own_lengths
        self.grids: dict[Target, Grid] = {}  # of encoders
        self.sleeping = crowded()  # threads that spin would keep other programs, and each other, from cores

    def start(self, target: Target) -> WorkerProcess:
        """A fresh process that begins to import its runtime."""
        log = self.reference.folder / f"worker-{self.started}.log"
        self.started += 1
        worker = WorkerProcess(
            target.runtime, self.protocol.pinned_threads, what=str(target), log=log, sleeping=self.sleeping
        )
        self.workers[target] = self.stack.enter_context(worker)
        return worker

    def loaded(self, target: Target) -> tuple[WorkerProcess, dict[str, Any]]:
        """The target's process with its artifact loaded, and what loading told."""
        worker = self.workers.get(target) or self.start(target)
        if target not in self.facts:
            self.facts[target] = self.load(worker, target)
        return worker, self.facts[target]

    def load(self, worker: WorkerProcess, target: Target) -> dict[str, Any]:
        """What loading the target's artifact tells."""
        return worker.ask("load", path=str(target.path), provider=self.protocol.provider)

    def close(self, target: Target) -> None:
        """End the target's process."""
        self.workers.pop(target).close()
        self.facts.pop(target, None)

    def latency_together(self, targets: Sequence[Target]) -> dict[Target, latency.Timing]:
        """All rounds with all processes alive; they stay so."""
        timings = self._timings(targets, together=True)
        for target in targets:
            self.start(target)
        for target in targets:  # imports overlap, but nothing is timed before all of them have ended
            self.workers[target].ask("ready")
        for target in targets:
            timings[target].load_seconds.append(self.loaded(target)[1]["load_seconds"])
            self._begin_grid(target, TURNS, len(targets))
        kept = sum(grid.left for grid in self.grids.values())
        for target, seconds in self._turns(targets, kept):
            self._round(target, timings[target], seconds)
        for number in range(TURNS):
            for target in latency.round_order(list(self.grids), number):
                self._grid_turn(target, timings[target])
        return timings

    def latency_apart(self, targets: Sequence[Target]) -> dict[Target, latency.Timing]:
        """All rounds with one process alive at a time."""
        timings = self._timings(targets, together=False)
        for target, seconds in self._turns(targets):
            timings[target].load_seconds.append(self.loaded(target)[1]["load_seconds"])
            self._begin_grid(target, self.protocol.rounds, len(targets))
            self._round(target, timings[target], seconds)
            self._grid_turn(target, timings[target])
            self.close(target)
        return timings

    def _timings(self, targets: Sequence[Target], together: bool) -> dict[Target, latency.Timing]:
        session, waiting = uuid4().hex[:12], "sleeping" if self.sleeping else "spinning"
        return {
            target: latency.Timing(together=together, session=session, waiting=waiting) for target in targets
        }

    def _turns(self, targets: Sequence[Target], kept: float = 0.0) -> Iterator[tuple[Target, float]]:
        """Whose turn it is, and the seconds for it: whole rounds, the first, and more while there is time.

        `kept`: seconds of the budget that are for what follows.
        """
        began, longest, whole = time.monotonic(), 0.0, self.protocol.timing_seconds - kept
        for number in range(self.protocol.rounds):
            start = time.monotonic()
            if number and start - began + longest > whole:
                self.bar.advance(0, timing=f"ended after {number} rounds: {whole:.0f} s are over")
                break
            for place, target in enumerate(latency.round_order(targets, number)):
                left = max(1.0, whole - (time.monotonic() - began))
                yield target, left / (len(targets) - place)
            longest = max(longest, time.monotonic() - start)

    def _round(self, target: Target, timing: latency.Timing, seconds: float) -> None:
        worker, facts = self.loaded(target)
        length = timing.prompt_tokens = self.protocol.prompt_tokens(facts["context"])
        prompt, following = self._text(length, self.reference.words(target.path))
        load = Load([worker.pid])
        answer = worker.ask(
            "time_round",
            prompt=prompt,
            following=following,
            repetitions=self.protocol.prefills_per_round,
            warm_up=WARM_DECODES,
            seconds=seconds,
        )
        timing.rounds.append(latency.Samples(answer["prefill"], answer["decode"]))
        if (others := load.others()) is not None:
            timing.busy.append(others)
        timing.peak_rss_bytes = max(timing.peak_rss_bytes or 0, answer["peak_rss_bytes"] or 0) or None
        self.bar.advance(round_tokens(self.protocol), timing=str(target))

    def _begin_grid(self, target: Target, turns: int, among: int) -> None:
        """The cells of an encoder, and its share of the seconds; once."""
        facts, protocol = self.facts[target], self.protocol
        task = task_named(facts["task"])
        if target in self.grids or task is None or task.writes:
            return
        lengths = [min(length, facts["context"]) for length in self.own_lengths]
        cells = cells_of(protocol.encoder_batches, protocol.encoder_lengths, lengths)
        seconds = min(protocol.encoder_seconds, protocol.timing_seconds / 2)
        if cells and seconds:
            self.grids[target] = Grid(cells, facts["context"], seconds / among, turns)

    def _grid_turn(self, target: Target, timing: latency.Timing) -> None:
        """Each cell of the target's grid a few times, as far as its seconds and the memory go."""
        grid = self.grids.get(target)
        if grid is None:
            return
        worker, words = self.loaded(target)[0], self.reference.words(target.path)
        load = Load([worker.pid])
        with grid.turn() as ends:
            for cell in grid.cells:
                if grid.fits(cell, ends - time.monotonic(), available_memory_bytes()):
                    self.bar.advance(0, timing=f"{target}, {cell.name}")
                    texts = self._texts(cell.batch, max(cell.widths), words)
                    first = len(grid.seconds.get(cell.name, ()))
                    answer = worker.ask("time_cell", texts=texts, widths=cell.widths, first=first)
                    grid.add(cell, answer)
        if (others := load.others()) is not None:
            timing.busy.append(others)
        timing.cells, timing.cells_left_out = grid.summary(), grid.left_out

    def _texts(self, batch: int, length: int, words: Translation | None) -> str:
        """A file of tokens [batch, length] from the evaluation text."""
        file = self.reference.folder / f"texts-{batch}-{length}{_named(words)}.npy"
        if not file.exists():
            np.save(file, self._rows(batch, length, words))
        return str(file)

    def _rows(self, batch: int, length: int, words: Translation | None) -> npt.NDArray[np.int32]:
        """Tokens [batch, length] from the evaluation text; each row begins as the model's texts do."""
        windows = self.reference.windows
        begin, text = np.array(windows.frame.begin, dtype=np.int32), windows.text
        if words is not None:
            begin, text = words.stream(begin), words.stream(text)
        rest = np.resize(text, (batch, max(0, length - len(begin))))
        return np.concatenate([np.tile(begin, (batch, 1)), rest], axis=1)[:, :length]

    def _text(self, length: int, words: Translation | None) -> tuple[str, str]:
        """Files with `length` prompt tokens and those that follow, [batch, ...], from the evaluation text."""
        folder, batch, more = self.reference.folder, self.protocol.batch, self.protocol.decodes_per_round
        size = _named(words)
        prompt, following = folder / f"prompt-{length}{size}.npy", folder / f"following-{length}{size}.npy"
        if not following.exists():
            rows = self._rows(batch, length + more, words)
            np.save(prompt, rows[:, :length])
            np.save(following, rows[:, length:])
        return str(prompt), str(following)


def _named(words: Translation | None) -> str:
    """What tells files of tokens of a smaller vocabulary from the others."""
    return "" if words is None else f"-of-{len(words.rows)}"


def fit_together(targets: Sequence[Target]) -> bool:
    """Whether all processes, each with its model, fit into three quarters of the free memory."""
    need = sum(process_bytes(t.runtime) + MODEL_FACTOR * disk_bytes(t.path) for t in targets)
    return need < 0.75 * available_memory_bytes()


def round_tokens(protocol: MeasureProtocol) -> int:
    """About how many tokens of a prompt one round takes as long as, its rehearsals too."""
    prefills = (protocol.prefills_per_round + 1) * protocol.prefill_tokens
    return protocol.batch * (prefills + DECODE_TOKENS * protocol.decodes_per_round)
