"""A conversation as the text its model was trained on, by the template that came with the model.

A template is a Jinja program from somebody else. It runs in Jinja's immutable sandbox, on plain data only,
with the names that `transformers` gives templates: messages, add_generation_prompt, bos_token and the like,
tojson, raise_exception, strftime_now, break and continue, and `generation` blocks, which mark what a training
would learn and here change nothing. The text it makes holds its special tokens as text: it is encoded
without adding any.
Limits: the default template of several; tools and documents are not passed.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from compress.errors import UserError
from compress.models.checkpoints import first_line, read_json

Message = Mapping[str, Any]

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def render(artifact: Path, messages: Sequence[Message]) -> str:
    """The text that the model continues with its reply to `messages`, each {"role": ..., "content": ...}.

    Raises:
        UserError: no template, no messages, one without a role, or the template refuses them.
    """
    if not messages:
        raise UserError("messages: there are none; give at least one, {'role': 'user', 'content': '...'}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise UserError(f"messages[{i}]: {message!r} has no 'role'; it is a mapping of role and content")
        if "content" not in message:
            raise UserError(f"messages[{i}]: has no 'content'")
    config = _config(artifact)
    source = _template(artifact, config)
    try:
        plain = json.loads(json.dumps(messages, default=dict))
    except (TypeError, ValueError) as error:
        raise UserError(f"messages: hold more than text, numbers and lists ({first_line(error)})") from None
    try:
        template = _environment().from_string(source)
        return template.render(
            messages=plain, add_generation_prompt=True, **_special_tokens(artifact, config)
        )
    except Exception as error:  # any a program can raise, and its own: roles that must alternate
        raise UserError(f"{artifact}: its chat template refuses the messages ({first_line(error)})") from None


def special_token(artifact: Path, role: str) -> str | None:
    """The text of a special token by its role, such as `eos_token`."""
    return _special_tokens(artifact, _config(artifact)).get(role)


def _config(artifact: Path) -> dict[str, Any]:
    file = artifact / _CONFIG
    return read_json(file, "") if file.is_file() else {}


def _template(artifact: Path, config: Mapping[str, Any]) -> str:
    file = artifact / _FILE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    source = config.get("chat_template")
    if isinstance(source, list):  # named ones, as older versions wrote them
        source = {entry.get("name"): entry.get("template") for entry in source}.get("default")
    if not isinstance(source, str):
        raise UserError(
            f"{artifact}: has no chat template ({_FILE}, or chat_template in {_CONFIG}), so it is no chat "
            "model; give a plain prompt"
        )
    return source


def _special_tokens(artifact: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> text; a token is written as its text or as a mapping with `content`."""
    older = artifact / "special_tokens_map.json"
    found = {**(read_json(older, "") if older.is_file() else {}), **config}
    tokens = {}
    for role in _ROLES:
        token = found.get(role)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            tokens[role] = text
    return tokens


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
