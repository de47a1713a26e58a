"""Table and picture of `results/latency.jsonl`: every tool's speed, and what the machine allows.

python benchmarks/latency_picture.py benchmarks/results/latency.jsonl
"""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from results_files import Groups, Line, put_labels, save, tell

NAMES = {
    "ours_torch": "compress, PyTorch",
    "ours_onnxruntime": "compress, ONNX Runtime",
    "llama_cpp": "llama.cpp",
    "openvino_genai": "OpenVINO GenAI",
    "onnxruntime_genai": "onnxruntime-genai",
}
HEADER = (
    "| Tool | Weights | File, MB | Load, s | First token, s | Prefill, tokens/s | of ceiling "
    "| Decode, tokens/s | of ceiling | p95, ms | RSS, MB |",
    "|:--|:--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
)
DRAWN = (1, 512)  # batch and prompt of the picture


def cases(groups: Groups) -> dict[tuple[int, int, int], list[Line]]:
    """(threads, batch, prompt) -> lines, the cases in order."""
    found: dict[tuple[int, int, int], list[Line]] = defaultdict(list)
    for line in (line for group in groups for line in group):
        found[_case(line)].append(line)
    return dict(sorted(found.items()))


def _case(line: Line) -> tuple[int, int, int]:
    return line["threads"], line["batch"], line["prompt"]


def table(groups: Groups) -> str:
    """Markdown: all cases side by side, then a table per case, fastest decoding first."""
    parts = [overview(groups, what) for what in ("decode", "prefill")]
    for (threads, batch, prompt), lines in cases(groups).items():
        first = lines[0]
        rows = [
            f"Batch {batch}, prompts of {prompt}, {threads} threads, {first['machine']['cpu']}. Memory reads "
            f"{first['read_bytes_per_second'] / 1e9:.1f} GB/s; matrix products "
            f"{first['float32_operations_per_second'] / 1e9:.0f} GFLOP/s in float32, "
            f"{first['int8_operations_per_second'] / 1e9:.0f} G operations/s in int8.",
            "",
            *HEADER,
        ]
        for line in sorted(lines, key=lambda line: -line["decode_tokens_per_second"]):
            prefill, decode = line["prefill_tokens_per_second"], line["decode_tokens_per_second"]
            p95 = line["decode_seconds_p95"]
            rows.append(
                f"| {NAMES[line['tool']]} | {line['weights']} | {line['file_bytes'] / 1e6:.1f} "
                f"| {line['load_seconds']:.2f} | {line['first_token_seconds']:.2f} "
                f"| {prefill:.0f} | {prefill / line['arithmetic_ceiling']:.0%} "
                f"| {decode:.1f} | {decode / line['bandwidth_ceiling']:.0%} "
                f"| {'' if p95 is None else f'{1000 * p95:.1f}'} | {line['peak_rss_bytes'] / 1e6:.0f} |"
            )
        parts.append("\n".join(rows))
    return "\n\n".join(parts)


def overview(groups: Groups, what: str) -> str:
    """Tokens/s of `what`, a row per tool and weights and a column per case, the fastest of each in bold."""
    columns = cases(groups)
    best = {case: max(_rate(line, what) for line in lines) for case, lines in columns.items()}
    heads = [f"{batch}x{prompt}" for _, batch, prompt in columns]
    rows = [
        f"{what.capitalize()}, tokens/s, by batch and prompt.",
        "",
        "| Tool | Weights | " + " | ".join(heads) + " |",
        "|:--|:--|" + "--:|" * len(heads),
    ]
    for group in groups:
        own = {_case(line): _rate(line, what) for line in group}
        cells = [_cell(own.get(case), best[case]) for case in columns]
        rows.append(f"| {NAMES[group[0]['tool']]} | {group[0]['weights']} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _rate(line: Line, what: str) -> float:
    return float(line[f"{what}_tokens_per_second"])


def _cell(rate: float | None, best: float) -> str:
    if rate is None:
        return "–"
    text = f"{rate:.0f}" if rate >= 10 else f"{rate:.1f}"
    return f"**{text}**" if rate == best else text


def draw(groups: Groups, model: str, file: Path) -> None:
    """Decoding against file size under the memory's ceiling; prefill under the products'."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "compress", "font.size": 9})
    drawn = [lines for (_, *case), lines in cases(groups).items() if tuple(case) == DRAWN]
    lines = drawn[0] if drawn else next(iter(cases(groups).values()))
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 5))
    marks = _decoding(left, lines)
    _prefill(right, lines)
    batch, prompt = lines[0]["batch"], lines[0]["prompt"]
    figure.suptitle(f"{model}: batch {batch}, prompt {prompt}, {lines[0]['threads']} threads")
    put_labels(left, marks)
    save(figure, file)


def _decoding(axis: Any, lines: list[Line]) -> list[tuple[float, float, str]]:
    """The marks, which want labels."""
    marks: list[tuple[float, float, str]] = []
    for number, (tool, name) in enumerate(NAMES.items()):
        own = [line for line in lines if line["tool"] == tool]
        x = [line["file_bytes"] / 1e6 for line in own]
        y = [line["decode_tokens_per_second"] for line in own]
        axis.scatter(x, y, color=f"C{number}", label=name)
        marks += [(a, b, line["weights"]) for line, a, b in zip(own, x, y, strict=True)]
    sizes = sorted(line["file_bytes"] for line in lines)
    span = [sizes[0] * (sizes[-1] / sizes[0]) ** (i / 50) for i in range(51)]
    speed = lines[0]["batch"] * lines[0]["read_bytes_per_second"]
    axis.plot([s / 1e6 for s in span], [speed / s for s in span], "k--", label="memory bandwidth")
    axis.set(xlabel="weights, MB", ylabel="decode, tokens/s", xscale="log", yscale="log")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    return marks


def _prefill(axis: Any, lines: list[Line]) -> None:
    ordered = sorted(lines, key=lambda line: line["prefill_tokens_per_second"])
    colours = {tool: f"C{number}" for number, tool in enumerate(NAMES)}
    axis.barh(
        [f"{NAMES[line['tool']]}: {line['weights']}" for line in ordered],
        [line["prefill_tokens_per_second"] for line in ordered],
        color=[colours[line["tool"]] for line in ordered],
    )
    first = lines[0]
    products = max(first["float32_operations_per_second"], first["int8_operations_per_second"])
    for name, style in (("float32", ":"), ("int8", "--")):
        rate = first["arithmetic_ceiling"] * first[f"{name}_operations_per_second"] / products
        axis.axvline(rate, color="black", linestyle=style, label=f"{name} products alone")
    axis.set(xlabel="prefill, tokens/s")
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(fontsize=7, loc="lower right")


if __name__ == "__main__":
    tell(Path(sys.argv[1]), table, draw)
