import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.sampling import sample
from compress.training.objectives.losses import forward_kl
from compress.training.teaching.sampled import sampled_kl


@given(seed=st.integers(0, 10**6), v=st.integers(1, 40), k=st.integers(1, 40), sharp=st.floats(0, 60))
def test_exactly_k_distinct_tokens_whose_weights_sum_to_one(seed, v, k, sharp):
    k, generator = min(k, v), torch.Generator().manual_seed(seed)
    p = torch.softmax(sharp * torch.randn(3, v, generator=generator, dtype=torch.float64), -1)
    ids, weights = sample(p, k, torch.rand(3, generator=generator))
    assert all(len(set(row)) == k for row in ids.tolist())
    torch.testing.assert_close(weights.sum(-1), torch.ones(3))
    assert (weights >= 0).all()
    taken = p.gather(1, ids).float()
    assert (weights >= taken * (1 - 1e-5)).all(), "never lighter than its probability"
    if k == v:
        torch.testing.assert_close(weights, taken)


def test_one_token_that_holds_everything_and_fewer_than_k_with_any_probability():
    p = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.9, 0.0, 0.1, 0.0]])
    for u in (0.0, 0.3, 0.999):
        ids, weights = sample(p, 3, torch.full((2,), u))
        back = torch.zeros(2, 4).scatter_add_(1, ids, weights)
        torch.testing.assert_close(back, p)


def test_the_mean_over_many_draws_is_the_full_gradient_and_the_full_loss():
    """Unbiased, for loss and gradient; a bare top-k of the same size is not."""
    generator = torch.Generator().manual_seed(0)
    draws, v, k, temperature = 4000, 60, 6, 1.7
    y = 2 * torch.randn(1, v, generator=generator)
    z = torch.randn(1, v, generator=generator).requires_grad_()
    forward_kl(z, y, temperature).backward()
    expected, loss = z.grad[0].clone(), forward_kl(z, y, temperature).detach()
    p = torch.softmax(y / temperature, -1)
    entropy = -(p * p.log()).sum(-1)
    ids, weights = sample(p.expand(draws, v), k, torch.rand(draws, generator=generator))
    many = z.detach().expand(draws, v).clone().requires_grad_()
    sampled_kl(many, ids, weights, entropy.expand(draws), temperature).backward()
    found = many.grad * draws  # one gradient per draw
    error = (found.mean(0) - expected).abs()
    noise = found.std(0) / draws**0.5
    assert (error <= 4.5 * noise + 1e-6).all()
    losses = temperature**2 * (
        -(weights * torch.log_softmax(z.detach() / temperature, -1)[0][ids]).sum(-1) - entropy
    )
    assert abs(float(losses.mean() - loss)) < 4.5 * float(losses.std()) / draws**0.5
    top = p[0].topk(k)
    biased = torch.zeros(v).scatter_(0, top.indices, top.values / top.values.sum())
    wrong = temperature * (torch.softmax(z.detach()[0] / temperature, -1) - biased) - expected
    assert wrong.norm() > 10 * (found.mean(0) - expected).norm()


def test_more_tokens_than_there_are_is_all_of_them():
    p = torch.tensor([[0.7, 0.2, 0.1]])
    ids, weights = sample(p, 12, torch.tensor([0.3]))
    assert sorted(ids[0].tolist()) == [0, 1, 2]
    torch.testing.assert_close(weights, p.gather(1, ids))
