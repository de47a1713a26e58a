"""What a task is: how a model of it is made, asked and scored, in one place.

A new task is a subclass in a file of this folder and a line in registry.py. It must have a name, what a
model of it is called, the class of `transformers` that makes one, whether a configuration is of one, and the
question of a window; and it says of itself, where the default is not true of it, what others ask below, how
its answers are judged (`scoring`) among it.

Imports no model library: a runtime without torch knows tasks, too, and its memory is measured.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt

from compress.errors import UserError
from compress.tasks.answers import Passage
from compress.tasks.likelihood import LIKELIHOOD
from compress.tasks.scoring import Decided, Rows, Scoring

if TYPE_CHECKING:
    from torch import Tensor

Window = npt.NDArray[np.int32]
UNKNOWN = -1  # in the place of a label's number


@dataclass(frozen=True)
class Example:
    """A text with what is right about it.

    Attributes:
        ids: tokens (length,).
        targets: by the kind: a label's number (1,), a 0 or 1 per label (labels,), a number (1,), a label's
            number or the next token per token (length,), UNKNOWN where none is asked for, the first and last
            token of an answer (2,), 0 where there is none, or the tokens of a text (targets,).
        types: which of two texts each token is of, (length,); None where there is one, or the tokenizer does
            not tell them apart.
        passage: in which an answer is looked for.
    """

    ids: npt.NDArray[np.int32]
    targets: npt.NDArray[Any]
    types: npt.NDArray[np.int32] | None = None
    passage: Passage | None = None


@dataclass(frozen=True)
class Question:
    """What a model is asked about a window.

    Attributes:
        inputs: tokens (length,).
        rows: of its answer (positions, width), those that are scored.
        targets: what they should give, (rows,): tokens, or numbers of labels, UNKNOWN where nobody told.
        types: which of two texts each token is of, (length,), where the model tells them apart.
        text: what is written of the whole of `inputs`, tokens (targets,); None where a window holds both.
        passage: in which an answer is looked for.
    """

    inputs: Window
    rows: slice | npt.NDArray[np.int64]
    targets: npt.NDArray[Any]
    types: Window | None = None
    text: Window | None = None
    passage: Passage | None = None


class Task(ABC):
    """What a model is for. There is one value of each; records name it."""

    name: ClassVar[str]  # in records, manifests and graphs
    noun: ClassVar[str]  # what a model of it is called in a sentence
    auto_class: ClassVar[str]  # of transformers
    output: ClassVar[Literal["logits", "last_hidden_state"]] = "logits"  # of transformers' class
    columns: ClassVar[tuple[str, ...]] = ()  # of an answer, by name, where that gives them one by one
    predicts: ClassVar[bool] = True  # the answer is logits of tokens; else vectors
    scoring: ClassVar[Scoring] = LIKELIHOOD  # what its answers are worth
    writes: ClassVar[bool] = False  # gives text token by token: there is a cache, and `decode`
    continues: ClassVar[bool] = False  # every token from those before it: its text goes on from the prompt
    stacks: ClassVar[int] = 1  # lists of blocks, one after the other
    labels: ClassVar[str | None] = None  # the kind of labels that it is judged by; None: by text
    rows: ClassVar[str | None] = None  # the kind of labelled rows that judge it, too, where there are any
    embeds: ClassVar[bool] = False  # a text becomes a vector
    pooled: ClassVar[bool] = False  # the answer is one row for the whole text, (batch, 1, width)
    pairs: ClassVar[bool] = False  # windows are asked about in two halves
    options: ClassVar[Mapping[str, Any]] = {}  # of a call that reads a whole text and keeps nothing

    @abstractmethod
    def claims(self, config: Any, architecture: str) -> bool:
        """Whether a configuration of `transformers`, which names this class, is of such a model."""

    def window(self, windows: Any, index: int) -> Window:
        """What is asked about in the place of the window numbered `index` of windows (n, length)."""
        found: Window = windows[index]
        return found

    @abstractmethod
    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """What a model is asked about the window numbered `index`, (length,), as `window` gives it.

        Raises:
            UserError: the tokenizer lacks what the question needs.
        """

    def judged_by(self, kind: str) -> bool:
        """Whether rows of a kind of label are learnt by a model of it, and judge it."""
        return kind in (self.labels, self.rows)

    def asked(self, example: Example) -> Question:
        """What a model is asked about a text with labels, of tasks that are judged by a kind of them."""
        return Question(example.ids, slice(None), example.targets, example.types)

    def answers(self, model: Any, tokens: Tensor, **more: Tensor) -> Tensor:
        """A torch model's answer to tokens (batch, length): (batch, positions, width).

        `more`: what else its encoder is given, by name, each (batch, length).
        """
        answer = self.given(model(input_ids=tokens, **more, **self.options))
        return answer[:, None] if self.pooled else answer

    def given(self, outputs: Any) -> Tensor:
        """The answer in what a call of a torch model returned, a tuple or an object: its first output, or its
        columns side by side."""
        if not self.columns:
            answer: Tensor = outputs[0]
            return answer
        import torch

        return torch.stack([outputs[place] for place in range(len(self.columns))], dim=-1)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of a graph's outputs."""
        return self.columns or (self.output,)

    def decided(self, rows: Rows, question: Question) -> Decided | None:
        """What an answer decides: `Scoring.kept` of the rows that the question asks for."""
        return self.scoring.decided(rows, question.targets)

    def width(self, config: Any) -> int:
        """Of the rows of its answer."""
        text = config.get_text_config()
        return int(text.vocab_size if self.predicts else text.hidden_size)

    def mask_token(self, tokenizer: Any) -> int | None:
        """The token that stands for one to be filled in, of tasks that fill in."""
        return None

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return f"<task {self.name}>"


def require_row(token: int, rows: int | None, where: str) -> int:
    """A token that a text is to begin with; raises UserError where a model of so many `rows` has none for it,
    which is met else in the middle of its work."""
    if token < 0 or (rows is not None and token >= rows):
        raise UserError(
            f"{where}: {token} is none of the {rows} tokens that the model has rows for; give the number of "
            "one"
        )
    return token


def rows_of(config: Any) -> int | None:
    """How many tokens a configuration's table has rows for."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return None if rows is None else int(rows)


def longest_text(model: Any) -> int:
    """The most tokens a `transformers` model takes; RoBERTa keeps its first positions for padding."""
    config = model.config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return longest - int(module.padding_idx) - 1
    return longest
