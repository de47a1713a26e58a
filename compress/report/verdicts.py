"""What a step gained and what it cost, by rules that anyone can check.

Method: two snapshots (before, after) are compared in size, speed and quality, each giving one finding:
a gain, a loss, no change, or unknown because it was not measured.

- Size: a gain when the bytes fall by more than 1 %.
- Speed: tokens/s in the same runtime, decode and prefill apart, where both were timed in turn. The ratio of
  their medians in each round gives an interval without assumptions: that of the smallest and the largest of n
  holds the median ratio with probability 1 - 2^(1-n), 94 % for five rounds. A gain when all of them are gains
  and the whole rises by more than 20 % (equal computations, in two processes, were seen to differ by 17 %).
  Below three rounds, or where the two were not timed in turn, there is no verdict.
- Quality: the change of NLL in nats per token, or, where labels are judged, of their score in points (a point
  is 0.01). It counts only when its 95 % interval leaves out 0 and
  reaches beyond 0.00001; otherwise it is "not significant". Each snapshot's interval is for its difference
  to the base; for a change between two snapshots the half-widths are added in quadrature, which errs on the
  wide side as long as the two differences, taken over the same windows, rise and fall together.

Limits: a step with no gain in any of the three says "no gain", whatever was hoped of it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import hypot
from typing import Literal

from compress.records.base import Interval
from compress.records.results import Result
from compress.report import units
from compress.report.scores import metric_name

SIZE_TOLERANCE = 0.01
SPEED_TOLERANCE = 0.20
FEWEST_ROUNDS = 3  # of timing; two agree by chance every other time
NOISE = 1e-5  # nats: less is arithmetic in another order, not quality
RUNTIME_NAMES = {"torch": "PyTorch", "onnxruntime": "ONNX Runtime", "transformers": "Transformers"}

Direction = Literal["gain", "loss", "same", "unknown"]
_KNOWN: tuple[Direction, ...] = ("gain", "loss", "same")


@dataclass(frozen=True)
class Rate:
    """Tokens/s, the median seconds of each round, and the name of the session in which they alternated."""

    tokens: float
    rounds: tuple[float, ...] = ()
    session: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A model at one point of a chain; `decode` and `prefill` per runtime."""

    bytes: int | None = None
    nll: float | None = None
    delta_nll: float | None = None
    delta_ci: Interval | None = None
    kl: float | None = None
    cosine_distance: float | None = None
    score_name: str = ""
    score: float | None = None
    delta_score: float | None = None
    delta_score_ci: Interval | None = None
    decode: Mapping[str, Rate] = field(default_factory=dict)
    prefill: Mapping[str, Rate] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One comparison in words."""

    direction: Direction
    text: str


@dataclass(frozen=True)
class Verdict:
    """All findings of a comparison: sentences, each with the direction it reports."""

    kind: Literal["gain", "none", "unknown"]
    parts: tuple[Finding, ...]

    @property
    def summary(self) -> str:
        """The sentences in a row."""
        return " ".join(part.text for part in self.parts)


def runtime_name(runtime: str) -> str:
    """The name people use."""
    return RUNTIME_NAMES.get(runtime, runtime)


def snapshot_of(result: Result, speed_key: str | None = None) -> Snapshot:
    """The snapshot that a measured line describes; `speed_key` replaces the runtime as key of the speeds."""
    key = result.runtime if speed_key is None else speed_key
    decode = decode_of(result)
    prefill = prefill_of(result)
    return Snapshot(
        bytes=result.disk_bytes,
        nll=result.nll,
        delta_nll=result.delta_nll,
        delta_ci=result.delta_nll_ci95,
        kl=result.kl_to_base,
        cosine_distance=result.cosine_distance,
        score_name=result.score_name or "",
        score=result.score,
        delta_score=result.delta_score,
        delta_score_ci=result.delta_score_ci95,
        decode={} if decode is None else {key: decode},
        prefill={} if prefill is None else {key: prefill},
    )


def decode_of(result: Result) -> Rate | None:
    """The pace of decoding of a measured line, if it was timed."""
    return _rate(result.decode_tokens_per_second, result.decode_round_seconds, result.timing_session)


def prefill_of(result: Result) -> Rate | None:
    """The pace of reading."""
    return _rate(result.prefill_tokens_per_second, result.prefill_round_seconds, result.timing_session)


def _rate(tokens: float | None, rounds: tuple[float, ...], session: str) -> Rate | None:
    return Rate(tokens, rounds, session) if tokens else None


def is_significant(bounds: Interval | None) -> bool | None:
    """Whether an interval leaves out 0; None where there is no interval.

    One that stays within `NOISE` of 0 does not: two runtimes add up the same numbers in another order.

    >>> is_significant((0.01, 0.02)), is_significant((-0.01, 0.02)), is_significant((1e-8, 2e-8))
    (True, False, False)
    """
    if bounds is None:
        return None
    low, high = bounds
    return (low > 0 or high < 0) and max(abs(low), abs(high)) > NOISE


def significance(bounds: Interval | None) -> str:
    """The word for it; empty where there is no interval."""
    known = is_significant(bounds)
    return "" if known is None else "significant" if known else "not significant"


def size_finding(before: int | None, after: int | None) -> Finding:
    """Bytes before and after.

    >>> size_finding(400, 100).text, size_finding(100, 100).text, size_finding(100, 250).text
    ('4.0× smaller', 'same size', '2.5× larger')
    """
    if not before or not after:
        return Finding("unknown", "size not measured")
    if after < before * (1 - SIZE_TOLERANCE):
        return Finding("gain", f"{_factor(before / after)} smaller")
    if after > before * (1 + SIZE_TOLERANCE):
        return Finding("loss", f"{_factor(after / before)} larger")
    return Finding("same", "same size")


def rate_finding(before: Rate | None, after: Rate | None, what: str) -> Finding:
    """The pace of `what` ("decode" or "prefill") before and after, in one runtime.

    A change that not every round shares is the machine's, and none.

    >>> before, after = Rate(100, (0.01, 0.01, 0.01), "a"), Rate(210, (0.005, 0.004, 0.005), "a")
    >>> rate_finding(before, after, "decode").text, rate_finding(before, before, "decode").text
    ('decode 2.1× faster', 'decode no faster')
    >>> rate_finding(before, Rate(210, (0.005, 0.004, 0.005), "another day"), "decode").text
    'decode not timed in turn'
    """
    if before is None or after is None:
        return Finding("unknown", f"{what} not timed")
    bounds = speed_range(before, after)
    if bounds is None:
        alone = before.session != after.session or not before.session
        return Finding("unknown", f"{what} " + ("not timed in turn" if alone else "timed in too few rounds"))
    change = after.tokens / before.tokens
    if min(bounds[0], change / (1 + SPEED_TOLERANCE)) > 1:
        return Finding("gain", f"{what} {_factor(change)} faster")
    if max(bounds[1], change / (1 - SPEED_TOLERANCE)) < 1:
        return Finding("loss", f"{what} {_factor(1 / change)} slower")
    return Finding("same", f"{what} no faster")


def speed_range(before: Rate, after: Rate) -> Interval | None:
    """How many times faster: the smallest and the largest of the rounds; None where they do not compare.

    >>> speed_range(Rate(1, (1.0, 1.0, 2.0), "a"), Rate(2, (0.5, 0.4, 0.5), "a"))
    (2.0, 4.0)
    """
    rounds = len(before.rounds)
    if before.session != after.session or not before.session:
        return None
    if rounds < FEWEST_ROUNDS or rounds != len(after.rounds):
        return None
    ratios = [b / a for b, a in zip(before.rounds, after.rounds, strict=True)]
    return min(ratios), max(ratios)


def speed_findings(before: Snapshot, after: Snapshot) -> list[Finding]:
    """Both rates in every runtime that timed both snapshots, reported together where they go the same way."""
    found = []
    for runtime in sorted(after.decode.keys() | after.prefill.keys()):
        rates = (
            rate_finding(before.decode.get(runtime), after.decode.get(runtime), "decode"),
            rate_finding(before.prefill.get(runtime), after.prefill.get(runtime), "prefill"),
        )
        where = f" ({runtime_name(runtime)})" if runtime else ""
        for direction in _KNOWN:
            texts = [rate.text for rate in rates if rate.direction == direction]
            if texts:
                found.append(Finding(direction, ", ".join(texts) + where))
    return found or [Finding("unknown", "speed not measured")]


def change_of_nll(before: Snapshot, after: Snapshot) -> tuple[float | None, Interval | None]:
    """The change in nats and its 95 % interval (see the module's note on quadrature)."""
    return _change(before.delta_nll, before.delta_ci, after.delta_nll, after.delta_ci)


def change_of_score(before: Snapshot, after: Snapshot) -> tuple[float | None, Interval | None]:
    """The same of the score of labels, 1 and not points."""
    return _change(before.delta_score, before.delta_score_ci, after.delta_score, after.delta_score_ci)


def _change(
    before: float | None, before_ci: Interval | None, after: float | None, after_ci: Interval | None
) -> tuple[float | None, Interval | None]:
    if after is None or before is None:
        return None, None
    change = after - before
    if after_ci is None:
        return change, None
    earlier = before_ci or (before, before)
    low = hypot(after - after_ci[0], earlier[1] - before)
    high = hypot(after_ci[1] - after, before - earlier[0])
    return change, (change - low, change + high)


def quality_finding(change: float | None, bounds: Interval | None) -> Finding:
    """The change of NLL: a rise is a loss, a fall a gain, and neither when the interval holds 0.

    >>> quality_finding(0.03, (0.02, 0.04)).text
    'quality worse by 0.0300 nats (significant)'
    >>> quality_finding(0.001, (-0.01, 0.01))
    Finding(direction='same', text='quality +0.00100 nats (not significant)')
    """
    return _worse(change, bounds, "quality", "nats")


def score_finding(name: str, change: float | None, bounds: Interval | None) -> Finding:
    """The change of a score, which should be high: a fall is a loss.

    >>> score_finding("accuracy", -0.012, (-0.02, -0.004)).text
    'accuracy worse by 1.20 points (significant)'
    >>> score_finding("accuracy", -0.002, (-0.01, 0.006))
    Finding(direction='same', text='accuracy −0.200 points (not significant)')
    """
    if change is None:
        return Finding("unknown", f"{name} not measured")
    flipped = None if bounds is None else (0.0 - bounds[1], 0.0 - bounds[0])
    return _worse(0.0 - change, flipped, name, "points", -100.0)


def _worse(
    change: float | None, bounds: Interval | None, what: str, unit: str, factor: float = 1.0
) -> Finding:
    """A change for the worse where it is positive; shown `factor` times as large."""
    if change is None:
        return Finding("unknown", f"{what} not measured")
    if bounds == (0.0, 0.0) and change == 0:
        return Finding("same", f"{what} unchanged")
    known = is_significant(bounds)
    word = "no interval" if known is None else significance(bounds)
    if known is None:
        direction: Direction = "loss" if change > 0 else "gain" if change < 0 else "same"
    else:
        direction = "same" if not known else "loss" if change > 0 else "gain"
    if direction == "same":
        return Finding(direction, f"{what} {units.signed(factor * change)} {unit} ({word})")
    way = "worse" if direction == "loss" else "better"
    return Finding(direction, f"{what} {way} by {units.significant(abs(factor * change))} {unit} ({word})")


def embedding_finding(distance: float) -> Finding:
    """How far the embeddings have moved from the base's, which says nothing of which serve better.

    >>> embedding_finding(0.0006).text
    "embeddings at a cosine similarity of 0.9994 to the base's"
    """
    direction: Direction = "loss" if distance > 1e-6 else "same"
    return Finding(direction, f"embeddings at a cosine similarity of {1 - distance:.4f} to the base's")


def judge(before: Snapshot, after: Snapshot) -> Verdict:
    """Compare two snapshots and sum up; see the module's docstring for the rules."""
    size = size_finding(before.bytes, after.bytes)
    speeds = speed_findings(before, after)
    quality = quality_finding(*change_of_nll(before, after))
    if after.cosine_distance is not None:
        quality = embedding_finding(after.cosine_distance)
    if after.score is not None:
        quality = score_finding(metric_name(after.score_name), *change_of_score(before, after))
    asked = {"size": [size], "speed": speeds, "quality": [quality]}
    answered = [
        name for name, found in asked.items() if any(finding.direction in _KNOWN for finding in found)
    ]
    if not answered:
        return Verdict("unknown", (Finding("unknown", "Not measured after this step."),))
    findings = (size, *speeds, quality)

    def reported(direction: Direction) -> str:
        return "; ".join(finding.text for finding in findings if finding.direction == direction)

    same, losses, missing = reported("same"), reported("loss"), reported("unknown")
    parts = [
        Finding("gain", f"Gain: {reported('gain')}.")
        if reported("gain")
        else Finding("loss", f"No gain in {_either(answered)}.")
    ]
    if losses:
        parts.append(Finding("loss", f"Cost: {losses}."))
    if same:
        parts.append(Finding("same", f"{same[0].upper()}{same[1:]}."))
    if missing:
        parts.append(Finding("unknown", f"{missing[0].upper()}{missing[1:]}."))
    return Verdict("gain" if reported("gain") else "none", tuple(parts))


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1]


def _factor(ratio: float) -> str:
    # near 1 two digits would print "1.0x smaller" for a real change
    return units.times(ratio, 3 if ratio < 1.1 else 2)
