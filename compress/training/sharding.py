"""Tensors that may be spread over processes (FSDP2 makes them `DTensor`s), seen as whole ones.

Plain tensors pass through untouched, so that nothing else needs to know. What gathers is a collective:
every process must call it.
"""

from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor's elements lie on several processes."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Any) -> Tensor:
    """All elements of a tensor, on every process."""
    result: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return result


def like(value: Tensor, pattern: Any) -> Tensor:
    """A whole tensor spread as another is."""
    if not is_sharded(pattern) or is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    # every process has all of it, so nothing need be sent
    whole = value.to(pattern.device)
    return distribute_tensor(whole, pattern.device_mesh, pattern.placements, src_data_rank=None)


@torch.no_grad()
def put(target: Any, value: Tensor) -> None:
    """Copy a whole tensor into one that may be spread."""
    target.copy_(like(value, target))


@torch.no_grad()
def gather(source: nn.Module, target: nn.Module) -> None:
    """Copy the parameters of a model that may be spread into a whole one of the same kind."""
    for mine, spread in zip(target.parameters(), source.parameters(), strict=True):
        mine.copy_(whole(spread))
