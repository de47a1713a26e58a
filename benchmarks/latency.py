"""How fast deployed models run: compress against llama.cpp, OpenVINO GenAI and plain onnxruntime-genai.

    python benchmarks/latency.py MODEL.gguf --text TEXT... [--environments FOLDER] [--only PATTERN]

Every tool writes its files from the same float32 model (`latency_files.py`). Then case by case (a batch and a
length of prompt) each gets a fresh process, all of them alive together, with the same threads, and they take
turns: prompts read, then tokens appended one by one to each row. Where the caches of all would not fit in
memory, each has a process for its turn only. Peak memory is that of the process in that case;
`first_token_seconds` is loading and reading a prompt of 32, with the files in the system's cache and the
imports done. What the machine could do at most is measured before each round, and the best of all counts
(`ceilings.py`).
Appends a line per point to `results/latency.jsonl`; a case that the results hold for this model and threads
is not run again, since lines of two runs must not be compared. Nothing else should run on the machine.
"""

import fnmatch
import json
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from bench import HERE, OWN, WORKERS, Bench
from latency_files import file_bytes, files_of
from latency_picture import draw, table
from latency_points import CASES, POINTS, Case, Point
from results_files import Line, tell
from safetensors import safe_open

from compress import Samples, WorkerProcess, machine

DECODES, WARM_UP = 20, 4  # 1000 tokens and these make a context of 1024
FIRST = 32  # tokens of the prompt that is timed from loading
LARGE = 4096  # tokens of a case beyond which two rounds must do, without rehearsal, and one process at a time


def main(
    model: Annotated[str, typer.Argument(help="GGUF file or Hugging Face directory")],
    text: Annotated[list[str], typer.Option(help="files to take prompts from, or stdlib")],
    window: Annotated[int, typer.Option(help="tokens; as the other benchmarks have it")] = 1024,
    environments: Annotated[Path, typer.Option(help="holds TOOL/venv of every peer")] = Path("environments"),
    work: Annotated[Path, typer.Option(help="for what is written on the way")] = Path("runs/latency"),
    results: Annotated[Path, typer.Option()] = HERE / "results" / "latency.jsonl",
    only: Annotated[str, typer.Option(help="wildcard over 'tool: weights'")] = "*",
    cases: Annotated[str, typer.Option(help="wildcard over BATCHxPROMPT")] = "*",
    threads: Annotated[int | None, typer.Option()] = None,
    rounds: int = 3,
) -> None:
    """Run the missing cases, then draw."""
    bench = Bench(model, text, window, environments, work.resolve(), results)
    count = threads or machine()["cores"]
    points = [point for point in POINTS if fnmatch.fnmatch(point.label, only)]
    if not model.endswith(".gguf"):
        points = [point for point in points if point.tool != "llama_cpp"]
    wanted = [case for case in CASES if fnmatch.fnmatch(f"{case.batch}x{case.prompt}", cases)]
    if not points or not wanted:
        raise typer.BadParameter(f"nothing is called so: --only '{only}' --cases '{cases}'")
    files = {point: files_of(point, bench) for point in points}
    lines = results.read_text().splitlines() if results.is_file() else []
    done = {(x["model"], x["threads"], x["batch"], x["prompt"]) for x in map(json.loads, lines)}
    for case in wanted:
        if (bench.name, count, case.batch, case.prompt) not in done:
            print(f"batch {case.batch}, prompt {case.prompt}", flush=True)
            run(bench, files, case, count, rounds)
    tell(results, table, draw)


def run(bench: Bench, files: dict[Point, Path], case: Case, threads: int, rounds: int) -> None:
    """One case: every point's process, the rounds, the lines."""
    base, _ = bench.prepared(0)
    most: dict[str, float] = {}
    text = np.load(bench.folder / "train.npy").astype(np.int32)
    folder = bench.folder / "deployed"
    timings = {point: Samples() for point in files}
    facts: dict[Point, dict[str, Any]] = {}
    size = case.batch * case.prompt
    large = size > LARGE
    with ExitStack() as stack:
        held = {} if large else {p: stack.enter_context(start(p, bench, threads)) for p in files}
        for worker in held.values():
            worker.ask("ready")
        for number in range(min(rounds, 2) if large else rounds):
            now = ceilings(threads)
            most = {name: max(rate, most.get(name, 0.0)) for name, rate in now.items()}
            turn = number % len(files)
            for point in [*files][turn:] + [*files][:turn]:  # each is first once
                with start(point, bench, threads) if large else nullcontext(held[point]) as worker:
                    if large or point not in facts:  # the worker has loaded nothing yet
                        facts.setdefault(point, first_token(worker, files[point], text, folder))
                    prompt, following = prompts(text, case, number, folder)
                    told = worker.ask(
                        "time_round",
                        prompt=prompt,
                        following=following,
                        repetitions=2 if size <= FIRST * 16 else 1,
                        warm_up=WARM_UP,
                        rehearse=not large,
                    )
                timings[point].extend(Samples(told["prefill"], told["decode"]))
                facts[point]["peak_rss_bytes"] = told["peak_rss_bytes"]
    products = max(most["float32"], most["int8"])
    most["arithmetic"] = products / (2 * block_parameters(base))  # tokens a second of a prompt
    for point, samples in timings.items():
        add(bench, point, line(point, files[point], case, threads, samples, facts[point], most))


def start(point: Point, bench: Bench, threads: int) -> WorkerProcess:
    """The process that runs one point."""
    other: dict[str, Any] = {}
    if point.tool not in OWN:
        other["command"] = bench.python(point.tool), str(WORKERS / f"{point.tool}_latency_worker.py")
    log = bench.folder / "deployed" / f"{point.label}.worker.log".replace(" ", "_")
    return WorkerProcess(
        point.runtime or point.tool, threads, what=point.label, log=log, patience=3600, **other
    )


def first_token(worker: WorkerProcess, files: Path, text: Any, folder: Path) -> dict[str, Any]:
    """Load, and read a short prompt."""
    for file in [files] if files.is_file() else files.iterdir():
        if file.is_file():
            file.read_bytes()  # into the system's cache
    prompt, following = prompts(text, Case(1, FIRST), 0, folder, decodes=0)
    worker.ask("ready")
    began = time.perf_counter()
    loaded = worker.ask("load", path=str(files))
    worker.ask("time_round", prompt=prompt, following=following, repetitions=0, warm_up=0)
    return {
        "load_seconds": loaded["load_seconds"],
        "first_token_seconds": time.perf_counter() - began,
    }


def prompts(text: Any, case: Case, number: int, folder: Path, decodes: int = DECODES) -> tuple[str, str]:
    """Files of the tokens of a round, (batch, prompt) and (batch, decodes)."""
    length = case.prompt + decodes
    begin = number * case.batch * length % (len(text) - case.batch * length)
    rows = text[begin : begin + case.batch * length].reshape(case.batch, length)
    prompt, following = folder / "prompt.npy", folder / "following.npy"
    np.save(prompt, rows[:, : case.prompt])
    np.save(following, rows[:, case.prompt :])
    return str(prompt), str(following)


def ceilings(threads: int) -> dict[str, float]:
    """What the machine could do at this moment."""
    told = subprocess.run(
        [sys.executable, HERE / "ceilings.py", str(threads)], check=True, capture_output=True, text=True
    )
    found: dict[str, float] = json.loads(told.stdout)
    return found


def block_parameters(base: Path) -> int:
    """Numbers in the matrices that every token of a prompt is multiplied with."""
    total = 0
    for file in base.glob("*.safetensors"):
        with safe_open(file, "pt") as handle:
            # blocks are numbered, whatever a family calls them
            inside = [n for n in handle.keys() if any(part.isdigit() for part in n.split("."))]  # noqa: SIM118
            shapes = (handle.get_slice(n).get_shape() for n in inside)
            total += sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    return total


def line(
    point: Point, files: Path, case: Case, threads: int, samples: Samples, facts: Line, most: dict[str, float]
) -> Line:
    """What the results say of one point."""
    told = samples.summary(case.prompt, case.batch)
    size = file_bytes(files)
    fields = (
        "prefill_tokens_per_second", "decode_tokens_per_second", "decode_seconds_p50", "decode_seconds_p95",
    )  # fmt: skip
    return {
        "weights": point.weights,
        "threads": threads,
        "batch": case.batch,
        "prompt": case.prompt,
        "file_bytes": size,
        **{name: facts[name] for name in ("load_seconds", "first_token_seconds")},
        **{name: told[name] for name in fields},
        "peak_rss_bytes": facts["peak_rss_bytes"],
        # tokens a second that decoding, and reading a prompt, cannot pass
        "bandwidth_ceiling": case.batch * most["bytes_per_second"] / size,
        "arithmetic_ceiling": most["arithmetic"],
        "read_bytes_per_second": most["bytes_per_second"],
        "float32_operations_per_second": most["float32"],
        "int8_operations_per_second": most["int8"],
    }


def add(bench: Bench, point: Point, found: Line) -> None:
    """Put a line at the end of the results, and print the heart of it."""
    whole = {"tool": point.name, "model": bench.name} | found | {"machine": machine()}
    with bench.results.open("a") as file:
        file.write(json.dumps(whole) + "\n")
    print(
        f"  {point.label:36} prefill {found['prefill_tokens_per_second']:7.0f}  "
        f"decode {found['decode_tokens_per_second']:6.1f} tokens/s  "
        f"first token {found['first_token_seconds']:.2f} s  {found['peak_rss_bytes'] / 1e6:.0f} MB",
        flush=True,
    )


if __name__ == "__main__":
    typer.run(main)
