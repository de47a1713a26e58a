"""The results table: columns, rows and what each cell shows, sorts by and explains.

Method: a row is a measured line (or a reference model); a cell holds its text, the raw value to sort
by (None sorts last) and a second line for the interval. Ratios and speed-ups are against the base in
the same runtime, so that a runtime's own merit is never credited to a compression method.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from compress.records.base import Interval
from compress.records.flips import LabelReference
from compress.records.results import Result
from compress.records.run import Reference, RunRecord
from compress.report import units
from compress.report.scores import (
    factor_of,
    hundredths,
    interval_hundredths,
    metric_keys,
    metric_name,
    score_name,
    score_unit,
    unit_of,
)
from compress.report.verdicts import is_significant, runtime_name


@dataclass(frozen=True)
class Column:
    """A column: `key` is what `#sort=<key>` in the page's address names."""

    key: str
    title: str
    unit: str
    group: str
    help: str
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """Text, the value to sort by, a second line, and a hint."""

    text: str
    value: float | str | None = None
    sub: str = ""
    hint: str = ""
    word: str = ""  # a third line


@dataclass(frozen=True)
class Row:
    """One line of the table, cells in the order of the columns."""

    cells: tuple[Cell, ...]
    is_base: bool = False


Cells = dict[str, Cell]  # by the key of their column

COLUMNS = (
    Column("variant", "Variant", "", "", "The chain of passes this line measured", numeric=False),
    Column("runtime", "Runtime", "", "", "What ran it", numeric=False),
    Column("file", "Disk", "MB", "Size", "All files of the artifact"),
    Column("ratio", "Ratio", "×", "Size", "How many times smaller than the base in the same runtime"),
    Column("weights", "Weights", "MB", "Size", "Bytes of weights resident"),
    Column("parameters", "Parameters", "", "Size", "Parameters, and how many are not zero"),
    Column("perplexity", "Perplexity", "", "Quality", "exp of the NLL per token"),
    Column("bits", "Bits/byte", "", "Quality", "Comparable across tokenizers"),
    Column("delta", "Δ NLL", "nats", "Quality", "NLL minus the base's, same tokens; 95 % interval"),
    Column("kl", "KL to base", "nats", "Quality", "Mean KL divergence from the base; 95 % interval"),
    Column("top1", "Top-1", "%", "Quality", "Share of positions with the base's most likely token"),
    Column("prefill", "Prefill", "tokens/s", "Speed", "Prompt processing; slowest and fastest round"),
    Column(
        "decode",
        "Decode",
        "tokens/s",
        "Speed",
        "Generation with a cache; slowest and fastest round",
    ),
    Column("p50", "Per token", "ms", "Speed", "Time of a generated token: median, and what 95 % stay below"),
    Column("load", "Load", "s", "Speed", "From disk to ready"),
    Column("rss", "Peak RSS", "MB", "Memory", "Of a fresh process that loads and runs it"),
    Column("cosine", "1 − cosine", "", "Embeddings", "Mean cosine distance to the base's; 95 % interval"),
)
_QUALITY = next(place for place, column in enumerate(COLUMNS) if column.group == "Quality")
RUN_COLUMN = Column("run", "Run", "", "", "The run this line is from", numeric=False)


def shown_columns(
    results: list[Result],
    references: Sequence[Reference] = (),
    label_references: Sequence[LabelReference] = (),
) -> tuple[Column, ...]:
    """The columns in which any line has something; all of them where nothing at all was measured."""
    columns = [*COLUMNS[:_QUALITY], *_score_columns(results, label_references), *COLUMNS[_QUALITY:]]
    rows: list[Cells] = [_cells(result, None) for result in results]
    rows += [_reference_cells(reference) for reference in references]
    rows += [_label_reference_cells(reference) for reference in label_references]
    scored = any(result.score is not None for result in results)
    filled = {key for row in rows for key, cell in row.items() if cell.value is not None} | {"ratio"}
    if scored:  # what it says the flips say, which are told apart besides
        filled.discard("top1")
    if filled <= {"variant", "runtime", "ratio"}:
        return tuple(column for column in columns if column.key != "cosine")
    return tuple(column for column in columns if column.key in filled)


def _score_columns(results: list[Result], references: Sequence[LabelReference]) -> list[Column]:
    """Those of labels, in the words of the score that they are judged by."""
    name = score_name(results)
    metrics = list(dict.fromkeys([*metric_keys(results), *(key for r in references for key in r.metrics)]))
    told = [
        Column(f"metric-{key}", capital(metric_name(key)), unit_of(key), "Labels", capital(metric_name(key)))
        for key in metrics
    ]
    if not name:
        return told
    return [
        Column("score", capital(name), score_unit(results), "Labels", f"{capital(name)}; 95 % interval"),
        Column("delta_score", f"Δ {name}", "points", "Labels", "Minus the base's, same texts; 95 % interval"),
        Column("flips", "Flips", "%", "Labels", "Decisions that are not the base's; lost: right before"),
        *told,
    ]


_IN_MARKDOWN = (
    "variant", "runtime", "file", "ratio", "score", "delta_score", "flips", "perplexity", "delta", "kl",
    "top1", "prefill", "decode", "rss", "cosine",
)  # fmt: skip
_WITH_INTERVAL = ("score", "delta_score", "flips", "delta", "kl", "cosine")


def markdown_columns(columns: Sequence[Column]) -> list[tuple[int, str, bool]]:
    """Of the columns that a Markdown table has: number, heading, and whether what is below is shown, too."""
    found = []
    for number, column in enumerate(columns):
        if column.key not in _IN_MARKDOWN and not column.key.startswith("metric-"):
            continue
        interval = column.key in _WITH_INTERVAL
        title = f"{column.title}, {column.unit}" if column.unit.strip("×") else column.title
        title += " [95 %]" if interval and column.key != "flips" else ""
        found.append((number, title, interval))
    return found


def base_name(run: RunRecord) -> str:
    """The variant that all others are compared with: `run.base` if it is one, else the first root."""
    names = [variant.name for variant in run.variants]
    if run.base in names:
        return run.base
    roots = [variant.name for variant in run.variants if variant.parent is None]
    return next((name for name in ("base", *roots, *names) if name in names), run.base)


def base_result(run: RunRecord, results: list[Result], runtime: str) -> Result | None:
    """The base's line in that runtime, or None."""
    name = base_name(run)
    return next((r for r in results if r.variant == name and r.runtime == runtime), None)


def ordered(run: RunRecord, results: list[Result]) -> list[Result]:
    """Results in the order of the recipe's variants, then by runtime; unknown variants last."""
    order = {variant.name: index for index, variant in enumerate(run.variants)}
    return sorted(
        with_base_as_zero(run, results),
        key=lambda r: (order.get(r.variant, len(order)), r.runtime != "torch", r.runtime),
    )


def with_base_as_zero(run: RunRecord, results: list[Result]) -> list[Result]:
    """The base's torch line is what all others are compared with, so it differs from itself by nothing.

    Who measured leaves its comparisons empty; filled in here, it can be drawn and subtracted from.
    """
    name = base_name(run)
    itself = {
        "delta_nll": 0.0,
        "delta_nll_ci95": (0.0, 0.0),
        "kl_to_base": 0.0,
        "kl_ci95": (0.0, 0.0),
        "top1_agreement": 1.0,
    }
    labels = {"delta_score": 0.0, "delta_score_ci95": (0.0, 0.0)}
    flips = {"flips": 0.0, "flips_lost": 0.0, "flips_gained": 0.0}
    distances = any(result.kl_to_base is not None for result in results)
    compared = any(result.delta_nll is not None for result in results)
    scored = any(result.delta_score is not None for result in results)
    flipped = any(result.flips is not None for result in results)

    def filled(result: Result) -> Result:
        if result.variant != name or result.runtime != "torch":
            return result
        update: dict[str, Any] = {}
        if compared and result.nll is not None and result.delta_nll is None:
            update |= itself if distances else {key: itself[key] for key in ("delta_nll", "delta_nll_ci95")}
        if scored and result.score is not None and result.delta_score is None:
            update |= labels | (flips if flipped else {})
        return result.model_copy(update=update)

    return [filled(result) for result in results]


def table_rows(
    run: RunRecord, results: list[Result], columns: tuple[Column, ...], run_label: str | None = None
) -> list[Row]:
    """A row per measured line; `run_label` adds the run's column in front."""
    first = () if run_label is None else (Cell(run_label, run_label),)
    return [
        Row(
            (*first, *_shown(_cells(result, base_result(run, results, result.runtime)), columns)),
            result.variant == base_name(run),
        )
        for result in ordered(run, results)
    ]


def _shown(cells: Cells, columns: tuple[Column, ...]) -> list[Cell]:
    return [cells.get(column.key, Cell(units.ABSENT)) for column in columns]


def reference_rows(run: RunRecord, columns: tuple[Column, ...], run_label: str | None = None) -> list[Row]:
    """A row per reference model: what it has of quality, dashes elsewhere."""
    first = () if run_label is None else (Cell(run_label, run_label),)
    rows = [_reference_cells(reference) for reference in run.references]
    rows += [_label_reference_cells(reference) for reference in run.label_references]
    return [Row((*first, *_shown(cells, columns))) for cells in rows]


def _reference_cells(reference: Reference) -> Cells:
    return {
        "variant": Cell(reference.label, reference.name, hint=_fitted(reference)),
        "runtime": Cell("reference", "reference"),
        "parameters": Cell(units.count(reference.parameters), reference.parameters),
        "perplexity": Cell(units.significant(reference.perplexity), reference.perplexity),
        "bits": Cell(units.significant(reference.bits_per_byte), reference.bits_per_byte),
    }


def _fitted(reference: Reference) -> str:
    return "" if reference.tokens is None else f"fitted on {units.count(reference.tokens)} tokens"


def _label_reference_cells(reference: LabelReference) -> Cells:
    return {
        "variant": Cell(reference.name, reference.name, hint=_learnt(reference)),
        "runtime": Cell("reference", "reference"),
        "score": _score_cell(reference.score_name, reference.score, reference.score_ci95),
        **_metric_cells(reference.metrics),
    }


def _learnt(reference: LabelReference) -> str:
    return f"fitted on {reference.rows:,} texts" if reference.rows else "not fitted on any text"


def _score_cell(name: str | None, score: float | None, bounds: Interval | None) -> Cell:
    sub = units.interval(interval_hundredths(bounds))
    return Cell(units.significant(hundredths(score)), score, sub=sub, hint=metric_name(name) if name else "")


def _metric_cells(metrics: dict[str, float] | None) -> Cells:
    return {
        f"metric-{key}": Cell(units.significant(factor_of(key) * value), value)
        for key, value in (metrics or {}).items()
    }


def _difference_cell(change: float | None, bounds: Interval | None) -> Cell:
    """In points; of what is the same decision by decision the number alone."""
    shown = Cell(units.signed(hundredths(change)), change)
    if change == 0 and bounds == (0.0, 0.0):
        return shown
    word = "not significant" if is_significant(bounds) is False else ""
    return replace(shown, sub=units.interval(interval_hundredths(bounds), with_sign=True), word=word)


def _flips_cell(result: Result) -> Cell:
    shown = Cell(units.percent(result.flips).removesuffix(" %"), result.flips)
    if not result.flips:
        return shown
    lost, gained = (
        units.percent(share).removesuffix(" %") for share in (result.flips_lost, result.flips_gained)
    )
    return replace(shown, sub=f"lost {lost}", word=f"gained {gained}")


def capital(name: str) -> str:
    """With a capital in front, and the others as they are.

    >>> capital("micro F1")
    'Micro F1'
    """
    return name[:1].upper() + name[1:]


def _cells(result: Result, base: Result | None) -> Cells:
    cells = _plain_cells(result, base)
    return {column.key: cell for column, cell in zip(COLUMNS, cells, strict=True)} | {
        "score": _score_cell(result.score_name, result.score, result.score_ci95),
        "delta_score": _difference_cell(result.delta_score, result.delta_score_ci95),
        "flips": _flips_cell(result),
        **_metric_cells(result.metrics),
    }


def _plain_cells(result: Result, base: Result | None) -> list[Cell]:
    ratio = base.disk_bytes / result.disk_bytes if base and base.disk_bytes and result.disk_bytes else None
    nonzero, total = result.nonzero_parameters, result.parameters
    sparse = nonzero is not None and total is not None and nonzero < total
    return [
        Cell(
            result.variant,
            result.variant,
            hint=f"fingerprint {result.fingerprint[:16]}" if result.fingerprint else "",
        ),
        Cell(runtime_name(result.runtime), result.runtime, hint=f"on {result.device}"),
        Cell(units.megabytes(result.disk_bytes), result.disk_bytes),
        Cell(units.significant(ratio), ratio),
        Cell(units.megabytes(result.weight_bytes), result.weight_bytes),
        Cell(units.count(total), total, sub=f"{units.count(nonzero)} nonzero" if sparse else ""),
        Cell(
            units.significant(result.perplexity),
            result.perplexity,
            hint=f"NLL {units.significant(result.nll, 4)} nats {units.interval(result.nll_ci95)}",
        ),
        Cell(units.significant(result.bits_per_byte), result.bits_per_byte),
        Cell(
            units.signed(result.delta_nll),
            result.delta_nll,
            sub=units.interval(result.delta_nll_ci95, with_sign=True),
            hint="not significant: the interval holds 0"
            if is_significant(result.delta_nll_ci95) is False
            else "",
        ),
        Cell(units.significant(result.kl_to_base), result.kl_to_base, sub=units.interval(result.kl_ci95)),
        Cell(units.percent(result.top1_agreement).removesuffix(" %"), result.top1_agreement),
        Cell(
            units.significant(result.prefill_tokens_per_second),
            result.prefill_tokens_per_second,
            sub=_range(result.prefill_tokens_per_second, result.prefill_round_seconds),
            hint=_latency(result.prefill_seconds_p50, result.prefill_seconds_p95),
        ),
        Cell(
            units.significant(result.decode_tokens_per_second),
            result.decode_tokens_per_second,
            sub=_range(result.decode_tokens_per_second, result.decode_round_seconds),
        ),
        Cell(
            units.milliseconds(result.decode_seconds_p50),
            result.decode_seconds_p50,
            sub=""
            if result.decode_seconds_p95 is None
            else f"p95 {units.milliseconds(result.decode_seconds_p95)}",
            hint=""
            if result.decode_seconds_p99 is None
            else f"p99 {units.duration(result.decode_seconds_p99)}",
        ),
        Cell(units.significant(result.load_seconds), result.load_seconds),
        Cell(units.megabytes(result.peak_rss_bytes), result.peak_rss_bytes),
        Cell(
            units.significant(result.cosine_distance),
            result.cosine_distance,
            sub=units.interval(result.cosine_ci95),
        ),
    ]


def _range(speed: float | None, rounds: tuple[float, ...]) -> str:
    """The slowest and the fastest round, as the speed that they would give."""
    if speed is None or len(rounds) < 2 or min(rounds) <= 0:
        return ""
    middle = median(rounds)
    slowest, fastest = (speed * middle / seconds for seconds in (max(rounds), min(rounds)))
    return units.interval((slowest, fastest))


def _latency(p50: float | None, p95: float | None) -> str:
    return "" if p50 is None else f"p50 {units.duration(p50)}, p95 {units.duration(p95)}"
