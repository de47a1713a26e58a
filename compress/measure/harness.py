"""Measure artifacts: each reloaded from disk in a fresh process of its own, latency interleaved, quality
after it.

Method. One worker process per artifact and runtime. First latency: `rounds` times every worker in turn
does its share of the prefills and decode steps (turns.py, latency.py). Its peak memory is read after its last
round, before anything else runs in it. Then quality: the base model in torch leaves its logits, and every
worker scores the windows against them (scoring.py, quality.py). Limits: results that were measured before
(`done`) are not timed again, so they are not interleaved with the new ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from compress.artifact.folder import disk_bytes
from compress.host import machine
from compress.host.progress import track
from compress.host.reach import reach
from compress.measure import quality
from compress.measure.reference import Reference
from compress.measure.scoring import Scoring
from compress.measure.turns import Target, Workers, fit_together, round_tokens
from compress.measure.unfinished import Unfinished
from compress.records.protocol import MeasureProtocol
from compress.records.results import Result, read_results, write_results
from compress.runtimes import verify_artifact
from compress.text.examples import Examples
from compress.text.translation import Translation
from compress.text.windows import Windows, refuse_overlap

MEASURING = ("compress.measure.harness", "compress.measure.worker")  # what they reach decides the numbers


@dataclass(frozen=True)
class Continuation:
    """A greedy sample to draw in each worker: `prompt` ids, at most `limit` more, ended by one of `stop`."""

    prompt: Sequence[int]
    limit: int = 64
    stop: Sequence[int] = ()


def measure(
    targets: Sequence[Target],
    base: Path | None,
    windows: Windows | Examples,
    protocol: MeasureProtocol | None = None,
    *,
    steps: Sequence[Target] = (),
    done: Iterable[Result] = (),
    workdir: Path | None = None,
    unfinished: Path | None = None,
    calibration: Windows | None = None,
    continuation: Continuation | None = None,
    own_lengths: Sequence[int] = (),
    on_result: Callable[[Result], None] = lambda result: None,
    on_sample: Callable[[Target, list[int]], None] = lambda target, tokens: None,
    on_scores: Callable[[Target, quality.Scores, quality.Scores], None] = lambda target, own, base: None,
    verify: bool = True,
) -> list[Result]:
    """Everything in DESIGN section 6 for each target, in the order of `targets`, and then of the `steps`.

    `base`: the base model's artifact for torch, or None (then no comparisons). `steps`: artifacts for torch
    of which only quality and size are wanted; they need a `base`. `done`: earlier results; one of the same
    target, fingerprint, protocol, machine and versions is taken over. `unfinished`: a file that keeps what
    is learnt on the way; a call that was cut off goes on from it. `calibration`: text that must not overlap
    `windows`. `own_lengths`: tokens of each text that encoders are for, to be timed with; by default those of
    labelled texts. `on_result`: called as each target is finished; `on_sample`: with the tokens of its
    `continuation`; `on_scores`: before that with the scores of a target and the base's, where there are two.
    `verify`: compare the files' hashes with those stated beside them, here and not in the processes that are
    timed.

    Raises UserError (WorkerError) when an artifact cannot be loaded or is not what was written, its process
    dies, or the texts overlap.
    """
    if calibration is not None:
        refuse_overlap(calibration.text, windows.text)
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
    if verify:
        for target in (*todo, *inner):
            verify_artifact(target.path, target.runtime)
        if base is not None:
            verify_artifact(base, "torch")
    counts = {r.variant: (r.parameters, r.nonzero_parameters) for r in results.values() if r.parameters}
    timings = book.timings([target.key for target in todo])
    with ExitStack() as stack:
        reference = stack.enter_context(Reference(base, windows, workdir, protocol.answer_tokens))
        work = (len(todo) + len(inner)) * windows.size
        work += 0 if timings is not None else len(todo) * protocol.rounds * round_tokens(protocol)
        bar = stack.enter_context(track(work, "measuring", "token"))
        together = fit_together(todo)
        if isinstance(windows, Examples):
            own_lengths = own_lengths or windows.lengths
        workers = Workers(protocol, reference, bar, stack, own_lengths)
        if timings is None:
            timed = workers.latency_together if together else workers.latency_apart
            timings = {target.key: timing for target, timing in timed(todo).items()}
            book.keep_timings(timings)

        def finish(target: Target, scores: quality.Scores) -> None:
            """All that is left to ask the process of a target that has been scored on all windows."""
            worker, facts = workers.loaded(target)
            found = worker.ask("count_parameters")
            if found["parameters"] is not None:
                counts[target.variant] = (found["parameters"], found["nonzero_parameters"])
            if continuation is not None:
                words = reference.words(target.path)
                written = worker.ask("generate", **_as_command(continuation, words))["tokens"]
                if written is not None:
                    on_sample(target, written if words is None else words.back(written))
            if reference.scores is not None and not reference.is_base(target.path, target.runtime):
                on_scores(target, scores, reference.scores)
            timing = timings[target.key]
            parameters, nonzero = counts.get(target.variant, (None, None))
            extra: dict[str, Any] = {
                "prompt_tokens": timing.prompt_tokens,
                "processes": "kept" if timing.together else "restarted each round",
                "threads_wait": timing.waiting,
                "timed_rounds": len(timing.rounds),
            }
            extra |= {"encoder_left_out": timing.cells_left_out} if timing.cells_left_out else {}
            fields = _quality_fields(scores, reference, target, protocol) | timing.summary(protocol.batch)
            results[target] = Result(
                **_identity(target, facts, common | {"protocol": common["protocol"] | extra}),
                **fields,
                parameters=parameters,
                nonzero_parameters=nonzero,
            )
            on_result(results[target])

        def finish_step(step: Target, scores: quality.Scores, facts: dict[str, Any]) -> None:
            fields = _quality_fields(scores, reference, step, protocol)
            results[step] = Result(**_identity(step, facts, common), **fields)
            book.keep_step(results[step])

        scoring = Scoring(workers, reference, book, together=together)
        scoring.run(_torch_first(todo), inner, finish, finish_step)
    return [results[target] for target in (*targets, *steps)]


def taken_over(
    targets: Sequence[Target],
    windows: Windows | Examples,
    protocol: MeasureProtocol,
    done: Iterable[Result],
) -> dict[Target, Result]:
    """The targets that have a result under these very circumstances."""
    common = _common(protocol, windows)
    return {target: result for result in done for target in targets if _same(result, target, common)}


def save_result(path: Path, result: Result) -> None:
    """Put a line into `results.jsonl`, in place of an older one of the same variant and runtime;
    atomically."""
    others = [r for r in read_results(path) if (r.variant, r.runtime) != (result.variant, result.runtime)]
    write_results(path, [*others, result])


def _torch_first(targets: Sequence[Target]) -> list[Target]:
    """Torch counts the parameters of a variant, which is told of its other runtimes, too."""
    return sorted(targets, key=lambda target: target.runtime != "torch")


def _common(protocol: MeasureProtocol, windows: Windows | Examples) -> dict[str, Any]:
    record = protocol.record(windows=len(windows), window=windows.length, text_sha256=windows.sha256)
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
    windows = reference.windows  # of those that are cut from labelled texts the bytes are not known
    text_bytes = (windows.bytes or None) if isinstance(windows, Windows) else None
    return asdict(quality.summarise(scores, base, text_bytes, seed=protocol.seed))


def _as_command(continuation: Continuation, words: Translation | None) -> dict[str, Any]:
    tokens, stop = ([int(t) for t in ids] for ids in (continuation.prompt, continuation.stop))
    if words is not None:
        tokens = words.stream(np.array(tokens, np.int32)).tolist()
        stop = [piece for t in stop if len(pieces := words.pieces(t)) == 1 for piece in pieces]
    return {"tokens": tokens, "limit": continuation.limit, "stop": stop}
