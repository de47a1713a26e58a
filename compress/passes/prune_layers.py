"""Whole decoder blocks taken out: a smaller, faster model of the same kind, to be healed afterwards.

`spread` keeps blocks evenly spaced, the first and the last among them: the usual start for a student
(Sanh et al. 2019, DistilBERT). `similarity` keeps the blocks that change their input most on calibration
text, by 1 - cos(input, output) averaged over positions (block influence: Men et al. 2024, ShortGPT).
Cost: `spread` none; `similarity` one forward pass over the calibration windows.
Limits: blocks must live in one `ModuleList` as long as `num_hidden_layers`.
"""

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from compress.bundle import Bundle
from compress.calibration import decoder_blocks
from compress.errors import UserError
from compress.passes.base import Context, Kind, Need, Pass


class PruneLayers(Pass):
    """Keep `keep` decoder blocks and physically remove the rest."""

    kind: ClassVar[Kind] = "prune"
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    keep: int = Field(ge=1, le=512, description="blocks that stay")
    choose: Literal["spread", "similarity"] = Field(
        "spread", description="spread: evenly, first and last included; similarity: those that change most"
    )

    def layers(self, model: nn.Module) -> list[str]:
        """The names of the blocks it may remove."""
        name, blocks = decoder_blocks(model)
        self._check(len(blocks))
        return [f"{name}.{index}" for index in range(len(blocks))]

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """Remove the blocks from a copy.

        Raises:
            UserError: the model has fewer blocks than are to stay, or none that can be found.
        """
        result = bundle.clone()
        name, blocks = decoder_blocks(result.model)
        self._check(len(blocks))
        if self.choose == "spread":
            kept = spread(len(blocks), self.keep)
        else:
            influence = block_influence(
                result.model, blocks, torch.from_numpy(context.data.calibration.tokens)
            )
            kept = sorted(sorted(range(len(blocks)), key=lambda i: -influence[i])[: self.keep])
        before = sum(p.numel() for p in result.model.parameters())
        keep_blocks(result.model, name, kept)
        after = sum(p.numel() for p in result.model.parameters())
        notes = {"kept_layers": kept, "layers_before": len(blocks), "parameters_removed": before - after}
        return result.evolve(masks=_renamed(bundle.masks, name, kept), exports={}, notes=notes)

    def _check(self, count: int) -> None:
        if self.keep > count:
            raise UserError(f"prune_layers.keep: {self.keep} blocks, but the model has only {count}")


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


def keep_blocks(model: Any, name: str, kept: list[int]) -> None:
    """Reduce the list of blocks to `kept`, and put their new numbers wherever the old ones are held."""
    blocks = model.get_submodule(name)
    count = len(blocks)
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, nn.ModuleList(blocks[i] for i in kept))
    for number, block in enumerate(model.get_submodule(name)):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number  # the place of its keys and values in the cache
    config = model.config
    for key, value in config.to_dict().items():  # `layer_types` and the like: one entry per block
        if isinstance(value, list) and len(value) == count and "layer" in key:
            setattr(config, key, [value[i] for i in kept])
    config.num_hidden_layers = len(kept)


def _renamed(masks: Any, name: str, kept: list[int]) -> dict[str, Tensor]:
    """Masks of the blocks that stay, under their new names."""
    numbers = {str(old): str(new) for new, old in enumerate(kept)}
    result = {}
    for module, mask in masks.items():
        if not module.startswith(f"{name}."):
            result[module] = mask
            continue
        old, _, rest = module.removeprefix(f"{name}.").partition(".")
        if old in numbers:
            result[f"{name}.{numbers[old]}.{rest}"] = mask
    return result
