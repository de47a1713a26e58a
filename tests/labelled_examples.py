"""Small labelled data of every kind that is learnt, for the tests of fine-tuning."""

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from export_models import word_tokenizer
from training_set import tiny_context
from transformers import BertConfig, BertForMaskedLM

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.records.manifest import Lineage
from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.encoded import LabelledData, encoded

WORDS = [f"w{i}" for i in range(50, 97)]  # one token each


def encoder(seed: int = 0, blocks: int = 2) -> Bundle:
    """A random BERT that fills in masks, with dropout."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=blocks, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64, pad_token_id=3,
    )  # fmt: skip
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    tokenizer = word_tokenizer(mask_token="w4", pad_token="w3")
    tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
    return Bundle(model, tokenizer, Lineage(source="tiny"))


def row(kind: str, draw: random.Random) -> Row:
    words = tuple(draw.choice(WORDS) for _ in range(draw.randrange(3, 9)))
    text, first = " ".join(words), int(words[0][1:]) < 70
    if kind == "tags":
        return Row(text, tuple("B-x" if int(w[1:]) < 70 else "O" for w in words), None, words)
    if kind == "pairs":
        return Row(text, "yes" if first else "no", " ".join(draw.choices(WORDS, k=4)))
    label: Any = {
        "class": "yes" if first else "no",
        "classes": ("yes",) if first else (),
        "number": float(first),
    }
    return Row(text, label[kind])


def labelled(
    bundle: Bundle, kind: str = "class", rows: int = 40, heldout: int = 8, seed: int = 0
) -> LabelledData:
    """Rows whose label the first word decides, or each word's its own."""
    draw = random.Random(seed)
    found = tuple(row(kind, draw) for _ in range(rows + heldout + 8))
    names = {"number": (), "classes": ("yes",), "tags": ("B-x", "O")}.get(kind, ("no", "yes"))
    parts = found[:rows], found[rows : rows + heldout], found[rows + heldout :]
    given = Labelled("tiny", "class" if kind == "pairs" else kind, names, *parts)  # type: ignore[arg-type]
    return encoded(given, names, bundle.tokenizer, 64)


def context_of(bundle: Bundle, folder: Path, data: LabelledData, seed: int = 1) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    context = tiny_context(_text(), folder, seed=seed)
    return replace(context, data=replace(context.data, labelled=data))


def _text() -> Bundle:
    from training_set import tiny_bundle

    return tiny_bundle()
