"""Whole decoder blocks taken out: a smaller, faster model of the same kind, to be healed afterwards.

`spread` keeps blocks evenly spaced, the first and the last among them: the usual start for a student
(Sanh et al. 2019, DistilBERT). `similarity` keeps the blocks that change their input most on calibration
text, by 1 - cos(input, output) averaged over positions (block influence: Men et al. 2024, ShortGPT).
Cost: `spread` none; `similarity` one forward pass over the calibration windows.
Limits: blocks must live in one `ModuleList` as long as `num_hidden_layers`.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.models.stacks import decoder_blocks
from compress.passes.base import Kind, Need, Pass
from compress.structured.blocks import block_influence, keep_blocks, renamed, spread


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
        return result.evolve(masks=renamed(bundle.masks, name, kept), exports={}, notes=notes)

    def _check(self, count: int) -> None:
        if self.keep > count:
            raise UserError(f"prune_layers.keep: {self.keep} blocks, but the model has only {count}")
