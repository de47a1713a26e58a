"""The table that a terminal shows: plain text, columns as wide as what they hold."""

from collections.abc import Callable, Sequence
from functools import partial

from compress.records.flips import LabelReference
from compress.records.results import Result
from compress.records.run import Reference
from compress.report.markdown import visible
from compress.report.scores import hundredths, score_name, score_unit
from compress.report.units import ABSENT

_Cell = Callable[[Result], float | None]
_Column = tuple[str, Callable[[Result], str]]

_NUMBERS: tuple[tuple[str, str, _Cell], ...] = (
    ("MB", ".2f", lambda r: r.disk_bytes and r.disk_bytes / 1e6),
    ("perplexity", ".3f", lambda r: r.perplexity),
    ("Δ NLL, nats", "+z.4f", lambda r: r.delta_nll),
    ("KL, nats", "z.4f", lambda r: r.kl_to_base),
    ("top-1", ".3f", lambda r: r.top1_agreement),
    ("1 − cosine", "z.5f", lambda r: r.cosine_distance),
    ("prefill, tokens/s", ".0f", lambda r: r.prefill_tokens_per_second),
    ("decode, tokens/s", ".0f", lambda r: r.decode_tokens_per_second),
    ("peak MB", ".0f", lambda r: r.peak_rss_bytes and r.peak_rss_bytes / 1e6),
)


class Results(list[Result]):
    """Measured lines; printed, they are a table."""

    def __str__(self) -> str:
        return text_table(self)


_OF_TEXT = ("perplexity", "Δ NLL, nats", "top-1")  # left out where labels are judged


def text_table(
    results: Sequence[Result],
    references: Sequence[Reference] = (),
    label_references: Sequence[LabelReference] = (),
) -> str:
    """A line per result and reference; what was not measured is a dash, and no column is all dashes."""
    name = score_name(results)
    shown = f"{name}, {score_unit(results)}"
    numbers: list[_Column] = [
        (title, partial(_shown, form, value))
        for title, form, value in _NUMBERS
        if not (name and title in _OF_TEXT)
    ]
    if name:
        numbers[:0] = [
            (shown, lambda r: _number(hundredths(r.score), ".2f")),
            ("Δ points [95 %]", _difference),
            ("flips, %", lambda r: _number(hundredths(r.flips), ".2f")),
        ]
        numbers.sort(key=lambda column: column[0].endswith(("MB", "tokens/s")))  # speed and sizes last
        numbers.sort(key=lambda column: column[0].endswith("MB"))
    cells = [[value(r) for _, value in numbers] for r in results]
    simple: list[tuple[str, dict[str, str]]] = [
        (r.label, {"perplexity": f"{r.perplexity:.3f}"}) for r in references
    ]
    simple += [(r.name, {shown: f"{100 * r.score:.2f}"}) for r in label_references]
    known = [title for place, (title, _) in enumerate(numbers) if any(row[place] != ABSENT for row in cells)]
    titles = [title for title, _ in numbers if title in known or any(title in own for _, own in simple)]
    titles = titles or [title for title, _ in numbers]
    rows = [["variant", "runtime", *titles]]
    for result, found in zip(results, cells, strict=True):
        own = dict(zip((title for title, _ in numbers), found, strict=True))
        rows.append([visible(result.variant), visible(result.runtime), *(own[title] for title in titles)])
    rows += [[visible(n), "reference", *(own.get(title, ABSENT) for title in titles)] for n, own in simple]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        padded = [
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def _shown(form: str, value: _Cell, result: Result) -> str:
    return _number(value(result), form)


def _number(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(value, form)


def _difference(result: Result) -> str:
    if result.delta_score is None:
        return ABSENT
    shown, bounds = f"{100 * result.delta_score:+z.2f}", result.delta_score_ci95
    return shown if bounds is None else f"{shown} [{100 * bounds[0]:+z.2f}, {100 * bounds[1]:+z.2f}]"
