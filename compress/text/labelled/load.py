"""From the recipe's `labelled` section to rows in three parts.

Parts are the files', the folder's or the data set's own, or cut off the training rows (splits.py). Parts that
are cut share no text, nor nearly the same one; in given parts that is looked for and reported, and nothing is
moved.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from compress.errors import UserError
from compress.host.files import at_home, require_regular
from compress.text.labelled import standard
from compress.text.labelled.base import Labelled
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.layout import Parts, assigned, folder_parts
from compress.text.labelled.parts import digest, divided, named_labels, overlaps, require_names
from compress.text.labelled.reading import Part, Raw, kind_of, read_raw, rows_of
from compress.text.labelled.tables import Table, data_set_tables, open_table


@dataclass
class _Opened:
    """Tables by part, of which `unused` are names only."""

    train: list[Table] = field(default_factory=list)
    heldout: list[Table] = field(default_factory=list)
    evaluation: list[Table] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


def load_labelled(config: LabelledConfig, seed: int = 0) -> Labelled:
    """Read, check and divide.

    The same rows and seed give the same parts, in whatever order the rows stand.

    Raises:
        UserError: no such file, a column that is neither named nor recognised, a row that is not what its
            kind wants, a single label, a label that training does not have, or too few rows to cut.
    """
    raws, unused = _raw_parts(config)
    kind, whole = kind_of([raw for part in raws.values() for raw in part], config)
    left_out: Counter[str] = Counter()
    read = {name: _read(part, kind, whole, left_out) for name, part in raws.items()}
    if not read["train"].rows:
        raise UserError(f"labelled.source: {config.named} holds no rows to train on")
    require_names(read["train"].rows, kind, config.named)
    given = [name for name in ("heldout", "evaluation") if read[name].rows]
    for name in ("heldout", "evaluation"):
        if (own := getattr(config, name)) is not None and name not in given:
            raise UserError(f"labelled.{name}: {own} holds no rows with a label")
    notes: dict[str, Any] = {
        "read": {name: len(part.rows) for name, part in read.items()},
        "left_out": {what: count for what, count in left_out.items() if count},
        "unused": unused,
    }
    parts = divided(read, given, kind, config, seed, notes)
    names = named_labels(parts, kind, _known(raws["train"]))
    notes["overlaps"] = overlaps(parts, given)
    notes["rows"] = {name: len(part.rows) for name, part in parts.items()}
    notes["sha256"] = {name: digest(part.rows) for name, part in parts.items()}
    rows = {name: tuple(part.rows) for name, part in parts.items()}
    return Labelled(config.named, kind, names, rows["train"], rows["heldout"], rows["evaluation"], notes)


def _read(raws: Sequence[Raw], kind: Any, whole: bool, left_out: Counter[str]) -> Part:
    part = Part()
    for raw in raws:
        part.extend(rows_of(raw, kind, whole, left_out))
    return part


def _known(raws: Sequence[Raw]) -> tuple[str, ...]:
    """The names that all tables give their labels' numbers, if they agree."""
    told = {raw.known for raw in raws}
    return told.pop() if len(told) == 1 else ()


def _raw_parts(config: LabelledConfig) -> tuple[dict[str, list[Raw]], list[str]]:
    """The values of all tables by part, and names of files or splits that are in none."""
    parts: dict[str, list[Raw]] = {"train": [], "heldout": [], "evaluation": []}
    unused: list[str] = []
    for number, source in enumerate(config.sources):
        where = "labelled.source"
        opened = _opened(source.source, where, config.kind)
        if config.evaluation is not None and not opened.heldout:
            opened.heldout, opened.evaluation = opened.evaluation, []
        if config.heldout is not None:
            opened.heldout = []
        if source.proxy:
            opened.heldout, opened.evaluation = [], []
        unused += opened.unused
        for name, raws in parts.items():
            tables: list[Table] = getattr(opened, name)
            raws += [read_raw(table, config, where, number) for table in tables]
    for name in ("evaluation", "heldout"):
        own = getattr(config, name)
        if own is not None:
            where = f"labelled.{name}"
            opened = _opened(own, where, config.kind)
            tables = opened.evaluation or opened.train
            parts[name] = [read_raw(table, config, where) for table in tables]
    return parts, unused


def _opened(source: str, where: str, kind: str | None) -> _Opened:
    if source.startswith("stdlib"):
        return _Opened([standard.table(source, where)])
    if source.startswith("datasets:"):
        tables = data_set_tables(source.removeprefix("datasets:"), where)
        parts = assigned(tables, {name: name for name in tables})
        if not parts.train:
            raise UserError(
                f"{where}: {source} has no split to train on (it has {', '.join(tables)}); name one as "
                f"{source}:SPLIT"
            )
        return _by_part(parts, tables)
    path = at_home(source)
    if path.is_dir():
        parts = folder_parts(path, where, kind)
        files = [*parts.train, *parts.heldout, *parts.evaluation]
        return _by_part(parts, {file: open_table(at_home(file), where, kind) for file in files})
    if path.exists():
        require_regular(path)  # a pipe would never answer
        return _Opened([open_table(path, where, kind)])
    raise UserError(
        f"{where}: '{source}' does not exist (a file, a folder, 'datasets:NAME' or "
        f"{', '.join(standard.NAMES)})"
    )


def _by_part(parts: Parts, tables: dict[str, Table]) -> _Opened:
    train, heldout, evaluation = (
        [tables[name] for name in part] for part in (parts.train, parts.heldout, parts.evaluation)
    )
    return _Opened(train, heldout, evaluation, parts.unused)
