"""The trade-off pictures: quality lost against size or speed.

Method: one picture for each combination that the page offers: what lies along x, which measure of quality,
which scale. On a logarithmic scale what is not positive (the base itself has KL 0) sits on a strip at the
bottom, whose tick says so, and the hover always tells the true number.

Limits: bars are 95 % intervals across quality; along speed they reach from the median down to the
rate at the p95 latency, which is spread, not uncertainty.
"""

from collections.abc import Callable
from dataclasses import dataclass

from compress.records.base import Interval
from compress.records.results import Result
from compress.report import scores, units
from compress.report.frontier import pareto_front
from compress.report.pictures import Mark, Picture, Series, both_labels, stairs
from compress.report.scales import Scale, linear_scale, log_scale
from compress.report.scores import (
    hundredths,
    interval_hundredths,
    lost,
    lost_interval,
    metric_name,
    score_name,
)
from compress.report.verdicts import runtime_name, significance


@dataclass(frozen=True)
class Point:
    """A measured line with the series it is drawn in; `colour` and `marker` are indices."""

    result: Result
    series: str
    colour: int
    marker: int


@dataclass(frozen=True)
class Axis:
    """What lies along x: value and interval of a result, and which way is better."""

    key: str
    name: str
    title: str
    value: Callable[[Result], float | None]
    low: Callable[[Result], float | None]
    bigger_is_better: bool


def _megabytes(name: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        found: int | None = getattr(result, name)
        return None if found is None else found / 1e6

    return value


def _rate_at_p95(kind: str) -> Callable[[Result], float | None]:
    def value(result: Result) -> float | None:
        rate: float | None = getattr(result, f"{kind}_tokens_per_second")
        middle: float | None = getattr(result, f"{kind}_seconds_p50")
        slow: float | None = getattr(result, f"{kind}_seconds_p95")
        return rate * middle / slow if rate and middle and slow else None

    return value


SIZE_AXES = (
    Axis("disk", "disk", "on disk (MB)", _megabytes("disk_bytes"), lambda _: None, False),
    Axis("weights", "weights", "weights resident (MB)", _megabytes("weight_bytes"), lambda _: None, False),
    Axis("rss", "peak RSS", "peak RSS (MB)", _megabytes("peak_rss_bytes"), lambda _: None, False),
)
SPEED_AXES = (
    Axis(
        "decode",
        "decode",
        "decode (tokens/s)",
        lambda r: r.decode_tokens_per_second,
        _rate_at_p95("decode"),
        True,
    ),
    Axis(
        "prefill",
        "prefill",
        "prefill (tokens/s)",
        lambda r: r.prefill_tokens_per_second,
        _rate_at_p95("prefill"),
        True,
    ),
)


@dataclass(frozen=True)
class Quality:
    """What lies upward, low being good: value and interval of a result. `by_decades`: a logarithm shows more;
    a loss spans less than a decade, and of a score as much may be won as lost."""

    name: str
    title: str
    value: Callable[[Result], float | None]
    interval: Callable[[Result], Interval | None]
    by_decades: bool = True
    from_zero: bool = True
    below: str = "0"  # what a logarithmic scale cannot show


QUALITIES: dict[str, Quality] = {
    "score": Quality("lost", "{} lost (points)", lost, lost_interval, by_decades=False),
    "kl": Quality("KL to base", "KL to base (nats)", lambda r: r.kl_to_base, lambda r: r.kl_ci95),
    "delta": Quality("Δ NLL", "Δ NLL (nats)", lambda r: r.delta_nll, lambda r: r.delta_nll_ci95, below="≤ 0"),
    "nll": Quality("NLL", "NLL (nats)", lambda r: r.nll, lambda r: r.nll_ci95, False, False),
    "cosine": Quality(
        "1 − cosine", "1 − cosine to base", lambda r: r.cosine_distance, lambda r: r.cosine_ci95
    ),
}


def measured_qualities(results: list[Result]) -> list[tuple[str, str]]:
    """(key, name) of the measures of quality that any line has, the first one to be shown first."""
    name = score_name(results)
    return [
        (key, f"{name} {quality.name}" if key == "score" else quality.name)
        for key, quality in QUALITIES.items()
        if any(quality.value(result) is not None for result in results)
    ]


def measured_axes(results: list[Result], axes: tuple[Axis, ...]) -> list[tuple[str, str]]:
    """(key, name) of what any line has of these, the first one to be shown first; all where none has any."""
    found = [axis for axis in axes if any(axis.value(result) is not None for result in results)]
    return [(axis.key, axis.name) for axis in found or axes]


def runtime_points(results: list[Result]) -> list[Point]:
    """One run: a series, a colour and a marker for each runtime."""
    runtimes = list(dict.fromkeys(result.runtime for result in results))
    return [
        Point(r, runtime_name(r.runtime), runtimes.index(r.runtime), runtimes.index(r.runtime))
        for r in results
    ]


def run_points(labelled: list[tuple[str, list[Result]]]) -> list[Point]:
    """Several runs: a colour for each run, a marker for each runtime."""
    runtimes = list(dict.fromkeys(result.runtime for _, results in labelled for result in results))
    return [
        Point(result, f"{label}, {runtime_name(result.runtime)}", colour, runtimes.index(result.runtime))
        for colour, (label, results) in enumerate(labelled)
        for result in results
    ]


def tradeoff_pictures(points: list[Point], with_front: bool = True) -> dict[str, Picture | None]:
    """All trade-off pictures, keyed "<x>/<quality>/<scale>"; None where nothing was measured.

    What their hover tells of a point is its number among `points`; see `hover_lines`.
    """
    return {
        f"{axis.key}/{quality}/{scale}": tradeoff_picture(points, axis, quality, scale == "log", with_front)
        for axis in (*SIZE_AXES, *SPEED_AXES)
        for quality, _ in measured_qualities([point.result for point in points])
        for scale in ("log", "linear")
    }


def tradeoff_picture(
    points: list[Point], axis: Axis, quality: str, logarithmic: bool, with_front: bool = True
) -> Picture | None:
    """Quality lost (up) against size or speed (right); None without a point to draw."""
    shown = QUALITIES[quality]
    title = shown.title.format(score_name(point.result for point in points))
    placed = [
        (number, x, y)
        for number, point in enumerate(points)
        if (x := axis.value(point.result)) is not None and (y := shown.value(point.result)) is not None
    ]
    if not placed:
        return None
    intervals: dict[int, Interval | None] = {
        number: shown.interval(points[number].result) for number, _, _ in placed
    }
    heights = [y for _, _, y in placed]
    ends = [end for interval in intervals.values() if interval for end in interval]
    if logarithmic and shown.by_decades:
        vertical = log_scale(heights, shown.below)
    else:
        vertical = linear_scale([*heights, *ends, *([0.0] if shown.from_zero else [])])
    across = linear_scale([0.0, max(x for _, x, _ in placed)])
    sign = -1.0 if axis.bigger_is_better else 1.0
    front = pareto_front([(sign * x, y) for _, x, y in placed]) if with_front else []
    spots = [(across.share(x), 1 - vertical.share(y)) for _, x, y in placed]
    series: dict[tuple[str, int, int], list[Mark]] = {}
    hover = []
    for (number, x, _), spot in zip(placed, spots, strict=True):
        point = points[number]
        marks = series.setdefault((point.series, point.colour, point.marker), [])
        marks.append(_mark(spot, x, axis.low(point.result), intervals[number], across, vertical))
        hover.append((*spot, list(series).index((point.series, point.colour, point.marker)), number))
    first = [*front, *(index for index in range(len(placed)) if index not in set(front))]
    narrow, wide = both_labels([(*spots[i], points[placed[i][0]].result.variant) for i in first])
    return Picture(
        across,
        vertical,
        axis.title,
        title,
        tuple(Series(name, colour, marker, tuple(m)) for (name, colour, marker), m in series.items()),
        # between two corners nothing better than the worse one was measured, hence stairs
        stairs(sorted({spots[index] for index in front}), not axis.bigger_is_better),
        "better ↘" if axis.bigger_is_better else "↙ better",
        narrow,
        wide,
        tuple(hover),
    )


def _mark(
    spot: tuple[float, float],
    x: float,
    low: float | None,
    interval: Interval | None,
    across: Scale,
    vertical: Scale,
) -> Mark:
    spread = None if low is None or low >= x else (across.share(low), spot[0])
    if interval is None:
        return Mark(*spot, spread)
    return Mark(*spot, spread, (1 - vertical.share(interval[1]), 1 - vertical.share(interval[0])))


def hover_lines(point: Point) -> list[str]:
    """What the page tells of a point that is asked."""
    result = point.result
    decode = f"decode {units.significant(result.decode_tokens_per_second)} tokens/s, "
    return [
        f"{result.variant} · {point.series}",
        f"{units.size(result.disk_bytes)} on disk, {units.size(result.weight_bytes)} weights",
        *(_text_lines(result) if result.score is None else _label_lines(result)),
        ("" if result.score is not None and result.decode_tokens_per_second is None else decode)
        + f"prefill {units.significant(result.prefill_tokens_per_second)} tokens/s",
        f"peak RSS {units.size(result.peak_rss_bytes)}",
    ]


def _text_lines(result: Result) -> list[str]:
    return [
        f"perplexity {units.significant(result.perplexity)}",
        f"Δ NLL {units.signed(result.delta_nll)} {units.interval(result.delta_nll_ci95, True)} nats"
        f" {significance(result.delta_nll_ci95)}",
        f"KL {units.significant(result.kl_to_base)} {units.interval(result.kl_ci95)} nats,"
        f" top-1 {units.percent(result.top1_agreement)}",
    ]


def _label_lines(result: Result) -> list[str]:
    own, change = (
        units.interval(interval_hundredths(bounds), with_sign)
        for bounds, with_sign in ((result.score_ci95, False), (result.delta_score_ci95, True))
    )
    lines = [
        f"{metric_name(result.score_name or '')} {units.significant(hundredths(result.score))} {own}",
        f"{scores.points(result.delta_score)} {change} {significance(result.delta_score_ci95)}",
    ]
    if result.flips is not None:
        far = f", KL {units.significant(result.kl_to_base)} nats" if result.kl_to_base is not None else ""
        lines.append(f"flips {units.percent(result.flips)}{far}")
    return lines
