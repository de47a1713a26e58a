"""SmoothQuant: 8-bit weights and activations where a few channels are large."""

import pytest
import torch

from compress.formats import Int8
from compress.solvers.smoothquant import smooth_scales

FORMAT = Int8()


def layer():
    """A weight (32, 128) and inputs (300, 128) with three channels 60 times larger."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(32, 128, generator=generator), torch.randn(300, 128, generator=generator)
    x[:, [5, 50, 100]] *= 60
    return weight, x


def w8a8_error(weight: torch.Tensor, x: torch.Tensor, per_token: bool = False) -> float:
    """Relative squared error of the output: weights rounded per row, activations in one step or per token."""
    step = (x.abs().amax(1, keepdim=True) if per_token else x.abs().max()) / 127
    grid = FORMAT.fit(weight)
    rounded = FORMAT.values(FORMAT.codes(weight, grid), grid)
    activations = (x / step).round().clamp(-127, 127) * step
    exact = x @ weight.T
    return float((activations @ rounded.T - exact).square().sum() / exact.square().sum())


def smoothed(weight, x, fitted, alpha=0.5):
    s = smooth_scales(fitted.abs().amax(0), weight.abs().amax(0), alpha)
    return weight * s, x / s


def test_the_error_of_eight_bit_weights_and_activations_falls():
    weight, x = layer()
    fitted, apart = x[:150], x[150:]
    assert w8a8_error(*smoothed(weight, apart, fitted)) < 0.25 * w8a8_error(weight, apart)


def test_with_a_step_per_token_typical_sizes_are_better_than_the_largest():
    weight, x = layer()
    x[0, 7] = 2000  # once, as in a language model's first token
    largest, rms = x.abs().amax(0), x.square().mean(0).sqrt()

    def error(s: torch.Tensor) -> float:
        return w8a8_error(weight * s, x[1:] / s, per_token=True)

    sizes = weight.abs().amax(0)
    assert error(smooth_scales(rms, sizes)) < 0.5 * error(smooth_scales(largest, sizes))
    assert error(smooth_scales(rms, sizes)) < 0.5 * error(torch.ones(128))


def test_at_one_half_weights_and_inputs_get_the_same_range_per_channel():
    weight, x = layer()
    scaled, divided = smoothed(weight, x, x)
    assert torch.allclose(scaled.abs().amax(0), divided.abs().amax(0), rtol=1e-4)


def test_the_ends_of_alpha_flatten_one_side():
    weight, x = layer()
    _, divided = smoothed(weight, x, x, alpha=1.0)
    assert torch.allclose(divided.abs().amax(0), torch.ones(128))
    scaled, _ = smoothed(weight, x, x, alpha=0.0)
    assert torch.allclose(scaled.abs().amax(0), torch.ones(128))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_channels_without_inputs_or_weights_get_finite_scales(alpha):
    for x, w in ([[0.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]):
        s = smooth_scales(torch.tensor(x), torch.tensor(w), alpha)
        assert torch.isfinite(s).all()
        assert (s > 0).all()


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.8, 1.0])
def test_scales_are_those_of_equation_4(alpha):
    x, w = torch.tensor([1.0, 40.0, 3.0, 0.0]), torch.tensor([0.5, 0.0, 2.0, 0.25])
    # what is below a hundred-thousandth of the largest counts as that
    sizes = zip([1.0, 40.0, 3.0, 4e-4], [0.5, 2e-5, 2.0, 0.25], strict=True)
    expected = [a**alpha / b ** (1 - alpha) for a, b in sizes]
    assert smooth_scales(x, w, alpha).tolist() == pytest.approx(expected, rel=1e-5)
    # of a layer without inputs only the weights' half is known
    only = smooth_scales(torch.zeros(2), torch.tensor([4.0, 1.0]), alpha).tolist()
    assert only == pytest.approx([4.0 ** (alpha - 1), 1.0])
