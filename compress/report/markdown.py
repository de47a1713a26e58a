"""Escaping for Markdown: a value stays a value, whatever it contains."""

import re

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def escape_markdown(value: object) -> str:
    """Text that GitHub's Markdown shows as it is, on one line, also inside a table.

    >>> escape_markdown("a|b<script>_x_")
    'a\\\\|b\\\\<script\\\\>\\\\_x\\\\_'
    """
    return _SPECIAL.sub(r"\\\1", visible(" ".join(str(value).split())))


def visible(text: str) -> str:
    r"""Text in which what would move a cursor, change colours or turn the direction is spelled out.

    >>> visible("a\x1b[31mb\tc")
    'a\\x1b[31mb\tc'
    """
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
