"""What a picture is, and how it becomes HTML: shares of its area, so that it fits any width.

Method: a `Picture` says where everything lies as shares of the drawing area, from the top left. The template
`chart.html.j2` writes that as SVG with percentages, and as text for the numbers beside the axes: the browser
lays it out for the width that there is, in the colours of the theme, without a script. Only what must know
pixels is there twice: names beside markers, placed for a telephone's width and for that of a desk.
Colours are the style sheet's `--series-0` to `--series-7`, markers the page's `#mark-0` to `#mark-5`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from compress.report.labels import Label, place
from compress.report.scales import Scale

COLOURS, MARKERS = 8, 6
_NARROW, _WIDE, _HEIGHT = 300.0, 500.0, 300.0  # pixels that names are placed for
_GRID = 10_000  # units along the sides of a curve's own coordinates


@dataclass(frozen=True)
class Mark:
    """A measured point: its place, bars through it (left, right; top, bottom), and its line for the hover."""

    x: float
    y: float
    across: tuple[float, float] | None = None
    down: tuple[float, float] | None = None


@dataclass(frozen=True)
class Curve:
    """A line through points; a dashed one stands for the held-out text."""

    points: tuple[tuple[float, float], ...]
    dashed: bool = False

    @property
    def path(self) -> str:
        """As an SVG path on a square of 10,000 units."""
        return "M" + "L".join(f"{_GRID * x:.0f} {_GRID * y:.0f}" for x, y in self.points)


@dataclass(frozen=True)
class Series:
    """What the legend names and switches off."""

    name: str
    colour: int
    marker: int | None = None
    marks: tuple[Mark, ...] = ()
    curve: Curve | None = None


@dataclass(frozen=True)
class Picture:
    """A drawing of series over two axes.

    `hover` holds (x, y, number of the series, what to tell there) of every point that can be asked; what
    to tell is lines of text, or the number of an entry that several pictures share.
    """

    x: Scale
    y: Scale
    x_title: str
    y_title: str
    series: tuple[Series, ...]
    front: str = ""  # an SVG path
    better: str = ""
    narrow: tuple[Label, ...] = ()
    wide: tuple[Label, ...] = ()
    hover: tuple[tuple[float, float, int, list[str] | int], ...] = ()


def both_labels(names: Sequence[tuple[float, float, str]]) -> tuple[tuple[Label, ...], tuple[Label, ...]]:
    """The names of (x, y, name), the most important first, for a narrow picture and for a wide one."""
    return tuple(place(names, _NARROW, _HEIGHT)), tuple(place(names, _WIDE, _HEIGHT))


def stairs(corners: Sequence[tuple[float, float]], sideways_first: bool) -> str:
    """The path from corner to corner, sideways first or last: between two nothing better was measured."""
    if len(corners) < 2:
        return ""
    points = [corners[0]]
    for (x0, y0), (x1, y1) in pairwise(corners):
        points += [(x1, y0) if sideways_first else (x0, y1), (x1, y1)]
    return Curve(tuple(points)).path


def percent(share: float) -> str:
    """A share as SVG and CSS write it.

    >>> percent(0.5), percent(0.12345)
    ('50%', '12.35%')
    """
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + "%"
