import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compress.solvers.sampling import sample, threshold
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


def tau_of(p: list[float], k: int) -> float:
    """sum of min(1, p / tau) = k by bisection."""
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(min(1.0, x / middle) for x in p) > k else (low, middle)
    return high


@pytest.mark.parametrize("k", [1, 3, 6])
@pytest.mark.parametrize("sharp", [0.5, 3.0])
def test_tokens_are_taken_as_often_as_the_equation_says_and_weigh_what_it_says(k, sharp):
    """The uniform number in steps as fine as they must be: shares of the line are inclusion probabilities."""
    generator, draws = torch.Generator().manual_seed(k), 20_000
    p = torch.softmax(sharp * torch.randn(12, generator=generator, dtype=torch.double), -1)
    tau = tau_of(p.tolist(), k)
    falling = p.sort(descending=True).values[None]
    rest = falling[:, k:].sum(-1, keepdim=True)
    assert float(threshold(falling[:, :k], rest)) == pytest.approx(tau, rel=1e-9)
    inclusion = (p / tau).clamp(max=1.0)
    uniform = (torch.arange(draws, dtype=torch.double) + 0.5) / draws
    ids, weights = sample(p.expand(draws, 12), k, uniform)
    taken = torch.zeros(12).scatter_add_(0, ids.flatten(), torch.ones(ids.numel()))
    torch.testing.assert_close(taken.double() / draws, inclusion, rtol=0, atol=2 / draws)
    torch.testing.assert_close(weights.double(), (p / inclusion)[ids], rtol=1e-6, atol=1e-9)


def test_the_largest_number_below_one_takes_k_tokens_the_last_of_the_line_among_them():
    """k - 1 + u would be rounded to k: no place is past the end, and none is met twice."""
    p = torch.softmax(torch.randn(50, 7, generator=torch.Generator().manual_seed(0), dtype=torch.double), -1)
    for k in (3, 7):  # some are taken by chance; all are taken for certain
        ids, weights = sample(p, k, torch.full((50,), 1 - 2.0**-53, dtype=torch.double))
        assert all(len(set(row)) == k for row in ids.tolist())
        torch.testing.assert_close(weights.sum(-1), torch.ones(50))
        likeliest = p.topk(k).indices
        others = torch.ones(50, 7, dtype=torch.bool).scatter_(1, likeliest, False)
        if k == 3:
            assert torch.equal(ids[:, -1], (others * torch.arange(7)).argmax(-1))


@given(seed=st.integers(0, 10**6), k=st.integers(1, 20), sharp=st.floats(0, 40))
def test_tokens_of_a_wide_vocabulary_are_those_that_the_line_says(seed, k, sharp):
    """Found by blocks, they are those of a plain walk along the line, and none has no probability."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(sharp * torch.randn(2, 150, generator=generator, dtype=torch.float64), -1)
    p[:, 70:140] = 0
    p /= p.sum(-1, keepdim=True)
    uniform = torch.rand(2, generator=generator, dtype=torch.float64)
    ids, _ = sample(p, k, uniform)
    for row, u, found in zip(p, uniform.tolist(), ids.tolist(), strict=True):
        tau = tau_of(row.tolist(), k)
        first = row.topk(k).indices.tolist()
        line = first + [token for token in range(150) if token not in first]
        ends = torch.cumsum((row[line] / tau).clamp(max=1.0), 0)
        nearest = min(float((ends - (u + j)).abs().min()) for j in range(k))
        if nearest > 1e-6:  # else either neighbour may be right
            assert found == [line[int((ends <= u + j).sum())] for j in range(k)]
        assert all(row[token] > 0 for token in found)


def test_float32_probabilities_give_what_float64_ones_give():
    p = torch.softmax(2 * torch.randn(40, 3000, generator=torch.Generator().manual_seed(0)), -1)
    uniform = torch.rand(40, generator=torch.Generator().manual_seed(1))
    (ids, weights), (wide, heavy) = sample(p, 12, uniform), sample(p.double(), 12, uniform)
    same = ids == wide
    assert same.float().mean() > 0.99
    torch.testing.assert_close(weights[same], heavy[same], rtol=1e-4, atol=1e-7)
