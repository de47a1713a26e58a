"""From a file of lines to tables and pictures: what the benchmarks' pictures share."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

Line = dict[str, Any]
Groups = list[list[Line]]
_REACHES = (7, 16, 26, 38, 52, 68, 86, 106, 128)  # points from a mark to its label
_TURNS = (
    (1, 0), (1, 0.6), (1, -0.6), (-1, 0), (-1, 0.6), (-1, -0.6), (0.4, 1), (0.4, -1), (-0.4, 1), (-0.4, -1),
)  # fmt: skip


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
    """A figure and its two axes with one y, one above the other."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "compress", "font.size": 9})
    return plt.subplots(2, 1, figsize=(11, 14), sharey=True)


def put_labels(axis: Any, marks: Sequence[tuple[float, float, str]], colour: str = "black") -> None:
    """Write beside every mark, (x, y, text), at the nearest place where nothing is written yet.

    Limits, scales and legend of the axis must be as they will be.
    """
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    if not marks:
        return
    figure = axis.figure
    figure.tight_layout()
    figure.canvas.draw()
    inside = axis.get_window_extent()
    taken = [axis.get_legend().get_window_extent()] if axis.get_legend() else []
    around = axis.transData.transform([mark[:2] for mark in marks])
    taken += [Bbox.from_bounds(x - 4, y - 4, 8, 8) for x, y in around]
    for x, y, text in sorted(marks, key=lambda mark: mark[1]):
        for reach, turn in product(_REACHES, _TURNS):
            right, up = reach * turn[0], reach * turn[1]
            note = axis.annotate(
                text,
                (x, y),
                (right, up),
                textcoords="offset points",
                fontsize=7,
                color=colour,
                ha="left" if right > 0 else "right" if right < 0 else "center",
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.4, "color": "0.5"} if reach > _REACHES[0] else None,
            )
            note.get_window_extent()  # puts it where it will be
            place = Text.get_window_extent(note)  # without its line
            free = not any(place.overlaps(other) for other in taken)
            if free and all(inside.contains(x, y) for x, y in (place.min, place.max)):
                break
            note.remove()
        else:
            continue  # no room: the table tells
        taken.append(place)


def save(figure: Any, file: Path, metadata: dict[str, Any] | None = None, **options: Any) -> None:
    """The same bytes for the same figure."""
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None, **(metadata or {})}, **options)
