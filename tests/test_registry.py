"""The registry: our passes, other packages' passes, and what happens when they clash."""

import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from compress.errors import UserError
from compress.passes.base import Pass
from compress.run import registry
from compress.run.recipe import Recipe


def plugin(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, registry.GROUP)


@pytest.fixture
def installed(monkeypatch):
    """Pretends that packages with these entry points are installed."""

    def install(*entries: EntryPoint) -> None:
        monkeypatch.setattr(
            registry, "entry_points", lambda *, group: entries if group == registry.GROUP else ()
        )

    return install


@pytest.fixture
def round_twice(monkeypatch):
    """A module with a pass, as another package would have it."""
    module = ModuleType("elsewhere.round_twice")

    class RoundTwice(Pass):
        """Round once, and again."""

        __module__ = "elsewhere.round_twice"
        kind = "quantize"
        times: int = 2

    module.RoundTwice, module.Other = RoundTwice, dict
    monkeypatch.setitem(sys.modules, "elsewhere", ModuleType("elsewhere"))
    monkeypatch.setitem(sys.modules, "elsewhere.round_twice", module)
    return RoundTwice


def test_names_are_those_of_the_files_and_every_one_has_a_pass(installed):
    installed()
    assert registry.names() == sorted(registry.names())
    assert "base" not in registry.names()
    for name in registry.names():
        found = registry.pass_class(name)
        assert issubclass(found, Pass)
        assert found.name() == name


def test_an_unknown_name_is_answered_with_the_nearest(installed):
    installed()
    with pytest.raises(UserError, match=r"pass 'quantise_gptq' is unknown; did you mean 'quantize_gptq'\?"):
        registry.pass_class("quantise_gptq")
    with pytest.raises(UserError, match="is unknown; known: distill, .*train"):
        registry.pass_class("zzzz")
    with pytest.raises(UserError, match="'base' is unknown"):
        registry.pass_class("base")


def test_a_plugin_is_found_listed_after_ours_and_runs_from_a_recipe(installed, round_twice, recipe_dict):
    installed(plugin("round_twice", "elsewhere.round_twice:RoundTwice"))
    assert registry.names()[-1] == "round_twice"
    assert registry.pass_class("round_twice") is round_twice
    recipe = Recipe.parse({**recipe_dict, "variants": {"v": [{"round_twice": {"times": 3}}]}})
    assert recipe.variants["v"].passes == (round_twice(times=3),)
    assert "round_twice" in recipe.to_yaml()


def test_a_plugin_with_the_name_of_our_pass_is_an_error(installed):
    installed(plugin("train", "elsewhere.train:Train"))
    for ask in (registry.names, lambda: registry.pass_class("train"), lambda: registry.pass_class("distill")):
        with pytest.raises(
            UserError, match=r"pass 'train' of elsewhere\.train:Train has the name of another"
        ):
            ask()


def test_two_plugins_of_one_name_are_an_error(installed):
    installed(plugin("round_twice", "one.round_twice:R"), plugin("round_twice", "two.round_twice:R"))
    with pytest.raises(UserError, match=r"pass 'round_twice' of two\.round_twice:R .*rename its entry point"):
        registry.names()


def test_one_plugin_seen_twice_on_the_path_is_none(installed, round_twice):
    entry = plugin("round_twice", "elsewhere.round_twice:RoundTwice")
    installed(entry, entry)
    assert registry.pass_class("round_twice") is round_twice


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("round_twice", "elsewhere.absent:R", r"elsewhere\.absent:R cannot be imported \("),
        ("round_twice", "elsewhere.round_twice:Absent", "cannot be imported"),
        ("round_twice", "elsewhere.round_twice:Other", r"is not a subclass of compress\.passes\.base\.Pass"),
        (
            "round_once",
            "elsewhere.round_twice:RoundTwice",
            "its module is called 'round_twice'; they must agree",
        ),
    ],
)
def test_a_plugin_that_is_no_pass(installed, round_twice, name, value, match):
    installed(plugin(name, value))
    assert name in registry.names()  # listing imports nothing
    with pytest.raises(UserError, match=f"pass '{name}': .*{match}|pass '{name}': {match}"):
        registry.pass_class(name)


def test_listing_names_imports_no_pass(installed):
    installed(plugin("broken", "elsewhere.broken:Broken"))
    before = set(sys.modules)
    registry.names()
    assert not {m for m in set(sys.modules) - before if m.startswith("compress.passes.")}
