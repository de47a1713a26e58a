"""Recipes made small enough for a test: every pass and every variant stays, with less work in each."""

import copy
from pathlib import Path
from typing import Any

import torch

from compress.models.create import Architecture, create
from compress.text.documents import load_documents

SHAPE = Architecture(
    preset="1m", layers=3, hidden=64, heads=4, kv_heads=2, intermediate=256, vocab_size=320, context=512
)
DATA = {"window": 32, "evaluation_windows": 4, "calibration_windows": 8, "heldout_windows": 4}
# pass -> fields that decide how much work it is, not what it does
SMALL: dict[str, dict[str, Any]] = {
    "train": {"tokens": 512, "batch": 4},
    "distill": {"tokens": 512, "batch": 4},
    "prune_gradual": {"tokens": 512, "batch": 4},
    "tune_scales": {"tokens": 64, "batch": 2, "window": 32, "heldout_tokens": 64, "checks": 1},
    "tune_blocks": {"steps": 2, "heldout_windows": 2, "checks": 1},
    "quantize_auto": {"measured_windows": 1, "measured_tokens": 32, "moment_windows": 2},
    "prune_alps": {"steps": 20},
    "export_onnx": {"check_tokens": 64},
    "export_gguf": {"check_tokens": 64},
    "export_compressed_tensors": {"check_tokens": 64},
}
LABELLED = {"source": "stdlib:package", "train_rows": 40, "evaluation_rows": 20, "heldout_rows": 20}
BUDGET = 140_000  # bytes: as many for the tiny model as the recipe asks for a real one


def save_model(folder: Path, text: Path) -> Path:
    """A checkpoint in which every recipe finds heads, neurons and blocks to take."""
    model, tokenizer = create(SHAPE, load_documents(str(text)), seed=0)
    with torch.no_grad():
        for weight in model.parameters():  # at its small random start logits hardly differ
            if weight.dim() == 2:
                weight.mul_(4)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny(content: dict[str, Any], model: Path, text: Path) -> dict[str, Any]:
    """The recipe over this model and text, small."""
    content = copy.deepcopy(content)
    content.pop("measure", None)
    chains = [content.get("base") or [], *(content.get("variants") or {}).values()]
    for chain in chains:
        passes = chain["passes"] if isinstance(chain, dict) else chain
        for place, entry in enumerate(passes):
            (name, fields) = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
            fields = {**(fields or {}), **SMALL.get(name, {})}
            if fields.get("epochs"):
                fields["epochs"] = 0.1
            if fields.get("budget_bytes"):
                fields["budget_bytes"] = BUDGET
            passes[place] = {name: fields}
    given = {"threads": 1, "model": {"checkpoint": str(model)}, "data": {**DATA, "text": str(text)}}
    if "labelled" in (content.get("data") or {}):
        given["data"] |= {"labelled": LABELLED}
    return {"name": "tiny", **content, **given}
