"""Chat templates, rendered in a process of its own that may take little: seconds, memory, length.

A template is a program from somebody else. Jinja's immutable sandbox keeps it from the machine, but not from
running for ever: loops in loops, `9**9**9`, a text doubled sixty times. So it runs here, where the system
counts its seconds and its memory, and whoever waits stops waiting.

This file is the program of that process: a JSON object in (`source`, `names`, `chats`, `prompt`, `answers`,
`day`), a line per chat out: `text`, or `error` with what the template said. With `answers` the lines have
`spans` besides, [first, last + 1] characters of each turn of the assistant. Where the template marks them, by
`{% generation %}`, they are what it marks. Else a turn is what the chat up to it has more than the chat
before it with a prompt to answer; that holds of templates which write the beginning of a chat as the
beginning of its text, which is looked at. It imports nothing of ours.
"""

import json
import re
import secrets
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from functools import cached_property
from math import ceil
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of the processor, for a chat
LONGEST = 1 << 24  # characters, of all chats together
_MEMORY_BYTES = 1 << 29
TOO_MUCH = {"error": f"it takes more than {SECONDS} s, or too much memory"}  # in the place of an answer
_ANSWERS = "assistant"  # whose turns they are

Messages = Sequence[Mapping[str, Any]]
Spans = list[tuple[int, int]]


def main() -> None:
    """Answer once per chat."""
    given = json.load(sys.stdin)
    renderer = Renderer(given["source"], given["names"], given.get("day"))
    written = 0
    for chat in given["chats"]:
        _bound()
        try:
            spans: Spans | None = None
            if given["answers"]:
                text, spans = renderer.answered(chat)
            else:
                text = renderer.text(chat, prompt=given["prompt"])
            written += len(text)
            answer: dict[str, Any] = {"text": text} if spans is None else {"text": text, "spans": spans}
            if written > LONGEST:
                answer = {"error": f"it writes {written:,} characters"}
        except MemoryError:
            answer = {"error": "it takes too much memory"}
        except Exception as error:  # any a program can raise, and its own: roles that must alternate
            answer = {"error": str(error).strip() or type(error).__name__}
        print(json.dumps(answer), flush=True)


class Renderer:
    """A template, without limits.

    Attributes:
        names: those of special tokens, `bos_token` and the like.
        day: what it takes for today, as 2025-01-31; None: the clock's.
    """

    def __init__(self, source: str, names: Mapping[str, str], day: str | None = None) -> None:
        self._source, self.names, self.day = source, names, day
        # around what a template marks as an answer: nobody's text can hold what nobody has seen
        self._begin, self._end = (f"\ue000{secrets.token_hex(8)}{side}\ue001" for side in "<>")

    def text(self, messages: Messages, *, prompt: bool) -> str:
        """What it writes of messages; `prompt`: and of a reply's beginning."""
        return self._plain.render(messages=messages, add_generation_prompt=prompt, **self.names)

    def answered(self, messages: Messages) -> tuple[str, Spans]:
        """What it writes of messages, and where the turns of the assistant stand in it.

        Raises:
            ValueError: that cannot be told.
        """
        marking = self._marking.environment.marks
        return self._marked(messages) if marking else self._prefixes(messages)

    def _marked(self, messages: Messages) -> tuple[str, Spans]:
        written = self._marking.render(messages=messages, add_generation_prompt=False, **self.names)
        spans, text, begun = Spans(), "", None
        for part in re.split(f"({self._begin}|{self._end})", written):
            if part == self._begin and begun is None:
                begun = len(text)
            elif part == self._end and begun is not None:
                spans.append((begun, len(text)))
                begun = None
            elif part in (self._begin, self._end):
                raise ValueError("its {% generation %} blocks lie in one another")
            else:
                text += part
        return text, spans

    def _prefixes(self, messages: Messages) -> tuple[str, Spans]:
        text, spans = self.text(messages, prompt=False), Spans()
        for turn, message in enumerate(messages):
            if message.get("role") != _ANSWERS:
                continue
            before = self.text(messages[:turn], prompt=True)
            after = self.text(messages[: turn + 1], prompt=False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    "it does not write the beginning of a chat as the beginning of the chat's text (message "
                    f"{turn + 1}), so where answers stand cannot be told; mark them by "
                    "{% generation %} ... {% endgeneration %}"
                )
            spans.append((len(before), len(after)))
        return text, spans

    @cached_property
    def _plain(self) -> Any:
        return self._environment("", "").from_string(self._source)

    @cached_property
    def _marking(self) -> Any:
        return self._environment(self._begin, self._end).from_string(self._source)

    def _environment(self, begin: str, end: str) -> Environment:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.extend(around=(begin, end), marks=False)
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = self._now
        return environment

    def _now(self, form: str) -> str:
        return (datetime.now() if self.day is None else datetime.fromisoformat(self.day)).strftime(form)


def _bound() -> None:
    """So much more time, and in all so much memory."""
    with suppress(ImportError):  # where systems do not count, the one who waits still does
        import resource

        more = ceil(time.process_time()) + SECONDS
        for kind, most in ((resource.RLIMIT_CPU, more), (resource.RLIMIT_AS, _MEMORY_BYTES)):
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` is what stands inside, between two marks."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The block, with a scope of its own."""
        line = next(parser.stream).lineno
        self.environment.marks = True  # type: ignore[attr-defined]
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        around = self.environment.around  # type: ignore[attr-defined]
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in around)
        return nodes.Scope([begin, *body, end], lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
