"""The Pareto front: which of some points no other point beats.

Method: a point is beaten ("dominated") when another is at least as good in every coordinate and
better in one. All coordinates are to be small; give the negative of what should be large.
Cost: points are looked at in order, each against the front so far: n log n, and n times the front's length.
Limits: it compares point estimates and knows nothing of intervals; equal points stay on the front together.
"""

from collections.abc import Sequence


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is nowhere worse (larger) than `other` and somewhere better."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices of the points that no other dominates, in their given order.

    >>> pareto_front([(1, 5), (2, 2), (3, 3), (5, 1)])
    [0, 1, 3]
    """
    front: set[tuple[float, ...]] = set()
    for point in sorted({tuple(point) for point in points}):  # none is dominated by a later one
        if not any(dominates(other, point) for other in front):
            front.add(point)
    return [index for index, point in enumerate(points) if tuple(point) in front]
