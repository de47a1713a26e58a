"""The headline: one plain sentence for each trade-off worth having, and for each that is not.

Method: every measured line becomes a point (bytes on disk, quality lost, seconds per token: of decoding, or
of reading where nothing was decoded). Quality lost is the score's where labels are judged. A variant is worth
having when one of its lines is on the Pareto front of all lines in the same runtime and is smaller or faster
than the base there: what a runtime does is no merit of a variant. The sentence speaks of the fastest such
line; "faster" is of those seconds. What is left is reported too: a variant with neither a smaller file nor
more speed has "no gain", and one that another beats on every count is named together with that.

Limits: fronts compare point estimates; the sentences carry the interval's verdict in words.
"""

from dataclasses import dataclass
from typing import Literal

from compress.records.flips import LabelReference
from compress.records.results import Result
from compress.records.run import RunRecord
from compress.report import units
from compress.report.frontier import dominates, pareto_front
from compress.report.rows import base_name, base_result, ordered
from compress.report.scores import hundredths, lost, metric_name, points
from compress.report.verdicts import (
    Finding,
    decode_of,
    prefill_of,
    rate_finding,
    runtime_name,
    significance,
    size_finding,
    snapshot_of,
    speed_findings,
)

BUSY = 0.1  # of the cores, from which on it is said


@dataclass(frozen=True)
class Sentence:
    """A sentence and whether it tells of something good, of nothing gained, or just of a fact."""

    kind: Literal["good", "none", "fact"]
    text: str


def headlines(run: RunRecord, results: list[Result], most: int = 5) -> list[Sentence]:
    """The sentences at the top of the page, best first: at most `most` good ones, then the rest."""
    lines = ordered(run, results)
    facts = _busy(lines) + _runtime_facts(run, lines) + _reference_facts(run, lines) + _left_facts(run)
    variants = [name for name in dict.fromkeys(line.variant for line in lines) if name != base_name(run)]
    measured = [line for line in lines if _point(line) is not None]
    front: set[int] = set()
    for runtime in {line.runtime for line in measured}:
        rivals = [line for line in measured if line.runtime == runtime]
        points = [point for line in rivals if (point := _point(line)) is not None]
        front |= {id(rivals[index]) for index in pareto_front(points)}
    good: list[tuple[float, str, Sentence]] = []
    rest: list[Sentence] = []
    for name in variants:
        own = [line for line in lines if line.variant == name]
        paying = [line for line in own if _pays(run, lines, line)]
        winners = [line for line in paying if id(line) in front]
        if winners:
            best = max(winners, key=_pace)
            good.append((_size_ratio(run, lines, best), name, Sentence("good", _trade(run, lines, best))))
        elif not paying and any(base_result(run, lines, line.runtime) for line in own):
            rest.append(Sentence("none", _no_gain(run, lines, own)))
        elif paying:
            rest.append(Sentence("none", _beaten(run, lines, paying, measured)))
    good.sort(key=lambda entry: -entry[0])
    reported = [sentence for _, _, sentence in good[:most]]
    if good[most:]:
        others = ", ".join(name for _, name, _ in good[most:])
        reported.append(Sentence("fact", f"Also worth having, less small: {others}."))
    return reported + rest + facts


def _busy(lines: list[Result]) -> list[Sentence]:
    """That other programs ran while speeds were timed."""
    share = max((line.busy_share or 0.0 for line in lines), default=0.0)
    if share < BUSY:
        return []
    told = f"Other programs used up to {units.percent(share)} of the cores while speeds were timed"
    return [Sentence("none", f"{told}: a quiet machine is faster, and ratios may be others there.")]


def _point(line: Result) -> tuple[float, float, float] | None:
    """(bytes, quality lost, seconds per token); a line without quality or size cannot be placed."""
    measured = (lost(line), line.kl_to_base, line.delta_nll, line.cosine_distance)
    worse = next((value for value in measured if value is not None), None)
    if worse is None or line.disk_bytes is None:
        return None
    rate = _pace(line)
    return (float(line.disk_bytes), worse, 1 / rate if rate else float("inf"))


def _pace(line: Result) -> float:
    """Tokens/s of decoding, or of reading where nothing was decoded; 0 where nothing was timed."""
    return line.decode_tokens_per_second or line.prefill_tokens_per_second or 0.0


def _comparison(run: RunRecord, lines: list[Result], line: Result) -> tuple[Finding, Finding]:
    base = base_result(run, lines, line.runtime)
    if base is None:
        return Finding("unknown", "size not comparable"), Finding("unknown", "speed not comparable")
    decoded = decode_of(base) or decode_of(line)
    rate_of = decode_of if decoded else prefill_of  # an encoder reads, and that is all
    return (
        size_finding(base.disk_bytes, line.disk_bytes),
        rate_finding(rate_of(base), rate_of(line), "decode" if decoded else "prefill"),
    )


def _pays(run: RunRecord, lines: list[Result], line: Result) -> bool:
    return any(finding.direction == "gain" for finding in _comparison(run, lines, line))


def _size_ratio(run: RunRecord, lines: list[Result], line: Result) -> float:
    base = base_result(run, lines, line.runtime)
    return base.disk_bytes / line.disk_bytes if base and base.disk_bytes and line.disk_bytes else 0.0


def _trade(run: RunRecord, lines: list[Result], line: Result) -> str:
    size, speed = _comparison(run, lines, line)
    claims = [_size_words(size)] + ([] if speed.direction == "unknown" else [_speed_words(speed)])
    return f"{line.variant} in {runtime_name(line.runtime)} is {' and '.join(claims)} {_at(line)}."


def _size_words(finding: Finding) -> str:
    return {"same": "no smaller", "unknown": "of unmeasured size"}.get(finding.direction, finding.text)


def _speed_words(finding: Finding) -> str:
    return "no faster" if finding.direction == "same" else finding.text.split(" ", 1)[1]


def _at(line: Result) -> str:
    if line.cosine_distance is not None and line.delta_score is None:
        return f"at a cosine similarity of {1 - line.cosine_distance:.4f} to the base's embeddings"
    if line.delta_score is not None:
        flips = f"flips {units.percent(line.flips)}" if line.flips is not None else ""
        inside = ", ".join(filter(None, (significance(line.delta_score_ci95), flips)))
        name = metric_name(line.score_name or "")
        return f"at {points(line.delta_score)} of {name}" + (f" ({inside})" if inside else "")
    if line.delta_nll is None:
        return f"at KL {units.significant(line.kl_to_base)} nats"
    word = significance(line.delta_nll_ci95)
    kl = "" if line.kl_to_base is None else f"KL {units.significant(line.kl_to_base)}"
    inside = ", ".join(part for part in (word, kl) if part)
    return f"at {units.signed(line.delta_nll)} nats" + (f" ({inside})" if inside else "")


def _no_gain(run: RunRecord, lines: list[Result], own: list[Result]) -> str:
    line = next(line for line in own if base_result(run, lines, line.runtime))
    size, speed = _comparison(run, lines, line)
    known = [name for name, f in (("size", size), ("speed", speed)) if f.direction != "unknown"]
    if not known:
        return f"{line.variant}: neither size nor speed was measured, so no gain is shown."
    words = [_size_words(size)] if size.direction != "unknown" else []
    words += [_speed_words(speed)] if speed.direction != "unknown" else []
    where = runtime_name(line.runtime)
    return (
        f"{line.variant}: no gain in {' or '.join(known)} ({', '.join(words)} than "
        f"{base_name(run)} in {where}), {_at(line)}."
    )


def _beaten(run: RunRecord, lines: list[Result], paying: list[Result], measured: list[Result]) -> str:
    best = max(paying, key=_pace)
    point = _point(best)
    if point is None:
        return f"{best.variant}: quality was not measured."
    better = next(
        (
            other
            for other in measured
            if other.runtime == best.runtime
            and (rival := _point(other)) is not None
            and dominates(rival, point)
        ),
        None,
    )
    trade = _trade(run, lines, best).removesuffix(".")
    if better is None:
        return trade + "."
    return (
        f"{trade}; but {better.variant} in {runtime_name(better.runtime)} is as good or better "
        "in size, speed and quality."
    )


def _runtime_facts(run: RunRecord, lines: list[Result]) -> list[Sentence]:
    """What the other runtime alone does for the base."""
    torch = base_result(run, lines, "torch")
    facts = []
    for line in lines:
        if torch is None or line.variant != torch.variant or line.runtime == "torch":
            continue
        found = [
            f
            for f in speed_findings(snapshot_of(torch, ""), snapshot_of(line, ""))
            if f.direction != "unknown"
        ]
        if found:
            words = ", ".join(finding.text for finding in found)
            where = runtime_name(line.runtime)
            facts.append(
                Sentence("fact", f"{where} alone, with {line.variant} unchanged, against PyTorch: {words}.")
            )
    return facts


def _left_facts(run: RunRecord) -> list[Sentence]:
    """What passes left as it was, where that is more than a little."""
    return [Sentence("fact", f"{line}.") for line in left_lines(run)]


def left_lines(run: RunRecord) -> list[str]:
    """A line per step that took less than nearly all weights, steps of several variants once."""
    found: dict[str, str] = {}
    for variant in run.variants:
        for step in variant.steps:
            if step.coverage is not None and (words := step.coverage.words()) is not None:
                found.setdefault(step.fingerprint, f"{variant.name}: {step.name} {words}")
    return list(found.values())


def _reference_facts(run: RunRecord, lines: list[Result]) -> list[Sentence]:
    """Whether the base beats the simple models scored on the same tokens."""
    scored = next((line for line in lines if line.variant == base_name(run) and line.score is not None), None)
    if scored is not None and scored.score is not None and run.label_references:
        return [_label_reference_fact(scored, scored.score, run.label_references)]
    base = next((line for line in lines if line.variant == base_name(run) and line.nll is not None), None)
    if base is None or base.nll is None or not run.references:
        return []
    strongest = min(run.references, key=lambda reference: reference.nll)
    gap = strongest.nll - base.nll
    verb = "beats" if gap > 0 else "does NOT beat"
    return [
        Sentence(
            "fact" if gap > 0 else "none",
            f"{base.variant} {verb} the strongest reference, {strongest.label}: perplexity "
            f"{units.significant(base.perplexity)} against {units.significant(strongest.perplexity)} "
            f"({units.significant(abs(gap))} nats {'better' if gap > 0 else 'worse'}).",
        )
    ]


def _label_reference_fact(base: Result, score: float, references: list[LabelReference]) -> Sentence:
    """Whether the base beats the simple models of the training texts."""
    strongest = max(references, key=lambda reference: reference.score)
    gap = score - strongest.score
    ours, theirs = (units.significant(hundredths(value)) for value in (score, strongest.score))
    verb = "beats" if gap > 0 else "does NOT beat"
    return Sentence(
        "fact" if gap > 0 else "none",
        f"{base.variant} {verb} the strongest reference, {strongest.name}: "
        f"{metric_name(strongest.score_name)} {ours} against {theirs} "
        f"({units.significant(abs(100 * gap))} points {'better' if gap > 0 else 'worse'}).",
    )
