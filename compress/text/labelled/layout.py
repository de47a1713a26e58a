"""Which file of a folder, or split of a data set, is which part.

A folder has a file per part, known by its name: `train`, `dev` (or `validation`, `valid`, `val`, `eval`)
and `test`, with anything before or after that is parted by `-`, `.` or `_`. That covers what GLUE ships,
the shards of a hub's folder, and `wnut17-train.conll`. `dev` evaluates; where there is none, `test` does.
Where evaluation is named in the recipe, `dev` is held out.

MNLI has two: `dev_matched` evaluates, the other is named in the notes. XNLI has no training rows of its
own: with `multinli.train.*` beside it they train, `dev` is held out and `test` evaluates; alone its `dev`
trains.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from compress.errors import UserError
from compress.text.labelled.tables import SUFFIXES

_PART = re.compile(
    r"(?:.*[-._])?(?:(?P<train>train|training)|(?P<dev>dev|validation|valid|val|eval|evaluation)|(?P<test>test))"
    r"(?:[-._].*)?"
)


@dataclass(frozen=True)
class Parts:
    """Names of what trains, what is held out, what evaluates, and what is there besides."""

    train: list[str]
    heldout: list[str] = field(default_factory=list)
    evaluation: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def part_of(name: str) -> str | None:
    """`train`, `dev` or `test`, by the name of a file or split.

    >>> [part_of(n) for n in ("train", "wnut17-dev", "multinli.train.en", "xnli.test", "trainer")]
    ['train', 'dev', 'train', 'test', None]
    """
    found = _PART.fullmatch(name.lower())
    return found and next(part for part, value in found.groupdict().items() if value)


def assigned(names: Iterable[str], stems: Mapping[str, str]) -> Parts:
    """The parts of some names, of which `stems` are what tells the part; no train part: an empty list."""
    found: dict[str | None, list[str]] = {"train": [], "dev": [], "test": []}
    unused = []
    for name in names:
        part = part_of(stems[name])
        if part is None or stems[name].lower().endswith("mismatched"):
            unused.append(name)
        else:
            found[part].append(name)
    train, dev, test = found["train"], found["dev"], found["test"]
    if any(stems[name].lower().startswith("xnli") for name in dev):
        return Parts(train, dev, test, unused) if train else Parts(dev, [], test, unused)
    return Parts(train, [], dev, unused + test) if dev else Parts(train, [], test, unused)


def folder_parts(folder: Path, where: str, kind: str | None) -> Parts:
    """The files of a folder by part, as paths.

    Raises:
        UserError: none that trains.
    """
    suffixes = [*SUFFIXES, ".txt"]
    for suffix in suffixes:
        files = sorted(f for f in folder.rglob(f"*{suffix}") if f.is_file() and not f.stem.endswith("_ids"))
        if suffix == ".txt" and kind != "tags":
            files = [f for f in files if f.name.startswith("msr_paraphrase")]
        parts = assigned([str(f) for f in files], {str(f): f.stem for f in files})
        if parts.train:
            return parts
    raise UserError(
        f"{where}: {folder} has no file of training rows, such as train.tsv; name it so, or name the file "
        "itself"
    )
