"""Axes: where a value lies between the ends of an axis, and which round numbers are written beside it.

Method: a `Scale` maps values to shares of an axis, 0 at its low end and 1 at its high end, evenly or by
logarithm. On a logarithmic scale what is not positive (the base's own KL is 0) lies on a strip below the
lowest decade, whose tick says so. Ticks are multiples of 1, 2 or 5 times a power of ten.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

_DECADES_WITH_TWO_AND_FIVE = 2.0  # a longer axis has room for powers of ten only


@dataclass(frozen=True)
class Tick:
    """A number beside an axis; `at` is a share of its length."""

    at: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` to `high`; values below `floor` are drawn at `floor`."""

    low: float
    high: float
    ticks: tuple[Tick, ...]
    logarithmic: bool = False
    floor: float = -math.inf

    def share(self, value: float) -> float:
        """Where a value lies, held within the axis.

        >>> linear_scale([0.0, 10.0], room=0).share(2.5)
        0.25
        """
        return _share(max(value, self.floor), self.low, self.high, self.logarithmic)


def linear_scale(
    values: Sequence[float], *, room: float = 0.1, write: Callable[[float, float], str] | None = None
) -> Scale:
    """An even axis around values, with `room` (a share of their spread) on the sides that are not 0.

    >>> [tick.text for tick in linear_scale([0, 9.3]).ticks]
    ['0', '2', '4', '6', '8', '10']
    """
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    low = low - room * spread if low else 0.0
    high = high + room * spread if high else 0.0
    high = high if high > low else low + 1.0  # all values are 0
    ticks = (Tick(_share(at, low, high, False), (write or plain)(at, step)) for at, step in _round(low, high))
    return Scale(low, high, tuple(ticks))


def log_scale(values: Iterable[float], below: str) -> Scale:
    """Decades, with a strip below for what is not positive, whose tick reads `below`.

    >>> [tick.text for tick in log_scale([0.0, 0.02, 3.0], "0").ticks]
    ['0', '0.01', '0.1', '1']
    >>> scale = log_scale([0.0, 0.02, 3.0], "0")
    >>> scale.share(0.0) == scale.share(-1.0) == scale.ticks[0].at
    True
    """
    positive = [value for value in values if value > 1e-6]
    smallest, largest = (min(positive), max(positive)) if positive else (0.1, 1.0)
    bottom = math.floor(math.log10(smallest))
    top = max(math.log10(largest) + 0.35, bottom + 1.2)
    floor, low, high = 10.0 ** (bottom - 0.5), 10.0 ** (bottom - 0.8), 10.0**top
    factors = (1, 2, 5) if top - bottom <= _DECADES_WITH_TWO_AND_FIVE else (1,)
    marks = [factor * 10.0**power for power in range(bottom, math.floor(top) + 1) for factor in factors]
    ticks = [Tick(_share(floor, low, high, True), below)]
    ticks += [Tick(_share(mark, low, high, True), _decimal(mark)) for mark in marks if mark <= high]
    return Scale(low, high, tuple(ticks), logarithmic=True, floor=floor)


def plain(value: float, step: float) -> str:
    """A tick's number with as many decimals as its step has.

    >>> plain(0.30000000000000004, 0.1), plain(-5.0, 5.0), plain(12000.0, 2000.0)
    ('0.3', '−5', '12,000')
    """
    text = f"{abs(value):,.{max(0, -math.floor(math.log10(step)))}f}"
    return f"−{text}" if value < 0 else text


def thousands(value: float, step: float) -> str:
    """A tick's count in k, M or G.

    >>> thousands(1_500_000, 500_000), thousands(0, 500), thousands(800, 200)
    ('1.5 M', '0', '800')
    """
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:g} {letter}"
    return f"{value:g}"


def _share(value: float, low: float, high: float, logarithmic: bool) -> float:
    if logarithmic:
        value, low, high = math.log10(value), math.log10(low), math.log10(high)
    return min(max((value - low) / (high - low), 0.0), 1.0)


def _round(low: float, high: float, most: int = 6) -> list[tuple[float, float]]:
    """(value, step) of at most `most` + 1 round numbers between the ends."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(index * step, step) for index in range(first, last + 1)]


def _decimal(value: float) -> str:
    return f"{value:.{max(0, -math.floor(math.log10(value) + 1e-9))}f}"
