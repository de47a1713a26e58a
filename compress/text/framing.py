"""What a tokenizer writes around every text: a beginning-of-text token, or an encoder's two.

A model that was trained on texts which all begin with one token (Llama, Gemma, Mistral) is out of its senses
without it: attention leans on that first position. So every window that it is calibrated, trained or judged
on begins with it, and holds that much less text. The tokenizer itself is asked, by encoding a text with and
without its specials: a token that its settings name and that it never writes (`cls_token` of a decoder) is
no part of a window.

What it writes *after* a text is left out where it means that the text ends, which a window does not: only
an encoder's pair (the tokenizer's `cls_token` first, its `sep_token` last) frames a window on both sides.

Limit: of several tokens before a text the first is not predicted, as in all windows; the others are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding

_Rows = NDArray[np.int32]


@dataclass(frozen=True)
class Frame:
    """Tokens before and after the text of a window.

    >>> frame = Frame(begin=(1,))
    >>> frame.around(np.array([[7, 8, 9]], dtype=np.int32)).tolist()
    [[1, 7, 8, 9]]
    >>> frame.inside(np.array([[1, 7, 8, 9]], dtype=np.int32)).tolist()
    [[7, 8, 9]]
    """

    begin: tuple[int, ...] = ()
    end: tuple[int, ...] = ()

    def room(self, window: int) -> int:
        """Tokens of text in a window.

        Raises:
            UserError: there is none.
        """
        room = window - len(self.begin) - len(self.end)
        if room < 1:
            raise UserError(
                f"data.window: {window} tokens leave no room beside the {window - room} that the tokenizer "
                "writes around every text; give a longer window"
            )
        return room

    def around(self, text: _Rows) -> _Rows:
        """Rows of text (n, room) as windows (n, window)."""
        sides = [np.array(side, dtype=np.int32) for side in (self.begin, self.end)]
        left, right = (np.broadcast_to(side, (len(text), len(side))) for side in sides)
        return np.concatenate([left, text, right], axis=1).astype(np.int32)

    def inside(self, windows: _Rows) -> _Rows:
        """The text of windows (n, window), (n, room)."""
        return windows[:, len(self.begin) : windows.shape[1] - len(self.end)]


NO_FRAME = Frame()


def frame_of(tokenizer: Any) -> Frame:
    """What this tokenizer's windows begin and end with; nothing for GPT-2's and its like."""
    begin, end = _written(tokenizer)
    pair = (getattr(tokenizer, "cls_token_id", None), getattr(tokenizer, "sep_token_id", None))
    encoder = bool(begin and end) and (begin[0], end[-1]) == pair
    return Frame(begin, end if encoder else ())


def prompt_of(tokenizer: Any, text: str, *, continues: bool) -> list[int]:
    """The ids of a text that a model reads; what the tokenizer puts after it is left out of one that the
    model `continues`, which it would end."""
    with encoding():
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    begin, end = _written(tokenizer)
    return [*begin, *ids, *(() if continues else end)]


def require_known(ids: Sequence[int], rows: int, place: str, token_of: Callable[[int], str | None]) -> None:
    """Refuse a text that holds a token which a model of so many `rows` has none for: a special one, as a
    tokenizer may have for padding, that stands there word for word.

    Raises:
        UserError: with the token.
    """
    if ids and (number := max(ids)) >= rows:
        raise UserError(
            f"{place}: holds {token_of(number)!r}, token {number}, and the model has "
            f"{rows} rows; take it out of the text, or give the model a row for it"
        )


def _written(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens before and after a text."""
    encoded = tokenizer("a", add_special_tokens=True, return_special_tokens_mask=True)
    ids, added = encoded["input_ids"], encoded["special_tokens_mask"]
    if all(added):  # nothing that is told apart from what was put around it
        return (), ()
    first, last = added.index(0), len(added) - added[::-1].index(0)
    return tuple(ids[:first]), tuple(ids[last:])
