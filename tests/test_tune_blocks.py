"""Block tuning: signed descent beats plain rounding, never worsens a block, and moves a code by one step."""

import pytest
import torch
from training_set import equal, tiny_bundle, tiny_context, weights
from transformers import BertConfig, BertForMaskedLM

from compress.artifact.bundle import Bundle
from compress.errors import UserError
from compress.formats import Int4, QuantizedTensor
from compress.formats.registry import format_from
from compress.passes.prune_magnitude import PruneMagnitude
from compress.passes.quantize_round import QuantizeRound
from compress.passes.student import Student
from compress.passes.train import Train
from compress.passes.tune_blocks import TuneBlocks
from compress.passes.tune_scales import TuneScales
from compress.records.manifest import Lineage
from compress.solvers.block_tuning import descend, positions, tuned_codes
from compress.tasks.masked import MASKED

SETTINGS = {"steps": 24, "batch": 2, "heldout_windows": 2}
COARSE = Int4(group=None, clip_search=0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Bundle:
    bundle = tiny_bundle()
    return Train(tokens=200 * 4 * 32, batch=4)(bundle, tiny_context(bundle, tmp_path_factory.mktemp("train")))


def rounded(bundle: Bundle, folder, format=COARSE) -> Bundle:
    return QuantizeRound(format=format, embeddings=None)(bundle, tiny_context(bundle, folder))


@pytest.mark.parametrize("kind", ["int2", "int3", "int4"])
def test_signed_descent_beats_rounding_on_inputs_no_step_has_seen(kind):
    """SignRound's claim, on one layer with correlated inputs."""
    torch.manual_seed(0)
    format = format_from({"kind": kind, "group": None})
    mix = torch.randn(32, 32) + 2 * torch.randn(32, 1)
    x, unseen = torch.randn(2, 512, 32) @ mix
    weight = torch.randn(48, 32)
    held = QuantizedTensor.round(format, weight)
    start = positions(format.places(weight, held.grid), held.unpacked())
    offset = torch.zeros_like(weight, requires_grad=True)

    def error(inputs):
        codes = tuned_codes(start, offset, format.levels)
        return ((inputs @ ((codes - held.grid.zeros) * held.grid.scales - weight).T) ** 2).mean()

    with torch.no_grad():
        assert torch.equal(tuned_codes(start, offset, format.levels), held.unpacked().float())
    outcome = descend(
        [offset], [0.5], [1 / 100], lambda _: error(x), lambda: float(error(unseen).detach()), 100
    )
    assert outcome.after < 0.7 * outcome.before
    assert float(error(unseen).detach()) == outcome.after, "the parameters are at the point that was judged"
    assert offset.abs().max() <= 0.5
    moved = tuned_codes(start, offset, format.levels).detach() - held.unpacked()
    assert set(moved.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert moved.any()


def test_the_best_judged_point_wins_and_the_start_is_one():
    p = torch.zeros(3, requires_grad=True)
    outcome = descend([p], [1.0], [0.5], lambda _: -p.sum(), lambda: float(p.detach().sum()), 4)
    assert outcome.before == outcome.after == 0.0
    assert torch.equal(p.detach(), torch.zeros(3))


def test_bounds_hold_and_zero_fixes():
    p = torch.zeros(3, requires_grad=True)
    bounds = torch.tensor([0.5, 0.0, 0.5])
    descend([p], [bounds], [0.5], lambda _: -p.sum(), lambda: -float(p.detach().sum()), 8)
    assert p.tolist() == [0.5, 0.0, 0.5]


def test_blocks_gain_and_embeddings_and_zero_points_stay(trained, tmp_path):
    bundle = rounded(trained, tmp_path)
    before = weights(bundle)
    result = TuneBlocks(**SETTINGS)(bundle, tiny_context(bundle, tmp_path, teacher=trained))
    assert equal(before, weights(bundle)), "a pass leaves its input as it was"
    after = weights(result)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.rpartition(".")[2] for name in changed} <= {"codes", "scales"}
    notes = result.notes
    assert len(notes["heldout_error_fall_per_block"]) == 4
    assert all(fall >= 0 for fall in notes["heldout_error_fall_per_block"])
    assert notes["heldout_error_fall"] > 0.1
    assert 0 < notes["codes_moved"] < 0.5


def test_a_perfect_start_stays(trained, tmp_path):
    bundle = rounded(trained, tmp_path)
    result = TuneBlocks(**SETTINGS)(bundle, tiny_context(bundle, tmp_path, teacher=bundle))
    assert result.notes["gain"] == "no gain"
    assert equal(weights(bundle), weights(result))


def test_pruned_weights_stay_zero(trained, tmp_path):
    pruned = PruneMagnitude(pattern="2:4")(trained, tiny_context(trained, tmp_path))
    bundle = rounded(pruned, tmp_path)
    result = TuneBlocks(**SETTINGS)(bundle, tiny_context(bundle, tmp_path, teacher=trained))
    assert result.notes["codes_moved"] > 0
    for name, mask in pruned.masks.items():
        assert (result.model.get_submodule(name).weight[~mask] == 0).all()


def test_a_run_that_stopped_half_way_ends_with_the_same_bytes(trained, tmp_path, monkeypatch):
    from compress.passes import tune_blocks

    bundle = rounded(trained, tmp_path)
    step = TuneBlocks(**SETTINGS)
    straight = step(bundle, tiny_context(bundle, tmp_path / "straight", teacher=trained))
    context = tiny_context(bundle, tmp_path / "killed", teacher=trained)
    tuned = []

    def counting(*args, **kwargs):
        tuned.append(1)
        if len(tuned) == 3:
            raise KeyboardInterrupt
        return descend(*args, **kwargs)

    monkeypatch.setattr(tune_blocks, "descend", counting)
    with pytest.raises(KeyboardInterrupt):
        step(bundle, context)
    resumed = step(bundle, context)
    assert len(tuned) == 3 + 2, "finished blocks are not tuned again"
    assert equal(weights(straight), weights(resumed))
    assert straight.notes == resumed.notes


def test_an_original_of_another_shape_is_refused(trained, tmp_path):
    fewer = rounded(Student(blocks=2)(trained, tiny_context(trained, tmp_path)), tmp_path)
    with pytest.raises(UserError, match="4 blocks are not of the same shape as this model's 2"):
        TuneBlocks(**SETTINGS)(fewer, tiny_context(fewer, tmp_path, teacher=trained))


def test_too_few_windows_are_refused(trained, tmp_path):
    bundle = rounded(trained, tmp_path)
    step = TuneBlocks(heldout_windows=8)
    with pytest.raises(UserError, match="heldout_windows: 8 and a batch of 1 need more than the 8"):
        step(bundle, tiny_context(bundle, tmp_path, teacher=trained))


def test_gpt2_blocks_are_tuned_too(tmp_path):
    base = tiny_bundle(family="gpt2")
    bundle = rounded(base, tmp_path)
    result = TuneBlocks(**SETTINGS)(bundle, tiny_context(bundle, tmp_path, teacher=base))
    assert result.notes["heldout_error_fall"] > 0


def test_encoder_blocks_are_tuned_too_but_not_end_to_end(trained, tmp_path):
    config = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        architectures=["BertForMaskedLM"],
    )  # fmt: skip
    torch.manual_seed(0)
    base = Bundle(BertForMaskedLM(config).eval(), trained.tokenizer, Lineage(source="tiny"))
    bundle = rounded(base, tmp_path)
    context = tiny_context(bundle, tmp_path, teacher=base)
    assert TuneBlocks(**SETTINGS)(bundle, context).notes["heldout_error_fall"] > 0
    assert not TuneScales.takes(MASKED), "which has no next-token distribution"
