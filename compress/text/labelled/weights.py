"""Against imbalance: weights of classes, and orders of rows in which rare ones come more often.

Balanced weights (King and Zeng 2001): w_c = n / (k n_c), of n labels in k classes, n_c of them in c; over the
data they average 1. A class without rows weighs 0.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from compress.errors import UserError
from compress.text.labelled.base import Row


def class_weights(rows: Sequence[Row], names: Sequence[str]) -> list[float]:
    """Of each name, in their order; of `tags` each word counts, of `classes` each name of a row."""
    counts = Counter(name for row in rows for name in _labels(row))
    if strange := sorted(set(counts) - set(names)):
        raise UserError(f"labelled: a row has the label '{strange[0]:.60}', which is none of the names")
    total, present = sum(counts.values()), sum(counts[name] > 0 for name in names)
    return [total / (present * counts[name]) if counts[name] else 0.0 for name in names]


def balanced_order(
    labels: Sequence[str], rng: np.random.Generator, strength: float = 1.0, rows: int | None = None
) -> list[int]:
    """Positions of rows in an order to train in: each class as often as n_c^(1 - strength) is of their sum.

    Strength 0 gives a permutation, 1 every class equally often. The rows of a class come round in turns: none
    comes a third time before each has come twice.

    Args:
        labels: one of each row.
        rng: draws the order.
        strength: from 0 to 1.
        rows: length of the order; as many as there are labels if none.
    """
    if not 0 <= strength <= 1:
        raise UserError(f"strength: {strength:g} given; it lies between 0 (as it is) and 1 (balanced)")
    length = len(labels) if rows is None else rows
    of: dict[str, list[int]] = {}
    for index, label in enumerate(labels):
        of.setdefault(label, []).append(index)
    if not of:
        return []
    share = np.array([len(found) ** (1 - strength) for found in of.values()])
    exact = length * share / share.sum()
    quota = np.floor(exact).astype(int)
    for index in np.argsort(quota - exact, kind="stable")[: length - quota.sum()]:  # largest remainders
        quota[index] += 1
    chosen: list[int] = []
    for found, count in zip(of.values(), quota.tolist(), strict=True):
        rounds = -(-count // len(found))
        turns = [rng.permutation(found) for _ in range(rounds)]
        chosen += np.concatenate(turns)[:count].tolist() if turns else []
    return [chosen[i] for i in rng.permutation(len(chosen))]


def _labels(row: Row) -> tuple[str, ...]:
    label = row.label
    return (label,) if isinstance(label, str) else tuple(label)  # type: ignore[arg-type]
