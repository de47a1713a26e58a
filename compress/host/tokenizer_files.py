"""The door for `tokenizer.json`: bounded, and tried once, since some damage shows at the first use.

Imports nothing heavy: the memory of whoever measures is reported.
"""

from pathlib import Path
from typing import Any

from compress.errors import door
from compress.host.files import VOCABULARY_BYTES, read_bytes


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
        tokenizer.decode(tokenizer.encode("a b").ids)
    return tokenizer
