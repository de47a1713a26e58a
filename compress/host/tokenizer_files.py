"""The door for `tokenizer.json`: bounded, and tried once, since some damage shows at the first use.

Its normalizer writes text for text: what it puts in may not be long, or a page of text becomes gigabytes.

Imports nothing heavy: the memory of whoever measures is reported.
"""

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from compress.errors import UserError, door
from compress.host.files import VOCABULARY_BYTES, read_bytes

_LONGEST = 1000  # characters that a normalizer may put in the place of others


def tokenizer_file(file: Path) -> Any:
    """The tokenizer of a file, which neither cuts nor pads.

    Raises:
        UserError: no such file, or a damaged one; the library, written in Rust, raises or panics.
    """
    from tokenizers import Tokenizer

    content = read_bytes(file, VOCABULARY_BYTES)
    with door(f"{file}: cannot be read", "copy or download it again"):
        tokenizer = Tokenizer.from_buffer(content)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        require_short(tokenizer, file)
        tokenizer.decode(tokenizer.encode("a b").ids)
    return tokenizer


def encoding() -> AbstractContextManager[None]:
    """While it cuts a text: an expression of a tokenizer may give up on one, in Rust's way."""
    return door("its tokenizer cannot cut a text", "see the expressions in tokenizer.json")


def require_short(tokenizer: Any, place: object) -> None:
    """Refuse a tokenizer (of the library `tokenizers`) that writes much for little.

    Raises:
        UserError: its normalizer puts in more than a thousand characters at a time.
    """
    waiting = [json.loads(tokenizer.normalizer.__getstate__())] if tokenizer.normalizer is not None else []
    while waiting:
        held = waiting.pop()
        for key, value in held.items() if isinstance(held, dict) else enumerate(held):
            if isinstance(value, dict | list):
                waiting.append(value)
            elif key in ("content", "prepend") and isinstance(value, str) and len(value) > _LONGEST:
                raise UserError(f"{place}: its normalizer puts in {len(value):,} characters at a time")
