"""Digests of tensors: a checkpoint of anything else than what a result depends on is ignored."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
