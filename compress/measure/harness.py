"""Measure artifacts: each reloaded from disk in a fresh process of its own, latency interleaved, quality
after it.

Method. One worker process per artifact and runtime. First latency: `rounds` times every worker in turn
does its share of the prefills and decode steps (see latency.py). Its peak memory is read after its last
round, before anything else runs in it. Then quality: the base model in torch leaves its logits, and every
worker scores the windows against them (see quality.py). Steps inside chains, of which only quality and size
are wanted, are scored by the base's process once it has nothing else to do. Where all models together do
not fit in memory, the workers are started anew for every round instead; the protocol of the result says
which.

Imports of all workers run at the same time, loading and measuring one after the other. Limits: results
that were measured before (`done`) are not timed again, so they are not interleaved with the new ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from compress.artifact.folder import disk_bytes
from compress.host import machine
from compress.host.load import Load, crowded
from compress.host.memory import available_memory_bytes
from compress.host.progress import Tracker, track
from compress.host.reach import reach
from compress.measure import latency, quality
from compress.measure.process import WorkerProcess
from compress.measure.reference import Reference
from compress.measure.unfinished import Unfinished
from compress.records.protocol import WARM_DECODES, MeasureProtocol
from compress.records.records import Result, read_results, write_results
from compress.text.translation import Translation
from compress.text.windows import Windows, refuse_overlap

PROCESS_BYTES = {  # of a worker with an empty model
    "torch": 450_000_000,
    "transformers": 450_000_000,
    "onnxruntime": 120_000_000,
    "llama.cpp": 120_000_000,
}
MEASURING = ("compress.measure.harness", "compress.measure.worker")  # what they reach decides the numbers
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


@dataclass(frozen=True)
class Continuation:
    """A greedy sample to draw in each worker: `prompt` ids, at most `limit` more, ended by one of `stop`."""

    prompt: Sequence[int]
    limit: int = 64
    stop: Sequence[int] = ()


def measure(
    targets: Sequence[Target],
    base: Path | None,
    windows: Windows,
    protocol: MeasureProtocol | None = None,
    *,
    steps: Sequence[Target] = (),
    done: Iterable[Result] = (),
    workdir: Path | None = None,
    unfinished: Path | None = None,
    calibration: Windows | None = None,
    continuation: Continuation | None = None,
    on_result: Callable[[Result], None] = lambda result: None,
    on_sample: Callable[[Target, list[int]], None] = lambda target, tokens: None,
) -> list[Result]:
    """Everything in DESIGN section 6 for each target, in the order of `targets`, and then of the `steps`.

    `base`: the base model's artifact for torch, or None (then no comparisons). `steps`: artifacts for torch
    of which only quality and size are wanted; they need a `base`. `done`: earlier results; one of the same
    target, fingerprint, protocol, machine and versions is taken over. `unfinished`: a file that keeps what
    is learnt on the way; a call that was cut off goes on from it. `calibration`: text that must not overlap
    `windows`. `on_result`: called as each target is finished; `on_sample`: with the tokens of its
    `continuation`.

    Raises UserError (WorkerError) when an artifact cannot be loaded, its process dies, or the texts
    overlap.
    """
    if calibration is not None:
        refuse_overlap(calibration.tokens, windows.tokens)
    if steps and base is None:
        raise ValueError("steps are scored against a base, and there is none")
    protocol = protocol or MeasureProtocol()
    common = _common(protocol, windows)
    book = Unfinished(unfinished, common)
    results = taken_over(targets, windows, protocol, done)
    results |= {step: known for step in steps if (known := book.step(step.fingerprint)) is not None}
    todo = [target for target in targets if target not in results]
    inner = [step for step in steps if step not in results]
    if not todo and not inner:
        return [results[target] for target in (*targets, *steps)]
    counts = {r.variant: (r.parameters, r.nonzero_parameters) for r in results.values() if r.parameters}
    timings = book.timings([target.key for target in todo])
    with ExitStack() as stack:
        reference = stack.enter_context(Reference(base, windows, workdir))
        work = (len(todo) + len(inner)) * windows.tokens.size
        work += 0 if timings is not None else len(todo) * protocol.rounds * _round_tokens(protocol)
        bar = stack.enter_context(track(work, "measuring", "token"))
        run = _Run(protocol, reference, bar, stack)
        if timings is None:
            timed = run.latency_together if _fit_together(todo) else run.latency_apart
            timings = {target.key: timing for target, timing in timed(todo).items()}
            book.keep_timings(timings)

        def score_steps(worker: WorkerProcess) -> None:
            """In the base's process, which has nothing else to do any more."""
            while inner:
                step = inner.pop(0)
                told = f"step {len(steps) - len(inner)} of {len(steps)}"
                worker.what = f"{told} ({step.path})"
                facts = run.load(worker, step)
                scores = run.score(worker, step, told)
                fields = _quality_fields(scores, reference, step, protocol)
                results[step] = Result(**_identity(step, facts, common), **fields)
                book.keep_step(results[step])

        order = _base_first(todo, reference)
        if base is not None and not any(reference.is_base(t.path, t.runtime) for t in order):
            run.score_base(base, score_steps)
        for target in order:
            worker, facts = run.loaded(target)
            scores = run.score(worker, target)
            found = worker.ask("count_parameters")
            if found["parameters"] is not None:
                counts[target.variant] = (found["parameters"], found["nonzero_parameters"])
            if continuation is not None:
                words = reference.words(target.path)
                written = worker.ask("generate", **_as_command(continuation, words))["tokens"]
                if written is not None:
                    on_sample(target, written if words is None else words.back(written))
            timing = timings[target.key]
            parameters, nonzero = counts.get(target.variant, (None, None))
            extra = {
                "prompt_tokens": timing.prompt_tokens,
                "processes": "kept" if timing.together else "restarted each round",
                "threads_wait": timing.waiting,
                "timed_rounds": len(timing.rounds),
            }
            fields = _quality_fields(scores, reference, target, protocol) | timing.summary(protocol.batch)
            results[target] = Result(
                **_identity(target, facts, common | {"protocol": common["protocol"] | extra}),
                **fields,
                parameters=parameters,
                nonzero_parameters=nonzero,
            )
            on_result(results[target])
            if reference.is_base(target.path, target.runtime):
                score_steps(worker)
            run.close(target)
    return [results[target] for target in (*targets, *steps)]


def taken_over(
    targets: Sequence[Target], windows: Windows, protocol: MeasureProtocol, done: Iterable[Result]
) -> dict[Target, Result]:
    """The targets that have a result under these very circumstances."""
    common = _common(protocol, windows)
    return {target: result for result in done for target in targets if _same(result, target, common)}


def save_result(path: Path, result: Result) -> None:
    """Put a line into `results.jsonl`, in place of an older one of the same variant and runtime;
    atomically."""
    others = [r for r in read_results(path) if (r.variant, r.runtime) != (result.variant, result.runtime)]
    write_results(path, [*others, result])


class _Run:
    """The worker processes of one measurement. All of them end with `stack`."""

    def __init__(
        self, protocol: MeasureProtocol, reference: Reference, bar: Tracker, stack: ExitStack
    ) -> None:
        self.protocol, self.reference, self.bar, self.stack = protocol, reference, bar, stack
        self.workers: dict[Target, WorkerProcess] = {}
        self.facts: dict[Target, dict[str, Any]] = {}
        self.started = 0
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
        for target, seconds in self._turns(targets):
            self._round(target, timings[target], seconds)
        return timings

    def latency_apart(self, targets: Sequence[Target]) -> dict[Target, latency.Timing]:
        """All rounds with one process alive at a time."""
        timings = self._timings(targets, together=False)
        for target, seconds in self._turns(targets):
            timings[target].load_seconds.append(self.loaded(target)[1]["load_seconds"])
            self._round(target, timings[target], seconds)
            self.close(target)
        return timings

    def _timings(self, targets: Sequence[Target], together: bool) -> dict[Target, latency.Timing]:
        session, waiting = uuid4().hex[:12], "sleeping" if self.sleeping else "spinning"
        return {
            target: latency.Timing(together=together, session=session, waiting=waiting) for target in targets
        }

    def _turns(self, targets: Sequence[Target]) -> Iterator[tuple[Target, float]]:
        """Whose turn it is, and the seconds for it: whole rounds, the first, and more while there is time."""
        began, longest, whole = time.monotonic(), 0.0, self.protocol.timing_seconds
        for number in range(self.protocol.rounds):
            start = time.monotonic()
            if number and start - began + longest > whole:
                self.bar.advance(0, timing=f"ended after {number} rounds: {whole:.0f} s are over")
                break
            for place, target in enumerate(latency.round_order(targets, number)):
                left = max(1.0, whole - (time.monotonic() - began))
                yield target, left / (len(targets) - place)
            longest = max(longest, time.monotonic() - start)

    def score(self, worker: WorkerProcess, target: Target, told: str | None = None) -> quality.Scores:
        """Scores of the loaded target, `told` by the bar; the base comes first."""
        self.bar.advance(0, scoring=told or str(target))
        reference = self.reference
        if reference.is_base(target.path, target.runtime):
            return reference.compute(worker, self._advance)
        return reference.compare(worker, target.path, self._advance)

    def score_base(self, path: Path, after: Callable[[WorkerProcess], None]) -> None:
        """Score the base for the sake of its logits alone, and give its process to `after`."""
        base = Target("the base model", "torch", path)
        worker, _ = self.loaded(base)
        self.reference.compute(worker, lambda: None)
        after(worker)
        self.close(base)

    def _advance(self) -> None:
        self.bar.advance(self.reference.windows.tokens.shape[1])

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
        self.bar.advance(_round_tokens(self.protocol), timing=str(target))

    def _text(self, length: int, words: Translation | None) -> tuple[str, str]:
        """Files with `length` prompt tokens and those that follow, [batch, ...], from the evaluation text."""
        folder, batch, more = self.reference.folder, self.protocol.batch, self.protocol.decodes_per_round
        size = "" if words is None else f"-of-{len(words.rows)}"
        prompt, following = folder / f"prompt-{length}{size}.npy", folder / f"following-{length}{size}.npy"
        if not following.exists():
            text = self.reference.windows.tokens.ravel()
            rows = np.resize(text if words is None else words.stream(text), (batch, length + more))
            np.save(prompt, rows[:, :length])
            np.save(following, rows[:, length:])
        return str(prompt), str(following)


def _base_first(targets: Sequence[Target], reference: Reference) -> list[Target]:
    """The base, whose logits all others need; then torch, which counts the parameters of a variant."""
    return sorted(targets, key=lambda t: (not reference.is_base(t.path, t.runtime), t.runtime != "torch"))


def _fit_together(targets: Sequence[Target]) -> bool:
    """Whether all processes, each with its model, fit into three quarters of the free memory."""
    need = sum(PROCESS_BYTES.get(t.runtime, 0) + MODEL_FACTOR * disk_bytes(t.path) for t in targets)
    return need < 0.75 * available_memory_bytes()


def _round_tokens(protocol: MeasureProtocol) -> int:
    """About how many tokens of a prompt one round takes as long as, its rehearsals too."""
    prefills = (protocol.prefills_per_round + 1) * protocol.prefill_tokens
    return protocol.batch * (prefills + DECODE_TOKENS * protocol.decodes_per_round)


def _common(protocol: MeasureProtocol, windows: Windows) -> dict[str, Any]:
    count, window = windows.tokens.shape
    record = protocol.record(windows=count, window=window, text_sha256=windows.sha256)
    record["code"] = reach(*MEASURING).digest[:16]  # a mended measurement measures again
    return {"protocol": record, "machine": machine.machine(), "versions": machine.versions()}


def _same(result: Result, target: Target, common: dict[str, Any]) -> bool:
    """Whether `result` is of this target under these circumstances, latency included."""
    wanted = (target.variant, target.runtime, target.fingerprint)
    return (
        (result.variant, result.runtime, result.fingerprint) == wanted
        and bool(target.fingerprint)
        and result.prefill_seconds_p50 is not None
        and common["protocol"].items() <= result.protocol.items()
        and (common["machine"], common["versions"]) == (result.machine, result.versions)
    )


def _identity(target: Target, facts: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    return common | {
        "variant": target.variant,
        "runtime": target.runtime,
        "device": facts["device"],
        "artifact": target.artifact or str(target.path),
        "disk_bytes": disk_bytes(target.path),
        "weight_bytes": facts["weight_bytes"],
        "fingerprint": target.fingerprint,
    }


def _quality_fields(
    scores: quality.Scores, reference: Reference, target: Target, protocol: MeasureProtocol
) -> dict[str, Any]:
    base = None if reference.is_base(target.path, target.runtime) else reference.scores
    return asdict(quality.summarise(scores, base, reference.windows.bytes, seed=protocol.seed))


def _as_command(continuation: Continuation, words: Translation | None) -> dict[str, Any]:
    tokens, stop = ([int(t) for t in ids] for ids in (continuation.prompt, continuation.stop))
    if words is not None:
        tokens = words.stream(np.array(tokens, np.int32)).tolist()
        stop = [piece for t in stop if len(pieces := words.pieces(t)) == 1 for piece in pieces]
    return {"tokens": tokens, "limit": continuation.limit, "stop": stop}
