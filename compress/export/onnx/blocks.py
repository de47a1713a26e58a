"""Codes in the layout of `MatMulNBits`: (out, blocks, block * bits / 8), one scale and zero-point each.

A format whose group is a power of two of at least 16 is in that layout already, byte for byte. Any other
group is cut into the largest such blocks that divide it, repeating its scale and zero-point, and a row
that is one single group is cut into blocks of 64 with code = zero-point behind its end. Codes never
change. Groups that have no such divisor are refused.

ONNX Runtime's processor kernels take 2, 4 and 8 bits (1.27; 3, 5 and 6 fail as the model loads). Codes of
other widths may be widened: the same integers in the next width that has a kernel, so the same weights in a
larger file.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import UserError
from compress.formats import Format, QuantizedTensor
from compress.formats.packing import pack

_ROW_BLOCK = 64  # for rows of one group: the block this machine's kernels like best
_SMALLEST_BLOCK = 16
_LARGEST_BLOCK = 256
_KERNEL_BITS = (2, 4, 8)


@dataclass(frozen=True)
class Blocks:
    """codes uint8 (out, blocks, block * bits / 8); scales float16 (out, blocks); zeros packed, or None."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    block: int
    bits: int
    columns: int


def block_width(format: Format, columns: int) -> int:
    """The block size that `as_blocks` will use. Raises UserError for a group it cannot cut."""
    width = format.group_width(columns)
    if format.groups(columns) == 1 and not _is_block(width):
        return _ROW_BLOCK
    reason = group_refusal(format, columns)
    if reason is not None:
        raise UserError(f"export_onnx: a layer {reason}")
    return min(_power(width), _LARGEST_BLOCK)


def group_refusal(format: Format, columns: int) -> str | None:
    """Why the groups of rows so many columns wide cannot be cut, and what to do; None where they can."""
    width = format.group_width(columns)
    if format.groups(columns) == 1 or _power(width) >= _SMALLEST_BLOCK:
        return None
    return f"holds codes whose group {width} is no multiple of {_SMALLEST_BLOCK}; use 32, 64 or 128"


def _power(width: int) -> int:
    """The largest power of two that divides it."""
    return width & -width


def as_blocks(tensor: QuantizedTensor) -> Blocks:
    """Lay out a quantized matrix; see the module."""
    format, (out, columns) = tensor.format, tensor.shape
    block, width, bits = block_width(format, columns), format.group_width(columns), kernel_bits(format)
    if block == width and bits == format.bits:
        codes, scales, zeros = tensor.codes, tensor.scales, tensor.zeros
    else:
        grid = tensor.grid
        count = -(-columns // block)
        of_block = torch.arange(count) * block // width  # (blocks,): the group each block lies in
        filled = grid.zeros[:, of_block].repeat_interleave(block, dim=1)  # (out, blocks * block)
        filled[:, :columns] = tensor.unpacked()
        if format.symmetric:
            filled += 2 ** (bits - 1) - format.zero  # the middle of the wider codes
        codes = pack(filled.view(out, count, block), bits)
        scales = tensor.scales[:, of_block]
        zeros = None if tensor.zeros is None else pack(grid.zeros[:, of_block], bits)
    return Blocks(codes.cpu(), scales.cpu(), zeros, block, bits, columns)


def kernel_bits(format: Format) -> int:
    """The narrowest width with a kernel that holds the codes of a format."""
    return next(bits for bits in _KERNEL_BITS if bits >= format.bits)


def refusal(format: Format, widen: bool) -> str | None:
    """Why codes of a format cannot be exported, and what to do; None where they can."""
    if not format.affine:
        return f"ONNX Runtime has no kernel for {format.kind}; use int4"
    if kernel_bits(format) != format.bits and not widen:
        return (
            f"ONNX Runtime has no kernel for {format.kind}; use int2, int4 or int8, or set widen: true to "
            f"store its codes in {kernel_bits(format)} bits"
        )
    return None


def _is_block(width: int) -> bool:
    return _SMALLEST_BLOCK <= width <= _LARGEST_BLOCK and width & (width - 1) == 0
