"""Integer grids: what a code of 2 to 8 bits means.

A weight matrix (out, in) is cut along its input side into groups; each group of each row has a scale s
and a zero-point z, and a stored code q stands for

    w = (q - z) * s,        q an unsigned integer in 0 .. 2^bits - 1.

Symmetric grids fix z = 2^(bits-1) and do not store it. Scales are rounded to float16 before anything is
rounded with them, so that every runtime multiplies by the same number. The last group of a width that
does not divide is shorter; nothing is padded but the stored bytes.

Cost per weight: bits + 16/group (+ bits/group when asymmetric). Four bits with group 64: 4.25 or 4.3125.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.formats.base import Format, Grid, float16_exact, in_float32, require_reach

# Elements fitted at a time: what is computed on the way then stays in a core's cache.
_FIT_SLICE = 1 << 18
_SMALLEST_RANGE = {2: 0.3, 3: 0.4, 4: 0.5, 5: 0.6, 6: 0.7, 8: 0.8}  # bits -> where the clip search ends


class AffineFormat(Format):
    """A uniform grid of integers per group of input columns, its range searched."""

    affine: ClassVar[bool] = True

    symmetric: bool = Field(True, description="fix the zero-point at mid-range and do not store it")
    clip_search: int = Field(20, ge=0, le=100, description="shrunk ranges tried per group; 0: plain min-max")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Choose scales and zero-points for `weight` (out, in), float32.

        Each group's range starts at its min and max and is shrunk by factors, the fewer bits the further;
        the factor kept minimises  sum_j h_j (w_j - w^_j)^2  with h = `importance` (in,), or ones.
        """
        weight = in_float32(weight)
        rows = max(1, _FIT_SLICE // weight.shape[1])
        parts = [self._fit_rows(part, importance) for part in weight.split(rows)]
        return Grid(torch.cat([p.scales for p in parts]), torch.cat([p.zeros for p in parts]))

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest codes, of what is on the grid its own: (out, in) -> uint8 (out, in)."""
        return affine_codes(weight, grid, self.group_width(weight.shape[1]), self.levels)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """The only meaning of a code: uint8 (out, in) -> float32 (out, in)."""
        return affine_values(codes, grid, self.group_width(codes.shape[1]))

    def places(self, weight: Tensor, grid: Grid) -> Tensor:
        """Where weights (out, in) lie among the codes: at k on code k, between two in proportion."""
        return affine_places(weight, grid, self.group_width(weight.shape[1]))

    def column_rounder(self, grid: Grid, columns: int) -> "ColumnRounder":
        """What a solver needs to round one column at a time without knowing of bits."""
        return ColumnRounder.on(grid, self.group_width(columns), self.levels)

    def _fit_rows(self, weight: Tensor, importance: Tensor | None) -> Grid:
        out, columns = weight.shape
        width = self.group_width(columns)
        padding = self.groups(columns) * width - columns
        grouped = torch.nn.functional.pad(weight, (0, padding)).view(out, -1, width)  # (out, groups, width)
        h = weight.new_ones(columns) if importance is None else importance.float()
        h = torch.nn.functional.pad(h, (0, padding)).view(1, -1, width)
        low = grouped.amin(2).clamp(max=0.0)  # the zero-point must be a code, so the range holds 0
        high = grouped.amax(2).clamp(min=0.0)
        require_reach(self, self._least_scales(low, high))
        best_error = torch.full_like(low, torch.inf)
        best_scales = torch.ones_like(low)
        best_zeros = torch.full_like(low, self.levels // 2)
        for shrink in self._shrinks():
            for scales, zeros in self._candidates(low * shrink, high * shrink):
                q = _round(grouped, scales[..., None], zeros[..., None], self.levels)
                error = (((q - zeros[..., None]) * scales[..., None] - grouped).square_() * h).sum(2)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_scales = torch.where(better, scales, best_scales)
                best_zeros = torch.where(better, zeros, best_zeros)
        return Grid(best_scales, best_zeros.to(torch.uint8))

    def _shrinks(self) -> list[float]:
        smallest = _SMALLEST_RANGE[self.bits]
        tried = self.clip_search if self.bits < 8 else self.clip_search // 4
        return [1.0 - (1.0 - smallest) * i / max(tried, 1) for i in range(tried + 1)]

    def _least_scales(self, low: Tensor, high: Tensor) -> Tensor:
        """What (low, high) needs at least, each (out, groups): the second candidate where there is."""
        if not self.symmetric:
            return (high - low) / (self.levels - 1)
        return torch.maximum(high, -low) / (self.levels // 2 - (self.bits == 8))

    def _candidates(self, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Grids that span (low, high), each (out, groups)."""
        top, middle = self.levels - 1, self.levels // 2
        if not self.symmetric:
            scales = float16_exact((high - low) / top)
            return [(scales, torch.round(-low / scales).clamp(0, top))]
        zeros = torch.full_like(low, middle)
        reach = torch.maximum(high, -low)
        candidates = [(float16_exact(reach / (middle - 1)), zeros)]
        if self.bits < 8:
            # the grid has one more code below zero than above: a signed scale turns that side to the
            # larger extreme, which is then met exactly
            signed = torch.where(high > -low, -high, -low)
            candidates.append((float16_exact(signed / middle), zeros))
        return candidates


class Int8(AffineFormat):
    """Eight bits, one symmetric scale per row unless a group is given."""

    bits: ClassVar[int] = 8
    kind: Literal["int8"] = "int8"


class _FewBits(AffineFormat):
    """Groups of 64 with a zero-point by default."""

    group: int | None = Field(64, ge=16, description="columns that share a scale; null: the whole row")
    symmetric: bool = Field(False, description="fix the zero-point at mid-range and do not store it")


class Int6(_FewBits):
    """Six bits."""

    bits: ClassVar[int] = 6
    kind: Literal["int6"] = "int6"


class Int5(_FewBits):
    """Five bits."""

    bits: ClassVar[int] = 5
    kind: Literal["int5"] = "int5"


class Int4(_FewBits):
    """Four bits."""

    bits: ClassVar[int] = 4
    kind: Literal["int4"] = "int4"


class Int3(_FewBits):
    """Three bits."""

    bits: ClassVar[int] = 3
    kind: Literal["int3"] = "int3"


class Int2(_FewBits):
    """Two bits."""

    bits: ClassVar[int] = 2
    kind: Literal["int2"] = "int2"


@dataclass(frozen=True)
class ColumnRounder:
    """Rounds one input column at a time; per group the scales, and the range of whole steps, (out,)."""

    width: int
    scales: tuple[Tensor, ...]
    lowest: tuple[Tensor, ...]
    highest: tuple[Tensor, ...]

    @classmethod
    def on(cls, grid: Grid, width: int, levels: int) -> "ColumnRounder":
        """Of a grid with groups of `width` columns and so many codes."""
        # (groups, out): what one column needs is then contiguous
        scales, zeros = grid.scales.T.contiguous(), grid.zeros.T.float()
        ends = -zeros, levels - 1 - zeros
        return cls(width, scales.unbind(), *(end.unbind() for end in ends))

    def __call__(self, column: Tensor, index: int) -> Tensor:
        """The value on the grid nearest to `column` (out,), the column numbered `index`."""
        group = index // self.width
        scale = self.scales[group]
        steps = (column / scale).round_()
        return torch.clamp(steps, self.lowest[group], self.highest[group], out=steps).mul_(scale)


def affine_codes(weight: Tensor, grid: Grid, width: int, levels: int) -> Tensor:
    """q = round(w / s) + z, kept within the codes: (out, in) -> uint8 (out, in)."""
    codes = torch.empty_like(weight, dtype=torch.uint8)
    together = max(1, _FIT_SLICE // weight.shape[1])
    for start in range(0, len(weight), together):
        rows = slice(start, start + together)
        scales, zeros = Grid(grid.scales[rows], grid.zeros[rows]).columns(width, weight.shape[1])
        codes[rows] = _round(weight[rows].float(), scales, zeros, levels)
    return codes


def affine_places(weight: Tensor, grid: Grid, width: int) -> Tensor:
    """w / s + z: (out, in) -> (out, in)."""
    scales, zeros = grid.columns(width, weight.shape[1])
    return weight / scales + zeros


def affine_values(codes: Tensor, grid: Grid, width: int) -> Tensor:
    """w = (q - z) s: uint8 (out, in) -> float32 (out, in)."""
    out, columns = codes.shape
    padding = grid.scales.shape[1] * width - columns
    if padding:
        codes = torch.nn.functional.pad(codes, (0, padding))
    # (out, groups, width), worked on in place: a layer that holds codes does this at every call
    values = codes.reshape(out, -1, width).float()
    values.sub_(grid.zeros[..., None]).mul_(grid.scales[..., None])
    return values.view(out, -1)[:, :columns]


def _round(weight: Tensor, scales: Tensor, zeros: Tensor, levels: int) -> Tensor:
    return (weight / scales).round_().add_(zeros).clamp_(0, levels - 1)
