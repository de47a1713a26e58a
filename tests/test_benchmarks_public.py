"""Benchmarks and the notebook do what a user can: they touch public names of compress and nothing else."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import compress

ROOT = Path(__file__).parent.parent
SCRIPTS = [*sorted((ROOT / "benchmarks").rglob("*.py")), *sorted((ROOT / "notebooks").glob("*.ipynb"))]
MODULES = {"compress", "compress.passes.base"}  # those that may be imported from
NAMES = {*compress.__all__, "__file__"}


def source(path: Path) -> str:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def private(text: str) -> list[str]:
    """What a script uses of compress that is not public, and underscored names of others' values."""
    nodes = list(ast.walk(ast.parse(text)))
    found: list[str] = []
    package, others = set(), set()  # names by which compress, and other modules, are known
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                if root != "compress":
                    others.add(alias.asname or root)
                    continue
                package.add(alias.asname or root)
                found += [alias.name] if alias.name not in MODULES else []
        elif isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "compress":
            public = NAMES if node.module == "compress" else {a.name for a in node.names if a.name[0] != "_"}
            names = {alias.name for alias in node.names} - (public if node.module in MODULES else set())
            found += [f"{node.module}.{name}" for name in names]
    return found + list(_attributes(nodes, package, others))


def _attributes(nodes: list[ast.AST], package: set[str], others: set[str]) -> Iterator[str]:
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    own |= {a.attr for a in attributes if isinstance(a.ctx, ast.Store) and ast.unparse(a.value) == "self"}
    for node in attributes:
        whole = ast.unparse(node)
        root, *path = whole.split(".")
        if root in package and all(part.isidentifier() for part in path):
            # `compress.run.recipe`: what lies in a folder is not public because its verb is
            inner = len(path) > 1 and not path[0][0].isupper() and path[:2] != ["passes", "base"]
            if isinstance(node.ctx, ast.Store) or path[0] not in NAMES or inner:
                yield whole
        elif node.attr[0] == "_" and node.attr[-2:] != "__" and node.attr not in own and root not in others:
            yield whole


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_public_names(path: Path) -> None:
    assert private(source(path)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from compress.measure.worker import serve", ["compress.measure.worker.serve"]),
        ("from compress import Bundle, nothing", ["compress.nothing"]),
        ("from compress.passes.base import _hidden", ["compress.passes.base._hidden"]),
        ("import compress.api", ["compress.api"]),
        ("import compress as c\nc.api.run(1)", ["c.api.run", "c.api"]),
        (
            "import compress\ncompress.run.recipe.shipped()",
            ["compress.run.recipe.shipped", "compress.run.recipe"],
        ),
        ("import compress\ncompress.load = print", ["compress.load"]),
        ("import compress\nb = compress.load('x')\nb._write(1)", ["b._write"]),
        ("from compress import Worker\nclass W(Worker):\n    def f(self): return self._name", ["self._name"]),
        ("import compress\ncompress.Bundle.load('x')\ncompress.__file__", []),
        ("import torch\ntorch.cpu._is_avx512_bf16_supported()", []),
        ("class A:\n    def f(self): self._x = 1\n    def g(self): return self._x", []),
        ("from compress.passes.base import Pass, linear_layers", []),
    ],
)
def test_what_is_not_public_is_seen(text: str, found: list[str]) -> None:
    assert sorted(private(text)) == sorted(found)


def test_tokens_that_are_cut_already():
    rows = np.arange(24).reshape(3, 8)
    data = compress.TextData.of_tokens(8, train=rows.ravel(), calibration=rows)
    assert (data.window, data.train.tolist()) == (8, list(range(24)))
    assert data.calibration.tokens.dtype == np.int32
    assert data.calibration.tokens.tolist() == rows.tolist()
    assert data.heldout.tokens.shape == data.evaluation.tokens.shape == (0, 8)
    # SHA-256 of 0 .. 23 as little-endian int32
    assert data.train_sha256 == data.calibration.sha256 != data.heldout.sha256


def test_a_pass_takes_tokens_as_they_are(bundle):
    rows = np.random.default_rng(0).integers(0, bundle.model.config.vocab_size, (4, 32))
    step = compress.PruneWanda(sparsity=0.5)
    one = bundle.apply(step, text=compress.TextData.of_tokens(32, calibration=rows))
    other = bundle.apply(step, text=compress.TextData.of_tokens(32, calibration=rows[:, ::-1]))
    assert any(not one.masks[name].equal(other.masks[name]) for name in one.masks)
    with pytest.raises(compress.UserError, match="text: prune_wanda needs calibration tokens"):
        bundle.apply(step, text=compress.TextData.of_tokens(32, heldout=rows))
