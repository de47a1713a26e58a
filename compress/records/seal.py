"""A record that says whether it is still what was written: the hash of its values is one of them.

Imports nothing heavy: runtimes without pydantic open artifacts, too.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SEAL = "seal"


def seal_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of what JSON says but for the seal, whatever its spaces and the order of its names.

    >>> seal_of({"a": 1, "b": 2}) == seal_of({"b": 2, "seal": "x", "a": 1})
    True
    """
    rest = {name: value for name, value in content.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
