"""Pairs of tiny texts that belong together, and encoders that embed them."""

import json
import random
from pathlib import Path
from typing import Any

from encoder_models import tiny_encoder

from compress.artifact.bundle import Bundle
from compress.text.labelled.base import Labelled, Row

PROMPTS = '{"prompts": {"query": "find: "}, "default_prompt_name": null}'


def pairs(count: int = 140, seed: int = 0) -> tuple[Row, ...]:
    """The second text says the first one's words in another language, w50 to w69 and w70 to w89."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words = draw.sample(range(50, 70), 4)
        other = draw.sample([n + 20 for n in words], 4)
        found.append(Row(" ".join(f"w{n}" for n in words), "", " ".join(f"w{n}" for n in other)))
    return tuple(found)


def numbers(count: int = 100, seed: int = 0) -> tuple[Row, ...]:
    """Two texts of four words, in two languages as above, with the number of those that say the same, and a
    half."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        words, shared = draw.sample(range(50, 70), 8), draw.randrange(5)
        one, other = words[:4], words[4 - shared : 8 - shared]
        texts = (" ".join(f"w{n}" for n in numbers) for numbers in (one, [n + 20 for n in other]))
        first, second = texts
        found.append(Row(first, shared + 0.5, second))
    return tuple(found)


def passages(queries: int = 12, seed: int = 0, label: Any = float) -> tuple[Row, ...]:
    """Queries with four passages, one of which repeats the query's word."""
    draw = random.Random(seed)
    found = []
    for query in range(queries):
        for place in range(4):
            word = f"w{50 + query}" if not place else f"w{draw.randrange(70, 90)}"
            text = " ".join([word, *(f"w{draw.randrange(70, 90)}" for _ in range(3))])
            found.append(Row(f"w{50 + query} w9{query % 7}", label(not place), text))
    return tuple(found)


def labelled(rows: tuple[Row, ...], kind: str, train: int = 0, heldout: int = 20) -> Labelled:
    train = train or len(rows) - 2 * heldout
    parts = rows[:train], rows[train : train + heldout], rows[train + heldout :]
    return Labelled("tiny", kind, (), *parts)  # type: ignore[arg-type]


def sentence_encoder(folder: Path, pooling: str = "mean", longest: int = 64) -> Path:
    """A tiny encoder with sentence-transformers' files beside it."""
    tiny_encoder("embedding").save(folder)
    (folder / "manifest.json").unlink()  # somebody else's
    steps = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(steps)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text(PROMPTS)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))
    (folder / "1_Pooling").mkdir()
    (folder / "2_Normalize").mkdir()
    flags = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken"}
    settings = {f"pooling_mode_{flag}": name == pooling for name, flag in flags.items()}
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, **settings})
    )
    return folder


def bundle(folder: Path, pooling: str = "mean") -> Bundle:
    return Bundle.load(sentence_encoder(folder, pooling))
