"""A step is the same however its windows are divided: gradients, losses, and what a training ends with."""

import numpy as np
import pytest
import torch
from training_set import WINDOW, tiny_bundle, tiny_context, weights

from compress.models.running import autocast
from compress.passes.distill import Distill
from compress.passes.train import Train
from compress.training.objectives.losses import chunked, cross_entropy, forward_kl
from compress.training.products import summed_in_float32

CPU = torch.device("cpu")


def gradients(model, rows, parts, precision="bfloat16"):
    """Of the mean loss of rows (n, WINDOW + 1), `parts` micro-batches at a time."""
    model.zero_grad()
    with summed_in_float32(model, precision):
        for part in rows.chunk(parts):
            with autocast(CPU, precision):
                logits = model(input_ids=part[:, :-1], use_cache=False).logits
            loss = chunked(cross_entropy, logits.flatten(0, 1), part[:, 1:].flatten(), rows=50)
            (loss * (len(part) / len(rows))).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with biases; tied and not
@pytest.mark.parametrize("parts", [2, 3, 6])
def test_in_bfloat16_the_gradient_of_micro_batches_is_that_of_the_batch(family, parts):
    model = tiny_bundle(family=family).model
    rows = torch.randint(0, 300, (6, WINDOW + 1), generator=torch.Generator().manual_seed(0))
    whole, divided = gradients(model, rows, 1), gradients(model, rows, parts)
    exact = gradients(model, rows, 1, "float32")
    for name, value in whole.items():
        assert value.dtype == torch.float32
        assert (value - divided[name]).norm() < 1e-4 * value.norm(), name  # one rounding comes to 2e-3
        assert (value - exact[name]).norm() < 0.03 * exact[name].norm(), name


def test_a_weights_gradient_is_the_float32_sum_of_what_windows_give_in_bfloat16():
    layer = torch.nn.Linear(5, 3)
    x, g = torch.randn(2, 4, 7, 5), torch.randn(2, 4, 7, 3)[:, :1].expand(2, 4, 7, 3)
    for shape in ((4, 7), (2, 4, 7)):  # windows, positions; and an axis more
        inputs = x.reshape(8, 7, 5)[:4] if len(shape) == 2 else x
        given = g[:1].reshape(4, 7, 3) if len(shape) == 2 else g
        inputs = inputs.clone().requires_grad_()
        layer.zero_grad()
        with summed_in_float32(layer, "bfloat16"), autocast(CPU, "bfloat16"):
            found = layer(inputs)
        half, up = inputs.detach().bfloat16(), given.bfloat16()
        assert torch.equal(
            found, torch.nn.functional.linear(half, layer.weight.bfloat16(), layer.bias.bfloat16())
        )
        found.backward(up)
        expected = sum(
            (u.float().reshape(-1, 3).T @ h.float().reshape(-1, 5)).bfloat16().float()
            for u, h in zip(up, half, strict=True)
        )
        torch.testing.assert_close(layer.weight.grad, expected, rtol=2e-2, atol=1e-5)
        torch.testing.assert_close(layer.bias.grad, up.float().reshape(-1, 3).sum(0))
        torch.testing.assert_close(inputs.grad, (up @ layer.weight.bfloat16()).float())
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("function", [cross_entropy, forward_kl])
def test_the_gradient_of_half_logits_does_not_depend_on_how_many_there_are(function):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 40, generator=generator).bfloat16()
    other = torch.randint(0, 40, (12,), generator=generator)
    other = other if function is cross_entropy else torch.randn(12, 40, generator=generator)
    found = []
    for size in (12, 4):
        z = logits.clone().requires_grad_()
        for part, rest in zip(z.split(size), other.split(size), strict=True):
            (chunked(function, part, rest, rows=3) * (len(part) / 12)).backward()
        found.append(z.grad)
    assert torch.equal(*found)
    exact = logits.float().requires_grad_()
    function(exact, other).backward()
    torch.testing.assert_close(found[0].float(), exact.grad, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("step", [Train, Distill])
@pytest.mark.parametrize(("precision", "near"), [("float32", 1e-4), ("bfloat16", 0.005)])
def test_a_training_ends_the_same_however_a_step_is_divided(step, precision, near, tmp_path):
    bundle, ends = tiny_bundle(), []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        settings = {"tokens": 12 * 8 * WINDOW, "batch": batch, "accumulate": accumulate}
        context = tiny_context(bundle, tmp_path / f"{batch}", tiny_bundle(seed=3))
        ends.append(step(**settings, precision=precision)(bundle, context))
    for other in ends[1:]:
        assert other.notes["heldout_after"] == pytest.approx(ends[0].notes["heldout_after"], abs=near)
        curves = [[point[2] for point in end.notes["loss_curve"]] for end in (ends[0], other)]
        assert curves[0] == pytest.approx(curves[1], abs=near)
    assert all(p.dtype == torch.float32 for p in weights(ends[0]).values())


def test_text_that_the_student_writes_is_the_same_however_a_step_is_divided(tmp_path):
    bundle, ends = tiny_bundle(), []
    for batch, accumulate in ((8, 1), (4, 2), (2, 4)):
        settings = {"tokens": 6 * 8 * WINDOW, "batch": batch, "accumulate": accumulate, "on_policy": 1.0}
        context = tiny_context(bundle, tmp_path / f"{batch}", tiny_bundle(seed=3))
        ends.append(Distill(**settings, precision="float32")(bundle, context))
    curves = [[point[2:] for point in end.notes["loss_curve"]] for end in ends]
    for other in curves[1:]:
        assert np.allclose(
            np.array(other, float), np.array(curves[0], float), rtol=2e-4, atol=1e-5, equal_nan=True
        )
