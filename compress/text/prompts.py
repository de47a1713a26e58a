"""Texts with one label as prompts for a decoder, and the labels as what may follow.

A template is a text with {text}, {pair} where texts come in pairs, and {label} at its end; `{{` and `}}` are
braces. What stands before {label} is the prompt, without spaces at its end, which belong to the label's first
word, as in the text that a decoder has read. A label's tokens are those that it is cut into behind the text
just before it. A text that is too long for the model with the longest label loses its end, of a pair the
longer side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.text.framing import frame_of

_FIELDS = ("text", "pair", "label")
_FIELD = "labelled.template"

Tokens = NDArray[np.int32]


@dataclass(frozen=True)
class Prompt:
    """How a decoder is asked.

    Attributes:
        template: as the module says; `checked` refuses another.
        per_token: a label's log-likelihood is the mean over its tokens; else their sum.
    """

    template: str
    per_token: bool = True

    @property
    def pairs(self) -> bool:
        """Whether it holds the second text."""
        return any(name == "pair" for _, name in _parts(self.template))

    def before(self, text: str, pair: str | None) -> str:
        """What comes before the label."""
        given = {"text": text, "pair": pair or "", "label": ""}
        return "".join(literal + (given[name] if name else "") for literal, name in _parts(self.template))

    @property
    def tail(self) -> str:
        """What stands between the last text and the label."""
        return _parts(self.template)[-1][0]


@dataclass(frozen=True)
class Prompted:
    """Prompts and labels as tokens.

    Attributes:
        prompts: of each text, in their order.
        choices: of each label, in the order of their numbers.
        cut: how many texts were too long.
    """

    prompts: list[Tokens]
    choices: tuple[Tokens, ...]
    cut: int


def checked(template: str) -> str:
    """The template itself.

    Raises:
        ValueError: what is wrong with it.
    """
    try:
        parts = _parts(template)
    except ValueError as error:
        raise ValueError(f"{error}; write {{{{ and }}}} for braces") from None
    names = [name for _, name in parts if name is not None]
    for name in names:
        if name not in _FIELDS:
            raise ValueError(f"{{{name}}} is none of {{text}}, {{pair}}, {{label}}")
    if "text" not in names:
        raise ValueError("has no {text}, which is what is to be judged")
    if names.count("label") != 1 or parts[-1][1] != "label":
        raise ValueError("must end with {label}, and have it once: what is likely after the rest")
    if not parts[-1][0]:
        raise ValueError(
            "template: {label} follows the text at once; put a space, a line end or a word between"
        )
    return template


def prompted(
    texts: Sequence[tuple[str, str | None]],
    names: Sequence[str],
    prompt: Prompt,
    tokenizer: Any,
    longest: int,
) -> Prompted:
    """Texts, each with its second one, for a model that takes so many tokens.

    Raises:
        UserError: a template for pairs and single texts, or the reverse; labels that are the same tokens, or
            none; no room for any text.
    """
    pairs = bool(texts) and texts[0][1] is not None
    if pairs != prompt.pairs:
        told = "has no {pair}, and there are two texts in a row" if pairs else "has {pair}, and there is none"
        raise UserError(f"{_FIELD}: {told}; mend the template")
    choices = choices_of(names, prompt, tokenizer)
    begin = list(frame_of(tokenizer).begin)
    room = longest - len(begin) - max(map(len, choices))
    found, cut = list[Tokens](), 0
    for text, pair in texts:
        ids = _ids(prompt.before(text, pair).rstrip(" "), tokenizer)
        cut += len(ids) > room
        while len(ids) > room:
            text, pair = _shorter(text, pair, len(ids) - room, tokenizer)
            ids = _ids(prompt.before(text, pair).rstrip(" "), tokenizer)
            if len(ids) > room and not text and not pair:
                raise UserError(
                    f"{_FIELD}: takes {len(ids)} tokens without a text, where the model has room for {room}; "
                    "write a shorter one"
                )
        found.append(np.array([*begin, *ids], dtype=np.int32))
    return Prompted(found, choices, cut)


def choices_of(names: Sequence[str], prompt: Prompt, tokenizer: Any) -> tuple[Tokens, ...]:
    """The tokens of each label, behind what comes before it."""
    tail = prompt.tail
    anchor = tail.rstrip(" ") or "a"  # a word stands for the text, whose last word it would be
    spaces = tail[len(tail.rstrip(" ")) :]
    known = _ids(anchor, tokenizer)
    found: dict[bytes, str] = {}
    choices = []
    for name in names:
        ids = _ids(anchor + spaces + name, tokenizer)
        if ids[: len(known)] != known:
            raise UserError(
                f"{_FIELD}: the label '{name:.60}' melts into what comes before it; put a space or a line "
                "end before {label}"
            )
        own = np.array(ids[len(known) :], dtype=np.int32)
        if not len(own):
            raise UserError(f"{_FIELD}: the label '{name:.60}' has no token of its own; give it another name")
        if (other := found.setdefault(own.tobytes(), name)) != name:
            raise UserError(
                f"{_FIELD}: the labels '{other:.60}' and '{name:.60}' are the same tokens to this model, so "
                "it cannot tell them apart; give them other names, or take another model"
            )
        choices.append(own)
    return tuple(choices)


def _parts(template: str) -> list[tuple[str, str | None]]:
    """(text, name of the field behind it); what stands behind the last field has none."""
    found = []
    for literal, name, form, conversion in Formatter().parse(template):
        if form or conversion:
            raise ValueError(f"{{{name}}} has a form or a conversion, and is taken as it is")
        found.append((literal, name))
    return found


def _ids(text: str, tokenizer: Any) -> list[int]:
    with encoding():
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _shorter(text: str, pair: str | None, tokens: int, tokenizer: Any) -> tuple[str, str | None]:
    """Both texts, the longer one without so many tokens at its end."""
    first = pair is None or len(text) >= len(pair)
    longer = text if first else pair or ""
    with encoding():
        offsets = tokenizer(longer, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    kept = len(offsets["offset_mapping"]) - tokens
    end = offsets["offset_mapping"][kept - 1][1] if kept > 0 else 0
    longer = longer[: min(end, max(len(longer) - 1, 0))]
    return (longer, pair) if first else (text, longer)
