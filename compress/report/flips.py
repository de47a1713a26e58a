"""What changed beside the base, and where the labelled rows came from, for the page.

A variant is shown in the runtime that it ships in: its ONNX graph where that was measured, else the first
that was. Texts are cut where they are recorded; the templates escape them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from compress.records.flips import Change, Flip, FlipsRecord
from compress.records.run import RunRecord
from compress.report import units
from compress.report.rows import base_name
from compress.report.verdicts import runtime_name

_SHIPS = "onnxruntime"
_WHAT = {"labels": "decisions", "texts": "texts"}


@dataclass(frozen=True)
class ShownFlip:
    """A row of the worst flips; of a text without a marked word that is all `before_word`."""

    before_word: str
    word: str
    after_word: str
    pair: str
    label: str
    base: str
    now: str


@dataclass(frozen=True)
class Changed:
    """What one variant decides otherwise."""

    variant: str
    runtime: str
    summary: str
    changes: tuple[tuple[Change, str], ...]  # with a word for what it is
    rest: int  # changed decisions beyond those
    worst: tuple[ShownFlip, ...]
    what: str  # is decided
    title: str  # of the worst
    beside: str  # what stands in brackets


def changed(run: RunRecord) -> list[Changed]:
    """An entry per variant, in the order of the recipe."""
    shipped: dict[str, FlipsRecord] = {}
    for found in run.flips:
        known = shipped.get(found.variant)
        if known is None or (found.runtime == _SHIPS and known.runtime != _SHIPS):
            shipped[found.variant] = found
    order = [variant.name for variant in run.variants]
    names = sorted(shipped, key=lambda name: order.index(name) if name in order else len(order))
    # the base in another runtime is worth a table only where that changed something
    return [_shown(shipped[name]) for name in names if name != base_name(run) or shipped[name].changed]


def _shown(found: FlipsRecord) -> Changed:
    return Changed(
        variant=found.variant,
        runtime=runtime_name(found.runtime),
        summary=summary(found),
        changes=tuple((change, _effect(change)) for change in found.changes),
        rest=found.changed - sum(change.count for change in found.changes),
        worst=tuple(_row(flip) for flip in found.worst),
        what=_WHAT[found.what],
        title=_title(found),
        beside="ROUGE-L" if found.what == "texts" else "confidence",
    )


def _title(found: FlipsRecord) -> str:
    """What the worst are called."""
    count = len(found.worst)
    if found.what == "texts":
        return "The text that lost most" if count == 1 else f"The {count} texts that lost most"
    return "The worst flip" if count == 1 else f"The {count} worst flips"


def _effect(change: Change) -> str:
    if change.before == change.label:
        return "lost"
    return "gained" if change.now == change.label else "wrong otherwise"


def summary(found: FlipsRecord) -> str:
    """The counts in words."""
    if not found.changed:
        return f"all {found.decisions:,} {_WHAT[found.what]} are the base's"
    share = units.percent(found.changed / found.decisions)
    parts = [f"{found.lost:,} lost", f"{found.gained:,} gained"]
    if found.otherwise:
        parts.append(f"{found.otherwise:,} wrong in another way")
    what = _WHAT[found.what]
    return f"{found.changed:,} of {found.decisions:,} {what} changed ({share}): {', '.join(parts)}"


def _row(flip: Flip) -> ShownFlip:
    start, end = flip.word or (len(flip.text), len(flip.text))
    return ShownFlip(
        before_word=flip.text[:start],
        word=flip.text[start:end],
        after_word=flip.text[end:],
        pair=flip.pair or "",
        label=flip.label,
        base=f"{flip.before} ({units.percent(flip.confidence_before)})",
        now=f"{flip.now} ({units.percent(flip.confidence_now)})",
    )


def labelled_facts(notes: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """How labelled rows were read and divided, in words; what older records lack is left out."""
    if not notes:
        return []
    found = [("rows read", _counts(notes.get("read")))]
    found.append(("rows left out", _counts(notes.get("left_out"))))
    found.append(("rows used", _counts(notes.get("rows"))))
    found.append(("how they were divided", _split(notes.get("split"))))
    found.append(("near duplicates", _duplicates(notes.get("duplicates"))))
    found += [
        (f"in {name} and other parts", _overlap(told)) for name, told in (notes.get("overlaps") or {}).items()
    ]
    found.append(("not used", ", ".join(map(str, notes.get("unused") or ()))))
    found.append(("texts, long contexts in several", _counts(notes.get("examples"))))
    found.append(("texts cut off", _cut(notes.get("cut_off"), notes.get("longest"))))
    if notes.get("prompt"):
        found.append(("asked by", str(notes["prompt"])))
        found.append(("prompts cut off", f"{notes.get('prompts_cut_off') or 'none'}"))
    if notes.get("answer_tokens"):
        found.append(("tokens of answers, which alone count", _counts(notes["answer_tokens"])))
    if notes.get("answers_cut_off"):
        found.append(("chats left out, whose answers were cut off", _counts(notes["answers_cut_off"])))
    return [(name, text) for name, text in found if text]


_PARTS = {"train": "to train on", "heldout": "held out", "evaluation": "to judge by"}


def _counts(told: Any) -> str:
    if not isinstance(told, Mapping):
        return ""
    order = [name for name in _PARTS if name in told] + [name for name in told if name not in _PARTS]
    parts = [f"{told[name]:,} {_PARTS.get(name, name)}" for name in order if told[name]]
    return ", ".join(parts) or "none"


def _split(told: Any) -> str:
    if not isinstance(told, Mapping):
        return ""
    words = {"cut": "cut off what was read, each label in its share", "given": "given", "none": "none"}
    return "; ".join(f"{_PARTS.get(part, part)}: {words.get(how, how)}" for part, how in told.items())


def _duplicates(told: Any) -> str:
    if not isinstance(told, Mapping):
        return ""
    parts = [f"{told.get('same', 0):,} rows repeat a text", f"{told.get('near', 0):,} are nearly another's"]
    if told.get("other_labels"):
        parts.append(f"{told['other_labels']:,} texts have several labels")
    if told.get("proxies_left_out"):
        parts.append(f"{told['proxies_left_out']:,} rows of other sources left out for it")
    together = "; what is alike is in one part" if told.get("same") or told.get("near") else ""
    return ", ".join(parts) + together


def _overlap(told: Any) -> str:
    if not isinstance(told, Mapping):
        return ""
    alike, near = told.get("same", 0), told.get("near", 0)
    if not alike and not near:
        return "none"
    return f"{alike:,} texts the same, {near:,} nearly: scores on them flatter"


def _cut(told: Any, longest: Any) -> str:
    if not isinstance(told, Mapping):
        return ""
    limit = f" (longer than {longest:,} tokens)" if isinstance(longest, int) else ""
    return _counts(told) + (limit if any(told.values()) else "")
