"""From the name of a pass to its class.

Names are those of the files in `compress/passes/`, then those of installed packages' entry points in the
group `compress.passes`. Two passes of one name are an error; an unknown name is answered with the
nearest. Listing names imports no pass. A pass that another has taken over keeps its name in old recipes.
"""

import importlib
import pkgutil
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import compress.passes
from compress.errors import UserError, nearest
from compress.passes.base import Pass

GROUP = "compress.passes"

# Old name -> the pass that does it now, and its names of the old fields that had to be given.
ALIASES: dict[str, tuple[str, dict[str, str]]] = {"prune_layers": ("student", {"keep": "blocks"})}


def names() -> list[str]:
    """All known pass names: ours first, then plugins', each in alphabetical order."""
    return [*sorted(_own()), *sorted(_plugins())]


def translated(name: str, fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """A pass of a recipe by its name of today, with today's fields.

    Raises:
        UserError: a field that the old pass could not do without.
    """
    if name not in ALIASES:
        return name, fields
    new, fields_now = ALIASES[name]
    for field in fields_now:
        if field not in fields:
            raise UserError(f"{field}: this field is required")
    return new, {fields_now.get(field, field): value for field, value in fields.items()}


def pass_class(name: str) -> type[Pass]:
    """The class of a pass, by its name or an old one.

    Raises:
        UserError: no such pass, or a plugin that cannot be loaded or is no pass.
    """
    name, _ = ALIASES.get(name, (name, {}))
    plugins = _plugins()
    if name in _own():
        module = importlib.import_module(f"compress.passes.{name}")
        return next(
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, Pass) and value.__module__ == module.__name__
        )
    if name in plugins:
        return _load(plugins[name])
    raise UserError(f"pass '{name}' is unknown; {nearest(name, names())}")


def _own() -> set[str]:
    return {m.name for m in pkgutil.iter_modules(compress.passes.__path__) if m.name != "base"}


def _plugins() -> dict[str, EntryPoint]:
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        other = found.get(entry.name)
        if entry.name in _own() or (other is not None and other.value != entry.value):
            raise UserError(
                f"pass '{entry.name}' of {entry.value} has the name of another pass; rename its entry point"
            )
        found[entry.name] = entry
    return found


def _load(entry: EntryPoint) -> type[Pass]:
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:  # whatever a plugin does when it is imported
        raise UserError(f"pass '{entry.name}': {entry.value} cannot be imported ({error})") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise UserError(f"pass '{entry.name}': {entry.value} is not a subclass of compress.passes.base.Pass")
    if loaded.name() != entry.name:
        raise UserError(f"pass '{entry.name}': its module is called '{loaded.name()}'; they must agree")
    return loaded
