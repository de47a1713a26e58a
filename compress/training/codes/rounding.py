"""A linear layer whose codes and scales learn (the maths is in solvers/block_tuning.py)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.formats import Format, Grid, QuantizedLinear, QuantizedTensor
from compress.solvers.block_tuning import SCALE_BOUND, positions, tuned_codes
from compress.training.codes.scales import shippable


class TunableRounding(nn.Module):
    """y = x W^T + b, as the layer of codes it stands for, with offsets and scale shifts that learn.

    Attributes:
        offset: V, (out, in), float32.
        shift: d, (out, groups), float32.
        movable: bounds of `offset`: 1/2, and 0 where a pruned weight must stay zero or codes may not move.
        shipping: compute with the codes and float16 scales as they would be written.
    """

    def __init__(self, layer: QuantizedLinear, original: Tensor, mask: Tensor | None) -> None:
        super().__init__()
        self.held, self.bias, self.shipping = layer.quantized, layer.bias, False
        self.out_features, self.in_features = layer.quantized.shape
        self.grid = self.held.grid
        self.codes = self.held.unpacked()
        start = positions(self.format.places(original, self.grid), self.codes)
        movable = torch.full_like(start, 0.5 if self.format.codes_move else 0.0)
        if mask is not None:
            movable.masked_fill_(~mask.to(start.device), 0.0)
        self.start, self.movable = start, movable
        self.offset = nn.Parameter(torch.zeros_like(start))
        self.shift = nn.Parameter(torch.zeros_like(self.grid.scales))

    @property
    def format(self) -> Format:
        """Of the codes."""
        return self.held.format

    @property
    def weight(self) -> Tensor:
        """The weight as it stands, (out, in), float32; gradients pass the rounding."""
        codes = tuned_codes(self.start, self.offset, self.format.levels)
        ones = Grid(torch.ones_like(self.grid.scales), self.grid.zeros)
        units = self.format.values(codes.detach().to(torch.uint8), ones)
        # the second term is 0: gradients pass from values to codes as if they were equally spaced
        return (units + (codes - codes.detach())) * self._per_column(self.scales())

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return F.linear(x, self.weight.to(x.dtype), self.bias)

    def scales(self) -> Tensor:
        """(out, groups), float32; those that would be written when `shipping`."""
        scales = self.grid.scales * (1 + self.shift)
        return shippable(scales, self.grid.scales) if self.shipping else scales

    def bounds(self) -> list[Tensor | float]:
        """Of `offset` and `shift`."""
        return [self.movable, SCALE_BOUND]

    @torch.no_grad()
    def tuned(self) -> QuantizedTensor:
        """The codes and scales as they stand."""
        codes = tuned_codes(self.start, self.offset, self.format.levels).to(torch.uint8)
        grid = Grid(shippable(self.grid.scales * (1 + self.shift), self.grid.scales), self.grid.zeros)
        return QuantizedTensor.from_codes(self.format, codes, grid)

    def _per_column(self, per_group: Tensor) -> Tensor:
        """(out, groups) -> (out, in)."""
        width = self.format.group_width(self.in_features)
        return per_group.repeat_interleave(width, dim=1)[:, : self.in_features]
