"""A model of a few thousand parameters and text with structure, for the tests of training."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.models.create import Architecture, create
from compress.records.manifest import Lineage
from compress.text.documents import Document
from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.encoded import LabelledData, encoded
from compress.text.windows import TextData, Windows, digest

WINDOW = 32
TINY = Architecture(
    preset="1m", hidden=32, layers=4, heads=2, kv_heads=1, intermediate=64, vocab_size=300, context=64
)


def documents(count: int = 40, seed: int = 0) -> list[Document]:
    generator = random.Random(seed)
    words = ["alpha", "beta", "gamma", "delta", "omega", "sigma"]
    texts = []
    for _ in range(count):
        lines = [
            f"def {generator.choice(words)}(x): return x + {generator.randrange(10)}\n" for _ in range(20)
        ]
        texts.append("".join(lines))
    return [Document(f"d{i}", text) for i, text in enumerate(texts)]


def tiny_bundle(seed: int = 0, **changes: Any) -> Bundle:
    model, tokenizer = create(TINY.model_copy(update=changes), documents(), seed)
    return Bundle(model, tokenizer, Lineage(source="tiny"))


def tiny_context(bundle: Bundle, workdir: Path, teacher: Bundle | None = None, seed: int = 1) -> Context:
    ids = bundle.tokenizer([d.text for d in documents()], verbose=False)["input_ids"]
    stream = np.array([t for document in ids for t in [*document, 0]], dtype=np.int32)
    parts = [stream[i * 8 * WINDOW : (i + 1) * 8 * WINDOW].reshape(8, WINDOW) for i in range(3)]
    windows = [Windows(p, 8 * WINDOW, digest(p)) for p in parts]
    train = stream[3 * 8 * WINDOW :]
    return Context(
        data=TextData("tiny", WINDOW, train, digest(train), *windows, labelled=tiny_labels(bundle)),
        teacher=lambda: teacher or bundle,
        seed=seed,
        workdir=workdir,
        device=torch.device("cpu"),
        threads=1,
        precision="float32",
    )


def tiny_labels(bundle: Bundle) -> LabelledData:
    """Lines with the function that they define as their label."""
    lines = [line for document in documents(4) for line in document.text.splitlines()]
    rows = tuple(Row(line, line.split("(")[0].removeprefix("def ")) for line in lines)
    names = tuple(sorted({str(row.label) for row in rows}))
    labelled = Labelled("tiny", "class", names, rows[:60], rows[60:70], rows[70:])
    return encoded(labelled, names, bundle.tokenizer, TINY.context)


def weights(bundle: Bundle) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}


def equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)
