"""NF4: sixteen values spaced as a normal distribution is, times the largest magnitude of each block of 64.

The values are the quantiles of N(0, 1) at equal steps of probability, 8 above zero and 7 below, scaled to
[-1, 1], with zero itself among them:

    w = value[q] * s,        s = max |w| of the block.

Dettmers et al. 2023 (QLoRA), arXiv 2305.14314, section 3 and appendix E. The scale is a float16 here, and a
float32 in bitsandbytes, so values differ from that library's by half a unit of float16 at most.
Cost per weight: 4 + 16/64 bits.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.formats.base import Format, Grid, float16_exact, in_float32, require_reach

_STEPS = torch.special.ndtri  # the inverse of the normal distribution function
_OFFSET = 0.9677083  # probability at which the outermost value lies: the mean of 1 - 1/32 and 1 - 1/30
_ZERO = 7


def quantiles() -> Tensor:
    """The sixteen values, rising, float32.

    >>> quantiles()[[0, 7, 15]].tolist()
    [-1.0, 0.0, 1.0]
    """
    positive = _STEPS(torch.linspace(_OFFSET, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -_STEPS(torch.linspace(_OFFSET, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat((positive, negative, torch.zeros(1, dtype=torch.float64))).sort().values
    return (values / values.max()).float()


class Nf4(Format):
    """Sixteen normal quantiles, blocks of 64."""

    bits: ClassVar[int] = 4

    kind: Literal["nf4"] = "nf4"
    group: int | None = Field(64, ge=16, description="columns that share a scale; null: the whole row")
    symmetric: Literal[True] = Field(True, description="there is no zero-point")
    clip_search: Literal[0] = Field(0, description="the scale is the largest magnitude")

    @property
    def zero(self) -> int:
        """The code of 0: seven are below it."""
        return _ZERO

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The largest magnitude of each block; `importance` changes nothing."""
        weight = in_float32(weight)
        out, columns = weight.shape
        width = self.group_width(columns)
        padding = self.groups(columns) * width - columns
        largest = torch.nn.functional.pad(weight, (0, padding)).view(out, -1, width).abs().amax(2)
        require_reach(self, largest)
        scales = float16_exact(largest)
        return Grid(scales, torch.full_like(scales, _ZERO, dtype=torch.uint8))

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest of the sixteen: (out, in) -> uint8 (out, in)."""
        scales, _ = grid.columns(self.group_width(weight.shape[1]), weight.shape[1])
        return _nearest(weight.float() / scales, _midpoints(weight.device)).to(torch.uint8)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """The only meaning of a code: uint8 (out, in) -> float32 (out, in)."""
        scales, _ = grid.columns(self.group_width(codes.shape[1]), codes.shape[1])
        return quantiles().to(codes.device)[codes.int()] * scales

    def places(self, weight: Tensor, grid: Grid) -> Tensor:
        """Where weights (out, in) lie among the codes: at k on code k, between two in proportion.

        >>> grid = Grid(torch.ones(1, 1), torch.full((1, 1), 7, dtype=torch.uint8))
        >>> weight = torch.tensor([[-1.0, 0.0, (0.72295684 + 1) / 2, 1.0]])
        >>> Nf4().places(weight, grid).round(decimals=3).tolist()
        [[0.0, 7.0, 14.5, 15.0]]
        """
        scales, _ = grid.columns(self.group_width(weight.shape[1]), weight.shape[1])
        values, scaled = quantiles().to(weight.device), weight.float() / scales
        above = torch.bucketize(scaled, values).clamp(1, self.levels - 1)
        below = values[above - 1]
        return above - 1 + (scaled - below) / (values[above] - below)

    def column_rounder(self, grid: Grid, columns: int) -> "NormalRounder":
        """What a solver needs to round one column at a time."""
        return NormalRounder(self.group_width(columns), grid.scales.T.contiguous())


class NormalRounder:
    """Rounds one input column at a time; scales are (groups, out)."""

    def __init__(self, width: int, scales: Tensor) -> None:
        self.width, self.scales = width, scales
        self.values, self.between = quantiles().to(scales.device), _midpoints(scales.device)

    def __call__(self, column: Tensor, index: int) -> Tensor:
        """The value nearest to `column` (out,), the column numbered `index`."""
        scale = self.scales[index // self.width]
        return self.values[_nearest(column / scale, self.between)] * scale


def _midpoints(device: torch.device) -> Tensor:
    values = quantiles().to(device)
    return (values[1:] + values[:-1]) / 2


def _nearest(scaled: Tensor, between: Tensor) -> Tensor:
    return torch.bucketize(scaled.contiguous(), between)
