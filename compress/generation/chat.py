"""A conversation as the text its model was trained on, by the template that came with the model.

A template is a Jinja program from somebody else. It runs in Jinja's immutable sandbox, in a process of its
own with limits (template.py), on plain data only, with the names that `transformers` gives templates:
messages, add_generation_prompt, bos_token and the like, tojson, raise_exception, strftime_now, break and
continue, and `generation` blocks, which mark what a training would learn and here change nothing. The text it
makes holds its special tokens as text: it is encoded without adding any.
Limits: the default template of several; tools and documents are not passed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compress.errors import UserError, reason
from compress.host.files import read_json, read_text
from compress.text import template
from compress.text.chats import SPECIAL_TOKENS, Message, ask

_FILE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"


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
        raise UserError(f"messages: hold more than text, numbers and lists ({reason(error)})") from None
    return _rendered(artifact, source, plain, _special_tokens(artifact, config))


def special_token(artifact: Path, role: str) -> str | None:
    """The text of a special token by its role, such as `eos_token`."""
    return _special_tokens(artifact, _config(artifact)).get(role)


def _config(artifact: Path) -> dict[str, Any]:
    file = artifact / _CONFIG
    return read_json(file) if file.is_file() else {}


def _template(artifact: Path, config: Mapping[str, Any]) -> str:
    file = artifact / _FILE
    if file.is_file():
        return read_text(file)
    source = config.get("chat_template")
    if isinstance(source, list):  # named ones, as older versions wrote them
        named = [entry for entry in source if isinstance(entry, Mapping)]
        source = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
    if not isinstance(source, str):
        raise UserError(
            f"{artifact}: has no chat template ({_FILE}, or chat_template in {_CONFIG}), so it is no chat "
            "model; give a plain prompt"
        )
    return source


def _special_tokens(artifact: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Role -> text; a token is written as its text or as a mapping with `content`."""
    older = artifact / "special_tokens_map.json"
    found = {**(read_json(older) if older.is_file() else {}), **config}
    tokens = {}
    for role in SPECIAL_TOKENS:
        token = found.get(role)
        text = token.get("content") if isinstance(token, Mapping) else token
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def _rendered(artifact: Path, source: str, messages: object, names: Mapping[str, str]) -> str:
    """What the template writes, in a process that ends when it takes too long."""
    given = {"source": source, "names": names, "chats": [messages], "prompt": True, "answers": False}
    (answer,) = ask(given)
    if answer == template.TOO_MUCH:
        raise UserError(
            f"{artifact}: its chat template takes more than {template.SECONDS} s, or too much memory; give a "
            "plain prompt"
        )
    if "error" in answer:
        raise UserError(f"{artifact}: its chat template refuses the messages ({answer['error']})")
    return str(answer["text"])
