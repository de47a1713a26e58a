"""masked: an encoder with a masked-LM head (BERT), which fills in tokens that are hidden from it.

Of a window 15 % are hidden, drawn by its number and never the first or last (Devlin et al. 2018, all of them
replaced by the mask token).
"""

from typing import Any, ClassVar

import numpy as np

from compress.errors import UserError
from compress.tasks.base import Question, Task, Window

HIDDEN = 0.15


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
