"""Training from random weights: compress's loop against nanoGPT's and the Trainer; Muon against AdamW.

    python benchmarks/training.py runs/demo/base --text stdlib --window 256

These questions, on the shape and the text of the model given, in the precision that the processor has:

- Throughput. Every loop trains the same random start, the same windows per step; three rounds in turns,
  since machines drift, and the first steps of each run are not timed. A loop written as nanoGPT's, plain and
  with `torch.compile`, and `transformers.Trainer`.
- Masked tokens, of a model that fills them in, in the place of both: ours and the Trainer's, by pace and
  by the held-out loss after as many steps with the same optimizer.
- Steps. AdamW with several learning rates for the whole budget, and Muon with its defaults for parts of it:
  a schedule of its own each, down to nothing in the end. Compared is the loss on held-out text.

A line per run goes to `results/training.jsonl`; runs that it holds are not run again. Nothing else should run
on the machine.
"""

import json
import statistics
import sys
from collections import defaultdict
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer
from bench import HERE, WORKERS, Bench, call
from results_files import Line

from compress import machine

ROUNDS, SHORT = 3, 25  # runs of each loop, and their steps
BUDGET = 400  # steps of AdamW in the second question
BATCH = {"throughput": 16, "steps": 8, "masked": 16}


def throughput() -> list[tuple[str, str, dict[str, Any]]]:
    """(tool, setting, settings) of the first question."""
    return [
        ("ours", "Muon", {"loop": "ours", "learning_rate": 4e-3}),
        ("ours", "AdamW", {"loop": "ours", "optimizer": "adamw", "learning_rate": 1e-3}),
        ("nanogpt", "its loop", {"loop": "nanogpt", "learning_rate": 1e-3}),
        ("nanogpt", "its loop, compiled", {"loop": "nanogpt", "learning_rate": 1e-3, "compiled": True}),
        ("trainer", "its loop", {"loop": "trainer", "learning_rate": 1e-3}),
    ]


def steps() -> list[tuple[str, str, dict[str, Any]]]:
    """(tool, setting, settings) of the second."""
    found = []
    for rate in (1e-3, 2e-3, 4e-3, 8e-3):
        plan = {"loop": "ours", "optimizer": "adamw", "learning_rate": rate, "steps": BUDGET}
        found.append(("ours", f"AdamW {rate:g}, all steps", plan))
    for share in (1.0, 0.7, 0.5):
        plan = {"loop": "ours", "learning_rate": 4e-3, "steps": round(share * BUDGET)}
        found.append(("ours", f"Muon, {share:g} of the steps", plan))
    return found


def masked() -> list[tuple[str, str, dict[str, Any]]]:
    """(tool, setting, settings) of the third."""
    found = []
    for steps in (SHORT, BUDGET):
        for tool, more in (
            ("ours", {"loop": "ours", "optimizer": "adamw"}),
            ("trainer", {"loop": "trainer"}),
        ):
            plan = {**more, "learning_rate": 1e-3, "steps": steps}
            found.append((tool, f"AdamW, {steps} steps", plan))
    return found


def main(
    model: Annotated[str, typer.Argument(help="Hugging Face directory: its shape, not its weights")],
    text: Annotated[list[str], typer.Option(help="files to learn from, or stdlib")],
    window: int = 256,
    work: Annotated[Path, typer.Option(help="for what is written on the way")] = Path("runs/quantization"),
    results: Annotated[Path, typer.Option()] = HERE / "results" / "training.jsonl",
    only: Annotated[str, typer.Option(help="steps, or throughput, which needs an idle machine")] = "*",
) -> None:
    """Run what is missing, then print both tables."""
    bench = Bench(model, text, window, Path("environments"), work.resolve(), results)
    lines = [json.loads(line) for line in results.read_text().splitlines()] if results.is_file() else []
    done = {(x["question"], x["tool"], x["setting"], x["model"], x["round"]) for x in lines}
    plan = [
        ("throughput", number, *run)
        for number in range(ROUNDS)
        for run in (throughput() if number % 2 == 0 else throughput()[::-1])
    ]
    plan += [("steps", 0, *run) for run in steps()]
    config = json.loads((Path(model) / "config.json").read_text())
    if str(config["architectures"][0]).endswith("ForMaskedLM"):
        turns = [masked(), masked()[::-1], masked()]
        plan = [("masked", number, *run) for number, runs in enumerate(turns) for run in runs]
        plan = [run for run in plan if run[1] == 0 or run[-1]["steps"] == SHORT]
    for question, number, tool, setting, settings in plan:
        if not fnmatch(question, only) or (question, tool, setting, bench.name, number) in done:
            continue
        shared = {"steps": SHORT, "batch": BATCH[question], "window": window, "seed": number}
        found = measure(bench, shared | settings)
        line = {"question": question, "round": number, "tool": tool, "setting": setting, "model": bench.name}
        line |= shared | settings | found | {"machine": machine()}
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        lines.append(line)
        print(f"{question}: {tool}, {setting}: {found['tokens_per_second']:,.0f} tokens/s, "
              f"held-out {found['heldout_nll']:.4f}", flush=True)  # fmt: skip
    mine = [line for line in lines if line["model"] == bench.name]
    page = tables(mine)
    results.with_name(f"training-{bench.name}.md").write_text(page + "\n")
    print(page)


def measure(bench: Bench, settings: dict[str, Any]) -> Line:
    """One run in a process of its own."""
    base, _ = bench.prepared(0)
    log = bench.folder / "training.txt"
    command = [sys.executable, WORKERS / "training_worker.py", base, json.dumps(settings)]
    found: Line = json.loads(call(command, log).splitlines()[-1])
    return found


def tables(lines: list[Line]) -> str:
    """Markdown: pace as a share of nanoGPT's loop in the same round; held-out loss after so many steps."""
    pace: dict[tuple[str, str], list[float]] = defaultdict(list)
    beside: dict[tuple[str, str], list[float]] = defaultdict(list)
    plain = {
        line["round"]: line["tokens_per_second"]
        for line in lines
        if (line["question"], line["tool"], line["setting"]) == ("throughput", "nanogpt", "its loop")
    }
    for line in lines:
        if line["question"] == "throughput" and line["round"] in plain:
            key = line["tool"], line["setting"]
            pace[key].append(line["tokens_per_second"])
            beside[key].append(line["tokens_per_second"] / plain[line["round"]])
    rows = ["| Loop | Tokens/s | Beside nanoGPT's |", "|:--|--:|--:|"]
    rows += [
        f"| {tool}, {setting} | {statistics.median(pace[tool, setting]):,.0f} "
        f"| {statistics.median(beside[tool, setting]):.2f} x |"
        for tool, setting in pace
    ]
    if hidden := [line for line in lines if line["question"] == "masked"]:
        return masked_table(hidden)
    rows += ["", "| Optimizer | Steps | Held-out loss |", "|:--|--:|--:|"]
    rows += [
        f"| {line['setting']} | {line['steps']} | {line['heldout_nll']:.4f} |"
        for line in lines
        if line["question"] == "steps"
    ]
    return "\n".join(rows)


def masked_table(lines: list[Line]) -> str:
    """Markdown: pace of short runs, as a share of the Trainer's in the same round, and held-out losses."""
    rows = ["| Loop | Tokens/s | Beside the Trainer's | Held-out loss |", "|:--|--:|--:|--:|"]
    paces = {(x["tool"], x["round"]): x["tokens_per_second"] for x in lines if x["steps"] == SHORT}
    for tool in ("ours", "trainer"):
        own = [paces[tool, number] for number in range(ROUNDS) if (tool, number) in paces]
        beside = [paces[tool, n] / paces["trainer", n] for n in range(ROUNDS) if ("trainer", n) in paces]
        loss = next(x["heldout_nll"] for x in lines if x["tool"] == tool and x["steps"] == BUDGET)
        rows.append(
            f"| {tool} | {statistics.median(own):,.0f} | {statistics.median(beside):.2f} x | {loss:.4f} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    typer.run(main)
