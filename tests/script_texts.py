"""A megabyte of made-up text in Latin, Cyrillic, Greek and Chinese characters, and tokenizers of it."""

import json
import random
from functools import cache
from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from compress.models.create_tokenizers import Family, Kind, train_tokenizer

_LETTERS = {
    "latin": "etaoinshrdlucmfwypvbgkqjxzéèàüöñç",
    "cyrillic": "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфё",
    "greek": "αοιετνσρηπκμλυςωάίόέγδφχθβξζώήύ",
}
VOCABULARY = 3000  # without the token that is added to it
_CHINESE = "".join(map(chr, range(0x4E00, 0x4E00 + 300)))
BYTES = [f"<0x{number:02X}>" for number in range(256)]


@cache
def words(script: str, count: int = 1500) -> tuple[str, ...]:
    """Different made-up words, of which the first letters are the likelier ones."""
    source = random.Random(script)
    letters = _LETTERS.get(script, _CHINESE)
    weights = [1 / (place + 2) for place in range(len(letters))]
    found: dict[str, None] = {}
    while len(found) < count:
        length = source.randint(1, 3) if script == "chinese" else source.randint(2, 11)
        found["".join(source.choices(letters, weights, k=length))] = None
    return tuple(found)


@cache
def text(kinds: tuple[str, ...], size: int, share: float = 1.0, seed: int = 0) -> str:
    """At least `size` bytes in lines of one script each, of the first `share` of its words; some begin with
    a capital, numbers and punctuation are between them."""
    source = random.Random(f"{kinds}{seed}")
    lexicon = {kind: words(kind)[: int(share * len(words(kind)))] for kind in kinds}
    lines, have = [], 0
    while have < size:
        kind = source.choice(kinds)
        chosen = [lexicon[kind][int(len(lexicon[kind]) * source.random() ** 1.5)] for _ in range(12)]
        line = "".join(chosen) if kind == "chinese" else " ".join(chosen).capitalize()
        line += source.choice([".", "!", ", (1984)", " - 37 %", "?"])
        lines.append(line)
        have += len(line.encode()) + 1
    return "\n".join(lines) + "\n"


SCRIPTS = ("latin", "cyrillic", "greek", "chinese")


def made(kind: str) -> Any:
    """wordpiece, unigram, unigram-bytes, or llama: BPE with bytes to fall back on, over whole lines."""
    sample = text(SCRIPTS, 250_000, seed=1).splitlines(keepends=True)
    if kind == "llama":
        return _llama(sample)
    algorithm: Kind = "wordpiece" if kind == "wordpiece" else "unigram"
    family: Family = "bert" if kind == "wordpiece" else "t5"
    tokenizer = train_tokenizer(
        sample, VOCABULARY, 512, algorithm, family, byte_fallback=kind == "unigram-bytes", sentinels=5
    )
    tokenizer.add_tokens(["<tool>"])
    return tokenizer


def _llama(sample: list[str]) -> Any:
    """As stock transformers makes Llama's: every line is one word to the merges."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[*specials, *BYTES], show_progress=False
    )
    bpe.train_from_iterator(sample, trainer)
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = transformers.LlamaTokenizer(vocab=model["vocab"], merges=merges)
    tokenizer.add_tokens(["<tool>"])
    return tokenizer
