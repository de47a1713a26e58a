"""Coded: one step for a whole matrix, no clipping, and codes that take fewer bytes the more often they occur.

A grid of 2^b codes per group spends b bits on every weight, and its range on the few largest. Here the range
is free: w = (q - 128) * s with one step s for all rows, codes as far out as the weights go, written by an
arithmetic coder (streams.py). At any rate a uniform grid with ideal coding is 1.53 dB (a quarter of a
bit) from the best that any quantizer can do, whatever the weights' distribution; a clipped grid of groups is
4 to 5 dB from it (Gish, Pierce 1968). So the same bytes buy the accuracy of about half a bit more. GPTQ on
such a grid is the "Huffman-GPTQ" of WaterSIC (Lifar et al. 2026, arXiv 2603.04956); that paper's own steps
per column took another 3 to 10 % off most layers' errors on SmolLM2, but put outliers out of 8 bits' reach.

With `trellis` codes take turns between the even and the odd steps of a grid twice as fine (trellis.py), and
most of the 1.53 dB are won. Above 5 bits, where the fine steps would not reach far enough, codes are rounded
plainly; so they are under a mask, since an odd step is no zero.

`fit` finds the step at which the bytes come to `rate`, scales included. A row with a weight that would lie
more than 127 steps out gets a step of its own; the others are not touched by it.

In memory and in every runtime the codes are ordinary 8-bit ones with a scale per row: what gets small is the
file, what is resident is one byte a weight, and no kernel is needed that int8 does not have.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.formats.base import Format, Grid, Rounder, float16_exact, in_float32, require_reach
from compress.formats.coded.rate_control import RateControl
from compress.formats.coded.streams import ZERO, bits_per_weight, from_stream, to_stream, written_bits
from compress.formats.coded.trellis import RUN, follow
from compress.formats.integer import ColumnRounder, affine_codes, affine_places, affine_values

_ROUNDS = 8  # of the search; each is nearer by an order of magnitude while rates fall by a bit per doubling
_CORRECTIONS = 3  # for what codes of a trellis take more than plain ones
_LARGEST_CORRECTION = 0.5  # bits per weight
_CLOSE = 1e-3  # bits per weight
_FURTHEST = 127  # steps
_HIGHEST_TRELLIS_RATE = 5.0
_WIDEST = 8.0  # log2 of the factor that one round may move by


class Coded(Format):
    """A uniform grid whose codes are entropy-coded in the file."""

    bits: ClassVar[int] = 8
    affine: ClassVar[bool] = True
    fixed: ClassVar[str] = "clips nothing"
    streamed: ClassVar[bool] = True
    codes_move: ClassVar[bool] = False  # they follow the trellis together, and are as long as they are likely

    kind: Literal["coded"] = "coded"
    group: None = Field(None, description="the whole row")
    symmetric: Literal[True] = Field(True, description="there is no zero-point")
    clip_search: Literal[0] = Field(0, description="nothing is clipped")
    rate: float = Field(3.25, ge=1.5, le=7, description="bits per weight in the file, scales included")
    trellis: bool = Field(
        True, description="let codes take turns between two grids: 1 dB less error, some time more"
    )

    @property
    def nominal_bits(self) -> float:
        """The rate."""
        return self.rate

    @property
    def label(self) -> str:
        """With its rate."""
        return f"{self.kind} {self.rate:g}"

    @property
    def run(self) -> int:
        """Rows that go through the trellis together."""
        return RUN if self._takes_turns else 1

    @property
    def _takes_turns(self) -> bool:
        """Whether codes follow the trellis."""
        return self.trellis and self.rate <= _HIGHEST_TRELLIS_RATE

    def keeping_zeros(self) -> "Coded":
        """Without a trellis."""
        return self.model_copy(update={"trellis": False})

    def fitter(self, weights: int) -> RateControl:
        """What meets the rate over all matrices together."""
        return RateControl(weights)

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes in the file of a matrix (out, in) that meets the rate; in memory it takes those of int8."""
        return int(shape[0] * shape[1] * self.rate / 8)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The step that meets the rate when `weight` (out, in) is rounded to nearest; no importance enters.

        A matrix too small for the rate, whose stream is longer even with nothing but zeros in it, is rounded
        to zeros: such matrices are better left in another format.
        """
        grid, asked = self.fit_to(self.rate, weight), self.rate
        if not self._takes_turns:
            return grid
        for _ in range(_CORRECTIONS):
            excess = bits_per_weight(self.round(weight, grid), grid.scales) - self.rate
            if abs(excess) < _CLOSE:
                break
            asked = max(self.rate - _LARGEST_CORRECTION, min(asked - excess, self.rate + _LARGEST_CORRECTION))
            grid = self.fit_to(asked, weight)
        return grid

    def fit_to(self, rate: float, weight: Tensor) -> Grid:
        """The step for another rate, nearly: codes of a trellis are taken to need what plain ones do.

        That holds but for weights that crowd around zero, which no odd step stands for.
        """
        weight = in_float32(weight)
        largest = weight.abs().amax(1, keepdim=True)  # (out, 1)
        require_reach(self, largest / _FURTHEST)
        spacing = 2 if self._takes_turns else 1  # of the steps that a code chooses from
        step = float(weight.std(correction=0)) * 2.0 ** (2.0 - rate)
        for _ in range(_ROUNDS):
            grid = _grid(largest, step / spacing)
            plainly = self.codes(weight, Grid(spacing * grid.scales, grid.zeros))
            excess = written_bits(plainly, grid.scales) - rate
            if abs(excess) < _CLOSE or not step:
                break
            step *= 2.0 ** max(-_WIDEST, min(excess, _WIDEST))
        return grid

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest codes, of what is on the grid its own: (out, in) -> uint8 (out, in)."""
        return affine_codes(weight, grid, weight.shape[1], self.levels)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """The only meaning of a code: uint8 (out, in) -> float32 (out, in)."""
        return affine_values(codes, grid, codes.shape[1])

    def places(self, weight: Tensor, grid: Grid) -> Tensor:
        """Where weights (out, in) lie among the codes."""
        return affine_places(weight, grid, weight.shape[1])

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest codes, or the nearest way through the trellis: (out, in) -> uint8 (out, in)."""
        if not self._takes_turns:
            return self.codes(weight, grid)
        steps = follow(weight.float() / grid.scales, grid.scales.square(), -ZERO, _FURTHEST)
        return steps.add_(ZERO).to(torch.uint8)

    def column_rounder(self, grid: Grid, columns: int) -> Rounder:
        """What rounds a column at a time."""
        if self._takes_turns:
            return TrellisRounder(grid.scales, grid.scales.square())
        return ColumnRounder.on(grid, columns, self.levels)

    def to_stream(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Codes, uint8 (out, in), and scales, float16 (out, 1), entropy-coded: uint8 (bytes,)."""
        return to_stream(codes, scales)

    def from_stream(self, stream: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Undo `to_stream`."""
        return from_stream(stream, shape)

    def longest_stream(self, weight: Tensor) -> int:
        """Bytes of the stream of a matrix (out, in) at the finest steps that a byte a weight allows."""
        grid = _grid(weight.float().abs().amax(1, keepdim=True), 0.0)
        codes = self.codes(weight, grid)
        return int(bits_per_weight(codes, grid.scales) * codes.numel() / 8)


@dataclass(frozen=True)
class TrellisRounder:
    """Rounds one input column at a time to the nearest way; scales and weights are (out, 1)."""

    scales: Tensor
    weights: Tensor

    def __call__(self, column: Tensor, index: int) -> Tensor:
        """The allowed values nearest to `column` (out,)."""
        steps = follow(column[:, None] / self.scales, self.weights, -ZERO, _FURTHEST)
        return (steps * self.scales)[:, 0]


def _grid(largest: Tensor, step: float) -> Grid:
    """One step for all rows but those whose largest weight (out, 1) would lie too far out."""
    scales = float16_exact((largest / _FURTHEST).clamp(min=step))
    return Grid(scales, torch.full_like(largest, ZERO, dtype=torch.uint8))
