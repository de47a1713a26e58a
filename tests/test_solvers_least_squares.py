"""Refit and removal order: never worse than leaving the weights, least squares, and twins are found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.errors import UserError
from compress.solvers.least_squares import refit, removal_order, shared_removal_order


def inputs(columns: int, rows: int = 400, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mixing


def lost(w: torch.Tensor, kept: torch.Tensor, new: torch.Tensor, h: torch.Tensor) -> float:
    difference = w.clone()
    difference[:, kept] -= new
    return float(((difference @ h) * difference).sum())


@given(st.integers(2, 12), st.integers(0, 100), st.data())
def test_the_refit_is_least_squares_and_never_worse_than_none(columns, seed, data):
    x = inputs(columns, seed=seed)
    h = x.T @ x / len(x)
    w = torch.randn(3, columns, generator=torch.Generator().manual_seed(seed))
    kept = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, columns - 1), min_size=1, max_size=columns - 1)))
    )
    new = refit(w, kept, h, damping=1e-6)
    wanted = torch.linalg.lstsq(x[:, kept].double(), (x @ w.T).double()).solution.T
    best = lost(w, kept, wanted.float(), h)
    assert lost(w, kept, new, h) <= best + 1e-2 * best + 1e-3
    assert lost(w, kept, new, h) <= lost(w, kept, w[:, kept], h) + 1e-3


def test_the_aim_takes_the_layer_to_what_the_original_gave():
    x, noise = inputs(6), 0.3 * inputs(6, seed=1)
    changed, w, kept = x + noise, torch.randn(2, 6), torch.tensor([0, 2, 3, 5])
    h = changed.T @ changed / len(x)
    aim = w @ ((x - changed).T @ changed / len(x))
    new = refit(w, kept, h, aim, damping=1e-6)
    wanted = torch.linalg.lstsq(changed[:, kept].double(), (x @ w.T).double()).solution.T.float()
    assert torch.allclose(new, wanted, rtol=1e-2, atol=1e-2)


def test_a_mask_holds_and_rows_reach_their_own_least_squares():
    x, w = inputs(8), torch.randn(3, 8)
    h, kept = x.T @ x / len(x), torch.arange(6)
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(3)) > 0.4
    new = refit(w * torch.nn.functional.pad(mask, (0, 2), value=True), kept, h, damping=1e-6, mask=mask)
    assert (new[~mask] == 0).all()
    target = x @ (w * torch.nn.functional.pad(mask, (0, 2), value=True)).T
    for row in range(3):
        own = x[:, kept][:, mask[row]].double()
        wanted = torch.linalg.lstsq(own, target[:, row : row + 1].double()).solution[:, 0].float()
        assert torch.allclose(new[row][mask[row]], wanted, rtol=2e-2, atol=2e-2)


def test_greedy_order_takes_the_best_single_unit_with_the_refit_in_mind():
    x, w, units = inputs(9), torch.randn(4, 9), torch.arange(9).view(3, 3)
    h = x.T @ x / len(x)
    errors = []
    for unit in units:
        kept = torch.tensor(sorted(set(range(9)) - set(unit.tolist())))
        errors.append(lost(w, kept, refit(w, kept, h, damping=1e-6), h))
    assert removal_order(w, units, h, 1, damping=1e-6).item() == errors.index(min(errors))


@pytest.mark.parametrize("batch", [1, 4])
def test_of_twins_one_goes_and_one_stays(batch):
    x = inputs(8)
    x = torch.cat([x, x], dim=1) + 1e-3 * torch.randn(len(x), 16, generator=torch.Generator().manual_seed(2))
    w = torch.randn(5, 16) + 3
    gone = removal_order(w, torch.arange(16)[:, None], x.T @ x / len(x), 8, damping=1e-8, batch=batch)
    assert sorted(i % 8 for i in gone.tolist()) == list(range(8))


def test_the_order_beats_the_independent_choice_on_correlated_inputs():
    x, w = inputs(24, rows=1000), torch.randn(6, 24, generator=torch.Generator().manual_seed(5))
    h = x.T @ x / len(x)

    def after(gone: list[int]) -> float:
        kept = torch.tensor(sorted(set(range(24)) - set(gone)))
        return lost(w, kept, refit(w, kept, h, damping=1e-6), h)

    alone = (h.diagonal() * w.square().sum(0)).argsort()[:12].tolist()
    order = removal_order(w, torch.arange(24)[:, None], h, 12, damping=1e-6)
    assert after(order.tolist()) < 0.9 * after(alone)


def test_independent_inputs_go_by_their_energy():
    w, h = torch.tensor([[3.0, 1.0, 2.0, 0.5]]), torch.diag(torch.tensor([1.0, 20.0, 1.0, 1.0]))
    wanted = (w[0].square() * h.diagonal()).argsort().tolist()[:3]
    assert removal_order(w, torch.arange(4)[:, None], h, 3, damping=1e-9).tolist() == wanted


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="not finite; is the checkpoint sound"):
        refit(torch.ones(1, 2), torch.tensor([0]), torch.full((2, 2), torch.nan))


def double_moments(x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    return x.double().T @ (x if y is None else y).double() / len(x)


def ridged(h: torch.Tensor, damping: float) -> torch.Tensor:
    return h.double() + damping * h.diagonal().double().mean() * torch.eye(len(h), dtype=torch.double)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_refit_is_that_of_the_equation(seed, share):
    """argmin E || W x + e (r - r~) - V x~_S ||^2 + l || V - W_S ||^2 by its normal equations."""
    x, changed = inputs(7, seed=seed), inputs(7, seed=seed) + 0.3 * inputs(7, seed=seed + 9)
    w, kept = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)), torch.tensor([0, 1, 4, 6])
    h, drift = double_moments(changed), double_moments(x - changed, changed)
    aim = share * (w.double() @ drift)
    ridge = 0.05 * h.diagonal().mean() * torch.eye(4, dtype=torch.double)
    inner = h[kept][:, kept] + ridge
    right = (w.double() @ h)[:, kept] + aim[:, kept] + w[:, kept].double() @ ridge
    explicit = torch.linalg.solve(inner, right, left=False)
    new = refit(w, kept, h, aim if share else None, damping=0.05)
    torch.testing.assert_close(new.double(), explicit, rtol=1e-6, atol=1e-6)
    mask = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed)) > 0.3
    mask[:, 0] = True
    new = refit(w, kept, h, aim if share else None, damping=0.05, mask=mask)
    assert (new[~mask] == 0).all()
    # under a mask what it forbids is left at its old weight, then dropped: W_S enters the error whole
    for row, inside in enumerate(mask):
        step = torch.linalg.solve(
            inner[inside][:, inside], (right - w[:, kept].double() @ inner)[row, inside]
        )
        torch.testing.assert_close(
            new[row, inside].double(), w[row, kept][inside] + step, rtol=1e-5, atol=1e-5
        )


def by_refitting(w: torch.Tensor, units: torch.Tensor, h: torch.Tensor, count: int, damping: float):
    """Every unit that is left is tried, and what is left refitted, under H + l I: the cheapest goes."""
    whole, gone = ridged(h, damping), []
    for _ in range(count):
        errors = {}
        for unit in range(len(units)):
            if unit in gone:
                continue
            out = units[[*gone, unit]].flatten().tolist()
            kept = torch.tensor([i for i in range(len(h)) if i not in out])
            right = w.double() @ whole[:, kept]
            new = torch.linalg.solve(whole[kept][:, kept], right, left=False)
            difference = w.double().clone()
            difference[:, kept] -= new
            errors[unit] = float(((difference @ whole) * difference).sum())
        gone.append(min(errors, key=errors.__getitem__))
    return gone


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("batch", [1, 2])
def test_units_go_in_the_order_of_what_they_cost_when_the_others_are_refitted(seed, width, batch):
    x, units = (
        inputs(8 * width, seed=seed),
        torch.randperm(8 * width, generator=torch.Generator().manual_seed(seed))
        .view(8, width)
        .sort(1)
        .values,
    )
    w = torch.randn(4, 8 * width, generator=torch.Generator().manual_seed(seed))
    h = x.T @ x / len(x)
    # 8 candidates for a batch of 2: all of them are looked at, so a batch loses nothing
    found = removal_order(w, units, h, 6, damping=0.02, batch=batch).tolist()
    assert found == by_refitting(w, units, h, 6, 0.02)


@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("seed", range(3))
def test_layers_that_lose_units_alike_are_one_layer_whose_inputs_are_apart(seed, width):
    """W = [W_1 W_2 W_3] with H = diag(H_1, H_2, H_3) has the error that the three have together."""
    units = torch.arange(6 * width).view(6, width)
    layers = [
        torch.randn(4, 6 * width, generator=torch.Generator().manual_seed(10 * seed + i)) for i in range(3)
    ]
    moments = []
    for number in range(3):
        x = inputs(6 * width, seed=10 * seed + number)
        h = x.T @ x
        moments.append(h / h.diagonal().mean())  # the ridge is then the same for all
    together = torch.cat([units + 6 * width * number for number in range(3)], dim=1)
    expected = by_refitting(torch.cat(layers, dim=1), together, torch.block_diag(*moments), 4, 0.02)
    assert shared_removal_order(layers, units, moments, 4, damping=0.02).tolist() == expected


def test_a_batch_looks_at_the_likely_ones_only():
    """Ten units, one at a time in a batch of two: its eight candidates hold the two that go."""
    x, w = inputs(40, seed=3), torch.randn(4, 40, generator=torch.Generator().manual_seed(3))
    h, units = x.T @ x / len(x), torch.arange(40)[:, None]
    one, two = (removal_order(w, units, h, 20, batch=batch).tolist() for batch in (1, 2))
    assert len(set(two)) == 20
    left = [
        lost(
            w,
            torch.tensor(sorted(set(range(40)) - set(gone))),
            refit(w, torch.tensor(sorted(set(range(40)) - set(gone))), h),
            h,
        )
        for gone in (one, two)
    ]
    assert left[1] < 1.05 * left[0]


def test_statistics_without_an_input_leave_the_weights_and_take_the_smallest_units():
    w, nothing = torch.tensor([[3.0, 1.0, 2.0]]), torch.zeros(3, 3)
    assert torch.equal(refit(w, torch.tensor([0, 2]), nothing), w[:, [0, 2]])
    assert removal_order(w, torch.arange(3)[:, None], nothing, 2).tolist() == [1, 2]


def test_a_matrix_that_rounding_made_indefinite_is_helped_and_another_refused():
    h = torch.ones(3, 3)
    h[0, 0] = 1 - 1e-6  # an eigenvalue a millionth below zero
    assert torch.isfinite(refit(torch.ones(1, 3), torch.tensor([0, 1]), h, damping=0.0)).all()
    with pytest.raises(UserError, match="cannot be factorised; use more calibration windows"):
        refit(torch.ones(1, 2), torch.tensor([0]), torch.tensor([[-1.0, 0.0], [0.0, 3.0]]), damping=0.0)


def test_conjugate_gradients_reach_what_a_factor_gives_where_scales_differ_widely():
    """Fifty steps are more than there are weights in a row, but far from enough for plain descent."""
    x = (
        inputs(24, seed=2)
        * torch.logspace(0, 2, 24)[torch.randperm(24, generator=torch.Generator().manual_seed(0))]
    )
    h, w = double_moments(x), torch.randn(3, 24, generator=torch.Generator().manual_seed(2))
    kept = torch.arange(20)
    wanted = refit(w, kept, h, damping=1e-7)
    found = refit(w, kept, h, damping=1e-7, mask=torch.ones(3, 20, dtype=torch.bool))
    assert (found - wanted).norm() < 1e-3 * (wanted - w[:, kept]).norm()


def test_units_as_wide_as_a_head_with_its_queries_are_weighed_by_several_threads() -> None:
    before = torch.get_num_threads()
    torch.manual_seed(0)
    w, x = torch.randn(8, 3 * 192), torch.randn(2000, 3 * 192)
    units, h = torch.arange(3 * 192).view(3, 192), x.T @ x / 2000
    w[:, units[1]] *= 0.1
    torch.set_num_threads(2)  # with which torch solves several systems of this size wrongly
    try:
        assert removal_order(w, units, h, 1).tolist() == [1]
    finally:
        torch.set_num_threads(before)
