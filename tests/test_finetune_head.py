"""A head for labels on a body that was pruned without it: zeros stay, and what is left behind is told."""

import torch
from encoder_models import tiny_encoder
from labelled_models import HEADS, rows_for

from compress.passes.finetune import Finetune
from compress.passes.prune_magnitude import PruneMagnitude
from compress.text.labelled.base import Labelled


def test_masks_follow_the_body_under_its_new_head():
    rows = tuple(rows_for("class"))
    labels = Labelled("tiny", "class", HEADS["class"][1], rows[:40], rows[40:50], rows[50:])
    pruned = tiny_encoder("embedding").apply(PruneMagnitude(sparsity=0.5), labelled=labels)
    pruned = pruned.evolve(companions={"modules.json": b"[]"})
    tuned = pruned.apply(Finetune(epochs=1), labelled=labels)
    assert {f"bert.{name}" for name in pruned.masks} == set(tuned.masks)
    for name, kept in tuned.masks.items():
        weight = tuned.model.get_submodule(name).weight
        assert torch.equal(kept, pruned.masks[name.removeprefix("bert.")])
        assert not weight[~kept].any()
    assert (tuned.notes["head"], tuned.notes["left_behind"]) == ("new", ["modules.json"])
