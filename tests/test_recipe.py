"""Recipes: what is wrong is told in one line; what is right comes back from YAML as it was."""

import re

import pytest
import yaml

from compress.errors import UserError
from compress.run.recipe import Recipe, load_recipe, shipped
from compress.run.registry import names


@pytest.fixture
def write(recipe_dict, tmp_path):
    """Writes the tiny recipe with some of its sections changed; returns the path."""

    def write(**changes):
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**recipe_dict, **changes}), encoding="utf-8")
        return str(file)

    return write


def refused(source, *overrides, match):
    with pytest.raises(UserError, match=match) as caught:
        load_recipe(source, list(overrides))
    assert "\n" not in str(caught.value)


class TestShipped:
    def test_there_are_some(self):
        assert {"demo", "smollm2"} <= set(shipped())

    @pytest.mark.parametrize("name", shipped())
    def test_every_one_loads_and_comes_back_equal(self, name, tmp_path):
        given = {} if name == "demo" else {"model": {"checkpoint": "x"}}
        recipe = load_recipe(name, **given)
        assert recipe.name == name
        assert recipe.description
        assert recipe.variants
        (tmp_path / "resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        assert load_recipe(str(tmp_path / "resolved.yaml")) == recipe


class TestRoundTrip:
    def test_the_resolved_recipe_is_equal_and_spells_out_every_default(self, recipe_dict):
        recipe = Recipe.parse(recipe_dict)
        text = recipe.to_yaml()
        assert Recipe.parse(yaml.safe_load(text)) == recipe
        assert Recipe.parse(yaml.safe_load(text)).to_yaml() == text
        assert "clip_search" in text
        assert "from: pruned" in text

    def test_every_pass_with_its_defaults(self, recipe_dict):
        required = {
            "prune_structured": {"neurons": 0.25},
            "quantize_auto": {"bits_per_weight": 4.5},
        }
        chain = [{name: required.get(name, {})} for name in names()]
        recipe = Recipe.parse({**recipe_dict, "variants": {"all": chain}})
        assert [step.name() for step in recipe.variants["all"].passes] == names()
        assert Recipe.parse(yaml.safe_load(recipe.to_yaml())) == recipe

    def test_short_forms_mean_the_same(self, recipe_dict):
        spellings = [
            ["quantize_round"],
            [{"quantize_round": None}],
            [{"quantize_round": {}}],
            {"passes": [{"quantize_round": {"format": {"kind": "int8"}}}]},
            {"from": None, "passes": [{"quantize_round": {"format": "int8"}}]},
        ]
        recipes = [Recipe.parse({**recipe_dict, "variants": {"v": chain}}) for chain in spellings]
        assert all(recipe == recipes[0] for recipe in recipes)
        assert Recipe.parse({**recipe_dict, "base": None}).base.passes == ()


class TestTree:
    def test_parents_come_before_children(self, recipe_dict):
        variants = {"c": {"from": "b"}, "b": {"from": "a"}, "a": {}, "d": {"from": "base"}}
        recipe = Recipe.parse({**recipe_dict, "variants": variants})
        ordered = recipe.ordered()
        assert ordered[0] == "base"
        assert ordered.index("a") < ordered.index("b") < ordered.index("c")
        assert recipe.ancestry("c") == ["base", "a", "b", "c"]

    @pytest.mark.parametrize(
        ("variants", "match"),
        [
            ({"a": {"from": "b"}, "b": {"from": "a"}}, r"variants\.\w\.from: goes in a circle \("),
            ({"a": {"from": "a"}}, r"variants\.a\.from: goes in a circle \(a <- a\)"),
            ({"pruned": {}, "b": {"from": "prunde"}}, r"'prunde' is no variant; did you mean 'pruned'\?"),
            ({"base": {}}, r"variants\.base: the name is taken"),
            ({"a/b": {}}, "variants: 'a/b' is not usable as the name of a folder"),
            ({".hidden": {}}, "is not usable as the name of a folder"),
            ({"..": {}}, "is not usable as the name of a folder"),
            ({"a": 5}, r"variants\.a: 5 is not valid; a list of passes"),
            (["a"], r"variants: \['a'\] is not valid"),
        ],
    )
    def test_what_is_no_tree(self, write, variants, match):
        refused(write(variants=variants), match=match)

    def test_the_base_has_no_parent(self, write):
        refused(write(base={"from": "pruned", "passes": []}), match=r"base\.from: .*the base has no parent")


class TestMistakes:
    @pytest.mark.parametrize(
        ("chain", "match"),
        [
            (
                ["quantize_gtpq"],
                r"variants\.v\.passes\.0: pass 'quantize_gtpq' .*did you mean 'quantize_gptq'",
            ),
            (["train", "zzz"], r"variants\.v\.passes\.1: pass 'zzz' is unknown; known: distill, "),
            ([{"prune_magnitude": {"sparsty": 0.5}}], r"0\.prune_magnitude\.sparsty: unknown.*'sparsity'"),
            ([{"quantize_gptq": {"format": {"kind": "int4", "gruop": 64}}}], r"gruop: unknown.*'group'"),
            ([{"quantize_gptq": {"format": "int7"}}], r"quantize_gptq\.format: .*int7"),
            ([{"quantize_hqq": {"format": "nf4"}}], r"quantize_hqq\.format: nf4 has fixed steps.*int4"),
            ([{"quantize_gptq": {"format": {"kind": "int4", "group": 3}}}], r"group: 3 is not valid.*16"),
            ([{"prune_magnitude": {"sparsity": "half"}}], r"sparsity: 'half' is not valid; input should be"),
            ([{"prune_magnitude": {"sparsity": 1.0}}], r"sparsity: 1\.0 is not valid; .*less than 1"),
            ([{"prune_magnitude": {"pattern": "4:2"}}], r"'4:2' removes nothing"),
            ([{"prune_magnitude": {"pattern": "two"}}], r"pattern: 'two' is not valid"),
            ([{"prune_magnitude": {"select": []}}], r"select: \[\] is not valid"),
            ([{"prune_layers": {}}], r"prune_layers\.keep: this field is required"),
            ([{"train": 3}], r"passes\.0\.train: 3 is not valid; fields of the pass were expected"),
            ([{"train": {}, "distill": {}}], "write  - name"),
            ([3], r"passes\.0: 3 is not valid; write  - name"),
            ({"passes": "train"}, r"passes: 'train' is not valid; a list of passes"),
            ({"form": "base"}, r"variants\.v\.form: unknown field; did you mean 'from'"),
        ],
    )
    def test_in_a_chain(self, write, chain, match):
        refused(write(variants={"v": chain}), match=match)

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"dta": {}}, r"dta: unknown field; did you mean 'data'"),
            ({"data": {"windw": 8}}, r"data\.windw: unknown field; did you mean 'window'"),
            ({"data": {"window": 4}}, r"data\.window: 4 is not valid; .*greater than or equal to 8"),
            ({"data": {"window": "wide"}}, r"data\.window: 'wide' is not valid"),
            ({"data": {"window": 8.5}}, r"data\.window: 8\.5 is not valid"),
            ({"data": 5}, r"data: 5 is not valid"),
            ({"measure": {"repetitions": 3}}, r"measure\.repetitions: 3 is not valid.*30"),
            ({"seed": -1}, r"seed: -1 is not valid"),
            ({"name": "a/b"}, r"name: 'a/b' is not valid"),
            ({"model": {}}, r"model: give a checkpoint .* exactly one"),
            ({"model": {"checkpoint": "x", "create": {}}}, r"model: give a checkpoint .* exactly one"),
            ({"model": {"create": {"hidden": 30, "heads": 4}}}, r"model\.create: hidden=30 must be"),
            ({"model": {"create": {"preset": "5m"}}}, r"model\.create\.preset: '5m' is not valid.*'3m'"),
            ({"model": {"create": {"hiden": 64}}}, r"model\.create\.hiden: unknown.*'hidden'"),
        ],
    )
    def test_in_a_section(self, write, changes, match):
        refused(write(**changes), match=match)

    @pytest.mark.parametrize("name", ["name", "model"])
    def test_a_section_that_is_missing(self, recipe_dict, name):
        del recipe_dict[name]
        with pytest.raises(UserError, match=f"recipe: {name}: this field is required"):
            Recipe.parse(recipe_dict)

    def test_files_that_are_no_recipe(self, tmp_path):
        refused("dmeo", match=r"'dmeo' is neither a file nor a shipped recipe; did you mean 'demo'")
        file = tmp_path / "r.yaml"
        for content, match in (
            (b"name: [", r"r\.yaml:1: not valid YAML"),
            (b"- a\n", "a recipe is a mapping"),
            (b"", "a recipe is a mapping"),
            (b"name: caf\xe9\n", r"r\.yaml: is not UTF-8"),
        ):
            file.write_bytes(content)
            refused(str(file), match=match)

    def test_the_recipe_given_is_not_changed(self, recipe_dict):
        before = yaml.safe_dump(recipe_dict)
        Recipe.parse(recipe_dict)
        assert yaml.safe_dump(recipe_dict) == before


class TestOverrides:
    @pytest.mark.parametrize(
        ("override", "value"),
        [
            ("seed=7", lambda r: r.seed == 7),
            ("data.window=16", lambda r: r.data.window == 16),
            ("data.text=[a.txt, b.txt]", lambda r: r.data.text == ["a.txt", "b.txt"]),
            ("report.prompt=a=b", lambda r: r.report.prompt == "a=b"),
            ("measure.threads=null", lambda r: r.measure.threads is None),
            ("measure={threads: 2}", lambda r: r.measure.threads == 2),
            ("base.passes.0.train.tokens=64", lambda r: r.base.passes[0].tokens == 64),
            ("base.passes.train.tokens=1_000", lambda r: r.base.passes[0].tokens == 1000),
            ("base.passes.train={tokens: 32}", lambda r: r.base.passes[0].tokens == 32),
            ("base.passes=[]", lambda r: r.base.passes == ()),
            ("base=[]", lambda r: r.base.passes == ()),
            ("variants.pruned.passes.prune_magnitude.pattern='2:4'",
             lambda r: r.variants["pruned"].passes[0].pattern == "2:4"),
            ("variants.pruned-int4.passes.quantize_gptq.format.kind=int8",
             lambda r: r.variants["pruned-int4"].passes[0].format.bits == 8),
            ("variants.pruned-int4.from=base", lambda r: r.variants["pruned-int4"].parent == "base"),
            ("variants.pruned.passes.0=quantize_round",
             lambda r: r.variants["pruned"].passes[0].name() == "quantize_round"),
            ("variants.new=[quantize_round]", lambda r: list(r.variants)[-1] == "new"),
            ("variants={}", lambda r: r.variants == {}),
        ],
    )  # fmt: skip
    def test_any_field_can_be_set(self, write, override, value):
        if "format.kind" in override:  # a format written by its name has no fields to reach into
            source = write(variants={
                "pruned-int4": [{"quantize_gptq": {"format": {"kind": "int4", "group": 32}}}]})  # fmt: skip
        else:
            source = write()
        assert value(load_recipe(source, [override]))

    def test_a_pass_without_fields_gets_some(self, write):
        for path in ("passes.0.quantize_round.skip", "passes.quantize_round.skip"):
            recipe = load_recipe(
                write(variants={"v": ["quantize_round"]}), [f"variants.v.{path}=['*.up_proj']"]
            )
            assert recipe.variants["v"].passes[0].skip == ("*.up_proj",)

    def test_later_ones_win(self, write):
        assert load_recipe(write(), ["seed=1", "seed=2"]).seed == 2

    @pytest.mark.parametrize(
        ("override", "match"),
        [
            ("seed", r"--set seed: write  --set path\.to\.field=value"),
            ("=3", "write  --set"),
            ("seed=[", r"--set seed=\[: not valid YAML"),
            ("seed.x=3", "'x' has no fields above it to set|seed"),
            ("base.passes.9.train.tokens=3", r"'9' is no entry of a list of 1"),
            ("base.passes.distill.tokens=3", r"'distill' is no entry of a list of 1"),
            ("data.windw=3", r"data\.windw: unknown field; did you mean 'window'"),
            ("data.window=huge", r"data\.window: 'huge' is not valid"),
        ],
    )
    def test_what_cannot_be_set(self, write, override, match):
        refused(write(), override, match=match)

    def test_sections_replace_or_complete(self, write):
        recipe = load_recipe(write(), model={"checkpoint": "x/y"}, data={"text": "other.txt"})
        assert recipe.model.create is None
        assert (recipe.data.text, recipe.data.window) == ("other.txt", 32)
        with pytest.raises(UserError, match=re.escape("data: 5 is not valid")):
            load_recipe(write(data=5), data={"text": "other.txt"})


def test_a_chain_without_end_is_refused_by_its_length() -> None:
    with pytest.raises(
        UserError, match=r"^recipe: variants\.a\.passes: 999 passes, and a chain has at most 100"
    ):
        Recipe.parse({"name": "x", "model": {"checkpoint": "m"}, "variants": {"a": ["prune_wanda"] * 999}})
