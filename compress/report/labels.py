"""Names beside markers: on which side of each, and which are better left out.

Method: one after the other, the most important first, each name takes that of eight spots around its marker
where it covers least of other markers, of names already there, and of what lies outside; a name that would
still cover too much is left out (the hover tells it), and so is one that stands close by already. Widths of
text are estimated. Cost: quadratic in the number of names, which is bounded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MOST = 24
_ASKED = 60  # names that are tried at all
_CHARACTER, _HEIGHT, _MARKER = 6.6, 14.0, 6.0  # pixels at the size that style.css gives names
_NEAR = 48.0  # pixels: the same variant in two runtimes is named once
_COVERED = 0.08  # of a name's area: with more it is left out
# anchor, shift right, shift down (to the baseline of the text), in pixels
_SPOTS = (
    ("start", 10, 4), ("end", -10, 4), ("middle", 0, -11), ("middle", 0, 20),
    ("start", 7, -7), ("start", 7, 15), ("end", -7, -7), ("end", -7, 15),
)  # fmt: skip

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Label:
    """A name to write: at a marker's place (shares of the picture, from the top left), shifted by pixels."""

    x: float
    y: float
    text: str
    anchor: str
    dx: int
    dy: int


def place(names: Sequence[tuple[float, float, str]], width: float, height: float) -> list[Label]:
    """Labels for (x, y, name), the most important first, in a picture of so many pixels.

    >>> [(label.text, label.anchor) for label in place([(0.1, 0.5, "int4"), (0.9, 0.5, "base")], 300, 300)]
    [('int4', 'start'), ('base', 'end')]
    >>> [label.anchor for label in place([(1.0, 0.5, "base")], 300, 300)]
    ['end']
    >>> len(place([(0.5, 0.5, "int4"), (0.5, 0.5, "int4")], 300, 300))
    1
    """
    at = [(x * width, y * height) for x, y, _ in names]
    spots = {(round(x), round(y)) for x, y in at}  # many may lie on one another
    taken: list[tuple[Box, tuple[float, float], str]] = []
    labels: list[Label] = []
    for index, (x, y, text) in enumerate(names[:_ASKED]):
        px, py = at[index]
        if len(labels) == MOST or any(
            there == text and (px - ox) ** 2 + (py - oy) ** 2 < _NEAR**2 for _, (ox, oy), there in taken
        ):
            continue
        wide = len(text) * _CHARACTER + 4
        others = [
            (ox - _MARKER, oy - _MARKER, ox + _MARKER, oy + _MARKER)
            for ox, oy in spots - {(round(px), round(py))}
            if abs(ox - px) < wide + 20 and abs(oy - py) < 40
        ]
        candidates = []
        for rank, (anchor, dx, dy) in enumerate(_SPOTS):
            left = px + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = (left, py + dy - _HEIGHT + 3, left + wide, py + dy + 3)
            covered = sum(_overlap(box, other) for other in others)
            covered += sum(2 * _overlap(box, other) for other, _, _ in taken)
            covered += wide * _HEIGHT - _overlap(box, (-8, 0, width + 8, height))
            candidates.append((covered + rank, rank, covered, box))
        _, rank, covered, box = min(candidates)
        if covered > _COVERED * wide * _HEIGHT:
            continue
        anchor, dx, dy = _SPOTS[rank]
        taken.append((box, (px, py), text))
        labels.append(Label(x, y, text, anchor, dx, dy))
    return labels


def _overlap(one: Box, other: Box) -> float:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return max(across, 0.0) * max(down, 0.0)
