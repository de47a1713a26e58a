"""Small things a person meets first: what is asked for is answered at once, and in plain words."""

import io
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
from cli_helpers import invoke, python, refused, write_recipe, write_text

from compress.errors import UserError
from compress.models.checkpoints import load_checkpoint, meta_model
from compress.report.provenance import protocol_facts
from compress.version import __version__


def test_version_and_help():
    assert invoke("--version").out == f"compress-lm {__version__}\n"
    for flags in (["-h"], ["--help"], ["run", "-h"]):
        assert "Usage:" in invoke(*flags).out


# doctor asks ONNX Runtime for its providers, and torch only where a build may know a GPU
LIGHT = {"torch", "transformers", "onnxruntime", "numpy"}
ASKED = {"onnxruntime", "numpy"} | (set() if version("torch").endswith("+cpu") else {"torch"})


@pytest.mark.parametrize(
    ("command", "unwanted"),
    [("passes", LIGHT), ("--version", LIGHT), ("-h", LIGHT), ("doctor", LIGHT - ASKED)],
)
def test_what_needs_no_model_loads_no_library(command, unwanted, tmp_path):
    script = tmp_path / "light.py"
    script.write_text(
        "import sys\nfrom compress.cli.commands import app\n"
        f"try:\n    app([{command!r}])\nexcept SystemExit:\n    pass\n"
        f"heavy = {unwanted!r} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr


def test_passes_are_those_of_the_registry_and_plugins_are_told_apart(monkeypatch):
    from compress.run import registry

    told = invoke("passes").out
    for name in registry.own_names():
        cls = registry.pass_class(name)
        line = next(line for line in told.splitlines() if line.split()[0] == name)
        assert line.split()[1] == cls.kind
        assert line.endswith((cls.__doc__ or "").strip().splitlines()[0])
    assert "plugin" not in told

    class Entry:
        name, value, dist = "sharpen", "sharper.sharpen:Sharpen", SimpleNamespace(name="sharper")

        def load(self):
            raise ImportError("no module named sharper")

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry()])
    line = invoke("passes").out.splitlines()[-1]
    assert line.split()[:2] == ["sharpen", "plugin"]
    assert "cannot be imported" in line


def test_generate_says_what_is_not_there(tmp_path):
    line = refused("generate", tmp_path / "absent", "--prompt", "x")
    assert line.endswith("absent: no such artifact; give the folder of one, or of a model")


def test_a_prompt_from_a_pipe(bundle, tmp_path, monkeypatch):
    bundle.save(tmp_path / "m")

    def piped(data: bytes):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        return "generate", tmp_path / "m", "--prompt", "-", "--tokens", 2

    assert invoke(*piped("def größe\n".encode())).out.startswith("def größe")
    assert "nothing came" in refused(*piped(b""))
    assert "is not UTF-8" in refused(*piped(b"\xff"))


@pytest.mark.parametrize("name", ["modle", "./absent", "~/absent", "one/two/absent"])
def test_a_mistyped_path_is_not_asked_of_a_hub(name, bundle, tmp_path, monkeypatch):
    def asked(*_: object, **__: object):
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("transformers.utils.hub.cached_file", asked)
    monkeypatch.chdir(tmp_path)
    bundle.save(tmp_path / "runs" / "model")
    source = name if "/" in name else f"runs/{name}"
    words = {"modle": "did you mean 'runs/model'", "one/two/absent": "is neither a directory"}
    words = words.get(name, "does not exist")
    with pytest.raises(UserError, match=words):
        load_checkpoint(source)
    with pytest.raises(UserError, match="does not exist"):
        meta_model(source)
    file = write_recipe(
        tmp_path / "r.yaml", write_text(tmp_path / "t"), model={"checkpoint": source}, base=[]
    )
    line = refused("run", file, "-o", tmp_path / "out", "--dry-run")
    assert "does not exist" in line or "is neither a directory" in line


def test_units_stand_beside_the_number():
    result = SimpleNamespace(protocol={"memory_bytes": 25_300_000_000, "warmup": 3})
    assert protocol_facts([result]) == [("memory", "25.3 GB"), ("warmup", "3")]
