"""Texts with some of their words changed, the label kept.

Each word is replaced, deleted, followed by a new one, or swapped with the next, each at its own rate; of
a word at most one of these befalls (Wei and Zou 2019, whose words come from a thesaurus; here they come
from the training texts, by their frequency, so that no other language is brought in). A rate is the
expected share of words. A text keeps at least one word.

Tags go with their words. A word that has a tag is replaced by one that has the same tag in training, and
what is inserted brings its tag along. Of a name of several words (`B-`, `I-`) nothing is swapped, nothing
is put between, and where its first word goes the next becomes the first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from compress.errors import UserError
from compress.text.labelled.base import Row

OUTSIDE = "O"
_DRAWS = 8  # until a word is another


class Rates(BaseModel):
    """Of all words, the share that each change befalls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replace: float = Field(0.0, ge=0, le=1, description="by another word of the training texts")
    delete: float = Field(0.0, ge=0, le=1, description="but never all words")
    insert: float = Field(0.0, ge=0, le=1, description="a word of the training texts behind it")
    swap: float = Field(0.0, ge=0, le=1, description="with the word behind it")

    @model_validator(mode="after")
    def _one_each(self) -> "Rates":
        if (total := self.replace + self.delete + self.insert + self.swap) > 1 + 1e-9:
            raise ValueError(
                f"the rates of replace, delete, insert and swap come to {total:g}; a word takes one "
                "change at most, so let them come to 1 or less"
            )
        return self


@dataclass(frozen=True)
class Vocabulary:
    """Words of training texts as often as they are there, and by the tag that they have."""

    words: tuple[str, ...]
    tagged: Mapping[str, tuple[str, ...]]

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Vocabulary":
        """All words of the rows; of pairs, of both texts."""
        words: list[str] = []
        tagged: dict[str, list[str]] = {}
        for row in rows:
            if row.words:
                words += row.words
                for word, tag in zip(row.words, row.label, strict=True):  # type: ignore[arg-type]
                    tagged.setdefault(str(tag), []).append(word)
            else:
                words += [*row.text.split(), *(row.pair or "").split()]
        return cls(tuple(words), {tag: tuple(found) for tag, found in tagged.items()})


def augmented(text: str, rng: np.random.Generator, rates: Rates, vocabulary: Sequence[str]) -> str:
    """A text with some words changed; as it was where none is.

    Args:
        text: words with anything between; single spaces are between those of a changed one.
        rng: draws; the same state gives the same text.
        rates: of each change.
        vocabulary: words that replace and are inserted, each as likely as it is often there; none: neither.
    """
    words = text.split()
    changed = [word for word, _ in _changed([(word, "") for word in words], rng, rates, {"": vocabulary})]
    return text if changed == words else " ".join(changed)


def augmented_words(
    words: Sequence[str],
    tags: Sequence[str],
    rng: np.random.Generator,
    rates: Rates,
    vocabulary: Mapping[str, Sequence[str]],
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Words and their tags, with some changed; `vocabulary`: words by their tag (`Vocabulary.tagged`)."""
    found = _changed(list(zip(words, tags, strict=True)), rng, rates, vocabulary)
    return tuple(word for word, _ in found), tuple(tag for _, tag in found)


def augmented_row(row: Row, rng: np.random.Generator, rates: Rates, vocabulary: Vocabulary) -> Row:
    """A row with its label: words and tags, or both texts of a pair; of a span the question alone."""
    if row.words:
        label: Sequence[str] = row.label  # type: ignore[assignment]
        words, tags = augmented_words(row.words, label, rng, rates, vocabulary.tagged)
        return Row(" ".join(words), tags, row.pair, words)
    spans = isinstance(row.label, tuple) and bool(row.label) and isinstance(row.label[0], tuple)
    text = augmented(row.text, rng, rates, vocabulary.words)
    if row.pair is None or spans:
        return Row(text, row.label, row.pair)
    return Row(text, row.label, augmented(row.pair, rng, rates, vocabulary.words))


def _changed(
    pairs: list[tuple[str, str]],
    rng: np.random.Generator,
    rates: Rates,
    vocabulary: Mapping[str, Sequence[str]],
) -> list[tuple[str, str]]:
    """Words with their tags, after one draw each; a word that was swapped with the one before has had its."""
    if (rates.replace or rates.insert) and not any(vocabulary.values()):
        raise UserError(
            "augmentation: replace and insert need the words of training texts, and there are none"
        )
    bounds = np.cumsum([rates.replace, rates.delete, rates.insert, rates.swap])
    draws = np.searchsorted(bounds, rng.random(len(pairs)), side="right").tolist()  # 4: left alone
    outside = OUTSIDE if OUTSIDE in vocabulary else None
    pairs, left, result = list(pairs), len(pairs), list[tuple[str, str]]()
    index = 0
    while index < len(pairs):
        (word, tag), draw = pairs[index], draws[index]
        index += 1
        behind = pairs[index] if index < len(pairs) else None
        if draw == 1 and left > 1:
            left -= 1
            if behind is not None and tag.startswith("B-") and behind[1] == f"I-{tag[2:]}":
                pairs[index] = behind[0], tag  # the next word of the name begins it
            continue
        if draw == 3 and behind is not None and not (_named(tag) or _named(behind[1])):
            result += [behind, (word, tag)]
            index += 1
            continue
        if draw == 0:
            word = _drawn(vocabulary.get(tag, ()), rng, word) or word
        result.append((word, tag))
        if draw == 2 and not (behind is not None and behind[1].startswith("I-")):
            new_tag = tag if outside is None else outside
            if new := _drawn(vocabulary.get(new_tag, ()), rng):
                result.append((new, new_tag))
    return result


def _named(tag: str) -> bool:
    return tag.startswith(("B-", "I-"))


def _drawn(words: Sequence[str], rng: np.random.Generator, word: str = "") -> str | None:
    """One of the words, another than `word` if one is found soon."""
    drawn = (words[int(rng.integers(len(words)))] for _ in range(_DRAWS if words else 0))
    return next((one for one in drawn if one != word), None)
