"""HQQ: a lower l_p error than min-max rounding, without data; most weights nearer, outliers further."""

import pytest
import torch

from compress.formats import Int2, Int3, Int4, Int8
from compress.passes.quantize_hqq import QuantizeHQQ
from compress.solvers.hqq import HalfQuadratic, fit_scales, lp_error, shrink, zero_points

SETTINGS = HalfQuadratic()
TOP = 15


def codes(steps: torch.Tensor) -> torch.Tensor:
    return steps.round().clamp(0, TOP)


def heavy_tailed(rows: int = 32, columns: int = 256, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    # Student's t with 3 degrees of freedom
    return weight / torch.randn(rows, columns, 3, generator=generator).square().mean(2).sqrt()


def min_max(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and real zero-points that span (..., width)."""
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / TOP
    return scales, -low / scales


def test_the_zero_point_lowers_the_error_of_min_max_rounding():
    groups = heavy_tailed().view(32, 4, 64)
    scales, zeros = min_max(groups)
    better = zero_points(groups, scales, zeros, codes, SETTINGS)
    before, after = (lp_error(groups, scales, z, codes, SETTINGS.p) for z in (zeros, better))
    assert (after <= before).all()
    assert after.sum() < 0.96 * before.sum()


def test_the_threshold_solves_its_problem():
    """argmin_e |e|^1 + b/2 (x - e)^2 is the soft threshold; with p < 1 large errors are left whole."""
    x = torch.linspace(-2, 2, 41)
    e = torch.linspace(-2.5, 2.5, 5001)
    explicit = e[(e.abs() + 2.0 * (x[:, None] - e).square()).argmin(1)]
    assert torch.allclose(shrink(x, beta=4.0, p=1.0), explicit, atol=2e-3)
    assert (shrink(x, beta=4.0, p=0.5).abs() <= x.abs()).all()
    assert shrink(torch.tensor([50.0]), beta=10.0, p=0.7) > 49.9


def test_errors_that_are_thresholded_away_leave_the_least_squares_scale():
    groups = heavy_tailed().view(32, 4, 64)
    scales, zeros = min_max(groups)
    zeros = zeros.round()
    once = HalfQuadratic(p=0.7, beta=1e-6, iterations=1)
    fitted = fit_scales(groups, scales, zeros, codes, lambda s: s, once)
    q = codes(groups / scales[..., None] + zeros[..., None]) - zeros[..., None]
    explicit = (q * groups).sum(-1) / q.square().sum(-1)
    moved = fitted != scales
    assert moved.any()
    assert torch.allclose(fitted[moved], explicit[moved], rtol=1e-4)


@pytest.mark.parametrize(
    "format",
    [Int4(group=64), Int3(group=48), Int2(group=64), Int4(group=None, symmetric=True), Int8()],
    ids=str,
)
def test_grids_that_can_be_stored_are_better_than_min_max(format):
    weight = heavy_tailed()
    grid = QuantizeHQQ(format=format).grid(weight)
    assert torch.equal(grid.scales.half().float(), grid.scales)

    def error(grid) -> float:
        return float((weight - format.values(format.codes(weight, grid), grid)).abs().pow(0.7).sum())

    share = 1.0 if format.bits == 8 else 0.97  # at 8 bits there is little to win
    assert error(grid) < share * error(format.model_copy(update={"clip_search": 0}).fit(weight))


def test_a_matrix_is_fitted_the_same_in_slices(monkeypatch):
    weight = heavy_tailed()
    whole = QuantizeHQQ().grid(weight)
    monkeypatch.setattr("compress.passes.quantize_hqq._ROWS", 5)
    sliced = QuantizeHQQ().grid(weight)
    assert torch.equal(whole.scales, sliced.scales)
    assert torch.equal(whole.zeros, sliced.zeros)


def test_groups_of_zeros_stay_zero():
    weight = heavy_tailed()
    weight[:, 64:128] = 0
    format = Int4(group=64)
    grid = QuantizeHQQ(format=format).grid(weight)
    values = format.values(format.codes(weight, grid), grid)
    assert (values[:, 64:128] == 0).all()
    assert torch.isfinite(grid.scales).all()
