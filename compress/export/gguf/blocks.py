"""Codes as the blocks of a GGUF file: 32 weights with a float16 scale each.

    Q4_0  w = (n - 8) d           n of 4 bits       4.5 bits per weight
    Q5_0  w = (n - 16) d          n of 5 bits       5.5
    Q8_0  w = n d                 n a signed byte   8.5
    Q4_1  w = n d + m             m a float16       5
    Q5_1  w = n d + m                               6

A symmetric code means (q - 2^(bits-1)) s, so 4, 5 and 8 bits move into the first three types with d = s:
nothing is rounded. 4 and 5 bits with a zero-point become Q4_1 and Q5_1 with d = s and m = -z s rounded to
float16: the only rounding of this export. It moves all weights of a block by at most |z s| 2^-11, that is at
most 15/2048 = 0.7 % of a step for 4 bits and 31/2048 = 1.5 % for 5 (2^-25 where m is below the normal range).

Codes of 2, 3 and 6 bits have no type of their width. Where the caller agrees (`widen`), they take the next
wider one, and mean the same: 2 and 3 bits as those of 4, and 6 bits as q - z in Q8_0, exactly.

A scale of a longer group, or of a whole row, is repeated in each of its blocks. Types with superblocks of
256 (Q2_K ... Q6_K) round their scales once more and are not written.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from compress.errors import UserError
from compress.formats import Format, QuantizedTensor

BLOCK = 32
_MIDDLE = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 0}  # what stands for 0
_SYMMETRIC = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
_ASYMMETRIC = {4: "Q4_1", 5: "Q5_1"}
_WIDER = {2: 4, 3: 4}  # 6 bits go to Q8_0, with or without a zero-point

Bytes = NDArray[np.uint8]


def block_type(format: Format, widen: bool = False) -> str | None:
    """The GGUF type that holds codes of this format; None where there is none.

    >>> from compress.formats import Int4, Int8
    >>> block_type(Int4(group=64)), block_type(Int8())
    ('Q4_1', 'Q8_0')
    """
    if not format.affine or (format.group is not None and format.group % BLOCK):
        return None
    if widen and format.bits == 6:
        return "Q8_0"
    bits = _WIDER.get(format.bits, format.bits) if widen else format.bits
    return (_SYMMETRIC if format.symmetric else _ASYMMETRIC).get(bits)


def refusal(format: Format, widen: bool = False) -> str | None:
    """Why GGUF cannot hold codes of this format, and what to do; None if it can."""
    if block_type(format, widen) is not None:
        return None
    if not format.affine:
        return f"GGUF has no type for the values of {format.kind}; use int4, or leave this export out"
    if format.group is not None and format.group % BLOCK:
        return (
            f"GGUF stores blocks of {BLOCK} weights, and group: {format.group} is no multiple of it; "
            f"set group to a multiple of {BLOCK}"
        )
    wider = block_type(format, widen=True)
    if wider is not None:
        return (
            f"GGUF has no type for {format.kind}; use int4, int5 or int8, or set widen: true to store these "
            f"codes unchanged in the larger {wider}"
        )
    return f"GGUF has no type for {format.kind} with zero-points; set symmetric: true"


def width_refusal(columns: int) -> str | None:
    """Why rows so many columns wide have no blocks, and what to do; None where they have."""
    if columns % BLOCK == 0:
        return None
    return (
        f"is {columns} wide, and GGUF stores codes in blocks of {BLOCK}; leave this layer float (skip, in "
        "the quantize pass) or leave this export out"
    )


def blocks(
    name: str, weight: QuantizedTensor, order: Tensor | None = None, widen: bool = False
) -> tuple[str, Bytes]:
    """The rows of a matrix (out, in), in another `order` if given, as (type, bytes (out, row bytes)).

    Raises UserError for a format without a type, and for a width that 32 does not divide.
    """
    out, columns = weight.shape
    reason = refusal(weight.format, widen)
    if reason is not None:
        raise UserError(f"export_gguf: {name}: {reason}")
    reason = width_refusal(columns)
    if reason is not None:
        raise UserError(f"export_gguf: {name} {reason}")
    kind = str(block_type(weight.format, widen))
    grid, codes = weight.grid, weight.unpacked()
    scales, zeros = grid.scales, grid.zeros
    if order is not None:
        codes, scales, zeros = codes[order], scales[order], zeros[order]
    count = columns // BLOCK
    per_group = max(1, weight.format.group_width(columns) // BLOCK)
    d = np.repeat(scales.numpy(), per_group, axis=1)[:, :count]  # (out, blocks)
    z = np.repeat(zeros.numpy().astype(np.int16), per_group, axis=1)[:, :count]
    q = codes.numpy().reshape(out, count, BLOCK).astype(np.int16)
    head = [_half(d)]
    if kind in _MIDDLE:
        q = q - z[..., None] + _MIDDLE[kind]
    else:
        head.append(_half(minimum(d, z, name)))
    body = [q.astype(np.int8).view(np.uint8)] if kind == "Q8_0" else _nibbles(q.astype(np.uint8), kind)
    return kind, np.concatenate([*head, *body], axis=2).reshape(out, -1)


def minimum(scales: NDArray[np.float32], zeros: NDArray[np.int16], name: str) -> NDArray[np.float16]:
    """What a code of 0 stands for, m = -z s, rounded to float16. Raises UserError where that overflows."""
    with np.errstate(over="ignore"):
        m = (-zeros.astype(np.float32) * scales).astype(np.float16)
    if not np.isfinite(m).all():
        raise UserError(f"export_gguf: {name} has minima beyond float16; set symmetric: true")
    return m


def _half(values: NDArray[Any]) -> Bytes:
    """(out, blocks) -> the two bytes of each as float16, (out, blocks, 2)."""
    return np.ascontiguousarray(values.astype("<f2"))[..., None].view(np.uint8)


def _nibbles(q: Bytes, kind: str) -> list[Bytes]:
    """Codes (out, blocks, 32) below 32: fifth bits (4 bytes, if there are any), then the nibbles (16 bytes).

    The first 16 weights of a block have the low nibbles, the others the high ones.
    """
    low: Bytes = q & np.uint8(15)
    nibbles: Bytes = low[..., :16] | (low[..., 16:] << np.uint8(4))
    if kind.startswith("Q4"):
        return [nibbles]
    return [np.packbits(q >> np.uint8(4), axis=2, bitorder="little"), nibbles]
