"""Small labelled files for the tests of compress/text/labelled."""

from pathlib import Path
from typing import Any

from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.load import load_labelled

SUBJECTS = "river engine library teacher morning garden window bicycle market doctor".split()
VERBS = "carried forgot opened painted followed repaired described borrowed".split()


def sentence(number: int) -> str:
    """A sentence like no other: five words, one of which is its number."""
    return f"the {SUBJECTS[number % 10]} {VERBS[number // 10 % 8]} thing {number}"


def write(file: Path, content: str | bytes) -> str:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(file)


def rows_csv(file: Path, count: int = 20, labels: str = "ab") -> str:
    """A .csv of text and label, in turns."""
    lines = [f"{sentence(i)},{labels[i % len(labels)]}" for i in range(count)]
    return write(file, "text,label\n" + "\n".join(lines) + "\n")


def load(source: Any, seed: int = 0, **fields: Any) -> Labelled:
    return load_labelled(LabelledConfig.model_validate({"source": source, **fields}), seed)


def every(data: Labelled) -> list[Row]:
    """All rows of all parts."""
    return [*data.train, *data.heldout, *data.evaluation]


def found(data: Labelled) -> set[tuple[Any, ...]]:
    """Text, second text and label of all rows."""
    return {(row.text, row.pair, row.label) for row in every(data)}
