"""Codes as bytes.

The layout is the one ONNX Runtime's `MatMulNBits` reads, so that an export copies bytes and rounds
nothing a second time: codes (out, groups, width * bits / 8), the even column in the low half of a byte;
zero-points (out, ceil(groups * bits / 8)) in the same order.
"""

import torch
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension: uint8 (..., n) -> uint8 (..., ceil(n * bits / 8)); bits is 4 or 8.

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    """
    if bits == 8:
        return codes.contiguous()
    if codes.shape[-1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    pairs = codes.unflatten(-1, (-1, 2))  # (..., n/2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`: uint8 (..., bytes) -> uint8 (..., count)."""
    if bits == 8:
        return packed[..., :count]
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)  # (..., bytes, 2)
    return pairs.flatten(-2)[..., :count]
