"""What a result depends on, as one digest: a checkpoint of anything else is ignored."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compress.training.batches import Batches


def identity(facts: list[Any], batches: Batches) -> str:
    """SHA-256 over JSON values (settings, and digests of what is no JSON), the text and its order."""
    values = [facts, batches.window, batches.batch, batches.seed, batches.moving, *batches.begin]
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(batches.stream).data)
    return digest.hexdigest()


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over the names and values of tensors."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
