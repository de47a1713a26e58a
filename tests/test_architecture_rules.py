"""Who may know whom beside the floors of test_floors.py, and what importing costs."""

import ast
import os
import re
import subprocess
import sys
from functools import cache

import pytest
from test_floors import FILES, ROOT, imports

MAKING = ("passes", "run", "layerwise", "structured", "training", "export")
TELLING = ("measure", "report", "generation")


def members(*folders: str) -> list[str]:
    return [module for module in FILES if module.split(".")[0] in folders]


@cache
def reached(module: str) -> frozenset[str]:
    """Everything a module imports, directly or not."""
    direct = imports(module)
    return frozenset(direct).union(*(reached(target) for target in direct))


def test_the_rules_see_the_imports():
    assert "passes.base" in imports("passes.train")
    assert "artifact.bundle" in imports("passes.base")  # for type checkers only
    assert "report.units" in imports("report.rows")  # from compress.report import units
    assert "runtimes.torch_runtime" in imports("runtimes.__init__")  # inside a function


def test_making_and_telling_meet_in_records():
    assert not {t for m in members(*MAKING) for t in imports(m)} & set(members(*TELLING))
    assert not {t for m in members(*TELLING) for t in reached(m)} & set(members(*MAKING))


def test_the_report_stands_on_records_only():
    found = {target for module in members("report") for target in imports(module)}
    assert found <= {*members("report", "records"), "errors"}


def test_no_pass_imports_another():
    for module in members("passes"):
        assert imports(module) & set(members("passes")) <= {"passes.__init__", "passes.base"}, module


def test_solvers_are_pure():
    assert {t for m in members("solvers") for t in imports(m)} <= {*members("solvers"), "errors"}


def test_the_root_is_a_hall():
    assert len([entry for entry in ROOT.iterdir() if entry.is_file()]) <= 9


def test_nothing_imports_what_stands_beside_the_package():
    for module, file in FILES.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module}: imports are absolute"
                assert str(node.module).partition(".")[0] not in ("benchmarks", "notebooks", "tests"), module


def test_files_that_texts_name_exist():
    places = [ROOT, *(ROOT.parent / name for name in ("benchmarks", "docs", "tests"))]
    files = [file.relative_to(ROOT.parent) for place in places for file in place.rglob("*.*")]
    known = [f"/{file.as_posix()}" for file in files]
    for module, file in FILES.items():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        texts = "\n".join(ast.get_docstring(node) or "" for node in nodes if isinstance(node, kinds))
        for named in re.findall(r"(?<![\w./*-])\w[\w/-]*\.py\b|\bdocs/[\w/-]+\.md\b", texts):
            assert any(path.endswith(f"/{named}") for path in known), f"{module}: {named}"


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import compress", {"torch", "transformers", "onnx", "onnxruntime", "numpy"}),
        ("import compress.report", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("import compress.runtimes.onnx_runtime, compress.measure.worker", {"torch", "transformers", "onnx"}),
        ("import compress.runtimes.onnx_encoder", {"torch", "transformers", "onnx"}),
        ("import compress.cli.commands", {"torch", "transformers", "onnx", "onnxruntime"}),
    ],
)
def test_importing_costs_no_library_that_is_not_needed(statement, unwanted):
    code = f"{statement}; import sys; print(*sorted({unwanted!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == ""
