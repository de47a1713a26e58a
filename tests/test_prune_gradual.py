"""Gradual pruning: the schedule, the masks on the way, and what it gains over pruning at once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from training_set import WINDOW, equal, tiny_bundle, tiny_context, weights

from compress.errors import UserError
from compress.passes.distill import Distill
from compress.passes.prune_gradual import PruneGradual
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.train import Train
from compress.run.preflight import check_order
from compress.run.recipe import Recipe
from compress.solvers import gradual
from compress.training import checkpoint

FEW = {"tokens": 10 * 4 * WINDOW, "batch": 4, "heldout_points": 2, "every": 2}


@given(seed=st.integers(0, 10**6), pattern=st.sampled_from([None, (2, 4), (1, 4), (4, 8)]))
def test_masks_only_shrink_and_end_at_exactly_the_share(seed, pattern):
    generator = torch.Generator().manual_seed(seed)
    names = {"a": (6, 8), "b": (3, 16)}
    final = 0.7 if pattern is None else 1 - pattern[0] / pattern[1]
    kept = {n: torch.ones(s, dtype=torch.bool) for n, s in names.items()}
    together = dict(kept)
    for step in range(6):
        # the weights move between updates, but what is gone is zero
        scores = {n: torch.rand(s, generator=generator) * kept[n] for n, s in names.items()}
        share = gradual.sparsity_at(step, 0, 5, 0.0, final)
        if pattern is None:
            new = gradual.shrink_each(scores, kept, share)
            both = gradual.shrink_all({n: scores[n] * together[n] for n in names}, together, share)
            assert sum(int((~m).sum()) for m in both.values()) == round(share * 96)
            assert all((together[n] | ~both[n]).all() for n in names)
            together = both
        else:
            new = gradual.shrink_to_pattern(scores, kept, share / final, *pattern)
        assert all((kept[n] | ~new[n]).all() for n in names), "what is gone stays gone"
        kept = new
    for name, mask in kept.items():
        assert int((~mask).sum()) == round(final * mask.numel()), name
        if pattern is not None:
            assert (mask.view(-1, pattern[1]).sum(1) == pattern[0]).all()


def test_the_schedule_is_the_papers():
    shares = [gradual.sparsity_at(t, 2, 12, 0.1, 0.9) for t in range(15)]
    assert shares[:3] == [0.1, 0.1, 0.1]
    assert shares[7] == pytest.approx(0.9 + (0.1 - 0.9) * 0.5**3)
    assert shares[12:] == [0.9, 0.9, 0.9]
    assert all(a <= b for a, b in pairwise(shares))


@pytest.mark.parametrize(
    "fields",
    [{"sparsity": 0.75}, {"sparsity": 0.6, "scope": "model"}, {"pattern": "2:4"}, {"family": "gpt2"}],
)
def test_the_final_sparsity_is_exact_and_the_masks_travel(fields, tmp_path):
    fields = dict(fields)
    bundle = tiny_bundle(family=fields.pop("family", "llama"))
    already = PruneMagnitude(sparsity=0.2, select=("*mlp*",))(bundle, tiny_context(bundle, tmp_path / "p"))
    step = PruneGradual(**FEW, **fields, optimizer="muon")
    result = step(already, tiny_context(bundle, tmp_path / "g"))
    wanted = fields.get("sparsity", 0.8)
    assert result.notes["removed"] == sum(int((~m).sum()) for m in result.masks.values())
    if "pattern" not in fields:
        assert result.notes["sparsity"] == pytest.approx(wanted, abs=1e-3)
    for name, mask in result.masks.items():
        assert torch.equal(result.model.get_submodule(name).weight != 0, mask), name
        if name in already.masks:
            assert not (mask & ~already.masks[name]).any()
        if "pattern" in fields:
            assert (mask.view(-1, 4).sum(1) <= 2).all()
        elif fields.get("scope") != "model":
            assert int((~mask).sum()) == round(wanted * mask.numel())


def test_gradually_beats_at_once_on_the_same_tokens(tmp_path):
    base = tiny_bundle()
    settings = {"batch": 4, "heldout_points": 1}
    trained = Train(tokens=120 * 4 * WINDOW, **settings)(base, tiny_context(base, tmp_path / "base"))
    same = {**settings, "tokens": 60 * 4 * WINDOW, "learning_rate": 2e-3, "muon_learning_rate": 0.01}
    context = tiny_context(base, tmp_path / "once", trained)
    at_once = Distill(**same)(PruneMagnitude(sparsity=0.9)(trained, context), context)
    step = PruneGradual(**same, sparsity=0.9, every=3)
    slowly = step(trained, tiny_context(base, tmp_path / "slowly", trained))
    assert slowly.notes["heldout_after"] < at_once.notes["heldout_after"]


@pytest.mark.parametrize("towards", ["text", "teacher"])
def test_interrupted_it_ends_with_the_same_bytes(towards, tmp_path, monkeypatch):
    bundle = tiny_bundle()
    step = PruneGradual(**FEW, towards=towards, checkpoint_seconds=0.0, patience=9, average="ema")
    whole = step(bundle, tiny_context(bundle, tmp_path / "whole"))
    save, calls = checkpoint.save, []

    def interrupted(*arguments):
        save(*arguments)
        calls.append(arguments[3]["step"])
        if len(calls) in (3, 6, 9):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save", interrupted)
    for _ in range(4):
        try:
            result = step(bundle, tiny_context(bundle, tmp_path / "cut"))
            break
        except KeyboardInterrupt:
            continue
    assert equal(weights(whole), weights(result))
    assert all(torch.equal(whole.masks[n], result.masks[n]) for n in whole.masks)
    kept = int(whole.notes["kept"].rpartition(" ")[2])
    assert kept > 7, "weights of before the last update are not what was asked for"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begin": 0.8}, "begin: 0.8 is not before end"),
        ({"pattern": "4:4"}, "'4:4' removes nothing"),
        ({"pattern": "2:4", "scope": "model"}, "'2:4' holds in every group of columns, scope: model"),
        ({"initial": 0.9}, "initial: 0.9 is above the final sparsity 0.8"),
        ({"towards": "text", "hidden": 1.0}, "hidden: is for a teacher, and towards: text has none"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        PruneGradual(**fields)


def test_a_base_cannot_learn_from_itself(recipe_dict):
    recipe_dict["base"].append({"prune_gradual": {"tokens": 256}})
    with pytest.raises(UserError, match="base: prune_gradual learns from the finished base"):
        check_order(Recipe.parse(recipe_dict), "base")
    recipe_dict["base"][-1] = {"prune_gradual": {"tokens": 256, "towards": "text"}}
    recipe_dict["base"].append({"distill": {"tokens": 256, "teachers": [{"model": "elsewhere"}]}})
    check_order(Recipe.parse(recipe_dict), "base")
