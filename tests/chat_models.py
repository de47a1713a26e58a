"""Tiny chat models, their templates and chats, for the tests of chats."""

import json
import random
from pathlib import Path
from typing import Any

import torch
from training_set import documents

from compress.artifact.bundle import Bundle
from compress.models.create import Architecture, create
from compress.records.manifest import Lineage
from compress.text.labelled.base import Labelled, Row

# the answer ends with the token that ends texts; the line end after it is nobody's
PLAIN = (
    "{% for m in messages %}{{ m.role }}:\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ m.role }}:\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:\n{% endif %}"
)
SHAPE = Architecture(
    preset="1m", hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab_size=300, context=128
)
WORDS = "alpha beta gamma delta omega sigma".split()


def chat_bundle(template: str | None = PLAIN, seed: int = 0, **changes: Any) -> Bundle:
    """A Llama with a byte-level BPE and a template; weights far enough from nothing to be told apart."""
    model, tokenizer = create(SHAPE.model_copy(update=changes), documents(), seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(4)
    tokenizer.chat_template = template
    return Bundle(model, tokenizer, Lineage(source="tiny"))


def chat(draw: random.Random, turns: int = 1) -> list[dict[str, str]]:
    """What was asked is said again, the other way round."""
    found = []
    for _ in range(turns):
        words = draw.choices(WORDS, k=draw.randrange(2, 5))
        found.append({"role": "user", "content": f"turn {' '.join(words)}"})
        found.append({"role": "assistant", "content": " ".join(reversed(words))})
    return found


def chats(count: int = 40, seed: int = 0) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)
    return [chat(draw, draw.randrange(1, 3)) for _ in range(count)]


def row(messages: list[dict[str, str]]) -> Row:
    return Row("\n".join(m["content"] for m in messages), tuple((m["role"], m["content"]) for m in messages))


def labelled(count: int = 40) -> Labelled:
    rows = tuple(map(row, chats(count)))
    return Labelled("tiny", "chat", (), rows[: count - 16], rows[count - 16 : count - 8], rows[count - 8 :])


def write_chats(file: Path, count: int = 60) -> Path:
    file.write_text("\n".join(json.dumps({"messages": each}) for each in chats(count)), encoding="utf-8")
    return file
