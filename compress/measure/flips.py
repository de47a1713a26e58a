"""What changed beside the base: the confusion of decisions, and the worst of those that were lost.

A decision is a text's label, its set of labels, a word's label, or which text is found first for another.
It has changed where it is not the
base's; it is lost where the base's was right and this one is not. The worst are those with the largest
product of both confidences, the base's in what was right and the variant's in what is wrong: there nothing
warns. Of a set of labels the confidence is the product over labels, which are independent sigmoids. An answer
in a context counts among the changes as right, in part right, another or none, and among the worst as it is.
Texts that are written are decisions of another kind (changed_texts.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from compress.errors import UserError
from compress.host.tokenizer_files import encoding
from compress.measure.changed_texts import CHARACTERS, CUT, changed_texts, cut
from compress.measure.quality import Scores
from compress.measure.turns import Target
from compress.records.flips import Change, Flip, FlipBook, FlipsRecord
from compress.records.results import Result
from compress.tasks.answers import NO_PLACE
from compress.tasks.decisions import Decisions, Judged
from compress.tasks.question_answering import QUESTION_ANSWERING, Answers
from compress.tasks.registry import task_named
from compress.tasks.retrieval import RETRIEVAL, Ranked
from compress.text.examples import SPAN, Examples, LabelledRow
from compress.text.labelled.base import Row
from compress.text.windows import Windows

MOST_CHANGES = 20
WORST = 10
_CANDIDATE = 120  # characters of one that stands in the place of a label
NONE = "none"  # of a set without labels
RIGHT, PART, OTHER, NO_ANSWER = "the answer", "part of it", "another answer", "no answer"


class _Decision(NamedTuple):
    text: int  # number of the example
    place: int  # which of the text's decisions
    label: str
    before: str
    now: str
    confidence_before: float
    confidence_now: float
    shown: tuple[str, str, str] | None = (
        None  # label, before and now, where those above stand for kinds of it
    )


class Flips:
    """What was found so far, of this call and of earlier ones.

    It is kept in a file and outlives a call that is cut off.
    """

    def __init__(
        self, file: Path, windows: Windows | Examples, tokenizer: Any, earlier: Iterable[FlipsRecord]
    ) -> None:
        self._file, self._tokenizer = file, tokenizer
        self._examples = windows if isinstance(windows, Examples) else None
        kept: list[FlipsRecord] = []
        with suppress(UserError):  # of another version, or absent
            kept = FlipBook.read(file).flips
        self._found = {(each.variant, each.runtime): each for each in (*earlier, *kept)}

    def keep(self, target: Target, scores: Scores, base: Scores) -> None:
        """A target has been scored."""
        if self._examples is None:
            return
        found = flips_of(target, scores, base, self._examples, self._tokenizer)
        if found is not None:
            self._found[target.variant, target.runtime] = found
            FlipBook(flips=list(self._found.values())).write(self._file)

    def covers(self, result: Result) -> bool:
        """Whether what a result counts as flips is known one by one."""
        found = self._found.get((result.variant, result.runtime))
        return result.flips is None or (found is not None and found.fingerprint == result.fingerprint)

    def of(self, results: Sequence[Result]) -> list[FlipsRecord]:
        """Those of these results, in their order."""
        keys = [(r.variant, r.runtime) for r in results if r.flips is not None]
        return [self._found[key] for key in keys if key in self._found]

    def forget(self) -> None:
        """The file has served."""
        self._file.unlink(missing_ok=True)


def flips_of(
    target: Target, scores: Scores, base: Scores, examples: Examples, tokenizer: Any
) -> FlipsRecord | None:
    """What a target decides otherwise than the base on the same texts; None where nothing can flip.

    `tokenizer`: the one that cut the examples, which tells what words carry a label.
    """
    if examples.kind == "text":
        return changed_texts(target, scores, base, examples)
    if examples.kind not in ("class", "classes", "tags", "pair", SPAN):
        return None
    ours, theirs = (_judged(each) for each in (scores, base))
    if ours is None or theirs is None:
        return None
    if examples.kind == "pair":
        ours = replace(ours, names=tuple(cut(text, _CANDIDATE) for text in examples.texts))
    if examples.kind == SPAN:
        count, changed = len(examples.rows), list(_answers(ours, theirs, examples))
    else:
        decisions = list(_decisions(ours, theirs, examples.kind == "classes"))
        count, changed = len(decisions), [each for each in decisions if each.before != each.now]
    lost = [each for each in changed if each.before == each.label]
    gained = sum(each.now == each.label for each in changed)
    counts = Counter((each.label, each.before, each.now) for each in changed)
    most = sorted(counts.items(), key=lambda found: (-found[1], found[0]))[:MOST_CHANGES]
    worst = sorted(lost, key=lambda each: -each.confidence_before * each.confidence_now)[:WORST]
    return FlipsRecord(
        variant=target.variant, runtime=target.runtime, fingerprint=target.fingerprint,
        decisions=count, lost=len(lost), gained=gained,
        otherwise=len(changed) - len(lost) - gained,
        changes=[Change(label=a, before=b, now=c, count=count) for (a, b, c), count in most],
        worst=[_flip(each, examples, tokenizer, ours) for each in worst],
    )  # fmt: skip


def _judged(scores: Scores) -> Judged | None:
    task = task_named(scores.task)
    if task is None:
        return None
    if isinstance(task.scoring, Decisions):
        return task.scoring.judged(asdict(scores))
    return RETRIEVAL.judged(asdict(scores)) if scores.pairs else None


def _decisions(ours: Judged, theirs: Judged, sets: bool) -> Iterator[_Decision]:
    names = ours.names
    for number, right in enumerate(ours.targets):
        now, before = (each.decisions[number] for each in (ours, theirs))
        if (theirs.targets[number] == before).all():
            right = before  # where several are right, the one that was found
            now = before if (ours.targets[number] == now).all() else now
        sure, was_sure = (each.confidences[number] for each in (ours, theirs))
        if sets:
            told = [
                ", ".join(n for n, on in zip(names, row, strict=True) if on) for row in (right, before, now)
            ]
            label, was, is_now = (each or NONE for each in told)
            yield _Decision(number, 0, label, was, is_now, was_sure.prod(), sure.prod())
            continue
        for place in range(len(right)):
            label, was, is_now = (names[int(row[place])] for row in (right, before, now))
            yield _Decision(number, place, label, was, is_now, was_sure[place], sure[place])


def _answers(ours: Judged, theirs: Judged, examples: Examples) -> Iterator[_Decision]:
    """Those that changed."""
    now, before = Answers.of(ours), Answers.of(theirs)
    for number in np.flatnonzero(QUESTION_ANSWERING.scoring.differ(ours, theirs)):
        text = int(now.text[number])
        row = examples.rows[examples.order[text]]
        right = row.label[0][1] if row.label else ""
        label = RIGHT if row.label else NO_ANSWER
        told = [_told(each, int(number), label) for each in (before, now)]
        said = [_text(each, int(number), row.pair or "") for each in (before, now)]
        place = row.label[0][0] if row.label else max(0, int(max(before.first[number], now.first[number])))
        yield _Decision(
            text, place, label, told[0], told[1],
            float(before.confidence[number]), float(now.confidence[number]),
            (cut(right) or NO_ANSWER, cut(said[0]) or NO_ANSWER, cut(said[1]) or NO_ANSWER),
        )  # fmt: skip


def _told(answers: Answers, number: int, label: str) -> str:
    """What kind of answer one is; `label`: of the right one."""
    if answers.exact[number]:
        return label
    if answers.first[number] == NO_PLACE:
        return NO_ANSWER
    return PART if answers.f1[number] else OTHER


def _text(answers: Answers, number: int, context: str) -> str:
    return context[max(0, answers.first[number]) : max(0, answers.last[number])]


def _flip(found: _Decision, examples: Examples, tokenizer: Any, judged: Judged) -> Flip:
    if isinstance(judged, Ranked):
        row: LabelledRow = Row(examples.texts[judged.queries[found.text]], "")
    else:
        row = examples.rows[examples.order[found.text]]
    text, word, pair = cut(row.text), None, None if row.pair is None else cut(row.pair)
    if examples.kind == "tags":
        text, word = marked(row.words, _word(row, found.place, tokenizer))
    if examples.kind == SPAN and row.pair is not None:
        pair = _around(row.pair, found.place, found.place + len(found.shown[0] if found.shown else ""))[0]
    label, before, now = found.shown or (found.label, found.before, found.now)
    return Flip(
        text=text, pair=pair, word=word, label=label, before=before, now=now,
        confidence_before=float(found.confidence_before), confidence_now=float(found.confidence_now),
    )  # fmt: skip


def _word(row: LabelledRow, place: int, tokenizer: Any) -> int:
    """Which word a decision is of: a word of which the tokenizer makes nothing carries no label."""
    with encoding():
        words = tokenizer([list(row.words)], is_split_into_words=True, verbose=False).word_ids(0)
    return int(list(dict.fromkeys(word for word in words if word is not None))[place])


def marked(words: Sequence[str], place: int) -> tuple[str, tuple[int, int]]:
    """A sentence of at most `CHARACTERS`, and where the word numbered `place` stands in it.

    >>> marked(["to", "New", "York"], 1)
    ('to New York', (3, 6))
    """
    start = sum(len(word) + 1 for word in words[:place])
    return _around(" ".join(words), start, start + len(words[place]))


def _around(text: str, start: int, end: int) -> tuple[str, tuple[int, int]]:
    """At most `CHARACTERS` of a text, and where its characters from `start` to `end` stand in them."""
    first = max(0, min(start - CHARACTERS // 2, len(text) - CHARACTERS)) if end > CHARACTERS else 0
    shown, before = text[first : first + CHARACTERS], CUT if first else ""
    after = CUT if first + CHARACTERS < len(text) else ""
    shift = len(before) - first
    return f"{before}{shown}{after}", (start + shift, min(end, first + CHARACTERS) + shift)
