"""Chats as rows: `messages`, each {role, content}, of which the assistant's are the answers.

Roles are those that templates know: system, user, assistant. What a message holds besides (a name, a weight)
is left out and counted; tools and what they answer are not read.
"""

from collections import Counter
from typing import Any

from compress.errors import UserError
from compress.text.labelled.base import Row
from compress.text.rows import text_of

ANSWERS = "assistant"
ROLES = ("system", "user", ANSWERS)


def chat_of(messages: Any, place: str, where: str, left_out: Counter[str]) -> Row:
    """A row of messages.

    Raises:
        UserError: names the row and its message: no list, a role that is not known, a content that is no
            text or empty, nothing that the assistant says.
    """
    if not isinstance(messages, list):
        raise UserError(f"{where}: {place} has no list of messages; a chat is a list of {{role, content}}")
    said: list[tuple[str, str]] = []
    for number, message in enumerate(messages, start=1):
        here = f"{place}, message {number}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: {here} is no object; write {{role, content}}")
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"{where}: {here} has the role {role!r:.60}; known: {', '.join(ROLES)}")
        content = text_of(message.get("content"), here, where)
        if not content.strip():
            raise UserError(f"{where}: {here} has no content; leave the message out, or the row")
        left_out["other keys of messages"] += sum(
            value is not None and key not in ("role", "content") for key, value in message.items()
        )
        said.append((role, content))
    if not any(role == ANSWERS for role, _ in said):
        raise UserError(
            f"{where}: {place} has no message of the role '{ANSWERS}', so nothing in it is learnt; leave it "
            "out"
        )
    return Row("\n".join(content for _, content in said), tuple(said))
