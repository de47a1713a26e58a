"""Coded matrices in a file: one stream for codes and scales.

    4 bytes   CRC-32 of all that follows
    1 byte    1 if the codes follow the trellis (trellis.py) and are written as halves, else 0
    4 bytes   length of the next part
    ...       zlib (RFC 1950) of the scales, float16: low bytes first, then the high ones, most of them alike
    ...       the codes (entropy_coding.py)

Numbers are little-endian. A code q stands for q - 128 steps.
"""

import zlib

import numpy as np
import torch
from torch import Tensor

from compress.errors import UserError
from compress.formats.coded import entropy_coding
from compress.formats.coded.trellis import doubled, halved

ZERO = 128
_HEAD = 9  # bytes before the parts


def to_stream(codes: Tensor, scales: Tensor) -> Tensor:
    """Codes, uint8 (out, in), and scales, float16 (out, 1), as uint8 (bytes,)."""
    written, trellis = _written(codes)
    packed = _packed(scales)
    body = bytes([trellis]) + len(packed).to_bytes(4, "little") + packed + entropy_coding.encode(written)
    stream = zlib.crc32(body).to_bytes(4, "little") + body
    return torch.frombuffer(bytearray(stream), dtype=torch.uint8)


def from_stream(stream: Tensor, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Undo `to_stream`: codes, uint8 (out, in), and scales, float16 (out, 1).

    Raises:
        UserError: the stream is damaged, or holds a matrix of another shape.
    """
    raw = stream.contiguous().numpy().tobytes()
    if len(raw) < _HEAD or zlib.crc32(raw[4:]) != int.from_bytes(raw[:4], "little"):
        raise UserError("its stream is damaged")
    start = _HEAD + int.from_bytes(raw[5:_HEAD], "little")
    try:
        scales = _unpacked(raw[_HEAD:start], shape[0])
        codes = torch.from_numpy(entropy_coding.decode(raw[start:], shape))
    except (ValueError, zlib.error) as error:
        raise UserError(f"its stream is not of a matrix {shape[0]}x{shape[1]} ({error})") from None
    if raw[4]:
        codes = (doubled(codes.to(torch.int16) - ZERO) + ZERO).to(torch.uint8)
    return codes, scales


def bits_per_weight(codes: Tensor, scales: Tensor) -> float:
    """How long the stream of codes (out, in) and scales (out, 1) is, without writing it."""
    return written_bits(_written(codes)[0], scales)


def written_bits(written: Tensor, scales: Tensor) -> float:
    """As `bits_per_weight`, of codes that are written as they are."""
    return 8 * (_HEAD + len(_packed(scales)) + entropy_coding.stream_bytes(written)) / written.numel()


def _written(codes: Tensor) -> tuple[Tensor, bool]:
    """What the coder gets, uint8 (out, in), and whether these are halves."""
    halves = halved(codes.to(torch.int16) - ZERO)
    return (codes, False) if halves is None else ((halves + ZERO).to(torch.uint8), True)


def _packed(scales: Tensor) -> bytes:
    planes = scales.detach().cpu().numpy().astype("<f2").reshape(-1, 1).view(np.uint8).T
    return zlib.compress(planes.tobytes(), 9)


def _unpacked(data: bytes, rows: int) -> Tensor:
    planes = np.frombuffer(entropy_coding.inflate(data, 2 * rows), np.uint8).reshape(2, rows)
    return torch.from_numpy(planes.T.copy().view("<f2").astype(np.float16))
