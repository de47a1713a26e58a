"""Table and picture of `results/quantization.jsonl`: KL to the original against bytes, every tool's.

python benchmarks/quantization_picture.py benchmarks/results/quantization.jsonl
"""

import statistics
import sys
from pathlib import Path

from quantization_points import POINTS
from results_files import Line, put_labels, save, tell, two_panels

VARIATIONS = {(point.tool, point.setting) for point in POINTS if point.variation}
NAMES = {
    "ours": "compress",
    "gptqmodel": "GPTQModel",
    "auto_round": "AutoRound",
    "hqq": "HQQ",
    "bitsandbytes": "bitsandbytes",
    "llama_cpp": "llama.cpp",
}
HEADER = (
    "| Tool | Setting | File, MB | Linear layers, MB | Δ NLL | KL [95 %] | Top-1 | Time, s | RSS, GB | n |",
    "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|",
)


def is_variation(line: Line) -> bool:
    """Whether it is there to show what a default of ours is worth."""
    return (line["tool"], line["setting"]) in VARIATIONS


def is_coded(line: Line) -> bool:
    """Whether its codes take fewer bytes in the file than in memory."""
    return "coded" in line["setting"]


def mean(lines: list[Line], field: str) -> float:
    """Over seeds."""
    return statistics.fmean(line[field] for line in lines)


def table(groups: list[list[Line]]) -> str:
    """Markdown, smallest KL first; the interval is the first seed's, over windows of text."""
    rows = list(HEADER)
    for lines in sorted(groups, key=lambda lines: mean(lines, "kl")):
        first = lines[0]
        low, high = first["kl_ci95"]
        timed = [line for line in lines if line["seconds"] is not None]
        seconds = f"{mean(timed, 'seconds'):.0f}" if timed else ""
        rows.append(
            f"| {NAMES[first['tool']]} | {first['setting']} | {mean(lines, 'file_bytes') / 1e6:.1f} "
            f"| {mean(lines, 'linear_bytes') / 1e6:.1f} | {mean(lines, 'delta_nll'):+z.4f} "
            f"| {mean(lines, 'kl'):.4f} [{low:.4f}, {high:.4f}] | {mean(lines, 'top1_agreement'):.3f} "
            f"| {seconds} | {mean(lines, 'peak_rss_bytes') / 1e9:.2f} | {len(lines)} |"
        )
    if any(is_coded(lines[0]) for lines in groups):
        rows += ["", "coded: the bytes are those of the file; in memory such codes take a byte a weight."]
    return "\n".join(rows)


def draw(groups: list[list[Line]], model: str, file: Path) -> None:
    """One mark per tool and setting, one colour per tool, open marks for coded; bars reach over the seeds."""
    figure, axes = two_panels()
    bytes_of = {"linear_bytes": "linear layers, MB", "file_bytes": "whole file, MB"}
    marks: dict[str, list[tuple[float, float, str]]] = {field: [] for field in bytes_of}
    for axis, (field, label) in zip(axes, bytes_of.items(), strict=True):
        series = [(f"C{number}", *names, False) for number, names in enumerate(NAMES.items())]
        for color, tool, name, coded in [*series, ("C0", "ours", "compress, coded in the file", True)]:
            own = [
                lines
                for lines in groups
                if lines[0]["tool"] == tool and not is_variation(lines[0]) and is_coded(lines[0]) == coded
            ]
            if not own:
                continue
            x = [mean(lines, field) / 1e6 for lines in own]
            y = [mean(lines, "kl") for lines in own]
            reach = [[max(line["kl"] for line in lines), min(line["kl"] for line in lines)] for lines in own]
            bars = [[a - r[1] for a, r in zip(y, reach, strict=True)],
                    [r[0] - a for a, r in zip(y, reach, strict=True)]]  # fmt: skip
            mark = "D" if tool == "ours" else "o"
            fill = "none" if coded else "full"
            axis.errorbar(
                x, y, yerr=bars, fmt=mark, color=color, label=name, capsize=3, markersize=6, fillstyle=fill
            )
            marks[field] += [(a, b, lines[0]["setting"]) for lines, a, b in zip(own, x, y, strict=True)]
        axis.set(xlabel=label, ylabel="KL to the original, nats per token", yscale="log")
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(loc="upper right")
    figure.suptitle(f"{model}: what a quantizer loses at a size (lower left is better)")
    for axis, field in zip(axes, bytes_of, strict=True):
        put_labels(axis, marks[field])
    save(figure, file)


if __name__ == "__main__":
    tell(Path(sys.argv[1]), table, draw)
