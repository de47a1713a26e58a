"""All exports of one variant, from the command line: each in its folder, none counted as the artifact."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from cli_helpers import invoke, refused, results, write_recipe, write_text

from compress.artifact.bundle import Bundle
from compress.artifact.folder import EXPORTS, disk_bytes
from compress.records.manifest import Manifest
from compress.runtimes.exported import EXPORTED

EXPORT_PASSES = [
    {"export_onnx": {"check_tokens": 64, "cache": "int8", "cache_tokens": 128}},
    {"export_gguf": {"check_tokens": 64}},
    {"export_compressed_tensors": {"check_tokens": 64}},
]

pytestmark = pytest.mark.skipif(
    find_spec("gguf") is None or find_spec("compressed_tensors") is None,
    reason="the extras gguf and compressed-tensors are not installed",
)


def quantize(format: object) -> dict[str, object]:
    return {"quantize_round": {"format": format, "embeddings": "int8"}}


def test_a_run_with_all_exports(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text")
    variants: dict[str, object] = {"int4": [quantize({"kind": "int4", "group": 32}), *EXPORT_PASSES]}
    more: dict[str, object] = {
        "plain": [quantize({"kind": "int4", "group": 32})],
        "tuned": {"from": "int4", "passes": [{"tune_scales": {"tokens": 128, "batch": 4}}]},
    }
    for asked, options in ((variants, []), (variants | more, ["--no-measure"])):
        recipe = write_recipe(tmp_path / "recipe.yaml", text, variants=asked)
        outcome = invoke("run", recipe, "-o", tmp_path / "run", *options)
        assert outcome.code == 0, outcome.err

    folder = tmp_path / "run" / "int4"
    assert {path.name for path in folder.iterdir() if path.is_dir()} == set(EXPORTS)
    assert set(Bundle.load(folder).exports) == set(EXPORTS)
    assert Bundle.load(folder / "gguf" / "model.gguf").model.config.num_hidden_layers == 2
    steps = Manifest.read(folder / "manifest.json").lineage.steps
    notes = {key for step in steps for key in step.notes}
    assert {"onnx", "gguf", "compressed_tensors"} <= notes
    assert not {path.name for path in (tmp_path / "run" / "tuned").iterdir()} & set(EXPORTS)

    onnx = Manifest.read(folder / "onnx" / "manifest.json").onnx
    assert onnx["cache"] == "int8"
    assert onnx["cache_bytes_per_token"] == 2 * 2 * 1 * 32  # layers, sides, heads, width; a byte each
    assert onnx["check"]["kl"] != onnx["kl_with_float32_cache"]
    assert max(onnx["check"]["kl"], onnx["kl_with_float32_cache"]) < 0.05

    found = results(tmp_path / "run")
    in_torch = {(name, "torch") for name in ("base", *variants)}
    exported = {("int4", export.runtime) for export in EXPORTED.values() if export.installed}
    assert set(found) == {*in_torch, *exported}
    own = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
    assert found["int4", "torch"]["disk_bytes"] == own == disk_bytes(folder)
    plain = tmp_path / "run" / "plain"
    for file in (path for path in plain.iterdir() if path.suffix == ".safetensors"):
        assert file.read_bytes() == (folder / file.name).read_bytes(), "an export changes no weight"
    assert any(plain.glob("*.safetensors"))
    assert "export_gguf" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("step", "format", "message"),
    [
        ("export_gguf", "int3", "GGUF has no type for int3; use int4, int5 or int8, or set widen: true"),
        ("export_gguf", {"kind": "int4", "group": 48}, "set group to a multiple of 32"),
        ("export_gguf", {"kind": "int8", "symmetric": False}, "set symmetric: true"),
        (
            "export_onnx",
            "int3",
            "ONNX Runtime has no kernel for int3; use int2, int4 or int8, or set widen: true",
        ),
        ("export_onnx", "nf4", "ONNX Runtime has no kernel for nf4; use int4"),
        ("export_compressed_tensors", "int3", "set runtimes: [transformers]"),
    ],
)
def test_what_an_export_cannot_hold_is_refused_before_any_work(
    step: str, format: object, message: str, tmp_path: Path
) -> None:
    text = write_text(tmp_path / "text")
    recipe = write_recipe(tmp_path / "r.yaml", text, variants={"small": [quantize(format), {step: {}}]})
    error = refused("run", recipe, "-o", tmp_path / "run")
    assert f"variants.small.{step}: " in error
    assert message in error
    assert not (tmp_path / "run").exists()
