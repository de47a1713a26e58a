"""Token ids of one vocabulary in another that has fewer of the same tokens.

A model whose vocabulary was trimmed numbers its tokens anew. Text was cut into windows with the original
tokenizer; here its ids become those of the smaller one. A token that the smaller one lacks becomes the
pieces that its own merges make of the token's characters, so the text stays the same to the byte, and what
is scored is the same text.
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

Ids = NDArray[np.int32]
_LARGEST_ID = np.iinfo(np.int32).max


@dataclass(frozen=True)
class TranslatedWindows:
    """Windows in the smaller vocabulary.

    Attributes:
        tokens: int32 (n, longest), filled up with -1.
        first: int32 (n,), how many pieces a window's first token became.
        predicted: int32 (n,), tokens of the larger vocabulary that are predicted.
        rows: int32 (V',), the larger vocabulary's id of each token; None where a token became pieces, so
            that positions are not those of the larger vocabulary.
    """

    tokens: Ids
    first: Ids
    predicted: Ids
    rows: Ids | None

    def save(self, path: Path) -> None:
        """Write it as .npz."""
        rows = np.zeros(0, np.int32) if self.rows is None else self.rows
        np.savez(path, tokens=self.tokens, first=self.first, predicted=self.predicted, rows=rows)

    @classmethod
    def load(cls, path: Path) -> "TranslatedWindows":
        """Read what `save` wrote."""
        with np.load(path) as file:
            rows = file["rows"] if file["rows"].size else None
            return cls(file["tokens"], file["first"], file["predicted"], rows)


@dataclass
class Translation:
    """Ids of a larger vocabulary -> ids of a smaller one.

    Attributes:
        strings: the larger vocabulary's tokens by id.
        own: the smaller one's ids by token.
        model: the smaller tokenizer's model, which takes a token apart.
        rows: int32 (V',), smaller id -> larger id.
    """

    strings: dict[int, str]
    own: dict[str, int]
    model: Any
    rows: Ids
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
            found = [known] if known is not None else [t.id for t in self.model.tokenize(string)]
            self._pieces[token] = found
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
            np.array([len(self.pieces(int(window[0]))) for window in windows], dtype=np.int32),
            np.full(len(rows), windows.shape[1] - 1, dtype=np.int32),
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
    return Translation({i: token for token, i in wide.items()}, narrow, own.model, rows)
