"""Figures as plain Plotly JSON: the trade-off pictures and the loss curves.

Method: everything a figure shows is computed here, once for each combination that the page offers
(what lies along x, which measure of quality, which scale), so that the script in the page only picks
one and colours it. Colours are names of CSS variables ("--series-0"); the page puts in the values of
its light or dark theme. On a logarithmic scale what is not positive (the base itself has KL 0) sits
on a strip at the bottom, whose tick says so, and the hover always tells the true number.

Limits: bars are 95 % intervals across quality; along speed they reach from the median down to the
rate at the p95 latency, which is spread, not uncertainty. The dictionaries are valid arguments of
`plotly.graph_objects.Figure` once the colour names are replaced; a test does just that.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from compress.records.records import Interval, PassRecord, Result
from compress.report import units
from compress.report.frontier import pareto_front
from compress.report.verdicts import runtime_name, significance

Figure = dict[str, Any]
COLOURS = 8
# The same variant in two runtimes often coincides: the first is a ring, the others fit inside it.
SYMBOLS = ("circle-open", "diamond", "square", "triangle-up", "cross", "star")


@dataclass(frozen=True)
class Point:
    """A measured line with the series it is drawn in; `colour` and `symbol` are indices."""

    result: Result
    series: str
    colour: int
    symbol: int


@dataclass(frozen=True)
class Axis:
    """What lies along x: value and interval of a result, and which way is better."""

    key: str
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
    Axis("disk", "on disk (MB)", _megabytes("disk_bytes"), lambda _: None, False),
    Axis("weights", "weights resident (MB)", _megabytes("weight_bytes"), lambda _: None, False),
    Axis("rss", "peak RSS (MB)", _megabytes("peak_rss_bytes"), lambda _: None, False),
)
SPEED_AXES = (
    Axis("decode", "decode (tokens/s)", lambda r: r.decode_tokens_per_second, _rate_at_p95("decode"), True),
    Axis(
        "prefill", "prefill (tokens/s)", lambda r: r.prefill_tokens_per_second, _rate_at_p95("prefill"), True
    ),
)
QUALITIES: dict[str, tuple[str, str, str]] = {
    "kl": ("KL to base (nats)", "kl_to_base", "kl_ci95"),
    "delta": ("Δ NLL (nats)", "delta_nll", "delta_nll_ci95"),
    "nll": ("NLL (nats)", "nll", "nll_ci95"),
    "cosine": ("1 − cosine to base", "cosine_distance", "cosine_ci95"),
}
QUALITY_NAMES = {"kl": "KL to base", "delta": "Δ NLL", "nll": "NLL", "cosine": "1 − cosine"}


def measured_qualities(results: list[Result]) -> list[tuple[str, str]]:
    """(key, name) of the measures of quality that any line has, the first one to be shown first."""
    measured = {
        key for key, (_, field, _) in QUALITIES.items() if any(getattr(r, field) is not None for r in results)
    }
    return [(key, name) for key, name in QUALITY_NAMES.items() if key in measured]


def runtime_points(results: list[Result]) -> list[Point]:
    """One run: a series, a colour and a symbol for each runtime."""
    runtimes = list(dict.fromkeys(result.runtime for result in results))
    return [
        Point(r, runtime_name(r.runtime), runtimes.index(r.runtime), runtimes.index(r.runtime))
        for r in results
    ]


def run_points(labelled: list[tuple[str, list[Result]]]) -> list[Point]:
    """Several runs: a colour for each run, a symbol for each runtime."""
    runtimes = list(dict.fromkeys(result.runtime for _, results in labelled for result in results))
    return [
        Point(result, f"{label}, {runtime_name(result.runtime)}", colour, runtimes.index(result.runtime))
        for colour, (label, results) in enumerate(labelled)
        for result in results
    ]


def tradeoff_figures(points: list[Point], with_front: bool = True) -> dict[str, Figure | None]:
    """All trade-off figures, keyed "<x>/<quality>/<scale>"; None where nothing was measured."""
    return {
        f"{axis.key}/{quality}/{scale}": tradeoff_figure(points, axis, quality, scale == "log", with_front)
        for axis in (*SIZE_AXES, *SPEED_AXES)
        for quality, _ in measured_qualities([point.result for point in points])
        for scale in ("log", "linear")
    }


def tradeoff_figure(
    points: list[Point], axis: Axis, quality: str, logarithmic: bool, with_front: bool = True
) -> Figure | None:
    """Quality lost (up) against size or speed (right); None without a point to draw."""
    title, value_name, interval_name = QUALITIES[quality]
    placed = [
        (point, x, y)
        for point in points
        if (x := axis.value(point.result)) is not None
        and (y := getattr(point.result, value_name)) is not None
    ]
    if not placed:
        return None
    intervals: list[Interval | None] = [getattr(point.result, interval_name) for point, _, _ in placed]
    heights = [y for _, _, y in placed]
    if logarithmic and quality != "nll":  # the NLL spans less than a decade: a logarithm would only hide it
        vertical = _log_axis(heights, quality)
    else:
        vertical = _linear_axis(heights, intervals, from_zero=quality != "nll")
    floor = vertical.pop("floor")
    sign = -1.0 if axis.bigger_is_better else 1.0
    front = pareto_front([(sign * x, y) for _, x, y in placed]) if with_front else []
    corners = [(placed[i][1], max(placed[i][2], floor)) for i in front]
    # between two corners nothing better than the worse one was measured, hence stairs
    traces = [_front_trace(corners, "vh" if axis.bigger_is_better else "hv")] if len(front) > 1 else []
    members = set(front)
    for series in dict.fromkeys((p.series, p.colour, p.symbol) for p, _, _ in placed):
        own = [i for i, (p, _, _) in enumerate(placed) if (p.series, p.colour, p.symbol) == series]
        traces.append(
            _series_trace(
                series,
                [placed[i] for i in own],
                [intervals[i] for i in own],
                [i in members for i in own],
                axis,
                floor,
            )
        )
    widest = max(x for _, x, _ in placed)
    return {
        "data": traces,
        "layout": _layout(
            xaxis={"title": {"text": axis.title}, "range": [0, widest * 1.18 or 1]},
            yaxis={"title": {"text": title}, **vertical},
            better="better ↘" if axis.bigger_is_better else "↙ better",
            better_x=0.995 if axis.bigger_is_better else 0.005,
        ),
    }


def loss_figures(steps: list[tuple[str, PassRecord]]) -> list[tuple[str, Figure]]:
    """(title, figure) per kind of pass that left a loss curve; each curve is labelled by its variant.

    The notes' `loss_curve` holds [step, tokens, loss, held-out loss or None] lists.
    """
    kinds: dict[str, list[tuple[str, list[list[float | None]]]]] = {}
    for label, step in steps:
        curve = step.notes.get("loss_curve")
        if isinstance(curve, list) and len(curve) > 1:
            kinds.setdefault(step.name, []).append((label, curve))
    return [(name, _loss_figure(curves)) for name, curves in kinds.items()]


def _loss_figure(curves: list[tuple[str, list[list[float | None]]]]) -> Figure:
    traces = []
    for index, (label, curve) in enumerate(curves):
        colour = f"--series-{index % COLOURS}"
        for column, suffix, dash in ((2, "", "solid"), (3, ", held out", "dot")):
            rows = [row for row in curve if len(row) > column and row[column] is not None]
            if not rows:
                continue
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines" if column == 2 else "lines+markers",
                    "name": escape(label + suffix),
                    "x": [row[1] for row in rows],
                    "y": [row[column] for row in rows],
                    "line": {"color": colour, "dash": dash, "width": 1.5 if column == 2 else 2},
                    "marker": {"size": 5},
                    "hovertemplate": "%{y:.3f} at %{x:.3s} tokens<extra>%{fullData.name}</extra>",
                }
            )
    return {
        "data": traces,
        "layout": _layout(
            xaxis={"title": {"text": "tokens seen"}, "tickformat": "~s", "rangemode": "tozero"},
            yaxis={"title": {"text": "loss (nats per token)"}},
        ),
    }


def _series_trace(
    series: tuple[str, int, int],
    placed: list[tuple[Point, float, float]],
    intervals: list[Interval | None],
    on_front: list[bool],
    axis: Axis,
    floor: float,
) -> dict[str, Any]:
    name, colour, symbol = series
    heights = [max(y, floor) for _, _, y in placed]
    lows = [x if (low := axis.low(point.result)) is None else low for point, x, _ in placed]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": escape(name),
        "x": [x for _, x, _ in placed],
        "y": heights,
        "customdata": [
            _hover(point.result, name, front) for (point, _, _), front in zip(placed, on_front, strict=True)
        ],
        "meta": {"labels": [escape(point.result.variant) for point, _, _ in placed]},
        "hovertemplate": "%{customdata}<extra></extra>",
        "marker": {
            "color": f"--series-{colour % COLOURS}",
            "symbol": SYMBOLS[symbol % len(SYMBOLS)],
            "size": 13 if symbol == 0 else 8,
            "line": {"color": f"--series-{colour % COLOURS}", "width": 2.2 if symbol == 0 else 0},
        },
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [
                0 if ci is None else max(ci[1], floor) - y for ci, y in zip(intervals, heights, strict=True)
            ],
            "arrayminus": [
                0 if ci is None else max(y - max(ci[0], floor), 0)
                for ci, y in zip(intervals, heights, strict=True)
            ],
            "color": f"--series-{colour % COLOURS}",
            "thickness": 1.5,
            "width": 0,
        },
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [0.0 for _ in placed],
            "arrayminus": [max(x - low, 0) for (_, x, _), low in zip(placed, lows, strict=True)],
            "color": f"--series-{colour % COLOURS}",
            "thickness": 1.5,
            "width": 0,
        },
    }


def _front_trace(corners: list[tuple[float, float]], shape: str) -> dict[str, Any]:
    ordered = sorted(corners)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [x for x, _ in ordered],
        "y": [y for _, y in ordered],
        "line": {"color": "--muted", "width": 1.3, "dash": "dash", "shape": shape},
        "hoverinfo": "skip",
    }


def _hover(result: Result, series: str, on_front: bool) -> str:
    lines = [
        f"<b>{escape(result.variant)}</b> · {escape(series)}",
        f"{units.size(result.disk_bytes)} on disk, {units.size(result.weight_bytes)} weights",
        f"perplexity {units.significant(result.perplexity)}",
        f"Δ NLL {units.signed(result.delta_nll)} {units.interval(result.delta_nll_ci95, True)} nats"
        f" {significance(result.delta_nll_ci95)}",
        f"KL {units.significant(result.kl_to_base)} {units.interval(result.kl_ci95)} nats,"
        f" top-1 {units.percent(result.top1_agreement)}",
        f"decode {units.significant(result.decode_tokens_per_second)} tokens/s,"
        f" prefill {units.significant(result.prefill_tokens_per_second)} tokens/s",
        f"peak RSS {units.size(result.peak_rss_bytes)}",
    ]
    return "<br>".join([*lines, "on the Pareto front"] if on_front else lines)


def _log_axis(heights: list[float], quality: str) -> dict[str, Any]:
    """Decades with a strip below for what is not positive."""
    positive = [height for height in heights if height > 1e-6]
    smallest, largest = (min(positive), max(positive)) if positive else (0.1, 1.0)
    bottom = math.floor(math.log10(smallest))
    top = math.log10(largest) + 0.35
    floor = 10.0 ** (bottom - 0.5)
    decades = [10.0**power for power in range(bottom, math.ceil(top) + 1)]
    labels = [f"{decade:.{max(0, -round(math.log10(decade)))}f}" for decade in decades]
    return {
        "type": "log",
        "range": [bottom - 0.8, max(top, bottom + 1.2)],
        "tickvals": [floor, *decades],
        "ticktext": ["0" if quality in ("kl", "cosine") else "≤ 0", *labels],
        "floor": floor,
    }


def _linear_axis(heights: list[float], intervals: list[Interval | None], from_zero: bool) -> dict[str, Any]:
    ends = [*heights, *(end for ci in intervals if ci for end in ci), *([0.0] if from_zero else [])]
    low, high = min(ends), max(ends)
    pad = (high - low) * 0.1 or 0.01
    return {"range": [low - pad, high + 1.5 * pad], "floor": -math.inf}


def _layout(
    xaxis: dict[str, Any], yaxis: dict[str, Any], better: str = "", better_x: float = 0.0
) -> dict[str, Any]:
    line = {"gridcolor": "--grid", "zerolinecolor": "--axis", "linecolor": "--axis", "automargin": True}
    corner = {
        "text": better,
        "xref": "paper",
        "yref": "paper",
        "x": better_x,
        "y": 0.01,
        "xanchor": "right" if better_x > 0.5 else "left",
        "yanchor": "bottom",
        "showarrow": False,
        "font": {"size": 11, "color": "--muted"},
    }
    return {
        "xaxis": {**line, **xaxis},
        "yaxis": {**line, **yaxis},
        "font": {"color": "--text", "size": 12},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"l": 56, "r": 12, "t": 8, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
        "hoverlabel": {
            "align": "left",
            "bgcolor": "--raised",
            "bordercolor": "--axis",
            "font": {"color": "--text"},
        },
        "modebar": {
            "bgcolor": "rgba(0,0,0,0)",
            "color": "--axis",
            "activecolor": "--text",
            "orientation": "v",
        },
        "annotations": [corner] if better else [],
    }
