"""Grids, packing and rounding against their definitions, written out number by number."""

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.formats import Int2, Int3, Int4, Int6, Int8, Nf4
from compress.formats.activations import round_dynamic, round_static, static_grid
from compress.formats.base import float16_exact, require_reach
from compress.formats.integer import AffineFormat
from compress.formats.nf4 import quantiles
from compress.formats.packing import pack, packed_bytes, unpack
from compress.formats.sparse import pack_floats, unpack_floats

FORMATS = [
    Int4(group=16),
    Int4(group=16, clip_search=0),
    Int3(group=16, symmetric=True),
    Int2(group=16, clip_search=7),
    Int6(group=None, symmetric=True),
    Int8(group=16, clip_search=8),
    Int8(symmetric=False),
]
SMALLEST_RANGE = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 8: 0.8}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def half(x: float) -> float:
    """Rounded to float16, never to zero; where float16 is coarse, away from zero."""
    if abs(x) < 2**-14:
        steps = max(math.ceil(abs(x) * 2**24), 1)
        return math.copysign(steps * 2**-24, x) if x else 2**-24
    x = max(-65504.0, min(x, 65504.0))
    return struct.unpack("<e", struct.pack("<e", x))[0]


def candidates(low: float, high: float, format: AffineFormat) -> list[tuple[float, int]]:
    top = 2**format.bits - 1
    if not format.symmetric:
        scale = half((high - low) / top)
        return [(scale, min(max(round(-low / scale), 0), top))]
    middle = 2 ** (format.bits - 1)
    found = [(half(max(high, -low) / (middle - 1)), middle)]
    if format.bits < 8:
        found.append((half((-high if high > -low else -low) / middle), middle))
    return found


def best_grid(group: list[float], h: list[float], format: AffineFormat) -> tuple[float, int, float]:
    """Every range tried in turn: (scale, zero-point, weighted error)."""
    low, high = min(*group, 0.0), max(*group, 0.0)
    tried = format.clip_search if format.bits < 8 else format.clip_search // 4
    best = (1.0, 2 ** (format.bits - 1), math.inf)
    for i in range(tried + 1):
        shrink = 1 - (1 - SMALLEST_RANGE[format.bits]) * i / max(tried, 1)
        for scale, zero in candidates(low * shrink, high * shrink, format):
            error = 0.0
            for w, weight in zip(group, h, strict=True):
                q = min(max(round(w / scale) + zero, 0), 2**format.bits - 1)
                error += weight * (w - (q - zero) * scale) ** 2
            if error < best[2] * (1 - 1e-6):  # two that are equal but for rounding: either
                best = (scale, zero, error)
    return best


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_the_grid_is_the_best_of_all_that_are_tried(format, weighted):
    weight = normal(4, 40, seed=3) + torch.tensor([0.0, 0.0, 3.0, -3.0])[:, None]  # two rows of one sign
    weight[0, :16], weight[1, 3] = 0.0, 9.0
    importance = (normal(40, seed=4).square() + 0.01) if weighted else None
    grid = format.fit(weight, importance)
    h = (torch.ones(40) if importance is None else importance).tolist()
    width = format.group or 40
    for row in range(4):
        for group, start in enumerate(range(0, 40, width)):
            part = weight[row, start : start + width].tolist()
            scale, zero, error = best_grid(part, h[start : start + width], format)
            found = float(grid.scales[row, group]), int(grid.zeros[row, group])
            if found != (scale, zero):  # then as good
                q = [min(max(round(w / found[0]) + found[1], 0), 2**format.bits - 1) for w in part]
                mine = sum(
                    x * (w - (k - found[1]) * found[0]) ** 2
                    for w, k, x in zip(part, q, h[start : start + width], strict=True)
                )
                assert mine == pytest.approx(error, rel=1e-4)
            assert abs(found[0]) == half(abs(found[0]))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_codes_and_values_are_those_of_the_equation(format):
    weight = normal(5, 40, seed=1)
    grid = format.fit(0.7 * weight)  # some weights lie beyond their grid
    codes, width = format.codes(weight, grid), format.group or 40
    values, rounder = format.values(codes, grid), format.column_rounder(grid, 40)
    for row in range(5):
        for column in range(40):
            s, z = float(grid.scales[row, column // width]), int(grid.zeros[row, column // width])
            q = min(max(round(float(weight[row, column] / s)) + z, 0), 2**format.bits - 1)
            assert int(codes[row, column]) == q
            assert float(values[row, column]) == pytest.approx((q - z) * s, rel=1e-6)
            rounded = float(rounder(weight[:, column].clone(), column)[row])
            assert rounded == pytest.approx((q - z) * s, rel=1e-6)


@given(st.floats(-1e5, 1e5) | st.floats(-1e-3, 1e-3) | st.floats(-1e-7, 1e-7))
def test_scales_are_rounded_as_float16_and_outwards_where_it_is_coarse(value):
    single = struct.unpack("<f", struct.pack("<f", value))[0]
    assert float(float16_exact(torch.tensor(single))) == half(single)


# QLoRA (arXiv 2305.14314), appendix E, to the digits it prints
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip


def test_the_sixteen_values_are_those_of_the_paper():
    assert quantiles().tolist() == pytest.approx(NF4, abs=2e-6)


def test_nf4_takes_the_nearest_value_of_the_largest_magnitude():
    weight, format = normal(3, 40, seed=2), Nf4(group=16)
    grid = format.fit(weight)
    codes = format.codes(weight, grid)
    values, rounder = format.values(codes, grid), format.column_rounder(grid, 40)
    assert (grid.zeros == 7).all()
    for row in range(3):
        for column in range(40):
            start = column // 16 * 16
            scale = half(float(weight[row, start : start + 16].abs().max()))
            assert float(grid.scales[row, column // 16]) == scale
            ideal = float(weight[row, column]) / scale
            code = min(range(16), key=lambda k: abs(NF4[k] - ideal))
            assert int(codes[row, column]) == code
            assert float(values[row, column]) == pytest.approx(NF4[code] * scale, abs=1e-5)
            assert float(rounder(weight[:, column], column)[row]) == float(values[row, column])


@given(st.integers(2, 8), st.integers(1, 40), st.integers(0, 999))
def test_codes_follow_each_other_from_the_lowest_bit(bits, count, seed):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(seed))
    stream = sum(code << (bits * place) for place, code in enumerate(codes.tolist()))
    packed = pack(codes.to(torch.uint8), bits)
    assert packed_bytes(count, bits) == math.ceil(count * bits / 8)
    assert bytes(packed.tolist()) == stream.to_bytes(math.ceil(count * bits / 8), "little")
    assert unpack(packed, bits, count).tolist() == codes.tolist()


@given(st.lists(st.sampled_from([0.0, -0.0, 1.5, -2.0]), min_size=1, max_size=40))
def test_a_bit_says_which_weights_are_there(values):
    weight = torch.tensor([values])
    bitmask, kept = pack_floats(weight)
    bits = sum(1 << place for place, value in enumerate(values) if value)
    assert bytes(bitmask.tolist()) == bits.to_bytes(math.ceil(len(values) / 8), "little")
    assert kept.tolist() == [value for value in values if value]
    assert torch.equal(unpack_floats(bitmask, kept, (1, len(values))), weight)


@pytest.mark.parametrize("outliers", [None, 1.5])
def test_dynamic_rounding_is_that_of_the_equation(outliers):
    x = normal(2, 3, 8, seed=5)
    x[1, 2] = 0.0
    apart = set()
    if outliers is not None:
        apart = {column for column in range(8) if float(x[..., column].abs().max()) > outliers}
        assert 0 < len(apart) < 8
    found = round_dynamic(x, outliers)
    for row, mine in zip(x.view(6, 8).tolist(), found.view(6, 8).tolist(), strict=True):
        largest = max((abs(value) for column, value in enumerate(row) if column not in apart), default=0.0)
        step = max(largest, 1e-12) / 127
        wanted = [v if c in apart else round(v / step) * step for c, v in enumerate(row)]
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("bounds", [(-1.0, 3.0), (0.5, 3.0), (-4.0, -1.0), (0.0, 0.0)])
def test_static_rounding_is_that_of_the_equation(bounds):
    low, high = min(bounds[0], 0.0), max(bounds[1], 0.0)
    step = max((high - low) / 255, 1e-12)
    zero = round(-low / step)
    x = 3 * normal(97, seed=6)
    wanted = [(min(max(round(v / step) + zero, 0), 255) - zero) * step for v in x.tolist()]
    assert round_static(x, torch.tensor(bounds)).tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    found_step, found_zero = static_grid(torch.tensor(bounds))
    assert (float(found_step), float(found_zero)) == pytest.approx((step, zero), rel=1e-6)


@pytest.mark.parametrize("format", [*FORMATS, Nf4(group=16)], ids=str)
def test_weights_that_no_grid_can_hold_are_refused(format):
    with pytest.raises(UserError, match="a matrix 3x0 holds nothing to round; leave it out"):
        format.fit(torch.zeros(3, 0))
    far = normal(2, 16) * 1e30
    with pytest.raises(UserError, match=r"needs a scale of \d.*, and a scale is at most 65,504; leave"):
        format.fit(far)
    require_reach(format, torch.tensor([65504.0, -65504.0]))
    with pytest.raises(UserError, match="at most 65,504"):
        require_reach(format, torch.tensor([1.0, -65536.0]))
