"""One chain with every export, through the command line: all are written, none changes what is measured."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import built_once, invoke, refused, tree, write_recipe, write_text

from compress.bundle import Bundle
from compress.memory import EXPORTS

pytest.importorskip("compressed_tensors")

QUANTIZE = {
    "quantize_round": {"format": {"kind": "int4", "group": 32, "symmetric": True}, "embeddings": "int8"}
}
ALONE, ALL, CHILD = "codes", "exported", "child"


def build(folder: Path) -> None:
    text = write_text(folder / "text")
    variants = {
        ALONE: [QUANTIZE],
        ALL: [
            QUANTIZE,
            {"export_onnx": {"check_tokens": 64}},
            {"export_gguf": {"check_tokens": 64}},
            {"export_compressed_tensors": {"check_tokens": 64}},
        ],
        CHILD: {"from": ALL, "passes": [{"export_gguf": {"check_tokens": 64}}]},
    }
    recipe = write_recipe(folder / "recipe.yaml", text, variants=variants)
    outcome = invoke("run", recipe, "-o", folder / "run")
    assert outcome.code == 0, outcome.err


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "exports", build)


def results(run: Path) -> dict[tuple[str, str], dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "results.jsonl").read_text().splitlines()]
    return {(line["variant"], line["runtime"]): line for line in lines}


def test_every_export_lies_in_the_artifact(place):
    artifact = place / "run" / ALL
    assert {p.name for p in artifact.iterdir() if p.is_dir()} == set(EXPORTS)
    assert (artifact / "gguf" / "model.gguf").is_file()
    assert (artifact / "compressed-tensors" / "model.safetensors").is_file()
    assert set(Bundle.load(artifact).exports) == set(EXPORTS)
    assert Bundle.load(artifact).lineage.names[-4:] == (
        "quantize_round", "export_onnx", "export_gguf", "export_compressed_tensors",
    )  # fmt: skip


def test_a_child_starts_from_the_weights_and_not_from_the_exports(place):
    assert {p.name for p in (place / "run" / CHILD).iterdir() if p.is_dir()} == {"gguf"}
    files = [place / "run" / name / "gguf" / "model.gguf" for name in (ALL, CHILD)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_records_are_those_of_the_codes(place):
    found = results(place / "run")
    assert set(found) == {("base", "torch"), (ALONE, "torch"), (ALL, "torch"), (ALL, "onnxruntime"),
                          (CHILD, "torch")}  # fmt: skip
    alone, exported = found[ALONE, "torch"], found[ALL, "torch"]
    for field in ("weight_bytes", "parameters", "nll", "kl_to_base"):
        assert alone[field] == exported[field], field
    files = tree(place / "run" / ALL)
    own = sum(size for name, size in files.items() if name.partition("/")[0] not in EXPORTS)
    assert exported["disk_bytes"] == own
    assert found[ALL, "onnxruntime"]["disk_bytes"] == sum(
        size for name, size in files.items() if name.startswith("onnx/")
    )


def test_the_notes_say_what_was_checked(place):
    steps = Bundle.load(place / "run" / ALL).lineage.steps
    gguf, packed = steps[-2].notes["gguf"], steps[-1].notes["compressed_tensors"]
    assert gguf["check"]["largest_rounding_of_minima_in_steps"] == 0
    assert gguf["tensors"]["Q4_0"] == 14
    assert packed["check"]["passed"]
    assert packed["embeddings_as_float"] == ["model.embed_tokens.weight"]


def test_a_second_run_has_nothing_to_do(place):
    before = tree(place / "run" / ALL)
    outcome = invoke("run", place / "recipe.yaml", "-o", place / "run")
    assert outcome.code == 0, outcome.err
    made = [line for line in outcome.err.splitlines() if "export" in line]
    assert made
    assert all(line.endswith("done before") for line in made)
    assert tree(place / "run" / ALL) == before


@pytest.mark.parametrize(
    ("export", "format", "message"),
    [
        ("export_compressed_tensors", {"kind": "int3"}, "vLLM has kernels for 4 and 8 bits"),
        ("export_gguf", {"kind": "int4", "group": 16}, "no multiple of it"),
        ("export_gguf", {"kind": "int8", "symmetric": False}, "symmetric: true"),
    ],
)
def test_what_a_runtime_has_no_kernel_for_is_refused_before_any_work(
    place, export, format, message, tmp_path
):
    passes = [{"quantize_round": {"format": format}}, export]
    recipe = write_recipe(tmp_path / "recipe.yaml", place / "text", variants={"v": passes})
    line = refused("run", recipe, "-o", tmp_path / "run")
    assert f"variants.v.{export}: " in line
    assert message in line
    assert not (tmp_path / "run").exists()
