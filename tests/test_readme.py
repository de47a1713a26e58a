"""The README is run: its Python, its commands, its tree."""

import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from report_records import Records
from training_set import tiny_bundle

import compress
from compress.artifact.bundle import Bundle
from compress.cli.commands import app
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.forms import Forms
from compress.records.records import Reference, Result, RunRecord
from compress.run.pipeline import make
from compress.run.preflight import check_order
from compress.run.recipe import parse, shipped
from compress.run.registry import pass_class

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_api_example_runs_in_ten_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = blocks("python")[0]
    assert sum(bool(line.strip()) for line in example.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    tiny_bundle(context=256).save(Path("runs/demo/base"))
    # the smallest measurement that is still one: the example's protocol is for a real model
    monkeypatch.setattr(compress, "Recipe", _quick_recipe)
    exec(compile(example, "README.md", "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-3:-1]] == ["base", "int4"]
    assert printed[-1] == "('checkpoint', 'quantize_gptq')"
    assert Path("runs/mine/report.html").is_file()


def test_generation_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_artifact(tiny_bundle(context=256), Path("runs/demo/base/onnx"), Forms())
    exec(compile(blocks("py")[0], "README.md", "exec"), {"__name__": "readme"})
    assert float(capsys.readouterr().out.splitlines()[-1].split()[0]) > 0


def _quick_recipe(data: dict[str, object], **fields: object) -> object:
    few = {"window": 32, "evaluation_windows": 4, "calibration_windows": 4, "heldout_windows": 1}
    quick = {"prefill_tokens": 16, "rounds": 1}
    report = {"sample_tokens": 4}
    return compress.recipe.Recipe(data={**data, **few}, measure=quick, report=report, **fields)


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The README's pass, installed as the README's package; gives its name."""
    source, declared = blocks("python")[1], blocks("toml")[0]
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
    recipe = parse(
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
    assert len(blocks("python")[1].splitlines()) <= 40


def test_recipe_example_is_valid() -> None:
    examples = list(map(yaml.safe_load, blocks("yaml")))
    (whole,) = (example for example in examples if "model" in example)
    assert parse(whole).ordered()[-1] == "pruned-int4"
    for variants in examples:
        recipe = parse({**whole, **variants})
        assert set(variants["variants"]) <= set(recipe.ordered())
        for name in recipe.ordered():
            check_order(recipe, name)


def test_commands_and_their_options_exist() -> None:
    code = re.findall(r"compress-lm ([^`\n]+)", README)
    assert {line.split()[0] for line in code} == set(COMMANDS), "README and commands differ"
    for line in code:
        name, *words = line.split("#")[0].split()
        known = {option for parameter in COMMANDS[name].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_shipped_recipes_are_named() -> None:
    for name in shipped():
        assert f"`{name}`" in README or f"recipes/{name}.yaml" in README


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake (demo|test|\w+)\b(?=`|  |$| PIP)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def tree() -> list[Path]:
    """Paths named in the annotated tree: two columns of indentation are one level."""
    (block,) = (b for b in blocks("text") if "  api.py" in b)
    paths: list[Path] = []
    parents: list[str] = []
    for line in block.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        parents = [*parents[:depth], line.split()[0]]
        paths.append(Path(*parents))
    return paths


def test_everything_in_the_tree_exists() -> None:
    assert [str(path) for path in tree() if not (ROOT / path).exists()] == []


def test_every_package_and_pass_is_in_the_tree() -> None:
    package = ROOT / "compress"
    shown = {ROOT / path for path in tree()}
    folders = {p.parent for p in package.glob("*/__init__.py")}
    passes = set((package / "passes").glob("[!_]*.py"))
    assert {str(p.relative_to(ROOT)) for p in (folders | passes) - shown} == set()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert "://" in target or (ROOT / target).exists(), target


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
def test_quantizers_table_is_what_the_benchmark_measured() -> None:
    import readme_quantizers
    from readme_table import insert
    from results_files import points

    groups = points(ROOT / "benchmarks/results/quantization.jsonl", readme_quantizers.MODEL)
    assert insert(README, readme_quantizers.block(groups), "quantizers") == README
    with pytest.raises(compress.UserError, match="4 bits: has no line"):
        readme_quantizers.block([])
    for lines in groups:  # as if ours took more bytes than what they stand beside
        for line in lines:
            if line["tool"] == "ours":
                line["linear_bytes"] *= 2
    with pytest.raises(compress.UserError, match="ours: 4 bits: takes 114"):
        readme_quantizers.block(groups)
