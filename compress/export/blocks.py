"""Codes in the layout of `MatMulNBits`: (out, blocks, block * bits / 8), one scale and zero-point each.

A format whose group is a power of two of at least 16 is in that layout already, byte for byte. Any other
group is cut into the largest such blocks that divide it, repeating its scale and zero-point, and a row
that is one single group is cut into blocks of 64 with code = zero-point behind its end. Codes never
change. Groups that have no such divisor are refused.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.formats import QuantizedTensor
from compress.formats.integer import IntegerFormat
from compress.formats.packing import pack

_ROW_BLOCK = 64  # for rows of one group: the block this machine's kernels like best
_SMALLEST_BLOCK = 16
_LARGEST_BLOCK = 256


@dataclass(frozen=True)
class Blocks:
    """codes uint8 (out, blocks, block * bits / 8); scales float16 (out, blocks); zeros packed, or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int
    bits: int
    columns: int


def block_width(format: IntegerFormat, columns: int) -> int:
    """The block size that `as_blocks` will use. Raises UserError for a group it cannot cut."""
    width = format.group_width(columns)
    if format.groups(columns) == 1 and not _is_block(width):
        return _ROW_BLOCK
    block = width & -width  # the largest power of two that divides it
    if block < _SMALLEST_BLOCK:
        raise UserError(f"export_onnx: group {width} is no multiple of {_SMALLEST_BLOCK}; use 32, 64 or 128")
    return min(block, _LARGEST_BLOCK)


def as_blocks(tensor: QuantizedTensor) -> Blocks:
    """Lay out a quantized matrix; see the module."""
    format, (out, columns) = tensor.format, tensor.shape
    block, width = block_width(format, columns), format.group_width(columns)
    if block == width:
        codes, scales, zeros = tensor.codes, tensor.scales, tensor.zeros
    else:
        grid = tensor.grid
        count = -(-columns // block)
        of_block = torch.arange(count) * block // width  # (blocks,): the group each block lies in
        filled = grid.zeros[:, of_block].repeat_interleave(block, dim=1)  # (out, blocks * block)
        filled[:, :columns] = tensor.unpacked()
        codes = pack(filled.view(out, count, block), format.bits)
        scales = tensor.scales[:, of_block]
        zeros = None if tensor.zeros is None else pack(grid.zeros[:, of_block], format.bits)
    return Blocks(codes.cpu(), scales.cpu(), zeros, block, format.bits, columns)


def _is_block(width: int) -> bool:
    return _SMALLEST_BLOCK <= width <= _LARGEST_BLOCK and width & (width - 1) == 0
