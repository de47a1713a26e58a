"""Tiny models that find answers, and questions for them whose answers a model can learn to find.

A context names one colour and one number among other words, or only one of both; the question is for one.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import BertWordPieceTokenizer

from compress.artifact.bundle import Bundle
from compress.models.checkpoints import quiet_transformers
from compress.records.manifest import Lineage
from compress.text.encode import encode
from compress.text.examples import Examples
from compress.text.labelled.base import Labelled, Row
from compress.text.labelled.encoded import LabelledData, encoded

COLOURS = "dark red|green|light blue|white|old gold".split("|")
NUMBERS = "seven|twenty two|nine|four|one hundred".split("|")
FILLER = "lamp door stone river cup boat tree chair the a and near with on of house bread".split()
ASKED = {"which colour is it?": COLOURS, "how many are there?": NUMBERS}
CONTEXT = 64
_SIZES: dict[str, dict[str, Any]] = {
    "Bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64},
    "Roberta": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "type_vocab_size": 1,
    },
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "ModernBert": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3,
    },
}  # fmt: skip


def pieces(types: bool = True) -> Any:
    """A WordPiece tokenizer as BERT has it; single letters for what it does not know."""
    words = sorted({*" ".join([*ASKED, *COLOURS, *NUMBERS, *FILLER]).replace("?", " ?").split()} | {".", ","})
    letters = [
        f"{begin}{letter}" for begin in ("", "##") for letter in "abcdefghijklmnopqrstuvwxyz0123456789"
    ]
    known = [
        *["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
        *words,
        *(one for one in letters if one not in words),
    ]
    cut = BertWordPieceTokenizer(vocab={piece: number for number, piece in enumerate(known)})._tokenizer
    with quiet_transformers():
        tokenizer = transformers.BertTokenizerFast(tokenizer_object=cut)
    if not types:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return tokenizer


def finder(family: str = "Bert", seed: int = 0, head: str = "ForQuestionAnswering", **changes: Any) -> Bundle:
    """A model with random weights far enough from nothing for a mix-up to be seen."""
    kind = getattr(transformers, f"{family}{head}")
    tokenizer = pieces(types=family == "Bert")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": CONTEXT, "pad_token_id": 0}
    torch.manual_seed(seed)
    config = kind.config_class(**{**sizes, **_SIZES[family], **changes})
    config.architectures = [kind.__name__]
    model = kind(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Bundle(model, tokenizer, Lineage(source="tiny"))


def questions(count: int, seed: int = 0, none: float = 0.2, longest: int = 20) -> list[Row]:
    """Rows; a share of `none` has no answer, and some words are written with a comma behind or a capital."""
    draw = random.Random(seed)
    found = []
    for number in range(count):
        asked = list(ASKED)[number % 2]
        other = list(ASKED)[1 - number % 2]
        words = [draw.choice(FILLER) for _ in range(draw.randint(4, longest))]
        label = draw.choice(ASKED[asked]) if draw.random() >= none else None
        places = sorted(draw.sample(range(len(words) + 1), 2))
        told = [draw.choice(ASKED[other]), *([] if label is None else [label])]
        draw.shuffle(told)
        for place, one in zip(reversed(places), told, strict=False):
            words[place:place] = [one.title() if draw.random() < 0.2 else one]
        context = " ".join(words) + "."
        start = -1 if label is None else context.lower().find(label)
        answers = () if label is None else ((start, context[start : start + len(label)]),)
        found.append(Row(asked, answers, context))
    return found


def labelled(
    bundle: Bundle, train: int = 60, seed: int = 0, longest: int = CONTEXT, **options: Any
) -> LabelledData:
    """Parts of such rows, as the model reads them."""
    rows = tuple(questions(train + 40, seed, **options))
    parts = rows[:train], rows[train : train + 16], rows[train + 16 :]
    return encoded(Labelled("tiny", "span", (), *parts), (), bundle.tokenizer, longest)


def write_squad(file: Path, rows: list[Row]) -> Path:
    """As SQuAD is laid out, a paragraph per row."""
    paragraphs = [
        {
            "context": row.pair,
            "qas": [
                {
                    "id": str(number), "question": row.text, "is_impossible": not row.label,
                    "answers": [{"text": text, "answer_start": start} for start, text in row.label],
                }
            ],
        }
        for number, row in enumerate(rows)
    ]  # fmt: skip
    # an article of a few paragraphs each: one is in one part only
    data = [{"title": str(n), "paragraphs": paragraphs[n : n + 4]} for n in range(0, len(paragraphs), 4)]
    file.write_text(json.dumps({"version": "v2.0", "data": data}), encoding="utf-8")
    return file


def answers(bundle: Bundle) -> Any:
    """What torch says, as `measure.quality.score` asks for it."""
    from compress.tasks.registry import task_of

    task = task_of(bundle.model.config)

    @torch.inference_mode()
    def answer(tokens: Any, types: Any = None) -> Any:
        more = {} if types is None else {"token_type_ids": torch.from_numpy(types.astype(np.int64))}
        return task.answers(bundle.model, torch.from_numpy(tokens.astype(np.int64)), **more).float().numpy()

    return answer


def cut_rows(rows: list[Row], longest: int = CONTEXT, tokenizer: Any = None) -> Examples:
    """The rows as examples."""
    return encode(rows, "span", (), tokenizer or pieces(), longest)


def long_row(words: int = 200, place: int = 150, seed: int = 3) -> Row:
    """A question whose context fills several texts."""
    draw = np.random.default_rng(seed)
    told = [f"lamp{draw.integers(100)}" for _ in range(words)]
    told[place] = "light blue"
    context = "  " + " ".join(told) + "  "
    return Row("which colour is it?", ((context.index("light blue"), "light blue"),), context)
