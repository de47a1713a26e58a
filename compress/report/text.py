"""The table that a terminal shows: plain text, columns as wide as what they hold."""

from collections.abc import Callable, Sequence

from compress.records.results import Result
from compress.records.run import Reference
from compress.report.markdown import visible

_Cell = Callable[[Result], float | None]

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


def text_table(results: Sequence[Result], references: Sequence[Reference] = ()) -> str:
    """A line per result and reference; what was not measured is a dash."""
    embeds = any(result.cosine_distance is not None for result in results)
    numbers = [column for column in _NUMBERS if embeds or column[0] != "1 − cosine"]
    titles = [title for title, _, _ in numbers]
    rows = [["variant", "runtime", *titles]]
    rows += [
        [visible(r.variant), visible(r.runtime), *(_number(value(r), form) for _, form, value in numbers)]
        for r in results
    ]
    rows += [
        [
            visible(r.label),
            "reference",
            *(f"{r.perplexity:.3f}" if t == "perplexity" else "–" for t in titles),
        ]
        for r in references
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if place < 2 else text.rjust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
