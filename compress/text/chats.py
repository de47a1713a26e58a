"""Chats as tokens, by the model's own template: what its assistant says, and what comes before that.

A row is rendered whole, by the chat template that came with the tokenizer (template.py: sandboxed, in a
process of its own with limits), and cut into tokens without adding any, since a template writes its special
tokens itself. A target stands at each token that an answer's token follows: that token; elsewhere nothing is
asked. An answer is what the template writes for a turn of the assistant after its prompt for one, up to and
with the special token that ends it; line ends after that are no answer. A token with characters of both sides
of an answer's border belongs to it.

The day that a template may write is fixed, so that rows are the same tokens on every day. A row that is
longer than the model takes loses its end; one whose answers are all lost with it is left out. Both are
counted.

Imports no model library.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.tasks.base import UNKNOWN, Example

SPECIAL_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
DAY = "2025-01-01"  # that rows are of
_TOGETHER, _CHARACTERS = 512, 1 << 20  # chats, and characters of them, for one process

Message = Mapping[str, Any]
Spans = Sequence[tuple[int, int]]


class Rendered(NamedTuple):
    """A chat's text, and the [first, last + 1] characters of each answer in it."""

    text: str
    spans: Spans


@dataclass(frozen=True)
class ChatItems:
    """Chats as examples.

    Attributes:
        items: of each row its example; None where no answer is left of it.
        cut: how many were longer than the model takes.
    """

    items: list[Example | None]
    cut: int


def chat_items(chats: Sequence[Sequence[tuple[str, str]]], tokenizer: Any, longest: int) -> ChatItems:
    """Chats, each its messages as (role, content), for a model that takes so many tokens.

    Raises:
        UserError: the tokenizer has no template, or that refuses a chat, or writes no answer of it.
    """
    source, names = template_of(tokenizer), special_tokens(tokenizer)
    specials = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
    items: list[Example | None] = []
    cut = 0
    for part in _parts(chats):
        rendered = answered([[{"role": r, "content": c} for r, c in chat] for chat in part], source, names)
        with encoding():
            encoded = tokenizer(
                [text for text, _ in rendered], add_special_tokens=False, return_offsets_mapping=True,
                verbose=False,
            )  # fmt: skip
        for place, (chat, (text, spans)) in enumerate(zip(part, rendered, strict=True)):
            ids = np.array(encoded["input_ids"][place], dtype=np.int32)
            offsets = np.array(encoded["offset_mapping"][place], dtype=np.int64).reshape(-1, 2)
            spans = [(first, _end(text, first, last, specials)) for first, last in spans]
            following = _following(ids, offsets, spans)
            if not (following != UNKNOWN).any():
                raise UserError(
                    f"labelled: {_named(chat)} has no answer in what the chat template writes of it; leave "
                    "it out, or mend the template"
                )
            cut += len(ids) > longest
            targets = following[:longest].copy()
            targets[longest - 1 :] = UNKNOWN  # what would follow is not read
            known = bool((targets != UNKNOWN).any())
            items.append(Example(ids[:longest], targets) if known else None)
    return ChatItems(items, cut)


def template_of(tokenizer: Any) -> str:
    """The default chat template that came with a tokenizer.

    Raises:
        UserError: there is none.
    """
    source = getattr(tokenizer, "chat_template", None)
    source = source.get("default") if isinstance(source, Mapping) else source
    if not isinstance(source, str):
        raise UserError(
            "labelled: the model's tokenizer has no chat template, so chats cannot be written as it reads "
            "them; give a chat model, or put the template into chat_template.jinja beside its tokenizer"
        )
    return source


def special_tokens(tokenizer: Any) -> dict[str, str]:
    """Role -> text, of those that there are."""
    found = ((role, getattr(tokenizer, role, None)) for role in SPECIAL_TOKENS)
    return {role: str(token) for role, token in found if token is not None}


def answered(chats: Sequence[Sequence[Message]], source: str, names: Mapping[str, str]) -> list[Rendered]:
    """Chats with where their answers stand.

    Raises:
        UserError: names the chat that the template refuses.
    """
    given = {"source": source, "names": names, "chats": chats, "answers": True, "day": DAY}
    found = []
    for chat, answer in zip(chats, ask(given), strict=True):
        if "error" in answer:
            named = _named([(str(m["role"]), str(m["content"])) for m in chat])
            raise UserError(f"labelled: {named}: the chat template refuses it ({answer['error']})")
        found.append(Rendered(answer["text"], [(first, last) for first, last in answer["spans"]]))
    return found


def ask(given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the process of template.py answers, a value per chat; after one that it did not survive nothing is
    known, and that one has taken too much."""
    from compress.text import template  # here: whoever is measured reads this file, and renders nothing

    chats = given["chats"]
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-m", template.__name__],
            input=json.dumps(given),
            capture_output=True,
            encoding="utf-8",
            timeout=5 * template.SECONDS * len(chats),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        ).stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout or ""
        done = said.decode("utf-8", "replace") if isinstance(said, bytes) else said
    answers = [json.loads(line) for line in done.splitlines(keepends=True) if line.endswith("\n")]
    return [*answers, *[template.TOO_MUCH] * (len(chats) - len(answers))]


def _parts(chats: Sequence[Any]) -> Iterator[list[Any]]:
    """Some at a time: few enough for what one process may write."""
    part: list[Any] = []
    size = 0
    for chat in chats:
        characters = sum(len(content) for _, content in chat)
        if part and (len(part) == _TOGETHER or size + characters > _CHARACTERS):
            yield part
            part, size = [], 0
        part.append(chat)
        size += characters
    if part:
        yield part


def _end(text: str, first: int, last: int, specials: Sequence[str]) -> int:
    """Where an answer ends: behind its special token, without the line ends that a template puts after it."""
    answer = text[first:last].rstrip()
    return first + len(answer) if any(answer.endswith(token) for token in specials) else last


def _following(ids: NDArray[np.int32], offsets: NDArray[np.int64], spans: Spans) -> NDArray[np.int64]:
    """Of each token the next, where that is an answer's; UNKNOWN elsewhere. (length,)"""
    inside = np.zeros(len(ids), dtype=bool)
    for first, last in spans:
        inside |= (offsets[:, 0] < last) & (offsets[:, 1] > first)
    found = np.full(len(ids), UNKNOWN, dtype=np.int64)
    found[:-1] = np.where(inside[1:], ids[1:], UNKNOWN)
    return found


def _named(chat: Sequence[tuple[str, str]]) -> str:
    """By its first words, as a row is told from others."""
    first = next((content for _, content in chat), "")
    return f"the chat that begins with {first[:60]!r}"
