"""Token ids of one vocabulary in another that has fewer of the same tokens.

A model whose vocabulary was trimmed numbers its tokens anew. Text was cut into windows with the original
tokenizer; here its ids become those of the smaller one. A token that the smaller one lacks becomes the
pieces that its own rules make of the token's characters, so the text stays the same to the byte, and what
is scored is the same text.

What a model is asked about a window stays the same where every token is one of its own. Where tokens became
pieces, a model that continues text predicts them all, one that fills in has all pieces of a hidden token
hidden at once, one that labels tokens is asked for the first of each, and one that embeds reads them; an
encoder-decoder is refused, since the halves of a window would be others.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.files import VOCABULARY_BYTES, read_bytes
from compress.host.tokenizer_files import tokenizer_file
from compress.tasks.base import Question, Task

Ids = NDArray[np.int32]
_LARGEST_ID = np.iinfo(np.int32).max


@dataclass(frozen=True)
class TranslatedWindows:
    """Windows in the smaller vocabulary.

    Attributes:
        tokens: int32 (n, longest), filled up with -1.
        pieces: int32 (n, length), how many each token of the larger vocabulary became.
        rows: int32 (V',), the larger vocabulary's id of each token; None where a token became pieces, so
            that positions are not those of the larger vocabulary.
    """

    tokens: Ids
    pieces: Ids
    rows: Ids | None

    @property
    def first(self) -> Ids:
        """Of every window, how many pieces its first token became, int32 (n,)."""
        return self.pieces[:, 0]

    def question(self, task: Task, window: Ids, index: int, mask_token: int | None) -> tuple[Question, Ids]:
        """What a model of the smaller vocabulary is asked about the window numbered `index`, and the tokens
        of the larger one that it is asked for; `window` (length,) is in the larger one.

        Raises:
            UserError: as the task's own question, or the window is not read as a whole.
        """
        own, counts = self.tokens[index], self.pieces[index]
        if self.rows is not None:
            own = task.window(self.tokens, index)
        own = own[own >= 0]
        if task.continues:
            first = int(counts[0])  # whose pieces are not predicted
            return Question(own[:-1], slice(first - 1, None), own[first:]), window[1:]
        asked = task.question(own if self.rows is not None else window, index, mask_token)
        if self.rows is not None:
            return asked, asked.targets
        if task.stacks > 1 or task.pairs:
            raise UserError(
                f"a token of the evaluation text is not in the smaller vocabulary, so {task.noun} cannot be "
                "asked the same; name the whole text under prune_vocabulary.text"
            )
        ends = np.cumsum(counts)
        if isinstance(asked.rows, slice):  # it is read, and nothing is filled in
            each = task.labels is not None and not task.pooled  # a token's label is its first piece's
            return Question(own, ends - counts if each else asked.rows, asked.targets), asked.targets
        places = np.concatenate([np.arange(ends[row] - counts[row], ends[row]) for row in asked.rows])
        inputs = own.copy()
        inputs[places] = mask_token
        return Question(inputs, places, own[places]), asked.targets

    def save(self, path: Path) -> None:
        """Write it as .npz."""
        rows = np.zeros(0, np.int32) if self.rows is None else self.rows
        np.savez(path, tokens=self.tokens, pieces=self.pieces, rows=rows)

    @classmethod
    def load(cls, path: Path) -> "TranslatedWindows":
        """Read what `save` wrote."""
        with np.load(path) as file:
            rows = file["rows"] if file["rows"].size else None
            return cls(file["tokens"], file["pieces"], rows)


@dataclass
class Translation:
    """Ids of a larger vocabulary -> ids of a smaller one.

    Attributes:
        strings: the larger vocabulary's tokens by id.
        own: the smaller one's ids by token.
        model: the smaller tokenizer's model, which takes a token apart.
        unknown: the smaller one's id of what cannot be written, if it has one.
        inside: what begins a token that continues a word, in WordPiece's vocabularies.
        rows: int32 (V',), smaller id -> larger id.
    """

    strings: dict[int, str]
    own: dict[str, int]
    model: Any
    rows: Ids
    unknown: int | None = None
    inside: str | None = None
    _pieces: dict[int, list[int]] = field(default_factory=dict)

    def pieces(self, token: int) -> list[int]:
        """What a token becomes."""
        found = self._pieces.get(token)
        if found is None:
            string = self.strings.get(token)
            if string is None:
                raise UserError(
                    f"token {token} is not in the tokenizer's vocabulary, so it cannot be renumbered"
                )
            known = self.own.get(string)
            found = [known] if known is not None else self._apart(string)
            if known is None and (not found or self.unknown in found):
                raise UserError(
                    f"token {json.dumps(string)} cannot be written in the smaller vocabulary; trim it again, "
                    "with a text that has the token"
                )
            self._pieces[token] = found
        return found

    def _apart(self, string: str) -> list[int]:
        """A token that the smaller vocabulary lacks, in pieces; none where it cannot be written."""
        inside = self.inside
        if not inside or not string.startswith(inside) or string == inside:
            return [piece.id for piece in self.model.tokenize(string)]
        # a tokenizer is never asked to cut what continues a word: the longest piece first, as it does
        found: list[int] = []
        rest = string.removeprefix(inside)
        while rest:
            longest = (n for n in range(len(rest), 0, -1) if inside + rest[:n] in self.own)
            length = next(longest, 0)
            if not length:
                return []
            found.append(self.own[inside + rest[:length]])
            rest = rest[length:]
        return found

    def stream(self, tokens: Ids) -> Ids:
        """One text, (n,) -> (n or more,)."""
        return np.array([i for token in tokens.tolist() for i in self.pieces(token)], dtype=np.int32)

    def cut(self, windows: Ids) -> Ids:
        """Windows (n, length) of the same length: what becomes longer loses its end."""
        length = windows.shape[1]
        rows = [self.stream(window)[:length] for window in windows]
        return np.stack(rows) if rows else windows

    def whole(self, windows: Ids) -> TranslatedWindows:
        """Windows (n, length), nothing lost."""
        rows = [self.stream(window) for window in windows]
        tokens = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        aligned = all(len(row) == windows.shape[1] for row in rows)
        return TranslatedWindows(
            tokens,
            np.array([[len(self.pieces(int(token))) for token in window] for window in windows], np.int32),
            self.rows if aligned else None,
        )

    def back(self, tokens: list[int]) -> list[int]:
        """Ids of the smaller vocabulary in the larger one."""
        return [int(self.rows[token]) for token in tokens]


def translation(larger: Path, smaller: Path) -> Translation | None:
    """Between the tokenizers of two `tokenizer.json` files; None where both number alike.

    Raises:
        UserError: the second has tokens that the first lacks.
    """
    if read_bytes(larger, VOCABULARY_BYTES) == read_bytes(smaller, VOCABULARY_BYTES):
        return None
    theirs, own = tokenizer_file(larger), tokenizer_file(smaller)
    wide, narrow = theirs.get_vocab(), own.get_vocab()
    if wide == narrow:
        return None
    foreign = next((token for token in narrow if token not in wide), None)
    if foreign is not None:
        raise UserError(
            f"{smaller.parent}: its token {json.dumps(foreign)} is not in the vocabulary of {larger.parent}; "
            "models of different tokenizers cannot be compared, so measure it on its own"
        )
    largest = max(wide.values())
    if largest > _LARGEST_ID:
        raise UserError(
            f"{larger.parent}: its tokenizer numbers a token {largest:,}, and no vocabulary has so many; "
            "download it again"
        )
    rows = np.array([wide[token] for token in sorted(narrow, key=lambda t: narrow[t])], dtype=np.int32)
    inside = getattr(own.model, "continuing_subword_prefix", None)
    inside = inside if type(own.model).__name__ == "WordPiece" else None
    unknown = getattr(own.model, "unk_id", None)
    if unknown is None:
        unknown = narrow.get(getattr(own.model, "unk_token", None) or "")
    return Translation({i: token for token, i in wide.items()}, narrow, own.model, rows, unknown, inside)
