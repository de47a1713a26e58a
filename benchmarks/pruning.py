"""Quality against parameters and speed: compress's pruning and healing against other tools and fine-tuning.

    python benchmarks/pruning.py MODEL.gguf --text TEXT... [--environments FOLDER] [--only PATTERN]
    python benchmarks/pruning.py runs/demo/base --text stdlib --window 256

What is compared and how is told in `bench.py`. Where parameters were taken out, decoding is timed in float32
in ONNX Runtime, in turns with the original, on the threads of this machine; every tool's model goes through
our export. A line goes to `results/pruning.jsonl` for every point; table and pictures are drawn from that
file alone. Nothing else should run on the machine.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer
from bench import HERE, WORKERS, Bench, call
from latency_files import exported
from latency_points import FLOAT
from pruning_picture import draw, table
from pruning_points import POINTS, Point
from results_files import Line, tell

from compress import load, machine, parameter_counts


def main(
    model: Annotated[str, typer.Argument(help="GGUF file or Hugging Face directory")],
    text: Annotated[list[str], typer.Option(help="files to calibrate, heal and score on, or stdlib")],
    window: Annotated[int, typer.Option(help="tokens; as long as the model was trained on")] = 1024,
    environments: Annotated[Path, typer.Option(help="holds TOOL/venv of every peer")] = Path("environments"),
    work: Annotated[Path, typer.Option(help="for what is written on the way")] = Path("runs/quantization"),
    results: Annotated[Path, typer.Option()] = HERE / "results" / "pruning.jsonl",
    only: Annotated[str, typer.Option(help="wildcard over 'tool: setting'")] = "*",
    seeds: Annotated[int, typer.Option(help="at most so many")] = 1,
    timed: Annotated[bool, typer.Option(help="--no-timed where other work runs: seconds are null")] = True,
    keep: Annotated[bool, typer.Option(help="leave the artifacts in --work")] = False,
) -> None:
    """Run the missing points, then draw."""
    bench = Bench(model, text, window, environments, work.resolve(), results, timed)
    run(bench, POINTS, only, seeds, keep)
    tell(results, table, draw)


def run(bench: Bench, points: list[Point], only: str, seeds: int, keep: bool) -> None:
    """Measure what is missing, a line each."""
    for point, seed in bench.missing(points, only, seeds):
        facts, found, out = bench.measure(point, seed)
        whole, nonzero = parameter_counts(load(out / "artifact").model)
        line: Line = {"parameters": whole, "nonzero_parameters": nonzero, "tokens": point.tokens}
        line |= {name: found[name] for name in ("delta_nll", "kl", "kl_ci95", "top1_agreement", "perplexity")}
        line |= {"seconds": facts["seconds"], "peak_rss_bytes": facts["peak_rss_bytes"]}
        line |= {"file_bytes": facts["file_bytes"], "decode_tokens_per_second": None}
        if point.structured and bench.timed:
            line |= decoding(bench, out)
        line |= {name: facts[name] for name in ("notes",) if name in facts}
        bench.add(point, seed, line)
        if keep:
            print(f"  {out / 'artifact'}", flush=True)
        else:
            shutil.rmtree(out)


def decoding(bench: Bench, out: Path) -> Line:
    """Tokens per second of the artifact and, in turns with it, of the original."""
    (deployed := bench.folder / "deployed").mkdir(exist_ok=True)
    graphs = [
        exported(FLOAT, path, folder) / "onnx"
        for path, folder in ((bench.folder / "base", deployed), (out / "artifact", out))
    ]
    command = [sys.executable, WORKERS / "speed.py", *graphs, bench.folder / "evaluation.npy"]
    command.append(machine()["cores"])
    found: Line = json.loads(call(command, out / "speed.txt").splitlines()[-1])
    return found


if __name__ == "__main__":
    typer.run(main)
