"""What the loop may be asked for: rates per module, averages, stopping, checkpointed activations."""

import pytest
import torch
from training_set import WINDOW, equal, tiny_bundle, tiny_context, weights

from compress.errors import UserError
from compress.passes.train import Train
from compress.training import checkpoint, rates
from compress.training.averaging import Average
from compress.training.optimizers import build

STEPS = {"tokens": 12 * 4 * WINDOW, "batch": 4, "heldout_points": 4}


def test_sgd_learns_with_momentum(tmp_path):
    bundle = tiny_bundle()
    settings = {**STEPS, "tokens": 10 * 4 * WINDOW, "optimizer": "sgd", "learning_rate": 0.5, "clip": 1.0}
    runs = [
        Train(**settings, momentum=m)(bundle, tiny_context(bundle, tmp_path / str(m))).notes for m in (0, 0.9)
    ]
    assert runs[1]["heldout_after"] < runs[0]["heldout_after"] < runs[0]["heldout_before"]


def test_frozen_modules_stay_and_learn_again_afterwards(tmp_path):
    bundle = tiny_bundle()
    result = Train(**STEPS, freeze=("model.layers.0.*", "model.embed_tokens"))(
        bundle, tiny_context(bundle, tmp_path)
    )
    for name, value in weights(result).items():
        still = name.startswith(("model.layers.0.", "model.embed_tokens", "lm_head"))
        assert torch.equal(value, bundle.model.state_dict()[name]) == still, name
    assert all(p.requires_grad for p in result.model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_a_factor_scales_a_modules_steps(optimizer, tmp_path):
    """One step from the same gradient: the update is the factor times as long, for a matrix and a norm."""
    updates = []
    for factor in (1.0, 0.25):
        model = tiny_bundle().model
        slower = (rates.Slower(modules="model.layers.1", factor=factor),)
        parts = build(model, optimizer, 1e-2, 1e-2, 0.0, factors=rates.factors(model, slower))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for part in parts:
            part.step()
        updates.append({n: p.detach() - before[n] for n, p in model.named_parameters()})
    for name in updates[0]:
        factor = 0.25 if name.startswith("model.layers.1.") else 1.0
        torch.testing.assert_close(updates[1][name], factor * updates[0][name], rtol=1e-3, atol=1e-6)


def test_wildcards_that_fit_nothing_or_all_are_refused_before_any_work():
    model = tiny_bundle().model
    with pytest.raises(UserError, match=r"freeze: 'model\.layer\.0' fits no module; did you mean"):
        Train(freeze=("model.layer.0",)).layers(model)
    with pytest.raises(UserError, match="slower: 'mlp' fits no module"):
        Train(slower=({"modules": "mlp", "factor": 0.1},)).layers(model)
    with pytest.raises(UserError, match="leaves nothing to train"):
        Train(freeze=("model",)).layers(model)


def test_checkpointed_activations_give_the_same_bytes_and_keep_less(tmp_path):
    bundle, results, held = tiny_bundle(), [], []
    for wanted in (False, True):
        sizes: list[int] = []

        def count(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        step = Train(**STEPS, gradient_checkpointing=wanted)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            results.append(step(bundle, tiny_context(bundle, tmp_path / str(wanted))))
        held.append(sum(sizes))
    assert equal(weights(results[0]), weights(results[1]))
    assert not any(getattr(m, "gradient_checkpointing", False) for m in results[1].model.modules())
    # with checkpoints, torch's own hooks take what the blocks save: only what lies outside is seen here
    assert held[1] < 0.5 * held[0]


def test_averages_are_the_means_they_say():
    layer = torch.nn.Linear(1, 1, bias=False)
    values = torch.randn(20, generator=torch.Generator().manual_seed(0)).double().tolist()
    tail, ema = Average(layer, "tail", 0.25, 20), Average(layer, "ema", 0.2, 20)
    expected = 0.0
    for step, value in enumerate(values):
        layer.weight.data.fill_(value)
        tail.update(step)
        ema.update(step)
        # the textbook's: the plain mean of the first four, then 1/4 of the new and 3/4 of the old
        expected = sum(values[: step + 1]) / (step + 1) if step < 4 else 0.75 * expected + 0.25 * value
    assert float(tail.tensors["weight"]) == pytest.approx(sum(values[-5:]) / 5, abs=1e-6)
    assert float(ema.tensors["weight"]) == pytest.approx(expected, abs=1e-6)
    with tail.swapped():
        assert layer.weight.item() == pytest.approx(sum(values[-5:]) / 5, abs=1e-6)
    assert layer.weight.item() == pytest.approx(values[-1], abs=1e-6)


@pytest.mark.parametrize("kind", ["ema", "tail"])
def test_the_average_is_kept_where_it_scores_better(kind, tmp_path):
    """At a rate that stays high the last weights bounce about and their mean does not (Izmailov 2018)."""
    bundle = tiny_bundle()
    noisy = {"optimizer": "adamw", "learning_rate": 3e-2, "schedule": "constant", "batch": 2}
    step = Train(tokens=100 * 2 * WINDOW, **noisy, average=kind, average_share=0.2, heldout_points=2)
    notes = step(bundle, tiny_context(bundle, tmp_path / kind)).notes
    assert notes["kept"] == "average of step 100"
    assert notes["heldout_after"] == notes["average_curve"][-1][1] < notes["loss_curve"][-1][3]
    # and where it scores worse, the last weights are
    rising = Train(**STEPS, average=kind, average_share=1.0)(bundle, tiny_context(bundle, tmp_path / "x"))
    assert rising.notes["kept"] == "weights of step 12"


def test_a_run_that_gains_nothing_ends_and_keeps_its_best(tmp_path):
    bundle = tiny_bundle()
    good = Train(**STEPS)(bundle, tiny_context(bundle, tmp_path / "good"))
    wild = {"optimizer": "sgd", "learning_rate": 8.0, "clip": 1e3, "schedule": "constant", "warmup": 0}
    step = Train(tokens=40 * 4 * WINDOW, batch=4, heldout_points=20, patience=3, **wild)
    result = step(good, tiny_context(good, tmp_path / "wild"))
    assert result.notes["stopped_early"]
    assert result.notes["steps"] < 40
    assert result.notes["heldout_after"] <= result.notes["heldout_before"]
    kept = int(result.notes["kept"].rpartition(" ")[2])
    scores = {0: result.notes["heldout_before"], **{c[0]: c[3] for c in result.notes["loss_curve"] if c[3]}}
    assert result.notes["heldout_after"] == scores[kept] == min(scores.values())
    if kept == 0:
        assert equal(weights(good), weights(result))


@pytest.mark.parametrize(
    "settings",
    [
        {"average": "ema", "patience": 50, "optimizer": "sgd", "learning_rate": 0.3},
        {"average": "tail", "average_share": 0.6, "freeze": ("model.layers.0.*",)},
        {"slower": ({"modules": "*.mlp", "factor": 0.1},), "gradient_checkpointing": True},
    ],
)
def test_interrupted_with_all_of_it_a_run_ends_with_the_same_bytes(settings, tmp_path, monkeypatch):
    bundle = tiny_bundle()
    run = Train(**STEPS, checkpoint_seconds=0.0, **settings)
    whole = run(bundle, tiny_context(bundle, tmp_path / "whole"))
    save, calls = checkpoint.save, []

    def interrupted(*arguments):
        save(*arguments)
        calls.append(arguments[3]["step"])
        if len(calls) % 5 == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    for _ in range(10):
        try:
            result = run(bundle, tiny_context(bundle, tmp_path / "cut"))
            break
        except KeyboardInterrupt:
            continue
    assert len(calls) > 5
    assert equal(weights(whole), weights(result))
    clock = {"tokens_per_second"}
    assert {k: v for k, v in whole.notes.items() if k not in clock} == {
        k: v for k, v in result.notes.items() if k not in clock
    }
