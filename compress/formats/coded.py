"""Coded: one step for a whole matrix, no clipping, and codes that take fewer bytes the more often they occur.

A grid of 2^b codes per group spends b bits on every weight, and its range on the few largest. Here the range
is free: w = (q - 128) * s with one step s for all rows, codes as far out as the weights go, written in a
prefix code (entropy_coding.py). At any rate a uniform grid with ideal coding is 1.53 dB (a quarter of a bit)
from the best that any quantizer can do, whatever the weights' distribution; a clipped grid of groups is 4 to
5 dB from it (Gish, Pierce 1968). So the same bytes buy the accuracy of about half a bit more. GPTQ on such a
grid is the "Huffman-GPTQ" of WaterSIC (Lifar et al. 2026, arXiv 2603.04956); that paper's own steps per
column took another 3 to 10 % off most layers' errors on SmolLM2, but put outliers out of 8 bits' reach.

`fit` finds the step at which the bytes come to `rate`, scales included. A row with a weight that would lie
more than 127 steps out gets a step of its own; the others are not touched by it.

In memory and in every runtime the codes are ordinary 8-bit ones with a scale per row: what gets small is the
file, what is resident is one byte a weight, and no kernel is needed that int8 does not have.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.formats.entropy_coding import deflate
from compress.formats.integer import Grid, IntegerFormat, float16_exact

_ROUNDS = 8  # of the search; each is nearer by an order of magnitude while rates fall by a bit per doubling
_CLOSE = 1e-3  # bits per weight
_ZERO, _FURTHEST = 128, 127
_LARGEST_CORRECTION = 0.25  # bits per weight
_MARGIN = 0.002  # bits per weight left free, so that the last matrix does not overdraw
_NEW = 0.25  # of the last matrix in the mean of what solving adds
_WIDEST = 8.0  # log2 of the factor that one round may move by


class Coded(IntegerFormat):
    """A uniform grid whose codes are entropy-coded in the file."""

    bits: ClassVar[int] = 8
    kind: Literal["coded"] = "coded"
    rate: float = Field(3.25, ge=1.5, le=7, description="bits per weight in the file, scales included")
    group: None = Field(None, description="the whole row")
    symmetric: Literal[True] = Field(True, description="there is no zero-point")
    clip_search: Literal[0] = Field(0, description="nothing is clipped")

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes in the file of a matrix (out, in) that meets the rate; in memory it takes those of int8."""
        return int(shape[0] * shape[1] * self.rate / 8)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The step that meets the rate when `weight` (out, in) is rounded to nearest; no importance enters.

        A matrix too small for the rate, whose stream is longer even with nothing but zeros in it, is rounded
        to zeros: such matrices are better left in another format.
        """
        weight = weight.float()
        largest = weight.abs().amax(1, keepdim=True)  # (out, 1)
        step = float(weight.std(correction=0)) * 2.0 ** (2.0 - self.rate)
        zeros = torch.full_like(largest, _ZERO, dtype=torch.uint8)
        for _ in range(_ROUNDS):
            grid = Grid(float16_exact((largest / _FURTHEST).clamp(min=step)), zeros)
            excess = bits_per_weight(self.codes(weight, grid)) - self.rate
            if abs(excess) < _CLOSE or not step:
                break
            step *= 2.0 ** max(-_WIDEST, min(excess, _WIDEST))
        return grid


def bits_per_weight(codes: Tensor) -> float:
    """What codes (out, in) of this format take in the file, scales included."""
    return 8 * (len(deflate(codes)) + 2 * len(codes)) / codes.numel()


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
        return format.model_copy(update={"rate": self._asked}).fit(weight)

    def spent(self, format: Coded, codes: list[Tensor]) -> None:
        """What became of the matrices (out, in) that the last grid was for."""
        count = sum(part.numel() for part in codes)
        bits = sum(bits_per_weight(part) * part.numel() for part in codes)
        self._left -= count
        self._excess += bits - format.rate * count
        self._added += _NEW * (bits / count - self._asked - self._added)
