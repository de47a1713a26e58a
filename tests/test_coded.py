"""Entropy-coded codes: what they cost, how close they come, and what a damaged file says."""

import math
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from compress.artifact.bundle import Bundle
from compress.artifact.counts import weight_bytes
from compress.artifact.folder import CODES
from compress.errors import UserError
from compress.formats import Coded, Grid, Int3, Int8, QuantizedTensor
from compress.formats.coded.entropy_coding import decode
from compress.formats.coded.rate_control import RateControl
from compress.formats.coded.streams import bits_per_weight, from_stream, to_stream
from compress.formats.coded.trellis import RUN, halved
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_round import QuantizeRound
from compress.passes.store_sparse import StoreSparse


def gaussian(out: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 70), st.integers(1, 40), st.booleans(), st.integers(0, 10**6))
def test_reading_a_stream_undoes_writing_it(out, columns, trellis, seed):
    tensor = QuantizedTensor.round(Coded(rate=4, trellis=trellis), gaussian(out, columns, seed))
    codes, scales = from_stream(to_stream(tensor.unpacked(), tensor.scales), (out, columns))
    assert torch.equal(codes, tensor.unpacked())
    assert torch.equal(scales, tensor.scales)


@given(st.integers(0, 10**6), st.integers(1, 255))
def test_a_damaged_stream_is_refused(where, change):
    tensor = QuantizedTensor.round(Coded(), gaussian(32, 32))
    stream = to_stream(tensor.unpacked(), tensor.scales)
    stream[where % len(stream)] ^= change
    with pytest.raises(UserError, match="stream is damaged"):
        from_stream(stream, (32, 32))


def drawn(laplace):
    """(256, 512): Gaussian, or crowded around zero."""
    weight = gaussian(256, 512)
    return weight.sign() * weight.square() if laplace else weight


@pytest.mark.parametrize("length", [0, 3, 20])
def test_a_stream_that_was_cut_is_refused(length):
    tensor = QuantizedTensor.round(Coded(), gaussian(32, 32))
    with pytest.raises(UserError, match="stream is damaged"):
        from_stream(to_stream(tensor.unpacked(), tensor.scales)[:length], (32, 32))


@pytest.mark.parametrize("shape", [(31, 32), (32, 31), (1, 1), (64, 64)])
def test_a_stream_of_another_shape_is_refused(shape):
    tensor = QuantizedTensor.round(Coded(), gaussian(32, 32))
    with pytest.raises(UserError, match="stream is not of a matrix"):
        from_stream(to_stream(tensor.unpacked(), tensor.scales), shape)


@pytest.mark.parametrize("rate", [2.0, 3.3, 4.3])
@pytest.mark.parametrize("laplace", [False, True])
def test_the_rate_is_met_through_the_trellis(rate, laplace):
    weight = drawn(laplace)
    tensor = QuantizedTensor.round(Coded(rate=rate), weight)
    assert bits_per_weight(tensor.unpacked(), tensor.scales) == pytest.approx(rate, abs=0.01)


@pytest.mark.parametrize("rate", [2.0, 3.3, 5.0])
@pytest.mark.parametrize("laplace", [False, True])
def test_the_rate_is_met_and_nothing_is_clipped(rate, laplace):
    weight = drawn(laplace)
    format = Coded(rate=rate, trellis=False)
    grid = format.fit(weight)
    codes = format.codes(weight, grid)
    assert bits_per_weight(codes, grid.scales) == pytest.approx(rate, abs=0.01)
    assert ((format.values(codes, grid) - weight).abs() <= grid.scales.abs() / 2 * 1.001).all()


@pytest.mark.parametrize("rate", [3.3, 4.3])
@pytest.mark.parametrize("trellis", [False, True])
def test_the_error_is_as_near_to_the_best_as_theory_tells(rate, trellis):
    """Above the rate-distortion bound: 1.53 dB of a uniform grid with ideal coding, 0.7 of a trellis."""
    weight = gaussian(256, 512)
    tensor = QuantizedTensor.round(Coded(rate=rate, trellis=trellis), weight)
    bits = bits_per_weight(tensor.unpacked(), tensor.scales)
    assert bits == pytest.approx(rate, abs=0.02)
    error = float((tensor.dequantize() - weight).square().mean())
    above = 10 * math.log10(error / 2 ** (-2 * (bits - 0.03)))  # scales, classes and tables take some of it
    assert above < (0.8 if trellis else 1.6)


def test_above_five_bits_codes_are_rounded_plainly():
    weight = gaussian(64, 256)
    for trellis in (False, True):
        tensor = QuantizedTensor.round(Coded(rate=6, trellis=trellis), weight)
        assert (tensor.dequantize() - weight).abs().max() <= tensor.scales.float().max() / 2 * 1.001


def test_zeros_of_a_mask_stay_and_the_rest_is_rounded_plainly(bundle, make_context):
    pruned = PruneMagnitude(sparsity=0.5)(bundle, make_context(bundle))
    coded = QuantizeGPTQ(format=Coded(rate=4), embeddings=None)(pruned, make_context(pruned))
    for name, mask in pruned.masks.items():
        assert not coded.model.get_submodule(name).quantized.dequantize()[~mask].any()


def test_rows_that_fill_no_run_are_solved_alone(bundle, make_context):
    """Queries, keys and values share an input; runs of each must begin where its rows do."""
    result = QuantizeGPTQ(format=Coded(), embeddings=None)(bundle, make_context(bundle))
    tensors = [module.quantized for module in result.model.modules() if hasattr(module, "quantized")]
    assert any(tensor.shape[0] % RUN for tensor in tensors)
    for tensor in tensors:
        assert halved(tensor.unpacked().to(torch.int16) - 128) is not None


def test_outputs_weighed_keep_to_the_trellis(bundle, make_context):
    step = QuantizeGPTQ(format=Coded(), embeddings=None, outputs="fisher", fisher_tokens=512)
    result = step(bundle, make_context(bundle))
    for module in result.model.modules():
        if hasattr(module, "quantized"):
            assert halved(module.quantized.unpacked().to(torch.int16) - 128) is not None


def test_codes_of_what_was_rounded_are_those_of_the_way():
    """A solver's values are read back without going through the trellis again."""
    weight, format = gaussian(96, 160), Coded(rate=3)
    grid = format.fit(weight)
    codes = format.round(weight, grid)
    assert torch.equal(format.codes(format.values(codes, grid), grid), codes)
    assert not torch.equal(format.codes(weight, grid), codes)


@pytest.mark.parametrize("heavy", [False, True])
def test_at_the_same_bytes_groups_err_more_than_twice_as_much(heavy):
    weight = gaussian(256, 512)
    if heavy:
        weight = weight * (1 + gaussian(256, 512, seed=1).square())
    groups = Int3(group=64)
    rate = 8 * groups.stored_bytes((256, 512)) / weight.numel()

    def error(format):
        return float((QuantizedTensor.round(format, weight).dequantize() - weight).square().mean())

    assert error(Coded(rate=rate)) < 0.45 * error(groups)


def test_an_outlier_costs_its_own_row_alone():
    weight = gaussian(64, 512)
    plain = Coded(rate=5).fit(weight).scales
    weight[3, 7] = 1000.0
    grid = Coded(rate=5).fit(weight)
    others = torch.arange(64) != 3
    assert len(grid.scales[others].unique()) == 1
    assert grid.scales[3] > 50 * grid.scales[0]
    assert float(grid.scales[0]) == pytest.approx(float(plain[0]), rel=0.1)
    values = Coded().values(Coded().round(weight, grid), grid)
    assert float(values[3, 7]) == pytest.approx(1000.0, rel=0.01)


@pytest.mark.parametrize("weight", [torch.zeros(4, 40), torch.ones(3, 5), 1e-9 * torch.ones(8, 64)])
def test_a_matrix_of_one_value_is_no_trouble(weight):
    tensor = QuantizedTensor.round(Coded(), weight)
    assert tensor.dequantize().isfinite().all()


def test_no_rate_takes_more_than_the_finest_steps_of_a_byte():
    """Outliers leave most of 256 codes unused, and a budget must know."""
    weight = gaussian(256, 256)
    weight[:, 3] *= 40.0
    tensor = QuantizedTensor.round(Coded(rate=7), weight)
    taken = len(to_stream(tensor.unpacked(), tensor.scales))
    assert taken < 0.8 * Coded(rate=7).stored_bytes((256, 256))
    assert Coded().longest_stream(weight) == pytest.approx(taken, rel=0.01)


def test_what_solving_adds_is_saved_on_the_matrices_to_come():
    format = Coded(rate=3.0)
    control, spent, count = RateControl(40 * 64 * 256), 0.0, 0
    for seed in range(40):
        weight = gaussian(64, 256, seed)
        grid = control.fit(format, weight)
        codes = format.round(1.1 * weight, grid)  # as a solver might: more spread than what was fitted
        control.spent(format, [(codes, grid.scales)])
        spent += bits_per_weight(codes, grid.scales) * codes.numel()
        count += codes.numel()
    assert spent / count == pytest.approx(3.0, abs=0.005)
    assert spent / count < 3.0


def test_gptq_meets_the_rate_in_the_file(bundle, make_context, tmp_path):
    format = Coded(rate=4.0)
    result = QuantizeGPTQ(format=format, embeddings=None)(bundle, make_context(bundle))
    result.save(tmp_path / "artifact")
    state = load_file(tmp_path / "artifact" / CODES)
    streams = {name: t for name, t in state.items() if name.endswith(".stream")}
    assert not any(name.endswith(".codes") for name in state)
    coded = [m.quantized for m in result.model.modules() if hasattr(m, "quantized")]
    assert len(streams) == len(coded)
    size = sum(t.numel() for t in streams.values())
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
    name = next(name for name in state if name.endswith(".stream"))
    state[name][20] ^= 255
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=rf"{name}.*write the artifact again"):
        Bundle.load(tmp_path / "artifact", verify=False)


def test_the_next_rate_asked_for_is_what_is_left_less_what_solving_adds(monkeypatch):
    """The controller's arithmetic, number by number: margin, excess shared out, a moving mean, and bounds."""
    asked: list[float] = []

    def fit_to(self, rate, weight):
        asked.append(rate)
        return Grid(torch.full((64, 1), 0.5), torch.full((64, 1), 128))

    monkeypatch.setattr(Coded, "fit_to", fit_to)
    format, count = Coded(rate=3.0), 64 * 64
    control, left, excess, added = RateControl(6 * count), 6 * count, 0.002 * 6 * count, 0.0
    for seed, spread in enumerate((0.9, 0.05, 6.0, 1.2, 40.0, 1.0)):
        weight = spread * gaussian(64, 64, seed)
        grid = control.fit(format, weight)
        wanted = min(max(3.0 - added - excess / left, 2.5), 3.0)
        assert asked[-1] == pytest.approx(wanted)
        codes = (weight / 0.5).round().add(128).clamp(0, 255).to(torch.uint8)
        control.spent(format, [(codes[:20], grid.scales[:20]), (codes[20:], grid.scales[20:])])
        parts = ((codes[:20], grid.scales[:20]), (codes[20:], grid.scales[20:]))
        bits = sum(bits_per_weight(c, s) * c.numel() for c, s in parts)
        left, excess = left - count, excess + bits - 3.0 * count
        added += 0.25 * (bits / count - wanted - added)
    assert asked[2] == max(asked) == 3.0, "what was saved is no reason for more than the rate"
    assert asked[5] == min(asked) == 2.5
    assert len(set(asked)) >= 4


@pytest.mark.parametrize("trellis", [False, True])
def test_the_stream_is_laid_out_as_documented(trellis):
    weight = gaussian(64, 80)
    tensor = QuantizedTensor.round(Coded(rate=4, trellis=trellis), weight)
    raw = to_stream(tensor.unpacked(), tensor.scales).numpy().tobytes()
    assert int.from_bytes(raw[:4], "little") == zlib.crc32(raw[4:])
    assert raw[4] == trellis
    length = int.from_bytes(raw[5:9], "little")
    planes = zlib.decompress(raw[9 : 9 + length])
    numbers = [planes[i] + 256 * planes[64 + i] for i in range(64)]
    assert numbers == tensor.scales.view(torch.int16).int().bitwise_and(65535).flatten().tolist()
    written = decode(raw[9 + length :], (64, 80)).astype(int) - 128
    codes = tensor.unpacked().int().numpy() - 128
    assert (written == (codes // 2 if trellis else codes)).all()
    assert bits_per_weight(tensor.unpacked(), tensor.scales) == pytest.approx(8 * len(raw) / 5120, abs=0.03)


@pytest.mark.parametrize("trellis", [False, True])
def test_one_step_serves_all_rows_whose_weights_it_reaches(trellis):
    """w = (q - 128) s, the largest 127 steps out at most; values are nothing else."""
    weight = gaussian(40, 64)
    weight[7] *= 200
    format = Coded(rate=5, trellis=trellis)
    grid = format.fit(weight)
    codes = format.round(weight, grid)
    assert torch.equal(format.values(codes, grid), (codes.float() - 128) * grid.scales)
    assert (grid.zeros == 128).all()
    reach = weight.abs().amax(1, keepdim=True) / 127
    common = grid.scales.min()
    torch.testing.assert_close(grid.scales, reach.clamp(min=float(common)), rtol=1e-3, atol=0)
    assert (weight / grid.scales).abs().max() < 127.1
    if trellis:
        rounder = format.column_rounder(grid, 64)
        values = format.values(codes, grid)
        assert all(torch.equal(rounder(weight[:, i], i), values[:, i]) for i in range(64))


@pytest.mark.parametrize("trellis", [False, True])
def test_what_keeps_zeros_rounds_every_zero_to_zero(trellis):
    weight = gaussian(64, 80)
    weight[gaussian(64, 80, seed=1) > 0] = 0
    format = Coded(rate=3, trellis=trellis).keeping_zeros()
    assert format == Coded(rate=3, trellis=False)
    grid = format.fit(weight)
    assert not format.values(format.round(weight, grid), grid)[weight == 0].any()
