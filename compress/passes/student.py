"""A student: a smaller model of the same kind and tokenizer, to be taught by `distill`.

Fewer blocks, narrower ones, or both; its weights are taken from the model it is made of
(structured/subcloning.py) or random. Taken weights start far ahead of random ones, the more so the less is
cut: compare both on your own budget of tokens. Of a number of blocks, `spread` keeps evenly spaced ones, the
usual start (Sanh et al. 2019, DistilBERT), `similarity` those that change their input most on calibration
text, by 1 - cos(input, output) averaged over positions (block influence: Men et al. 2024, ShortGPT). Cost:
none to speak of; `similarity` one forward pass over the calibration windows. Encoders and encoder-decoders
keep their heads, whatever these are for. Limits: widths in models of the Llama kind only; the width of a
head, the vocabulary and the context stay.
"""

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from compress.artifact.bundle import Bundle
from compress.context import Context
from compress.errors import UserError
from compress.passes.base import Kind, Need, Pass
from compress.structured import subcloning
from compress.structured.blocks import lists_of_blocks, most_influential, spread
from compress.tasks.base import Task
from compress.tasks.registry import TASKS, task_of


class Student(Pass):
    """A smaller model of the same kind, from chosen blocks and sliced widths, or with random weights."""

    kind: ClassVar[Kind] = "prune"
    resizes: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"calibration"})
    not_after: ClassVar[frozenset[Kind]] = frozenset({"quantize"})

    tasks: ClassVar[frozenset[Task]] = TASKS

    blocks: int | tuple[int, ...] | None = Field(
        None, description="how many, or which, from 0; all if null; of an encoder-decoder the encoder's"
    )
    decoder_blocks: int | tuple[int, ...] | None = Field(
        None, description="of an encoder-decoder's decoder: how many, or which, from 0; all if null"
    )
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
        for field in ("blocks", "decoder_blocks"):
            asked = getattr(self, field)
            if isinstance(asked, int) and asked < 1:
                raise ValueError(f"{field}: {asked} leaves none; give 1 or more")
        numbers = isinstance(self.blocks, int) or isinstance(self.decoder_blocks, int)
        if self.choose == "similarity" and not numbers:
            raise ValueError("choose: similarity chooses as many blocks as `blocks` says; give it a number")
        return self

    def requires(self) -> frozenset[Need]:
        """Calibration text for `similarity` only."""
        return self.needs if self.choose == "similarity" else frozenset()

    def share_left(self, model: nn.Module) -> float:
        """Of the blocks those that stay, by their widths; of the rest the width."""
        own, new = subcloning.Widths.of(model.config), self._widths(model)
        whole = sum(p.numel() for p in model.parameters())
        neurons = new.neurons / own.neurons if own.neurons else 1.0
        inner = (new.heads / own.heads + 2 * neurons) / 3
        chosen, gone = self._chosen(model), 0.0
        for name, found in lists_of_blocks(model):
            size = sum(p.numel() for block in found for p in block.parameters())
            gone += size / whole * (1 - len(chosen[name]) / len(found) * inner)
        return new.hidden / own.hidden * (1 - gone)

    def layers(self, model: nn.Module) -> list[str]:
        """The blocks of the model it is made of."""
        subcloning.check(model, self._chosen(model), self._widths(model))
        return [f"{name}.{index}" for name, found in lists_of_blocks(model) for index in range(len(found))]

    def __call__(self, bundle: Bundle, context: Context) -> Bundle:
        """A new model; the given one stays.

        Raises:
            UserError: blocks or widths that the model does not have, or that cannot be sliced.
        """
        model = bundle.model
        blocks, widths = self._chosen(model), self._widths(model)
        subcloning.check(model, blocks, widths)
        if self.choose == "similarity":
            tokens = torch.from_numpy(context.data.calibration.tokens)
            for (name, found), asked in zip(lists_of_blocks(model), self._asked, strict=False):
                if isinstance(asked, int):
                    blocks[name] = most_influential(model, found, tokens, len(blocks[name]))
        masks: dict[str, Tensor] = {}
        if self.weights == "teacher":
            student, masks = subcloning.subclone(model, blocks, widths, bundle.masks)
        else:
            student = subcloning.random(model, blocks, widths, context.seed)
        first, *others = blocks.values()
        before, after = (sum(p.numel() for p in m.parameters()) for m in (model, student))
        notes: dict[str, Any] = {
            "blocks": first, "hidden": widths.hidden, "intermediate": widths.neurons, "heads": widths.heads,
            "kv_heads": widths.kv, "parameters_before": before, "parameters": after,
        }  # fmt: skip
        if others:
            notes["decoder_blocks"] = others[0]
        return bundle.evolve(model=student, masks=masks, exports={}, notes=notes)

    @property
    def _asked(self) -> tuple[int | tuple[int, ...] | None, ...]:
        return self.blocks, self.decoder_blocks

    def _chosen(self, model: Any) -> dict[str, list[int]]:
        """Of each list of blocks, by its name, those that stay; of a number the spread ones."""
        found = lists_of_blocks(model)
        if self.decoder_blocks is not None and len(found) == 1:
            raise UserError(
                f"student.decoder_blocks: is for encoder-decoders, and this is "
                f"{task_of(model.config).noun}; give blocks"
            )
        fields = zip(found, ("blocks", "decoder_blocks"), self._asked, strict=False)
        return {name: _kept(len(blocks), asked, field) for (name, blocks), field, asked in fields}

    def _widths(self, model: Any) -> subcloning.Widths:
        own = subcloning.Widths.of(model.config)
        return subcloning.Widths(
            self.hidden or own.hidden,
            self.intermediate or own.neurons,
            self.heads or own.heads,
            self.kv_heads or own.kv,
            own.head,
        )


def _kept(count: int, asked: int | tuple[int, ...] | None, field: str) -> list[int]:
    """Which of so many blocks a field asks for."""
    if asked is None:
        return list(range(count))
    if isinstance(asked, tuple):
        return list(asked)
    if asked > count:
        raise UserError(f"student.{field}: {asked}, but the model has only {count}; ask for no more")
    return spread(count, asked)
