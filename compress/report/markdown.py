"""Escaping for Markdown: a value stays a value, whatever it contains."""

import re

_SPECIAL = re.compile(r"([\\`*_\[\]<>|#~])")


def escape_markdown(value: object) -> str:
    """Text that GitHub's Markdown shows as it is, on one line, also inside a table.

    >>> escape_markdown("a|b<script>_x_")
    'a\\\\|b\\\\<script\\\\>\\\\_x\\\\_'
    """
    return _SPECIAL.sub(r"\\\1", " ".join(str(value).split()))
