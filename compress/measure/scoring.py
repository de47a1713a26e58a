"""Base, variants and steps through the windows, part by part.

The base's process scores a part of the windows and leaves its logits (reference.py); the steps inside chains,
of which only quality and size are wanted, are loaded into that process one after the other and compared; then
every variant's process compares. On the last part each is finished as soon as it is done. Where all models
together do not fit into memory, a process ends after each part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from compress.measure.process import WorkerProcess
from compress.measure.quality import Scores
from compress.measure.reference import Reference
from compress.measure.turns import Target, Workers
from compress.measure.unfinished import Unfinished


class Scoring:
    """The windows' parts, and the scores of all that went through them so far."""

    def __init__(self, workers: Workers, reference: Reference, book: Unfinished, *, together: bool) -> None:
        self._workers, self._reference, self._book, self._together = workers, reference, book, together
        self._bar = workers.bar
        self._scores: dict[Target, list[Scores]] = defaultdict(list)

    def run(
        self,
        targets: Sequence[Target],
        steps: Sequence[Target],
        finish: Callable[[Target, Scores], None],
        finish_step: Callable[[Target, Scores, dict[str, Any]], None],
    ) -> None:
        """Score all; `finish` gets each target while its process is loaded, `finish_step` each step with what
        loading it gave."""
        reference = self._reference
        host = next((t for t in targets if reference.is_base(t.path, t.runtime)), None)
        reported = host is not None
        if host is None and reference.base is not None:
            host = Target("the base model", "torch", reference.base)
        others = [target for target in targets if target is not host]
        parts = self._parts(host, bool(others or steps))
        for part in parts:
            last = part == parts[-1]
            if not last and self._taken_over(part, host, [*others, *steps]):
                continue
            if host is not None:
                worker = self._score_base(host, part, reported=reported, keep=bool(others or steps))
                if reported and last:
                    assert reference.scores is not None
                    finish(host, reference.scores)
                for number, step in enumerate(steps, start=1):
                    facts = self._score_step(worker, host, step, part, f"step {number} of {len(steps)}")
                    if last:
                        finish_step(step, Scores.joined(self._scores[step]), facts)
                self._end(host, last)
            for target in others:
                worker, _ = self._workers.loaded(target)
                self._compare(worker, target, part, str(target))
                if last:
                    finish(target, Scores.joined(self._scores[target]))
                self._end(target, last)
            reference.forget(part)

    def _parts(self, host: Target | None, compared: bool) -> list[range]:
        if host is None or not compared:
            return [range(len(self._reference.windows))]
        return self._reference.parts(self._workers.loaded(host)[1]["width"])

    def _end(self, target: Target, last: bool) -> None:
        if last or not self._together:
            self._workers.close(target)

    def _taken_over(self, part: range, host: Target | None, others: Sequence[Target]) -> bool:
        """Whether all were scored on a part before a measurement was cut off: then that counts."""
        found = {other: self._book.scored(other.key, part) for other in others}
        base = None if host is None else self._book.scored(host.key, part)
        if base is None or not all(found.values()):
            return False
        self._reference.take_over(part, base)
        for other, scores in found.items():
            assert scores is not None
            self._scores[other].append(scores)
        return True

    def _score_base(self, host: Target, part: range, *, reported: bool, keep: bool) -> WorkerProcess:
        worker, _ = self._workers.loaded(host)
        worker.what = str(host)
        if reported:
            self._bar.advance(0, scoring=str(host))
        scores = self._reference.compute(worker, part, self._advance if reported else lambda: None, keep=keep)
        self._book.keep_scores(host.key, part, scores)
        return worker

    def _score_step(
        self, worker: WorkerProcess, host: Target, step: Target, part: range, label: str
    ) -> dict[str, Any]:
        """In the base's process, which loads the base again when that is next wanted."""
        worker.what = f"{label} ({step.path})"
        self._workers.facts.pop(host, None)
        facts = self._workers.load(worker, step)
        self._compare(worker, step, part, label)
        return facts

    def _compare(self, worker: WorkerProcess, target: Target, part: range, label: str) -> None:
        self._bar.advance(0, scoring=label)
        scores = self._reference.compare(worker, target.path, part, self._advance)
        self._scores[target].append(scores)
        self._book.keep_scores(target.key, part, scores)

    def _advance(self) -> None:
        self._bar.advance(self._reference.windows.size / len(self._reference.windows))
