"""What the values of a label column are: kind, labels, names.

Values may be numbers or numbers written as text, texts, or lists. Without a kind in the recipe:

- a list anywhere: `classes`, the names of each row; a text "a,b" is one name, a list is several;
- all values numbers, not all of them whole: `number`;
- all values whole numbers (7, "7", 7.0): `class`, named "0", "1", ...; a scale of 0.0, 1.0, ... is whole,
  too, and needs `kind: number`; true and false are 1 and 0;
- else `class`, named as the texts are, without the spaces around them.

Names stand in the order of the numbers, or of the texts; `O` of tags is first. Where a data set says what its
numbers stand for, they are those names in that order.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from compress.errors import UserError
from compress.text.labelled.base import Kind
from compress.text.rows import text_of

MOST_NAMES = 10_000
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")
_DIGITS = 15  # that a float holds; longer ones are names
_PADDED = re.compile(r"[+-]?0\d")  # a code that is written in digits, such as 007


def kind_of(values: Iterable[Any]) -> tuple[Kind, bool]:
    """What a column's values are, see above; and whether they are whole numbers."""
    whole = numbers = True
    for value in values:
        if isinstance(value, (list, tuple)):
            return "classes", False
        number = _number(value)
        numbers = numbers and number is not None
        whole = whole and number is not None and number.is_integer()
    return ("number" if numbers and not whole else "class"), whole


def number(value: Any, place: str) -> float:
    """A label that is a number.

    Raises:
        UserError: it is none, or not finite.
    """
    found = None if isinstance(value, bool) else _number(value)
    if found is None or not math.isfinite(found):
        raise UserError(f"{place} has the label {_shown(value)} where a number is wanted")
    return found


def name(value: Any, known: Sequence[str], whole: bool, place: str, where: str) -> str:
    """A label that is a name; `known` are names by number, `whole` whether all labels are whole numbers.

    Raises:
        UserError: none is there, or it is no text and no number.
    """
    if isinstance(value, bool):
        return str(int(value)) if whole else str(value).lower()
    if known and isinstance(value, int):
        if not 0 <= value < len(known):
            raise UserError(f"{where}: {place} has the label {value} where there are {len(known)} names")
        return known[value]
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise missing(place, where)
        return str(int(value)) if whole else str(value)
    if isinstance(value, (list, dict, bytes)):
        raise UserError(f"{where}: {place} has the label {_shown(value)} where one name is wanted")
    found = text_of(value, place, where).strip()
    if not found:
        raise missing(place, where)
    return str(int(float(found))) if whole else found


def names(value: Any, known: Sequence[str], whole: bool, place: str, where: str) -> tuple[str, ...]:
    """Labels that are several names, each once."""
    several = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(name(one, known, whole, place, where) for one in several))


def missing(place: str, where: str) -> UserError:
    """What is said of a row whose label is null or empty."""
    return UserError(f"{where}: {place} has no label (null or empty); give it one, or take the row out")


def ordered(found: Iterable[str]) -> tuple[str, ...]:
    """Names in the order of their numbers, else of the texts; `O` first.

    >>> ordered(["10", "9", "9"]), ordered(["b", "O", "B-x"])
    (('9', '10'), ('O', 'B-x', 'b'))
    """
    distinct = set(found)
    if all(re.fullmatch(r"0|-?[1-9]\d{0,17}", one) for one in distinct):
        return tuple(sorted(distinct, key=int))
    return tuple(sorted(distinct, key=lambda one: (one != "O", one)))


def _number(value: Any) -> float | None:
    if isinstance(value, (bool, int, float)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if isinstance(value, str):
        stripped = value.strip()
        if len(stripped) <= _DIGITS and _NUMBER.fullmatch(stripped) and not _PADDED.match(stripped):
            return float(stripped)
    return None


def _shown(value: Any) -> str:
    return f"{value!r:.60}"
