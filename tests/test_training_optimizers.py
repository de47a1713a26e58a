from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_set import tiny_bundle
from transformers.pytorch_utils import Conv1D

from compress.models.conv1d import StoredTransposed
from compress.training.optimizers import Muon, build, orthogonalise, schedule_factor, split


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
    schedule=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
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
