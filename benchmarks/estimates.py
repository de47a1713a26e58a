"""How far a dry run's bytes and seconds are from what runs took.

    python benchmarks/estimates.py --model MODEL --text TEXT...

Takes every recipe's last line in `results/recipes.jsonl` that was measured with this model and watched
(`recipe_pages.py`), asks a dry run of the same settings today, and writes both to `docs/notes/estimates.md`.
Time is foreseen for this machine, so the lines must be of the same one.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import recipe_pages
import typer
from readme_table import insert, row

import compress

NOTE = recipe_pages.PAGES.parent / "notes" / "estimates.md"
COLUMNS = {
    "Passes, min": ("pass_seconds", 60, ".1f"),
    "Measuring, min": ("measure_seconds", 60, ".1f"),
    "Memory, GB": ("memory_bytes", 1e9, ".2f"),
    "Disk, GB": ("disk_bytes", 1e9, ".2f"),
}
TIMES = ("pass_seconds", "measure_seconds")


def main(
    model: Annotated[str, typer.Option(help="that the recipes were run with")],
    text: Annotated[list[str], typer.Option(help="that they were run with")],
) -> None:
    """Compare, and write the note's table."""
    name = Path(model).name.removesuffix(".gguf")
    lines = [row(["Recipe", *COLUMNS, "Farthest"]), row([":--", *["--:"] * (len(COLUMNS) + 1)])]
    for recipe, line in recipe_pages.lines().items():
        if not line.get("took") or line["model"] != name:
            continue
        sections = {"model": {"checkpoint": model}, "data": {"text": text}}
        wanted = compress.load_recipe(recipe, line["set"], **sections)
        with tempfile.TemporaryDirectory() as folder:
            foreseen = asdict(compress.preflight(wanted, Path(folder) / "run").estimate)
        lines.append(row(cells(recipe, foreseen, line["took"])))
    NOTE.write_text(insert(NOTE.read_text(encoding="utf-8"), "\n".join(lines)), encoding="utf-8")


def cells(recipe: str, foreseen: dict[str, Any], took: dict[str, Any]) -> list[str]:
    """Foreseen / took of each, and how far the worst of time as a whole, memory and disk is off."""
    shown = [
        f"{format(foreseen[key] / unit, form)} / {format(took[key] / unit, form)}"
        for key, unit, form in COLUMNS.values()
    ]
    ratios = [foreseen[key] / took[key] for key, _, _ in COLUMNS.values()]
    whole = sum(foreseen[k] for k in TIMES) / sum(took[k] for k in TIMES)
    worst = max((*ratios[2:], whole), key=lambda ratio: max(ratio, 1 / ratio))
    return [recipe, *shown, f"{worst - 1:+.0%}"]


if __name__ == "__main__":
    typer.run(main)
