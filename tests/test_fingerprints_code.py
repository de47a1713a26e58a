"""What a fingerprint covers of code, and what it leaves out: of passes, plugins, libraries, of measuring."""

import ast
import json
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import compress
from compress.host import reach as reaching
from compress.host.reach import ASIDE, BESIDE, reach
from compress.measure import harness
from compress.measure.harness import MEASURING
from compress.measure.turns import Target
from compress.records.protocol import MeasureProtocol
from compress.records.results import Result
from compress.run.registry import names, pass_class
from compress.run.store import pass_version
from compress.text.windows import Windows

ROOT = Path(compress.__file__).parent
OURS = [name for name in names() if (ROOT / "passes" / f"{name}.py").is_file()]
COMMENT, CODE = "# a comment\n", "ANOTHER = 1\n"
EVERYTHING = {"measuring", "create", *OURS}


def roots(name: str) -> tuple[str, ...]:
    """Where the code begins that decides a step, or a result."""
    special = {"measuring": MEASURING, "create": ("compress.models.create", "compress.artifact.bundle")}
    return special.get(name, (f"compress.passes.{name}", "compress.run.lending", "compress.artifact.bundle"))


@cache
def modules(name: str) -> frozenset[str]:
    return frozenset(reach(*roots(name)).modules)


DRIVER = """
import json, sys
from pathlib import Path
from compress.host import reach
from compress.host.reach import __file__ as here
root = Path(here).parents[1]
edits, places = json.load(sys.stdin)
digests = lambda: {name: reach.reach(*modules).digest for name, modules in places.items()}
before, changed = digests(), []
for file, old, new in edits:
    text = (root / file).read_text()
    assert old in text, (file, old)
    (root / file).write_text(text.replace(old, new, 1) if old else text + new)
    module = ".".join(("compress", *Path(file).with_suffix("").parts)).removesuffix(".__init__")
    forget = lambda: reach._READ.pop(module, None)
    forget()
    changed.append(sorted(name for name, digest in digests().items() if digest != before[name]))
    (root / file).write_text(text)
    forget()
print(json.dumps(changed))
"""


def changed_by(copy: Path, edits: list[tuple[str, str, str]]) -> list[set[str]]:
    """What each edit (file, old text or nothing, new text) of a copy of the package makes again."""
    shutil.copytree(ROOT, copy / "compress", ignore=shutil.ignore_patterns("__pycache__"))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        input=json.dumps([edits, {name: roots(name) for name in sorted(EVERYTHING)}]),
        capture_output=True, text=True, env={"PYTHONPATH": str(copy)}, cwd=copy,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [set(found) for found in json.loads(done.stdout)]


def test_what_an_edit_of_our_code_makes_again(tmp_path):
    trains = {name for name in OURS if "compress.training.loop" in modules(name)}
    gptq = {name for name in OURS if "compress.solvers.gptq" in modules(name)}
    assert {"train", "distill", "prune_gradual", "finetune"} == trains
    assert {"quantize_gptq", "quantize_auto"} <= gptq <= {n for n in OURS if n.startswith(("quant", "prune"))}
    reads = {name for name in EVERYTHING if "compress.text.documents" in modules(name)}
    assert not reads & {"train", "finetune", "distill", "quantize_gptq", "prune_structured", "export_gguf"}
    weighs = {"quantize_auto"}  # asks the writers how long their files will be
    expected: list[tuple[str, str, str, set[str]]] = [
        # comments, layout and docstrings: nothing
        ("export/gguf/blocks.py", "", COMMENT, set()),
        ("artifact/bundle.py", "", COMMENT, set()),
        ("measure/quality.py", "", COMMENT, set()),
        ("solvers/gptq.py", '"""', '"""In other words. ', set()),
        ("training/loop.py", "\n\n\n", "\n\n\n\n\n", set()),
        # code: what reaches it
        ("export/gguf/blocks.py", "", CODE, {"export_gguf", *weighs}),
        ("export/onnx/artifact.py", "", CODE, {"export_onnx", *weighs}),
        ("export/compressed_tensors/artifact.py", "", CODE, {"export_compressed_tensors", *weighs}),
        ("solvers/gptq.py", "", CODE, gptq),
        ("training/loop.py", "", CODE, trains),
        ("passes/train.py", "", CODE, {"train"}),
        ("text/documents.py", "", CODE, reads),
        ("models/create.py", "", CODE, {"create"}),
        ("measure/quality.py", "", CODE, {"measuring"}),
        ("runtimes/onnx_runtime.py", "", CODE, {"measuring", "export_onnx"}),
        ("run/lending.py", "", CODE, {*OURS}),
        ("artifact/bundle.py", "", CODE, EVERYTHING),
        # what shows, complains, names and tells
        *((file, "", CODE, set[str]()) for file in (
            "cli/commands.py", "api.py", "report/page.py", "run/preflight.py", "run/registry.py", "errors.py",
            "version.py", "host/progress.py", "training/trackers.py", "__init__.py",
            "records/base.py", "records/manifest.py", "records/results.py", "records/run.py",
            "artifact/applied.py",
        )),
    ]  # fmt: skip
    found = changed_by(tmp_path, [edit[:3] for edit in expected])
    for (file, old, new, again), changed in zip(expected, found, strict=True):
        assert changed == again, (file, old, new)


@pytest.mark.parametrize("name", OURS)
def test_no_pass_reaches_another_wing(name):
    folders = {module.split(".")[1] for module in modules(name)} - {""} if modules(name) else set()
    kind = pass_class(name).kind
    allowed = {
        "passes",
        "run",
        "artifact",
        "formats",
        "models",
        "records",
        "tasks",
        "text",
        "host",
        "context",
    }
    allowed |= {"export", "runtimes"} if kind == "export" else {"calibration", "layerwise", "solvers"}
    allowed |= {"export", "runtimes"} if name == "quantize_auto" else set()  # weighs what they write
    allowed |= {"training"} if kind in ("train", "distill", "tune") or name == "prune_gradual" else set()
    allowed |= {"structured"} if kind == "prune" else set()
    assert folders <= allowed
    others = {f"compress.passes.{other}" for other in OURS} - {f"compress.passes.{name}"}
    assert not modules(name) & others
    assert {m for m in modules(name) if m.startswith("compress.run.")} == {"compress.run.lending"}


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_no_module_is_hidden_behind_a_computed_name(name):
    for module in modules(name):
        file = reaching._file(module)
        calls = (
            []
            if file is None
            else [n for n in ast.walk(ast.parse(file.read_bytes())) if isinstance(n, ast.Call)]
        )
        for call in calls:
            called = getattr(call.func, "id", "") or getattr(call.func, "attr", "")
            if called in ("import_module", "__import__"):
                assert isinstance(call.args[0], ast.Constant), module


def test_what_is_left_out_by_name_is_there():
    for name in ASIDE:
        assert reaching._file(name) is not None, name
    assert not {name for name in ASIDE if name.startswith("compress.solvers")}


LIBRARIES = {
    "onnx": {"export_onnx", "quantize_auto"}, "onnxruntime": {"export_onnx", "quantize_auto"},
    "gguf": {"export_gguf", "quantize_auto"},
    "bitsandbytes": {"quantize_bitsandbytes"}, "torch": {*OURS}, "transformers": {*OURS},
}  # fmt: skip


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_version_of_a_library_decides_where_it_is_used(library, monkeypatch):
    before = {name: reach(*roots(name)) for name in OURS}
    assert not {lib for found in before.values() for lib in found.libraries} & BESIDE
    actual = reaching.version_of
    monkeypatch.setattr(reaching, "version_of", lambda lib: "9.9" if lib == library else actual(lib))
    changed = {name for name in OURS if reach(*roots(name)).digest != before[name].digest}
    assert changed == LIBRARIES[library]


PLUGIN = {
    "pyproject_less/__init__.py": '"""A package."""\n',
    "pyproject_less/halve.py": (
        "import torch\nfrom typing import TYPE_CHECKING\nfrom . import tools\n"
        "from compress import Pass, Bundle\nif TYPE_CHECKING:\n    from pyproject_less import notes\n"
        "class Halve(Pass):\n    def __call__(self, bundle, context):\n"
        "        from pyproject_less.inner.late import half\n        return bundle\n"
    ),
    "pyproject_less/tools.py": "FACTOR = 2\n",
    "pyproject_less/notes.py": "TEXT = ''\n",
    "pyproject_less/inner/__init__.py": "def unused():\n    import compress.api\n",
    "pyproject_less/inner/late.py": "import beside_it\ndef half(x):\n    return x / 2\n",
    "beside_it.py": "MORE = 1\n",
}


def test_a_plugins_module_and_what_it_imports_of_its_own_package_count(tmp_path, monkeypatch):
    for name, text in PLUGIN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    found = reach("pyproject_less.halve")
    own = {module for module in found.modules if not module.startswith("compress")}
    assert own == {
        "pyproject_less", "pyproject_less.halve", "pyproject_less.tools", "pyproject_less.inner",
        "pyproject_less.inner.late", "beside_it",
    }  # fmt: skip
    assert {"compress.passes.base", "compress.artifact.bundle"} <= set(found.modules)  # by their public names
    assert "compress.api" not in found.modules  # nobody asked the package for the function that imports it
    assert "torch" in found.libraries

    def again(name: str, text: str) -> bool:
        before = reach("pyproject_less.halve").digest
        (tmp_path / name).write_text(text)
        reaching._READ.clear()
        return reach("pyproject_less.halve").digest != before

    assert not again("pyproject_less/tools.py", "FACTOR = 2  # twice\n")
    assert not again("pyproject_less/notes.py", "TEXT = 'another'\n")
    assert again("pyproject_less/tools.py", "FACTOR = 3\n")
    assert again("pyproject_less/inner/late.py", PLUGIN["pyproject_less/inner/late.py"].replace("2", "4"))
    assert again("beside_it.py", "MORE = 2\n")


class TestResults:
    class Started(Exception):
        """A process was started to measure."""

    def measured(self, monkeypatch, **protocol: object) -> list[Result]:
        """Ask for one result of which there is an earlier one, with some of its protocol changed."""
        windows = Windows(np.zeros((2, 8), np.int32), 16, "abc")
        common = harness._common(MeasureProtocol(), windows)
        done = Result(
            variant="v", runtime="torch", device="cpu", artifact="v", fingerprint="f",
            prefill_seconds_p50=1.0,
            **common | {"protocol": common["protocol"] | {"processes": "kept"} | protocol},
        )  # fmt: skip

        def start(*arguments: object, **options: object) -> None:
            raise self.Started

        monkeypatch.setattr(harness, "Reference", start)
        return harness.measure([Target("v", "torch", Path(), "f")], None, windows, done=[done])

    def test_one_of_the_same_code_is_taken_over(self, monkeypatch):
        (result,) = self.measured(monkeypatch)
        assert result.protocol["code"] == reach(*MEASURING).digest[:16]

    @pytest.mark.parametrize("change", [{"code": "0" * 16}, {"seed": 1}, {"code": None}])
    def test_one_of_other_code_or_protocol_is_measured_again(self, monkeypatch, change):
        with pytest.raises(self.Started):
            self.measured(monkeypatch, **change)


def test_a_pass_is_told_from_another_by_its_code():
    found = {name: pass_version(pass_class(name).model_construct()) for name in OURS}
    assert len(set(found.values())) == len(OURS)
