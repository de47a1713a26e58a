"""Between text and token ids: prompts in, whole characters out, and nothing from a stop string on.

A stop string ends the text before it, wherever in a token's text it begins.

Text is decoded in a window, the last few tokens that were shown and those after them. So a token costs the
same however long the text is, and decoders that look back (is this word the first, or does it follow a
space?) see what they need. What could still change is held back: bytes of an incomplete character, and an
end of the text that may become a stop string.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError
from compress.host.files import read_json
from compress.host.tokenizer_files import tokenizer_file

_BROKEN = "\ufffd"  # what bytes decode to that are no whole character
_WINDOW = 8  # tokens that are decoded again before those that are new


def load_tokenizer(artifact: Path) -> Any:
    """The tokenizer of an artifact, without transformers; raises UserError where there is none that works."""
    file = artifact / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{artifact}: no tokenizer.json, so this is no artifact to generate with")
    return tokenizer_file(file)


def end_tokens(artifact: Path) -> list[int]:
    """Ids that end a text, from the generation config or the model's."""
    return _configured(artifact, "eos_token_id")


def stop_tokens(tokenizer: Any, stops: Sequence[str]) -> set[int]:
    """The ids of stop strings that are special tokens, which decoded text leaves out."""
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return special & {tokenizer.token_to_id(stop) for stop in stops}


def forced_first_token(artifact: Path) -> int | None:
    """What every answer of an encoder-decoder begins with (a language, say), if it is told."""
    return next(iter(_configured(artifact, "forced_bos_token_id")), None)


def rows_of(artifact: Path) -> int | None:
    """How many tokens the model has rows for, if its configuration tells."""
    file = artifact / "config.json"
    told = read_json(file) if file.is_file() else {}
    inner = told.get("text_config")  # of a model that also sees pictures
    rows = told.get("vocab_size", inner.get("vocab_size") if isinstance(inner, dict) else None)
    return rows if type(rows) is int else None


def _configured(artifact: Path, field: str) -> list[int]:
    """Token ids in a field of the generation config, or else of the model's."""
    for name in ("generation_config.json", "config.json"):
        value = read_json(artifact / name).get(field) if (artifact / name).is_file() else None
        if value is not None:
            ids = value if isinstance(value, list) else [value]
            if not all(type(i) is int for i in ids):
                raise UserError(
                    f"{artifact / name}: {field} is {value!r}; a token's number is wanted, or several"
                )
            return ids
    return []


class Decoded:
    """Token ids to pieces of text; `prompt` is what the text begins with, and is not shown again."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        start = max(0, len(prompt) - _WINDOW)
        while start and tokenizer.decode(self._ids[start:]).startswith(_BROKEN):
            start -= 1
        # where the text so far was whole: the window begins at the first and what is new after the last
        self._edges = [start, len(prompt)]

    def add(self, token: int) -> str:
        """The text that is whole now; often empty."""
        self._ids.append(token)
        piece = self._rest()
        if piece.endswith(_BROKEN):
            return ""
        self._edges.append(len(self._ids))
        while len(self._ids) - self._edges[1] >= _WINDOW:
            del self._edges[0]
        return piece

    def close(self) -> str:
        """What is left when no token follows."""
        return self._rest()

    def _rest(self) -> str:
        before = self._tokenizer.decode(self._ids[self._edges[0] : self._edges[-1]])
        return str(self._tokenizer.decode(self._ids[self._edges[0] :])[len(before) :])


class Stops:
    """Cuts a text before its first stop string; holds back an end of it that may become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise UserError("stop: an empty stop string would end every text; leave it out")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def add(self, piece: str) -> str:
        """What is certain to be shown now that `piece` has come."""
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        begun = [
            n
            for stop in self._stops
            for n in range(1, min(len(stop) - 1, len(text)) + 1)
            if text.endswith(stop[:n])
        ]
        certain = len(text) - max(begun, default=0)
        self._held = text[certain:]
        return text[:certain]

    def close(self) -> str:
        """What was held back, when nothing follows."""
        rest, self._held = self._held, ""
        return rest


class Writing:
    """One text as it is written: tokens in, text out."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self._decoded, self._stops = Decoded(tokenizer, prompt), Stops(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.stopped

    def add(self, token: int) -> str:
        """The text that is certain now; often empty."""
        return self._stops.add(self._decoded.add(token))

    def close(self) -> str:
        """What is left when no token follows."""
        return "" if self.stopped else self._stops.add(self._decoded.close()) + self._stops.close()


def pieces(writing: Writing, tokens: Iterator[int]) -> Iterator[str]:
    """The text of `tokens`, piece by piece, as far as it is shown; takes no token after a stop string."""
    for token in tokens:
        piece = writing.add(token)
        if piece:
            yield piece
        if writing.stopped:
            return
    rest = writing.close()
    if rest:
        yield rest
