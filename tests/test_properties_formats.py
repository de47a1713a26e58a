"""Every format over matrices that nobody would choose: right by its definition in numpy, or refused."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from compress.errors import UserError
from compress.formats import AffineFormat, Coded, Format, Grid, Nf4, QuantizedEmbedding, QuantizedTensor
from compress.formats.nf4 import quantiles
from compress.formats.packing import pack, packed_bytes, unpack
from compress.formats.registry import FORMATS
from compress.formats.sparse import pack_codes, pack_floats, unpack_codes, unpack_floats
from compress.passes.quantize_bitsandbytes import QuantizeBitsandbytes
from compress.passes.quantize_gptq import QuantizeGPTQ
from compress.passes.quantize_round import QuantizeRound

LARGEST = 65504.0  # of float16
TINIEST = 2.0**-24
few = settings(max_examples=40)


def every() -> st.SearchStrategy[Format]:
    integers = [each for each in FORMATS if issubclass(each, AffineFormat)]
    groups = st.sampled_from([None, 16, 17, 64, 4096])
    return st.one_of(
        st.builds(
            lambda kind, group, symmetric, tries: kind(group=group, symmetric=symmetric, clip_search=tries),
            st.sampled_from(integers),
            groups,
            st.booleans(),
            st.sampled_from([0, 4]),
        ),
        groups.map(lambda group: Nf4(group=group)),
        st.builds(lambda rate, t: Coded(rate=rate, trellis=t), st.sampled_from([1.5, 4, 7]), st.booleans()),
    )


SIZES = st.sampled_from([1, 2, 3, 7, 13, 31, 32, 33])
WIDTHS = st.sampled_from([1, 2, 3, 15, 16, 17, 31, 61, 64, 65])
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.37, 1e-45, -1e-40, 1e-38, 6e-8, -3e-5, 6.1e-5, 448.0, 65280.0, -6e4]
SPREADS = st.sampled_from([0.0, 1e-40, 1e-8, 1e-3, 1.0, 1e4])


@st.composite
def matrices(draw: st.DrawFn, widths: st.SearchStrategy[int] = WIDTHS) -> torch.Tensor:
    """(out, in) of any kind of float: one value, none, denormals, one that stands out, one sign, plain."""
    out, columns = draw(SIZES), draw(widths)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    kind = draw(st.sampled_from(["equal", "few", "spread", "outlier", "one sign"]))
    if kind == "equal":
        weight = torch.full((out, columns), draw(st.sampled_from(SPECIAL)))
    elif kind == "few":
        which = torch.randint(len(SPECIAL), (out, columns), generator=generator)
        weight = torch.tensor(SPECIAL)[which]
    else:
        weight = draw(SPREADS) * torch.randn(out, columns, generator=generator)
        if kind == "outlier":
            weight[-1, 0] = draw(st.sampled_from([6e4, -6e4, 1e-45]))
        if kind == "one sign":
            weight = -weight.abs()
    return weight.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))).nan_to_num(
        posinf=LARGEST, neginf=-LARGEST
    )


def expanded(format: Format, grid: Grid, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero-points of every weight, float64 (out, in), from the definition of a group."""
    width = columns if format.group is None else min(format.group, columns)
    which = np.arange(columns) // width
    return grid.scales.double().numpy()[:, which], grid.zeros.double().numpy()[:, which]


def allowed(format: Format, grid: Grid, columns: int) -> np.ndarray:
    """What every code of every weight stands for, float64 (codes, out, in)."""
    scales, zeros = expanded(format, grid, columns)
    if isinstance(format, Nf4):
        return quantiles().double().numpy()[:, None, None] * scales
    return (np.arange(format.levels)[:, None, None] - zeros) * scales


@few
@given(every(), matrices())
def test_codes_are_the_nearest_and_within_half_a_step(format, weight):
    grid = format.fit(weight)
    codes = format.codes(weight, grid)
    values = format.values(codes, grid)
    held = allowed(format, grid, weight.shape[1])
    right = np.take_along_axis(held, codes.long().numpy()[None], 0)[0]
    assert codes.shape == weight.shape
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < format.levels
    # values are those of the definition, in float32
    assert np.allclose(values.double().numpy(), right, rtol=1e-6, atol=1e-44)
    w = weight.double().numpy()
    error, nearest = np.abs(right - w), np.abs(held - w).min(0)
    assert (error <= nearest + 1e-6 * np.abs(w) + 1e-44).all()
    if format.affine:
        inside = (held.min(0) <= w) & (w <= held.max(0))
        step = np.abs(expanded(format, grid, weight.shape[1])[0])
        assert (error <= step / 2 + 1e-6 * np.abs(w))[inside].all()


@few
@given(every(), matrices())
def test_nothing_is_cut_off_by_a_grid_that_is_not_searched(format, weight):
    if "clip_search" in type(format).model_fields:
        format = format.model_copy(update={"clip_search": 0})
    grid = format.fit(weight)
    held, w = allowed(format, grid, weight.shape[1]), weight.double().numpy()
    # half a step of a rounded zero-point; the code that one side has less; what a float16 scale rounds off
    slack = np.abs(expanded(format, grid, weight.shape[1])[0]) * (1 if format.symmetric else 0.5)
    slack = slack * 1e-6 if isinstance(format, Nf4 | Coded) else slack
    slack += 2**-11 * np.abs(w)
    assert (w <= held.max(0) + slack).all()
    assert (w >= held.min(0) - slack).all()


@few
@given(every(), matrices())
def test_scales_are_float16_and_never_0_and_zero_is_on_the_grid(format, weight):
    grid = format.fit(weight)
    assert grid.scales.shape == grid.zeros.shape == (len(weight), format.groups(weight.shape[1]))
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert (grid.scales.abs() >= TINIEST).all()
    assert int(grid.zeros.max()) < format.levels
    zero = format.codes(torch.zeros_like(weight), grid)
    assert not format.values(zero, grid).any()


@few
@given(every(), matrices())
def test_rounding_what_was_rounded_changes_nothing(format, weight):
    grid = format.fit(weight)
    codes = format.round(weight, grid)
    again = format.codes(format.values(codes, grid), grid)
    assert torch.equal(again, codes)
    rounder = format.column_rounder(grid, weight.shape[1])
    for column in (0, weight.shape[1] // 2, weight.shape[1] - 1):
        found = rounder(weight[:, column].float(), column)
        assert torch.equal(format.values(format.codes(_set(weight, column, found), grid), grid)[:, column],
                           found)  # fmt: skip


def _set(weight: torch.Tensor, column: int, values: torch.Tensor) -> torch.Tensor:
    weight = weight.float().clone()
    weight[:, column] = values
    return weight


@few
@given(every(), matrices())
def test_codes_come_back_from_a_file_and_take_the_bytes_that_were_counted(format, weight):
    tensor = QuantizedTensor.round(format, weight)
    shape = tuple(weight.shape)
    if format.streamed:
        stream = format.to_stream(tensor.unpacked(), tensor.scales)
        codes, scales = format.from_stream(load(save({"s": stream}))["s"], shape)
        assert torch.equal(codes, tensor.unpacked())
        assert torch.equal(scales, tensor.scales)
        return
    raw = save(tensor.state_dict())
    body = len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert body == format.stored_bytes(shape)
    # written down once more: packed codes of every group, a float16 scale, packed zero-points of every row
    out, columns = shape
    width = columns if format.group is None else min(format.group, columns)
    groups = -(-columns // width)
    zeros = 0 if format.symmetric else -(-groups * format.bits // 8)
    assert body == out * (groups * (-(-width * format.bits // 8) + 2) + zeros)
    other = QuantizedTensor(format, shape)
    other.load_state_dict(load(raw))
    assert torch.equal(other.unpacked(), tensor.unpacked())
    assert torch.equal(other.dequantize(), tensor.dequantize())
    assert torch.equal(other.grid.zeros, tensor.grid.zeros)
    ids = torch.tensor([out - 1, 0, 0])
    assert torch.equal(QuantizedEmbedding(other)(ids), tensor.dequantize()[ids])


@few
@given(every(), matrices())
def test_codes_without_their_zeros_come_back(format, weight):
    tensor = QuantizedTensor.round(format, weight)
    bitmask, values = pack_codes(tensor)
    found = unpack_codes(bitmask, values, tensor.grid.zeros, format, tensor.shape)
    assert torch.equal(found, tensor.codes)
    kept = int((unpack(bitmask, 1, bitmask.numel() * 8)).sum())
    assert len(values) == packed_bytes(kept, format.bits)


@few
@given(matrices())
def test_floats_without_their_zeros_come_back_but_for_the_sign_of_zero(weight):
    bitmask, values = pack_floats(weight)
    found = unpack_floats(bitmask, values, tuple(weight.shape))
    assert found.dtype == weight.dtype
    assert torch.equal(found, weight)  # -0.0 == 0.0
    assert len(values) == int((weight.float().numpy() != 0).sum())


@settings(max_examples=100)
@given(
    st.integers(1, 8),
    st.lists(st.sampled_from([0, 1, 2, 5]), max_size=3),
    st.sampled_from([0, 1, 2, 3, 7, 8, 9, 13, 16, 17, 31, 32, 33]),
    st.sampled_from(["drawn", "lowest", "highest"]),
    st.integers(0, 10**6),
)
def test_packing_is_one_stream_of_bits(bits, leading, count, fill, seed):
    shape = (*leading, count)
    codes = np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint8)
    if fill != "drawn":
        codes[...] = 0 if fill == "lowest" else (1 << bits) - 1
    packed = pack(torch.from_numpy(codes), bits)
    size = -(-count * bits // 8)
    assert packed.shape == (*leading, size)
    assert packed_bytes(count, bits) == size
    lowest_first = (codes[..., None] >> np.arange(bits, dtype=np.uint8)) & 1  # (..., count, bits)
    stream = lowest_first.reshape(*leading, count * bits)
    assert np.array_equal(packed.numpy(), np.packbits(stream, axis=-1, bitorder="little"))
    assert np.array_equal(unpack(packed, bits, count).numpy(), codes)


def reach(format: Format) -> float:
    """The largest magnitude that codes and a scale of float16 stand for, both signs alike."""
    if isinstance(format, Nf4):
        return LARGEST
    if isinstance(format, Coded):
        return 127 * LARGEST
    return LARGEST * (format.levels - 1 if not format.symmetric else format.levels // 2)


@few
@given(every(), st.sampled_from([1.001, 2.0, 1e9, 1e20, 1e30]), st.booleans(), SIZES, WIDTHS)
def test_weights_that_no_scale_reaches_are_refused(format, factor, negative, out, columns):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(0))
    weight[0, 0] = min(reach(format) * factor, 3e38) * (-1 if negative else 1)
    with pytest.raises(UserError, match=rf"{format.kind} .*65,504.*leave .* out"):
        QuantizedTensor.round(format, weight)
    weight[0, 0] = reach(format) * 0.99 * (-1 if negative else 1)
    found = QuantizedTensor.round(format, weight).dequantize()
    assert float(found[0, 0] / weight[0, 0]) == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("format", [each() for each in FORMATS], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_a_matrix_of_nothing_is_refused(format, shape):
    with pytest.raises(UserError, match=rf"a matrix {shape[0]}x{shape[1]} holds nothing to round"):
        QuantizedTensor.round(format, torch.zeros(shape))


@pytest.mark.parametrize("format", ["int4", "nf4", "coded"])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_a_step_says_which_layer_no_scale_reaches(format, name, bundle, make_context):
    bundle.model.get_submodule(name).weight.data[3, 5] = 1e9
    with pytest.raises(UserError, match=rf"^'{name}': {format} needs a scale of .* leave the layer out"):
        QuantizeRound(format=format, embeddings=format)(bundle, make_context(bundle))
    if "layers" in name:
        with pytest.raises(UserError, match=rf"^'{name}': {format} needs a scale of"):
            QuantizeGPTQ(format=format, embeddings=None, select=["*.up_proj"])(bundle, make_context(bundle))


@pytest.mark.parametrize("method", ["llm_int8", "nf4"])
def test_the_library_is_given_no_weight_that_float16_does_not_hold(method, bundle, make_context):
    pytest.importorskip("bitsandbytes")
    name = "model.layers.1.mlp.down_proj"
    bundle.model.get_submodule(name).weight.data[3, 5] = 7e4
    with pytest.raises(UserError, match=rf"^'{name}': .*leave the layer out"):
        QuantizeBitsandbytes(method=method, select=[name])(bundle, make_context(bundle))
