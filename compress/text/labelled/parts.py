"""Rows that were read to rows in parts: labels checked, what is not given cut off, shares and limits kept."""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

from compress.errors import UserError
from compress.tasks.sequence_classification import RELEVANCE
from compress.text.labelled.base import NAMED, Kind, Row, names_of
from compress.text.labelled.config import LabelledConfig
from compress.text.labelled.duplicates import found_in, normal_form
from compress.text.labelled.labels import MOST_NAMES, ordered
from compress.text.labelled.reading import Part
from compress.text.labelled.splits import Cut, cut, sampled


def require_names(rows: Sequence[Row], kind: Kind, source: str) -> None:
    """Refuse labels that nothing can be learnt from; `rows` are all that might train.

    Raises:
        UserError: a single label, or so many that they look like texts.
    """
    if kind == "number" and len(rows) > 1 and len({row.label for row in rows}) == 1:
        raise UserError(
            f"labelled.label: all {len(rows):,} rows of {source} have the number {rows[0].label:g}, of which "
            "nothing can be learnt; give rows of several"
        )
    if kind not in NAMED:
        return
    counts = Counter(name for row in rows for name in names_of(row))
    if len(counts) > MOST_NAMES:
        raise UserError(
            f"labelled.label: {source} has {len(counts):,} distinct labels, such as "
            f"'{next(iter(counts)):.40}', where at most {MOST_NAMES:,} are taken: it looks like text; set "
            "labelled.kind to text or number, or labelled.label to another column"
        )
    if len(counts) < (1 if kind == "classes" else 2):
        alone = f"'{next(iter(counts)):.40}' alone" if counts else "no label"
        raise UserError(
            f"labelled.source: all {len(rows):,} rows of {source} have {alone}; give rows of two labels"
        )
    if kind == "class" and len(counts) == len(rows) > 2:
        raise UserError(
            f"labelled.label: each of the {len(rows):,} rows of {source} has a label of its own, such as "
            f"'{next(iter(counts)):.40}': it looks like text; set labelled.kind to text, or "
            "labelled.label to another column"
        )


def divided(
    read: Mapping[str, Part],
    given: Sequence[str],
    kind: Kind,
    config: LabelledConfig,
    seed: int,
    notes: dict[str, Any],
) -> dict[str, Part]:
    """The three parts; `notes` gets `split`, how each came about, and `duplicates` of the rows that were cut.

    Raises:
        UserError: nothing can be cut off.
    """
    rows = read["train"]
    forms = _forms(rows)
    proxy = [config.sources[source].proxy for source in rows.sources]
    wanted = {
        name: 0 if name in given else _wanted(config, name, len(rows.rows) - sum(proxy))
        for name in ("evaluation", "heldout")
    }
    split = dict.fromkeys(given, "given")
    parts = {name: read[name] for name in given}
    train = list(range(len(rows.rows)))
    if any(wanted.values()):
        groups = rows.groups if any(rows.groups) else ()
        found = cut(
            forms, _strata(rows, kind), seed, wanted["evaluation"], wanted["heldout"],
            groups=groups, queries=_queries(rows, kind), proxy=proxy if any(proxy) else (),
        )  # fmt: skip
        for name, positions in (("evaluation", found.evaluation), ("heldout", found.heldout)):
            if wanted[name] and not positions:
                raise UserError(
                    f"labelled.{name}: none of the {len(rows.rows):,} rows of {config.named} can be cut off, "
                    "since every label keeps a text to train on; give more rows, or a file of its own"
                )
            if wanted[name]:
                parts[name] = rows.take(positions)
                split[name] = "cut"
        train = found.train
        notes["duplicates"] = _told(rows, forms, found)
    for name in given:
        parts[name] = _limited(parts[name], kind, seed, getattr(config, f"{name}_rows"))
    if config.mixed:
        train = _mixed(train, rows, forms, kind, config, seed)
    parts["train"] = _limited(rows.take(train), kind, seed, config.train_rows)
    parts.setdefault("heldout", Part())
    notes["split"] = {name: split.get(name, "none") for name in ("heldout", "evaluation")}
    return parts


def _wanted(config: LabelledConfig, name: str, rows: int) -> int:
    share, most = getattr(config, f"{name}_share"), getattr(config, f"{name}_rows")
    wanted = max(1, round(rows * share)) if share else 0
    return wanted if most is None else min(most, wanted)


def _strata(part: Part, kind: Kind) -> list[tuple[str, ...]]:
    if kind not in NAMED:
        return [("",)] * len(part.rows)
    return [names_of(row) or ("",) for row in part.rows]


def _queries(part: Part, kind: Kind) -> list[str]:
    """The first text of each row, where rows are asked for by it: of pairs that belong together, and where
    most first texts stand beside several second ones with numbers, or with 0 and 1; else none."""
    if any(row.pair is None for row in part.rows):
        return []
    found = [normal_form(row.text) for row in part.rows]
    if kind == "pair":
        return found
    told = kind == "number" or (kind == "class" and {row.label for row in part.rows} <= set(RELEVANCE))
    return found if told and 2 * len(set(found)) <= len(found) else []


def _forms(part: Part) -> list[str]:
    return [normal_form(row.text, row.pair) for row in part.rows]


def _limited(part: Part, kind: Kind, seed: int, most: int | None) -> Part:
    if most is None or len(part.rows) <= most:
        return part
    return part.take(sampled(_forms(part), _strata(part, kind), seed, most))


def _mixed(
    train: list[int], part: Part, forms: list[str], kind: Kind, config: LabelledConfig, seed: int
) -> list[int]:
    """As many training rows as there are in the shares that the sources are to have, no row twice."""
    of: dict[int, list[int]] = defaultdict(list)
    for row in train:
        of[part.sources[row]].append(row)
    shares = {number: source.share for number, source in enumerate(config.sources)}
    if empty := [config.sources[number].source for number in shares if not of[number]]:
        raise UserError(f"labelled.source: {empty[0]} leaves no rows to train on; take it out of the mixture")
    total = min(len(of[number]) / share for number, share in shares.items())
    strata, kept = _strata(part, kind), list[int]()
    for number, share in shares.items():
        rows = of[number]
        most = max(1, round(total * share))
        chosen = sampled([forms[row] for row in rows], [strata[row] for row in rows], seed, most)
        kept += [rows[i] for i in chosen]
    return sorted(kept)


def named_labels(parts: Mapping[str, Part], kind: Kind, known: tuple[str, ...]) -> tuple[str, ...]:
    """Names in the order of their numbers: `known` ones as the source has them, else those of training.

    Raises:
        UserError: another part has a name that training has not.
    """
    if kind not in NAMED:
        return ()
    seen = {name for row in parts["train"].rows for name in names_of(row)}
    for part in ("evaluation", "heldout"):
        for row, place in zip(parts[part].rows, parts[part].places, strict=True):
            if unseen := [name for name in names_of(row) if name not in seen]:
                raise UserError(
                    f"labelled.{part}: {place} has the label '{unseen[0]:.60}', which no row has that "
                    "trains; take such rows out, or train on rows that have it"
                )
    return known or ordered(seen)


def _told(part: Part, forms: Sequence[str], found: Cut) -> dict[str, Any]:
    """What was kept together: facts on duplicates among the rows that were cut."""
    distinct: dict[str, int] = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for index, form in enumerate(forms):
        distinct.setdefault(form, found.duplicates[index])
        labels[form].add(repr(part.rows[index].label))
    sizes = Counter(found.duplicates)
    example = next(
        (index for index, first in enumerate(found.duplicates) if forms[first] != forms[index]), None
    )
    return {
        "same": len(forms) - len(distinct),  # rows whose text another has before
        "near": len(distinct) - len(sizes),  # texts that are near to another before
        "largest": max(sizes.values()),  # rows that are kept together
        "other_labels": sum(len(found) > 1 for found in labels.values()),  # texts with several labels
        "example": None if example is None else _example(part, example, part, found.duplicates[example]),
        "proxies_left_out": len(found.left_out),
    }


def overlaps(parts: Mapping[str, Part], given: Sequence[str]) -> dict[str, Any]:
    """Rows of a given part whose text, or nearly the same, another part has; nothing is moved."""
    told: dict[str, Any] = {}
    forms = {name: _forms(part) for name, part in parts.items()}
    for name, others in (("evaluation", ("train", "heldout")), ("heldout", ("train",))):
        if not parts[name].rows or not (name in given or set(others) & set(given)):
            continue
        theirs = Part()
        for other in others:
            theirs.extend(parts[other])
        found = found_in(forms[name], [form for other in others for form in forms[other]])
        pairs = [(row, match) for row, match in enumerate(found) if match is not None]
        same = sum(_forms(theirs.take([match])) == [forms[name][row]] for row, match in pairs)
        told[name] = {
            "with": list(others),
            "same": same,
            "near": len(pairs) - same,
            "example": _example(parts[name], pairs[0][0], theirs, pairs[0][1]) if pairs else None,
        }
    return told


def _example(part: Part, row: int, other: Part, match: int) -> dict[str, str]:
    return {
        "place": part.places[row],
        "text": part.rows[row].text[:200],
        "like_place": other.places[match],
        "like": other.rows[match].text[:200],
    }


def digest(rows: Sequence[Row]) -> str:
    """SHA-256 of rows with their labels."""
    found = hashlib.sha256()
    for row in rows:
        found.update(json.dumps(astuple(row)).encode() + b"\n")
    return found.hexdigest()
