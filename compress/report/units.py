"""Numbers as people read them: three significant digits, a unit on each, a dash for what is absent.

Method: every function takes a plain SI value (bytes, seconds, nats, counts) or None and returns text.
Sizes are decimal (1 MB = 10^6 bytes). The minus sign is the typographic one, so columns line up.
Limits: values below 10^-5 are shown as "<0.00001", negative ones as 0; use the raw records for more.
"""

import math

ABSENT = "–"
_SMALLEST = 1e-5


def significant(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, never in exponent form.

    >>> significant(0.031234), significant(12345.6), significant(99.96), significant(None)
    ('0.0312', '12,300', '100', '–')
    >>> significant(0.0), significant(3e-7), significant(-3e-7), significant(-2.5)
    ('0', '<0.00001', '0', '−2.50')
    """
    if value is None or not math.isfinite(value):
        return ABSENT
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude < _SMALLEST:
        return "<0.00001" if value > 0 else "0"
    exponent = math.floor(math.log10(magnitude))
    rounded = round(magnitude, digits - 1 - exponent)
    exponent = math.floor(math.log10(rounded))  # 99.96 became 100.0
    decimals = min(max(digits - 1 - exponent, 0), 5)
    text = f"{rounded:,.{decimals}f}" if rounded >= 10_000 else f"{rounded:.{decimals}f}"
    return text if value > 0 else "−" + text


def signed(value: float | None) -> str:
    """A difference, with its sign; anything below 10^-5 is 0.

    >>> signed(0.0312), signed(-0.5), signed(2e-7)
    ('+0.0312', '−0.500', '0')
    """
    if value is not None and abs(value) < _SMALLEST:
        return "0"
    text = significant(value)
    return text if value is None or value < 0 or text == ABSENT else "+" + text


def interval(bounds: tuple[float, float] | None, with_sign: bool = False) -> str:
    """A 95 % interval in brackets, or nothing.

    >>> interval((0.021, 0.0394)), interval((-0.1, 0.2), with_sign=True), interval(None)
    ('[0.0210, 0.0394]', '[−0.100, +0.200]', '')
    """
    if bounds is None:
        return ""
    write = signed if with_sign else significant
    return f"[{write(bounds[0])}, {write(bounds[1])}]"


def megabytes(value: int | None) -> str:
    """Bytes as a bare number of MB, for a column that carries the unit in its heading."""
    return significant(None if value is None else value / 1e6)


def size(value: float | None) -> str:
    """Bytes with a unit.

    >>> size(91_700_000), size(1234), size(None)
    ('91.7 MB', '1.23 kB', '–')
    """
    return _scaled(value, ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")))


def count(value: float | None) -> str:
    """How many, with k, M or G.

    >>> count(134_515_008), count(812), count(0)
    ('135 M', '812', '0')
    """
    return _scaled(value, ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, "")))


def duration(value: float | None) -> str:
    """Seconds with the unit that suits.

    >>> duration(0.00412), duration(75), duration(1234.0), duration(0)
    ('4.12 ms', '75.0 s', '20.6 min', '0 s')
    """
    if value is not None and 0 < value < 1:
        return _scaled(value, ((1e-3, "ms"), (1e-6, "µs")))
    return _scaled(
        value, ((3600.0, "h"), (60.0, "min"), (1.0, "s")) if value and value >= 120 else ((1.0, "s"),)
    )


def milliseconds(value: float | None) -> str:
    """Seconds as a bare number of milliseconds."""
    return significant(None if value is None else value * 1e3)


def percent(value: float | None) -> str:
    """A share as a percentage.

    >>> percent(0.8742), percent(1.0), percent(None)
    ('87.4 %', '100 %', '–')
    """
    return ABSENT if value is None else significant(value * 100) + " %"


def times(value: float | None, digits: int = 2) -> str:
    """A ratio.

    >>> times(5.93), times(0.48), times(12.4), times(None)
    ('5.9×', '0.48×', '12×', '–')
    """
    return ABSENT if value is None else significant(value, digits) + "×"


def _scaled(value: float | None, scales: tuple[tuple[float, str], ...]) -> str:
    if value is None or not math.isfinite(value):
        return ABSENT
    for scale, unit in scales:
        if abs(value) >= scale:
            return (
                f"{significant(value / scale)} {unit}".rstrip() if scale > 1 or unit != "" else _whole(value)
            )
    scale, unit = scales[-1]
    return f"{significant(value / scale)} {unit}".rstrip()


def _whole(value: float) -> str:
    return f"{value:.0f}" if value == int(value) else significant(value)
