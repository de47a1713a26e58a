"""Tiny classifiers and taggers with labelled texts, for the tests of what learns labels."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from export_models import VOCABULARY, word_tokenizer
from training_set import tiny_context

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.records.manifest import Lineage
from compress.tasks.base import UNKNOWN, Example
from compress.text.examples import Examples
from compress.text.labelled.encoded import LabelledData

LABELS = {"class": 4, "classes": 3, "number": 1, "tags": 3}
_PROBLEMS = {
    "class": "single_label_classification",
    "classes": "multi_label_classification",
    "number": "regression",
    "tags": None,
}
_FAMILIES = {"bert": "Bert", "distilbert": "DistilBert", "modernbert": "ModernBert", "roberta": "Roberta"}


def tiny_classifier(
    kind: str, family: str = "bert", blocks: int = 2, seed: int = 0, width: int = 32
) -> Bundle:
    """A model with a random head for labels of a kind."""
    head = "TokenClassification" if kind == "tags" else "SequenceClassification"
    return tiny_body(f"{_FAMILIES[family]}For{head}", kind, blocks, seed)


def tiny_body(name: str, kind: str | None = None, blocks: int = 2, seed: int = 0, width: int = 32) -> Bundle:
    """A model of a class of `transformers`, with random weights far enough from nothing."""
    model_class: Any = getattr(transformers, name)
    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": 2 * width,
        "num_hidden_layers": blocks, "num_attention_heads": 4, "max_position_embeddings": 64,
        "pad_token_id": 3, "bos_token_id": 0, "eos_token_id": 1, "cls_token_id": 0, "sep_token_id": 1,
    }  # fmt: skip
    if name.startswith("DistilBert"):
        sizes |= {"dim": width, "hidden_dim": 2 * width, "n_layers": blocks, "n_heads": 4}
    if name.startswith("ModernBert"):
        sizes |= {"local_attention": 8, "layer_types": ["full_attention", "sliding_attention"] * blocks}
        sizes["layer_types"] = sizes["layer_types"][:blocks]
    config = model_class.config_class(**sizes)
    config.architectures = [name]
    if kind is not None:
        config.id2label = {number: f"l{number}" for number in range(LABELS[kind])}
        config.label2id = {label: number for number, label in config.id2label.items()}
        config.problem_type = _PROBLEMS[kind]
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokenizer = word_tokenizer(mask_token="w4", pad_token="w3")
    return Bundle(model, tokenizer, Lineage(source="tiny"))


def labelled_examples(kind: str, count: int = 96, seed: int = 0) -> Examples:
    """Texts of 5 to 12 tokens whose labels follow from their tokens."""
    draw = random.Random(seed)
    items = []
    for _ in range(count):
        label = draw.randrange(4)
        words = [10 + 10 * label + draw.randrange(10) for _ in range(draw.randrange(3, 11))]
        ids = np.array([0, *words, 1], dtype=np.int32)
        if kind == "class":
            targets = np.array([label])
        elif kind == "classes":
            targets = np.array([label & 1, label >> 1, int(label > 2)])
        elif kind == "number":
            targets = np.array([0.5 * label])
        else:  # every other word carries one
            own = [word % 3 if place % 2 else UNKNOWN for place, word in enumerate(words)]
            targets = np.array([UNKNOWN, *own, UNKNOWN])
        items.append(Example(ids, targets))
    items.sort(key=lambda item: len(item.ids))
    names = () if kind == "number" else tuple(f"l{number}" for number in range(LABELS[kind]))
    return Examples(kind, names, tuple(items))


def labelled_context(
    kind: str | None, workdir: Path, teacher: Bundle, *, plain: bool = True, seed: int = 1
) -> Context:
    """Labelled texts, and plain text of the same tokens."""
    from training_set import tiny_bundle

    context = tiny_context(tiny_bundle(), workdir, teacher, seed)
    data = context.data
    windows = {
        name: replace(getattr(data, name), tokens=getattr(data, name).tokens % (VOCABULARY - 10) + 10)
        for name in ("heldout", "calibration", "evaluation")
    }
    labelled = None
    if kind is not None:
        parts = [labelled_examples(kind, count, number) for number, count in enumerate((96, 32, 32))]
        labelled = LabelledData("labels" if plain else data.source, *parts)
    train = (data.train % (VOCABULARY - 10) + 10).astype(np.int32)
    changed = replace(data, train=train, begin=(0,), end=(1,), labelled=labelled, **windows)
    return replace(context, data=changed)
