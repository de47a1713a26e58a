"""A chat template, rendered in a process of its own that may take little: seconds, memory, length.

A template is a program from somebody else. Jinja's immutable sandbox keeps it from the machine, but not from
running for ever: loops in loops, `9**9**9`, a text doubled sixty times. So it runs here, where the system
counts its seconds and its memory, and whoever waits stops waiting.

This file is the program of that process: a JSON object in (`source`, `messages`, `names`), one out (`text`,
or `error` with what the template said). It imports nothing of ours.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 2  # of the processor
LONGEST = 1 << 24  # characters
_MEMORY_BYTES = 1 << 29


def main() -> None:
    """Answer once."""
    _bound()
    given = json.load(sys.stdin)
    try:
        text = rendered(given["source"], given["messages"], given["names"])
        answer = {"text": text} if len(text) <= LONGEST else {"error": f"it writes {len(text):,} characters"}
    except MemoryError:
        answer = {"error": "it takes too much memory"}
    except Exception as error:  # any a program can raise, and its own: roles that must alternate
        answer = {"error": str(error).strip() or type(error).__name__}
    json.dump(answer, sys.stdout)


def rendered(source: str, messages: object, names: Mapping[str, str]) -> str:
    """What a template writes of messages; `names` are those of special tokens. It has no limits here."""
    template = _environment().from_string(source)
    return template.render(messages=messages, add_generation_prompt=True, **names)


def _bound() -> None:
    with suppress(ImportError):  # where systems do not count, the one who waits still does
        import resource

        for kind, most in ((resource.RLIMIT_CPU, SECONDS), (resource.RLIMIT_AS, _MEMORY_BYTES)):
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, (most, resource.getrlimit(kind)[1]))


def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


class _Generation(Extension):
    """`{% generation %} ... {% endgeneration %}` is what stands inside."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        """The block, with a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Without Jinja's escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)


if __name__ == "__main__":
    main()
