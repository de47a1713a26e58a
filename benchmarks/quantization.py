"""Quality at a size: compress against GPTQModel, AutoRound, HQQ, bitsandbytes, llama.cpp; one scorer for all.

    python benchmarks/quantization.py MODEL.gguf --text TEXT... [--environments FOLDER] [--only PATTERN]
    python benchmarks/quantization.py runs/demo/base --text stdlib --window 256

For every point: a process of its own, in an environment of its own, quantizes the same float32 model with the
same calibration tokens; then the weights that the written codes stand for are scored in torch against the
original's logits. A line goes to `results/quantization.jsonl` for every point, table and picture are drawn
from that file alone. Points that the file holds are not run again, so that a run may be interrupted, or
extended by others. Nothing else should run on the machine: seconds are part of the result.

Needs about 5 GB of disk for the logits of the original, and one environment per tool (made with `venv` and
pip the first time, from `quantizers/requirements/`). With a Hugging Face directory in place of the GGUF,
llama.cpp is left out.
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from quantizers import picture
from quantizers.points import POINTS, Point

from compress.checkpoints import load_checkpoint
from compress.data import DataConfig, prepare
from compress.machine import machine
from compress.text import load_documents

HERE = Path(__file__).parent
# tokens
EVALUATION, CALIBRATION, HELDOUT = 20 * 1024, 32 * 1024, 8 * 1024


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
    for point, seed in bench.missing(only, seeds):
        bench.run(point, seed, keep)
    picture.main(results)


@dataclass(frozen=True)
class Bench:
    """Where things are."""

    model: str
    text: list[str]
    window: int
    environments: Path
    work: Path
    results: Path
    timed: bool = True

    @property
    def name(self) -> str:
        """Of the model, in the results: of its file, or of its folder and the one around it."""
        path = Path(self.model)
        return f"{path.parent.name}-{path.name}" if path.is_dir() else path.name.split(".")[0]

    @property
    def folder(self) -> Path:
        """What belongs to this model."""
        return self.work / self.name

    def missing(self, only: str, seeds: int) -> Iterator[tuple[Point, int]]:
        """Points without a line, seed by seed, so that a run cut short holds every tool."""
        lines = self.results.read_text().splitlines() if self.results.is_file() else []
        done = {(x["tool"], x["setting"], x["model"], x["seed"]) for x in map(json.loads, lines)}
        for seed in range(seeds):
            for point in POINTS:
                asked = fnmatch.fnmatch(f"{point.tool}: {point.setting}", only)
                fits = seed < point.seeds and fnmatch.fnmatch(self.name, point.models)
                if asked and fits and (point.tool, point.setting, self.name, seed) not in done:
                    yield point, seed

    def run(self, point: Point, seed: int, keep: bool) -> None:
        """Quantize, score, add the line."""
        base, windows = self.prepared(seed)
        if point.tool == "llama_cpp" and not (base.parent / "base.gguf").exists():
            return
        out = self.folder / f"{point.tool} {point.setting} {seed}".replace(" ", "_").replace(",", "")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        print(f"{point.tool}: {point.setting}, seed {seed}", flush=True)
        worker = HERE / "quantizers" / f"{point.tool}_worker.py"
        settings = json.dumps(point.settings | ({"seed": seed} if point.tool == "ours" else {}))
        call([self.python(point.tool), worker, base, windows, out, settings], out / "log.txt")
        facts = json.loads((out / "facts.json").read_text())
        scorer = [sys.executable, HERE / "quantizers" / "scoring.py"]
        scored = call(
            [*scorer, base, self.folder / "evaluation.npy", self.folder / "logits", out], out / "s.txt"
        )
        found = json.loads(scored.splitlines()[-1])
        line = {
            "tool": point.tool,
            "setting": point.setting,
            "model": self.name,
            "bits": point.bits,
            "group": point.group,
            "seed": seed,
            "file_bytes": facts["file_bytes"],
            "linear_bytes": found["linear_bytes"] or facts["linear_bytes"],
            **{name: found[name] for name in ("delta_nll", "kl", "kl_ci95", "top1_agreement")},
            "seconds": round(facts["seconds"], 2) if self.timed else None,
            "peak_rss_bytes": facts["peak_rss_bytes"],
            "perplexity": found["perplexity"],
            "machine": machine(),
        }
        line |= {name: facts[name] for name in ("folder_bytes", "notes") if name in facts}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"  {line['file_bytes'] / 1e6:.1f} MB  KL {line['kl']:.4f}  dNLL {line['delta_nll']:+.4f}  "
            f"{facts['seconds']:.0f} s  {line['peak_rss_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        if not keep:
            shutil.rmtree(out)

    def prepared(self, seed: int) -> tuple[Path, Path]:
        """The float32 folder and the calibration windows of a seed, made the first time."""
        base, windows = self.folder / "base", self.folder / f"calibration-{seed}.npy"
        if not base.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            model, tokenizer = load_checkpoint(self.model)
            partial = self.folder / "base.partial"
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            if self.model.endswith(".gguf"):
                shutil.copy(self.model, self.folder / "base.gguf")
            config = DataConfig(
                text=self.text,
                window=self.window,
                evaluation_windows=EVALUATION // self.window,
                calibration_windows=CALIBRATION // self.window,
                heldout_windows=HELDOUT // self.window,
            )
            data = prepare(config, load_documents(config.text), tokenizer, training=True)
            pool = np.concatenate([data.train, data.calibration.tokens.reshape(-1)])
            np.save(self.folder / "train.npy", pool)
            np.save(self.folder / "heldout.npy", data.heldout.tokens)
            np.save(self.folder / "evaluation.npy", data.evaluation.tokens)
            partial.rename(base)
        if not windows.is_file():
            pool = np.load(self.folder / "train.npy")
            rows = pool[: len(pool) // self.window * self.window].reshape(-1, self.window)
            chosen = np.random.default_rng(seed).permutation(len(rows))[: CALIBRATION // self.window]
            np.save(windows, rows[np.sort(chosen)])
        return base, windows

    def python(self, tool: str) -> str:
        """The interpreter of a tool's environment, made the first time."""
        if tool == "ours":
            return sys.executable
        folder = self.environments.resolve() / tool / "venv"
        if not folder.is_dir():
            print(f"installing {tool} into {folder}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            needs = HERE / "quantizers" / "requirements"
            install: list[Any] = [folder / "bin" / "pip", "install", "--quiet"]
            subprocess.run([*install, "-r", needs / f"{tool}.txt"], check=True)
            # what asks for a newer torch than everybody else here has, and runs with this one
            alone = needs / f"{tool}-no-deps.txt"
            if alone.is_file():
                subprocess.run([*install, "--no-deps", "-r", alone], check=True)
        return str(folder / "bin" / "python")


def call(command: list[Any], log: Path) -> str:
    """Run to the end with the output in a file, which is returned; a failure ends the benchmark."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    if "ours_worker" not in str(command[1]) and "scoring" not in str(command[1]):
        environment.pop("PYTHONPATH")
    with log.open("w") as file:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=log.parent,  # where some tools leave logs of their own
            check=False,
        )
    if done.returncode:
        sys.exit(f"{command[1]}: exit {done.returncode}, see {log}\n{log.read_text()[-2000:]}")
    return log.read_text()


if __name__ == "__main__":
    typer.run(main)
