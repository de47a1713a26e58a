"""Whole blocks: which to keep, and a model that holds only those."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compress.errors import UserError
from compress.models.stacks import block_lists, decoder_blocks
from compress.tasks.registry import task_of

# what configurations call the number of a decoder's blocks, where an encoder has its own
_OF_DECODER = ("num_decoder_layers", "decoder_layers")

# name of a list of blocks -> the numbers of those that stay, ascending
KeptBlocks = Mapping[str, Sequence[int]]


def spread(count: int, keep: int) -> list[int]:
    """`keep` of `count` indices, evenly spaced, first and last included when there are two or more.

    >>> spread(6, 3), spread(8, 4), spread(4, 1)
    ([0, 3, 5], [0, 2, 5, 7], [0])
    """
    if keep == 1:
        return [0]
    return [(2 * i * (count - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep)]


def lists_of_blocks(model: Any) -> list[tuple[str, nn.ModuleList]]:
    """Names and lists of a model's blocks: one, or an encoder's and its decoder's.

    Raises:
        UserError: the model has none.
    """
    if task_of(model.config).stacks == 1:
        return [decoder_blocks(model)]
    return [(prefix[:-1], model.get_submodule(prefix[:-1])) for prefix in block_lists(model)]


def all_blocks(model: Any) -> list[nn.Module]:
    """The blocks, of all lists."""
    return [block for _, blocks in lists_of_blocks(model) for block in blocks]


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
            _run(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    return [total / n for total, n in zip(totals, seen, strict=True)]


def most_influential(model: Any, blocks: nn.ModuleList, tokens: Tensor, keep: int) -> list[int]:
    """The blocks, rising, that change their input most; a first one that has to stay among them."""
    influence = block_influence(model, blocks, tokens)
    if first_has_to_stay(blocks):
        influence[0] = math.inf
    return sorted(sorted(range(len(blocks)), key=lambda i: -influence[i])[:keep])


def first_has_to_stay(blocks: nn.ModuleList) -> bool:
    """Whether the first block lacks a part that others have (ModernBERT's norm before attention), so that
    none of them can take its place."""
    first = {name for name, _ in blocks[0].named_parameters()}
    return any({name for name, _ in block.named_parameters()} - first for block in blocks)


def require_first(blocks: nn.ModuleList, kept: Sequence[int], field: str) -> None:
    """Raise UserError, naming the field, where a first block that has to stay is not among the kept."""
    if 0 not in kept and first_has_to_stay(blocks):
        raise UserError(f"{field}: block 0 has fewer parts than the others, so none takes its place; keep it")


def _run(model: Any, rows: Tensor) -> None:
    """A forward pass of (n, window) tokens, through all blocks."""
    task = task_of(model.config)
    if task.continues:
        model(input_ids=rows, use_cache=False, logits_to_keep=1)
    else:
        task.answers(model, rows)


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


def keep_in_config(config: Any, kept: Sequence[int], decoder: Sequence[int] | None = None) -> None:
    """Reduce a configuration, in place, to the blocks `kept`; `decoder`: those of a second list of blocks."""
    if decoder is not None:
        setattr(config, next(name for name in _OF_DECODER if hasattr(config, name)), len(decoder))
    count = config.num_hidden_layers
    for key, value in config.to_dict().items():  # `layer_types` and the like: one entry per block
        if isinstance(value, list) and len(value) == count and "layer" in key:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def handed_on(
    tensors: Mapping[str, Tensor], name: str, blocks: nn.ModuleList, kept: Sequence[int]
) -> dict[str, Tensor]:
    """Parameters; what the first block alone has and all blocks use (T5's relative positions) is named as
    the first one's that stays, where that is another."""
    own = {key for key, _ in blocks[0].named_parameters()} - {
        key for key, _ in blocks[kept[0]].named_parameters()
    }
    old = {f"{name}.0.{key}": f"{name}.{kept[0]}.{key}" for key in own}
    return {old.get(key, key): tensor for key, tensor in tensors.items()}


def renamed(tensors: Mapping[str, Tensor], name: str, kept: Sequence[int]) -> dict[str, Tensor]:
    """Masks, or whatever bears names of modules, of the blocks that stay, under their new names."""
    result = {}
    for key, tensor in tensors.items():
        if not key.startswith(f"{name}."):
            result[key] = tensor
            continue
        old, _, rest = key.removeprefix(f"{name}.").partition(".")
        result |= {f"{name}.{new}.{rest}": tensor for new, number in enumerate(kept) if str(number) == old}
    return result
