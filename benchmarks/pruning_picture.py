"""Tables and pictures of `results/pruning.jsonl` and `results/distillation.jsonl`: loss, size, speed.

python benchmarks/pruning_picture.py benchmarks/results/pruning.jsonl
"""

import statistics
import sys
from pathlib import Path
from typing import Any

from results_files import Line, put_labels, save, tell, two_panels

NAMES = {
    "ours": "compress",
    "llmcompressor": "llm-compressor",
    "torch_pruning": "torch-pruning",
    "fine_tuning": "fine-tuning",
    "alone": "trained alone",
}
_EVEN = 0.5  # nats up to which their axis is linear
_TICKS = (-0.2, -0.1, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
HEADER = (
    "| Tool | Setting | Parameters, M | Not zero, M | Tokens, M | Δ NLL | KL [95 %] | Decode | Time, s "
    "| RSS, GB | n |",
    "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
)


def mean(lines: list[Line], field: str) -> float | None:
    """Over the seeds that have it."""
    values = [line[field] for line in lines if line.get(field) is not None]
    return statistics.fmean(values) if values else None


def faster(lines: list[Line]) -> float | None:
    """Decoding speed as a multiple of the original's, timed in turns with it."""
    own, base = mean(lines, "decode_tokens_per_second"), mean(lines, "base_decode_tokens_per_second")
    return own / base if own and base else None


def millions(lines: list[Line]) -> float | None:
    """Of the parameters that are not zero."""
    nonzero = mean(lines, "nonzero_parameters")
    return None if nonzero is None else nonzero / 1e6


def told(value: float | None, form: str) -> str:
    """A number, or nothing where it was not measured."""
    return "" if value is None else format(value, form)


def table(groups: list[list[Line]]) -> str:
    """Markdown, smallest loss first; the interval is the first seed's, over windows of text."""
    rows = list(HEADER)
    for lines in sorted(groups, key=lambda lines: mean(lines, "delta_nll") or 0.0):
        first, speed = lines[0], faster(lines)
        low, high = first["kl_ci95"]
        rows.append(
            f"| {NAMES[first['tool']]} | {first['setting']} | {first['parameters'] / 1e6:.1f} "
            f"| {first['nonzero_parameters'] / 1e6:.1f} | {first['tokens'] / 1e6:g} "
            f"| {told(mean(lines, 'delta_nll'), '+z.4f')} "
            f"| {told(mean(lines, 'kl'), '.4f')} [{low:.4f}, {high:.4f}] "
            f"| {f'{speed:.2f} x' if speed else ''} | {told(mean(lines, 'seconds'), '.0f')} "
            f"| {(mean(lines, 'peak_rss_bytes') or 0.0) / 1e9:.2f} | {len(lines)} |"
        )
    return "\n".join(rows)


def draw(groups: list[list[Line]], model: str, file: Path) -> None:
    """Loss against parameters that are not zero, and against speed; larger: more tokens."""
    figure, axes = two_panels()
    written: dict[Any, list[tuple[float, float, str]]] = {axis: [] for axis in axes}
    for number, (tool, name) in enumerate(NAMES.items()):
        own = [lines for lines in groups if lines[0]["tool"] == tool]
        for axis, place in zip(axes, (millions, faster), strict=True):
            marks = [(place(lines), mean(lines, "delta_nll"), lines[0]) for lines in own]
            label = name
            for x, y, line in marks:
                if x is None or y is None:
                    continue
                size = 20 + 100 * (line["tokens"] / 250_000)
                axis.scatter(x, y, s=size, color=f"C{number}", label=label, alpha=0.8)
                written[axis].append((x, y, line["setting"]))
                label = "_"
    axes[0].set(xlabel="parameters that are not zero, millions")
    axes[1].set(xlabel="decoding, times as fast as the original (ONNX Runtime, float32)")
    losses = [mean(lines, "delta_nll") or 0.0 for lines in groups]
    for axis in axes:
        axis.set(ylabel="Δ NLL to the original, nats per token")
        # most marks lie close together, and the worst at twenty times as much
        axis.set_yscale("symlog", linthresh=_EVEN, linscale=2)
        axis.set_yticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
        axis.set_ylim(min(losses) - 0.05, max(losses) * 1.3 + 0.05)
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend()
        else:
            axis.set_visible(False)
    figure.suptitle(f"{model}: what removing weights costs (lower is better; larger marks: more tokens)")
    for axis in axes:
        put_labels(axis, written[axis])
    save(figure, file)


if __name__ == "__main__":
    tell(Path(sys.argv[1]), table, draw)
