"""AWQ: a few channels with large inputs, and rounding that spares their weights."""

import pytest
import torch

from compress.formats import Int3
from compress.solvers.awq import scales_for, search

FORMAT = Int3(group=64)
BETAS = (0.0, 0.25, 0.5, 0.75)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    grid = FORMAT.fit(weight)
    return FORMAT.values(FORMAT.codes(weight, grid), grid)


def layer(outliers: int, size: float = 30.0):
    """A weight (32, 256) and inputs (400, 256) of which a few channels are `size` times larger."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 256, generator=generator)
    x = torch.randn(400, 256, generator=generator)
    x[:, torch.randperm(256, generator=generator)[:outliers]] *= size
    return weight, x


def error(weight, x, s) -> float:
    difference = weight - rounded(weight * s) / s
    return float((x @ difference.T).square().sum() / (x @ weight.T).square().sum())


def test_the_output_error_at_three_bits_falls_where_few_channels_are_large():
    weight, x = layer(outliers=4)
    fitted, apart = x[:200], x[200:]
    magnitudes = fitted.abs().mean(0)
    beta, errors = search(weight, magnitudes, fitted, rounded, BETAS)
    assert beta > 0
    assert errors[beta] == min(errors.values())
    s = scales_for(magnitudes, beta)
    assert error(weight, apart, s) < 0.85 * error(weight, apart, torch.ones(256))


def test_the_large_channels_are_what_gets_better():
    weight, x = layer(outliers=4)
    magnitudes = x.abs().mean(0)
    s = scales_for(magnitudes, 0.5)
    large = magnitudes > 10
    scaled, plain = ((weight - part).square().mean(0) for part in (rounded(weight * s) / s, rounded(weight)))
    assert scaled[large].mean() < 0.7 * plain[large].mean()
    assert scaled[~large].mean() > plain[~large].mean()  # the price


def test_errors_are_those_of_the_outputs_and_no_scaling_is_plain_rounding():
    weight, x = layer(outliers=4)
    magnitudes = x.abs().mean(0)
    _, errors = search(weight, magnitudes, x, rounded, BETAS)
    for beta in BETAS:
        assert abs(errors[beta] / error(weight, x, scales_for(magnitudes, beta)) - 1) < 1e-3
    assert torch.equal(scales_for(magnitudes, 0.0), torch.ones(256))


def test_scales_are_positive_whatever_the_inputs_and_do_not_depend_on_their_unit():
    for magnitudes in (torch.tensor([0.0, 1.0, 1e6]), torch.zeros(3), torch.tensor([1e-30, 0.0, 1e-35])):
        s = scales_for(magnitudes, 0.5)
        assert (s > 0).all()
        assert torch.isfinite(s).all()
    magnitudes = torch.tensor([0.5, 2.0, 8.0])
    assert torch.allclose(scales_for(magnitudes, 0.5), scales_for(64 * magnitudes, 0.5))


def test_scales_and_errors_are_those_of_the_equations():
    weight, x = layer(outliers=4)
    magnitudes = x.abs().mean(0)
    magnitudes[5] = 0  # all but dead: counts as a ten-thousandth of the largest
    mine = magnitudes.double().clone()
    mine[5] = 1e-4 * mine.max()
    beta, errors = search(weight, magnitudes, x, rounded, BETAS)
    for tried in BETAS:
        s = mine**tried
        s = s / (s.max() * s.min()).sqrt()
        torch.testing.assert_close(scales_for(magnitudes, tried).double(), s, rtol=1e-5, atol=0)
        lost = x.double() @ (weight - rounded(weight * s.float()) / s.float()).double().T
        explicit = float(lost.square().sum() / (x.double() @ weight.double().T).square().sum())
        assert errors[tried] == pytest.approx(explicit, rel=1e-3)
    assert beta == min(BETAS, key=lambda tried: errors[tried])


def test_of_equal_betas_the_first_wins_and_nothing_is_no_trouble():
    weight, x = layer(outliers=4)
    assert search(weight, torch.ones(256), x, rounded, (0.5, 0.0, 0.25))[0] == 0.5
    beta, errors = search(0 * weight, torch.zeros(256), x, rounded, (0.0, 0.5))
    assert (beta, errors) == (0.0, {0.0: 0.0, 0.5: 0.0})
