"""Second moments: sums over panels are those of whole matrices."""

import pytest
import torch

from compress.calibration.moments import Rows, covariance, gram, mirrored, product


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("columns", [1, 192, 1600])  # a panel of the gram, more than one of the product
def test_panels_change_nothing(columns):
    x, y = normal(50, columns), normal(50, columns, seed=1)
    assert torch.allclose(mirrored(gram(x)), x.T @ x, atol=1e-4)
    assert torch.allclose(product(y, x), y.T @ x, atol=1e-4)


def test_totals_grow_in_their_own_memory():
    x, y = normal(30, 40), normal(30, 40, seed=1)
    symmetric, cross = gram(x), product(y, x)
    assert gram(y, symmetric) is symmetric
    assert product(x, y, cross) is cross
    assert torch.allclose(mirrored(symmetric), x.T @ x + y.T @ y, atol=1e-4)
    assert torch.allclose(cross, y.T @ x + x.T @ y, atol=1e-4)


def test_a_product_in_bfloat16_is_summed_in_float32():
    x = torch.full((100, 1), 1.0, dtype=torch.bfloat16)
    total = product(x, x)
    for _ in range(9):
        total = product(x, x, total)
    assert total.dtype == torch.float32
    assert float(total) == 1000.0  # 1001 is none of bfloat16's numbers, nor is 1000 + 1
    assert float(product(x[:1], x[:1], total)) == 1001.0


def test_a_gram_of_bfloat16_rows_is_as_exact_as_of_float32():
    x = normal(500, 300).bfloat16()
    exact = x.double().T @ x.double()
    setting = torch.backends.mkldnn.matmul.fp32_precision
    assert (mirrored(gram(x)) - exact).norm() < 1e-6 * exact.norm()  # once rounded: 1e-3
    assert torch.backends.mkldnn.matmul.fp32_precision == setting  # others' products are as before
    y = normal(500, 300)
    assert (mirrored(gram(y)) - y.double().T @ y.double()).norm() < 1e-6 * exact.norm()


def test_moments_of_batches_are_those_of_the_whole_text():
    x, original, moved = normal(60, 20), normal(60, 20, seed=1), normal(60, 8, seed=2)
    parts = slice(0, 25), slice(25, 60)
    found = covariance([Rows(x[s], original[s], moved[s]) for s in parts])
    assert found.count == 60
    for total, direct in (
        (found.hessian, x.T @ x),
        (found.drift, (original - x).T @ x),
        (found.residual, moved.T @ x),
    ):
        assert total is not None
        assert torch.allclose(total, direct, atol=1e-4)
    # and what a solver wants of D and R is the same summed directly
    weight = normal(8, 20, seed=3)
    lacking = (original - x) @ weight.T + moved
    directly = covariance([Rows(x[s], wanted=lacking[s]) for s in parts]).aim(weight)
    aim = found.aim(weight)
    assert aim is not None
    assert directly is not None
    assert torch.allclose(directly, aim, atol=1e-3)
    assert covariance([Rows(x)]).aim(weight) is None
