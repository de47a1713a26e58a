"""Static int8: the graph rounds as torch does, in standard operators that become one integer product."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from encoder_models import tiny_encoder
from export_models import exported, quantized, tiny_bundle, tokens, torch_logits
from onnx import TensorProto

from compress.errors import UserError
from compress.export.onnx.architecture import Linear
from compress.export.onnx.artifact import write_artifact
from compress.export.onnx.forms import Forms
from compress.export.onnx.graph import GraphBuilder
from compress.export.onnx.static import static_product
from compress.formats import Activations, Int4, Int8, QuantizedLinear, QuantizedTensor
from compress.formats.activations import round_static
from compress.passes.export_onnx import ExportOnnx
from compress.passes.round_activations import RoundActivations, _ranges
from compress.run.preflight import check_order
from compress.run.recipe import Recipe
from compress.runtimes.onnx_encoder import OnnxEncoder
from compress.runtimes.onnx_session import graph_file, open_session


def rounded(bundle, format, ids):
    """The same with codes, and with activations on the grid that these tokens give."""
    result = quantized(bundle, format)
    held = {
        name: module
        for name, module in result.model.named_modules()
        if isinstance(module, QuantizedLinear)
        and name.startswith(("model.layers", "transformer.h", "bert.enc"))
    }
    bounds = _ranges(result.model, list(held), torch.from_numpy(ids).long())
    for name, module in held.items():
        module.activations, module.activation_bounds = Activations(mode="static"), bounds[name]
    return result


def operators(folder, scratch):
    """How often each operator is in the graph that ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(graph_file(folder), options, providers=["CPUExecutionProvider"])
    graph = onnx.load(scratch / "optimized.onnx", load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("format", [Int8(), Int8(symmetric=False)])
def test_a_decoder_rounds_as_in_torch_and_multiplies_in_integers(name, format, tmp_path):
    ids = tokens(batch=2, length=24)
    bundle = rounded(tiny_bundle(name), format, ids)
    runtime = exported(bundle, tmp_path, Forms(int8="blocks", accuracy_level=0))
    expected = torch_logits(bundle.model, ids)
    # a value on the edge of two steps may fall to either side, so this is bounded in the mean
    assert np.abs(runtime.logits(ids) - expected).mean() < 2e-3 * np.abs(expected).max()
    found = operators(tmp_path, tmp_path)
    products = 4 if name == "gpt2" else 5  # query, key and value are one; gate and up are two
    assert found["MatMulIntegerToFloat"] == products * len(runtime._cache_shapes) // 2
    assert found["MatMul"] == found["DequantizeLinear"] == 0


def test_an_encoder_does_so_too(tmp_path):
    ids = tokens(batch=2, length=24)
    bundle = rounded(tiny_encoder("bert"), Int8(), ids)
    facts = write_artifact(bundle, tmp_path, Forms(int8="token"))
    with torch.inference_mode():
        expected = bundle.model(torch.from_numpy(ids).long()).logits.numpy()
    found = OnnxEncoder(tmp_path, threads=1).logits(ids)
    assert np.abs(found - expected).mean() < 0.02 * np.abs(expected).max()  # its head rounds per token
    assert facts["linear_forms"]["static"] == operators(tmp_path, tmp_path)["MatMulIntegerToFloat"] - 2 == 6


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_product_is_exact_at_its_extremes(symmetric, tmp_path):
    """Largest codes times largest activations, of one sign: what sums of 16 bits cut off."""
    random = np.random.default_rng(0)
    codes = np.where(random.random((8, 96)) < 0.8, 255, 0).astype(np.uint8)
    bounds = torch.tensor([-0.5, 2.0])
    x = np.where(random.random((5, 96)) < 0.7, 2.0, -0.5).astype(np.float32)
    weight = QuantizedTensor(Int8(symmetric=symmetric), (8, 96))
    weight.codes, weight.scales = torch.from_numpy(codes)[:, None], torch.ones(8, 1, dtype=torch.float16)
    weight.zeros = None if symmetric else torch.full((8, 1), 7, dtype=torch.uint8)
    with GraphBuilder(tmp_path) as graph:
        graph.input("x", TensorProto.FLOAT, ["tokens", 96])
        y = static_product(graph, "x", Linear("layer", weight, None, bounds), "", signed=False)
        graph.node("Identity", [y], [graph.output("y", TensorProto.FLOAT, ["tokens", 8])])
        graph.save("product", {})
    found = open_session(graph_file(tmp_path), threads=1).run(None, {"x": x})[0]
    expected = round_static(torch.from_numpy(x), bounds).double() @ weight.dequantize().double().T
    assert np.abs(found - expected.numpy()).max() < 1e-6 * np.abs(expected.numpy()).max()


def test_what_is_not_static_int8_is_refused(recipe_dict, make_context):
    for mode, refused in (("static", False), ("dynamic", True)):
        chain = ["quantize_round", {"round_activations": {"mode": mode}}, "export_onnx"]
        recipe = Recipe.parse({**recipe_dict, "variants": {"v": chain}})
        if refused:
            with pytest.raises(UserError, match="export_onnx cannot come after round_activations"):
                check_order(recipe, "v")
        else:
            check_order(recipe, "v")
    bundle = quantized(tiny_bundle("llama"), Int4(group=64))
    bundle = RoundActivations(mode="static")(bundle, make_context(bundle))
    with pytest.raises(UserError, match=r"rounds its inputs .static. and holds 4-bit codes, and only static"):
        ExportOnnx()(bundle, make_context(bundle))
