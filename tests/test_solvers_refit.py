"""Refitted scales and coordinate descent: neither loses anything, together they win on GPTQ."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.formats import Grid, Int3, Int4, Int8
from compress.formats.integer import float16_exact
from compress.solvers import masks
from compress.solvers.gptq import factorise, gptq, output_error
from compress.solvers.refit import Fit, coordinate_descent, refine, refit_scales

ROWS, COLUMNS = 16, 100
FORMAT = Int4(group=32)  # a ragged last group of 4


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(columns: int = COLUMNS, seed: int = 1) -> torch.Tensor:
    """Of inputs that share a few directions, with columns of unequal size."""
    x = normal(400, 12, seed=seed) @ normal(12, columns, seed=seed + 1)
    x = (x + 0.5 * normal(400, columns, seed=seed + 2)) * torch.linspace(0.2, 2.0, columns)
    return x.T @ x / len(x)


def start(weight, h, format=FORMAT, mask=None):
    """GPTQ's values, their grid, and the grid's rounder for any scales."""
    grid = format.fit(weight, h.diagonal())
    columns = weight.shape[1]
    values = gptq(weight, factorise(h), format.column_rounder(grid, columns), mask)
    return values, grid, lambda scales: format.column_rounder(Grid(scales, grid.zeros), columns)


def refined(weight, h, format=FORMAT, mask=None, rounds=2):
    values, grid, rounder = start(weight, h, format, mask)
    width = format.group_width(weight.shape[1])
    better, scales = refine(
        weight, values, grid.scales, h, width, rounder, float16_exact, mask, rounds=rounds
    )
    return values, better, Grid(scales, grid.zeros)


def test_scales_are_the_least_squares_solution():
    weight, h = normal(ROWS, COLUMNS), hessian()
    values, grid, _ = start(weight, h)
    scales = refit_scales(Fit.of(weight, values, grid.scales, h), h, 32).scales
    root = torch.linalg.cholesky(h.double() + 1e-12 * torch.eye(COLUMNS)).T  # |root d|^2 = d H d
    group = torch.arange(COLUMNS) // 32
    for row in range(ROWS):
        steps = (values[row] / grid.scales[row, group]).double()
        spread = torch.zeros(COLUMNS, 4, dtype=torch.double)
        spread[torch.arange(COLUMNS), group] = steps
        explicit = torch.linalg.lstsq(root @ spread, root @ weight[row].double()).solution
        assert torch.allclose(scales[row].double(), explicit, rtol=1e-3)


def test_every_column_is_at_its_best_where_the_descent_ends():
    weight, h = normal(ROWS, COLUMNS), hessian()
    values, grid, rounder = start(weight, h)
    fit = Fit.of(weight, values, grid.scales, h)
    settled = coordinate_descent(fit, h, rounder(grid.scales), sweeps=40).values
    again = coordinate_descent(Fit.of(weight, settled, grid.scales, h), h, rounder(grid.scales)).values
    assert output_error(settled, again, h) < 1e-8
    spacing = grid.scales[:, torch.arange(COLUMNS) // 32].abs()
    for step in (spacing, -spacing):
        for column in range(0, COLUMNS, 9):
            moved = settled.clone()
            moved[:, column] = rounder(grid.scales)(settled[:, column] + step[:, column], column)
            rows = torch.arange(ROWS)
            worse = [((weight - v) @ h * (weight - v)).sum(1)[rows] for v in (settled, moved)]
            assert (worse[0] <= worse[1] * (1 + 1e-5)).all()


def test_for_a_diagonal_hessian_the_descent_rounds():
    weight = normal(ROWS, COLUMNS)
    h = torch.diag(torch.linspace(0.1, 9.0, COLUMNS))
    grid = FORMAT.fit(weight)
    rounder = FORMAT.column_rounder(grid, COLUMNS)
    nothing = Fit.of(weight, torch.zeros_like(weight), grid.scales, h)
    settled = coordinate_descent(nothing, h, rounder).values
    assert torch.equal(FORMAT.codes(settled, grid), FORMAT.codes(weight, grid))


def test_lazy_blocks_change_nothing_but_the_speed():
    weight, h = normal(ROWS, COLUMNS), hessian()
    values, grid, rounder = start(weight, h)
    fit = Fit.of(weight, values, grid.scales, h)
    one, many = (coordinate_descent(fit, h, rounder(grid.scales), block=b).values for b in (COLUMNS, 7))
    assert output_error(one, many, h) < 1e-4  # not 0: a sum in another order may tip a tie


@pytest.mark.parametrize("format", [FORMAT, Int4(group=None, symmetric=True), Int8()], ids=str)
def test_gptq_is_improved_and_stays_on_a_grid_that_can_be_stored(format):
    weight, h = normal(ROWS, COLUMNS), hessian()
    before, after, grid = refined(weight, h, format)
    assert output_error(weight, after, h) < 0.99 * output_error(weight, before, h)
    assert torch.equal(grid.scales.half().float(), grid.scales)
    assert torch.equal(format.values(format.codes(after, grid), grid), after)


@given(st.integers(0, 10_000), st.sampled_from([16, 32, 40]), st.sampled_from([0.0, 0.5]))
def test_the_error_never_rises(seed, width, sparsity):
    format = Int4(group=width)
    weight, h = normal(6, 40, seed=seed), hessian(40, seed=seed + 1)
    mask = masks.smallest(weight.abs(), int(sparsity * weight.numel()))
    values, grid, rounder = start(weight, h, format, mask)
    fit = Fit.of(weight, values, grid.scales, h)
    errors = [output_error(weight, values, h)]
    for _ in range(3):
        fit = refit_scales(fit, h, width, float16_exact)
        errors.append(output_error(weight, fit.values, h))
        fit = coordinate_descent(fit, h, rounder(fit.scales), mask)
        errors.append(output_error(weight, fit.values, h))
        afresh = Fit.of(weight, fit.values, fit.scales, h)
        assert torch.allclose(fit.lost, afresh.lost, atol=1e-4 * float(weight.abs().max()) * float(h.max()))
    assert all(later <= earlier * (1 + 1e-5) for earlier, later in pairwise(errors))


def test_what_was_pruned_stays_exactly_zero():
    weight, h = normal(ROWS, COLUMNS), hessian()
    mask = masks.pattern(normal(ROWS, COLUMNS, seed=5).abs(), 2, 4)
    before, after, _ = refined(weight, h, mask=mask)
    assert (after[~mask] == 0).all()
    assert output_error(weight, after, h) < output_error(weight, before, h)


def test_a_group_of_zeros_and_columns_without_inputs_stay_as_they_are():
    weight, h = normal(ROWS, COLUMNS), hessian()
    weight[:, 32:64] = 0
    h[:, 70], h[70, :] = 0, 0
    before, after, grid = refined(weight, h)
    scales = FORMAT.fit(weight, h.diagonal()).scales
    # the zero group's codes may serve other columns' errors; an all-zero row's cannot
    untouched = (before[:, 32:64] == 0).all(1) & (after[:, 32:64] == 0).all(1)
    assert torch.equal(grid.scales[untouched, 1], scales[untouched, 1])
    steps = [v[:, 70] / s[:, 2] for v, s in ((before, scales), (after, grid.scales))]
    assert torch.equal(steps[0].round(), steps[1].round())
    assert torch.isfinite(after).all()


def test_a_layer_that_never_saw_an_input_is_left_alone():
    weight = normal(ROWS, COLUMNS)
    before, after, _ = refined(weight, torch.zeros(COLUMNS, COLUMNS))
    assert torch.equal(before, after)


def error(weight, values, h):
    lost = (weight - values).double()
    return ((lost @ h.double()) * lost).sum(1)


def by_trying_every_code(weight, values, scales, zeros, h, format, mask, sweeps):
    """Column after column, all others fixed, the code of the least error of all there are; ties stay away."""
    width, values = format.group_width(weight.shape[1]), values.double()
    order = [int(i) for i in torch.argsort(h.diagonal(), descending=True, stable=True) if h[i, i] > 0]
    for _ in range(sweeps):
        for column in order:
            best = torch.full((len(weight),), torch.inf, dtype=torch.double)
            chosen = torch.zeros(len(weight), dtype=torch.double)
            for code in range(format.levels):
                tried = values.clone()
                tried[:, column] = (code - zeros[:, column // width].double()) * scales[:, column // width]
                lost = error(weight, tried, h)
                chosen = torch.where(lost < best, tried[:, column], chosen)
                best = torch.minimum(lost, best)
            values[:, column] = torch.where(mask[:, column], chosen, 0.0)
    return values


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("block", "sweeps"), [(16, 1), (5, 2)])
@pytest.mark.parametrize("pruned", [False, True])
def test_the_descent_takes_the_best_of_all_codes(seed, block, sweeps, pruned):
    format, columns = Int3(group=16), 20
    weight, h = normal(5, columns, seed=seed), hessian(columns, seed=seed + 7)
    h[11] = h[:, 11] = 0  # never seen: stays as it is
    grid = format.fit(weight)
    mask = normal(5, columns, seed=3) > -0.5 if pruned else torch.ones(5, columns, dtype=torch.bool)
    values = format.values(format.codes(weight, grid), grid) * mask
    fit = Fit.of(weight, values, grid.scales, h)
    rounder = format.column_rounder(grid, columns)
    ours = coordinate_descent(fit, h, rounder, mask if pruned else None, sweeps, block)
    explicit = by_trying_every_code(weight, values, grid.scales, grid.zeros, h, format, mask, sweeps)
    torch.testing.assert_close(ours.values.double(), explicit, rtol=1e-6, atol=1e-7)
    assert torch.equal(ours.values[:, 11], values[:, 11])
    assert not torch.equal(ours.values, values)
    torch.testing.assert_close(ours.lost, (weight - ours.values) @ h, rtol=1e-4, atol=1e-4)
    assert ours.scales is grid.scales


def test_a_row_whose_stored_scales_are_no_better_keeps_its_own():
    """Rounded up by a half, some rows lose by the fitted scales: those stay as they were, bit for bit."""
    weight, h = normal(ROWS, COLUMNS), hessian()
    values, grid, _ = start(weight, h)
    fit = Fit.of(weight, values, grid.scales, h)
    refitted = refit_scales(fit, h, 32)
    rows = torch.arange(ROWS) % 2 == 0

    def spoiled(scales):
        return torch.where(rows[:, None], 1.5 * scales, scales)

    found = refit_scales(fit, h, 32, spoiled)
    assert torch.equal(found.scales[rows], grid.scales[rows])
    assert torch.equal(found.values[rows], values[rows])
    assert torch.equal(found.scales[~rows], refitted.scales[~rows])
    assert torch.equal(found.values[~rows], refitted.values[~rows])
    assert (refitted.scales != grid.scales).any(1).all()
    torch.testing.assert_close(found.lost, (weight - found.values) @ h, rtol=1e-4, atol=1e-4)


def test_rows_that_stay_are_not_multiplied_anew():
    """Of scales that no float16 holds, w / s * s is not always w."""
    weight, h = normal(ROWS, COLUMNS), hessian()
    scales = 0.1 + torch.rand(ROWS, 4, generator=torch.Generator().manual_seed(0))
    values = normal(ROWS, COLUMNS, seed=5)
    found = refit_scales(Fit.of(weight, values, scales, h), h, 32, lambda fitted: 100 * fitted)
    assert torch.equal(found.scales, scales)
    assert torch.equal(found.values, values)


def test_scales_of_many_rows_and_groups_are_fitted_in_slices_without_a_seam(monkeypatch):
    weight, h = normal(ROWS, COLUMNS), hessian()
    values, grid, _ = start(weight, h)
    fit = Fit.of(weight, values, grid.scales, h)
    whole = refit_scales(fit, h, 32)
    monkeypatch.setattr("compress.solvers.refit._SLICE", 3 * 16)  # three rows
    sliced = refit_scales(fit, h, 32)
    torch.testing.assert_close(sliced.scales, whole.scales, rtol=1e-5, atol=0)
    torch.testing.assert_close(sliced.lost, whole.lost, rtol=1e-3, atol=1e-4)


def test_rounds_alternate_scales_and_codes():
    weight, h = normal(ROWS, COLUMNS), hessian()
    values, grid, rounder = start(weight, h)
    fit = Fit.of(weight, values, grid.scales, h)
    for rounds in range(3):
        mine = refine(weight, values, grid.scales, h, 32, rounder, float16_exact, None, rounds)
        assert torch.equal(mine[0], fit.values)
        assert torch.equal(mine[1], fit.scales)
        fit = refit_scales(fit, h, 32, float16_exact)
        fit = coordinate_descent(fit, h, rounder(fit.scales))
