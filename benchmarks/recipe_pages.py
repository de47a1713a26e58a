"""Run a shipped recipe and write what it left into its page, `docs/recipes/NAME.md`, between the markers.

    python benchmarks/recipe_pages.py NAME --model MODEL --text TEXT... [--set PATH=VALUE...]
    python benchmarks/recipe_pages.py

The first form runs the recipe as `compress-lm run` does and appends a line to `results/recipes.jsonl`: every
result, the size of every exported file, the fields that were set, the machine and how busy it was. The second
only writes the pages again; a page shows its recipe's last line. Nothing else should run on the machine, and
where something did, the page says so. What is judged by labels is shown with its score and metrics. A run
that begins here is also compared with what its dry run foresaw.
"""

import json
import os
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import typer
from bench import HERE
from readme_table import HEADER, cells, insert, row

import compress

RESULTS = HERE / "results" / "recipes.jsonl"
PAGES = HERE.parent / "docs" / "recipes"
FILES = ("| Variant | File for | MB | KL to torch, nats |", "| :-- | :-- | --: | --: |")


def main(
    name: Annotated[str | None, typer.Argument(help="a shipped recipe")] = None,
    model: Annotated[str | None, typer.Option(help="directory, GGUF file or hub id")] = None,
    text: Annotated[list[str] | None, typer.Option(help="files, folders, or stdlib")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="fields, as for compress-lm run")
    ] = None,
    work: Annotated[Path, typer.Option(help="for the runs")] = Path("runs/recipe-pages"),
) -> None:
    """Measure one recipe, if named; write the pages."""
    if name is not None:
        line = measured(name, model, text or [], overrides or [], work)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    for recipe, line in lines().items():
        page = PAGES / f"{recipe}.md"
        page.write_text(insert(page.read_text(encoding="utf-8"), block(line)), encoding="utf-8")


def lines() -> dict[str, dict[str, Any]]:
    """The last line of every recipe that was run."""
    if not RESULTS.is_file():
        return {}
    found = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {line["recipe"]: line for line in found}


def measured(
    name: str, model: str | None, text: list[str], overrides: list[str], work: Path
) -> dict[str, Any]:
    """Run it, resuming what is there."""
    labelled = compress.load_recipe(name).data.labelled
    text = text or ["stdlib" if labelled is None else labelled.named]
    # beside labelled rows the text is theirs: another may hold what they are judged by
    sections: dict[str, Any] = {"data": {"text": text}} if labelled is None else {}
    if model is not None:
        sections["model"] = {"checkpoint": model}
    busy = os.getloadavg()[0]
    folder = work / name
    recipe = compress.load_recipe(name, overrides, **sections)
    foreseen = None if folder.exists() else asdict(compress.preflight(recipe, folder).estimate)
    with Watched(folder) as watched:
        record = compress.run(recipe, folder)
    results = compress.read_results(folder / "results.jsonl")
    measured = {str(Path(r.artifact).parent if r.artifact.endswith(".gguf") else r.artifact) for r in results}
    exports = []
    for variant in record.variants:
        for kind, what in (("gguf", "llama.cpp"), ("compressed-tensors", "transformers, vLLM")):
            if (folder / variant.name / kind).is_dir() and f"{variant.name}/{kind}" not in measured:
                size = sum(p.stat().st_size for p in (folder / variant.name / kind).iterdir())
                exports.append(
                    {"variant": variant.name, "for": what, "bytes": size, "kl": checked(variant.steps, kind)}
                )
    return {
        "recipe": name,
        "model": Path(model or record.recipe_name).name.removesuffix(".gguf"),
        "text": [Path(part).name for part in text],
        "set": overrides,
        "load_average": round(busy, 1),
        "foreseen": foreseen,
        "took": foreseen and watched.took(record),
        "machine": record.machine,
        "versions": record.versions,
        "results": [r.model_dump(mode="json") for r in results],
        "exports": exports,
        "references": [r.model_dump(mode="json") for r in record.label_references],
    }


class Watched:
    """What a run takes: its seconds, the most memory of a process of it, the most disk of its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._ended = folder, threading.Event()
        self._memory = self._disk = 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Watched":
        self._began = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._seconds = time.monotonic() - self._began
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._ended.wait(1.0):
            for process in [me, *me.children(recursive=True)]:
                try:
                    self._memory = max(self._memory, process.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
            self._disk = max(self._disk, allocated(self._folder))

    def took(self, record: Any) -> dict[str, float]:
        """In the words of an estimate: a step counts once, all else is measuring."""
        steps = {step.fingerprint: step.seconds for v in record.variants for step in v.steps}
        passes = sum(steps.values())
        return {
            "memory_bytes": self._memory,
            "disk_bytes": self._disk,
            "pass_seconds": passes,
            "measure_seconds": self._seconds - passes,
        }


def allocated(folder: Path) -> int:
    """Bytes of a folder's files, those with several names once."""
    seen = {}
    for path in folder.rglob("*"):
        try:
            status = path.lstat()
        except FileNotFoundError:  # a temporary one
            continue
        seen[status.st_ino] = status.st_size if path.is_file() else 0
    return sum(seen.values())


def checked(steps: list[Any], kind: str) -> float | None:
    """KL from torch to the file in its runtime, as the export's own check noted it; None: not installed."""
    for step in reversed(steps):
        notes = step.notes.get(kind.replace("-", "_"))
        if notes is not None:
            check = notes["llama_cpp"] if kind == "gguf" else notes["check"]
            return None if check is None else check["kl"]
    return None


def costs(foreseen: dict[str, float], took: dict[str, float]) -> list[str]:
    """A table: what the run took, and what its dry run had said."""

    def minutes(which: dict[str, float], key: str) -> str:
        return f"{which[key] / 60:.1f} min"

    def gigabytes(which: dict[str, float], key: str) -> str:
        return f"{which[key] / 1e9:.2f} GB"

    columns = {
        "Passes": ("pass_seconds", minutes),
        "Measuring": ("measure_seconds", minutes),
        "Memory": ("memory_bytes", gigabytes),
        "Disk": ("disk_bytes", gigabytes),
    }
    lines = [row(["Cost", *columns]), row([":--", *["--:"] * len(columns)])]
    for name, which in (("this run", took), ("as `--dry-run` foresaw", foreseen)):
        lines.append(row([name, *(form(which, key) for key, form in columns.values())]))
    return lines


def scored(
    results: list[compress.Result], references: list[dict[str, Any]]
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Heading and rows of what is judged by labels, simple answers last."""
    name = next((compress.metric_name(result.score_name) for result in results if result.score_name), "score")
    keys = dict.fromkeys(key for result in results for key in result.metrics or {})
    keys.pop("calibration_error", None)
    header = (
        "Variant", "Runtime", "Disk, MB", f"{name} × 100", "Δ, points [95 %]", "Flips, %", "KL, nats",
        *(f"{compress.metric_name(key)} × 100" for key in keys),
        "Prefill, tokens/s", "Decode, tokens/s", "Peak RSS, MB",
    )  # fmt: skip

    def shown(value: float | None, factor: float, form: str) -> str:
        return "–" if value is None else format(factor * value, form)

    rows = []
    for r in results:
        low, high = r.delta_score_ci95 or (None, None)
        bounds = "" if low is None or high is None else f" [{100 * low:+.1f}, {100 * high:+.1f}]"
        told, metrics = cells(r), r.metrics or {}
        change = shown(r.delta_score, 100, "+.1f") + bounds
        of = [shown(metrics.get(key), 100, ".1f") for key in keys]
        score, flips = shown(r.score, 100, ".1f"), shown(r.flips, 100, ".1f")
        rows.append([*told[:3], score, change, flips, told[5], *of, *told[7:]])
    for reference in references:
        of = [shown(reference["metrics"].get(key), 100, ".1f") for key in keys]
        score = shown(reference["score"], 100, ".1f")
        rows.append([f"*{reference['name']}*", "*reference*", "–", score, "–", "–", "–", *of, *["–"] * 3])
    return header, rows


def block(line: dict[str, Any]) -> str:
    """The Markdown between a page's markers."""
    results = [compress.Result.model_validate(result) for result in line["results"]]
    protocol, machine, versions = results[0].protocol, line["machine"], line["versions"]
    judged = any(result.score is not None for result in results)
    what = "rows of at most" if judged else "windows of"
    parts = [
        f"Model {line['model']}; text {', '.join(line['text'])}; {protocol.get('windows')} {what} "
        f"{protocol.get('window')} tokens. {machine.get('cpu')}, threads: {protocol.get('threads')}; "
        f"torch {versions.get('torch')}, ONNX Runtime {versions.get('onnxruntime')}."
    ]
    if line["set"]:
        parts += ["", "Set for this run: " + ", ".join(f"`{field}`" for field in line["set"]) + "."]
    if line["load_average"] > machine.get("cores", 1) / 2:
        parts += [
            "",
            f"Other programs ran beside it (load average {line['load_average']}): trust sizes and losses, "
            "and speeds hardly.",
        ]
    if line.get("took"):
        parts += ["", *costs(line["foreseen"], line["took"])]
    header: tuple[str, ...] = HEADER
    lines = [cells(result) for result in results]
    if judged:
        header, lines = scored(results, line.get("references", []))
    parts += ["", row(header), row([":--", ":--"] + ["--:"] * (len(header) - 2)), *map(row, lines)]
    if line["exports"]:
        parts += ["", *FILES]
        for export in line["exports"]:
            kl = export["kl"]
            parts.append(
                f"| {export['variant']} | {export['for']} | {export['bytes'] / 1e6:.2f} "
                f"| {'–' if kl is None else format(kl, '.4f')} |"
            )
        if any(export["kl"] is None for export in line["exports"]):
            parts += [
                "",
                "–: llama-cpp-python was not installed, so that the file was read back but not run.",
            ]
    return "\n".join(parts)


if __name__ == "__main__":
    typer.run(main)
