import pytest
import torch
import torch.nn.functional as F

from compress.training.objectives.losses import (
    DIVERGENCES,
    chunked,
    cross_entropy,
    distillation,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
)


def logits(seed, rows=7, vocabulary=11, dtype=torch.float64):
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def kl(p, q):
    return (p * (p / q).log()).sum(-1).mean()


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergences_equal_their_definitions(temperature):
    z, y = logits(0), logits(1)
    q, p = F.softmax(z / temperature, -1), F.softmax(y / temperature, -1)
    square = temperature**2
    close = {"rtol": 1e-5, "atol": 1e-6, "check_dtype": False}
    torch.testing.assert_close(forward_kl(z, y, temperature), square * kl(p, q), **close)
    torch.testing.assert_close(reverse_kl(z, y, temperature), square * kl(q, p), **close)
    m = 0.3 * p + 0.7 * q
    expected = square * (0.3 * kl(p, m) + 0.7 * kl(q, m))
    torch.testing.assert_close(jensen_shannon(z, y, temperature, beta=0.3), expected, **close)
    expected = square * kl(p, 0.2 * p + 0.8 * q)
    torch.testing.assert_close(skew_kl(z, y, temperature, alpha=0.2), expected, **close)
    torch.testing.assert_close(skew_kl(z, y, temperature, alpha=0.0), square * kl(p, q), **close)


@pytest.mark.parametrize("name", list(DIVERGENCES))
def test_equal_logits_diverge_by_nothing_and_others_by_something(name):
    divergence = DIVERGENCES[name]
    assert abs(float(divergence(logits(0), logits(0), 2.0))) < 1e-6
    assert float(divergence(logits(0), logits(0) + 5.0, 2.0)) == pytest.approx(0, abs=1e-5)
    assert float(divergence(logits(0), logits(1), 2.0)) > 0.01


def test_the_squared_temperature_keeps_the_gradients_size():
    """Hinton 2015, eq. 4: for high T and centred logits the gradient tends to (z - y) / vocabulary."""
    y = logits(1) - logits(1).mean(-1, keepdim=True)
    start = logits(0) - logits(0).mean(-1, keepdim=True)
    norms = []
    for temperature in (100.0, 200.0):
        z = start.clone().requires_grad_()
        forward_kl(z, y, temperature).backward()
        torch.testing.assert_close(z.grad, (start - y) / z.numel(), rtol=0.1, atol=2e-3)
        norms.append(z.grad.norm())
    assert norms[0] / norms[1] == pytest.approx(1, rel=0.02)


def test_the_mix_is_linear_in_its_weight():
    z, y, targets = logits(0), logits(1), torch.arange(7)
    soft, hard = forward_kl(z, y, 2.0), cross_entropy(z, targets)
    mixed = distillation(z, y, targets, "forward_kl", 2.0, 0.25)
    torch.testing.assert_close(mixed, 0.75 * soft + 0.25 * hard)
    torch.testing.assert_close(distillation(z, y, targets, "forward_kl", 2.0, 1.0), hard)
    torch.testing.assert_close(distillation(z, y, targets, "forward_kl", 2.0, 0.0), soft)


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_blocks_of_positions_give_the_same_loss_and_gradient(rows):
    targets = torch.arange(7)
    z = logits(0, dtype=torch.float32).requires_grad_()
    y = logits(1, dtype=torch.float32)
    (2 * distillation(z, y, targets)).backward()
    expected, z.grad = z.grad, None
    loss = chunked(distillation, z, y, targets, rows=rows)
    (2 * loss).backward()
    torch.testing.assert_close(loss, distillation(z, y, targets))
    torch.testing.assert_close(z.grad, expected)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 1e4])  # of the logits: nearly alike, and far beyond what exp takes
def test_cross_entropy_in_blocks_has_the_plain_loss_and_gradient(rows, dtype, size):
    z = (size * logits(0, dtype=torch.float32)).to(dtype).requires_grad_()
    targets = torch.arange(7)
    expected = cross_entropy(z, targets)
    (wanted,) = torch.autograd.grad(3 * expected, z)
    loss = chunked(cross_entropy, z, targets, rows=rows)
    torch.testing.assert_close(loss, expected)
    (found,) = torch.autograd.grad(3 * loss, z)
    assert found.dtype == dtype
    torch.testing.assert_close(found, wanted)
