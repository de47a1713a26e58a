"""Whether the share of time that a latency target reports is what stock transformers takes.

    python benchmarks/latency_target.py MODEL --text TEXT... --latency SHARE...

The model is pruned to each share of its seconds per token, with no bound on the loss: only the time is asked
here. Base and result are saved, loaded by `AutoModelForCausalLM` in this process, and `generate` goes on with
a prompt of 512, in turns, the first to go changing; a token takes what `TOKENS` of them add to a single one.
Prints for each share what was wanted, what the pass reports, what stock took with the quartiles of its
rounds, and how far the two are apart. Nothing else should run on the machine.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForCausalLM

import compress

PROMPT, TOKENS, ROUNDS = 512, 48, 12


def main(
    model: Annotated[str, typer.Argument(help="directory, GGUF file or hub id")],
    text: Annotated[list[str], typer.Option(help="files, folders, or stdlib")],
    latency: Annotated[list[float], typer.Option(help="shares of the seconds per token")],
) -> None:
    """Prune to each share, and time."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        base = compress.load(model)
        base.save(place / "base")
        data = compress.DataConfig(text=text, window=512, calibration_windows=16, evaluation_windows=2)
        for share in latency:
            step = compress.PruneStructured(target={"latency": share, "largest_loss": 100.0})
            pruned = base.apply(step, text=data)
            pruned.save(place / str(share))
            found = pruned.lineage.steps[-1].notes["target"]
            mine, its = stock(place / str(share), place / "base")
            low, middle, high = statistics.quantiles([a / b for a, b in zip(mine, its, strict=True)], n=4)
            apart = found["reached"] / middle - 1
            told = f"wanted {share:.2f}  reported {found['reached']:.3f}  "
            print(f"{told}stock {middle:.3f} [{low:.3f}, {high:.3f}]  apart {apart:+.1%}", flush=True)


def stock(pruned: Path, base: Path) -> tuple[list[float], list[float]]:
    """Seconds per token in every round, of both."""
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (pruned, base)]
    rounds: tuple[list[float], list[float]] = ([], [])
    for number in range(ROUNDS + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            seconds = per_token(models[which])
            if number:
                rounds[which].append(seconds)
    return rounds


def per_token(model: Any) -> float:
    """What a token more takes."""
    prompt = torch.arange(PROMPT)[None] % 1000 + 1
    taken = []
    for tokens in (1, TOKENS + 1):
        started = time.perf_counter()
        model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
        taken.append(time.perf_counter() - started)
    return (taken[1] - taken[0]) / TOKENS


if __name__ == "__main__":
    typer.run(main)
