"""What the README promises of itself, and the pass of docs/plugins.md; test_docs.py runs all their code."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_pages import ROOT, blocks
from report_records import Records
from training_set import tiny_bundle

import compress
from compress.artifact.bundle import Bundle
from compress.records.results import Result
from compress.records.run import Reference, RunRecord
from compress.run.pipeline import make
from compress.run.recipe import Recipe
from compress.run.registry import names, pass_class

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_to_the_end() -> None:
    assert len(README.encode()) <= 9 * 1024


def test_its_python_takes_ten_lines() -> None:
    (example,) = (b.text for b in blocks(ROOT / "README.md") if b.language == "python")
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 10


def test_its_table_has_every_pass_and_no_other() -> None:
    told = set(re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE))
    assert told == set(names())


def test_it_has_five_limits() -> None:
    limits = re.search(r"^## Limits\n(.*?)^\[All limits", README, re.DOTALL | re.MULTILINE)
    assert limits is not None
    assert len(re.findall(r"^- ", limits[1], re.MULTILINE)) == 5


def shown(language: str) -> str:
    """The first block of a language on the page about plugins."""
    return next(b.text for b in blocks(ROOT / "docs/plugins.md") if b.language == language)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The page's pass, installed as the page's package; gives its name."""
    source, declared = shown("python"), shown("toml")
    (name,) = tomllib.loads(declared)["project"]["entry-points"]["compress.passes"]
    package, site = tmp_path / "package", tmp_path / "site"
    package.mkdir()
    (package / f"{name}.py").write_text(source, encoding="utf-8")
    (package / "pyproject.toml").write_text(declared, encoding="utf-8")
    install = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(site)]
    subprocess.run([sys.executable, "-m", "pip", *install, str(package)], check=True, timeout=120)
    monkeypatch.syspath_prepend(str(site))
    yield name
    sys.modules.pop(name, None)


def test_pass_example_runs_from_a_recipe(plugin: str, tmp_path: Path, make_text: Path) -> None:
    tiny_bundle().save(tmp_path / "model")
    recipe = Recipe.parse(
        {
            "name": "plugged",
            "model": {"checkpoint": str(tmp_path / "model")},
            "data": {"text": str(make_text), "window": 16, "evaluation_windows": 2, "calibration_windows": 2,
                     "heldout_windows": 1},
            "variants": {"sparse": [{plugin: {"sparsity": 0.25}}], "int4": {"from": "sparse",
                         "passes": ["quantize_gptq"]}},
        }
    )  # fmt: skip
    run = tmp_path / "run"
    run.mkdir()
    make(recipe, run)
    sparse, int4 = Bundle.load(run / "sparse"), Bundle.load(run / "int4")
    assert sparse.lineage.steps[-1].config == {"sparsity": 0.25}
    layers = pass_class(plugin)().layers(sparse.model)
    assert set(sparse.masks) == set(layers)
    for name in layers:
        weight = sparse.model.get_submodule(name).weight
        assert int((weight == 0).sum()) == round(0.25 * weight.numel())
        # codes keep the zeros of the masks
        assert not int4.model.get_submodule(name).weight[weight == 0].any()


@pytest.fixture
def make_text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {i}: def alpha(x): return x + {i % 7}\n" for i in range(400)))
    return path


def test_a_pass_takes_at_most_forty_lines() -> None:
    assert len(shown("python").splitlines()) <= 40


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their files import each other by name."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


@pytest.mark.usefixtures("benchmarks")
def test_results_table_comes_from_records(records: Records) -> None:
    import readme_table

    record, results, _ = records
    assert isinstance(record, RunRecord)
    assert isinstance(results[0], Result)
    assert isinstance(record.references[0], Reference)
    text = readme_table.block(record, results)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(results) + len(record.references)
    assert len({row.count("|") for row in rows}) == 1
    for result, row in zip(results, rows[2:], strict=False):
        assert f"| {result.perplexity:.3f} |" in row
    once = readme_table.insert(README, text)
    assert text in once
    assert readme_table.insert(once, text) == once
    with pytest.raises(compress.UserError, match="results:begin"):
        readme_table.insert("no markers", text)


@pytest.mark.usefixtures("benchmarks")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_its_picture_is_drawn_from_what_was_measured(theme: str) -> None:
    import readme_picture
    from results_files import points

    found = readme_picture.marks(points(ROOT / "benchmarks/results/quantization.jsonl", readme_picture.MODEL))
    picture = (ROOT / f"docs/images/kl-{theme}.svg").read_text(encoding="utf-8")
    assert f"images/kl-{theme}.svg" in README
    assert readme_picture.digest(found) in picture, "run benchmarks/readme_picture.py"
    assert {mark.tool for mark in found} == set(readme_picture.COLOURS)
    assert picture.count("<text") > len(found), "text stays text"
    assert "#ffffff" not in picture, "the ground is transparent"


@pytest.mark.usefixtures("benchmarks")
def test_quantizers_table_is_what_the_benchmark_measured() -> None:
    import beside_others
    from results_files import points

    groups = points(ROOT / "benchmarks/results/quantization.jsonl", beside_others.MODEL)
    assert beside_others.block(groups) in (ROOT / "docs/results.md").read_text(encoding="utf-8")
    with pytest.raises(compress.UserError, match="4 bits: has no line"):
        beside_others.block([])
    for lines in groups:  # as if ours took more bytes than what they stand beside
        for line in lines:
            if line["tool"] == "ours":
                line["linear_bytes"] *= 2
    with pytest.raises(compress.UserError, match="ours: 4 bits: takes 114"):
        beside_others.block(groups)
