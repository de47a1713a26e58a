"""The comparison with other quantizers at no more bytes, for docs/results.md (docs_results.py writes it).

Every number comes from `results/quantization.jsonl`; nothing is typed by hand. A row holds one setting of
another tool and those of ours that take no more bytes than it, of the linear layers or of the whole file;
that they do is checked here.
"""

from dataclasses import dataclass

from quantization_picture import NAMES, mean
from results_files import Line

from compress.errors import UserError

MODEL = "SmolLM2-135M-Instruct"
HEADER = (
    "| At no more bytes than | MB | its KL | compress, grids | and tuned | coded |",
    "| :-- | --: | --: | --: | --: | --: |",
)


@dataclass(frozen=True)
class Row:
    """A setting of another tool, the bytes compared, and ours: on plain grids, tuned, entropy-coded."""

    tool: str
    setting: str
    field: str
    grids: str | None = None
    tuned: str | None = None
    coded: str | None = None


LINEAR, FILE = "linear_bytes", "file_bytes"
FOUR = ("4 bits", "auto, 4.35 bits, outputs weighed, tuned", "coded, 4.3 bits")
ROWS = (
    Row("gptqmodel", "4 bits", LINEAR, *FOUR),
    Row("auto_round", "4 bits", LINEAR, *FOUR),
    Row("auto_round", "3 bits", LINEAR, "3 bits", "3 bits, tuned", "auto, coded, 3.33 bits"),
    Row("hqq", "2 bits", LINEAR, "2 bits", "2 bits, tuned", "coded, 2.28 bits"),
    Row("llama_cpp", "Q8_0", FILE, "8 bits group 64, embeddings too"),
    Row("llama_cpp", "Q4_K_M, imatrix", FILE, "auto, 105.5 MB", coded="auto, coded, 91.7 MB"),
    Row("llama_cpp", "Q4_0, imatrix", FILE, "auto, 91.7 MB", coded="auto, coded, 91.7 MB"),
    Row("llama_cpp", "Q2_K, imatrix", FILE, "auto, 91.7 MB", coded="auto, coded, 60 MB"),
)


def block(groups: list[list[Line]]) -> str:
    """The Markdown between the markers.

    Raises:
        UserError: the results lack a setting, or one of ours takes more bytes than what it stands beside.
    """
    found = {(lines[0]["tool"], lines[0]["setting"]): lines for lines in groups}
    rows = list(HEADER)
    for row in ROWS:
        peer = _lines(found, row.tool, row.setting)
        size = mean(peer, row.field)
        cells = [_cell(found, ours, row.field, size) for ours in (row.grids, row.tuned, row.coded)]
        what = "linear layers" if row.field == LINEAR else "file"
        name = f"{NAMES[row.tool]} {row.setting} ({what})"
        rows.append(f"| {name} | {size / 1e6:.1f} | {mean(peer, 'kl'):.4f} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _lines(found: dict[tuple[str, str], list[Line]], tool: str, setting: str) -> list[Line]:
    if (tool, setting) not in found:
        raise UserError(f"{tool}: {setting}: has no line; run benchmarks/quantization.py")
    return found[tool, setting]


def _cell(found: dict[tuple[str, str], list[Line]], setting: str | None, field: str, size: float) -> str:
    """The KL of a setting of ours, over the seeds."""
    if setting is None:
        return "–"
    lines = _lines(found, "ours", setting)
    if mean(lines, field) > size:
        raise UserError(f"ours: {setting}: takes {mean(lines, field):.0f} bytes, more than {size:.0f}")
    return f"{mean(lines, 'kl'):.4f}"
