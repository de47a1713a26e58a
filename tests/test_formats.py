"""Formats: what a code means, how it is packed, what it costs, and how close it comes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from compress.errors import UserError
from compress.formats import (
    Int2,
    Int3,
    Int4,
    Int5,
    Int6,
    Int8,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedTensor,
)
from compress.formats.packing import pack, unpack
from compress.formats.registry import format_from

FORMATS = [
    Int8(),
    Int8(group=16),
    Int8(symmetric=False),
    Int8(group=32, symmetric=False),
    Int4(),
    Int4(group=16),
    Int4(group=32, symmetric=True),
    Int4(group=None),
    Int4(group=None, symmetric=True),
    Int2(),
    Int2(group=32, symmetric=True),
    Int3(),
    Int3(group=17),  # 51 bits: the last byte of every group is not full
    Int3(group=None, symmetric=True),
    Int5(group=32),
    Int6(),
    Int6(group=None),
    Int4(group=17),  # odd: half a byte of every group is empty
]
formats = st.sampled_from(FORMATS)
seeds = st.integers(0, 2**31 - 1)
widths = st.integers(1, 90)  # ragged last groups, odd widths, and widths below one group


def weight(out: int, columns: int, seed: int, spread: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return spread * torch.randn(out, columns, generator=generator)


@given(st.integers(2, 8), st.lists(st.integers(0, 4), max_size=2), st.integers(1, 33), seeds)
def test_unpacking_undoes_packing(bits, leading, count, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (*leading, count), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (*leading, -(-count * bits // 8))
    assert torch.equal(unpack(packed, bits, count), codes)


@given(formats, st.integers(1, 5), widths, seeds)
def test_stored_bytes_are_those_of_the_tensors(format, out, columns, seed):
    tensor = QuantizedTensor.round(format, weight(out, columns, seed))
    found = sum(t.numel() * t.element_size() for t in tensor.state_dict().values())
    assert found == format.stored_bytes((out, columns))


@given(formats, st.integers(1, 5), widths, seeds)
def test_a_value_on_the_grid_rounds_to_its_own_code(format, out, columns, seed):
    w = weight(out, columns, seed)
    grid = format.fit(w)
    codes = format.codes(w, grid)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) < format.levels
    assert torch.equal(format.codes(format.values(codes, grid), grid), codes)


@given(formats, widths, seeds, st.floats(-3, 3))
def test_zero_is_on_every_grid(format, columns, seed, shift):
    w = weight(3, columns, seed) + shift  # also rows of one sign only
    w[0] = 0
    grid = format.fit(w)
    zeros = torch.zeros_like(w)
    assert torch.equal(format.values(format.codes(zeros, grid), grid), zeros)


@given(formats, widths, seeds, st.sampled_from([1e-6, 1e-3, 1.0, 1e3]))
def test_scales_are_what_float16_holds(format, columns, seed, spread):
    w = weight(3, columns, seed, spread)
    w[0] = 0
    scales = format.fit(w).scales
    assert torch.equal(scales.half().float(), scales)
    assert (scales != 0).all()


@given(formats, st.integers(1, 5), widths, seeds)
def test_storage_keeps_codes_and_costs_what_the_docstring_says(format, out, columns, seed):
    w = weight(out, columns, seed)
    grid = format.fit(w)
    codes = format.codes(w, grid)
    stored = QuantizedTensor.from_codes(format, codes, grid)
    assert torch.equal(stored.unpacked(), codes)
    assert torch.equal(stored.dequantize(), format.values(codes, grid))
    assert torch.equal(stored.grid.scales, grid.scales)
    assert torch.equal(stored.grid.zeros, grid.zeros)
    width = columns if format.group is None else min(format.group, columns)
    groups = -(-columns // width)
    expected = out * groups * (-(-width * format.bits // 8) + 2)
    if not format.symmetric:
        expected += out * -(-groups * format.bits // 8)
    assert sum(b.numel() * b.element_size() for b in stored.buffers()) == expected


def test_bits_per_weight_of_the_default_formats():
    for format, bits in (
        (Int4(), 4 + 16 / 64 + 4 / 64),
        (Int4(symmetric=True), 4.25),
        (Int8(), 8 + 16 / 256),
    ):
        stored = QuantizedTensor(format, (8, 256))
        assert sum(8 * b.numel() * b.element_size() for b in stored.buffers()) == bits * 8 * 256


@given(formats, widths, seeds)
def test_rows_are_those_of_the_whole(format, columns, seed):
    stored = QuantizedTensor.round(format, weight(7, columns, seed))
    ids = torch.tensor([[6, 0, 3], [3, 3, 1]])
    assert torch.equal(stored.rows(ids), stored.dequantize()[ids])
    assert QuantizedEmbedding(stored)(ids).shape == (2, 3, columns)


def plain_min_max(w: torch.Tensor) -> torch.Tensor:
    """The textbook symmetric 4-bit grid, one group per row: 15 of 16 codes, the scale from the maximum."""
    scale = (w.abs().amax(1, keepdim=True) / 7).clamp(min=2**-24).half().float()
    return (w / scale).round().clamp(-8, 7) * scale


@given(st.integers(2, 64), seeds)
def test_symmetric_int4_is_no_worse_than_plain_min_max(columns, seed):
    w = weight(4, columns, seed)
    format = Int4(group=None, symmetric=True, clip_search=0)
    values = QuantizedTensor.round(format, w).dequantize()
    ours, plain = ((v - w).square().sum(1) for v in (values, plain_min_max(w)))
    assert (ours <= plain * (1 + 1e-5)).all()


def test_symmetric_int4_uses_all_sixteen_codes():
    w = torch.tensor([[8.0, -7.0, 3.0, 1.0], [-8.0, 7.0, -3.0, -1.0]])  # either side may be the longer one
    assert torch.equal(QuantizedTensor.round(Int4(symmetric=True), w).dequantize(), w)


@given(formats, widths, seeds)
def test_clip_search_never_raises_the_weighted_error(format, columns, seed):
    w = weight(4, columns, seed)
    importance = torch.rand(columns, generator=torch.Generator().manual_seed(seed)) + 0.01
    plain = format.model_copy(update={"clip_search": 0})

    def error(f):
        return ((QuantizedTensor.round(f, w, importance).dequantize() - w).square() * importance).sum()

    assert error(format) <= error(plain) * (1 + 1e-5)


def test_clip_search_pays_where_one_weight_stands_out():
    w = weight(8, 64, 0)
    w[:, 5] = 6.0
    importance = torch.ones(64)
    importance[5] = 1e-3

    def error(clip_search):
        stored = QuantizedTensor.round(Int4(clip_search=clip_search), w, importance)
        return ((stored.dequantize() - w).square() * importance).sum()

    assert error(20) < 0.8 * error(0)


@given(widths, seeds, st.floats(1e-7, 1e2))
def test_int8_errs_by_at_most_half_a_step(columns, seed, spread):
    w = weight(4, columns, seed, spread)
    format = Int8(clip_search=0)
    grid = format.fit(w)
    error = (format.values(format.codes(w, grid), grid) - w).abs()
    assert (error <= grid.scales * 0.5 * (1 + 1e-5)).all()


@given(formats, widths, seeds)
def test_the_column_rounder_agrees_with_the_codes(format, columns, seed):
    w = weight(3, columns, seed)
    grid = format.fit(w)
    rounder = format.column_rounder(grid, columns)
    values = format.values(format.codes(w, grid), grid)
    assert all(torch.equal(rounder(w[:, i], i), values[:, i]) for i in range(columns))


def test_large_tables_are_fitted_in_slices_without_a_seam():
    w = weight(4100, 3, 0)  # more rows than one slice holds
    grid = Int8().fit(w)
    assert torch.equal(grid.scales[4090:], Int8().fit(w[4090:]).scales)


def test_a_linear_layer_of_codes_multiplies_by_their_values():
    w, x = weight(6, 20, 0), weight(5, 20, 1)
    bias = torch.arange(6.0)
    layer = QuantizedLinear(QuantizedTensor.round(Int4(group=16), w), bias)
    assert torch.equal(layer(x), x @ layer.weight.T + bias)
    assert "int4" in repr(layer)


def test_an_embedding_of_codes_keeps_its_scale():
    stored = QuantizedTensor.round(Int8(), weight(6, 20, 0))
    ids = torch.tensor([1, 5])
    assert torch.equal(QuantizedEmbedding(stored, scale=4.0)(ids), 4.0 * stored.dequantize()[ids])


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_format_is_a_value_that_goes_through_json(format):
    assert format_from(format.model_dump(mode="json")) == format
    assert hash(format_from(format.model_dump())) == hash(format)


def test_what_is_no_format_is_refused():
    with pytest.raises(UserError, match="no known format"):
        format_from("int7")
    with pytest.raises(UserError, match="no known format"):
        format_from({"kind": "int4", "group": 3})
    with pytest.raises(ValidationError):
        Int4(bits=4)
