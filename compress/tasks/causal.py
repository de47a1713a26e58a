"""causal: a decoder (Llama, GPT-2), which gives every token from those before it.

A window of L tokens asks for its tokens 2 .. L; the first is not predicted. A chat asks for what its
assistant says: a target stands at each token that such a token follows.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from compress.tasks.base import UNKNOWN, Example, Question, Task, Window

# heads of which another would be made up
_OTHERS = (
    "Classification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForPreTraining",
)


class Causal(Task):
    """To continue text."""

    name: ClassVar[str] = "causal"
    noun: ClassVar[str] = "a decoder"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"
    writes: ClassVar[bool] = True
    continues: ClassVar[bool] = True
    rows: ClassVar[str | None] = "chat"
    options: ClassVar[Mapping[str, Any]] = {"use_cache": False}

    def claims(self, config: Any, architecture: str) -> bool:
        """What no other task claims, whatever it is called, if it has no other head."""
        return not architecture.endswith(_OTHERS)

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """Every token but the first."""
        return Question(window[:-1], slice(None), window[1:])

    def asked(self, example: Example) -> Question:
        """The tokens of answers."""
        places = np.flatnonzero(example.targets != UNKNOWN)
        return Question(example.ids, places, example.targets[places])


CAUSAL = Causal()
