"""Trains the same models whatever the number of processes; the main one writes what came out."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_set import WINDOW, tiny_bundle, tiny_context

from compress.host.processes import is_main, part
from compress.passes.distill import Distill
from compress.passes.prune_gradual import PruneGradual
from compress.passes.train import Train
from compress.training import checkpoint

COMMON = {"tokens": 8 * 4 * WINDOW, "batch": 4, "heldout_points": 4}
WIDE = {"hidden": 64, "heads": 4, "kv_heads": 2}
RUNS = {
    "train": (Train(**COMMON, average="ema", optimizer="adamw"), {}, False),
    "micro": (Train(**{**COMMON, "batch": 2}, accumulate=2), {}, False),
    "bfloat16": (Train(**COMMON, precision="bfloat16"), {}, False),
    "sharded-bfloat16": (Train(**COMMON, precision="bfloat16"), {}, True),
    "distill": (Distill(**COMMON, hidden=1.0, relations=1.0, fade=1.0), WIDE, False),
    "cached": (Distill(**COMMON, targets="cached"), {}, False),
    # SGD: what Muon makes of float error in a gradient would decide which weights are pruned
    "sharded": (
        PruneGradual(**COMMON, every=2, average="ema", patience=9, sparsity=0.5, optimizer="sgd"),
        {},
        True,
    ),
    "sharded-micro": (Train(**{**COMMON, "batch": 2}, accumulate=2, optimizer="sgd", clip=0.5), {}, True),
    "sharded-resumed": (Train(**COMMON, average="tail", checkpoint_seconds=0.0), {}, True),
    "sharded-transposed": (PruneGradual(**COMMON, every=2, sparsity=0.5, optimizer="sgd"), {}, True),
}
FAMILIES = {"sharded-transposed": "gpt2"}


def train(folder: Path) -> None:
    """All of them, each into a file of weights and one of notes."""
    save = checkpoint.save
    for name, (step, teacher, sharded) in RUNS.items():
        os.environ["ACCELERATE_USE_FSDP"] = str(sharded).lower()
        bundle = tiny_bundle(family=FAMILIES.get(name, "llama"))
        context = tiny_context(bundle, folder / name, tiny_bundle(seed=3, **teacher))
        if name == "sharded-resumed":
            checkpoint.save = _stopping(save)
            try:
                step(bundle, context)
            except KeyboardInterrupt:
                checkpoint.save = save
        result = step(bundle, context)
        if is_main():
            weights = {n: p.detach().contiguous() for n, p in result.model.named_parameters()}
            save_file(weights, folder / f"{name}.safetensors")
            (folder / f"{name}.json").write_text(json.dumps(result.notes))


def _stopping(save):
    def stopping(*arguments):
        save(*arguments)
        if arguments[3]["step"] == 5:
            raise KeyboardInterrupt

    return stopping


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
    part()
