"""What every format answers: how wide a code is, what it means, what it costs, and what may hold it.

A weight matrix (out, in) is cut along its input side into groups. Each group of each row has a scale s, kept
in float16, and perhaps a zero-point; a code is an unsigned integer below 2^bits. `fit` chooses scales and
zero-points, `codes` rounds, `values` is the only meaning of a code: whoever writes a file for a runtime, or
solves for better codes, asks these three.

A new format is a subclass in a file of this folder and its name in registry.py. It must have

    bits, kind              its width and the name that recipes and manifests call it by
    fit, codes, values      its numbers
    places                  of weights among the codes, for tuners
    column_rounder          one column at a time, for solvers
    zero                    the code of 0, where that is not the middle one

and answers, where the default is not true of it, `affine`, `streamed`, `codes_move`, `nominal_bits`, `run`,
`fitter` and `keeping_zeros`. Nothing outside this folder asks for one format by its class or its name. Grids
of (q - z) s are in integer.py, other meanings in nf4.py and coded/.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from compress.errors import UserError
from compress.formats.packing import packed_bytes

_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
_SMALLEST_NORMAL = 2.0**-14  # the smallest with all of its 11 bits
_LARGEST_SCALE = 65504.0


@dataclass(frozen=True)
class Grid:
    """Scales (out, groups), float32 values that float16 holds exactly; zero-points (out, groups), uint8."""

    scales: Tensor
    zeros: Tensor

    def columns(self, width: int, count: int) -> tuple[Tensor, Tensor]:
        """Scales and zero-points, float32, of so many columns: (out, count), or (out, 1) of one group."""
        if width >= count:
            return self.scales, self.zeros.float()
        scales = self.scales.repeat_interleave(width, dim=1)[:, :count]
        zeros = self.zeros.float().repeat_interleave(width, dim=1)[:, :count]
        return scales, zeros


class Rounder(Protocol):
    """Rounds one input column at a time, so that a solver need not know of bits."""

    def __call__(self, column: Tensor, index: int) -> Tensor:
        """The value nearest to `column` (out,), the column numbered `index`."""


class Fitter(Protocol):
    """Fits the grids of matrices that are rounded one after another, each depending on those before."""

    def fit(self, format: "Format", weight: Tensor, importance: Tensor | None = None) -> Grid:
        """A grid for `weight` (out, in)."""

    def spent(self, format: "Format", matrices: Sequence[tuple[Tensor, Tensor]]) -> None:
        """What became of it: codes (out, in) and scales (out, groups) of what the last grid was for."""


class OneByOne:
    """Fits every matrix for itself."""

    def fit(self, format: "Format", weight: Tensor, importance: Tensor | None = None) -> Grid:
        """As the format does."""
        return format.fit(weight, importance)

    def spent(self, format: "Format", matrices: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Nothing is learnt from it."""


class Format(BaseModel):
    """What the codes of a matrix mean: a frozen value, which goes verbatim into a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    bits: ClassVar[int]  # of a code in memory
    affine: ClassVar[bool] = False  # a code q stands for (q - z) s, so whatever has integers can hold it
    fixed: ClassVar[str] = "has fixed steps"  # why there is no grid to search, of one that is not searched
    codes_move: ClassVar[bool] = True  # one may change; others and the file's length stay
    streamed: ClassVar[bool] = False  # a file has `to_stream` of codes and scales in their place

    kind: str
    group: int | None = Field(None, ge=16, description="columns that share a scale; null: the whole row")
    symmetric: bool = Field(True, description="there is no zero-point")

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """Choose scales and zero-points for `weight` (out, in), float32.

        `importance` (in,) weighs the squared errors of the columns, in formats that have a choice.

        Raises:
            UserError: there are no weights, or no scale reaches them.
        """

    @abstractmethod
    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The nearest codes, of what is on the grid its own: (out, in) -> uint8 (out, in)."""

    @abstractmethod
    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """The only meaning of a code: uint8 (out, in) -> float32 (out, in)."""

    @abstractmethod
    def places(self, weight: Tensor, grid: Grid) -> Tensor:
        """Where weights (out, in) lie among the codes: at k on code k, between two in proportion."""

    @abstractmethod
    def column_rounder(self, grid: Grid, columns: int) -> Rounder:
        """What a solver needs to round one column at a time without knowing of bits."""

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """The codes that lose least of `weight` alone: (out, in) -> uint8 (out, in)."""
        return self.codes(weight, grid)

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def zero(self) -> int:
        """The code of 0 where no zero-point is stored."""
        return self.levels // 2

    @property
    def nominal_bits(self) -> float:
        """Bits per weight that it goes by, scales aside where codes have a fixed width."""
        return self.bits

    @property
    def label(self) -> str:
        """What a table calls it."""
        return self.kind

    @property
    def run(self) -> int:
        """How many rows that follow each other are rounded as one; 1: each row for itself."""
        return 1

    def keeping_zeros(self) -> "Format":
        """What rounds every zero to zero: the same format, or the next one to it that does."""
        return self

    def fitter(self, weights: int) -> Fitter:
        """What fits the grids of several matrices of this kind, of so many weights together."""
        return OneByOne()

    def group_width(self, columns: int) -> int:
        """Columns per group for a matrix of this width."""
        return columns if self.group is None else min(self.group, columns)

    def groups(self, columns: int) -> int:
        """Groups per row for a matrix of this width."""
        return -(-columns // self.group_width(columns))

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes in a file of codes, scales and zero-points of a matrix (out, in)."""
        out, columns = shape
        groups = self.groups(columns)
        codes = groups * packed_bytes(self.group_width(columns), self.bits)
        zeros = 0 if self.symmetric else packed_bytes(groups, self.bits)
        return out * (codes + 2 * groups + zeros)

    def to_stream(self, codes: Tensor, scales: Tensor) -> Tensor:
        """Codes, uint8 (out, in), and scales, float16 (out, groups), for a file: uint8 (bytes,)."""
        raise NotImplementedError(f"{self.kind} is stored as it is")

    def from_stream(self, stream: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Undo `to_stream`. Raises UserError for a stream that is damaged, or of another shape or format."""
        raise UserError(f"a stream, and {self.kind} has none")

    def longest_stream(self, weight: Tensor) -> int:
        """Bytes of the stream of a matrix (out, in) in the dearest format of this kind."""
        raise NotImplementedError(f"{self.kind} is stored as it is")


def in_float32(weight: Tensor) -> Tensor:
    """A matrix (out, in) to fit a grid to; raises UserError for one without rows or columns."""
    if not weight.numel():
        raise UserError(f"a matrix {'x'.join(map(str, weight.shape))} holds nothing to round; leave it out")
    return weight.float()


def require_reach(format: Format, scales: Tensor) -> None:
    """Refuse weights for which even the last code would need such scales: float16 has none, and to cut
    them off would be silent.

    Raises:
        UserError: says how far off they are.
    """
    largest = float(scales.abs().max())
    if largest > _LARGEST_SCALE:
        raise UserError(
            f"{format.kind} needs a scale of {largest:.4g} for the largest weight, and a scale is at most "
            f"{_LARGEST_SCALE:,.0f}; leave the layer out (`skip`)"
        )


def float16_exact(scales: Tensor) -> Tensor:
    """Round to float16 and back; a scale of an all-zero group becomes the smallest positive one.

    Below its normal range float16 is coarse, and a scale rounded down would cut the extremes off by many
    steps: there it is rounded away from zero.
    """
    rounded = scales.clamp(-_LARGEST_SCALE, _LARGEST_SCALE).to(torch.float16).float()
    outward = torch.ceil(scales.abs() / _SMALLEST_SCALE) * _SMALLEST_SCALE * scales.sign()
    rounded = torch.where(scales.abs() < _SMALLEST_NORMAL, outward, rounded)
    return torch.where(rounded == 0, _SMALLEST_SCALE, rounded)
