"""A student: a smaller model of the same kind and tokenizer, to be taught by `distill`.

Fewer blocks, narrower ones, or both; its weights are taken from the model it is made of
(compress/subcloning.py) or random. Taken weights start far ahead of random ones, the more so the less is cut:
compare both on your own budget of tokens. Cost: none to speak of. Limits: widths in models of the Llama kind
only; the width of a head, the vocabulary and the context stay.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.models.stacks import decoder_blocks
from compress.passes.base import Kind, Pass
from compress.structured import subcloning
from compress.structured.blocks import spread


class Student(Pass):
    """A smaller model of the same kind, from chosen blocks and sliced widths, or with random weights."""

    kind: ClassVar[Kind] = "prune"
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    blocks: int | tuple[int, ...] | None = Field(
        None, description="how many, evenly spaced with first and last; or which, from 0; all if null"
    )
    hidden: int | None = Field(None, ge=1, le=65536, description="width; the model's if null")
    intermediate: int | None = Field(None, ge=1, le=262_144, description="neurons of each block")
    heads: int | None = Field(None, ge=1, le=1024, description="query heads")
    kv_heads: int | None = Field(None, ge=1, le=1024, description="key-value heads")
    weights: Literal["teacher", "random"] = Field(
        "teacher", description="teacher: those of the model it is made of; random: from the recipe's seed"
    )

    def layers(self, model: nn.Module) -> list[str]:
        """The blocks of the model it is made of."""
        name, found = decoder_blocks(model)
        subcloning.check(model, self._blocks(len(found)), self._widths(model))
        return [f"{name}.{index}" for index in range(len(found))]

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """A new model; the given one stays.

        Raises:
            UserError: blocks or widths that the model does not have, or that cannot be sliced.
        """
        model = bundle.model
        _, found = decoder_blocks(model)
        blocks, widths = self._blocks(len(found)), self._widths(model)
        subcloning.check(model, blocks, widths)
        student = subcloning.smaller(model, blocks, widths, context.seed)
        masks = {}
        if self.weights == "teacher":
            cut = subcloning.Cut(model, blocks, widths)
            cut.fill(student)
            masks = subcloning.masks(cut, student, dict(bundle.masks))
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, student))
        notes: dict[str, Any] = {
            "blocks": blocks, "hidden": widths.hidden, "intermediate": widths.neurons, "heads": widths.heads,
            "kv_heads": widths.kv, "parameters_before": before, "parameters": after,
        }  # fmt: skip
        return bundle.evolve(model=student, masks=masks, exports={}, notes=notes)

    def _blocks(self, count: int) -> list[int]:
        if self.blocks is None:
            return list(range(count))
        if isinstance(self.blocks, tuple):
            return list(self.blocks)
        if self.blocks > count or self.blocks < 1:
            return [count]  # which `check` refuses
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
