"""HQQ: a lower l_p error than min-max rounding, without data; most weights nearer, outliers further."""

import math

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


def threshold(x: float, beta: float, p: float) -> float:
    return math.copysign(max(abs(x) - abs(x) ** (p - 1) / beta, 0.0), x) if x else 0.0


def nearest(value: float) -> float:
    return float(min(max(round(value), 0), TOP))


def cost(w: list[float], s: float, z: float, p: float) -> float:
    return sum(abs(x - s * (nearest(x / s + z) - z)) ** p for x in w)


def by_hand(w, s, z, settings, which):
    """The iteration of one group, element by element: its zero-point or scale of the least error."""
    best, least, beta = (z if which == "zeros" else s), cost(w, s, z, settings.p), settings.beta
    for _ in range(settings.iterations):
        q = [nearest(x / s + z) for x in w]
        e = [threshold(x - s * (k - z), beta, settings.p) for x, k in zip(w, q, strict=True)]
        if which == "zeros":
            z = sum(k - (x - d) / s for x, k, d in zip(w, q, e, strict=True)) / len(w)
        else:
            fitted = sum((k - z) * (x - d) for x, k, d in zip(w, q, e, strict=True))
            fitted /= sum((k - z) ** 2 for k in q)
            s = fitted if fitted * s > 0 else s
        found = cost(w, s, z, settings.p)
        if found < least:
            best, least = (z if which == "zeros" else s), found
        beta *= settings.kappa
    return best


@pytest.mark.parametrize(
    "settings",
    [
        SETTINGS,
        HalfQuadratic(p=0.5, beta=3.0, kappa=1.3, iterations=7),
        HalfQuadratic(p=1.0, beta=20.0, kappa=2.0, iterations=3),
    ],
    ids=str,
)
def test_both_iterations_are_those_of_the_equations(settings):
    groups = heavy_tailed(6, 64, seed=2).double().view(6, 4, 16)
    scales, zeros = min_max(groups)
    scales = scales * torch.tensor([1.0, 1.0, 0.7, -0.7], dtype=torch.double)  # a grid may be turned round
    zeros = torch.where(scales < 0, TOP - zeros, zeros).round()
    found_zeros = zero_points(groups, scales, zeros, codes, settings)
    found_scales = fit_scales(groups, scales, zeros, codes, lambda s: s, settings)
    moved = 0
    for row in range(6):
        for group in range(4):
            given = groups[row, group].tolist(), float(scales[row, group]), float(zeros[row, group])
            wanted_zero, wanted_scale = (by_hand(*given, settings, which) for which in ("zeros", "scales"))
            zero, scale = float(found_zeros[row, group]), float(found_scales[row, group])
            assert scale == pytest.approx(wanted_scale, rel=1e-9)
            # with p = 1 several zero-points may be equally good
            costs = [cost(given[0], given[1], z, settings.p) for z in (zero, wanted_zero)]
            assert costs[0] == pytest.approx(costs[1], rel=1e-9)
            assert settings.p == 1 or zero == pytest.approx(wanted_zero, rel=1e-9)
            assert float(lp_error(groups, scales, zeros, codes, 0.7)[row, group]) == pytest.approx(
                cost(*given, 0.7), rel=1e-9
            )
            moved += (wanted_zero != given[2]) + (wanted_scale != given[1])
    assert moved > 12
    assert torch.equal(codes(zeros), zeros)


def test_the_threshold_is_elementwise_that_of_the_equation():
    x = torch.linspace(-3, 3, 25, dtype=torch.double)
    for beta, p in ((10.0, 0.7), (2.0, 0.5), (4.0, 1.0)):
        assert shrink(x, beta, p).tolist() == pytest.approx([threshold(v, beta, p) for v in x.tolist()])


def test_a_scale_never_changes_its_sign_and_no_code_at_all_keeps_it():
    """Weights that pull the other way, and a group whose codes all lie at the zero-point."""
    weight = torch.tensor([[-1.0, -1.0, 0.2], [0.0, 0.0, 0.0]])
    scales, zeros = torch.tensor([0.5, 0.5]), torch.tensor([0.0, 3.0])  # no codes below zero in the first
    found = fit_scales(weight, scales, zeros, codes, lambda s: s, HalfQuadratic(beta=1e9))
    assert (found > 0).all()
    assert found[1] == 0.5
    assert torch.isfinite(lp_error(weight, found, zeros, codes, 0.7)).all()
