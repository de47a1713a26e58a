"""Matrices in the format `coded` that are rounded one after another meet their rate together."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from compress.formats.base import Format, Grid
from compress.formats.coded.streams import bits_per_weight

_LARGEST_CORRECTION = 0.5  # bits per weight
_MARGIN = 0.002  # bits per weight left free, so that the last matrix does not overdraw
_NEW = 0.25  # of the last matrix in the mean of what solving adds


@runtime_checkable
class Rated(Protocol):
    """A format that can be fitted to another rate than its own."""

    def fit_to(self, rate: float, weight: Tensor) -> Grid:
        """The grid of `weight` (out, in) at which codes take `rate` bits each."""


class RateControl:
    """Holds the mean rate of matrices that are rounded one after another, each depending on those before.

    A solver moves weights before it rounds them, and what it gives takes some hundredths of a bit more than
    what `fit` saw. What was spent too much so far is saved on those that are left.

    Args:
        weights: how many there are in all matrices together.
    """

    def __init__(self, weights: int) -> None:
        self._left = weights
        self._excess = _MARGIN * weights  # bits
        self._added = 0.0  # by a solver, bits per weight, in the mean
        self._asked = 0.0

    def fit(self, format: Format, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """A grid of `weight` (out, in) for which the rate is likely to be met after solving."""
        assert isinstance(format, Rated)
        rate = format.nominal_bits
        wanted = rate - self._added - self._excess / max(self._left, 1)
        self._asked = max(rate - _LARGEST_CORRECTION, min(wanted, rate))
        return format.fit_to(self._asked, weight)

    def spent(self, format: Format, matrices: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Codes (out, in) and scales (out, 1) of what the last grid was for."""
        count = sum(codes.numel() for codes, _ in matrices)
        bits = sum(bits_per_weight(codes, scales) * codes.numel() for codes, scales in matrices)
        self._left -= count
        self._excess += bits - format.nominal_bits * count
        self._added += _NEW * (bits / count - self._asked - self._added)
