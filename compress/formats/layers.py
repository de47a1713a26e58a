"""The layers that hold codes.

A `QuantizedTensor` stores what ships: packed codes, float16 scales, packed zero-points. A linear layer
and an embedding may share one, and then a tied model stays tied. Forward passes rebuild the float weight
on the fly: memory stays that of the codes, plus one layer.
"""

import torch
from torch import Tensor, nn

from compress.formats.activations import Activations, round_dynamic, round_static
from compress.formats.base import Format, Grid
from compress.formats.packing import pack, packed_bytes, unpack


class QuantizedTensor(nn.Module):
    """A weight matrix (out, in) as codes of a format."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(self, format: Format, shape: tuple[int, int]) -> None:
        """Make room for the codes of a matrix of this shape; `store` or a state dict fills it."""
        super().__init__()
        self.format = format
        self.shape = shape
        out, columns = shape
        groups, width = format.groups(columns), format.group_width(columns)
        self.register_buffer(
            "codes", torch.empty(out, groups, packed_bytes(width, format.bits), dtype=torch.uint8)
        )
        self.register_buffer("scales", torch.empty(out, groups, dtype=torch.float16))
        zeros = None
        if not format.symmetric:
            zeros = torch.empty(out, packed_bytes(groups, format.bits), dtype=torch.uint8)
        self.register_buffer("zeros", zeros)

    @classmethod
    def from_codes(cls, format: Format, codes: Tensor, grid: Grid) -> "QuantizedTensor":
        """Store codes (out, in), uint8, and their grid."""
        out, columns = codes.shape
        tensor = cls(format, (out, columns))
        groups, width = format.groups(columns), format.group_width(columns)
        if padding := groups * width - columns:
            # what lies past the ragged edge stands for 0
            last_zero = grid.zeros[:, -1:].expand(out, padding)
            codes = torch.cat((codes, last_zero), dim=1)
        tensor.codes = pack(codes.view(out, groups, width), format.bits)
        tensor.scales = grid.scales.to(torch.float16)
        if not format.symmetric:
            tensor.zeros = pack(grid.zeros, format.bits)
        return tensor

    @classmethod
    def round(cls, format: Format, weight: Tensor, importance: Tensor | None = None) -> "QuantizedTensor":
        """Round `weight` (out, in) to the nearest codes of a freshly fitted grid."""
        grid = format.fit(weight, importance)
        return cls.from_codes(format, format.round(weight, grid), grid)

    @property
    def grid(self) -> Grid:
        """Scales and zero-points, unpacked."""
        scales = self.scales.float()
        if self.zeros is None:
            zeros = torch.full(scales.shape, self.format.zero, dtype=torch.uint8)
        else:
            zeros = unpack(self.zeros, self.format.bits, scales.shape[1])
        return Grid(scales, zeros.to(scales.device))

    def unpacked(self) -> Tensor:
        """The codes, uint8 (out, in)."""
        out, columns = self.shape
        width = self.format.group_width(columns)
        return unpack(self.codes, self.format.bits, width).reshape(out, -1)[:, :columns]

    def dequantize(self) -> Tensor:
        """The weight these codes stand for, float32 (out, in)."""
        return self.format.values(self.unpacked(), self.grid)

    def part(self, rows: Tensor | None = None, columns: Tensor | None = None) -> "QuantizedTensor":
        """The codes of some rows, and of columns, ascending: whole groups, unless there is one; itself where
        nothing is chosen."""
        found = self
        if rows is not None:
            found = QuantizedTensor(self.format, (len(rows), self.shape[1]))
            found.codes, found.scales = self.codes[rows], self.scales[rows]
            found.zeros = None if self.zeros is None else self.zeros[rows]
        if columns is None:
            return found
        grid, groups = found.grid, (columns // self.format.group_width(self.shape[1])).unique_consecutive()
        held = Grid(grid.scales[:, groups], grid.zeros[:, groups])
        return QuantizedTensor.from_codes(self.format, found.unpacked()[:, columns], held)

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of the weight: index (...) -> float32 (..., in)."""
        return self.part(index.reshape(-1)).dequantize().view(*index.shape, self.shape[1])

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.shape[0]}x{self.shape[1]}, {self.format!r}"


class QuantizedLinear(nn.Module):
    """y = x W^T + b with W held as codes; x (..., in) -> y (..., out), in x's dtype.

    With `activations` x is rounded, too; static ones keep their range in `activation_bounds`, (2,).
    """

    activation_bounds: Tensor | None

    def __init__(
        self, quantized: QuantizedTensor, bias: Tensor | None = None, activations: Activations | None = None
    ) -> None:
        super().__init__()
        self.quantized = quantized
        self.activations = activations
        static = activations is not None and activations.mode == "static"
        self.register_buffer("activation_bounds", torch.zeros(2) if static else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.out_features, self.in_features = quantized.shape

    @property
    def weight(self) -> Tensor:
        """The weight the codes stand for; models look here for a dtype or a device."""
        return self.quantized.dequantize()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight, rebuilt for this call."""
        x = self.rounded(x)
        return nn.functional.linear(x, self.quantized.dequantize().to(x.dtype), self.bias)

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the product sees it."""
        if self.activations is None:
            return x
        if self.activation_bounds is not None:
            return round_static(x.float(), self.activation_bounds).to(x.dtype)
        return round_dynamic(x.float(), self.activations.outliers).to(x.dtype)


class QuantizedEmbedding(nn.Module):
    """Rows of a table held as codes; ids (...) -> (..., in), scaled by `scale` as some models do."""

    def __init__(self, quantized: QuantizedTensor, scale: float = 1.0) -> None:
        super().__init__()
        self.quantized = quantized
        self.scale = scale
        self.num_embeddings, self.embedding_dim = quantized.shape

    @property
    def weight(self) -> Tensor:
        """The table the codes stand for."""
        return self.quantized.dequantize()

    def forward(self, ids: Tensor) -> Tensor:
        """Look rows up."""
        rows = self.quantized.rows(ids)
        return rows * self.scale if self.scale != 1.0 else rows
