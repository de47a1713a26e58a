"""The table of an encoder's latency: a row per variant, runtime, batch and length.

A ratio is the speed over that of the base in the same runtime, batch and length. Cells that were left out are
told with the reason, once for all lines that give the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from compress.records.results import EncoderLatency, Result
from compress.records.run import RunRecord
from compress.report import units
from compress.report.rows import base_result
from compress.report.verdicts import runtime_name


@dataclass(frozen=True)
class LatencyRow:
    """What a row shows."""

    variant: str
    runtime: str
    batch: str
    length: str
    texts: str
    tokens: str
    p50: str
    p95: str
    ratio: str
    is_base: bool


def latency_rows(run: RunRecord, results: Sequence[Result]) -> list[LatencyRow]:
    """All rows, in the order of the results; none where nothing was timed so."""
    rows = []
    for result in results:
        base = base_result(run, list(results), result.runtime)
        speeds = {} if base is None else {(c.batch, c.length): c for c in base.encoder_latency}
        for cell in result.encoder_latency:
            rows.append(_row(result, cell, speeds.get((cell.batch, cell.length)), result is base))
    return rows


def left_out(results: Sequence[Result]) -> list[str]:
    """Which cells were not timed, and why, a line per reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for cell, reason in result.protocol.get("encoder_left_out", {}).items():
            names = found.setdefault((str(reason), str(cell)), [])
            names.append(f"{result.variant} in {runtime_name(result.runtime)}")
    lines: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (reason, cell), names in found.items():
        lines.setdefault((reason, tuple(names)), []).append(cell)
    every = sum(bool(r.encoder_latency) or "encoder_left_out" in r.protocol for r in results)
    return [
        f"Not timed{'' if len(names) == every else ' (' + ', '.join(names) + ')'}: "
        f"{', '.join(cells)}, {reason}."
        for (reason, names), cells in lines.items()
    ]


def _row(result: Result, cell: EncoderLatency, base: EncoderLatency | None, is_base: bool) -> LatencyRow:
    speed, other = cell.texts_per_second, None if base is None else base.texts_per_second
    ratio = speed / other if speed and other and not is_base else None
    return LatencyRow(
        variant=result.variant,
        runtime=runtime_name(result.runtime),
        batch=str(cell.batch),
        length="own" if cell.length is None else str(cell.length),
        texts=units.significant(speed),
        tokens=units.significant(cell.tokens_per_second),
        p50=units.milliseconds(cell.seconds_p50),
        p95=units.milliseconds(cell.seconds_p95),
        ratio=units.significant(ratio),
        is_base=is_base,
    )
