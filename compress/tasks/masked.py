"""masked: an encoder with a masked-LM head (BERT), which fills in tokens that are hidden from it.

It is judged on fixed draws: of a window 15 % are hidden, drawn by its number and never the first or last, all
of them replaced by the mask token. It is trained on draws that are new in every epoch, of which 80 % become
the mask token, 10 % another token and 10 % stay (Devlin et al. 2018, section 3.1); or whole words are hidden,
all pieces of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from compress.errors import UserError
from compress.tasks.base import UNKNOWN, Question, Task, Window

HIDDEN = 0.15
_MASKED, _RANDOM = 0.8, 0.1  # of what is hidden; the rest stays

Rows = npt.NDArray[np.int64]


class Masked(Task):
    """To fill in masked tokens."""

    name: ClassVar[str] = "masked"
    noun: ClassVar[str] = "an encoder"
    auto_class: ClassVar[str] = "AutoModelForMaskedLM"

    def claims(self, config: Any, architecture: str) -> bool:
        """By the head's name."""
        return architecture.endswith("ForMaskedLM")

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """The hidden tokens."""
        if mask_token is None:
            raise UserError("the tokenizer has no mask token, so a masked-LM loss cannot be measured")
        inner = len(window) - 2
        hidden = np.random.default_rng(index).permutation(inner)[: max(1, round(HIDDEN * inner))] + 1
        inputs = window.copy()
        inputs[hidden] = mask_token
        return Question(inputs, hidden, window[hidden])

    def mask_token(self, tokenizer: Any) -> int | None:
        """The tokenizer's, if it has one."""
        token: int | None = tokenizer.mask_token_id
        return token


MASKED = Masked()


def hide(
    rows: Rows,
    draws: Sequence[np.random.Generator],
    mask_token: int,
    vocabulary: int,
    share: float = HIDDEN,
    kept: npt.NDArray[np.bool_] | None = None,
    words: npt.NDArray[np.int64] | None = None,
) -> tuple[Rows, Rows]:
    """Inputs and targets (rows, length) of training; a target is UNKNOWN where nothing is hidden.

    Args:
        rows: windows (rows, length).
        draws: a generator per row.
        mask_token: what 80 % of the hidden tokens become.
        vocabulary: tokens below it are drawn for the 10 % that become others.
        share: of the tokens that may be hidden.
        kept: (rows, length), True for those that may not: specials.
        words: which word each token is of, (rows, length): then words are hidden whole.
    """
    inputs, targets = rows.copy(), np.full_like(rows, UNKNOWN)
    for row, draw in enumerate(draws):
        free = np.flatnonzero(~kept[row]) if kept is not None else np.arange(rows.shape[1])
        wanted = max(1, round(share * len(free)))
        hidden = (
            _words(free, words[row], wanted, draw) if words is not None else draw.permutation(free)[:wanted]
        )
        targets[row, hidden] = rows[row, hidden]
        fate = draw.random(len(hidden))
        inputs[row, hidden[fate < _MASKED]] = mask_token
        others = hidden[(fate >= _MASKED) & (fate < _MASKED + _RANDOM)]
        inputs[row, others] = draw.integers(0, vocabulary, len(others))
    return inputs, targets


def _words(
    free: npt.NDArray[np.int64], words: npt.NDArray[np.int64], wanted: int, draw: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Tokens of whole words, drawn until there are as many as wanted; the last word may be left out."""
    found: list[npt.NDArray[np.int64]] = []
    count = 0
    for word in draw.permutation(np.unique(words[free])):
        tokens = free[words[free] == word]
        if found and count + len(tokens) > wanted:
            continue
        found.append(tokens)
        count += len(tokens)
        if count >= wanted:
            break
    return np.concatenate(found)
