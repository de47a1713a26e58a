"""Codes as bytes.

Codes of any width from 2 to 8 bits follow each other in one stream of bits, the first in the lowest bits
of the first byte. For 2, 4 and 8 bits that is the layout ONNX Runtime's `MatMulNBits` reads, so that an
export copies bytes and rounds nothing a second time: codes (out, groups, width * bits / 8), zero-points
(out, ceil(groups * bits / 8)).
"""

import torch
from torch import Tensor

_WORD = 8  # codes that make `bits` whole bytes, and fit into 64 bits


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that so many codes take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack along the last dimension: uint8 (..., n) -> uint8 (..., ceil(n * bits / 8)).

    >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4).tolist()
    [[33, 3]]
    >>> pack(torch.tensor([5, 2, 7], dtype=torch.uint8), 3).tolist()
    [213, 1]
    """
    if bits == 8:
        return codes.contiguous()
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % _WORD))
    eights = padded.unflatten(-1, (-1, _WORD))  # (..., words, 8)
    words = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(_WORD):
        words |= eights[..., i].to(torch.int64) << (bits * i)
    parts = [((words >> (8 * i)) & 255).to(torch.uint8) for i in range(bits)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Undo `pack`: uint8 (..., bytes) -> uint8 (..., count)."""
    if bits == 8:
        return packed[..., :count]
    if bits in (2, 4):  # whole codes in every byte: no words are needed
        parts = [(packed >> shift) & ((1 << bits) - 1) for shift in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :count]
    padded = torch.nn.functional.pad(packed, (0, -packed.shape[-1] % bits))
    pieces = padded.unflatten(-1, (-1, bits))  # (..., words, bits)
    words = torch.zeros(pieces.shape[:-1], dtype=torch.int64, device=packed.device)
    for i in range(bits):
        words |= pieces[..., i].to(torch.int64) << (8 * i)
    mask = (1 << bits) - 1
    parts = [((words >> (bits * i)) & mask).to(torch.uint8) for i in range(_WORD)]
    return torch.stack(parts, dim=-1).flatten(-2)[..., :count]
