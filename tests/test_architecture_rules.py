"""The direction of imports: two wings that meet only below, and no arrow that points up."""

import ast
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import compress

ROOT = Path(compress.__file__).parent

# What both wings may stand on: records, and foundations that know of neither.
SHARED = {
    *(
        "errors",
        "names",
        "processes",
        "progress",
        "records",
        "machine",
        "memory",
        "protocol",
        "tasks",
        "version",
        "vocabulary",
        "runtimes.base",
    ),
    # an export is checked in the runtime it is for
    *("runtimes.onnx_runtime", "runtimes.onnx_encoder", "runtimes.onnx_seq2seq"),
    *("runtimes.onnx_session", "runtimes.providers"),
}
MAKING = {
    *("search", "pipeline", "steps", "recipe", "registry", "passes", "calibration", "training", "solvers"),
    *("export", "architectures", "moments", "replay", "attention", "float32", "sequential"),
    *("sensitivity", "folding", "output_fisher"),
    *("input_statistics", "artifact_bytes", "allocation", "correction", "sparsify", "subcloning"),
    "pruning",
}
TELLING = {"measure", "report", "runtimes"}
# The bottom of both: the telling wing reloads what the making wing saved.
BOTTOM = {"bundle", "checkpoints", "shards", "sparse_files", "coded_files", "formats", "data", "text"}


@cache
def modules() -> dict[str, Path]:
    """Dotted name below `compress` -> file; the package itself is ''."""
    found = {}
    for file in ROOT.rglob("*.py"):
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


class _Imports(ast.NodeVisitor):
    """Absolute names of what a file imports, also inside functions, but not for type checkers only."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.generic_visit(node)
            return
        for statement in node.orelse:
            self.visit(statement)

    def visit_Import(self, node: ast.Import) -> None:
        self.found |= {alias.name for alias in node.names}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, "imports are absolute"
        # `from compress.report import units` may name a module or something inside one
        self.found |= {f"{node.module}.{alias.name}" for alias in node.names}


@cache
def imports(module: str) -> frozenset[str]:
    visitor = _Imports()
    visitor.visit(ast.parse(modules()[module].read_text(encoding="utf-8")))
    return frozenset(visitor.found)


@cache
def ours(module: str) -> frozenset[str]:
    """The modules of compress that a module imports."""
    found = set()
    for name in imports(module):
        package, _, rest = name.partition(".")
        if package != "compress":
            continue
        while rest and rest not in modules():  # a name inside a module
            rest = rest.rpartition(".")[0]
        found.add(rest)
    return frozenset(found - {module})


def reached(module: str) -> set[str]:
    """Everything a module imports, directly or not."""
    seen: set[str] = set()
    waiting = [module]
    while waiting:
        for name in ours(waiting.pop()) - seen:
            seen.add(name)
            waiting.append(name)
    return seen


def within(module: str, groups: set[str]) -> bool:
    return any(module == group or module.startswith(group + ".") for group in groups)


def members(*groups: str) -> list[str]:
    return [m for m in modules() if within(m, set(groups))]


def broken(sources: list[str], forbidden: set[str], allowed: frozenset[str] = frozenset()) -> list[str]:
    return sorted(
        f"{source} imports {target}"
        for source in sources
        for target in ours(source)
        if within(target, forbidden) and target not in allowed
    )


def test_the_rules_see_the_imports():
    assert "passes.base" in ours("passes.train")
    assert "bundle" not in ours("passes.base")  # for type checkers only
    assert "report.units" in ours("report.rows")  # from compress.report import units
    assert "runtimes.torch_runtime" in ours("runtimes")  # inside a function


def test_the_making_wing_knows_nothing_of_the_telling_one():
    assert broken(members(*MAKING), TELLING, frozenset(SHARED)) == []


def test_the_telling_wing_knows_nothing_of_the_making_one():
    assert broken(members(*TELLING), MAKING) == []
    for module in members("measure", "report"):
        found = {m for m in reached(module) if within(m, {"passes", "solvers", "pipeline", "training"})}
        assert not found, f"{module} reaches {found}"


def test_what_both_wings_share_knows_neither():
    forbidden = (MAKING | TELLING) - {"runtimes.base"}
    assert broken(members(*SHARED, *BOTTOM), forbidden, frozenset(SHARED)) == []
    assert broken(members(*SHARED), BOTTOM) == []


def test_the_report_stands_on_records_only():
    allowed = members(*SHARED, "report")
    assert [m for source in members("report") for m in reached(source) if m not in {*allowed, ""}] == []


def test_no_pass_imports_another():
    for module in members("passes"):
        assert {m for m in ours(module) if within(m, {"passes"})} <= {"passes", "passes.base"}, module


def test_solvers_are_pure():
    assert broken(members("solvers"), {"formats", "bundle", "passes", "calibration", "training"}) == []


def test_formats_do_not_know_the_solvers():
    assert broken(members("formats"), MAKING | TELLING | {"bundle", "checkpoints", "data", "text"}) == []


def test_nothing_imports_what_stands_beside_the_package():
    for module in modules():
        outside = {name.partition(".")[0] for name in imports(module)}
        assert not outside & {"benchmarks", "notebooks", "tests"}, module


def test_the_command_line_is_at_the_top():
    assert broken([m for m in modules() if m != "__main__"], {"cli"}) == []


def test_there_is_no_circle():
    # a package's lazy front door and its members name each other, which is no circle of work
    graph = {module: ours(module) - {""} for module in modules() if module}
    done: set[str] = set()

    def descend(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in graph[module]:
                descend(target, (*path, module))
            done.add(module)

    for module in graph:
        descend(module, ())


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import compress", {"torch", "transformers", "onnx", "onnxruntime", "numpy"}),
        ("import compress.report", {"torch", "transformers", "onnx", "onnxruntime"}),
        ("import compress.runtimes.onnx_runtime, compress.measure.worker", {"torch", "transformers", "onnx"}),
        ("import compress.runtimes.onnx_encoder", {"torch", "transformers", "onnx"}),
        ("import compress.cli", {"torch", "transformers", "onnx", "onnxruntime"}),
    ],
)
def test_importing_costs_no_library_that_is_not_needed(statement, unwanted):
    code = f"{statement}; import sys; print(*sorted({unwanted!r} & set(sys.modules)))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == ""
