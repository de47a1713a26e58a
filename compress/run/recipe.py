"""YAML to Recipe: the only file that reads configuration.

A recipe names a model, text, the passes that make the base, and variants, each a chain of passes that
starts from the base or from another variant. Every field is typed and bounded; whatever is wrong is told
in one line that names the field, the value and the nearest known name.
"""

import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from compress.errors import UserError, nearest, staying
from compress.host.files import at_home, read_text
from compress.host.yaml_files import RECIPE_BYTES, as_yaml, parse_yaml
from compress.models.create import Architecture
from compress.passes.base import Pass
from compress.records.protocol import MeasureProtocol
from compress.records.run import ReferenceName
from compress.run.registry import pass_class, translated
from compress.text.windows import DataConfig

_VALUE = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, populate_by_name=True)
_RUN_FILES = {".html", ".md", ".json", ".jsonl", ".yaml", ".npy", ".partial"}  # beside the variants' folders
_TAKEN = {"base": "base itself", "logs": "trackers' folder"}
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class ModelConfig(BaseModel):
    """The `model` section: somebody's checkpoint, or a new architecture with random weights."""

    model_config = _VALUE
    checkpoint: str | None = Field(None, description="a directory, a .gguf file or a hub id")
    adapter: str | None = Field(
        None, description="folder of a LoRA adapter of the checkpoint (safetensors), merged into its weights"
    )
    create: Architecture | None = Field(None, description="dimensions of a model to train from scratch")
    passes: tuple[Any, ...] = Field(
        (), exclude=True, description="what a created model begins with, before those of the base; --model "
        "takes their place"
    )  # fmt: skip

    @field_validator("checkpoint", "adapter")
    @classmethod
    def _at_home(cls, place: str | None) -> str | None:
        found = None if place is None else at_home(place)
        return str(found) if place is not None and place.startswith("~") else place

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.checkpoint is None) == (self.create is None):
            raise ValueError("give a checkpoint (or --model PATH), or dimensions under 'create'; exactly one")
        if self.adapter is not None and self.checkpoint is None:
            raise ValueError(f"adapter: '{self.adapter}' goes on a checkpoint; give the one it was made for")
        return self


MOST_PASSES = 100  # of a chain: each is told of all that follow it


class Chain(BaseModel):
    """Passes in order, from a parent."""

    model_config = _VALUE
    parent: str | None = Field(
        None, alias="from", description="the variant this one continues; the base if null"
    )
    passes: tuple[Pass, ...] = Field((), description="in order, each  - NAME  or  - NAME: {FIELD: VALUE}")

    @field_serializer("passes")
    def _verbatim(self, passes: tuple[Pass, ...]) -> list[dict[str, Any]]:
        return [{step.name(): step.model_dump(mode="json")} for step in passes]


class ReportConfig(BaseModel):
    """The `report` section."""

    model_config = _VALUE
    prompt: str = Field("def ", min_length=1, description="each variant continues this text")
    sample_tokens: int = Field(64, ge=0, le=1000, description="by so many tokens")
    references: tuple[ReferenceName, ...] = Field(
        ("unigram", "trigram"),
        description="simple models beside a base trained here; lstm: as many parameters and tokens as the "
        "base, and about as long to train",
    )
    likelihood: str | None = Field(None, description="a decoder to ask by data.labelled.template, as a row")


class Recipe(BaseModel):
    """A whole run."""

    model_config = _VALUE
    name: str = Field(pattern=_NAME, description="of the run, and of its folder in runs/")
    description: str = Field("", description="for those who read it")
    seed: int = Field(0, ge=0, lt=2**31, description="of all that is drawn by chance")
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads; null: all cores of this process"
    )
    model: ModelConfig
    data: DataConfig = DataConfig()
    base: Chain = Field(Chain(), description="what makes the model that the variants start from")
    variants: dict[str, Chain] = Field(
        default_factory=dict, description="name of each -> its passes as a list, or what follows"
    )
    measure: MeasureProtocol = MeasureProtocol()
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _tree(self) -> "Recipe":
        if self.base.parent is not None:
            raise ValueError(f"base.from: '{self.base.parent}' given, but the base has no parent")
        for name, chain in self.variants.items():
            if name in _TAKEN:
                raise ValueError(f"variants.{name}: the name is taken by the {_TAKEN[name]}; choose another")
            if not re.fullmatch(_NAME, name) or Path(name).suffix in _RUN_FILES:
                raise ValueError(
                    f"variants: {name!r} is not usable as the name of a folder; take letters, digits and "
                    "._- (64 at most, and no ending such as .json)"
                )
            parent = chain.parent
            if parent not in (None, "base", *self.variants):
                raise ValueError(
                    f"variants.{name}.from: '{parent}' is no variant; {nearest(str(parent), self.variants)}"
                )
            self.ancestry(name)
        return self

    @classmethod
    @staying("recipe")
    def parse(cls, content: dict[str, Any], source: str = "recipe") -> "Recipe":
        """A recipe from plain values, as YAML gives them; `source` begins what is said of a mistake.

        Raises:
            UserError: a field that is unknown, of the wrong type or out of range.
        """
        content = dict(content)
        try:
            content |= _beginning(content)
            if "base" in content:
                content["base"] = _chain(content["base"], "base")
            if isinstance(content.get("variants"), dict):
                content["variants"] = {
                    str(name): _chain(value, f"variants.{name}")
                    for name, value in content["variants"].items()
                }
            return _settled(cls.model_validate(content))
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, cls)}") from None
        except UserError as error:
            raise UserError(f"{source}: {error}") from None

    def chain(self, name: str) -> Chain:
        """The chain of a variant, or of the base."""
        return self.base if name == "base" else self.variants[name]

    def ancestry(self, name: str) -> list[str]:
        """From the base to the variant, both included; raises ValueError for a circle."""
        line = [name]
        while line[-1] != "base":
            parent = self.variants[line[-1]].parent or "base"
            if parent in line:
                raise ValueError(f"variants.{name}.from: goes in a circle ({' <- '.join([*line, parent])})")
            line.append(parent)
        return line[::-1]

    def ordered(self) -> list[str]:
        """All variants, the base first and parents before children."""
        return sorted(["base", *self.variants], key=lambda name: len(self.ancestry(name)))

    def to_yaml(self) -> str:
        """The recipe as resolved, every default spelled out."""
        return as_yaml(self.model_dump(mode="json", by_alias=True))


def _settled(recipe: Recipe) -> Recipe:
    """The recipe, in which every pass knows what follows it, in its own chain and in those that go on."""
    chains = {}
    for name in ["base", *recipe.variants]:
        chain = recipe.chain(name)
        going_on = [other for other in recipe.ordered() if name in recipe.ancestry(other)[:-1]]
        after = [step for other in going_on for step in recipe.chain(other).passes]
        settled = []
        for number, step in enumerate(chain.passes):
            where = f"{name if name == 'base' else f'variants.{name}'}.passes.{number}.{step.name()}"
            try:
                settled.append(step.followed_by((*chain.passes[number + 1 :], *after)))
            except ValidationError as error:
                raise UserError(explain(error, type(step), where)) from None
            except ValueError as error:
                raise UserError(f"{where}.{error}") from None
        chains[name] = chain.model_copy(update={"passes": tuple(settled)})
    base = chains.pop("base")
    return recipe.model_copy(update={"base": base, "variants": chains})


def shipped() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(
        p.name.removesuffix(".yaml")
        for p in files("compress.run.recipes").iterdir()
        if p.name.endswith(".yaml")
    )


def load_recipe(source: str, overrides: list[str] | None = None, **sections: Any) -> Recipe:
    """Read a recipe.

    Args:
        source: the name of a shipped recipe, or the path of a YAML file.
        overrides: `path.to.field=value`, values in YAML; a number in the path indexes a list.
        sections: whole sections to set, as nested dicts (`model={"checkpoint": ...}`).

    Raises:
        UserError: no such file, not YAML, or a field that is unknown, of the wrong type or out of range.
    """
    content = _read(source)
    for section, value in sections.items():
        given = content.get(section) or {}
        if section == "model":
            content[section] = value
        elif isinstance(given, dict):  # what is no mapping is refused below
            content[section] = {**given, **{name: _inside(given.get(name), v) for name, v in value.items()}}
    for override in overrides or []:
        _override(content, override)
    return Recipe.parse(content, source)


def _inside(given: Any, value: Any) -> Any:
    """A section in a section: its other fields stay as they are given."""
    return {**given, **value} if isinstance(given, dict) and isinstance(value, dict) else value


def explain(error: ValidationError, model: type[BaseModel], prefix: str = "") -> str:
    """The first thing wrong, in one line: field, value, what to do."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in first["loc"])
    where = ".".join(part for part in (prefix, path) if part)
    if first["type"] == "extra_forbidden":
        known = _fields_at(model, first["loc"][:-1])
        return f"{where}: unknown field; {nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{where}: this field is required"
    message = first["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if first["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: {first['input']!r} is not valid; {message}"


def _fields_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Field names of the model that a location leads to, as far as it can be followed."""
    current: Any = model
    members: list[type[BaseModel]] = []
    for part in location:
        field = getattr(current, "model_fields", {}).get(part)
        inner = [] if field is None else [field.annotation, *getattr(field.annotation, "__args__", ())]
        models = [t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)]
        # a location goes on with the tag of a union's member
        named = [m for m in members if "kind" in m.model_fields and m.model_fields["kind"].default == part]
        members = models or members
        current = named[0] if named else models[0] if models else current
    return [f.alias or name for name, f in current.model_fields.items()]


def _beginning(content: dict[str, Any]) -> dict[str, Any]:
    """Model and base, in which the model's own passes have come to stand before those of the base."""
    model = content.get("model")
    if not isinstance(model, dict) or not model.get("passes"):
        return {}
    own, rest = model["passes"], {name: value for name, value in model.items() if name != "passes"}
    if not isinstance(own, list) or "create" not in rest:
        raise UserError(f"model.passes: {own!r} is not valid; a list of passes, beside 'create'")
    base = content.get("base") or []
    if isinstance(base, dict):
        return {"model": rest, "base": {**base, "passes": [*own, *(base.get("passes") or [])]}}
    return {"model": rest, "base": [*own, *base] if isinstance(base, list) else base}


def _chain(value: Any, where: str) -> Any:
    """A chain may be written as a bare list of passes."""
    if value is None or isinstance(value, list):
        value = {"passes": value or []}
    if not isinstance(value, dict):
        raise UserError(
            f"{where}: {value!r} is not valid; a list of passes, or a mapping with 'from' and 'passes'"
        )
    entries = value.get("passes", [])
    if not isinstance(entries, list):
        raise UserError(f"{where}.passes: {entries!r} is not valid; a list of passes was expected")
    if len(entries) > MOST_PASSES:
        raise UserError(
            f"{where}.passes: {len(entries)} passes, and a chain has at most {MOST_PASSES}; begin a variant "
            "'from' this one for more"
        )
    passes = tuple(_pass(entry, f"{where}.passes.{i}") for i, entry in enumerate(entries))
    return {**value, "passes": passes}


def _pass(entry: Any, where: str) -> Pass:
    if isinstance(entry, Pass):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        raise UserError(f"{where}: {entry!r} is not valid; write  - name  or  - name: {{field: value}}")
    name, fields = next(iter(entry.items()))
    try:
        cls = pass_class(str(name))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not isinstance(fields or {}, dict):
        raise UserError(f"{where}.{name}: {fields!r} is not valid; fields of the pass were expected")
    try:
        return cls.model_validate(translated(str(name), fields or {})[1])
    except UserError as error:
        raise UserError(f"{where}.{name}.{error}") from None
    except ValidationError as error:
        raise UserError(explain(error, cls, f"{where}.{name}")) from None


def _read(source: str) -> dict[str, Any]:
    path = at_home(source)
    if source in shipped():
        text = (files("compress.run.recipes") / f"{source}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        text = read_text(path, RECIPE_BYTES)
    else:
        raise UserError(
            f"recipe: '{source}' is neither a file nor a shipped recipe; {nearest(source, shipped())}"
        )
    content = parse_yaml(text, source)
    if not isinstance(content, dict):
        raise UserError(f"{source}: a recipe is a mapping with 'name', 'model', 'variants' ...")
    return content


def _override(content: dict[str, Any], text: str) -> None:
    path, equals, raw = text.partition("=")
    if not equals or not path:
        raise UserError(f"--set {text}: write  --set path.to.field=value")
    value = parse_yaml(raw, f"--set {text[:200]}", file=False)
    _spell_out(content)
    *parents, leaf = path.split(".")
    current: Any = content
    for part in parents:
        current = _enter(current, part, text)
    if isinstance(current, dict):
        current[leaf] = value
    elif isinstance(current, list):
        current[_entry(current, leaf, text)] = value if _is_index(leaf) else {leaf: value}
    else:
        raise UserError(f"--set {text}: '{leaf}' has no fields above it to set")


def _spell_out(content: dict[str, Any]) -> None:
    """Turn chains that are written as bare lists into mappings, so that one path leads to a pass."""
    variants = content.get("variants")
    for chains in (content, variants if isinstance(variants, dict) else {}):
        for name, chain in chains.items():
            if isinstance(chain, list) and (name == "base" or chains is variants):
                chains[name] = {"passes": chain}


def _enter(current: Any, part: str, text: str) -> Any:
    if isinstance(current, list):
        index = _entry(current, part, text)
        if isinstance(current[index], str):  # a pass without fields
            current[index] = {current[index]: {}}
        if not _is_index(part):
            current = current[index]
            current[part] = current[part] or {}
            return current[part]
        return current[index]
    if not isinstance(current, dict):
        raise UserError(f"--set {text}: '{part}' has no fields above it to set")
    if current.get(part) is None:
        current[part] = {}
    return current[part]


def _is_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 6


def _entry(entries: list[Any], part: str, text: str) -> int:
    """The index of a pass in a chain: numbered, or named."""
    if _is_index(part) and int(part) < len(entries):
        return int(part)
    for index, entry in enumerate(entries):
        if part == entry or (isinstance(entry, dict) and part in entry):
            return index
    raise UserError(f"--set {text}: '{part}' is no entry of a list of {len(entries)}")
