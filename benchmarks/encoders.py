"""How fast an encoder in int8 runs beside its float32 graph, both in ONNX Runtime, and what it costs.

    python benchmarks/encoders.py MODEL --text TEXT [--batch 8] [--tokens 128]

MODEL is an encoder's directory or hub id. Its variants are made and scored as `compress-lm run` does. Then
each graph gets a process of its own, once a round, in turns, and reads the text it was scored on; of a round
the median counts. A line per variant goes to `results/encoders.jsonl`: `ratio` is the float32 graph's time
over the variant's, of the medians over rounds, and `ratios` has one for each round. Nothing else should run
on the machine.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from bench import name_of

import compress
from compress import ExportOnnx, adds_products_in_32_bits, machine, versions

RESULTS = Path(__file__).parent / "results" / "encoders.jsonl"
WARM_UP, CALLS = 10, 60


def main(
    model: str,
    text: Annotated[str, typer.Option(help="to calibrate and to score on")] = "stdlib",
    batch: int = 8,
    tokens: int = 128,
    rounds: int = 5,
    threads: Annotated[int | None, typer.Option()] = None,
    work: Annotated[Path, typer.Option(help="for what is written on the way")] = Path("runs/encoders"),
    output: Path = RESULTS,
    timed: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Make, score and time; with --timed, be the process that is timed."""
    count = threads or machine()["cores"]
    if timed is not None:
        print(seconds_per_call(timed, batch, tokens, count))
        return
    found = variants(model, text, tokens, work)
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name in list(found)[:: 1 if number % 2 else -1]:
            command = [sys.executable, __file__, model, "--timed", work / name, "--threads", count]
            command += ["--batch", batch, "--tokens", tokens]
            told = subprocess.run(
                [str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True
            )
            seconds[name].append(float(told.stdout.splitlines()[-1]))
    for name, facts in found.items():
        own, float32 = median(seconds[name]), median(seconds["base"])
        line = {"model": name_of(model), "weights": name, "batch": batch, "tokens": tokens}
        line |= {"threads": count, "seconds": own, "ratio": float32 / own, **facts}
        line["ratios"] = [a / b for a, b in zip(seconds["base"], seconds[name], strict=True)]
        print(f"{name:10s} {1e3 * own:.1f} ms  {float32 / own:.2f} x  {facts}")
        with output.open("a") as file:
            file.write(json.dumps(line | {"machine": machine(), "versions": versions()}) + "\n")


def variants(model: str, text: str, window: int, work: Path) -> dict[str, dict[str, Any]]:
    """Write the float32 graph and those in int8 below `work`; what quality each has in ONNX Runtime."""
    codes = compress.QuantizeGPTQ(format=compress.Int8())
    chains = {"int8": [codes, ExportOnnx()]}
    if adds_products_in_32_bits():
        chains["int8-vnni"] = [codes, ExportOnnx(processor="vnni")]
    recipe = compress.Recipe(
        name="encoders",
        model={"checkpoint": model},
        data={"text": text, "window": window, "evaluation_windows": 64, "calibration_windows": 32},
        base={"passes": [ExportOnnx()]},
        variants={name: {"passes": passes} for name, passes in chains.items()},
    )
    compress.run(recipe, work)
    results = [x for x in compress.read_results(work / "results.jsonl") if x.runtime == "onnxruntime"]
    told = ("disk_bytes", "cosine_distance", "kl_to_base")
    return {x.variant: {name: getattr(x, name) for name in told} for x in results}


def seconds_per_call(folder: Path, batch: int, tokens: int, threads: int) -> float:
    """The median over calls with the first windows of the run's evaluation text."""
    encoder = compress.open_runtime(folder, "onnxruntime", threads)
    ids = np.load(folder.parent / "evaluation.npy")[:batch, :tokens].astype(np.int32)
    taken = []
    for _ in range(WARM_UP + CALLS):
        start = time.perf_counter()
        encoder.logits(ids)
        taken.append(time.perf_counter() - start)
    return median(taken[WARM_UP:])


if __name__ == "__main__":
    typer.run(main)
