"""Write the results of a run into the README, between its markers.

    python benchmarks/readme_table.py runs/demo

Every number comes from the run's `results.jsonl` and `run.json`; nothing is typed by hand.
"""

import sys
from pathlib import Path

from compress import Result, RunRecord, UserError, read_results

README = Path(__file__).parent.parent / "README.md"
HEADER = (
    "Variant", "Runtime", "Disk, MB", "Perplexity", "Δ NLL, nats [95 %]", "KL, nats", "Top-1, %",
    "Prefill, tokens/s", "Decode, tokens/s", "Peak RSS, MB",
)  # fmt: skip


def block(record: RunRecord, results: list[Result]) -> str:
    """The Markdown between the markers: where it was measured, the table, the references."""
    machine, versions, protocol = record.machine, record.versions, results[0].protocol
    where = (
        f"Recipe `{record.recipe_name}` on {machine.get('cpu', 'an unknown processor')}, "
        f"{protocol.get('threads')} threads, {_number(machine.get('memory_bytes'), 1e9, '.0f')} GB; "
        f"Python {versions.get('python')}, torch {versions.get('torch')}, "
        f"ONNX Runtime {versions.get('onnxruntime')}. "
        f"{protocol.get('windows')} windows of {protocol.get('window')} tokens."
    )
    lines = [where, "", row(HEADER), row([":--", ":--"] + ["--:"] * (len(HEADER) - 2))]
    lines += [row(cells(result)) for result in results]
    lines += [row(_reference(r.label, r.perplexity)) for r in record.references]
    return "\n".join(lines)


def insert(readme: str, text: str, name: str = "results") -> str:
    """The README with `text` between the markers of that name.

    Raises:
        UserError: a marker is missing.
    """
    first, last = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, begin, rest = readme.partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise UserError(f"{README.name}: needs the lines {first} and {last}")
    return f"{before}{first}\n{text}\n{last}{after}"


def main(folder: Path) -> None:
    """Rewrite README.md from a run."""
    results = read_results(folder / "results.jsonl")
    if not results:
        raise UserError(f"{folder}: has no results.jsonl; run a recipe first")
    text = block(RunRecord.read(folder / "run.json"), results)
    README.write_text(insert(README.read_text(encoding="utf-8"), text), encoding="utf-8")


def cells(result: Result) -> list[str]:
    return [
        result.variant,
        {"torch": "PyTorch", "onnxruntime": "ONNX Runtime"}.get(result.runtime, result.runtime),
        _number(result.disk_bytes, 1e6, ".2f"),
        _number(result.perplexity, 1, ".3f"),
        _difference(result),
        _number(result.kl_to_base, 1, "z.4f"),
        _number(result.top1_agreement, 0.01, ".1f"),
        _number(result.prefill_tokens_per_second, 1, ",.0f"),
        _number(result.decode_tokens_per_second, 1, ",.0f"),
        _number(result.peak_rss_bytes, 1e6, ",.0f"),
    ]


def _reference(name: str, perplexity: float) -> list[str]:
    return [f"*{name}*", "*reference*", "–", f"{perplexity:.3f}", *["–"] * 6]


def _difference(result: Result) -> str:
    if result.delta_nll is None:
        return "–"
    if result.delta_nll_ci95 is None:
        return f"{result.delta_nll:+z.4f}"
    low, high = result.delta_nll_ci95
    return f"{result.delta_nll:+z.4f} [{low:+z.4f}, {high:+z.4f}]"


def _number(value: float | None, unit: float, form: str) -> str:
    return "–" if value is None else format(value / unit, form)


def row(cells: list[str] | tuple[str, ...]) -> str:
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/readme_table.py RUN_FOLDER")
    try:
        main(Path(sys.argv[1]))
    except UserError as error:
        sys.exit(f"error: {error}")
