"""Reads the checkpoints of the GPTQ family: int32 words of codes along the input, zero-points less one.

Of a layer with `in` inputs and `out` outputs, at b bits, in groups of columns:

    qweight (in * b / 32, out), qzeros (groups, out * b / 32), scales (groups, out), g_idx (in,)

Codes lie in the words as one stream of bits, lowest first, also across words (3 bits: 32 codes in 3 words).
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


def dequantized(folder: Path, bits: int) -> dict[str, Tensor]:
    """Name -> weight (out, in) in float32, of all quantized layers, and the other tensors as they are.

    Some tools write into a folder of their own inside `folder`.
    """
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        tensors.update(load_file(file))
    assert any(name.endswith(".qweight") for name in tensors), f"{folder}: holds no codes"
    result = {}
    for name, tensor in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            result[f"{layer}.weight"] = _weight(tensors, layer, bits)
        elif leaf not in ("qzeros", "scales", "g_idx"):
            result[name] = tensor.float()
    return result


def _weight(tensors: dict[str, Tensor], layer: str, bits: int) -> Tensor:
    codes = unpack(tensors[f"{layer}.qweight"], bits)  # (in, out)
    zeros = unpack(tensors[f"{layer}.qzeros"].T, bits).T + 1  # (groups, out)
    scales = tensors[f"{layer}.scales"].float()
    if f"{layer}.g_idx" in tensors:
        group = tensors[f"{layer}.g_idx"].long()
    else:
        group = torch.arange(len(codes)) // (len(codes) // len(scales))
    return ((codes - zeros[group]).float() * scales[group]).T.contiguous()


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 (words, n) -> codes int64 (words * 32 / bits, n)."""
    stream = (words.long()[:, None] >> torch.arange(32)[None, :, None]) & 1  # (words, 32, n)
    stream = stream.reshape(-1, bits, words.shape[1])
    return (stream << torch.arange(bits)[None, :, None]).sum(1)
