"""The door for YAML: bounded in length, depth and in what its aliases stand for, and plain values only.

An alias repeats a whole node in four bytes, and one of aliases repeats those, so a line of text can stand for
gigabytes: the events of the parser, which repeat nothing, are counted before anything is built. What YAML
knows beyond JSON (dates, sets, binary data, numbers of any length) is refused, as is a field given twice.
"""

import math
from typing import Any

import yaml

from compress.errors import UserError, reason

RECIPE_BYTES = 1 << 19
_DEPTH = 50
_NODES = 20_000  # aliases counted as what they stand for
_CHARACTERS = 1 << 20
_LARGEST = 2**63


def parse_yaml(text: str, place: str, *, file: bool = True) -> Any:
    """The value that YAML stands for; `place` begins what is said of a mistake, `place:line` in a file.

    Raises:
        UserError: not YAML, too long, too deep, too much repeated, or a value that is no text, number, list
            or mapping.
    """
    if len(text) > RECIPE_BYTES:
        raise UserError(f"{place}: {len(text):,} characters where at most {RECIPE_BYTES:,} are read")
    try:
        _require_small(text, place)
        value = yaml.load(text, _Once)  # a safe one
    except UserError:
        raise
    except Exception as error:  # its constructors of dates and numbers raise what Python does
        mark = getattr(error, "problem_mark", None)
        where = place if mark is None or not file else f"{place}:{mark.line + 1}"
        said = getattr(error, "problem", None) or reason(error)
        raise UserError(f"{where}: not valid YAML ({said})") from None
    _require_plain(value, place)
    return value


def as_yaml(value: Any) -> str:
    r"""YAML that `parse_yaml` reads as the same value, its fields in their order.

    >>> as_yaml({"prompt": "\x85"})
    'prompt: "\\N"\n'
    """
    return yaml.dump(value, Dumper=_Quoting, sort_keys=False, allow_unicode=True)


class _Quoting(yaml.SafeDumper):
    """Escapes what is the end of a line to YAML, and to the library's own style of writing a letter."""

    def represent_str(self, data: str) -> Any:
        """A text, as the library asks for it."""
        style = '"' if "\x85" in data else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Quoting.add_representer(str, _Quoting.represent_str)


class _Once(yaml.SafeLoader):
    """Refuses a field that is given twice, of which YAML's own loader keeps the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """A mapping, as the library asks for it."""
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key.value, str) else id(key)
            if name in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(problem=f"'{name}' is given twice", problem_mark=key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)


def _require_small(text: str, place: str) -> None:
    """Count what the text stands for, every alias as what it repeats."""
    sizes: dict[str, tuple[int, int]] = {}  # by anchor: nodes, characters
    open_: list[list[Any]] = [[None, 0, 0]]  # anchor, nodes and characters so far
    for event in yaml.parse(text, yaml.SafeLoader):
        nodes = characters = 0
        anchor = getattr(event, "anchor", None)
        if isinstance(event, yaml.AliasEvent):
            if anchor not in sizes:
                raise UserError(f"{place}: the alias '*{anchor}' repeats itself, or nothing; write it out")
            nodes, characters = sizes[anchor]
        elif isinstance(event, yaml.ScalarEvent):
            nodes, characters = 1, len(event.value)
            sizes |= {anchor: (nodes, characters)} if anchor else {}
        elif isinstance(event, yaml.CollectionStartEvent):
            sizes.pop(anchor or "", None)
            open_.append([anchor, 1, 0])
            if len(open_) > _DEPTH:
                raise UserError(f"{place}: nested {_DEPTH} deep, which is more than is read")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, nodes, characters = open_.pop()
            sizes |= {anchor: (nodes, characters)} if anchor else {}
        open_[-1][1] += nodes
        open_[-1][2] += characters
        if open_[-1][1] > _NODES or open_[-1][2] > _CHARACTERS:
            raise UserError(f"{place}: its aliases repeat more than {_NODES:,} values; write fewer")


def _require_plain(value: Any, place: str) -> None:
    """Refuse what a recipe has no use for, and would be shown as in an error."""
    waiting = [value]
    while waiting:
        held = waiting.pop()
        if isinstance(held, list):
            waiting += held
        elif isinstance(held, dict):
            waiting += [*held, *held.values()]
        elif isinstance(held, int) and abs(held) > _LARGEST:
            raise UserError(f"{place}: a number of {int(math.log10(abs(held))):,} digits; write fewer")
        elif not (held is None or isinstance(held, bool | int | float | str)):
            raise UserError(f"{place}: {str(held)[:40]!r} is a {type(held).__name__} in YAML; quote it")
