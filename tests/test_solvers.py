"""Solvers: what the papers claim of them, on tensors alone."""

import pytest
import torch

from compress.errors import UserError
from compress.formats import Int4, Int8
from compress.solvers import masks
from compress.solvers.asymmetric import correction, heldout_share, wanted
from compress.solvers.gptq import factorise, gptq, output_error

ROWS, COLUMNS = 24, 200  # more columns than one lazy batch of 128
FORMAT = Int4(group=50)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(samples: int = 600, columns: int = COLUMNS, seed: int = 1) -> torch.Tensor:
    """Inputs (samples, columns) that share a few directions, with columns of unequal size."""
    mixing = normal(columns // 8, columns, seed=seed + 1)
    x = normal(samples, columns // 8, seed=seed) @ mixing + 0.3 * normal(samples, columns, seed=seed + 2)
    return x * torch.linspace(0.2, 2.0, columns)


def moments(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    return x.T @ (x if y is None else y) / len(x)


def solve(weight, hessian, mask=None, format=FORMAT, **options):
    grid = format.fit(weight)
    rounder = format.column_rounder(grid, weight.shape[1])
    return gptq(weight, factorise(hessian), rounder, mask, **options), grid


def rounded(weight, grid, format=FORMAT):
    return format.values(format.codes(weight, grid), grid)


@pytest.mark.parametrize("format", [FORMAT, Int4(group=None, symmetric=True), Int8()], ids=str)
def test_gptq_beats_rounding_on_correlated_inputs(format):
    weight, x = normal(ROWS, COLUMNS), correlated()
    values, grid = solve(weight, moments(x), format=format)
    ours, plain = ((x @ (v - weight).T).square().sum() for v in (values, rounded(weight, grid, format)))
    assert ours < 0.5 * plain


def by_inverting(weight, hessian, ridge, order, rounder, mask):
    """Equations 2 and 3 of the paper: H of the columns that are left is inverted anew for every column."""
    work = weight.double().clone()
    damped = hessian.double() + ridge * torch.eye(len(hessian), dtype=torch.double)
    for place, column in enumerate(order):
        left = order[place:]
        inverse = torch.linalg.inv(damped[left][:, left])
        value = rounder(work[:, column].float(), column).double() * mask[:, column]
        error = (work[:, column] - value) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
        work[:, column] = value
    return work.float()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [4, 32])
@pytest.mark.parametrize("pruned", [False, True])
def test_gptq_is_the_papers_sweep_with_an_inverse_for_every_column(seed, block, pruned):
    columns, format = 12, Int4(group=16)
    weight, x = normal(5, columns, seed=seed), correlated(60, 16, seed)[:, :columns]
    x[:, 7] = 0  # never seen: no part in the mean diagonal, and no error is passed on
    hessian = moments(x)
    mask = normal(5, columns, seed=9) > 0 if pruned else torch.ones(5, columns, dtype=torch.bool)
    grid = format.fit(weight)
    rounder = format.column_rounder(grid, columns)
    ridge = 0.02 * float(hessian.diagonal().double()[x.any(0)].mean())
    order = sorted(range(columns), key=lambda i: -float(hessian[i, i]))
    factor = factorise(hessian, damping=0.02)
    assert factor.order.tolist() == order
    assert factor.ridge == pytest.approx(ridge, rel=1e-9)
    ours = gptq(weight, factor, rounder, mask if pruned else None, block=block)
    assert torch.equal(ours, by_inverting(weight, hessian, ridge, order, rounder, mask))
    assert not torch.equal(ours, rounded(weight, grid, format) * mask)


@pytest.mark.parametrize("together", [1, 3, 4])
def test_neighbours_are_ordered_together_and_a_short_rest_comes_last(together):
    diagonal = torch.tensor([1.0, 9.0, 2.0, 3.0, 3.0, 3.0, 0.0, 8.0, 8.0, 7.0, 99.0])
    whole = [list(range(i, i + together)) for i in range(0, 11 - together + 1, together)]
    whole.sort(key=lambda group: -sum(float(diagonal[i]) for i in group))
    wanted = [i for group in whole for i in group]
    wanted += [i for i in range(11) if i not in wanted]
    assert factorise(torch.diag(diagonal), together=together).order.tolist() == wanted


@pytest.mark.parametrize("rows", [3, 600])  # 600: two slices
def test_dividing_is_by_the_damped_matrix(rows):
    hessian, right = moments(correlated(100, 24)), normal(rows, 24)
    factor = factorise(hessian, damping=0.03)
    damped = hessian.double() + 0.03 * hessian.diagonal().double().mean() * torch.eye(24)
    explicit = torch.linalg.solve(damped, right.double(), left=False)
    assert (factor.divide(right) - explicit).norm() < 1e-5 * explicit.norm()


@pytest.mark.parametrize("columns", [1, 200, 700])  # 700: three panels
def test_panels_of_the_factor_fit_together(columns):
    x = normal(2 * columns, columns) * torch.linspace(0.2, 2.0, columns)
    hessian = moments(x)
    before = hessian.clone()
    factor = factorise(hessian, damping=0.05)
    with factor.damped(hessian) as damped:
        permuted = damped[factor.order][:, factor.order].double()
    assert torch.equal(hessian, before)
    assert torch.equal(factor.upper, factor.upper.triu())
    inverse = factor.upper.double().T @ factor.upper.double()
    assert torch.allclose(inverse @ permuted, torch.eye(columns, dtype=torch.float64), atol=1e-4)


def test_damping_is_raised_where_a_late_panel_is_not_positive():
    hessian = torch.eye(700)
    hessian[600, 601] = hessian[601, 600] = 1.02  # an eigenvalue of -0.02
    assert factorise(hessian, damping=0.001).damping == pytest.approx(0.1)


def test_gptq_is_rounding_for_a_diagonal_hessian():
    weight = normal(ROWS, COLUMNS)
    values, grid = solve(weight, torch.diag(torch.linspace(0.1, 9.0, COLUMNS)))
    assert torch.equal(FORMAT.codes(values, grid), FORMAT.codes(weight, grid))
    assert torch.equal(values, rounded(weight, grid))


def test_the_order_of_columns_matters_only_where_they_are_correlated():
    weight, diagonal = normal(ROWS, COLUMNS), torch.linspace(0.1, 9.0, COLUMNS)
    shuffled = diagonal[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))]
    orders = [factorise(torch.diag(d)).order for d in (diagonal, shuffled)]
    assert not torch.equal(*orders)
    assert torch.equal(solve(weight, torch.diag(diagonal))[0], solve(weight, torch.diag(shuffled))[0])


def test_columns_are_taken_by_falling_diagonal():
    hessian = moments(correlated())
    assert (hessian.diagonal()[factorise(hessian).order].diff() <= 0).all()


def test_lazy_batches_change_nothing_but_the_speed():
    weight, hessian = normal(ROWS, COLUMNS), moments(correlated())
    one, many = (solve(weight, hessian, block=block)[0] for block in (COLUMNS, 16))
    assert output_error(one, many, hessian) < 1e-3  # not 0: a sum in another order may tip a tie


def test_every_result_is_on_the_grid():
    values, grid = solve(normal(ROWS, COLUMNS), moments(correlated()))
    assert torch.equal(rounded(values, grid), values)


def test_masked_weights_stay_exactly_zero_and_their_loss_is_compensated():
    x = correlated()
    mask = masks.pattern(normal(ROWS, COLUMNS, seed=5).abs(), 2, 4)
    weight = normal(ROWS, COLUMNS)
    values, grid = solve(weight, moments(x), mask)
    assert (values[~mask] == 0).all()
    plain = rounded(weight, grid) * mask
    ours, naive = ((x @ (v - weight).T).square().sum() for v in (values, plain))
    assert ours < 0.7 * naive


def test_dead_columns_are_rounded_plainly():
    x = correlated()
    x[:, [3, 150]] = 0
    weight = normal(ROWS, COLUMNS)
    values, grid = solve(weight, moments(x))
    assert torch.isfinite(values).all()
    assert torch.equal(values[:, [3, 150]], rounded(weight, grid)[:, [3, 150]])


def test_a_layer_that_never_saw_an_input_is_rounded():
    weight = normal(ROWS, COLUMNS)
    values, grid = solve(weight, torch.zeros(COLUMNS, COLUMNS))
    assert torch.equal(values, rounded(weight, grid))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    hessian = torch.eye(4)
    hessian[1, 2] = value
    with pytest.raises(UserError, match="not finite"):
        factorise(hessian)


def test_damping_that_had_to_be_raised_is_told():
    x = correlated()
    assert factorise(moments(x), 0.01).damping == 0.01
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 1.05  # an eigenvalue of -0.05
    assert factorise(indefinite, 0.01).damping == pytest.approx(0.1)
    with pytest.raises(UserError, match="more calibration windows"):
        factorise(-10 * torch.ones(8, 8) + torch.eye(8), 1e-6)


def test_the_factor_is_that_of_the_damped_inverse():
    hessian = moments(correlated()).double()
    factor = factorise(hessian, 0.01)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(COLUMNS)
    inverse = factor.upper.double().T @ factor.upper.double()
    product = inverse @ damped[factor.order][:, factor.order]
    assert torch.allclose(product, torch.eye(COLUMNS, dtype=torch.double), atol=1e-3)


def test_output_error_is_that_of_the_outputs():
    weight, x = normal(ROWS, COLUMNS), correlated()
    other = weight + 0.1 * normal(ROWS, COLUMNS, seed=3)
    explicit = (x @ (weight - other).T).square().sum() / (x @ weight.T).square().sum()
    assert output_error(weight, other, moments(x)) == pytest.approx(float(explicit), rel=1e-4)
    assert output_error(weight, weight, moments(x)) == 0


def two_streams(samples: int = 900) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of the original layer, and what they have become, (samples, 40) each."""
    x = correlated(samples, 40)
    return x, x @ (torch.eye(40) + 0.05 * normal(40, 40, seed=7)) + 0.2 * normal(samples, 40, seed=8)


def aims(x, changed, apart=None):
    """H, D of inputs x that became `changed`; R too, of a stream whose difference is `apart`."""
    known = [moments(changed), moments(x - changed, changed)]
    return known if apart is None else [*known, moments(apart, changed)]


def step_towards(weight, x, changed, apart=None, damping=0.01):
    hessian, *rest = aims(x, changed, apart)
    return correction(wanted(weight, *rest), factorise(hessian, damping))


def test_the_asymmetric_target_is_the_least_squares_solution():
    x, changed = two_streams()
    weight = normal(10, 40)
    ours = weight + step_towards(weight, x, changed, damping=1e-12)
    explicit = torch.linalg.lstsq(changed.double(), (x @ weight.T).double()).solution.T
    assert torch.allclose(ours.double(), explicit, atol=1e-3)


def test_with_the_residual_term_the_stream_itself_is_restored():
    x, changed = two_streams()
    weight, apart = normal(10, 40), changed @ normal(40, 10, seed=9) * 0.1
    ours = weight + step_towards(weight, x, changed, apart, damping=1e-12)
    explicit = torch.linalg.lstsq(changed.double(), (x @ weight.T + apart).double()).solution.T
    assert torch.allclose(ours.double(), explicit, atol=1e-3)


def test_the_full_asymmetric_step_comes_nearest_to_the_original_output():
    x, changed = two_streams()
    weight = normal(10, 40)
    step = step_towards(weight, x, changed)
    lost = [
        float((x @ weight.T - changed @ (weight + share * step).T).square().sum()) for share in (0, 0.5, 1)
    ]
    assert lost[0] > lost[1] > lost[2]


def test_equal_streams_leave_the_weight_alone():
    x, _ = two_streams()
    assert torch.equal(step_towards(normal(10, 40), x, x), torch.zeros(10, 40))


def test_the_share_is_the_best_one_on_held_out_text():
    x, changed = two_streams()
    weight = normal(10, 40)
    step = step_towards(weight, x[:60], changed[:60])  # so few rows that the full step overfits

    def lost(share: float) -> float:
        rest = slice(60, None)
        return float((x[rest] @ weight.T - changed[rest] @ (weight + share * step).T).square().sum())

    hessian, *rest = aims(x[60:], changed[60:])
    share = heldout_share(wanted(weight, *rest), step, hessian)
    assert 0 < share < 1
    assert lost(share) <= min(lost(i / 20) for i in range(21)) * (1 + 1e-5)


def test_the_step_and_its_share_are_those_of_the_equations():
    x, changed = two_streams()
    weight, apart = normal(10, 40), 0.3 * normal(len(x), 10, seed=3)
    hessian, drift, residual = aims(x, changed, apart)
    wishes = wanted(weight, drift, residual)
    explicit = weight.double() @ drift.double() + residual.double()
    assert (wishes - explicit).norm() < 1e-6 * explicit.norm()
    damped = hessian.double() + 0.05 * hessian.diagonal().double().mean() * torch.eye(40)
    step = correction(wishes, factorise(hessian, damping=0.05))
    explicit = torch.linalg.solve(damped, wishes.double(), left=False)
    assert (step - explicit).norm() < 1e-5 * explicit.norm()
    gain = float((wishes.double() * step).sum() / ((step.double() @ hessian.double()) * step).sum())
    for factor in (4.0, 1.25):
        assert heldout_share(wishes, factor * step, hessian) == pytest.approx(gain / factor, rel=1e-5)


def test_a_share_is_neither_backwards_nor_more_than_the_whole_step():
    hessian, wishes = torch.eye(3), torch.ones(2, 3)
    assert heldout_share(wishes, wishes, hessian) == 1
    assert heldout_share(wishes, 0.5 * wishes, hessian) == 1
    assert heldout_share(wishes, -wishes, hessian) == 0
    assert heldout_share(wishes, 0 * wishes, hessian) == 0
