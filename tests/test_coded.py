"""Entropy-coded codes: what they cost, how close they come, and what a damaged file says."""

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.bundle import CODES, Bundle, weight_bytes
from compress.errors import UserError
from compress.formats import Coded, Int3, Int8, QuantizedTensor
from compress.formats.coded import RateControl, bits_per_weight
from compress.formats.entropy_coding import deflate, inflate
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse

IDEAL = math.pi * math.e / 6  # 1.53 dB: a uniform grid with ideal coding above the rate-distortion bound


def gaussian(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


@given(st.binary(max_size=2000))
def test_inflating_undoes_deflating(data):
    codes = torch.tensor(list(data), dtype=torch.uint8)
    assert torch.equal(inflate(deflate(codes), len(data)), codes)


def test_any_zlib_reads_the_stream():
    codes = torch.arange(200, dtype=torch.uint8)
    assert zlib.decompress(deflate(codes).numpy().tobytes()) == bytes(range(200))


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_stream_is_refused(where, change):
    codes = QuantizedTensor.round(Coded(), gaussian(32, 32)).unpacked()
    stream = deflate(codes)
    stream[where % len(stream)] ^= change
    with pytest.raises(UserError, match="stream"):
        inflate(stream, codes.numel())


@pytest.mark.parametrize("count", [0, 999, 1001])
def test_a_stream_of_another_length_is_refused(count):
    with pytest.raises(UserError, match="codes where"):
        inflate(deflate(torch.zeros(1000, dtype=torch.uint8)), count)


@pytest.mark.parametrize("rate", [2.0, 3.3, 5.0])
@pytest.mark.parametrize("laplace", [False, True])
def test_the_rate_is_met_and_nothing_is_clipped(rate, laplace):
    weight = gaussian(256, 512)
    if laplace:
        weight = weight.sign() * weight.square()
    format = Coded(rate=rate)
    grid = format.fit(weight)
    codes = format.codes(weight, grid)
    assert bits_per_weight(codes) == pytest.approx(rate, abs=0.01)
    assert ((format.values(codes, grid) - weight).abs() <= grid.scales.abs() / 2 * 1.001).all()


@pytest.mark.parametrize("rate", [3.3, 4.3])
def test_the_error_is_that_of_a_uniform_grid_with_good_coding(rate):
    weight = gaussian(256, 512)
    tensor = QuantizedTensor.round(Coded(rate=rate), weight)
    error = float((tensor.dequantize() - weight).square().mean())
    bits = rate - 16 / 512  # what is left for the codes
    assert error < IDEAL * 2 ** (-2 * (bits - 0.08))  # a prefix code loses some hundredths of a bit


@pytest.mark.parametrize("heavy", [False, True])
def test_at_the_same_bytes_groups_err_by_twice_as_much(heavy):
    weight = gaussian(256, 512)
    if heavy:
        weight = weight * (1 + gaussian(256, 512, seed=1).square())
    groups = Int3(group=64)
    rate = 8 * groups.stored_bytes((256, 512)) / weight.numel()

    def error(format):
        return float((QuantizedTensor.round(format, weight).dequantize() - weight).square().mean())

    assert error(Coded(rate=rate)) < 0.55 * error(groups)


def test_an_outlier_costs_its_own_row_alone():
    weight = gaussian(64, 512)
    plain = Coded(rate=5).fit(weight).scales
    weight[3, 7] = 1000.0
    grid = Coded(rate=5).fit(weight)
    others = torch.arange(64) != 3
    assert len(grid.scales[others].unique()) == 1
    assert grid.scales[3] > 50 * grid.scales[0]
    assert float(grid.scales[0]) == pytest.approx(float(plain[0]), rel=0.1)
    values = Coded().values(Coded().codes(weight, grid), grid)
    assert float(values[3, 7]) == pytest.approx(1000.0, rel=0.01)


@pytest.mark.parametrize("weight", [torch.zeros(4, 40), torch.ones(3, 5), 1e-9 * torch.ones(8, 64)])
def test_a_matrix_of_one_value_is_no_trouble(weight):
    tensor = QuantizedTensor.round(Coded(), weight)
    assert tensor.dequantize().isfinite().all()


def test_what_solving_adds_is_saved_on_the_matrices_to_come():
    format = Coded(rate=3.0)
    control, spent, count = RateControl(40 * 64 * 256), 0.0, 0
    for seed in range(40):
        weight = gaussian(64, 256, seed)
        grid = control.fit(format, weight)
        codes = format.codes(1.1 * weight, grid)  # as a solver might: more spread than what was fitted
        control.spent(format, [codes])
        spent += bits_per_weight(codes) * codes.numel()
        count += codes.numel()
    assert spent / count == pytest.approx(3.0, abs=0.005)
    assert spent / count < 3.0


def test_gptq_meets_the_rate_in_the_file(bundle, make_context, tmp_path):
    format = Coded(rate=4.0)
    result = QuantizeGPTQ(format=format, embeddings=None)(bundle, make_context(bundle))
    result.save(tmp_path / "artifact")
    state = load_file(tmp_path / "artifact" / CODES)
    streams = {name: t for name, t in state.items() if name.endswith(".deflated")}
    assert not any(name.endswith(".codes") for name in state)
    coded = [m.quantized for m in result.model.modules() if hasattr(m, "quantized")]
    assert len(streams) == len(coded)
    size = sum(t.numel() for t in streams.values()) + sum(2 * m.shape[0] for m in coded)
    weights = sum(m.shape[0] * m.shape[1] for m in coded)
    assert 8 * size / weights == pytest.approx(4.0, rel=0.02)
    loaded = Bundle.load(tmp_path / "artifact")
    assert weight_bytes(loaded.model) == weight_bytes(result.model)
    eight = QuantizeRound(format=Int8(), embeddings=None)(bundle, make_context(bundle))
    assert weight_bytes(loaded.model) == weight_bytes(eight.model), "resident: a byte a weight"


def test_a_streamed_model_gives_the_same_file(bundle, make_context, tmp_path):
    bundle.save(tmp_path / "base")
    step, files = QuantizeGPTQ(format=Coded(), embeddings=Coded(rate=6)), []
    for stream in (False, True):
        source = Bundle.load(tmp_path / "base", stream=stream)
        step(source, make_context(bundle, workdir=f"work-{stream}")).save(tmp_path / f"out-{stream}")
        files.append(load_file(tmp_path / f"out-{stream}" / CODES))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_zeros_stored_apart_leave_streams_alone(bundle, make_context, tmp_path):
    coded = QuantizeGPTQ(format=Coded(), embeddings=None)(bundle, make_context(bundle))
    StoreSparse()(coded, make_context(coded)).save(tmp_path / "artifact")
    loaded = Bundle.load(tmp_path / "artifact")
    for name, module in coded.model.named_modules():
        if hasattr(module, "quantized"):
            assert torch.equal(module.quantized.codes, loaded.model.get_submodule(name).quantized.codes)


def test_a_damaged_file_names_the_layer_and_what_to_do(bundle, make_context, tmp_path):
    QuantizeRound(format=Coded(), embeddings=None)(bundle, make_context(bundle)).save(tmp_path / "artifact")
    file = tmp_path / "artifact" / CODES
    state = load_file(file)
    name = next(name for name in state if name.endswith(".deflated"))
    state[name][20] ^= 255
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name}.*write the artifact again"):
        Bundle.load(tmp_path / "artifact")
