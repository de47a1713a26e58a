"""Targets that are texts, as tokens: what an encoder-decoder learns to write, its end included.

A target is cut into tokens as the tokenizer cuts what is to be written (mBART's and its like say the language
in it), and ends with its end-of-text token, which is put there where the tokenizer writes none: a model that
never saw an end never ends. Both sides have room for as many tokens as the model takes, and no more than its
tokenizer says: T5's positions have no end, and it was made for 512.

Imports no model library: the process that is measured reads examples, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding


class _Row(Protocol):
    @property
    def label(self) -> Any: ...


class Target(NamedTuple):
    """A target: int32 tokens (length,), and whether it was longer."""

    ids: NDArray[np.int32]
    cut: bool


def room_for(kind: str, tokenizer: Any, longest: int) -> int:
    """The most tokens of a text, for a model that takes `longest`: of kinds whose targets are texts no more
    than the tokenizer says."""
    return min(longest, int(tokenizer.model_max_length)) if kind == "text" else longest


def targets_written(rows: Sequence[_Row], tokenizer: Any, longest: int) -> list[Target]:
    """The targets of rows whose labels are texts.

    Raises:
        UserError: the tokenizer has no end-of-text token.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError(
            "labelled: the tokenizer has no eos_token, so that no text would learn to end; give it one"
        )
    texts = [row.label for row in rows]
    with encoding():
        encoded = tokenizer(text_target=texts, truncation=True, max_length=longest, verbose=False)
    found = []
    for ids, parts in zip(encoded["input_ids"], encoded.encodings, strict=True):
        cut = bool(parts.overflowing)
        if end not in ids:  # mBART ends with a language after it
            cut = cut or len(ids) == longest
            ids = [*ids[: longest - 1], end]
        found.append(Target(np.array(ids, dtype=np.int32), cut))
    return found
