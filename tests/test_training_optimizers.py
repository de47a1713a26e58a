import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_set import tiny_bundle
from transformers.pytorch_utils import Conv1D

from compress.models.conv1d import StoredTransposed
from compress.training.optimizers import Muon, ScheduleName, build, orthogonalise, schedule_factor, split


@pytest.mark.parametrize("shape", [(8, 8), (5, 16), (16, 5), (3, 6, 12)])
def test_newton_schulz_pushes_singular_values_near_one_and_keeps_the_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = orthogonalise(matrix)
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.6
    assert values.max() < 1.3
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    inside = u.mT @ result @ v.mT  # diagonal when the directions are kept
    torch.testing.assert_close(inside, torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)), atol=1e-4, rtol=0)


def test_muon_steps_do_not_depend_on_the_gradients_scale():
    steps = []
    for scale in (1.0, 1000.0):
        parameter = nn.Parameter(torch.zeros(4, 6))
        parameter.grad = scale * torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
        Muon([parameter], lr=0.1).step()
        steps.append(parameter.detach().clone())
    torch.testing.assert_close(steps[0], steps[1], rtol=1e-3, atol=1e-4)


def test_muon_moves_a_turned_matrix_as_the_matrix():
    """GPT-2's matrices lie in memory as (in, out): the update is that of (out, in) all the same."""
    gradient = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))
    linear, turned = nn.Linear(8, 32, bias=False), StoredTransposed(Conv1D(32, 8))
    for module in (linear, turned):
        nn.init.zeros_(module.weight)
        module.weight.grad = torch.empty_like(module.weight).copy_(gradient)
        build(module, "muon", 1e-3, 0.1, 0.0)[0].step()
    assert linear.weight.norm() > 0
    torch.testing.assert_close(turned.weight, linear.weight)


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("tie", [True, False])
def test_each_parameter_has_one_optimiser_and_only_matrices_decay(name, tie):
    model = tiny_bundle(tie_embeddings=tie).model
    optimisers = build(model, name, 1e-3, 0.02, 0.1)
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    seen = [id(p) for group in groups for p in group["params"]]
    assert sorted(seen) == sorted(id(p) for p in model.parameters())
    matrices, _ = split(model)
    assert len(matrices) == 7 * 4
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in matrices}


def test_frozen_parameters_stay_out():
    model = tiny_bundle().model
    model.get_input_embeddings().weight.requires_grad_(False)
    groups = [g for o in build(model, "muon", 1e-3, 0.02, 0.0) for g in o.param_groups]
    embedding = model.get_input_embeddings().weight
    assert all(p is not embedding for g in groups for p in g["params"])


@given(
    schedule=st.sampled_from(get_args(ScheduleName)),
    steps=st.integers(1, 300),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_schedules_stay_in_bounds_rise_then_fall(schedule, steps, warmup, decay):
    factors = [schedule_factor(schedule, step, steps, warmup, decay) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    warm = round(warmup * steps)
    assert all(a <= b for a, b in pairwise(factors[:warm]))
    rest = factors[warm:]
    assert all(a >= b for a, b in pairwise(rest))


def test_schedules_have_their_shapes():
    def shape(name):
        return [round(schedule_factor(name, step, 10, 0.2, 0.4), 3) for step in range(10)]

    assert shape("wsd") == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert shape("linear") == [0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125]
    assert shape("constant") == [0.5, *[1] * 9]
    assert shape("cosine")[6] == 0.5


@pytest.mark.parametrize("shape", [(4, 8, 64), (3, 48, 16), (16, 40)])
def test_both_ways_of_newton_schulz_are_the_papers_recursion(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.double() if shape[-2] <= shape[-1] else matrix.double().mT
    x = x / x.norm(dim=(-2, -1), keepdim=True)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x if shape[-2] <= shape[-1] else x.mT
    torch.testing.assert_close(orthogonalise(matrix).double(), x, atol=1e-4, rtol=1e-4)


def by_the_recursion(matrix: torch.Tensor) -> torch.Tensor:
    """The post's recursion in float64, the smaller side in front."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


@pytest.mark.parametrize("shape", [(4, 6), (9, 4), (6, 6)])
def test_muon_steps_are_those_of_the_equations(shape):
    """Momentum as a moving mean, Nesterov's mix, decay beside the gradient, the scale of tall ones."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    gradients = torch.randn(4, *shape, generator=generator)
    parameter, beside = nn.Parameter(start.clone()), nn.Parameter(start.clone())  # of one shape: together
    untouched = nn.Parameter(start.clone())  # without a gradient
    optimizer = Muon([parameter, beside, untouched], lr=0.1, momentum=0.9, weight_decay=0.5)
    expected, momentum = start.double(), torch.zeros(shape, dtype=torch.double)
    for gradient in gradients:
        parameter.grad, beside.grad = gradient.clone(), torch.zeros(shape)
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * gradient.double()
        direction = by_the_recursion(0.1 * gradient.double() + 0.9 * momentum)
        scale = 0.1 * max(1, shape[0] / shape[1]) ** 0.5
        expected = expected * (1 - 0.1 * 0.5) - scale * direction
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(beside.detach(), start * (1 - 0.1 * 0.5) ** 4)
    assert torch.equal(untouched, start)
    assert Muon([parameter], lr=0.1).defaults["momentum"] == 0.95


def test_a_matrix_of_zeros_has_no_direction():
    assert torch.equal(orthogonalise(torch.zeros(3, 7)), torch.zeros(3, 7))


def test_bfloat16_is_computed_by_steps_and_comes_near():
    matrix = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    found = orthogonalise(matrix, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    assert (found.double() - by_the_recursion(matrix.double())).abs().max() < 0.05


class Small(nn.Module):
    """A matrix, an embedding that is tied to nothing, a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 3)


def stepped(name, steps=3, **options):
    """Parameters by name after a few steps, with their starts and gradients (float64)."""
    torch.manual_seed(0)
    model, gradients = Small(), []
    starts = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    parts = build(model, name, 0.05, 0.02, 0.3, **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradients.append({})
        for n, p in model.named_parameters():
            p.grad = torch.randn(p.shape, generator=generator)
            gradients[-1][n] = p.grad.double()
        for part in parts:
            part.step()
    return {n: p.detach().double() for n, p in model.named_parameters()}, starts, gradients


@pytest.mark.parametrize("factor", [1.0, 0.25])
def test_adamw_steps_are_those_of_the_paper(factor):
    after, starts, gradients = stepped("adamw", factors={"linear.weight": factor})
    for name, expected in starts.items():
        rate = 0.05 * (factor if name == "linear.weight" else 1.0)
        decay = 0.3 if name == "linear.weight" else 0.0
        m = v = torch.zeros_like(expected)
        for step, each in enumerate(gradients, 1):
            m, v = 0.9 * m + 0.1 * each[name], 0.95 * v + 0.05 * each[name] ** 2
            expected = expected * (1 - rate * decay)
            expected = expected - rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def of_the_paper(name, sums, gradient, step):
    """The direction of an update, from the sums so far: Adam's, Adagrad's, RMSprop's."""
    m, v = sums
    if name == "adam":
        sums[:] = 0.9 * m + 0.1 * gradient, 0.95 * v + 0.05 * gradient**2
        return sums[0] / (1 - 0.9**step) / ((sums[1] / (1 - 0.95**step)).sqrt() + 1e-8)
    sums[1] = v + gradient**2 if name == "adagrad" else 0.99 * v + 0.01 * gradient**2
    return gradient / (sums[1].sqrt() + (1e-10 if name == "adagrad" else 1e-8))


@pytest.mark.parametrize("name", ["adam", "adagrad", "rmsprop"])
def test_other_steps_are_those_of_their_papers(name):
    after, starts, gradients = stepped(name, factors={"linear.weight": 0.25})
    for parameter, expected in starts.items():
        rate, decay = (0.05 * 0.25, 0.3) if parameter == "linear.weight" else (0.05, 0.0)
        sums = [torch.zeros_like(expected)] * 2
        for step, each in enumerate(gradients, 1):
            gradient = each[parameter] + decay * expected  # the decay is part of the gradient
            expected = expected - rate * of_the_paper(name, sums, gradient, step)
        torch.testing.assert_close(after[parameter], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_sgd_steps_are_nesterovs(momentum):
    after, starts, gradients = stepped("sgd", momentum=momentum)
    for name, expected in starts.items():
        decay, velocity = (0.3 if name == "linear.weight" else 0.0), torch.zeros_like(expected)
        for each in gradients:
            gradient = each[name] + decay * expected
            velocity = momentum * velocity + gradient
            expected = expected - 0.05 * (gradient + momentum * velocity)
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


def test_muon_takes_the_matrix_and_adamw_the_rest_and_what_learns_beside():
    torch.manual_seed(0)
    model, beside = Small(), nn.Linear(2, 2)
    parts = build(
        model, "muon", 0.05, 0.02, 0.3, torch.bfloat16, factors={"linear.weight": 0.5}, extra=beside
    )
    muon, rest, extra = parts
    assert isinstance(muon, Muon)
    assert muon.dtype == torch.bfloat16
    (group,) = muon.param_groups
    assert group["params"] == [model.linear.weight]
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.3)
    assert [p for g in rest.param_groups for p in g["params"]] == [model.table.weight, model.linear.bias]
    assert {(g["lr"], g["weight_decay"], g["betas"]) for g in rest.param_groups} == {(0.05, 0.0, (0.9, 0.95))}
    assert extra.param_groups[0]["params"] == list(beside.parameters())
    assert (extra.param_groups[0]["lr"], extra.param_groups[0]["weight_decay"]) == (0.05, 0.0)


def by_the_book(schedule, step, steps, warmup, decay):
    warm = round(warmup * steps)
    if step < warm:
        return (step + 1) / warm
    share = (step - warm) / max(1, steps - warm)
    last = max(1, round(decay * steps))
    return {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": (1 + math.cos(math.pi * share)) / 2,
        "wsd": min(1.0, (steps - step) / last),
        "polynomial": (1 - share) ** 2,
        "exponential": math.exp(share * math.log(0.01)),
    }[schedule]


@given(
    schedule=st.sampled_from(get_args(ScheduleName)),
    steps=st.integers(1, 60),
    warmup=st.floats(0, 1),
    decay=st.floats(0, 1),
)
def test_schedules_are_their_equations(schedule, steps, warmup, decay):
    for step in range(steps):
        expected = by_the_book(schedule, step, steps, warmup, decay)
        assert schedule_factor(schedule, step, steps, warmup, decay) == pytest.approx(expected)
