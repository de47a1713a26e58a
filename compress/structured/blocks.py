"""Whole blocks: which to keep, and a model that holds only those."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def spread(count: int, keep: int) -> list[int]:
    """`keep` of `count` indices, evenly spaced, first and last included when there are two or more.

    >>> spread(6, 3), spread(8, 4), spread(4, 1)
    ([0, 3, 5], [0, 2, 5, 7], [0])
    """
    if keep == 1:
        return [0]
    return [(2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


@torch.no_grad()
def block_influence(model: Any, blocks: nn.ModuleList, tokens: Tensor) -> list[float]:
    """1 - cos(input, output) of each block, averaged over the positions of (n, window) tokens."""
    totals = [0.0] * len(blocks)
    seen = [0] * len(blocks)

    def watch(index: int) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Tensor], output: Any) -> None:
            before = inputs[0] if inputs else keywords["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            cosine = F.cosine_similarity(before.float(), after.float(), dim=-1)  # (batch, window)
            totals[index] += float((1 - cosine).sum())
            seen[index] += cosine.numel()

        return hook

    handles = [b.register_forward_hook(watch(i), with_kwargs=True) for i, b in enumerate(blocks)]
    try:
        for rows in tokens.long().split(4):
            model(input_ids=rows, use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return [total / n for total, n in zip(totals, seen, strict=True)]


def most_influential(model: Any, blocks: nn.ModuleList, tokens: Tensor, keep: int) -> list[int]:
    """The blocks, rising, that change their input most."""
    influence = block_influence(model, blocks, tokens)
    return sorted(sorted(range(len(blocks)), key=lambda i: -influence[i])[:keep])


def keep_blocks(model: Any, name: str, kept: list[int]) -> None:
    """Reduce the list of blocks to `kept`, and put their new numbers wherever the old ones are held."""
    blocks = model.get_submodule(name)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks[i] for i in kept))
    for number, block in enumerate(model.get_submodule(name)):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # the place of its keys and values in the cache
    keep_in_config(model.config, kept)


def keep_in_config(config: Any, kept: list[int]) -> None:
    """Reduce a configuration, in place, to the blocks `kept`."""
    count = config.num_hidden_layers
    for key, value in config.to_dict().items():  # `layer_types` and the like: one entry per block
        if isinstance(value, list) and len(value) == count and "layer" in key:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def renamed(tensors: Mapping[str, Tensor], name: str, kept: list[int]) -> dict[str, Tensor]:
    """Masks, or whatever bears names of modules, of the blocks that stay, under their new names."""
    result = {}
    for key, tensor in tensors.items():
        if not key.startswith(f"{name}."):
            result[key] = tensor
            continue
        old, _, rest = key.removeprefix(f"{name}.").partition(".")
        result |= {f"{name}.{new}.{rest}": tensor for new, number in enumerate(kept) if str(number) == old}
    return result
