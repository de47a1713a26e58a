"""Tuning of scales: the gradient is that of the plain formula, codes never move, held-out KL never rises."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_set import equal, tiny_bundle, tiny_context, weights

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.formats import Int4, Int8, QuantizedLinear, QuantizedTensor
from compress.passes.quantize_round import QuantizeRound
from compress.passes.train import Train
from compress.passes.tune_scales import TuneScales
from compress.run.preflight import check_order
from compress.run.recipe import Recipe
from compress.training import checkpoint
from compress.training.codes.scales import TunableLinear, TunableTensor, make_tunable, use_masters

SETTINGS = {"tokens": 24 * 4 * 32, "batch": 4, "window": 32, "checks": 3, "learning_rate": 3e-3}
SCALES = "quantized.scales"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Bundle:
    bundle = tiny_bundle()
    work = tmp_path_factory.mktemp("train")
    return Train(tokens=200 * 4 * 32, batch=4)(bundle, tiny_context(bundle, work))


def coarse(bundle: Bundle, tmp_path: Path) -> Bundle:
    """Few codes per weight: rounded to int4 in groups as wide as the layers."""
    step = QuantizeRound(format=Int4(group=None, clip_search=0), embeddings=Int4(group=None, clip_search=0))
    return step(bundle, tiny_context(bundle, tmp_path))


@pytest.mark.parametrize(
    ("format", "columns"),
    [
        (Int4(group=16), 48),
        (Int4(group=32, symmetric=True), 40),
        (Int8(), 24),
        (Int8(group=16, symmetric=False), 16),
    ],
    ids=["int4", "ragged", "int8", "int8 with zero-points"],
)
def test_the_gradient_is_autograds_of_the_plain_formula(format, columns):
    torch.manual_seed(0)
    held = QuantizedTensor.round(format, torch.randn(10, columns))
    x = torch.randn(2, 5, columns)
    results = []
    tunable = TunableTensor(held)
    layer = TunableLinear(tunable, None)
    scales = held.grid.scales.clone().requires_grad_()
    width = format.group_width(columns)
    steps = held.unpacked().float() - held.grid.zeros.float().repeat_interleave(width, 1)[:, :columns]
    for mine in (True, False):
        given = x.clone().requires_grad_()
        weight = steps * scales.repeat_interleave(width, 1)[:, :columns]
        y = layer(given) if mine else given @ weight.T
        y.square().sum().backward()
        results.append((y.detach(), given.grad))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right)
    torch.testing.assert_close(tunable.shift.grad, scales.grad * held.grid.scales)  # s = s0 (1 + d)


def test_a_tunable_model_computes_what_the_codes_say(trained, tmp_path):
    bundle = coarse(trained, tmp_path)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        before = bundle.model(ids).logits
        copy = bundle.clone().model
        held = make_tunable(copy)
        torch.testing.assert_close(copy(ids).logits, before)
        use_masters(copy, True)
        for _, tensor in held.values():
            tensor.shift += 1e-5
        assert not torch.equal(copy(ids).logits, before)
        use_masters(copy, False)  # too little to change a float16
        torch.testing.assert_close(copy(ids).logits, before)


@pytest.mark.parametrize("tied", [True, False])
def test_it_gains_and_only_scales_and_vectors_move(tied, trained, tmp_path):
    if tied:
        base = trained
    else:
        start = tiny_bundle(tie_embeddings=False)
        base = Train(tokens=200 * 4 * 32, batch=4)(start, tiny_context(start, tmp_path / "train"))
    bundle = coarse(base, tmp_path)
    before = weights(bundle)
    result = TuneScales(**SETTINGS)(bundle, tiny_context(bundle, tmp_path, teacher=base))
    assert equal(before, weights(bundle)), "a pass leaves its input as it was"
    after = weights(result)
    assert before.keys() == after.keys()
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.endswith(SCALES) or "norm" in name for name in moved)
    assert {n for n in after if n.endswith(SCALES)} <= moved
    table, head = result.model.get_input_embeddings(), result.model.get_output_embeddings()
    assert (table.quantized is head.quantized) == tied
    notes = result.notes
    assert notes["heldout_kl_after"] < 0.9 * notes["heldout_kl_before"]
    assert "fell" in notes["gain"]
    assert notes["curve"][-1][:2] == [24, SETTINGS["tokens"]]
    assert min(point[3] for point in notes["curve"]) == notes["heldout_kl_after"]
    assert all(isinstance(m, QuantizedLinear) for n, m in result.model.named_modules() if n.endswith("_proj"))


def test_the_kept_numbers_are_those_that_were_judged(trained, tmp_path):
    bundle = coarse(trained, tmp_path)
    context = tiny_context(bundle, tmp_path, teacher=trained)
    result = TuneScales(**SETTINGS)(bundle, context)
    again = TuneScales(**SETTINGS)(result, tiny_context(bundle, tmp_path / "again", teacher=trained))
    assert again.notes["heldout_kl_before"] == pytest.approx(result.notes["heldout_kl_after"], rel=1e-4)


def test_a_rate_that_ruins_is_no_gain_and_gives_the_start_back(trained, tmp_path):
    bundle = coarse(trained, tmp_path)
    step = TuneScales(**{**SETTINGS, "learning_rate": 1.0, "patience": 1})
    result = step(bundle, tiny_context(bundle, tmp_path, teacher=trained))
    assert equal(weights(bundle), weights(result))
    assert result.notes["gain"] == "no gain"
    assert result.notes["best_step"] == 0
    assert result.notes["steps"] < 24, "patience ends a run that does not gain"


def test_without_training_text_it_tunes_on_the_calibration_windows(trained, tmp_path):
    bundle = coarse(trained, tmp_path)
    context = tiny_context(bundle, tmp_path, teacher=trained)
    context.data = replace(context.data, train=context.data.train[:0])
    assert TuneScales(**SETTINGS)(bundle, context).notes["best_step"] > 0
    with pytest.raises(UserError, match="batch: 64 windows"):
        TuneScales(**{**SETTINGS, "batch": 64})(bundle, context)


def test_gpt2_has_biases_that_learn(tmp_path):
    base = tiny_bundle(family="gpt2")
    bundle = coarse(base, tmp_path)
    before = weights(bundle)
    result = TuneScales(**SETTINGS)(bundle, tiny_context(bundle, tmp_path, teacher=base))
    after = weights(result)
    assert any(n.endswith(".bias") and not torch.equal(before[n], after[n]) for n in after)


class _Killed(BaseException):
    """What no handler may swallow."""


def test_a_run_that_stopped_half_way_ends_with_the_same_bytes(trained, tmp_path, monkeypatch):
    bundle = coarse(trained, tmp_path)
    step = TuneScales(**{**SETTINGS, "checkpoint_seconds": 0})
    straight = step(bundle, tiny_context(bundle, tmp_path / "straight", teacher=trained))
    save, saved = checkpoint.save, []

    def save_and_die(*args):
        save(*args)
        saved.append(args[-1]["step"])
        if saved[-1] == 13:
            raise _Killed

    monkeypatch.setattr(checkpoint, "save", save_and_die)
    context = tiny_context(bundle, tmp_path / "killed", teacher=trained)
    with pytest.raises(_Killed):
        step(bundle, context)
    resumed = step(bundle, context)
    assert saved == list(range(1, 25)), "no step is done twice"
    files = []
    for name, result in (("straight", straight), ("resumed", resumed)):
        result.save(tmp_path / name / "artifact")
        files.append((tmp_path / name / "artifact" / "quantized.safetensors").read_bytes())
        assert result.notes["curve"] == straight.notes["curve"]
    assert files[0] == files[1]


def test_a_checkpoint_of_other_settings_is_ignored(trained, tmp_path):
    bundle = coarse(trained, tmp_path)
    context = tiny_context(bundle, tmp_path, teacher=trained)
    TuneScales(**{**SETTINGS, "checkpoint_seconds": 0})(bundle, context)
    assert (tmp_path / "tuning.safetensors").is_file()
    fresh = TuneScales(**{**SETTINGS, "learning_rate": 1e-3})
    left = fresh(bundle, context)
    right = fresh(bundle, tiny_context(bundle, tmp_path / "other", teacher=trained))
    assert equal(weights(left), weights(right))
    assert checkpoint.digest(left.model) == checkpoint.digest(right.model)


def test_a_vector_moves_in_proportion_to_its_elements_or_not_at_all(trained, tmp_path):
    bundle = coarse(trained, tmp_path)
    gains = bundle.model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        gains[:4] *= 1e-3  # the channels in which activations are largest have gains like these
    before = gains.detach().clone()
    for share in (0.0, 1.0):
        context = tiny_context(bundle, tmp_path / str(share), teacher=trained)
        result = TuneScales(**SETTINGS, vector_rate=share)(bundle, context)
        after = result.model.model.layers[0].input_layernorm.weight.detach()
        assert torch.equal(before, after) == (share == 0)
        reach = SETTINGS["learning_rate"] * 24 * before.abs().clamp(min=before.abs().mean() / 100)
        assert ((after - before).abs() <= 3 * reach).all()
        assert result.notes["vectors"] == (0 if share == 0 else 9 * 32)


@pytest.mark.parametrize(
    ("passes", "refused"),
    [
        (["quantize_round", "tune_blocks", "tune_scales"], None),
        (["tune_scales"], "tune_scales must come after a pass of the kind 'quantize'"),
        (["quantize_round", "tune_scales", {"prune_magnitude": {"sparsity": 0.5}}], "cannot come after"),
    ],
    ids=["in order", "nothing to tune", "pruned afterwards"],
)
def test_the_preflight_knows_its_place(passes, refused, recipe_dict):
    recipe = Recipe.parse({**recipe_dict, "variants": {"tuned": passes}})
    with pytest.raises(UserError, match=refused) if refused else nullcontext():
        check_order(recipe, "tuned")
