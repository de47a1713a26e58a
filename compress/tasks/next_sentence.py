"""masked-next: an encoder with two heads (BertForPreTraining): hidden tokens, and whether two texts follow.

A window [CLS] t_1 .. t_n [SEP] is asked as [CLS] a [SEP] b [SEP] of the same length, n - 1 tokens in two
halves: a are the first of its own, b those that follow, or, in half of the cases, those at the same place of
another window (Devlin et al. 2018, section 3.1, task 2). The last row of an answer are the two logits of
"follows" and "does not", in as many columns as the vocabulary has, of which the others hold what is as good
as no chance.

It is judged on fixed draws: every second window gets another's half, drawn by its number, and 15 % of the
tokens are hidden. Likelihood and KL are of the hidden tokens alone; the share of pairs that are told right,
and their loss, stand among the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt

from compress.errors import UserError
from compress.tasks.base import Question, Window
from compress.tasks.decisions import Judged
from compress.tasks.likelihood import Likelihood, log_softmax
from compress.tasks.masked import HIDDEN, Masked
from compress.tasks.scoring import Columns, Decided, Intervals, Rows, Scoring

if TYPE_CHECKING:
    from torch import Tensor

FOLLOWS, FOREIGN = 0, 1  # as BertForPreTraining numbers them
_PAIR = -2  # in the place of a target: less the label
_NO_CHANCE = -40.0  # below both logits: of 100,000 columns all together 1e-12

T = TypeVar("T", bound=Any)  # an array or a tensor


class MaskedAndNext(Likelihood):
    """Likelihood of hidden tokens; whether pairs are told right among the metrics."""

    def counted(self, targets: npt.NDArray[Any]) -> int:
        """The hidden tokens."""
        return int((targets >= 0).sum())

    def sums(self, rows: Rows, targets: npt.NDArray[Any], base: Rows | None) -> tuple[float, ...]:
        """Those of the hidden tokens."""
        hidden = targets >= 0
        if not hidden.any():
            return 0.0, 0.0, 0.0
        return super().sums(rows[hidden], targets[hidden], None if base is None else base[hidden])

    def decided(self, rows: Rows, targets: npt.NDArray[Any]) -> Decided | None:
        """Whether the pair follows."""
        pair = targets <= _PAIR
        if not pair.any():
            return None
        likely = np.exp(log_softmax(rows[pair][:, :2]))
        told = likely.argmax(-1)
        sure = likely[np.arange(len(told)), told]
        return Decided(told.tolist(), (_PAIR - targets[pair]).tolist(), sure.tolist())

    def summary(
        self, scores: Columns, base: Columns | None, text_bytes: int | None, interval: Intervals
    ) -> Columns:
        """Likelihood and distances of hidden tokens, and of pairs the share told right and the loss."""
        found = dict(super().summary(scores, base, text_bytes, interval))
        judged = Judged.of(scores)
        if judged is not None:
            decisions, targets, sure = judged.flat
            right = decisions == targets
            likely = np.where(right, sure, 1 - sure)
            found["metrics"] = {
                "next_sentence_accuracy": float(right.mean()),
                "next_sentence_nll": float(-np.log(np.maximum(likely, 1e-30)).mean()),
            }
        return found


class MaskedNext(Masked):
    """To fill in masked tokens, and to tell whether a text follows another."""

    name: ClassVar[str] = "masked-next"
    noun: ClassVar[str] = "an encoder with a next-sentence head"
    auto_class: ClassVar[str] = "AutoModelForPreTraining"
    scoring: ClassVar[Scoring] = MaskedAndNext()
    pairs: ClassVar[bool] = True

    def claims(self, config: Any, architecture: str) -> bool:
        """By the class's name: others that end so learn otherwise (ELECTRA, ALBERT)."""
        return architecture == "BertForPreTraining"

    def window(self, windows: Sequence[Window] | npt.NDArray[np.int32], index: int) -> Window:
        """The window numbered `index` with its own second half or, of every second one, another's."""
        other = index
        if index % 2 == FOREIGN and len(windows) > 1:
            draw = np.random.default_rng([index, len(windows)])
            other = (index + 1 + int(draw.integers(len(windows) - 1))) % len(windows)
        return np.asarray(joined(windows[index], windows[other]))

    def question(self, window: Window, index: int, mask_token: int | None = None) -> Question:
        """Hidden tokens of a window as `window` gives it, and whether its halves follow."""
        if mask_token is None:
            raise UserError("the tokenizer has no mask token, so a masked-LM loss cannot be measured")
        length = len(window)
        text = np.delete(np.arange(1, length - 1), first_of(length))  # but for the token between
        drawn = np.random.default_rng(index).permutation(text)
        hidden = drawn[: max(1, round(HIDDEN * len(text)))]
        inputs = window.copy()
        inputs[hidden] = mask_token
        rows = np.append(hidden, length).astype(np.int64)
        targets = np.append(window[hidden].astype(np.int64), _PAIR - index % 2)
        return Question(inputs, rows, targets, types_of(length))

    def answers(self, model: Any, tokens: Tensor, **more: Tensor) -> Tensor:
        """(batch, length + 1, vocabulary): of every token its logits, and of the pair."""
        import torch

        out = model(input_ids=tokens, **more)
        words, pair = out.prediction_logits, out.seq_relationship_logits
        last = words.new_full((len(words), 1, words.shape[-1]), _NO_CHANCE)
        last[:, 0, :2] = pair
        return torch.cat((words, last), dim=1)


MASKED_NEXT = MaskedNext()


def first_of(length: int) -> int:
    """Tokens of the first text of a window of so many.

    >>> first_of(10)
    3
    """
    return (length - 3) // 2


def joined(windows: T, others: T) -> T:
    """Windows (..., length), arrays or tensors, whose second texts are those of others.

    >>> joined(np.array([1, 5, 6, 7, 8, 9, 2]), np.array([1, 15, 16, 17, 18, 19, 2])).tolist()
    [1, 5, 6, 2, 17, 18, 2]
    """
    length = windows.shape[-1]
    first = first_of(length)
    found = windows.copy() if isinstance(windows, np.ndarray) else windows.clone()
    found[..., first + 1] = windows[..., -1]
    found[..., first + 2 : -1] = others[..., first + 1 : length - 2]
    return found


def types_of(length: int) -> Window:
    """Which text each token is of, (length,)."""
    types = np.zeros(length, dtype=np.int32)
    types[first_of(length) + 2 :] = 1
    return types
