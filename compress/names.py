"""Wildcards over module names."""

import fnmatch
import re


def matches(name: str, pattern: str) -> bool:
    """Whether a module name fits a pattern: shell wildcards, or `re:` and a regular expression.

    >>> matches("model.layers.0.mlp.up_proj", "*.mlp.*")
    True
    >>> matches("model.layers.0.mlp.up_proj", "re:layers\\\\.[1-9]")
    False
    """
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return fnmatch.fnmatchcase(name, pattern)
