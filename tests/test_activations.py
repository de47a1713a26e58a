"""Rounded activations, and the grids of bitsandbytes."""

import importlib.util

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.formats import Activations, Int8, Nf4, QuantizedLinear, QuantizedTensor
from compress.formats.activations import round_dynamic, round_static
from compress.formats.nf4 import quantiles
from compress.passes.quantize_bitsandbytes import QuantizeBitsandbytes
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_round import QuantizeRound
from compress.passes.round_activations import RoundActivations
from compress.runtimes.torch_runtime import TorchRuntime

library = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (the extra of that name)"
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(1, 40), st.floats(1e-3, 1e3))
def test_dynamic_rounding_stays_within_half_a_step_and_keeps_integers_whole(seed, rows, columns, spread):
    x = normal(rows, columns, seed=seed) * spread
    rounded = round_dynamic(x)
    steps = x.abs().amax(1, keepdim=True) / 127
    assert ((rounded - x).abs() <= 0.5001 * steps).all()
    assert ((rounded / steps).round() - rounded / steps).abs().max() < 1e-3
    assert torch.allclose(round_dynamic(x * 8), rounded * 8, rtol=1e-5)


def test_outlier_columns_stay_and_the_others_get_a_finer_grid():
    x = normal(8, 32)
    x[:, 3] *= 100
    plain, mixed = round_dynamic(x), round_dynamic(x, outliers=6.0)
    assert torch.equal(mixed[:, 3], x[:, 3])
    others = torch.arange(32) != 3
    assert (mixed - x)[:, others].square().mean() < 0.01 * (plain - x)[:, others].square().mean()


def test_static_rounding_uses_its_range_and_holds_zero():
    x = normal(50, 20)
    bounds = torch.stack(x.aminmax())
    rounded = round_static(x, bounds)
    assert (rounded - x).abs().max() <= 0.51 * (bounds[1] - bounds[0]) / 255
    assert len(rounded.unique()) <= 256
    assert round_static(torch.zeros(3), torch.tensor([2.0, 3.0])).tolist() == [0, 0, 0]
    assert float(round_static(torch.tensor([1e6]), bounds)) == pytest.approx(float(bounds[1]), rel=1e-2)


def test_the_product_is_that_of_the_integers():
    weight, x = normal(6, 48), normal(5, 48, seed=1)
    held = QuantizedTensor.round(Int8(), weight)
    layer = QuantizedLinear(held, None, Activations())
    steps = x.abs().amax(1, keepdim=True) / 127
    q = torch.round(x / steps).to(torch.int64)
    exact = (
        (q @ (held.unpacked().to(torch.int64) - 128).T).double()
        * steps.double()
        * held.grid.scales.double().T
    )
    assert torch.allclose(layer(x).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", ["dynamic", "static", "llm_int8"])
def test_the_rule_travels_with_the_artifact(bundle, make_context, tmp_path, mode):
    context = make_context(bundle)
    quantized = QuantizeRound()(bundle, context)
    result = RoundActivations(mode=mode, threshold=2.0)(quantized, context)
    result.save(tmp_path / "artifact")
    loaded = Bundle.load(tmp_path / "artifact")
    ids = torch.arange(40)[None]
    with torch.no_grad():
        before, ours, again = (b.model(input_ids=ids).logits for b in (quantized, result, loaded))
    assert torch.equal(ours, again)
    assert not torch.equal(ours, before)
    assert (ours - before).norm() < 0.1 * before.norm()
    head = loaded.model.get_output_embeddings()
    assert head.activations is None
    # which columns are outliers depends on all that a call reads, so windows are then scored one by one
    assert (TorchRuntime(tmp_path / "artifact", 1).together == 1) == (mode == "llm_int8")


def test_activations_are_refused_where_nothing_holds_codes(bundle, make_context):
    with pytest.raises(UserError, match="no layer that holds codes"):
        RoundActivations()(bundle, make_context(bundle))


def test_nf4_values_are_normal_quantiles():
    values = quantiles()
    assert (values.diff() > 0).all()
    assert values[7] == 0
    inner = values.diff()
    assert inner[7] < inner[0]  # densest around zero
    assert inner[7] < inner[-1]


def test_nf4_beats_the_uniform_grid_on_normal_weights():
    from compress.formats import Int4

    weight = normal(64, 256)
    errors = []
    for format in (Nf4(), Int4(symmetric=True, clip_search=0)):
        held = QuantizedTensor.round(format, weight)
        errors.append(float((held.dequantize() - weight).square().mean()))
    assert errors[0] < errors[1]


def test_gptq_works_on_nf4(bundle, make_context):
    context = make_context(bundle)
    notes = QuantizeGPTQ(format="nf4", asymmetric=0)(bundle, context).notes
    assert notes["mean_output_error"] < 0.02


@library
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["nf4", "llm_int8"])
def test_the_artifact_holds_the_librarys_grid(bundle, make_context, tmp_path, method):
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_quant, quantize_4bit

    wide = ("*.down_proj",)  # 64 inputs, so that blocks lie inside rows
    QuantizeBitsandbytes(method=method, select=wide)(bundle, make_context(bundle)).save(tmp_path / "a")
    layer = Bundle.load(tmp_path / "a").model.model.layers[0].mlp.down_proj
    weight = bundle.model.model.layers[0].mlp.down_proj.weight.detach()
    if method == "nf4":
        wanted = dequantize_4bit(*quantize_4bit(weight, blocksize=64, quant_type="nf4"))
        ours = QuantizedTensor.round(Nf4(), weight)
        assert (ours.unpacked() == layer.quantized.unpacked()).float().mean() > 0.99
    else:
        codes, largest, _ = int8_vectorwise_quant(weight.half())
        wanted = codes.float() * largest[:, None].float() / 127
        assert layer.activations == Activations(outliers=6.0)
    assert torch.allclose(layer.weight, wanted, rtol=1e-3, atol=1e-6)


@library
def test_a_width_that_the_library_cannot_cut_is_refused(bundle):
    with pytest.raises(UserError, match="32 wide"):
        QuantizeBitsandbytes().layers(bundle.model)
