"""A pass from another package: installed, found by its entry point, run from a recipe."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import invoke, python, refused, tree, write_recipe, write_text
from training_set import equal, weights

from compress.errors import UserError
from compress.run.registry import pass_class
from compress.run.store import STEPS, pass_version

PROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"

[project]
name = "compress-soften"
version = "1.0"

[project.entry-points."compress.passes"]
soften = "soften:Soften"

[tool.setuptools]
py-modules = ["soften"]
"""
# as the README shows it: a pass in one file of at most 40 lines
MODULE = '''\
"""soften: makes the linear layers' weights smaller, which no one needs."""

from typing import ClassVar

import torch
from pydantic import Field

from compress.passes.base import Pass, linear_layers


class Soften(Pass):
    """Multiply the weights of the selected linear layers by a factor."""

    kind: ClassVar = "prune"
    not_after: ClassVar = frozenset({"quantize"})

    factor: float = Field(0.9, gt=0, le=1, description="what each weight is multiplied by")
    select: tuple[str, ...] = ("*",)

    def layers(self, model):
        return linear_layers(model, self.select)

    @torch.no_grad()
    def __call__(self, bundle, context):
        result = bundle.clone()
        for name in self.layers(result.model):
            result.model.get_submodule(name).weight.mul_(self.factor)
        return result.evolve(notes={"factor": self.factor})
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the package in it, as pip installs it."""
    source, target = tmp_path_factory.mktemp("soften"), tmp_path_factory.mktemp("site")
    (source / "pyproject.toml").write_text(PROJECT)
    (source / "soften.py").write_text(MODULE)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index",
         "--disable-pip-version-check", "--target", str(target), str(source)],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return target


def test_the_module_is_as_short_as_promised():
    assert len(MODULE.splitlines()) <= 40


def test_an_installed_pass_runs_from_a_recipe(site, tmp_path):
    text = write_text(tmp_path / "text")
    recipe = write_recipe(
        tmp_path / "tiny.yaml", text, base=[{"soften": {"factor": 0.5, "select": ["*.mlp.*"]}}]
    )
    done = python("-m", "compress", "run", recipe, "-o", tmp_path / "run", "--no-measure", path=site)
    assert done.returncode == 0, done.stderr
    steps = json.loads((tmp_path / "run" / "base" / "manifest.json").read_text())["lineage"]["steps"]
    assert [step["name"] for step in steps] == ["create", "soften"]
    assert steps[-1]["config"] == {"factor": 0.5, "select": ["*.mlp.*"]}
    assert steps[-1]["notes"] == {"factor": 0.5}


@pytest.fixture
def importable(site, monkeypatch):
    """The installed package in this process."""
    monkeypatch.syspath_prepend(str(site))
    yield
    sys.modules.pop("soften", None)


@pytest.mark.usefixtures("importable")
def test_an_installed_pass_is_listed_with_its_fields():
    assert "Multiply the weights of the selected linear layers by a factor." in invoke("passes").out
    shown = invoke("passes", "soften").out
    assert "number > 0, <= 1" in shown
    assert "what each weight is multiplied by" in shown


@pytest.mark.usefixtures("importable")
def test_a_change_of_the_plugin_changes_the_fingerprint():
    step = pass_class("soften")()
    before = pass_version(step)
    file = Path(sys.modules["soften"].__file__)
    for text, changes in ((MODULE + "# changed\n", False), (MODULE + "CHANGED = 1\n", True)):
        file.write_text(text)
        importlib.reload(sys.modules["soften"])
        assert (pass_version(step) != before) == changes


def broken(site: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, target: str) -> None:
    """Put a module and the metadata of an installed package into a folder that Python searches."""
    (site / f"{name}.py").write_text(module)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[compress.passes]\n{name} = {target}\n")
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("failing", "import nothing_of_this_name", "cannot be imported (No module named"),
        ("no_pass", "class Thing: pass", "is not a subclass of compress.passes.base.Pass"),
        ("quantize_gptq", "class Thing: pass", "has the name of another pass; rename its entry point"),
    ],
)
def test_a_plugin_that_cannot_be_used(tmp_path, monkeypatch, name, module, words):
    text = write_text(tmp_path / "text", documents=1)
    recipe = write_recipe(tmp_path / "tiny.yaml", text, base=[name])
    broken(tmp_path, monkeypatch, name, module, f"{name}:Thing")
    assert words in refused("run", recipe, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def leaver(tmp_path, monkeypatch):
    """An installed pass that leaves the program in the middle of its work, or when it is asked for layers."""
    start, indent = "def layers(self, model):\n", " " * 8
    asked = f"{start}{indent}if self.factor == 0.25: raise SystemExit\n"
    left = f'{indent}(context.workdir / "half").touch()\n{indent}raise SystemExit(0)\n'
    module = MODULE.replace("Soften", "Leaver").replace(start, asked) + left
    module = module.replace(f"{indent}return result", f"{indent}result")  # which leaves before it returns
    broken(tmp_path, monkeypatch, "leaver", module, "leaver:Leaver")
    yield
    sys.modules.pop("leaver", None)


@pytest.mark.usefixtures("leaver")
def test_a_pass_that_leaves_the_program_ends_the_command_in_one_line(tmp_path, bundle):
    text, run = write_text(tmp_path / "text", documents=20), tmp_path / "run"
    recipe = write_recipe(tmp_path / "tiny.yaml", text, base=[], variants={"a": ["leaver"]})
    for _ in range(2):  # nothing is taken for finished
        line = refused("run", recipe, "-o", run)
        assert line == "error: a 1/1 leaver: the pass left the program (0); mend it"
        shown = {path.name for path in run.iterdir() if not path.name.startswith(".")}
        assert shown == {"recipe.yaml", "evaluation.npy", "base"}
        (step,) = (run / STEPS).iterdir()  # the base's, whole
        assert tree(step) == tree(run / "base")
    before = weights(bundle)
    with pytest.raises(UserError, match=r"^leaver: the pass left the program \(0\); mend it$"):
        bundle.apply(pass_class("leaver")())
    assert equal(before, weights(bundle))


@pytest.mark.usefixtures("leaver")
def test_a_pass_that_leaves_the_program_when_it_is_asked_does_so_in_one_line(tmp_path, bundle):
    text = write_text(tmp_path / "text", documents=20)
    recipe = write_recipe(tmp_path / "tiny.yaml", text, base=[{"leaver": {"factor": 0.25}}])
    line = refused("run", recipe, "-o", tmp_path / "run")
    assert line == "error: base.passes.0.leaver: the pass left the program (SystemExit); mend it"
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=r"^leaver: the pass left the program \(SystemExit\); mend it$"):
        bundle.apply(pass_class("leaver")(factor=0.25))
