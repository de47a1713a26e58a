"""What changed beside the base where texts are written: how many, and those that lost most.

A text has changed where it is not the base's, but for white space; it is lost where the base's was the target
and this one is not. Since few texts are their target word for word, the worst are those whose score, ROUGE-L,
fell furthest.
"""

from __future__ import annotations

import numpy as np

from compress.measure.quality import Scores
from compress.measure.turns import Target
from compress.records.flips import Flip, FlipsRecord
from compress.tasks.written import alike, row_scores
from compress.text.examples import Examples

WORST = 10
CHARACTERS = 300  # of a text
CUT = "…"


def changed_texts(target: Target, scores: Scores, base: Scores, examples: Examples) -> FlipsRecord | None:
    """What a target writes otherwise than the base of the same sources; None where nothing was written."""
    if not scores.written or not base.written or scores.wanted is None:
        return None
    now, before = ([text for text, _ in each] for each in (scores.written, base.written))
    differ = [not alike(a, b) for a, b in zip(now, before, strict=True)]
    hit, was_hit = (
        [alike(text, right) for text, right in zip(each, scores.wanted, strict=True)]
        for each in (now, before)
    )
    lost = sum(was and not is_now for was, is_now in zip(was_hit, hit, strict=True))
    gained = sum(is_now and not was for was, is_now in zip(was_hit, hit, strict=True))
    own, theirs = (row_scores(texts, scores.wanted) for texts in (now, before))
    order = np.argsort(own - theirs, kind="stable")[:WORST].tolist()
    worst = [
        Flip(
            text=cut(examples.rows[examples.order[number]].text), label=cut(scores.wanted[number]),
            before=cut(before[number]), now=cut(now[number]),
            confidence_before=float(theirs[number]), confidence_now=float(own[number]),
        )
        for number in order
        if own[number] < theirs[number]
    ]  # fmt: skip
    return FlipsRecord(
        variant=target.variant, runtime=target.runtime, fingerprint=target.fingerprint,
        decisions=len(now), lost=lost, gained=gained, otherwise=sum(differ) - lost - gained,
        worst=worst, what="texts",
    )  # fmt: skip


def cut(text: str, most: int = CHARACTERS) -> str:
    """Its beginning."""
    return text if len(text) <= most else text[:most] + CUT
