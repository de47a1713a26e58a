"""A student: a smaller model of the same kind and tokenizer, to be taught by `distill`.

Fewer blocks, narrower ones, or both; its weights are taken from the model it is made of
(structured/subcloning.py) or random. Taken weights start far ahead of random ones, the more so the less is
cut: compare both on your own budget of tokens. Of a number of blocks, `spread` keeps evenly spaced ones, the
usual start (Sanh et al. 2019, DistilBERT), `similarity` those that change their input most on calibration
text, by 1 - cos(input, output) averaged over positions (block influence: Men et al. 2024, ShortGPT). Cost:
none to speak of; `similarity` one forward pass over the calibration windows. Limits: widths in models of the
Llama kind only; the width of a head, the vocabulary and the context stay.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.models.stacks import decoder_blocks
from compress.passes.base import Kind, Need, Pass
from compress.structured import subcloning
from compress.structured.blocks import most_influential, spread


class Student(Pass):
    """A smaller model of the same kind, from chosen blocks and sliced widths, or with random weights."""

    kind: ClassVar[Kind] = "prune"
    resizes: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    blocks: int | tuple[int, ...] | None = Field(None, description="how many, or which, from 0; all if null")
    choose: Literal["spread", "similarity"] = Field(
        "spread",
        description="of a number. spread: evenly, with first and last; similarity: those that change most",
    )
    hidden: int | None = Field(None, ge=1, le=65536, description="width; the model's if null")
    intermediate: int | None = Field(None, ge=1, le=262_144, description="neurons of each block")
    heads: int | None = Field(None, ge=1, le=1024, description="query heads")
    kv_heads: int | None = Field(None, ge=1, le=1024, description="key-value heads")
    weights: Literal["teacher", "random"] = Field(
        "teacher", description="teacher: those of the model it is made of; random: from the recipe's seed"
    )

    @model_validator(mode="after")
    def _a_number_is_chosen_from(self) -> Self:
        if isinstance(self.blocks, int) and self.blocks < 1:
            raise ValueError(f"blocks: {self.blocks} leaves none; give 1 or more")
        if self.choose == "similarity" and not isinstance(self.blocks, int):
            raise ValueError("choose: similarity chooses as many blocks as `blocks` says; give it a number")
        return self

    def requires(self) -> frozenset[Need]:
        """Calibration text for `similarity` only."""
        return self.needs if self.choose == "similarity" else frozenset()

    def share_left(self, model: nn.Module) -> float:
        """Of the blocks those that stay, by their widths; of the rest the width."""
        own, new, found = subcloning.Widths.of(model.config), self._widths(model), decoder_blocks(model)[1]
        whole = sum(p.numel() for p in model.parameters())
        blocks = sum(p.numel() for block in found for p in block.parameters())
        hidden, kept = new.hidden / own.hidden, len(self._spread(len(found))) / len(found)
        neurons = new.neurons / own.neurons if own.neurons else 1.0
        inner = (new.heads / own.heads + 2 * neurons) / 3
        return hidden * (1 - blocks / whole * (1 - kept * inner))

    def layers(self, model: nn.Module) -> list[str]:
        """The blocks of the model it is made of."""
        name, found = decoder_blocks(model)
        subcloning.check(model, self._spread(len(found)), self._widths(model))
        return [f"{name}.{index}" for index in range(len(found))]

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """A new model; the given one stays.

        Raises:
            UserError: blocks or widths that the model does not have, or that cannot be sliced.
        """
        model = bundle.model
        _, found = decoder_blocks(model)
        blocks, widths = self._spread(len(found)), self._widths(model)
        subcloning.check(model, blocks, widths)
        if self.choose == "similarity":
            blocks = most_influential(
                model, found, torch.from_numpy(context.data.calibration.tokens), len(blocks)
            )
        masks: dict[str, Tensor] = {}
        if self.weights == "teacher":
            student, masks = subcloning.subclone(model, blocks, widths, bundle.masks)
        else:
            student = subcloning.random(model, blocks, widths, context.seed)
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, student))
        notes: dict[str, Any] = {
            "blocks": blocks, "hidden": widths.hidden, "intermediate": widths.neurons, "heads": widths.heads,
            "kv_heads": widths.kv, "parameters_before": before, "parameters": after,
        }  # fmt: skip
        return bundle.evolve(model=student, masks=masks, exports={}, notes=notes)

    def _spread(self, count: int) -> list[int]:
        if self.blocks is None:
            return list(range(count))
        if isinstance(self.blocks, tuple):
            return list(self.blocks)
        if self.blocks > count:
            raise UserError(f"student.blocks: {self.blocks}, but the model has only {count}; ask for no more")
        return spread(count, self.blocks)

    def _widths(self, model: Any) -> subcloning.Widths:
        own = subcloning.Widths.of(model.config)
        return subcloning.Widths(
            self.hidden or own.hidden,
            self.intermediate or own.neurons,
            self.heads or own.heads,
            self.kv_heads or own.kv,
            own.head,
        )
