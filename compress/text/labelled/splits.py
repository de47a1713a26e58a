"""Rows in three parts that share nothing, every label in its proportion.

Rows that are the same text, or nearly (duplicates.py), or of one group (a file, a query), go to one part
together.
The clusters of a label stand in an order that is drawn from the seed and their texts alone, so that the
order of the rows decides nothing. Evaluation takes its share of each label, what rounding leaves is
carried to the next label, then held-out; training gets the rest. A cluster that is larger than what is
still wanted of its label trains. A label that would be in another part and not in training is brought
there with its cluster.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from compress.text.labelled.duplicates import grouped


@dataclass
class _Cluster:
    key: str = ""
    rows: list[int] = field(default_factory=list)
    label: str = ""
    size: int = 0  # rows that are no proxies: what other parts would get


@dataclass(frozen=True)
class Cut:
    """Positions of the rows of each part, in their order, and of what is in none."""

    train: list[int]
    heldout: list[int]
    evaluation: list[int]
    left_out: list[int]
    duplicates: list[int]  # of each row, the first that it is a duplicate of, or nearly


def cut(
    forms: Sequence[str],
    labels: Sequence[tuple[str, ...]],
    seed: int,
    evaluation: int,
    heldout: int,
    *,
    groups: Sequence[str] = (),
    queries: Sequence[str] = (),
    proxy: Sequence[bool] = (),
) -> Cut:
    """Divide rows.

    Args:
        forms: normal form of each row.
        labels: names in each row's label; one empty name where labels are no names.
        seed: of the order.
        evaluation: rows wanted; there may be fewer, where clusters do not fit.
        heldout: rows wanted.
        groups: of each row, what must stay together besides; an empty one is none.
        queries: of each row, what must stay together, too.
        proxy: whether a row may train only; it is left out where its duplicate is in another part.
    """
    duplicates = grouped(forms)
    together = _joined(_joined(duplicates, groups), queries)
    clusters = _clusters(together, forms, labels, seed, proxy)
    strata: dict[str, list[_Cluster]] = defaultdict(list)
    for cluster in clusters:
        strata[cluster.label].append(cluster)
    part: dict[int, str] = {}
    for name, wanted in (("evaluation", evaluation), ("heldout", heldout)):
        _take(strata, name, wanted, part, sum(c.size for c in clusters))
    _cover(clusters, labels, part)
    by_row = {row: part.get(id(cluster), "train") for cluster in clusters for row in cluster.rows}
    found: dict[str, list[int]] = {"train": [], "heldout": [], "evaluation": [], "left_out": []}
    for row in range(len(forms)):
        place = by_row[row]
        found["left_out" if place != "train" and proxy and proxy[row] else place].append(row)
    return Cut(**found, duplicates=duplicates)


def _take(strata: dict[str, list[_Cluster]], name: str, wanted: int, part: dict[int, str], rows: int) -> None:
    """Give `name` its share of each stratum."""
    due, got = 0.0, 0
    for clusters in strata.values():
        free = [c for c in clusters if id(c) not in part and c.size]
        # what a label could not give is not taken from the next, only what rounding left
        due = min(due, got + 1.0) + wanted * sum(c.size for c in clusters) / max(rows, 1)
        for cluster in free:
            if got + cluster.size <= due + 0.5:
                part[id(cluster)] = name
                got += cluster.size


def _cover(clusters: list[_Cluster], labels: Sequence[tuple[str, ...]], part: dict[int, str]) -> None:
    """Bring into training what has a label that training lacks."""
    seen = {name for c in clusters if id(c) not in part for row in c.rows for name in labels[row]}
    for cluster in clusters:
        own = {name for row in cluster.rows for name in labels[row]}
        if id(cluster) in part and not own <= seen:
            del part[id(cluster)]
            seen |= own


def _clusters(
    together: list[int],
    forms: Sequence[str],
    labels: Sequence[tuple[str, ...]],
    seed: int,
    proxy: Sequence[bool],
) -> list[_Cluster]:
    """Each with a key that depends on the seed and its texts alone, and its rarest label; in order of key."""
    counts = Counter(name for names in labels for name in names)
    found: dict[int, _Cluster] = defaultdict(_Cluster)
    for row, first in enumerate(together):
        found[first].rows.append(row)
    for cluster in found.values():
        cluster.key = min(_digest(f"{seed}\0{forms[row]}") for row in cluster.rows)
        own = {name for row in cluster.rows for name in labels[row]}
        cluster.label = min(own, key=lambda name: (counts[name], name), default="")
        cluster.size = sum(not (proxy and proxy[row]) for row in cluster.rows)
    return sorted(found.values(), key=lambda c: c.key)


def _joined(first: list[int], groups: Sequence[str]) -> list[int]:
    """Clusters of texts and groups, closed."""
    if not groups:
        return first
    parent = list(range(len(first)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    begun: dict[str, int] = {}
    for row, other in enumerate(first):
        for with_it in (other, begun.setdefault(groups[row], row) if groups[row] else row):
            a, b = root(row), root(with_it)
            parent[max(a, b)] = min(a, b)
    return [root(row) for row in range(len(first))]


def sampled(keys: Sequence[str], labels: Sequence[tuple[str, ...]], seed: int, most: int) -> list[int]:
    """Positions of at most so many rows, in their order: one of every label first, then each label's share.

    `keys` decide the order with the seed; equal ones stand for each other.
    """
    if len(keys) <= most:
        return list(range(len(keys)))
    order = sorted(range(len(keys)), key=lambda row: (_digest(f"{seed}\0{keys[row]}"), row))
    counts = Counter(name for names in labels for name in names)
    strata: dict[str, list[int]] = defaultdict(list)
    taken: dict[int, None] = {}
    seen: set[str] = set()
    for row in order:
        strata[min(labels[row], key=lambda name: (counts[name], name), default="")].append(row)
        if not seen.issuperset(labels[row]) and len(taken) < most:
            taken[row] = None
            seen.update(labels[row])
    due, got = 0.0, 0
    for name in sorted(strata):
        due += most * len(strata[name]) / len(keys)
        for row in strata[name]:
            if got < int(due + 0.5) and len(taken) < most:
                taken[row] = None
                got += 1
    for row in order:  # what those that every label got first have crowded out
        if len(taken) >= most:
            break
        taken[row] = None
    return sorted(taken)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()
