"""What the tests of damaged and hostile files share: how they are made, and how a refusal sounds."""

import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest

from compress.errors import UserError

SECONDS = 10.0  # a door that answers later than this hangs


def said(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    """The one line with which a call refuses, soon."""
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    line = str(caught.value)
    assert time.monotonic() - started < SECONDS
    assert line.isprintable()
    assert len(line) <= 1000
    assert not line.endswith(":")
    return line


def damaged(data: bytes, seed: int, end: int | None = None) -> bytes:
    """A copy with a bit flipped, cut, filled up or with another number, in its first `end` bytes."""
    chance, result = random.Random(seed), bytearray(data)
    place = chance.randrange(end or len(data))
    how = seed % 4
    if how == 0:
        result[place] ^= 1 << chance.randrange(8)
    elif how == 1:
        del result[place:]
    elif how == 2:
        result[place:place] = bytes(chance.randrange(256) for _ in range(3))
    else:
        numbers = list(re.finditer(rb"\d+", data[:end]))
        if numbers:
            found = chance.choice(numbers)
            others = (b"-1", b"0", b"16777216", b"10000000", b"9" * 5000, b"1e999", b"null", b'"x"', b"[]")
            result[found.start() : found.end()] = chance.choice(others)
    return bytes(result)
