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
