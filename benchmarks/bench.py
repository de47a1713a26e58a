"""What the comparisons share: the same float32 model, tokens and scorer for every tool, one line a point.

For every point: a process of its own (`workers/TOOL_worker.py`), in an environment of its own (made with
`venv` and pip the first time, from `workers/requirements/`), changes the model with the calibration tokens of
a seed; then what it wrote is scored in torch against the original's logits (`workers/scoring.py`).
Points that the results hold are not run again, so that a run may be interrupted, or extended by others.

Needs about 5 GB of disk for the logits of an original with a large vocabulary.
"""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from filelock import FileLock, Timeout
from results_files import Line

from compress import DataConfig, TextData, load, machine

HERE = Path(__file__).parent
WORKERS = HERE / "workers"
# tokens
EVALUATION, CALIBRATION, HELDOUT = 20 * 1024, 32 * 1024, 8 * 1024
OWN = ("ours", "fine_tuning", "alone")  # what this package's worker runs, in this environment


class Measurable(Protocol):
    """One tool with one setting.

    Attributes:
        tool: whose; `workers/TOOL_worker.py` runs it, in the environment of that name (`OWN`: in ours).
        setting: says in words what `settings` says to the worker.
        settings: for the worker.
        seeds: how many choices of calibration windows.
        models: wildcard of the models that it is for.
    """

    @property
    def tool(self) -> str: ...
    @property
    def setting(self) -> str: ...
    @property
    def settings(self) -> dict[str, Any]: ...
    @property
    def seeds(self) -> int: ...
    @property
    def models(self) -> str: ...


P = TypeVar("P", bound=Measurable)


@dataclass(frozen=True)
class Bench:
    """Where things are.

    Attributes:
        model: GGUF file or Hugging Face directory.
        text: files to calibrate and to score on, or `stdlib`.
        window: tokens; as long as the model was trained on.
        environments: holds TOOL/venv of every peer.
        work: for what is written on the way.
        results: the file of lines.
        timed: False where other work runs beside, so that seconds mean nothing and are null.
    """

    model: str
    text: list[str]
    window: int
    environments: Path
    work: Path
    results: Path
    timed: bool = True

    @property
    def name(self) -> str:
        """Of the model, in the results."""
        return name_of(self.model)

    @property
    def folder(self) -> Path:
        """What belongs to this model."""
        return self.work / self.name

    def missing(self, points: Iterable[P], only: str, seeds: int) -> Iterator[tuple[P, int]]:
        """Points without a line, seed by seed, so that a run cut short holds every tool.

        Each is locked until the next is asked for: what another run has under way is left to it.
        """
        every = list(points)
        for seed in range(seeds):
            for point in every:
                asked = fnmatch.fnmatch(f"{point.tool}: {point.setting}", only)
                if not asked or seed >= point.seeds or not fnmatch.fnmatch(self.name, point.models):
                    continue
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    with FileLock(f"{self._out(point, seed)}.lock", timeout=0):
                        if (point.tool, point.setting, self.name, seed) not in self._done():
                            yield point, seed
                except Timeout:
                    print(f"{point.tool}: {point.setting}, seed {seed}: another run has it", flush=True)

    def _done(self) -> set[tuple[str, str, str, int]]:
        """What has a line by now."""
        lines = self.results.read_text().splitlines() if self.results.is_file() else []
        return {(x["tool"], x["setting"], x["model"], x["seed"]) for x in map(json.loads, lines)}

    def _out(self, point: Measurable, seed: int) -> Path:
        """The folder of what a point writes."""
        return self.folder / f"{point.tool} {point.setting} {seed}".replace(" ", "_").replace(",", "")

    def measure(self, point: Measurable, seed: int) -> tuple[Line, Line, Path]:
        """Run the tool, then the scorer: what either found, and the folder of what was written."""
        base, windows = self.prepared(seed)
        out = self._out(point, seed)
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        print(f"{point.tool}: {point.setting}, seed {seed}", flush=True)
        own = point.tool in OWN
        worker = WORKERS / f"{'ours' if own else point.tool}_worker.py"
        settings = json.dumps(point.settings | ({"seed": seed} if own else {}))
        call([self.python(point.tool), worker, base, windows, out, settings], out / "log.txt")
        facts = json.loads((out / "facts.json").read_text())
        facts["seconds"] = round(facts["seconds"], 2) if self.timed else None
        scorer = [sys.executable, WORKERS / "scoring.py"]
        scored = call(
            [*scorer, base, self.folder / "evaluation.npy", self.folder / "logits", out], out / "s.txt"
        )
        return facts, json.loads(scored.splitlines()[-1]), out

    def add(self, point: Measurable, seed: int, line: Line) -> None:
        """Put a line at the end of the results, and print the heart of it."""
        whole: Line = {"tool": point.tool, "setting": point.setting, "model": self.name, "seed": seed}
        whole |= line | {"machine": machine()}
        self.results.parent.mkdir(parents=True, exist_ok=True)
        with self.results.open("a") as file:
            file.write(json.dumps(whole) + "\n")
        seconds = "" if line["seconds"] is None else f"  {line['seconds']:.0f} s"
        memory = f"{line['peak_rss_bytes'] / 1e9:.2f} GB"
        print(f"  KL {line['kl']:.4f}  dNLL {line['delta_nll']:+z.4f}{seconds}  {memory}", flush=True)

    def prepared(self, seed: int) -> tuple[Path, Path]:
        """The float32 folder and the calibration windows of a seed, made the first time."""
        base, windows = self.folder / "base", self.folder / f"calibration-{seed}.npy"
        if not base.is_dir():
            self.folder.mkdir(parents=True, exist_ok=True)
            bundle = load(self.model)
            partial = self.folder / "base.partial"
            bundle.model.save_pretrained(partial)
            bundle.tokenizer.save_pretrained(partial)
            if self.model.endswith(".gguf"):
                shutil.copy(self.model, self.folder / "base.gguf")
            config = DataConfig(
                text=self.text,
                window=self.window,
                evaluation_windows=EVALUATION // self.window,
                calibration_windows=CALIBRATION // self.window,
                heldout_windows=HELDOUT // self.window,
            )
            data = TextData.cut(config, bundle.tokenizer)
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
        if tool in OWN:
            return sys.executable
        folder = self.environments.resolve() / tool / "venv"
        if not folder.is_dir():
            print(f"installing {tool} into {folder}", flush=True)
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            needs = WORKERS / "requirements"
            install: list[Any] = [folder / "bin" / "pip", "install", "--quiet"]
            subprocess.run([*install, "-r", needs / f"{tool}.txt"], check=True)
            # what asks for a newer torch than everybody else here has, and runs with this one
            alone = needs / f"{tool}-no-deps.txt"
            if alone.is_file():
                subprocess.run([*install, "--no-deps", "-r", alone], check=True)
        return str(folder / "bin" / "python")


def name_of(model: str) -> str:
    """A model in the results: its file's name, or its folder's and that of the one around it."""
    path = Path(model)
    return f"{path.parent.name}-{path.name}" if path.is_dir() else path.name.split(".")[0]


def call(command: list[Any], log: Path) -> str:
    """Run to the end with the output in a file, which is returned; a failure ends the benchmark."""
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    if command[0] != sys.executable:  # a peer's environment has no use for this package
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
