"""What a step's record says of it: its kind, the settings that were changed, what it wrote."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compress.artifact.bundle import Bundle
from compress.artifact.folder import disk_bytes
from compress.passes.distill import Distill
from compress.passes.export_onnx import ExportOnnx
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.records.manifest import Manifest, changed_settings
from compress.run.pipeline import make
from compress.run.recipe import Recipe

# a third-party export: neither its name nor that of its folder is one of ours
MODULE = '''\
from typing import ClassVar

from compress.passes.base import Pass, linear_layers


class WriteCoreml(Pass):
    """Write five megabytes beside the weights."""

    kind: ClassVar = "export"

    def layers(self, model):
        return linear_layers(model)

    def __call__(self, bundle, context):
        folder = context.workdir / "coreml"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model").write_bytes(b"x" * 5_000_000)
        return bundle.evolve(exports={**bundle.exports, "coreml": folder})
'''


@pytest.fixture
def write_coreml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "write_coreml.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield importlib.import_module("write_coreml").WriteCoreml()
    sys.modules.pop("write_coreml", None)


def test_a_third_party_export_is_no_weights(
    write_coreml: Any, recipe_dict: dict[str, Any], tmp_path: Path
) -> None:
    export_onnx = ExportOnnx(check_tokens=64)
    recipe_dict["base"] = []
    recipe_dict["variants"] = {
        "first": {"passes": [PruneMagnitude(), write_coreml, export_onnx]},
        "second": {"from": "first", "passes": [PruneMagnitude(sparsity=0.6)]},
    }
    made = make(Recipe.parse(recipe_dict), tmp_path / "run")
    first, second = (v for v in made.variants if v.name != "base")
    assert [step.kind for step in first.steps] == ["prune", "export", "export"]
    assert [step.exports for step in first.steps] == [(), ("coreml",), ("onnx",)]
    assert second.steps[0].parent == first.steps[0].fingerprint, "children start from weights"
    folder = tmp_path / "run" / "first"
    assert set(Manifest.read(folder / "manifest.json").exports) == {"coreml", "onnx"}
    assert disk_bytes(folder) == sum(p.stat().st_size for p in folder.iterdir() if p.is_file())
    assert set(Bundle.load(folder).exports) == {"coreml", "onnx"}


def test_changed_settings_are_those_unlike_the_defaults() -> None:
    assert changed_settings(PruneMagnitude()) == {}
    assert changed_settings(Distill(tokens=5, temperature=1.0)) == {"tokens": 5}
    int4 = QuantizeGPTQ.model_validate({"format": {"kind": "int4", "group": 32}})
    assert changed_settings(int4) == {"format": {"kind": "int4", "group": 32}}
    default = QuantizeGPTQ.model_fields["format"]
    if not default.is_required():
        assert changed_settings(QuantizeGPTQ()) == {}
