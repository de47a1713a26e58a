"""The records of two real tiny runs that are judged by labels, of texts and of words; made once, by the
command line.

Every text has a tag that a browser would run, so that whatever of the texts is shown tells whether it is
escaped.
"""

import csv
import random
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from cli_helpers import Outcome, invoke
from report_records import Records
from tokenizers import BertWordPieceTokenizer

from compress import api
from compress.models.checkpoints import quiet_transformers

HOSTILE = "<script>alert('x')</script>"
TOPICS = {
    "card": "card pin chip limit lost",
    "cash": "cash note coin machine change",
    "rate": "rate euro dollar exchange fee",
}
_FILLER = "please tell me what is the best way to do this with my own and why".split()
FINETUNE = {"finetune": {"epochs": 8, "learning_rate": 4e-3, "batch": 16}}
PRUNE = {"prune_magnitude": {"sparsity": 0.8}}
MEASURE = {"prefill_tokens": 16, "rounds": 1, "timing_seconds": 20, "encoder_seconds": 0}


def texts(rows: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label): a word of the label's own among others, in one text of five of another label."""
    source = random.Random(seed)
    found = []
    for number in range(rows):
        label = list(TOPICS)[number % 3]
        told = source.choice(list(TOPICS)) if source.random() < 0.2 else label
        words = [*source.sample(_FILLER, source.randint(4, 8)), source.choice(TOPICS[told].split())]
        source.shuffle(words)
        found.append((f"{' '.join(words)} {number} {HOSTILE}", label))
    return found


def write_texts(file: Path, rows: int = 300) -> Path:
    """A table with a heading."""
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened).writerows([("text", "label"), *texts(rows)])
    return file


def write_words(file: Path, rows: int = 200) -> Path:
    """A CoNLL file: the topics' words are spans of their topic, one or two words long."""
    source, lines = random.Random(1), []
    for number in range(rows):
        topic = list(TOPICS)[number % 3]
        words = [(word, "O") for word in [*source.sample(_FILLER, 5), str(number), HOSTILE]]
        place = source.randint(0, len(words))
        own = source.sample(TOPICS[topic].split(), source.randint(1, 2))
        words[place:place] = [(word, f"{'I' if at else 'B'}-{topic}") for at, word in enumerate(own)]
        lines.append("\n".join(f"{word}\t{tag}" for word, tag in words))
    file.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    return file


def recipe(folder: Path, name: str, rows: Path, **changes: Any) -> Path:
    """A base that learns the labels and is exported, and a variant that loses something in two steps."""
    said = {
        "name": name,
        "threads": 1,
        "model": {"checkpoint": str(folder / "encoder")},
        "data": {"labelled": {"source": str(rows)}, "window": 16, "calibration_windows": 8},
        "base": [FINETUNE, "export_onnx"],
        "variants": {"small": [PRUNE, {"quantize_round": {"format": "int4"}}, "export_onnx"]},
        "measure": MEASURE,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**said, **changes}, sort_keys=False), encoding="utf-8")
    return path


def make(folder: Path) -> None:
    """Both runs, and what the command line printed of them."""
    write_model(folder)
    rows = write_words(folder / "words.conll")
    words = recipe(folder, "words", rows, base=[FINETUNE], variants={"small": [PRUNE]})
    for path in (recipe(folder, "topics", write_texts(folder / "topics.csv")), words):
        outcome = run(folder, path)
        assert outcome.code == 0, outcome.err
        path.with_suffix(".out").write_text(outcome.out, encoding="utf-8")


def write_model(folder: Path) -> None:
    """An encoder that can learn, and a tokenizer whose vocabulary is no trainer's luck."""
    words = sorted({*" ".join(TOPICS.values()).split(), *_FILLER, *"<>/()'", "script", "alert", "x"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    pieces += [f"{begin}{digit}" for begin in ("", "##") for digit in range(10)]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    config = transformers.BertConfig(
        vocab_size=len(pieces), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    with quiet_transformers():
        transformers.BertForMaskedLM(config).save_pretrained(folder / "encoder")
    cut = BertWordPieceTokenizer(vocab=vocabulary)._tokenizer
    transformers.BertTokenizerFast(tokenizer_object=cut).save_pretrained(folder / "encoder")


def run(folder: Path, path: Path) -> Outcome:
    """`compress-lm run` of a recipe into a folder of its name."""
    return invoke("run", path, "--output", folder / path.stem)


def load(folder: Path, name: str) -> Records:
    """What a run left."""
    return Records(*api.load_run(folder / name))
