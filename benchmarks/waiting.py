"""What ONNX Runtime's threads should do while they wait for each other, beside other programs.

    python benchmarks/waiting.py FOLDER [--busy 1] [--threads 2]

A graph of `export_onnx` is opened anew for every turn: its threads spin (ONNX Runtime's default), stop
spinning when a run ends, or sleep. The three take turns, with so many busy loops beside them; prints the
median and the mean milliseconds of a prompt of 128 tokens and of a decoded token.
"""

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer

from compress import open_runtime

LOOP = "while True: pass"
ROUNDS, DECODES, PROMPT = 10, 20, 128
WAYS: tuple[Literal["spin", "stop", "sleep"], ...] = ("spin", "stop", "sleep")


def main(
    folder: Annotated[Path, typer.Argument(help="holds model.onnx")],
    busy: Annotated[int, typer.Option(help="busy loops beside")] = 1,
    threads: Annotated[int, typer.Option()] = 2,
) -> None:
    """Time the three in turn."""
    prompt = np.random.default_rng(0).integers(5, 200, (1, PROMPT)).astype(np.int32)
    read: dict[str, list[float]] = {way: [] for way in WAYS}
    wrote: dict[str, list[float]] = {way: [] for way in WAYS}
    with ExitStack() as stack:
        for _ in range(busy):
            other = stack.enter_context(subprocess.Popen([sys.executable, "-c", LOOP]))
            stack.callback(other.kill)
        for _ in range(ROUNDS):
            for way in WAYS:
                runtime = open_runtime(folder, "onnxruntime", threads, waiting=way)
                state = runtime.prefill(prompt)
                start = time.perf_counter()
                state = runtime.prefill(prompt)
                read[way].append(time.perf_counter() - start)
                for token in prompt[0, :DECODES] if runtime.task.writes else ():
                    start = time.perf_counter()
                    state = runtime.decode(state, np.array([token], dtype=np.int32))
                    wrote[way].append(time.perf_counter() - start)
    print(f"{busy} busy loops, {threads} threads; ms: median (mean)")
    for way in WAYS:
        told = [
            f"{what} {1e3 * np.median(times):.2f} ({1e3 * np.mean(times):.2f})"
            for what, times in ((f"prompt of {PROMPT}", read[way]), ("token", wrote[way]))
            if times
        ]
        print(f"{way:>6}: {', '.join(told)}")


if __name__ == "__main__":
    typer.run(main)
