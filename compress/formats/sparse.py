"""Matrices with many zeros: a bit per weight says which are none, and those follow in the order of rows.

    bitmask   uint8 (ceil(n / 8),), the first weight in the lowest bit of the first byte
    values    (nonzero,), in the weights' own type; of codes: packed at their width, as always

Smaller than dense when more than 1 in 32 of float32 weights is zero, or 1 in b of codes with b bits. In a
matrix of codes zero is the code that the group's zero-point names, so codes come back bit for bit; of floats,
everything but the sign of a zero does.

The layers here keep a matrix so in memory, and unpack it for each call: memory for time.
"""

from math import prod

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.formats.base import Format
from compress.formats.layers import QuantizedTensor
from compress.formats.packing import pack, packed_bytes, unpack


def pack_floats(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bitmask, values) of a weight of any shape.

    >>> [part.tolist() for part in pack_floats(torch.tensor([[0.0, 2.0], [3.0, 0.0]]))]
    [[6], [2.0, 3.0]]
    """
    mask = (weight != 0).flatten()
    return pack(mask.to(torch.uint8), 1), weight.detach().flatten()[mask]


def unpack_floats(bitmask: Tensor, values: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_floats`.

    >>> unpack_floats(torch.tensor([6], dtype=torch.uint8), torch.tensor([2.0, 3.0]), (2, 2)).tolist()
    [[0.0, 2.0], [3.0, 0.0]]

    Raises:
        UserError: the parts do not belong together.
    """
    mask = _bits(bitmask, prod(shape), len(values))
    return values.new_zeros(prod(shape)).masked_scatter_(mask, values).view(shape)


def pack_codes(tensor: QuantizedTensor) -> tuple[Tensor, Tensor]:
    """(bitmask, packed codes of the weights that are not zero) of a matrix of codes."""
    codes = _unpacked(tensor.codes, tensor.format, tensor.shape)
    mask = codes != tensor.grid.zeros.unsqueeze(-1)
    return pack(mask.flatten().to(torch.uint8), 1), pack(codes[mask], tensor.format.bits)


def unpack_codes(
    bitmask: Tensor, values: Tensor, zeros: Tensor, format: Format, shape: tuple[int, int]
) -> Tensor:
    """Undo `pack_codes`: the packed codes (out, groups, bytes); `zeros` are the zero-points (out, groups).

    Raises:
        UserError: the parts do not belong together.
    """
    out, columns = shape
    groups, width = format.groups(columns), format.group_width(columns)
    mask = _bits(bitmask, out * groups * width, None)
    kept = int(mask.sum())
    if len(values) != packed_bytes(kept, format.bits):
        raise UserError(f"{len(values)} bytes of codes where the bitmask has {kept} of {format.bits} bits")
    codes = zeros.unsqueeze(-1).repeat(1, 1, width).flatten()
    codes.masked_scatter_(mask, unpack(values, format.bits, kept))
    return pack(codes.view(out, groups, width), format.bits)


def _unpacked(codes: Tensor, format: Format, shape: tuple[int, int]) -> Tensor:
    """uint8 (out, groups, width), ragged edge and all."""
    return unpack(codes, format.bits, format.group_width(shape[1]))


def _bits(bitmask: Tensor, count: int, kept: int | None) -> Tensor:
    """The bits as bool (count,), checked: their number, what pads the last byte, and how many are set."""
    if bitmask.dtype != torch.uint8 or bitmask.numel() != packed_bytes(count, 1):
        raise UserError(f"a bitmask of {bitmask.numel()} bytes for {count} weights")
    bits = (bitmask[:, None] >> torch.arange(8, dtype=torch.uint8, device=bitmask.device)) & 1
    mask = bits.flatten().bool()
    if mask[count:].any():
        raise UserError(f"a bitmask that sets more than the {count} weights there are")
    mask = mask[:count]
    if kept is not None and int(mask.sum()) != kept:
        raise UserError(f"{kept} values where the bitmask has {int(mask.sum())}")
    return mask


class SparseLinear(nn.Module):
    """y = x W^T + b with W held as bitmask and values; x (..., in) -> y (..., out)."""

    bitmask: Tensor
    values: Tensor

    def __init__(
        self, bitmask: Tensor, values: Tensor, shape: tuple[int, ...], bias: Tensor | None, transposed: bool
    ) -> None:
        """`transposed`: what is packed, and of this shape, is (in, out)."""
        super().__init__()
        self.shape, self.transposed = shape, transposed
        self.register_buffer("bitmask", bitmask)
        self.register_buffer("values", values)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.out_features, self.in_features = reversed(shape) if transposed else shape

    @property
    def weight(self) -> Tensor:
        """The dense matrix (out, in)."""
        dense = unpack_floats(self.bitmask, self.values, self.shape)
        return dense.T if self.transposed else dense

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the weight, rebuilt for this call."""
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.out_features}x{self.in_features}, {len(self.values)} kept"


class SparseQuantizedTensor(QuantizedTensor):
    """A matrix of codes of which only those that are not zero are held."""

    bitmask: Tensor
    values: Tensor

    def __init__(self, format: Format, shape: tuple[int, int], bitmask: Tensor, values: Tensor) -> None:
        """Scales and zero-points are filled from a state dict, as those of a `QuantizedTensor`."""
        super().__init__(format, shape)
        del self.codes
        self.register_buffer("bitmask", bitmask)
        self.register_buffer("values", values)

    def unpacked(self) -> Tensor:
        """The codes, uint8 (out, in)."""
        codes = unpack_codes(self.bitmask, self.values, self.grid.zeros, self.format, self.shape)
        return _unpacked(codes, self.format, self.shape).reshape(self.shape[0], -1)[:, : self.shape[1]]
