"""Wanda, SparseGPT and ALPS: what their papers claim, on tensors alone; and that counts are exact."""

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.solvers import masks
from compress.solvers.alps import alps, spectrum
from compress.solvers.gptq import factorise, output_error
from compress.solvers.sparsegpt import sparsegpt
from compress.solvers.support import fit
from compress.solvers.wanda import scores, wanda

ROWS, COLUMNS = 24, 192
TARGETS = [ROWS * COLUMNS // 2, ROWS * COLUMNS * 7 // 10, (2, 4), (1, 4), (4, 8), (5, 6)]


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(columns: int = COLUMNS, samples: int = 600) -> torch.Tensor:
    """E[x x^T] of inputs that share a few directions, with columns of unequal size."""
    x = normal(samples, columns // 8, seed=1) @ normal(columns // 8, columns, seed=2)
    scale = torch.linspace(0.2, 2.0, columns)[normal(columns, seed=5).argsort()]
    x = (x + 0.3 * normal(samples, columns, seed=3)) * scale
    return x.T @ x / samples


def by_sweep(weight: Any, hessian: Any, target: masks.Quota, carried: Any = None, **options: Any) -> Any:
    together = target[1] if isinstance(target, tuple) else 1
    return sparsegpt(weight, factorise(hessian, together=together), target, carried, **options)


def by_admm(weight: Any, hessian: Any, target: masks.Quota, carried: Any = None) -> Any:
    return alps(weight, spectrum(hessian, factorise(hessian).ridge), target, carried)


def by_scores(weight: Any, hessian: Any, target: masks.Quota, carried: Any = None) -> Any:
    mask = wanda(weight, hessian.diagonal(), target, carried)
    return weight * mask, mask


SOLVERS = [by_scores, by_sweep, by_admm]


def test_wanda_with_equal_norms_is_magnitude_per_row():
    weight = normal(ROWS, COLUMNS)
    mask = wanda(weight, torch.full((COLUMNS,), 3.7), ROWS * COLUMNS // 2)
    assert torch.equal(mask, masks.smallest_per_row(weight.abs(), COLUMNS // 2))


def test_wanda_scores_are_what_removing_a_single_weight_costs():
    x, weight = normal(50, 6, seed=4), normal(3, 6)
    for row, column in ((0, 0), (2, 5)):
        without = weight.clone()
        without[row, column] = 0
        lost = (x @ (weight - without).T).square().sum().sqrt()
        assert scores(weight, x.square().sum(0))[row, column] == pytest.approx(float(lost), rel=1e-5)


@pytest.mark.parametrize("target", [1000, 3001, (2, 4)])
def test_sparsegpt_without_correlations_is_magnitude_by_block(target):
    weight = normal(ROWS, COLUMNS)
    values, mask = by_sweep(weight, torch.eye(COLUMNS), target)
    assert torch.equal(values, weight * mask)  # nothing to compensate with
    if isinstance(target, tuple):
        assert torch.equal(mask, masks.pattern(weight.abs(), *target))
        return
    counts = masks.spread(target, torch.tensor([ROWS * 128, ROWS * 64])).tolist()
    parts = zip(weight.abs().split(128, dim=1), mask.split(128, dim=1), counts, strict=True)
    for size, kept, count in parts:
        assert torch.equal(kept, masks.smallest(size.T, count).T)


@pytest.mark.parametrize("target", TARGETS)
def test_on_correlated_inputs_each_is_better_than_the_one_before(target):
    weight, hessian = normal(ROWS, COLUMNS), correlated()
    size = masks.best(weight.abs(), target)
    magnitude = output_error(weight, weight * size, hessian)
    lost = [output_error(weight, solve(weight, hessian, target)[0], hessian) for solve in SOLVERS]
    assert lost[0] < magnitude
    assert lost[1] < 0.9 * lost[0]
    assert lost[2] < lost[1]


def test_lazy_updates_are_those_of_one_block_for_a_pattern():
    weight, hessian = normal(ROWS, COLUMNS), correlated()
    one, many = (by_sweep(weight, hessian, (2, 4), block=block)[0] for block in (COLUMNS, 16))
    assert output_error(one, many, hessian) < 1e-3


def test_alps_leaves_the_best_weights_on_its_support():
    weight, hessian = normal(ROWS, COLUMNS), correlated()
    values, mask = by_admm(weight, hessian, ROWS * COLUMNS // 2)
    damped = hessian + factorise(hessian).ridge * torch.eye(COLUMNS)
    for row in (0, 7):
        inside = mask[row]
        right = (weight[row] @ damped)[inside]
        explicit = torch.linalg.solve(damped[inside][:, inside].double(), right.double())
        assert (values[row, inside] - explicit).norm() < 0.02 * explicit.norm()


def test_the_fit_on_a_support_converges_and_never_gets_worse():
    weight, hessian = normal(8, 40), correlated(40) + 0.05 * torch.eye(40)
    mask = masks.smallest(normal(8, 40, seed=9), 160)
    lost = [
        output_error(weight, fit(weight, weight, mask, hessian, steps), hessian) for steps in range(0, 60, 5)
    ]
    assert all(after <= before * (1 + 1e-4) for before, after in itertools.pairwise(lost))
    row = mask[3]
    explicit = torch.linalg.solve(hessian[row][:, row], (weight[3] @ hessian)[row])
    assert torch.allclose(fit(weight, weight, mask, hessian, 60)[3, row], explicit, atol=1e-3)


@pytest.mark.parametrize("solve", SOLVERS)
def test_inputs_that_are_never_seen_lose_most_of_their_weights(solve):
    hessian = correlated()
    hessian[:, 5] = hessian[5] = 0
    weight = normal(ROWS, COLUMNS)
    weight[:, 5] = 1.0
    values, mask = solve(weight, hessian, ROWS * COLUMNS // 2)
    assert torch.isfinite(values).all()
    assert mask[:, 5].float().mean() < 1 / 3


@pytest.mark.parametrize("solve", SOLVERS)
@pytest.mark.parametrize("target", [(2, 4), ROWS * COLUMNS // 2, 500])
def test_a_carried_mask_stays_and_counts(solve, target):
    carried = masks.smallest(normal(ROWS, COLUMNS, seed=6), 1000)
    values, mask = solve(normal(ROWS, COLUMNS) * carried, correlated(), target, carried)
    assert not mask[~carried].any()
    assert (values[~mask] == 0).all()
    if isinstance(target, tuple):
        assert int(mask.view(-1, 4).sum(1).max()) <= 2
    else:
        assert int((~mask).sum()) == max(target, 1000)


@given(
    st.sampled_from(SOLVERS),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.booleans(),
    st.data(),
)
@settings(max_examples=60)
def test_exactly_as_many_zeros_as_asked(solve, rows, groups, seed, ties, data):
    of = data.draw(st.integers(2, 6))
    columns = of * groups
    weight = normal(rows, columns, seed=seed)
    weight = weight.round() if ties else weight
    hessian = correlated(8 * columns)[:columns, :columns]
    carried = normal(rows, columns, seed=seed + 1) > data.draw(st.sampled_from([-9.0, -0.5, 0.5]))
    target = data.draw(
        st.one_of(st.integers(0, weight.numel()), st.integers(1, of - 1).map(lambda kept: (kept, of)))
    )
    values, mask = solve(weight * carried, hessian, target, carried)
    assert mask.shape == weight.shape
    assert not mask[~carried].any()
    assert (values[~mask] == 0).all()
    if isinstance(target, tuple):
        gone = (~carried).view(-1, of).sum(1)
        assert torch.equal((~mask).view(-1, of).sum(1), gone.clamp(min=of - target[0]))
    else:
        assert int((~mask).sum()) == max(target, int((~carried).sum()))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.data())
def test_shares_are_as_even_as_integers_allow(sizes, data):
    least = [data.draw(st.integers(0, size)) for size in sizes]
    count = data.draw(st.integers(sum(least), sum(sizes)))
    found = masks.spread(count, torch.tensor(sizes), torch.tensor(least)).tolist()
    assert sum(found) == count
    assert all(low <= n <= high for low, n, high in zip(least, found, sizes, strict=True))
    # nobody who got more than his least could hand a whole one to somebody with a smaller share
    for i, n in enumerate(found):
        for j, m in enumerate(found):
            if n > least[i] and m < sizes[j]:
                assert (n - 1) / sizes[i] <= (m + 1) / sizes[j] + 1e-9


def damped(hessian: torch.Tensor, ridge: float) -> torch.Tensor:
    return hessian.double() + ridge * torch.eye(len(hessian), dtype=torch.double)


def test_wanda_scores_are_sizes_times_norms():
    weight, squares = normal(4, 5), torch.tensor([4.0, 0.25, 0.0, -1e-9, 9.0])
    explicit = weight.abs() * torch.tensor([2.0, 0.5, 0.0, 0.0, 3.0])
    assert torch.equal(scores(weight, squares), explicit)
    assert torch.equal(wanda(weight, squares, 8), masks.best_per_row(explicit, 8))


def by_inverting(weight: Any, hessian: Any, order: list[int], target: masks.Quota, block: int) -> Any:
    """Equations 3 and 4 of SparseGPT: H of the columns that are left is inverted anew for every column."""
    out, columns = weight.shape
    work, mask = weight.double().clone(), torch.ones(out, columns, dtype=torch.bool)
    inverses = [torch.linalg.inv(hessian[order[i:]][:, order[i:]]) for i in range(columns)]
    chosen_at_once = block if isinstance(target, int) else target[1]
    for place, column in enumerate(order):
        if place % chosen_at_once == 0:
            places = range(place, min(place + chosen_at_once, columns))
            cost = torch.stack([work[:, order[i]] ** 2 / inverses[i][0, 0] for i in places])  # (places, out)
            if isinstance(target, int):
                kept = masks.smallest(cost, target * len(places) // columns)
            else:
                kept = masks.pattern(cost.T.contiguous(), *target).T
            for i, row in zip(places, kept, strict=True):
                mask[:, order[i]] = row
        inverse = inverses[place]
        removed = work[:, column] * ~mask[:, column]
        work[:, order[place:]] -= (removed / inverse[0, 0])[:, None] * inverse[0]
    return work * mask, mask


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("target", "block"), [(24, 4), (36, 4), (30, 12), ((2, 4), 8), ((1, 3), 128)])
def test_sparsegpt_is_the_papers_sweep_with_an_inverse_for_every_column(seed, target, block):
    weight, hessian = normal(6, 12, seed=seed), correlated(96)[:12, :12]
    factor = factorise(hessian, together=target[1] if isinstance(target, tuple) else 1)
    whole = damped(hessian, factor.ridge)
    explicit, wanted = by_inverting(weight, whole, factor.order.tolist(), target, block)
    values, mask = sparsegpt(weight, factor, target, block=block)
    assert torch.equal(mask, wanted)
    torch.testing.assert_close(values.double(), explicit, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(values, weight * mask, rtol=1e-2)


def on_support(weight: torch.Tensor, mask: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """The least-squares weights, a system for every row."""
    result = torch.zeros_like(weight)
    for row, inside in enumerate(mask):
        right = (weight[row] @ hessian)[inside]
        result[row, inside] = torch.linalg.solve(hessian[inside][:, inside], right)
    return result


def by_solving(weight: torch.Tensor, hessian: torch.Tensor, target: masks.Quota) -> Any:
    """ALPS, algorithm 1, in float64: every B from a system of its own, the fit exact."""
    scale = hessian.diagonal().sqrt()
    w, h = weight.double() * scale, hessian / scale / scale[:, None]
    first = support = masks.best(w.abs(), target)
    d, v, rho = w.clone(), torch.zeros_like(w), 0.1
    for step in range(1, 301):
        b = torch.linalg.solve(
            h + rho * torch.eye(len(h), dtype=torch.double), w @ h - v + rho * d, left=False
        )
        moved = b + v / rho
        mask = masks.best(moved.abs(), target)
        d = moved * mask
        v = v + rho * (b - d)
        if step % 3 == 0:
            changed = int((mask != support).sum()) / int(mask.sum())
            if changed == 0:
                break
            support = mask
            rho *= 1.3 if changed > 0.1 else 1.2 if changed > 0.005 else 1.1
    fits = [(on_support(w, mask, h), mask) for mask in (mask, first)]
    values, mask = min(fits, key=lambda pair: float(((w - pair[0]) @ h * (w - pair[0])).sum()))
    return values / scale, mask


@pytest.mark.parametrize("seed", [0, 1, 2, 9, 44])  # with 9 and 44 the first support of three rows is better
@pytest.mark.parametrize(("rows", "target"), [(3, 20), (16, 100), (6, (2, 4)), (6, (1, 3))])
def test_alps_is_the_papers_algorithm_with_a_system_for_every_step(seed, rows, target):
    """With few rows and with many: the inverse is applied in two ways."""
    weight, hessian = normal(rows, 12, seed=seed), correlated(96, 40 + seed)[:12, :12]
    explicit, wanted = by_solving(weight, damped(hessian, 0.05), target)
    values, mask = alps(weight, spectrum(hessian, 0.05), target, fitting=30)
    assert torch.equal(mask, wanted)
    torch.testing.assert_close(values.double(), explicit, rtol=1e-3, atol=1e-4)


def test_the_spectrum_is_that_of_the_scaled_and_damped_matrix():
    hessian = correlated(40)
    before = hessian.clone()
    found, whole = spectrum(hessian, 0.3), damped(hessian, 0.3)
    assert torch.equal(hessian, before)
    scale = whole.diagonal().sqrt()
    torch.testing.assert_close(found.scale.double(), scale)
    torch.testing.assert_close(found.scaled.double(), whole / scale / scale[:, None], rtol=1e-5, atol=1e-6)
    right = normal(50, 40, seed=8)
    wanted = torch.linalg.solve(found.scaled.double() + 0.7 * torch.eye(40), right.double(), left=False)
    for rows in (5, 50):
        inverse = found.inverse(0.7, rows)
        torch.testing.assert_close(inverse(right).double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_fit_is_exact_after_as_many_steps_as_there_are_weights():
    weight, hessian = normal(6, 9), damped(correlated(72)[:9, :9], 0.05)
    mask = masks.smallest(normal(6, 9, seed=9), 27)
    elsewhere = normal(6, 9, seed=4)
    explicit = on_support(weight.double(), mask, hessian)
    for start in (weight, elsewhere):
        found = fit(weight, start, mask, hessian.float(), 12)
        assert (found[~mask] == 0).all()
        torch.testing.assert_close(found.double(), explicit, rtol=1e-3, atol=1e-3)
    assert torch.equal(fit(weight, elsewhere, mask, hessian.float(), 0), elsewhere * mask)


def test_the_first_step_is_the_longest_useful_one_along_the_scaled_gradient():
    weight, hessian = normal(1, 6), damped(correlated(48)[:6, :6], 0.05)
    mask = torch.tensor([[True, True, False, True, True, False]])
    w = weight.double()
    gradient = ((w - w * mask) @ hessian) * mask
    along = gradient / hessian.diagonal()
    length = (gradient * along).sum() / ((along @ hessian) * along).sum()
    found = fit(weight, weight, mask, hessian.float(), 1)
    torch.testing.assert_close(found.double(), w * mask + length * along, rtol=1e-4, atol=1e-5)
    assert torch.equal(
        fit(weight, weight, torch.ones_like(mask), hessian.float(), 3), weight
    )  # nothing to do
