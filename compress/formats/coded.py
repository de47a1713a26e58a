"""Coded: one step for a whole matrix, no clipping, and codes that take fewer bytes the more often they occur.

A grid of 2^b codes per group spends b bits on every weight, and its range on the few largest. Here the range
is free: w = (q - 128) * s with one step s for all rows, codes as far out as the weights go, written by an
arithmetic coder (entropy_coding.py). At any rate a uniform grid with ideal coding is 1.53 dB (a quarter of a
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

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compress.errors import UserError
from compress.formats import entropy_coding
from compress.formats.integer import ColumnRounder, Grid, IntegerFormat, float16_exact
from compress.formats.trellis import doubled, follow, halved

_ROUNDS = 8  # of the search; each is nearer by an order of magnitude while rates fall by a bit per doubling
_CLOSE = 1e-3  # bits per weight
_ZERO, _FURTHEST = 128, 127
_HIGHEST_TRELLIS_RATE = 5.0
_LARGEST_CORRECTION = 0.5  # bits per weight
_MARGIN = 0.002  # bits per weight left free, so that the last matrix does not overdraw
_NEW = 0.25  # of the last matrix in the mean of what solving adds
_HEAD = 9  # bytes of a stream before its parts
_WIDEST = 8.0  # log2 of the factor that one round may move by


class Coded(IntegerFormat):
    """A uniform grid whose codes are entropy-coded in the file."""

    bits: ClassVar[int] = 8
    kind: Literal["coded"] = "coded"
    rate: float = Field(3.25, ge=1.5, le=7, description="bits per weight in the file, scales included")
    trellis: bool = Field(
        True, description="let codes take turns between two grids: 1 dB less error, some time more"
    )
    group: None = Field(None, description="the whole row")
    symmetric: Literal[True] = Field(True, description="there is no zero-point")
    clip_search: Literal[0] = Field(0, description="nothing is clipped")

    def keeping_zeros(self) -> "Coded":
        """Without a trellis."""
        return self.model_copy(update={"trellis": False})

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes in the file of a matrix (out, in) that meets the rate; in memory it takes those of int8."""
        return int(shape[0] * shape[1] * self.rate / 8)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The step that meets the rate when `weight` (out, in) is rounded to nearest; no importance enters.

        A matrix too small for the rate, whose stream is longer even with nothing but zeros in it, is rounded
        to zeros: such matrices are better left in another format.
        """
        return self.fit_to(self.rate, weight)

    def fit_to(self, rate: float, weight: Tensor) -> Grid:
        """As `fit`, for another rate."""
        weight = weight.float()
        largest = weight.abs().amax(1, keepdim=True)  # (out, 1)
        apart = 2 if takes_turns(self) else 1  # steps between neighbours that a code chooses from
        step = float(weight.std(correction=0)) * 2.0 ** (2.0 - rate)
        for _ in range(_ROUNDS):
            grid = _grid(largest, step / apart)
            # plainly rounded, since a code of the trellis takes as many bits
            plainly = super().codes(weight, Grid(apart * grid.scales, grid.zeros))
            excess = _bits_per_weight(plainly, grid.scales) - rate
            if abs(excess) < _CLOSE or not step:
                break
            step *= 2.0 ** max(-_WIDEST, min(excess, _WIDEST))
        return grid

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest codes, or the nearest way through the trellis: (out, in) -> uint8 (out, in)."""
        if not takes_turns(self):
            return super().codes(weight, grid)
        steps = follow(weight.float() / grid.scales, grid.scales.square(), -_ZERO, _FURTHEST)
        return steps.add_(_ZERO).to(torch.uint8)

    def column_rounder(self, grid: Grid, columns: int) -> "ColumnRounder | TrellisRounder":  # type: ignore[override]
        """What rounds a column at a time."""
        if takes_turns(self):
            return TrellisRounder(grid.scales, grid.scales.square())
        return super().column_rounder(grid, columns)


def takes_turns(format: IntegerFormat) -> bool:
    """Whether codes of a format follow the trellis."""
    return isinstance(format, Coded) and format.trellis and format.rate <= _HIGHEST_TRELLIS_RATE


@dataclass(frozen=True)
class TrellisRounder:
    """Rounds one input column at a time to the nearest way; scales and weights are (out, 1)."""

    scales: Tensor
    weights: Tensor

    def __call__(self, column: Tensor, index: int) -> Tensor:
        """The allowed values nearest to `column` (out,)."""
        steps = follow(column[:, None] / self.scales, self.weights, -_ZERO, _FURTHEST)
        return (steps * self.scales)[:, 0]


def to_stream(codes: Tensor, scales: Tensor) -> Tensor:
    """What a matrix of this format is in a file: codes, uint8 (out, in), scales, float16 (out, 1) -> uint8.

    Four bytes are the CRC-32 of all others, one tells of a trellis, four are the length of the next part,
    little-endian; then the scales, their low bytes before their high ones in a zlib stream, since most are
    alike; then the codes (entropy_coding.py).
    """
    halves = halved(codes.to(torch.int16) - _ZERO)
    packed = _packed(scales)
    head = bytes([halves is not None]) + len(packed).to_bytes(4, "little") + packed
    body = head + entropy_coding.encode(_written(codes, halves))
    stream = zlib.crc32(body).to_bytes(4, "little") + body
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def from_stream(stream: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Undo `to_stream`: codes, uint8 (out, in), and scales, float16 (out, 1).

    Raises:
        UserError: the stream is damaged, or holds a matrix of another shape.
    """
    raw = stream.contiguous().numpy().tobytes()
    if len(raw) < _HEAD or zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
        raise UserError("its stream is damaged")
    start = _HEAD + int.from_bytes(raw[5:_HEAD], "little")
    try:
        scales = _unpacked(raw[_HEAD:start], shape[0])
        codes = torch.from_numpy(entropy_coding.decode(raw[start:], shape))
    except (ValueError, zlib.error) as error:
        raise UserError(f"its stream is not of a matrix {shape[0]}x{shape[1]} ({error})") from None
    if raw[4]:
        codes = (doubled(codes.to(torch.int16) - _ZERO) + _ZERO).to(torch.uint8)
    return codes, scales


def bits_per_weight(codes: Tensor, scales: Tensor) -> float:
    """What codes (out, in) and scales (out, 1) of this format take in the file."""
    return _bits_per_weight(_written(codes, halved(codes.to(torch.int16) - _ZERO)), scales)


def longest_stream(weight: Tensor) -> int:
    """Bytes in the file of a matrix (out, in) at the finest steps that a byte a weight allows."""
    grid = _grid(weight.float().abs().amax(1, keepdim=True), 0.0)
    codes = Coded(rate=7).codes(weight, grid)
    return int(bits_per_weight(codes, grid.scales) * codes.numel() / 8)


def _grid(largest: Tensor, step: float) -> Grid:
    """One step for all rows but those whose largest weight (out, 1) would lie too far out."""
    scales = float16_exact((largest / _FURTHEST).clamp(min=step))
    return Grid(scales, torch.full_like(largest, _ZERO, dtype=torch.uint8))


def _bits_per_weight(written: Tensor, scales: Tensor) -> float:
    stream = _HEAD + len(_packed(scales)) + entropy_coding.stream_bytes(written)
    return 8 * stream / written.numel()


def _written(codes: Tensor, halves: Tensor | None) -> Tensor:
    return codes if halves is None else (halves + _ZERO).to(torch.uint8)


def _packed(scales: Tensor) -> bytes:
    planes = scales.detach().cpu().numpy().astype("<f2").reshape(-1, 1).view(np.uint8).T
    return zlib.compress(planes.tobytes(), 9)


def _unpacked(data: bytes, rows: int) -> Tensor:
    coder = zlib.decompressobj()
    planes = np.frombuffer(coder.decompress(data, 2 * rows + 1), np.uint8).reshape(2, rows)
    if not coder.eof or coder.unused_data:
        raise ValueError("scales of another length")
    return torch.from_numpy(planes.T.copy().view("<f2").astype(np.float16))


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

    def fit(self, format: Coded, weight: Tensor) -> Grid:
        """A grid of `weight` (out, in) for which the rate is likely to be met after solving."""
        wanted = format.rate - self._added - self._excess / max(self._left, 1)
        self._asked = max(format.rate - _LARGEST_CORRECTION, min(wanted, format.rate))
        return format.fit_to(self._asked, weight)

    def spent(self, format: Coded, matrices: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Codes (out, in) and scales (out, 1) of what the last grid was for."""
        count = sum(codes.numel() for codes, _ in matrices)
        bits = sum(bits_per_weight(codes, scales) * codes.numel() for codes, scales in matrices)
        self._left -= count
        self._excess += bits - format.rate * count
        self._added += _NEW * (bits / count - self._asked - self._added)
