"""What it costs that files are verified, and that a loaded model is not the file any more.

    python benchmarks/loading.py

Writes a Llama of 55 million random float32 weights (219 MB) as an artifact, and loads it in fresh processes,
the ways in turn: `mapped`, as stock `transformers` does (weights are pages of the file); `copied`, as this
package does with `verify=False`; `verified`, as it does by default. Every weight is read before the clock
stops. The files are in the page cache: what is measured is the processor's part, not the disk's. A line per
way, with the median of the rounds, goes to `results/loading.jsonl`. Memory is the peak above what the process
had before.
"""

import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compress import load, machine, peak_rss_bytes

HERE = Path(__file__).parent
WAYS = ("mapped", "copied", "verified")


def main(rounds: int = 5, way: Annotated[str | None, typer.Option(hidden=True)] = None) -> None:
    """Measure every way; with --way, be the process that is measured (in a folder that holds `model`)."""
    if way is not None:
        print(json.dumps(measured(way)))
        return
    with tempfile.TemporaryDirectory() as work:
        file = write_model(Path(work) / "model")
        rate = file.stat().st_size / min(seconds_to_hash(file) for _ in range(rounds))
        found: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for _ in range(rounds):
            for name in WAYS:
                command = [sys.executable, str(Path(__file__).resolve()), "--way", name]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=work)
                output = done.stdout
                found[name].append(json.loads(output.splitlines()[-1]))
        for name, lines in found.items():
            line: dict[str, Any] = {
                "way": name,
                "file_bytes": file.stat().st_size,
                **{key: statistics.median(own[key] for own in lines) for key in lines[0]},
                "sha256_bytes_per_second": rate,
                "rounds": rounds,
                "machine": machine(),
            }
            with (HERE / "results" / "loading.jsonl").open("a") as results:
                results.write(json.dumps(line) + "\n")
            print(f"{name}: {line['seconds']:.2f} s, {line['peak_bytes'] / 1e6:.0f} MB")
        print(f"SHA-256: {rate / 1e9:.2f} GB/s")


def write_model(folder: Path) -> Path:
    """Random weights as an artifact; the file that holds them."""
    config = LlamaConfig(
        vocab_size=8000, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12
    )
    torch.manual_seed(0)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(8000)}, unk_token="w0"))
    plain = folder.with_name("plain")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(plain)
    LlamaForCausalLM(config).save_pretrained(plain)
    load(plain).save(folder)
    return folder / "model.safetensors"


def seconds_to_hash(file: Path) -> float:
    """On one core."""
    started = time.perf_counter()
    with file.open("rb") as stream:
        hashlib.file_digest(stream, "sha256")
    return time.perf_counter() - started


def measured(way: str) -> dict[str, float]:
    """Seconds and memory of loading `model` and reading all weights."""
    tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_attention_heads=1)
    LlamaForCausalLM(tiny)  # imports what every way needs
    before = peak_rss_bytes() or 0
    started = time.perf_counter()
    if way == "mapped":
        model = AutoModelForCausalLM.from_pretrained("model", dtype=torch.float32)
    else:
        model = load("model", verify=way == "verified").model
    sum(float(parameter.detach().sum()) for parameter in model.parameters())
    return {"seconds": time.perf_counter() - started, "peak_bytes": float((peak_rss_bytes() or 0) - before)}


if __name__ == "__main__":
    typer.run(main)
