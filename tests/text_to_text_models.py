"""Rows whose labels are texts, and tiny encoder-decoders for them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from seq2seq_models import tiny_seq2seq

from compress.artifact.bundle import Bundle
from compress.text.encode import encode
from compress.text.examples import Examples
from compress.text.labelled.base import Labelled, Row


def text_rows(count: int = 24, seed: int = 0) -> list[Row]:
    """Sources of 3 to 11 words; the target is one of four texts of 2 to 5 words, and follows from any.
    No word begins as a special token does, which would be found in it."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        first = int(rng.integers(4))
        numbers = 52 + first + 4 * rng.integers(0, 5, rng.integers(3, 12))
        target = " ".join(f"w{70 + 5 * first + n}" for n in range(2 + first))
        found.append(Row(" ".join(f"w{n}" for n in numbers), target))
    return found


def text_labels(count: int = 96) -> Labelled:
    """A half to learn from, and quarters to stop and to judge by."""
    rows = text_rows(count)
    half, quarter = count // 2, count // 4
    parts = (tuple(rows[:half]), tuple(rows[half : half + quarter]), tuple(rows[half + quarter :]))
    return Labelled("rows", "text", (), *parts)


def text_examples(bundle: Bundle, count: int = 24, seed: int = 0, longest: int = 64) -> Examples:
    return encode(text_rows(count, seed), "text", (), bundle.tokenizer, longest)


def write_rows(file: Path, rows: list[Row]) -> Path:
    """A .jsonl file with columns that are recognised."""
    lines = [json.dumps({"document": row.text, "summary": row.label}) for row in rows]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def forced(name: str, first: int | None = None) -> Bundle:
    """A tiny model whose texts begin with a token, where it is given."""
    bundle = tiny_seq2seq(name)
    config: Any = bundle.model.generation_config
    config.forced_bos_token_id = first
    return bundle
