"""The check lets right graphs pass, and no others."""

import numpy as np
import pytest
import torch
from export_models import exported, quantized, tiny_bundle, tokens

from compress.context import Context
from compress.errors import UserError
from compress.export.onnx.check import ExportCheckFailed, compare
from compress.export.onnx.families import require_supported
from compress.export.onnx.forms import Forms
from compress.formats import Int4, Int8
from compress.passes.export_onnx import ExportOnnx
from compress.records.manifest import Manifest


class _Heldout:
    def __init__(self, windows):
        self.tokens = windows


class _Data:
    def __init__(self, windows):
        self.heldout = _Heldout(windows)


@pytest.fixture
def context(tmp_path):
    return Context(
        data=_Data(tokens(3, 32)),  # the pass reads nothing else of the text
        teacher=lambda: None,
        seed=0,
        workdir=tmp_path,
        device=torch.device("cpu"),
        threads=1,
        precision="float32",
    )


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_float32_passes_with_equal_continuations(name, context):
    bundle = tiny_bundle(name)
    before = {k: v.clone() for k, v in bundle.model.state_dict().items()}
    result = ExportOnnx()(bundle, context)
    check = result.notes["onnx"]["check"]
    assert check["kind"] == "float32"
    assert check["passed"]
    assert check["greedy_mismatches"] == 0
    assert check["greedy_tokens"] > 0
    assert all((before[k] == v).all() for k, v in bundle.model.state_dict().items())
    manifest = Manifest.read(result.exports["onnx"] / "manifest.json")
    assert manifest.kind == "onnx"
    assert manifest.onnx["check"]["passed"]
    assert {"model.onnx", "model.onnx_data", "config.json", "tokenizer.json", "genai_config.json"} <= set(
        manifest.files
    )


@pytest.mark.parametrize(
    ("format", "changes", "kind"),
    [
        (Int4(), {"accuracy_level": 0}, "weights"),
        (Int4(), {"tolerance": 1.0}, "activations"),
        (Int8(), {"tolerance": 1.0}, "activations"),
    ],
)
def test_quantized_graphs_are_judged_by_their_kind(format, changes, kind, context):
    result = ExportOnnx(**changes)(quantized(tiny_bundle("llama"), format), context)
    assert result.notes["onnx"]["check"]["kind"] == kind
    assert result.notes["onnx"]["check"]["passed"]


def test_same_model_same_bytes(context):
    bundle = quantized(tiny_bundle("llama"), Int4())
    first = ExportOnnx(tolerance=1.0)(bundle, context).exports["onnx"]
    files = {p.name: p.read_bytes() for p in first.iterdir()}
    second = ExportOnnx(tolerance=1.0)(bundle, context).exports["onnx"]
    assert {p.name: p.read_bytes() for p in second.iterdir()} == files


def test_another_model_fails(tmp_path):
    runtime = exported(tiny_bundle("llama"), tmp_path)
    other = tiny_bundle("llama_tied").model
    with pytest.raises(ExportCheckFailed, match="greedy continuations differ"):
        compare(other, runtime, tokens(2, 32), "float32")
    with pytest.raises(ExportCheckFailed, match="KL is"):
        compare(other, runtime, tokens(2, 32), "activations")


def test_nan_fails(tmp_path):
    bundle = tiny_bundle("llama")
    runtime = exported(bundle, tmp_path)
    runtime.logits = lambda ids: np.full((*ids.shape, 97), np.nan, dtype=np.float32)
    with pytest.raises(ExportCheckFailed):
        compare(bundle.model, runtime, tokens(1, 32), "weights")


def test_rounded_activations_are_no_float32(tmp_path):
    bundle = quantized(tiny_bundle("llama"), Int8())
    runtime = exported(bundle, tmp_path, Forms())
    with pytest.raises(ExportCheckFailed):
        compare(bundle.model, runtime, tokens(2, 32), "float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; supported: gemma, gemma2"),
        ({"hidden_act": "xielu"}, "activation 'xielu'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"full_attention": {"rope_type": "longrope"}}}, "rope_type 'longrope'"),
        ({"head_dim": 20}, "heads 20 wide of which 20 columns are turned"),
    ],
)
def test_unsupported_models_are_refused_before_any_work(change, message):
    config = tiny_bundle("llama").model.config
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(UserError, match=message):
        require_supported(config)


def test_a_group_that_no_block_divides_is_refused(tmp_path):
    with pytest.raises(UserError, match="group 40 is no multiple of 16"):
        exported(quantized(tiny_bundle("llama"), Int4(group=40)), tmp_path)
