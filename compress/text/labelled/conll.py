"""CoNLL columns: a word a line, its tag in the last column, a blank line after each sentence.

Columns are parted by tabs where a line has one, else by spaces. `-DOCSTART-` lines and comments (`# name =`,
`# id`) before a sentence are skipped.
"""

import re
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from compress.errors import UserError

_SKIPPED = re.compile(r"-DOCSTART-|#\s*(\w+\s*[=:]|id\s|text\s|sent_id\s)")


def sentences(
    content: str, file: Path, where: str, left_out: Counter[str]
) -> Iterator[tuple[int, list[str], list[str]]]:
    """Number of the first line, words, tags.

    `left_out` counts `empty words` (lines with a tag only) and `empty sentences` (a blank line more between
    two, or no word in it).

    Raises:
        UserError: a word without a tag.
    """
    lines = list(enumerate(content.split("\n"), start=1))  # only there: words hold odd line ends
    runs = [(filled, list(run)) for filled, run in groupby(lines, key=lambda line: bool(line[1].strip()))]
    for index, (filled, run) in enumerate(runs):
        if not filled:
            left_out["empty sentences"] += (len(run) - 1) * (0 < index < len(runs) - 1)
            continue
        told = len(run)
        while run and _SKIPPED.match(run[0][1]):
            run = run[1:]
        pairs = [_word(line, f"{where}: {file}:{number}") for number, line in run]
        full = [pair for pair in pairs if pair[0]]
        left_out["empty words"] += len(pairs) - len(full)
        if full:
            yield run[0][0], [word for word, _ in full], [tag for _, tag in full]
        elif len(run) == told:
            left_out["empty sentences"] += 1


def _word(line: str, place: str) -> tuple[str, str]:
    """A word and its tag; no word where a line has a tag only."""
    if "\t" in line:
        fields = [entry.strip() for entry in line.split("\t")]
    else:
        fields = line.split()
        if len(fields) == 1 and line[0].isspace():
            return "", fields[0]
    if len(fields) < 2 or not fields[-1]:
        raise UserError(
            f"{place} has a word and no tag ('{fields[0]:.60}'); write both, with a tab between, and a blank "
            "line after each sentence"
        )
    return fields[0], fields[-1]
