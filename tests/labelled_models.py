"""Tiny classifiers and rows with labels for them."""

from typing import Any

import numpy as np
from encoder_models import ENCODERS, tiny_model

from compress.artifact.bundle import Bundle
from compress.text.labelled.base import Row

# head -> (kind of labels, names of them, problem type)
HEADS: dict[str, tuple[str, tuple[str, ...], str | None]] = {
    "class": ("SequenceClassification", ("a", "b", "c"), "single_label_classification"),
    "classes": ("SequenceClassification", ("a", "b", "c"), "multi_label_classification"),
    "number": ("SequenceClassification", ("LABEL_0",), "regression"),
    "tags": ("TokenClassification", ("B-x", "I-x", "O"), None),
}


def tiny_labeller(kind: str, family: str = "bert", seed: int = 0) -> Bundle:
    """A model with random weights far enough from nothing for a mix-up to be seen."""
    head, names, problem = HEADS[kind]
    own, changes = ENCODERS[family]
    labels = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    return tiny_model(own.replace("MaskedLM", head), seed, **changes, **labels, problem_type=problem)


def rows_for(kind: str, count: int = 60, seed: int = 0) -> list[Row]:
    """Texts of 3 to 11 words; the label follows from the first word (of tags, from each)."""
    rng = np.random.default_rng(seed)
    names = HEADS[kind][1]
    found = []
    for _ in range(count):
        numbers = rng.integers(50, 90, rng.integers(3, 12))  # of no special token is one the beginning
        words = tuple(f"w{n}" for n in numbers)
        first = int(numbers[0])
        label: Any = {
            "class": names[first % len(names)],
            "classes": tuple(name for place, name in enumerate(names) if first >> place & 1),
            "number": first / 90,
            "tags": tuple(names[n % len(names)] for n in numbers),
        }[kind]
        found.append(Row(" ".join(words), label, None, words if kind == "tags" else ()))
    return found
