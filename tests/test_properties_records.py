"""Records and recipes: any that is valid comes back from disk as it was; what is not is refused in a line."""

import json
import math
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from compress.errors import UserError
from compress.formats import Format
from compress.formats.registry import FORMATS
from compress.measure.quality import Scores, summarise
from compress.records.base import Record
from compress.records.flips import FlipBook
from compress.records.manifest import Manifest, PassRecord
from compress.records.protocol import MeasureProtocol
from compress.records.results import Result, StepResult, read_results, write_results
from compress.records.run import RunRecord, SampleBook
from compress.run.recipe import Recipe, load_recipe
from compress.run.registry import names, pass_class

few = settings(max_examples=25)
RECORDS = [Manifest, RunRecord, SampleBook, FlipBook, Result, StepResult, PassRecord]

# what YAML or JSON could take for something else, and what breaks lines
HARD = ["", "null", "~", "yes", "1e5", "0x10", "1_000", ".nan", "12:30:45", "2001-01-01", "<<", "=", "- a",
        "a: b", "#", "'", '"', "\\", "\r\n", "\u2028", "\x85", "\x00", "\x1b[31m", "\U0001f600", "%s", "{}",
        "a" * 300]  # fmt: skip
TEXTS = st.sampled_from(HARD) | st.text(max_size=8)
WHOLE = st.integers(-(2**63), 2**63 - 1) | st.sampled_from([0, 2**31, 2**53 + 1])
FLOATS = st.floats() | st.sampled_from([0.0, -0.0, 5e-324, 1.7e308, math.inf, -math.inf, math.nan, 0.1])
VALUES = st.recursive(
    st.none() | st.booleans() | WHOLE | FLOATS | TEXTS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXTS, inner, max_size=2),
    max_leaves=3,
)


Nested = Callable[[type[BaseModel]], st.SearchStrategy[Any]]


def of(kind: Any, field: FieldInfo | None = None, nested: Nested | None = None) -> st.SearchStrategy[Any]:
    """What a field of this type may hold, between its bounds; `nested` makes what is a record itself."""
    bounds = {
        name: getattr(part, name)
        for part in (field.metadata if field else ())
        for name in ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern")
        if getattr(part, name, None) is not None
    }
    origin, inside = get_origin(kind), get_args(kind)
    if kind is Any:
        return VALUES
    if kind is bool:
        return st.booleans()
    if kind is int:
        low = bounds.get("ge", bounds.get("gt", -1) + 1 if "gt" in bounds else -(2**40))
        high = bounds.get("le", bounds["lt"] - 1 if "lt" in bounds else low + 2**40)
        return st.integers(low, high)
    if kind is float:
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        if low is None and high is None:
            return FLOATS.filter(math.isfinite)
        return st.floats(low, high, exclude_min="gt" in bounds, exclude_max="lt" in bounds, allow_nan=False)
    if kind is str:
        if "pattern" in bounds:
            return st.from_regex(bounds["pattern"], fullmatch=True)
        return TEXTS.filter(lambda text: len(text) >= bounds.get("min_length", 0))
    if origin is Literal:
        return st.sampled_from(inside)
    if origin in (Union, types.UnionType):
        return st.one_of(*(of(each, field, nested) for each in inside))
    if kind is type(None):
        return st.none()
    if origin in (list, tuple) and (origin is list or inside[-1] is Ellipsis):
        return st.lists(of(inside[0], None, nested), max_size=2, min_size=bounds.get("min_length", 0)).map(
            origin
        )
    if origin is tuple:
        return st.tuples(*map(of, inside))
    if origin is dict:
        return st.dictionaries(of(inside[0]), of(inside[1]), max_size=2)
    if origin is Annotated:
        own = next((part for part in inside[1:] if isinstance(part, FieldInfo)), field)
        return of(inside[0], own, nested)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return (nested or valid)(kind)
    raise NotImplementedError(kind)


def plain(kind: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Some fields of a nested value, as YAML would give them; whether they go together is not asked."""
    if issubclass(kind, Format):
        return st.sampled_from([each().model_dump() for each in FORMATS if issubclass(each, kind)])
    return st.fixed_dictionaries({}, optional={
        name: of(field.annotation, field, plain) for name, field in kind.model_fields.items()
    })  # fmt: skip


def valid(kind: type[BaseModel]) -> st.SearchStrategy[Any]:
    """A value of a record, each field as its type allows."""
    return st.fixed_dictionaries(
        {name: of(field.annotation, field) for name, field in kind.model_fields.items()}
    ).map(lambda values: kind(**values))


def same(a: Any, b: Any) -> bool:
    """Equal, NaN being NaN, and 1 no 1.0."""
    return repr(a) == repr(b)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize("kind", RECORDS)
def test_any_record_comes_back_from_disk_as_it_was(kind, folder):
    @few
    @given(valid(kind))
    def check(record):
        record.write(folder / "r.json")
        found = kind.read(folder / "r.json")
        assert same(found, record)
        found.write(folder / "s.json")
        assert (folder / "s.json").read_bytes() == (folder / "r.json").read_bytes()
        assert not list(folder.glob("*.partial"))

    check()


@few
@given(results=st.lists(valid(Result), max_size=3))
def test_lines_come_back_as_they_were_one_each(folder, results):
    write_results(folder / "results.jsonl", results)
    assert len((folder / "results.jsonl").read_bytes().splitlines()) == len(results)
    assert same(read_results(folder / "results.jsonl"), results)


@pytest.mark.parametrize("kind", RECORDS)
def test_fields_that_are_unknown_or_missing_or_of_another_type_are_refused(kind, folder):
    fields = [name for name, field in kind.model_fields.items() if field.is_required()]

    @settings(max_examples=10)
    @given(valid(kind), st.sampled_from(["more", "wrong", "missing"]), st.sampled_from(fields))
    def check(record, what, name):
        content = json.loads(record.model_dump_json())
        if what == "more":
            content["no_such_field"], name = 1, "no_such_field"
        elif what == "wrong":
            content[name] = {"an": ["object"]} if kind.model_fields[name].annotation is not dict else 3
        else:
            del content[name]
        if what == "wrong" and get_origin(kind.model_fields[name].annotation) is dict:
            return  # any object is right
        (folder / "r.json").write_text(json.dumps(content), encoding="utf-8")
        with pytest.raises(UserError, match=rf"r\.json: not a {kind.__name__} of this version \({name}") as e:
            kind.read(folder / "r.json")
        assert "\n" not in str(e.value)

    check()


@given(
    st.sampled_from(RECORDS), st.text(max_size=30) | st.sampled_from(["[]", "3", "{", "null", '""', "{}x"])
)
def test_what_is_no_record_is_refused_in_a_line(folder, kind, text):
    (folder / "r.json").write_bytes(text.encode("utf-8"))
    with pytest.raises(UserError, match=rf"r\.json: not a {kind.__name__} of this version"):
        kind.read(folder / "r.json")


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_no_finite_number_is_no_measurement_and_in_notes_never_null(value, folder):
    with pytest.raises(ValidationError, match="finite"):
        StepResult(variant="v", step_index=0, pass_name="p", nll=value)
    line = Result(
        variant="v", runtime="torch", device="cpu", artifact="a", load_seconds=0.5, machine={"x": value}
    )
    write_results(folder / "results.jsonl", [line])
    assert same(read_results(folder / "results.jsonl"), [line])
    written = (folder / "results.jsonl").read_text()
    assert same(json.loads(written)["machine"]["x"], value)
    (folder / "results.jsonl").write_text(written.replace("0.5", json.dumps(value)))
    with pytest.raises(UserError, match=r"results\.jsonl:1: .*load_seconds: .*finite"):
        read_results(folder / "results.jsonl")


def test_a_field_that_is_given_twice_is_refused(folder):
    step = StepResult(variant="v", step_index=0, pass_name="p").as_json(folder)
    (folder / "r.json").write_text(step[:-1] + ',"step_index":1}')
    with pytest.raises(UserError, match=r"r\.json: not a StepResult .*step_index"):
        StepResult.read(folder / "r.json")
    line = Result(variant="v", runtime="torch", device="cpu", artifact="a").as_json(folder)
    (folder / "results.jsonl").write_text(line[:-1] + ',"variant":"w"}\n')
    with pytest.raises(UserError, match=r"results\.jsonl:1: .*variant"):
        read_results(folder / "results.jsonl")


def test_names_that_no_file_of_text_holds_are_refused_and_the_old_file_stays(folder):
    good = StepResult(variant="v", step_index=0, pass_name="p")
    good.write(folder / "r.json")
    bad = Result(variant="v", runtime="torch", device="cpu", artifact="caf\udce9")
    with pytest.raises(UserError, match=r"results\.jsonl: cannot be written as UTF-8 .*; rename"):
        write_results(folder / "results.jsonl", [bad])
    with pytest.raises(UserError, match=r"r\.json: cannot be written as UTF-8"):
        bad.write(folder / "r.json")
    assert StepResult.read(folder / "r.json") == good


@pytest.mark.parametrize(("nats", "perplexity"), [(700.0, math.exp(700.0)), (800.0, None), (0.0, 1.0)])
def test_a_perplexity_beyond_a_float_is_absent_and_the_loss_is_there(nats, perplexity):
    found = summarise(Scores([10 * nats] * 2, [10, 10]), None, text_bytes=40, seed=0)
    assert found.nll == nats
    assert found.perplexity == perplexity


def test_every_kind_of_record_is_frozen_and_takes_no_more_fields():
    kinds = [each for each in Record.__subclasses__() if each.__module__.startswith("compress")]
    assert len(kinds) > 10
    assert all(k.model_config["frozen"] and k.model_config["extra"] == "forbid" for k in kinds)


@st.composite
def recipes(draw: st.DrawFn) -> dict[str, Any]:
    """Passes with one field or two unlike their defaults; texts that YAML could take for something else."""

    def step() -> dict[str, Any]:
        name = draw(st.sampled_from(names()))
        fields = pass_class(name).model_fields
        chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True)) if fields else []
        chosen += [n for n, field in fields.items() if field.is_required() and n not in chosen]
        return {name: {field: draw(of(fields[field].annotation, fields[field], plain)) for field in chosen}}

    letters = st.text("abcxyz019._-", min_size=1, max_size=6).map(lambda text: f"v{text}w")
    variants = draw(st.lists(letters, min_size=1, max_size=3, unique=True))
    measure = draw(valid(MeasureProtocol))
    return {
        "name": draw(letters),
        "description": draw(TEXTS),
        "seed": draw(st.integers(0, 2**31 - 1)),
        "model": {"checkpoint": draw(TEXTS.filter(lambda text: not text.startswith("~")))},
        "report": {"prompt": draw(TEXTS.filter(len))},
        "measure": measure.model_dump(),
        "variants": {
            name: {
                "from": draw(st.sampled_from([None, "base", *variants[:i]])),
                "passes": [step() for _ in range(draw(st.integers(0, 2)))],
            }
            for i, name in enumerate(variants)
        },
    }


@few
@given(content=recipes())
def test_a_recipe_that_is_taken_comes_back_from_yaml_as_it_was(folder, content):
    try:
        recipe = Recipe.parse(content)
    except UserError:
        return
    text = recipe.to_yaml()
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8", newline="")
    found = load_recipe(str(file))
    assert same(found, recipe)
    assert found.to_yaml() == text
    assert same(Recipe.parse(yaml.safe_load(text)), recipe)
    for name in recipe.ordered():
        for one, other in zip(recipe.chain(name).passes, found.chain(name).passes, strict=True):
            assert same(one.deciding_fields(), other.deciding_fields())
