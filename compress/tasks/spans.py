"""Spans: what an encoder-decoder learns from plain text (Raffel et al. 2020, section 3.1.4).

Of a window 15 % of the tokens are taken out, in spans of 3 on average; the source has one sentinel in the
place of each span, and the target gives each sentinel and the tokens that it stands for, then the end. For a
window of a given length both have a fixed length.

    source   x x <0> x x x <1> x </s>          target   <0> y y y <1> y y </s>
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

NOISE, SPAN = 0.15, 3.0

Rows = npt.NDArray[np.int64]


def spans_of(length: int, noise: float = NOISE, span: float = SPAN) -> tuple[int, int]:
    """(tokens that are taken out, spans) of a window of so many tokens.

    >>> spans_of(100)
    (15, 5)
    """
    taken = min(max(round(length * noise), 1), length - 1)
    return taken, min(max(round(taken / span), 1), taken, length - taken)


def take_out(
    rows: Rows, draws: Sequence[np.random.Generator], sentinels: Sequence[int], end: int | None
) -> tuple[Rows, Rows]:
    """Sources (rows, length - taken + spans + 1) and targets (rows, taken + spans + 1).

    Args:
        rows: windows (rows, length).
        draws: a generator per row.
        sentinels: in their order; one per span is needed.
        end: of a text; None where the tokenizer writes none.
    """
    taken, count = spans_of(rows.shape[1])
    tail = [] if end is None else [end]
    sources, targets = [], []
    for row, draw in zip(rows, draws, strict=True):
        gone = _parts(taken, count, draw)  # tokens of each span
        left = _parts(rows.shape[1] - taken, count, draw)  # and of what stands before it
        source: list[int] = []
        target: list[int] = []
        place = 0
        for number, (before, inside) in enumerate(zip(left, gone, strict=True)):
            source += [*row[place : place + before], sentinels[number]]
            target += [sentinels[number], *row[place + before : place + before + inside]]
            place += before + inside
        sources.append([*source, *tail])
        targets.append([*target, *tail])
    return np.array(sources, dtype=np.int64), np.array(targets, dtype=np.int64)


def _parts(total: int, count: int, draw: np.random.Generator) -> list[int]:
    """So many positive numbers with a sum, every way as likely as any other."""
    cuts = np.sort(draw.permutation(total - 1)[: count - 1] + 1)
    return np.diff(np.concatenate([[0], cuts, [total]])).tolist()
