"""Quality at a size: compress against GPTQModel, AutoRound, HQQ, bitsandbytes, llama.cpp; one scorer for all.

    python benchmarks/quantization.py MODEL.gguf --text TEXT... [--environments FOLDER] [--only PATTERN]
    python benchmarks/quantization.py runs/demo/base --text stdlib --window 256

What is compared and how is told in `bench.py`: the weights that the written codes stand for are scored in
torch against the original's logits. A line goes to `results/quantization.jsonl` for every point; table and
picture are drawn from that file alone. Nothing else should run on the machine: seconds are part of the
result. With a Hugging Face directory in place of the GGUF, llama.cpp is left out.

`results/quantization-avx2.jsonl` and `-vnni.jsonl` hold two lines each of one run, for the ratio of their
seconds: on a processor without AVX512, and on one with bfloat16.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from bench import HERE, Bench
from quantization_picture import draw, table
from quantization_points import POINTS, Point
from results_files import tell


def main(
    model: Annotated[str, typer.Argument(help="GGUF file or Hugging Face directory")],
    text: Annotated[list[str], typer.Option(help="files to calibrate and to score on, or stdlib")],
    window: Annotated[int, typer.Option(help="tokens; as long as the model was trained on")] = 1024,
    environments: Annotated[Path, typer.Option(help="holds TOOL/venv of every peer")] = Path("environments"),
    work: Annotated[Path, typer.Option(help="for what is written on the way")] = Path("runs/quantization"),
    results: Annotated[Path, typer.Option()] = HERE / "results" / "quantization.jsonl",
    only: Annotated[str, typer.Option(help="wildcard over 'tool: setting'")] = "*",
    seeds: Annotated[int, typer.Option(help="at most so many, of the calibration windows")] = 3,
    keep: Annotated[bool, typer.Option(help="keep the artifacts")] = False,
    timed: Annotated[bool, typer.Option(help="--no-timed where other work runs: seconds are null")] = True,
) -> None:
    """Run the missing points, then draw."""
    bench = Bench(model, text, window, environments, work.resolve(), results, timed)
    for point, seed in missing(bench, only, seeds):
        facts, found, out = bench.measure(point, seed)
        line = {
            "bits": point.bits,
            "group": point.group,
            "file_bytes": facts["file_bytes"],
            "linear_bytes": found["linear_bytes"] or facts["linear_bytes"],
            **{name: found[name] for name in ("delta_nll", "kl", "kl_ci95", "top1_agreement")},
            "seconds": facts["seconds"],
            "peak_rss_bytes": facts["peak_rss_bytes"],
            "perplexity": found["perplexity"],
        }
        line |= {name: facts[name] for name in ("folder_bytes", "notes") if name in facts}
        bench.add(point, seed, line)
        if not keep:
            shutil.rmtree(out)
    tell(results, table, draw)


def missing(bench: Bench, only: str, seeds: int) -> Iterator[tuple[Point, int]]:
    """Without llama.cpp where there is no file for it."""
    for point, seed in bench.missing(POINTS, only, seeds):
        base, _ = bench.prepared(seed)
        if point.tool != "llama_cpp" or (base.parent / "base.gguf").exists():
            yield point, seed


if __name__ == "__main__":
    typer.run(main)
