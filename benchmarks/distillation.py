"""Students of half the size: taught by compress in several ways, trained alone, or fine-tuned; same tokens.

    python benchmarks/distillation.py runs/demo/base --text stdlib --window 256
    python benchmarks/distillation.py MODEL.gguf --text TEXT...

What is compared and how is told in `bench.py` and `pruning.py`. A line for every point goes to
`results/distillation.jsonl`, with the held-out loss on the way in its notes. Printed last: what share of
the gap between the student trained alone and its teacher each setting closes, and after how many tokens it
has the lone student's loss.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from bench import HERE, Bench
from distillation_points import POINTS
from pruning import run
from pruning_picture import draw, table
from results_files import Line, tell


def main(
    model: Annotated[str, typer.Argument(help="the teacher: GGUF file or Hugging Face directory")],
    text: Annotated[list[str], typer.Option(help="files to learn from and to score on, or stdlib")],
    window: Annotated[int, typer.Option(help="tokens; as long as the model was trained on")] = 1024,
    work: Annotated[Path, typer.Option(help="for what is written on the way")] = Path("runs/quantization"),
    results: Annotated[Path, typer.Option()] = HERE / "results" / "distillation.jsonl",
    only: Annotated[str, typer.Option(help="wildcard over 'tool: setting'")] = "*",
    seeds: Annotated[int, typer.Option(help="at most so many")] = 1,
    timed: Annotated[bool, typer.Option(help="--no-timed where other work runs: seconds are null")] = True,
    keep: Annotated[bool, typer.Option(help="leave the artifacts in --work")] = False,
) -> None:
    """Run the missing points, then draw."""
    bench = Bench(model, text, window, Path("environments"), work.resolve(), results, timed)
    run(bench, POINTS, only, seeds, keep)
    tell(results, table, draw)
    lines = map(json.loads, results.read_text().splitlines()) if results.is_file() else []
    print(gaps([line for line in lines if line["model"] == bench.name]))


def gaps(lines: list[Line]) -> str:
    """Markdown: the share of the lone student's gap that is closed, and the tokens to its held-out loss."""
    alone = [line for line in lines if line["tool"] == "alone"]
    if not alone:
        return ""
    gap, goal = alone[0]["delta_nll"], curve(alone[0])[-1][1]
    rows = ["| Setting | Δ NLL | Gap closed | Tokens to the lone student's loss |", "|:--|--:|--:|--:|"]
    for line in lines:
        there = [tokens for tokens, loss in curve(line) if loss <= goal]
        share = there[0] / line["tokens"] if there else None
        rows.append(
            f"| {line['tool']}: {line['setting']} | {line['delta_nll']:+z.4f} "
            f"| {100 * (1 - line['delta_nll'] / gap):.0f} % | {f'{share:.2f} x' if share else 'never'} |"
        )
    return "\n".join(rows)


def curve(line: Line) -> list[tuple[int, float]]:
    """Tokens and the loss on held-out text after them."""
    notes: dict[str, Any] = line["notes"].get("distill") or line["notes"]["train"]
    return [(tokens, heldout) for _, tokens, _, heldout in notes["loss_curve"] if heldout is not None]


if __name__ == "__main__":
    typer.run(main)
