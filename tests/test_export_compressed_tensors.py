"""Codes in the compressed-tensors layout: stock transformers loads them, bit for bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import export_models
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.export.compressed_tensors.artifact import (
    Scheme,
    packed_layer,
    scheme_of,
    vllm_objection,
    write_checkpoint,
)
from compress.export.compressed_tensors.check import check_loads
from compress.export.onnx.check import ExportCheckFailed
from compress.formats import Activations, Int2, Int3, Int4, Int5, Int6, Int8, Nf4, QuantizedTensor
from compress.formats.swap import put_codes, quantize_embeddings
from compress.models.checkpoints import quiet_transformers
from compress.models.layers import linear_layers, matrix
from compress.passes.export_compressed_tensors import ExportCompressedTensors

helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")

FORMATS = [
    Int4(group=16), Int4(group=16, symmetric=True), Int4(group=None), Int8(), Int8(group=16, symmetric=False),
    Int8(symmetric=False), Int2(group=16), Int3(group=16, symmetric=True), Int5(group=16), Int6(group=16),
]  # fmt: skip
WINDOWS = export_models.tokens(4, 32)


def coded(name: str, format: Any, embeddings: Any = None) -> Bundle:
    return export_models.quantized(export_models.tiny_bundle(name), format, embeddings)


def load(folder: Path, **options: Any) -> Any:
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def named(format: Any) -> str:
    return f"{format.kind}-{format.group}-{'sym' if format.symmetric else 'asym'}"


@pytest.mark.parametrize("format", FORMATS, ids=named)
def test_words_are_those_of_the_library(format):
    weight = QuantizedTensor.round(format, torch.randn(24, 48))
    found = packed_layer(weight, scheme_of("x", weight))
    signed = (weight.unpacked().int() - format.levels // 2).to(torch.int8)
    assert torch.equal(found["weight_packed"], helpers.pack_to_int32(signed, format.bits))
    if format.symmetric:
        assert "weight_zero_point" not in found
        return
    zeros = (weight.grid.zeros.int() - format.levels // 2).to(torch.int8)
    wanted = helpers.pack_to_int32(zeros, format.bits, packed_dim=0)
    assert torch.equal(found["weight_zero_point"], wanted)


@pytest.mark.parametrize("format", FORMATS, ids=named)
@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "mistral_window"])
def test_stock_transformers_gives_back_the_weights(name, format, tmp_path):
    bundle = coded(name, format)
    facts = write_checkpoint(bundle, tmp_path / "out", "float32")
    assert check_loads(bundle.model, tmp_path / "out", WINDOWS, 1e-3)["passed"]
    tied = name in ("llama_tied", "qwen2")
    assert facts["embeddings_as_float"] == ["model.embed_tokens.weight"]
    layers = 2 * 7 + (not tied)
    assert [scheme["layers"] for scheme in facts["schemes"]] == [layers]
    state = load_file(tmp_path / "out" / "model.safetensors")
    assert ("lm_head.weight_packed" in state) != tied
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == (["Linear"] if tied else ["Linear", "lm_head"])
    assert "lm_head.weight" not in state


def test_symmetric_codes_are_exact_in_float32(tmp_path):
    bundle = coded("llama_tied", Int4(group=16, symmetric=True), Int8())
    write_checkpoint(bundle, tmp_path / "out", "float32")
    loaded = load(tmp_path / "out", dtype=torch.float32)
    ids = torch.from_numpy(WINDOWS.astype("int64"))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, bundle.model(ids).logits)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_float16_is_what_loads_by_default_and_scales_stay_exact(tmp_path):
    bundle = coded("llama", Int4(group=16, symmetric=True))
    facts = write_checkpoint(bundle, tmp_path / "out", "float16")
    assert 0 < facts["largest_relative_change_of_floats"] <= 2**-11
    state = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(state[f"{name}.weight_scale"], bundle.model.get_submodule(name).quantized.scales)
    assert facts["embedding_bytes"] == export_models.VOCABULARY * 64 * 2
    assert load(tmp_path / "out").dtype == torch.float16


def mixed(first: Any, second: Any) -> Bundle:
    bundle = export_models.tiny_bundle("llama_tied").clone()
    for name in linear_layers(bundle.model):
        format = first if ".mlp." in name else second
        layer = bundle.model.get_submodule(name)
        put_codes(bundle.model, name, QuantizedTensor.round(format, matrix(layer)))
    return bundle


@pytest.mark.parametrize(
    ("first", "second", "absorbed"),
    [
        (Int4(group=16, symmetric=True), Int8(), False),
        (Int4(group=16), Int8(), True),
        (Int4(group=16), Int3(group=16), True),
    ],
)
def test_layers_may_differ_in_format(first, second, absorbed, tmp_path):
    bundle = mixed(first, second)
    facts = write_checkpoint(bundle, tmp_path / "out", "float32")
    assert facts["zero_points_absorbed"] == absorbed
    assert sum(scheme["layers"] for scheme in facts["schemes"]) == 14
    check_loads(bundle.model, tmp_path / "out", WINDOWS, 1e-3)
    loaded = load(tmp_path / "out", dtype=torch.float32)
    ids = torch.from_numpy(WINDOWS.astype("int64"))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, bundle.model(ids).logits)


def test_zero_points_of_8_bits_cannot_be_absorbed(tmp_path):
    with pytest.raises(UserError, match="symmetric: true for int8"):
        write_checkpoint(mixed(Int8(symmetric=False), Int4(group=16)), tmp_path / "out", "float16")


def test_layers_left_float_are_ignored_by_the_loader(tmp_path):
    bundle = export_models.tiny_bundle("llama").clone()
    names = linear_layers(bundle.model, ("*.mlp.*",))
    for name in names:
        layer = bundle.model.get_submodule(name)
        put_codes(bundle.model, name, QuantizedTensor.round(Int4(group=16), matrix(layer)))
    write_checkpoint(bundle, tmp_path / "out", "float32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "lm_head" in config["ignore"]
    assert "model.layers.0.self_attn.q_proj" in config["ignore"]
    assert not set(config["ignore"]) & set(names)
    check_loads(bundle.model, tmp_path / "out", WINDOWS, 1e-3)


def test_a_ragged_group_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"down_proj is 112 wide.*group of 64"):
        write_checkpoint(coded("llama", Int4(group=64)), tmp_path / "out", "float16")


def test_gpt2_is_refused_before_any_work(tmp_path):
    with pytest.raises(UserError, match="stored transposed"):
        ExportCompressedTensors().layers(export_models.tiny_bundle("gpt2").model)
    with pytest.raises(UserError, match="stored transposed"):
        write_checkpoint(coded("gpt2", Int4(group=16)), tmp_path / "out", "float16")


def test_what_the_layout_does_not_have_is_refused(tmp_path):
    with pytest.raises(UserError, match="not nf4"):
        write_checkpoint(coded("llama", Nf4(group=16)), tmp_path / "out", "float16")
    bundle = coded("llama", Int4(group=16))
    bundle.model.model.layers[0].mlp.up_proj.activations = Activations(mode="dynamic")
    with pytest.raises(UserError, match="up_proj rounds its input"):
        write_checkpoint(bundle, tmp_path / "out", "float16")


def test_values_beyond_float16_are_refused(tmp_path):
    bundle = coded("llama", Int4(group=16))
    bundle.model.model.norm.weight.data[0] = 1e6
    with pytest.raises(UserError, match="dtype: float32"):
        write_checkpoint(bundle, tmp_path / "out", "float16")


def test_the_check_sees_a_changed_code_and_a_changed_norm(tmp_path):
    bundle = coded("llama", Int4(group=16, symmetric=True))
    write_checkpoint(bundle, tmp_path / "out", "float32")
    file = tmp_path / "out" / "model.safetensors"
    state = load_file(file)
    shutil.copy(file, tmp_path / "kept")
    for name, message in (
        ("model.layers.1.mlp.up_proj.weight_packed", "come back"),
        ("model.norm.weight", "tolerance"),
    ):
        changed = dict(state)
        changed[name] = state[name].clone()
        changed[name].view(-1)[0] += 7
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ExportCheckFailed, match=message):
            check_loads(bundle.model, tmp_path / "out", WINDOWS, 1e-3)
    file.unlink()
    with pytest.raises(ExportCheckFailed, match="cannot load"):
        check_loads(bundle.model, tmp_path / "out", WINDOWS, 1e-3)


def test_what_vllm_has_no_kernel_for_is_said_beforehand():
    both, alone = ExportCompressedTensors(), ExportCompressedTensors(runtimes=("transformers",))
    assert "int3" in str(both.refuses((Int4(), Int3())))
    assert "not 48" in str(both.refuses((Int4(group=48),)))
    assert both.refuses((Int4(), Int8())) is None
    assert alone.refuses((Int3(), Int4(group=48))) is None
    assert "nf4" in str(alone.refuses((Nf4(),)))
    with pytest.raises(UserError, match="x: pack-quantized holds integer grids"):
        scheme_of("x", QuantizedTensor.round(Nf4(), torch.randn(4, 64)))


def test_vllm_wants_one_format_per_fused_layer():
    four, eight = Scheme(4, True, 64), Scheme(8, True, 0)
    names = [f"b.self_attn.{x}_proj" for x in "qkv"]
    assert vllm_objection(dict.fromkeys(names, four)) is None
    assert "q_proj, k_proj, v_proj" in str(vllm_objection({**dict.fromkeys(names, four), names[1]: eight}))
    assert "widths" in str(vllm_objection({"b.mlp.down_proj": Scheme(3, True, 64)}))
    assert "codes in lm_head" in str(vllm_objection({"lm_head": four}, "lm_head"))
    assert vllm_objection(dict.fromkeys(names, four), "lm_head") is None


def test_the_pass_names_the_extra_it_lacks(bundle, monkeypatch):
    monkeypatch.setattr("compress.passes.export_compressed_tensors.find_spec", lambda name: None)
    with pytest.raises(UserError, match="compressed-tensors"):
        ExportCompressedTensors().layers(bundle.model)


def test_the_pass_writes_checks_and_travels(bundle, make_context, tmp_path, capfd):
    quantize_embeddings(bundle.model, Int8())
    for name in linear_layers(bundle.model):
        layer = bundle.model.get_submodule(name)
        put_codes(bundle.model, name, QuantizedTensor.round(Int4(group=16), matrix(layer)))
    result = ExportCompressedTensors()(bundle, make_context(bundle))
    facts = result.notes["compressed_tensors"]
    assert facts["check"]["passed"]
    assert facts["vllm"] is None
    assert capfd.readouterr() == ("", "")  # the library's progress bars are not ours to show
    result.save(tmp_path / "artifact")
    again = Bundle.load(tmp_path / "artifact")
    assert set(again.exports) == {"compressed-tensors"}
    config = AutoConfig.from_pretrained(tmp_path / "artifact" / "compressed-tensors")
    assert config.quantization_config["quant_method"] == "compressed-tensors"
