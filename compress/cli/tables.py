"""What the commands print: plans, passes, results."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table

from compress.artifact.folder import disk_bytes
from compress.errors import one_line, staying
from compress.host.progress import clock
from compress.passes.base import Pass
from compress.records.results import Result
from compress.records.run import RunRecord
from compress.report.narrative import left_lines
from compress.report.text import text_table
from compress.run.preflight import Plan
from compress.run.recipe import Recipe
from compress.run.request import Quantized
from compress.runtimes.exported import EXPORTED


def _console() -> Console:
    # outside a terminal rich would fold tables at 80 columns
    # what is printed is text: names in brackets are names
    return Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False)


def print_plan(recipe: Recipe, plan: Plan, folder: Path) -> None:
    """The tree of variants, what each pass touches, and the estimates."""
    console = _console()
    console.print(f"{recipe.name} -> {one_line(str(folder))}")
    for name, (parent, chain) in plan.chains.items():
        console.print(f"  {name}" + (f"  (from {parent})" if parent else ""), style="bold")
        for step, layers in chain:
            first, last = layers[0], layers[-1]
            with staying(step.name()):
                own = step.plan()
            more = "".join(f"; {said}" for said in (own, plan.coverage.get(id(step))) if said)
            which = f"{len(layers)} layers, {first} ... {last}" if len(layers) > 1 else str(first)
            console.print(f"    {step.name()}: {which}{more}")
    estimate = plan.estimate
    console.print(f"parameters  {estimate.parameters / 1e6:.1f} M")
    console.print(f"memory      about {estimate.memory_bytes / 1e9:.1f} GB")
    console.print(f"disk        about {estimate.disk_bytes / 1e9:.2f} GB")
    console.print(
        f"time        very roughly {clock(estimate.pass_seconds)} of passes, "
        f"{clock(estimate.measure_seconds)} of measuring"
    )


def print_pass(cls: type[Pass]) -> None:
    """Fields, bounds and defaults of one pass."""
    console = _console()
    module = sys.modules[cls.__module__].__doc__ or cls.__doc__ or ""
    console.print(module.strip() + "\n")
    console.print(f"kind: {cls.kind}   needs: {', '.join(sorted(cls.needs)) or 'nothing'}")
    if cls.not_after:
        console.print(f"may not follow: {', '.join(sorted(cls.not_after))}")
    console.print(_table(cls))


def print_fields() -> None:
    """Fields, bounds and defaults of a recipe, but for those of its passes."""
    _console().print(_table(Recipe))


def print_results(results: list[Result], run: RunRecord | None = None) -> None:
    """The table a run ends with; the report has all of it."""
    if run is None:
        print(text_table(results))
    else:
        print(text_table(results, run.references, run.label_references))


def print_left(run: RunRecord) -> None:
    """What passes left as it was, under the table."""
    for line in left_lines(run):
        print(line)


def print_quantized(done: Quantized) -> None:
    """The table, and how to serve each file."""
    if done.results:
        print(text_table(done.results))
        print_left(RunRecord.read(done.folder / "run.json"))
    for to, lines in done.serving().items():
        print(f"\n{to}: {done.files[to]}, {disk_bytes(done.files[to]) / 1e6:.2f} MB")
        for line in lines:
            print(f"  {line}")
        if not (export := EXPORTED[to]).installed:
            print(f"  (checked, not run: pip install {export.package} to measure it in {export.runtime})")
    if done.results:
        print(f"\nreport: {done.folder / 'report.html'}")


def _table(model: type[BaseModel]) -> Table:
    """A row per field, and per field of what it holds."""
    table = Table("field", "type and bounds", "default", "meaning", box=None)
    for row in _fields([model], model.model_json_schema()):
        table.add_row(*row)
    return table


def _fields(
    models: Sequence[type[BaseModel]], whole: dict[str, Any], within: str = ""
) -> Iterator[tuple[str, str, str, str]]:
    """A row per field of any of `models`, then those of what it holds: `target`, `target.bytes`."""
    rows: dict[str, list[tuple[type[BaseModel], FieldInfo]]] = defaultdict(list)
    for model in models:
        for name, field in model.model_fields.items():
            rows[field.alias or name].append((model, field))
    for name, found in rows.items():
        bounds = [_bounds(_schema(model, whole)["properties"][name], whole) for model, _ in found]
        defaults = [_default(field) for _, field in found]
        if len(found) > 1 and bounds == defaults:  # what tells the kinds apart
            defaults = ["required"]
        meanings = [field.description for _, field in found if field.description]
        yield (
            within + name,
            " or ".join(dict.fromkeys(" or ".join(bounds).split(" or "))),
            " or ".join(dict.fromkeys(defaults)),
            meanings[0] if meanings else "",
        )
        inner = dict.fromkeys(model for _, field in found for model in _models(field.annotation))
        yield from _fields(list(inner), whole, f"{within}{name}.")


def _schema(model: type[BaseModel], whole: dict[str, Any]) -> dict[str, Any]:
    """That of the pass itself, or of a part of it."""
    found: dict[str, Any] = whole.get("$defs", {}).get(model.__name__, whole)
    return found


def _models(annotation: Any) -> list[type[BaseModel]]:
    """What a field may hold that has fields itself; of passes every kind has its own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [] if issubclass(annotation, Pass) else [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]


def _default(field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        if type(value) is field.annotation:
            return "as below"
        return ", ".join(f"{name}: {_yaml(held)}" for name, held in value.model_dump().items())
    if isinstance(value, tuple):
        return "[" + ", ".join(map(str, value)) + "]"
    return _yaml(value)


def _yaml(value: Any) -> str:
    """As a recipe writes it."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _bounds(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """A JSON schema in a few words: `number > 0, < 1`."""
    options = schema.get("anyOf") or schema.get("oneOf")
    if options:
        return " or ".join(dict.fromkeys(_bounds(option, whole) for option in options))
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "enum" in schema:
        return " | ".join(map(str, schema["enum"]))
    if "const" in schema:
        return _yaml(schema["const"])
    words = {"exclusiveMinimum": ">", "minimum": ">=", "exclusiveMaximum": "<", "maximum": "<="}
    limits = [f"{sign} {schema[key]:g}" for key, sign in words.items() if key in schema]
    kind = str(schema.get("type", "any"))
    return ", ".join([f"{kind} {limits[0]}", *limits[1:]]) if limits else kind
