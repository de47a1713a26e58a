"""The commands that need no run: help without heavy imports, passes, doctor, dry runs, shipped recipes."""

import json
import re

import pytest
from cli_helpers import DATA, SHAPE, invoke, python, results, settings, write_recipe, write_text

from compress.models.create import Architecture, create
from compress.run.recipe import load_recipe, shipped
from compress.run.registry import names
from compress.text.documents import load_documents

COMMANDS = ["run", "bench", "compare", "passes", "fields", "generate", "doctor"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


def test_help_imports_no_heavy_library():
    script = f"""
import sys
from typer.testing import CliRunner
from compress.cli.commands import app
for command in {COMMANDS}:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Usage" in result.output, command
print(sorted({{"torch", "transformers", "onnx", "onnxruntime", "pandas", "plotly"}} & set(sys.modules)))
"""
    done = python("-W", "error", "-c", script)
    assert done.stdout.strip() == "[]", done.stderr


def test_the_module_is_the_console_script():
    done = python("-m", "compress", "--help")
    assert done.returncode == 0
    assert all(command in done.stdout for command in COMMANDS)
    assert python("-m", "compress", "frobnicate").returncode == 2


def test_passes_lists_them_all_and_shows_the_fields_of_each():
    listed = invoke("passes").out
    for name in names():
        assert name in listed
        shown = invoke("passes", name)
        assert shown.code == 0
        assert "kind: " in shown.out
    assert "number > 0, < 1" in invoke("passes", "prune_magnitude").out
    assert "may not follow: quantize" in invoke("passes", "prune_magnitude").out


def test_passes_shows_the_fields_inside_a_field():
    assert "target.block_parameters" in invoke("passes", "prune_structured").out
    assert "teachers.weight" in invoke("passes", "distill").out
    formats = invoke("passes", "quantize_gptq").out
    assert re.search(r"format\.kind +int8 or int6 .* required", formats)
    assert re.search(r"format\.group +integer >= 16 or null +null or 64", formats)
    assert len(re.findall(r"^ *format\.group ", formats, re.M)) == 1  # not once per kind


def test_fields_lists_all_of_a_recipe_but_its_passes():
    told = invoke("fields").out
    rows = [line.split() for line in told.splitlines()]
    assert ["data.heldout_windows", "integer", ">=", "1,", "<=", "10000", "8"] in [row[:7] for row in rows]
    for name in ("name", "threads", "model.create.kv_heads", "base.passes", "variants.from"):
        assert name in [row[0] for row in rows if row], name
    for section in ("data", "measure", "report", "base"):
        assert re.search(rf"^ *{section} .* as below", told, re.M), section
    assert not re.search(r"None|True", told)  # values are those of YAML
    assert "variants.passes." not in told


def test_doctor_tells_about_the_machine():
    told = invoke("doctor")
    assert told.code == 0
    for word in ("cores", "memory", "instructions", "torch", "onnxruntime", "gguf"):
        assert word in told.out


@pytest.mark.parametrize("name", shipped())
def test_a_dry_run_of_a_shipped_recipe_tells_the_plan_and_writes_nothing(name, text, tmp_path):
    source = load_recipe(name, ["model={create: {preset: 1m}}"])
    family = {"embedder": "bert", "summarise": "t5"}.get(name)  # of the only models that learn such rows
    shape = dict(SHAPE)
    if family is not None:
        shape |= {"family": family, "vocab_size": 500}
        del shape["kv_heads"]
    outcome = invoke(
        "run", name, "--dry-run", "-o", tmp_path / "run", "--text", text,
        *settings(f"model.create={json.dumps(shape)}", "model.checkpoint=null", "data.window=32"),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    for variant in source.ordered():
        assert f"  {variant}" in outcome.out
        for step in source.chain(variant).passes:
            assert f"    {step.name()}: " in outcome.out
    assert all(word in outcome.out for word in ("memory", "disk", "time", "parameters"))
    assert list(tmp_path.iterdir()) == []


def test_a_pretrained_model_from_a_directory_runs_the_shipped_recipe(text, tmp_path):
    model, tokenizer = create(Architecture(**SHAPE), load_documents(str(text)), seed=0)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    one_file = tmp_path / "text.txt"
    one_file.write_text("".join(document.text for document in load_documents(str(text))))
    outcome = invoke(
        "run", "smollm2", "--model", tmp_path / "model", "--text", one_file, "-o", tmp_path / "run",
        *settings(
            "threads=1", *(f"data.{name}={value}" for name, value in DATA.items()),
            "base.passes.export_onnx.check_tokens=64", "measure={prefill_tokens: 16, rounds: 1}",
        ),
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = results(tmp_path / "run")
    assert set(found) == {(v, r) for v in ("base", "int8", "int4") for r in ("torch", "onnxruntime")}
    assert all(abs(line["delta_nll"] or 0) < 0.05 for line in found.values())
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["references"] == [], "nothing was trained here to compare a reference with"
    original, copied = (tmp_path / name / "model.safetensors" for name in ("model", "run/base"))
    assert copied.read_bytes() == original.read_bytes()


def test_the_recipe_in_the_run_folder_says_everything_and_loads_again(text, tmp_path):
    first = load_recipe(str(write_recipe(tmp_path / "tiny.yaml", text, variants={"q": ["quantize_round"]})))
    (tmp_path / "resolved.yaml").write_text(first.to_yaml())
    assert load_recipe(str(tmp_path / "resolved.yaml")) == first
