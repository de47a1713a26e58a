"""The codes in the file are the codes of the torch model, stored once, in the promised bytes."""

import numpy as np
import onnx
import pytest
import torch
from export_models import exported, quantized, tiny_bundle, tokens, torch_logits
from onnx import TensorProto, numpy_helper

from compress.errors import UserError
from compress.export.onnx.blocks import as_blocks
from compress.export.onnx.forms import Forms
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.integers import product
from compress.formats import Int4, Int8, QuantizedTensor
from compress.formats.registry import format_from
from compress.host.machine import adds_products_in_32_bits
from compress.runtimes.onnx_session import graph_file, open_session

INT4 = Int4(group=64)
INT8 = Int8()


def initializers(folder):
    model = onnx.load(folder / "model.onnx")
    return {x.name: numpy_helper.to_array(x) for x in model.graph.initializer}


def layer(bundle, name):
    return bundle.model.get_submodule(name).quantized


def test_int4_codes_scales_and_zeros_are_the_same_bytes(tmp_path):
    bundle = quantized(tiny_bundle("llama"), INT4)
    exported(bundle, tmp_path)
    stored = initializers(tmp_path)
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj", "lm_head"):
        held = layer(bundle, name)
        assert stored[f"{name}.codes"].tobytes() == held.codes.numpy().tobytes()
        assert stored[f"{name}.scales"].tobytes() == held.scales.numpy().tobytes()
        assert stored[f"{name}.zeros"].tobytes() == held.zeros.numpy().tobytes()


def test_stacked_query_key_value_keep_their_codes(tmp_path):
    bundle = quantized(tiny_bundle("llama"), INT4)
    exported(bundle, tmp_path)
    held = [layer(bundle, f"model.layers.0.self_attn.{x}_proj") for x in "qkv"]
    expected = b"".join(x.codes.numpy().tobytes() for x in held)
    assert initializers(tmp_path)["layers.0.qkv.codes"].tobytes() == expected


@pytest.mark.parametrize(
    ("bits", "processor", "kind", "zero"),
    [(7, "any", np.int8, 0), (8, "any", np.uint8, 128), (8, "vnni", np.int8, 0)],
)
def test_int8_codes_are_the_same_around_their_zero(bits, processor, kind, zero, tmp_path, monkeypatch):
    monkeypatch.setattr("compress.runtimes.onnx_session.adds_products_in_32_bits", lambda: True)
    bundle = quantized(tiny_bundle("llama"), INT8)
    exported(bundle, tmp_path, Forms(int8="token", activation_bits=bits, processor=processor))
    stored = initializers(tmp_path)["model.layers.0.mlp.up_proj.codes"]
    held = layer(bundle, "model.layers.0.mlp.up_proj")
    assert stored.dtype == kind
    assert (stored.T.astype(np.int16) - zero + 128 == held.unpacked().numpy()).all()


def test_a_graph_for_vnni_is_refused_where_sums_would_be_cut_off(tmp_path, monkeypatch):
    bundle = quantized(tiny_bundle("llama"), INT8)
    monkeypatch.setattr("compress.runtimes.onnx_session.adds_products_in_32_bits", lambda: False)
    with pytest.raises(UserError, match="processors with vnni.*Export again without `processor`"):
        exported(bundle, tmp_path, Forms(int8="token", activation_bits=8, processor="vnni"))


@pytest.mark.skipif(not adds_products_in_32_bits(), reason="this processor has no VNNI")
@pytest.mark.parametrize("form", ["token", "tensor"])
def test_a_graph_for_vnni_equals_torch(form, tmp_path):
    bundle, ids = quantized(tiny_bundle("llama"), INT8), tokens(batch=2, length=24)
    expected = torch_logits(bundle.model, ids)
    found = exported(bundle, tmp_path, Forms(int8=form, activation_bits=8, processor="vnni")).logits(ids)
    assert np.abs(found - expected).mean() < 0.05 * np.abs(expected).max()


@pytest.mark.parametrize("format", [None, INT8, INT4])
def test_a_tied_matrix_is_stored_once(format, tmp_path):
    bundle = tiny_bundle("llama_tied")
    exported(bundle if format is None else quantized(bundle, format), tmp_path)
    stored = [
        x
        for x in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
        if "lm_head" in x.name or "embedding" in x.name
    ]
    assert all(x.name.startswith("embedding.") for x in stored)
    # codes have two shapes, for the rows that are gathered and for the product, of the same bytes
    places = {x.name: {e.key: e.value for e in x.external_data}.get("offset", x.name) for x in stored}
    assert {name.removesuffix(".3d").rpartition(".")[2] for name in places} <= {
        "weight",
        "codes",
        "scales",
        "zeros",
    }
    twice = {"embedding.codes", "embedding.codes.3d"} & set(places)
    assert len(twice) == (0 if format is None else 2)
    assert len({places[name] for name in twice}) <= 1


@pytest.mark.parametrize("form", ["token", "tensor"])
@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("many_rows", [False, True])
def test_integer_products_are_exact_at_their_extremes(form, bits, symmetric, many_rows, tmp_path):
    """Largest codes times largest activations, of one sign: what sums of 16 bits cut off."""
    largest, (rows, columns) = 63 if bits == 7 else 127, (8, 96)
    random = np.random.default_rng(0)
    codes = np.where(random.random((rows, columns)) < 0.8, 255, 0).astype(np.uint8)
    x = (random.choice([largest, largest - 1, -largest], (5, columns)) / largest).astype(np.float32)
    x[:, 0] = 1.0  # every row's magnitude is 1, so rounding changes nothing
    weight = QuantizedTensor(Int8(symmetric=symmetric), (rows, columns))
    weight.codes, weight.scales = torch.from_numpy(codes)[:, None], torch.ones(rows, 1, dtype=torch.float16)
    weight.zeros = None if symmetric else torch.full((rows, 1), 7, dtype=torch.uint8)
    with GraphBuilder(tmp_path) as graph:
        graph.input("x", TensorProto.FLOAT, ["tokens", columns])
        forms = Forms(int8=form, activation_bits=bits, many_rows=many_rows)
        y = product(graph, "x", "layer", weight, "", forms)
        graph.node("Identity", [y], [graph.output("y", TensorProto.FLOAT, ["tokens", rows])])
        graph.save("product", {})
    found = open_session(graph_file(tmp_path), threads=1).run(None, {"x": x})[0]
    expected = x.astype(np.float64) @ weight.dequantize().double().numpy().T
    assert np.abs(found - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen2", "qwen3", "gpt2", "mistral_window"])
@pytest.mark.parametrize(
    ("format", "forms", "tolerance"),
    [
        (INT4, Forms(accuracy_level=0), 1e-4),
        (Int4(group=32, symmetric=True), Forms(accuracy_level=0), 1e-4),
        (Int4(group=None), Forms(accuracy_level=0), 1e-4),
        (Int4(group=48), Forms(accuracy_level=0), 1e-4),
        (Int8(group=32, symmetric=False), Forms(accuracy_level=0), 1e-4),
        (INT8, Forms(int8="blocks", accuracy_level=0), 1e-4),
        (INT4, Forms(), 0.1),
        (INT8, Forms(), 0.1),
        (Int8(symmetric=False), Forms(), 0.1),
        (INT8, Forms(int8="tensor"), 0.1),
        (INT8, Forms(int8="token"), 0.1),
        (INT8, Forms(int8="token", activation_bits=8), 0.05),
        (INT8, Forms(int8="tensor", activation_bits=8), 0.1),
    ],
)
def test_quantized_graphs_equal_torch(name, format, forms, tolerance, tmp_path):
    bundle = quantized(tiny_bundle(name), format)
    ids = tokens(batch=2, length=24)
    expected = torch_logits(bundle.model, ids)
    found = exported(bundle, tmp_path, forms).logits(ids)
    # rounded activations are noise, so that one is bounded in the mean
    difference = np.abs(found - expected)
    worst = difference.max() if tolerance < 0.01 else difference.mean()
    assert worst < tolerance * np.abs(expected).max()


def test_mixed_formats_in_one_model(tmp_path):
    bundle = quantized(tiny_bundle("llama"), INT4, embeddings=INT8)
    bundle.model.model.layers[0].self_attn.q_proj = (
        tiny_bundle("llama").model.model.layers[0].self_attn.q_proj
    )
    ids = tokens(batch=1, length=24)
    expected = torch_logits(bundle.model, ids)
    found = exported(bundle, tmp_path, Forms(int8="blocks", accuracy_level=0)).logits(ids)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


def test_a_dead_layer_stays_dead_in_the_token_form(tmp_path):
    bundle = tiny_bundle("llama")
    with torch.no_grad():
        bundle.model.model.layers[1].mlp.up_proj.weight.zero_()  # the next layer reads rows of zeros
    bundle = quantized(bundle, INT8)
    found = exported(bundle, tmp_path).logits(tokens(1, 8))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("kind", ["int2", "int3", "int4", "int5", "int6", "int8"])
@pytest.mark.parametrize("columns", [48, 64, 100, 192])
@pytest.mark.parametrize("group", [None, 16, 48, 64, 96])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_stand_for_the_same_weights(kind, columns, group, symmetric):
    format = format_from({"kind": kind, "group": group, "symmetric": symmetric, "clip_search": 0})
    if group is not None and columns == 100 and group > 64:
        pytest.skip("a group as wide as the row but for four columns is cut differently")
    held = QuantizedTensor.round(format, torch.randn(5, columns))
    blocks = as_blocks(held)
    assert blocks.bits == {2: 2, 3: 4, 4: 4, 5: 8, 6: 8, 8: 8}[format.bits]
    uncut = format_from({"kind": f"int{blocks.bits}", "group": blocks.block, "symmetric": symmetric})
    again = QuantizedTensor(uncut, (5, blocks.codes.shape[1] * blocks.block))
    again.codes, again.scales, again.zeros = blocks.codes, blocks.scales, blocks.zeros
    values = again.dequantize()
    assert (values[:, :columns] == held.dequantize()).all()
    assert (values[:, columns:] == 0).all()


@pytest.mark.parametrize("kind", ["int2", "int3", "int5", "int6"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_integer_width_runs(kind, symmetric, tmp_path):
    """2 bits have a kernel of their own; 3, 5 and 6 are widened. Embedding and head, too."""
    format = {"kind": kind, "group": 32, "symmetric": symmetric}
    bundle = quantized(tiny_bundle("llama_tied"), format_from(format))
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = bundle.model(input_ids=torch.from_numpy(ids).long()).logits.numpy()
    found = exported(bundle, tmp_path, Forms(accuracy_level=0)).logits(ids)
    assert np.abs(found - expected).max() < 1e-3


def test_file_sizes(tmp_path):
    bundle = tiny_bundle("llama_tied")
    sizes = {}
    for kind, held in (("f", bundle), ("8", quantized(bundle, INT8)), ("4", quantized(bundle, INT4))):
        exported(held, tmp_path / kind)
        sizes[kind] = sum(np.prod(x.shape) * x.itemsize for x in initializers(tmp_path / kind).values())
    assert sizes["8"] < 0.29 * sizes["f"]
    assert sizes["4"] < 0.19 * sizes["f"]
