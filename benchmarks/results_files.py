"""From a file of lines to tables and pictures: what the benchmarks' pictures share."""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Groups = list[list[Line]]


def tell(results: Path, table: Callable[[Groups], str], draw: Callable[[Groups, str, Path], None]) -> None:
    """Write MODEL.md and MODEL.svg beside the results, for every model in them; no file, nothing to tell."""
    if not results.is_file():
        return
    models = dict.fromkeys(json.loads(line)["model"] for line in results.read_text().splitlines())
    for model in models:
        groups = points(results, model)
        stem = results.with_name(f"{results.stem}-{model}")
        stem.with_suffix(".md").write_text(table(groups) + "\n")
        draw(groups, model, stem.with_suffix(".svg"))
        print(table(groups))


def points(file: Path, model: str) -> Groups:
    """The lines of each tool and setting (or weights), all seeds together, in the file's order."""
    found: dict[tuple[str, str], list[Line]] = defaultdict(list)
    for line in map(json.loads, file.read_text().splitlines()):
        if line["model"] == model:
            found[line["tool"], line.get("setting") or line["weights"]].append(line)
    return list(found.values())


def two_panels() -> tuple[Any, Any]:
    """A figure and its two axes, side by side, with one y."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "compress", "font.size": 9})
    return plt.subplots(1, 2, figsize=(11, 4.8), sharey=True)


def save(figure: Any, file: Path) -> None:
    """The same bytes for the same figure."""
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
